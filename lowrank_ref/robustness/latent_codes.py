"""From images to codes of a frozen generator: inversion of a whole batch, shifted codes, and several codes an image.

| source                                                                    | here               |
|---------------------------------------------------------------------------|--------------------|
| ‖G(z) - x‖² + λ_f‖Φ(G(z)) - Φ(x)‖² + λ_e‖z - E(G(z))‖² (Zhu et al. 2020, 2004.00049) | `inversion_loss`   |
| refine the codes of a batch by Adam, from the encoder's                   | `invert`           |
| w̄ + ψ(z - w̄), truncation                                                  | `shift_codes`      |
| F = Σ_n α_n ⊙ G₁(z_n), x̂ = G₂(F) (Gu, Shen and Zhou 2020, 1912.07116)     | `compose_codes`    |
| z_n and α_n fitted to a batch                                             | `expand_codes`     |
| z + V α, α amplitudes along directions V                                  | `move_codes`       |

Letters: G the generator, cut into G₁ and G₂; E the encoder, Φ features of images; z codes (batch, d), or (batch, N, d);
α weights of channels (batch, N, C); w̄ the mean of the codes.

Ours: sums over pixels, features and entries of a code, for each image by itself; Adam; the best iterate of each image
is kept. α starts at 1/N, and the sum is not divided by N once more.
Cost: each step is one forward and one backward pass of G (and of E and Φ). No weight gets a gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_finite, check_floating, check_integer, check_number

Map = Callable[[Tensor], Tensor]


class Inverted(NamedTuple):
    """Codes (batch, d) or (batch, N, d), weights (batch, N, C) or None, and the loss of each image, first and best.

    Example:
        >>> import torch
        >>> from lowrank_ref.robustness import invert
        >>> found = invert(torch.nn.Linear(2, 4), torch.rand(3, 4), torch.zeros(3, 2))
        >>> found.z.shape, bool((found.loss <= found.first_loss).all())
        (torch.Size([3, 2]), True)
    """

    z: Tensor
    weights: Tensor | None
    first_loss: Tensor
    loss: Tensor


def inversion_loss(
    generator: Map,
    z: Float[Tensor, "batch d"],
    x: Float[Tensor, "batch *shape"],
    *,
    encoder: Map | None = None,
    features: Map | None = None,
    feature_weight: float = 5e-5,
    code_weight: float = 2.0,
) -> Float[Tensor, " batch"]:
    """Return ‖G(z) - x‖² + λ_f‖Φ(G(z)) - Φ(x)‖² + λ_e‖z - E(G(z))‖² of every image.

    Args:
        generator: G, codes to images.
        z: codes.
        x: images.
        encoder: E; None leaves its term out.
        features: Φ; None leaves its term out.
        feature_weight: λ_f >= 0.
        code_weight: λ_e >= 0. Both defaults are those of the official code of in-domain inversion.

    Raises:
        TypeError, ValueError: a weight out of range, or G(z) and x of different shapes.
    """
    check_number("feature_weight", feature_weight, low=0)
    check_number("code_weight", code_weight, low=0)
    made = generator(z)
    if made.shape != x.shape:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted that of the generator's images, {tuple(made.shape)}")
    loss = _squares(made - x)
    if features is not None:
        loss = loss + feature_weight * _squares(features(made) - features(x))
    if encoder is not None:
        loss = loss + code_weight * _squares(z - encoder(made))
    return loss


def invert(
    generator: Map,
    x: Float[Tensor, "batch *shape"],
    start: Float[Tensor, "batch d"],
    *,
    steps: int = 100,
    lr: float = 1e-2,
    encoder: Map | None = None,
    features: Map | None = None,
    feature_weight: float = 5e-5,
    code_weight: float = 2.0,
) -> Inverted:
    """Return for each image of the batch the code with the smallest `inversion_loss` that Adam came by.

    Args:
        generator: G, frozen.
        x: images.
        start: first codes, for example those of an encoder.
        steps: N >= 0.
        lr: rate of Adam, > 0.
        encoder, features, feature_weight, code_weight: as for `inversion_loss`.

    Raises:
        TypeError, ValueError: as `inversion_loss`; steps or lr out of range; NaN or infinity in x, start or a loss.
    """
    _check_batch(x, start, 2)

    def loss(z: Tensor) -> Tensor:
        weights = {"feature_weight": feature_weight, "code_weight": code_weight}
        return inversion_loss(generator, z, x, encoder=encoder, features=features, **weights)

    (z,), first, best = _descend(loss, (start,), steps, lr)
    return Inverted(z, None, first, best)


def shift_codes(
    z: Float[Tensor, "*batch d"], mean: Float[Tensor, " d"], truncation: float
) -> Float[Tensor, "*batch d"]:
    """Return w̄ + ψ(z - w̄): codes drawn towards the mean, so that edits stay where the generator was trained.

    Args:
        z: codes.
        mean: w̄, of the codes of many images.
        truncation: ψ in [0, 1]; 1 leaves the codes alone.

    Raises:
        TypeError, ValueError: ψ out of range, or a mean of another width.

    Example:
        >>> shift_codes(torch.tensor([[4.0, 0.0]]), torch.tensor([0.0, 2.0]), 0.5).tolist()
        [[2.0, 1.0]]
    """
    check_number("truncation", truncation, low=0, high=1)
    if mean.shape != z.shape[-1:]:
        raise ValueError(f"mean: got shape {tuple(mean.shape)}, wanted ({z.shape[-1]},)")
    return torch.lerp(mean.expand_as(z), z, truncation)


def compose_codes(
    first: Map, z: Float[Tensor, "batch codes d"], weights: Float[Tensor, "batch codes channels"]
) -> Float[Tensor, "batch channels *places"]:
    """Return F = Σ_n α_n ⊙ G₁(z_n), the features that `second` turns into an image.

    Args:
        first: G₁, codes (n, d) to features (n, C, ...).
        z: N codes for each image.
        weights: α, one number for each code and channel.

    Raises:
        ValueError: shapes that do not fit.
    """
    if z.ndim != 3 or weights.shape[:2] != z.shape[:2]:
        shapes = tuple(z.shape), tuple(weights.shape)
        raise ValueError(f"z, weights: got shapes {shapes}, wanted (batch, N, d) and (batch, N, channels)")
    F = first(z.flatten(0, 1)).unflatten(0, z.shape[:2])  # (batch, N, C, ...)
    if weights.shape[2:] != F.shape[2:3]:
        raise ValueError(f"weights: got {weights.shape[2]} channels, wanted {F.shape[2]}, as the features have")
    return (weights.view(*weights.shape, *[1] * (F.ndim - 3)) * F).sum(1)


def expand_codes(
    first: Map,
    second: Map,
    x: Float[Tensor, "batch *shape"],
    start: Float[Tensor, "batch codes d"],
    *,
    steps: int = 100,
    lr: float = 1e-2,
) -> Inverted:
    """Return N codes and their weights for each image, fitted to make ‖G₂(F) - x‖² small.

    Args:
        first, second: the generator, cut: G = G₂ ∘ G₁.
        x: images.
        start: first codes; the weights start at 1/N.
        steps: of Adam, >= 0.
        lr: its rate, > 0.

    Raises:
        TypeError, ValueError: steps or lr out of range; shapes that do not fit; NaN or infinity in x, start or a loss.
    """
    _check_batch(x, start, 3)
    with torch.no_grad():
        channels = first(start[:1, 0]).shape[1]
    weights = start.new_full((*start.shape[:2], channels), 1 / start.shape[1])

    def loss(z: Tensor, weights: Tensor) -> Tensor:
        made = second(compose_codes(first, z, weights))
        if made.shape != x.shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted that of G₂'s images, {tuple(made.shape)}")
        return _squares(made - x)

    (z, weights), before, best = _descend(loss, (start, weights), steps, lr)
    return Inverted(z, weights, before, best)


def move_codes(
    z: Float[Tensor, "batch *codes d"], V: Float[Tensor, "d q"], amplitudes: Float[Tensor, "batch q"]
) -> Float[Tensor, "batch *codes d"]:
    """Return z + V α for each image; of several codes all are moved alike.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> move_codes(torch.zeros(1, 2), torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])).tolist()
        [[0.0, 3.0]]
    """
    if z.ndim not in (2, 3) or V.ndim != 2 or amplitudes.shape != (len(z), V.shape[1]) or z.shape[-1] != V.shape[0]:
        shapes = tuple(z.shape), tuple(V.shape), tuple(amplitudes.shape)
        raise ValueError(f"z, V, amplitudes: got shapes {shapes}, wanted (n, d) or (n, N, d), (d, q) and (n, q)")
    step = amplitudes @ V.T
    return z + (step if z.ndim == 2 else step[:, None])


# --- inside -----------------------------------------------------------------------------------------------------------


def _squares(t: Tensor) -> Tensor:
    return t.flatten(1).square().sum(1)


def _check_batch(x: Tensor, start: Tensor, ndim: int) -> None:
    for name, value in {"x": x, "start": start}.items():
        check_floating(name, value)
        check_finite(name, value)
    if start.ndim != ndim or len(start) != len(x) or start.numel() == 0:
        wanted = f"({len(x)}, {'N, ' if ndim == 3 else ''}d)"
        raise ValueError(f"start: got shape {tuple(start.shape)}, wanted {wanted}, not empty")


@torch.inference_mode(False)
def _descend(
    loss_of: Callable[..., Tensor], start: tuple[Tensor, ...], steps: int, lr: float
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Adam on a sum of losses, one an image; each image keeps its best iterate."""
    check_integer("steps", steps, low=0)
    check_number("lr", lr, low=0, open_low=True)
    now = tuple(t.detach().clone().requires_grad_() for t in start)
    adam = torch.optim.Adam(now, lr=lr)
    for step in range(steps + 1):
        with torch.enable_grad():
            value = loss_of(*now)
            grads = torch.autograd.grad(value.sum(), now)
        value = value.detach()
        check_finite("loss", value)
        if step == 0:
            first, top, best = value, value, tuple(t.detach().clone() for t in now)
        else:
            better = value < top
            top = torch.where(better, value, top)
            best = tuple(torch.where(better.view(-1, *[1] * (t.ndim - 1)), t.detach(), b) for t, b in zip(now, best))
        for t, grad in zip(now, grads):
            t.grad = grad
        adam.step()
    return best, first, top
