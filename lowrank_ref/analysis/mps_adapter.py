"""Matrix product states (tensor trains) of weights, and the adapter of arXiv 2601.06788 that is one.

`tensor_train` cuts a matrix into a chain of small cores by successive SVDs (Oseledets 2011); the size of the link at a
cut, its bond, is the number of Schmidt values there. A low-rank update is a chain with small bonds.

The adapter keeps LoRA's B (m, r) and writes A (r, n) as two cores, n = n₁·n₂ split by `near_square`:

    A[k, (j₁, j₂)] = Σ_a G1[k, j₁, a] G2[a, j₂],   G1 (r, n₁, χ), G2 (χ, n₂)

with bond χ <= min(r·n₁, n₂), at which A is free again. Reconstructed: the paper's totals for m = n = 4096, r = 256,
χ = 32 (1,574,912 numbers, LoRA 2,097,152) fit this layout exactly; the start is ours, entries of A with LoRA's
variance 1/(3n). For a prime n the split is 1·n, and A = G1·G2 a product of two matrices.

Cost per layer: mr + r·n₁·χ + χ·n₂ trained numbers; a token takes χn + r·n₁·χ + mr products, fewer than LoRA's r(m + n)
when χ is small, and neither A nor ΔW is formed before the merge.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_matrix, check_number, check_rank
from lowrank_ref.core.layers import AdaptedLinear, weight_of
from lowrank_ref.core.linalg import svd


def tensor_train(W: Float[Tensor, "m n"], sites: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Cut the row-major vec(W) into one core per site, by an SVD from left to right; exact.

    Args:
        W: matrix, floating point, finite.
        sites: d_1, ..., d_N, with product m·n.

    Returns:
        Cores (χ_{k-1}, d_k, χ_k) with χ_0 = χ_N = 1, all but the last with orthonormal columns; and the singular values
        at each of the N - 1 cuts, those above 1e-12 of the largest. The bond χ_k is their number.

    Raises:
        TypeError, ValueError: W is no finite matrix, or the sites do not multiply to its size.
    """
    check_matrix("W", W)
    if math.prod(sites) != W.numel():
        raise ValueError(f"sites: got {sites} with product {math.prod(sites)}, wanted product {W.numel()}")
    rest, cores, values = W.reshape(1, -1), [], []
    for d in sites[:-1]:
        bond = rest.shape[0]
        U, S, Vh = svd(rest.reshape(bond * d, -1))
        keep = max(int((S / S[0] > 1e-12).sum()), 1)
        cores.append(U[:, :keep].reshape(bond, d, keep))
        values.append(S[:keep])
        rest = S[:keep, None] * Vh[:keep]
    return [*cores, rest.reshape(-1, sites[-1], 1)], values


def contract_train(cores: list[Tensor]) -> Float[Tensor, "..."]:
    """Multiply the cores together; return the tensor of shape (d_1, ..., d_N)."""
    out = cores[0]
    for core in cores[1:]:
        out = torch.tensordot(out, core, dims=1)
    return out.squeeze(0).squeeze(-1)


def near_square(n: int) -> tuple[int, int]:
    """Return n = n₁·n₂ with n₁ the largest divisor not above √n: (64, 64) for 4096, (3, 4) for 12, (1, 13) for 13."""
    n1 = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return n1, n // n1


def mps_factor(G1: Float[Tensor, "r n1 bond"], G2: Float[Tensor, "bond n2"]) -> Float[Tensor, "r n"]:
    """Return A (r, n₁·n₂): the cores contracted over the bond.

    Example:
        >>> mps_factor(torch.tensor([[[2.0], [0.0]]]), torch.tensor([[1.0, 3.0]])).tolist()
        [[2.0, 6.0, 0.0, 0.0]]
    """
    return (G1 @ G2).flatten(1)


def mps_update(
    x: Float[Tensor, "*batch n"],
    G1: Float[Tensor, "r n1 bond"],
    G2: Float[Tensor, "bond n2"],
    B: Float[Tensor, "m r"],
    scale: float,
) -> Float[Tensor, "*batch m"]:
    """Return s·B(Ax) for every row: x meets the small core first, so that neither A nor ΔW is formed."""
    _, n1, _ = G1.shape
    inner = F.linear(x.unflatten(-1, (n1, -1)), G2)  # (..., n1, bond)
    return scale * F.linear(F.linear(inner.flatten(-2), G1.flatten(1)), B)


def split_factor(A: Float[Tensor, "r n"], bond: int) -> tuple[Float[Tensor, "r n1 bond"], Float[Tensor, "bond n2"]]:
    """Return the cores closest to a given A, such as that of a trained LoRA; exact at bond = min(r·n₁, n₂).

    Raises:
        TypeError, ValueError: A is no finite matrix, or the bond is out of range.
    """
    check_matrix("A", A)
    n1, n2 = near_square(A.shape[1])
    check_rank(bond, (len(A) * n1, n2), "bond")
    U, S, Vh = svd(A.reshape(-1, n2), bond)
    return (U * S).reshape(len(A), n1, bond), Vh


def init_cores(
    W: Float[Tensor, "m n"], rank: int, bond: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "r n1 bond"], Float[Tensor, "bond n2"], Float[Tensor, "m r"]]:
    """Return Gaussian cores of equal variance, such that Var(A) = 1/(3n) as in LoRA, and B = 0; float32 or wider.

    Raises:
        TypeError, ValueError: rank not in [1, min(m, n)] or bond not in [1, min(r·n₁, n₂)].
    """
    m, n = W.shape
    check_rank(rank, (m, n))
    n1, n2 = near_square(n)
    check_rank(bond, (rank * n1, n2), "bond")
    dtype = torch.promote_types(W.dtype, torch.float32)
    device = generator.device if generator is not None else W.device
    std = (3 * n * bond) ** -0.25
    shapes = (rank, n1, bond), (bond, n2)
    G1, G2 = (torch.randn(s, generator=generator, dtype=dtype, device=device).mul_(std) for s in shapes)
    return G1.to(W.device), G2.to(W.device), torch.zeros(m, rank, dtype=dtype, device=W.device)


class MPSLinear(AdaptedLinear):
    """A frozen linear layer with a trained update s·B·A whose A is a matrix product state of two cores.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, 1 <= r <= min(m, n).
        bond: χ, 1 <= χ <= min(r·n₁, n₂), with n₁, n₂ from `near_square`.
        alpha: α > 0; the scale is α/r.
        generator: source of the cores.

    Raises:
        TypeError, ValueError: base is no floating-point linear layer; rank, bond or alpha out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.analysis import MPSLinear
        >>> layer = MPSLinear(nn.Linear(12, 10), rank=8, bond=4)
        >>> layer.G1.shape, layer.G2.shape, layer.B.shape
        (torch.Size([8, 3, 4]), torch.Size([4, 4]), torch.Size([10, 8]))
    """

    adapter_names: tuple[str, ...] = ("G1", "G2", "B")

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        bond: int = 4,
        alpha: float = 16.0,
        generator: torch.Generator | None = None,
    ) -> None:
        W = weight_of(base)
        check_number("alpha", alpha, low=0, open_low=True)
        G1, G2, B = init_cores(W.detach(), rank, bond, generator)
        super().__init__(base)
        self.rank, self.bond, self.scale = rank, bond, alpha / rank
        self.G1, self.G2, self.B = nn.Parameter(G1), nn.Parameter(G2), nn.Parameter(B)

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·B·A."""
        return self.scale * (self.B @ mps_factor(self.G1, self.G2))

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return s·B(Ax), core by core."""
        return mps_update(x, self.G1, self.G2, self.B, self.scale)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B, s) with ΔW = s·BA: as a plain LoRA, what export to PEFT's format writes."""
        return mps_factor(self.G1, self.G2), self.B, self.scale
