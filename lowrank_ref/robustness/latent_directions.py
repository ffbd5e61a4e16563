"""Directions in the latent space of a generator along which images change most, found without labels.

| source                                                            | here                   |
|-------------------------------------------------------------------|------------------------|
| SeFa (Shen and Zhou 2021, 2007.06600): eigenvectors of AᵀA        | `first_layer_directions` |
| Local geometry: eigenvectors of the mean of JᵀJ, J = ∂G/∂z        | `jacobian_directions`  |
| PCA of codes (compare GANSpace, Härkönen et al. 2020, 2004.02546) | `code_directions`      |

A (m, d) is the weight of the generator's first linear layer, h = A z + b. SeFa asks for the unit vectors n with the
largest ‖A n‖²: the right singular vectors of A. It reads weights alone; the others need codes, and J the whole network.
Where A is of rank r, directions r+1 to d leave h unchanged.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_matrix, check_number, check_rank
from lowrank_ref.core.linalg import fixed_signs


class LatentDirections(NamedTuple):
    """Orthonormal columns V (d, rank), and how much each moves what was asked about, λ (rank,), in falling order.

    Example:
        >>> import torch
        >>> from lowrank_ref.robustness import first_layer_directions
        >>> found = first_layer_directions(torch.nn.Linear(16, 256).weight.detach(), 3)
        >>> found.V.shape, found.values.shape
        (torch.Size([16, 3]), torch.Size([3]))
    """

    V: Tensor
    values: Tensor


def first_layer_directions(
    A: Float[Tensor, "m d"], rank: int | None = None, *, normalise: bool = False
) -> LatentDirections:
    """Return the top eigenvectors and eigenvalues of AᵀA, SeFa's closed form.

    The largest entry of each direction is positive. Directions of equal eigenvalues are any basis of their space.

    Args:
        A: weight of the first layer (m, d), or the stacked weights of several layers that read the code; m < d is fine.
        rank: how many directions, 1 <= rank <= d; None returns all.
        normalise: scale each row of A to length 1 first, as SeFa's official code does; rows of zeros stay.

    Returns:
        V (d, rank) and λ_k = σ_k(A)², in the dtype of A, at least float32.

    Raises:
        TypeError, ValueError: A is no finite matrix of floating point, or rank is out of range.

    Example:
        >>> first_layer_directions(torch.tensor([[0.0, 3.0], [1.0, 0.0]])).V.tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    check_matrix("A", A)
    rows = A.double()
    if normalise:
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return _top(rows.T @ rows, rank, A.dtype)


def jacobian_directions(
    generator: Callable[[Tensor], Tensor], z: Float[Tensor, "n d"], rank: int | None = None
) -> LatentDirections:
    """Return the top eigenvectors and eigenvalues of the mean of JᵀJ over the codes: n·E[JᵀJ]·n = E‖J n‖².

    Args:
        generator: maps codes (n, d) to images, each row by itself.
        z: codes at which the Jacobian is taken.
        rank: as above.

    Raises:
        TypeError, ValueError: z is no finite matrix of floating point, or rank is out of range.
    """
    check_matrix("z", z)
    columns = []
    for k in range(z.shape[1]):
        tangent = torch.zeros_like(z)
        tangent[:, k] = 1
        columns.append(torch.func.jvp(generator, (z,), (tangent,))[1].flatten(1).double())
    J = torch.stack(columns, 2)  # (n, pixels, d)
    return _top(torch.einsum("npi,npj->ij", J, J) / len(z), rank, z.dtype)


def code_directions(z: Float[Tensor, "n d"], rank: int | None = None) -> LatentDirections:
    """Return the principal directions of the codes and the variance along each; errors as above.

    Raises:
        TypeError, ValueError: z is no finite matrix of floating point, fewer than 2 codes, or rank is out of range.
    """
    check_matrix("z", z)
    if len(z) < 2:
        raise ValueError(f"z: got {len(z)} codes, wanted at least 2")
    centred = z.double() - z.double().mean(0)
    return _top(centred.T @ centred / (len(z) - 1), rank, z.dtype)


def random_amplitudes(
    count: int, rank: int, *, epsilon: float, generator: torch.Generator | None = None
) -> Float[Tensor, "count rank"]:
    """Return α drawn uniformly from the ball ‖α‖₂ <= ε in `rank` dimensions, float32.

    Raises:
        TypeError, ValueError: count or rank below 1, or ε < 0.
    """
    check_integer("count", count, low=1)
    check_integer("rank", rank, low=1)
    check_number("epsilon", epsilon, low=0)
    direction = F.normalize(torch.randn(count, rank, generator=generator), dim=1)
    return epsilon * torch.rand(count, 1, generator=generator) ** (1 / rank) * direction


@torch.no_grad()
def class_flips(
    model: Callable[[Tensor], Tensor], x: Float[Tensor, "n *shape"], edited: Float[Tensor, "n *shape"]
) -> float:
    """Return the share of images whose class, as the model sees it, the edit changes.

    The model judges the edit, so it has to know the nuisance: one that was trained where class and nuisance go together
    calls a changed nuisance a changed class.

    Raises:
        ValueError: no image, or shapes that differ.
    """
    if x.shape != edited.shape or len(x) == 0:
        raise ValueError(f"edited: got shape {tuple(edited.shape)}, wanted that of x, {tuple(x.shape)}, n >= 1")
    return float((model(x).argmax(1) != model(edited).argmax(1)).double().mean())


def _top(gram: Tensor, rank: int | None, dtype: torch.dtype) -> LatentDirections:
    """The top eigenvectors of a symmetric matrix in float64, their signs fixed."""
    d = len(gram)
    rank = d if rank is None else rank
    check_rank(rank, (d, d))
    values, V = torch.linalg.eigh((gram + gram.T) / 2)
    values, V = values.flip(0)[:rank].clamp_min(0), V.flip(1)[:, :rank]
    out = torch.promote_types(dtype, torch.float32)
    return LatentDirections((V * fixed_signs(V)).to(out), values.to(out))
