r"""The frozen random matrices of RandLoRA: a pure function of a seed, kept once for all layers, never in a checkpoint.

Every number has a fixed place in a stream of its own (one for A, one for each Bⱼ), so a larger layer only sees more of
the same matrices, and a layer's slice does not depend on which other layers there are. Layers with the same seed, rank
and distribution on the same device hold one `RandomBases` object together. It lives as long as one of them does.

The paper's code divides each matrix by its sample standard deviation; here by that of the distribution, since the
sample would tie a layer to the largest one. Numbers are drawn on the CPU in float64, whatever the model's device.
"""

import hashlib
import math
import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_ref.core.checks import check_integer, check_number

DISTRIBUTIONS = ("uniform", "gaussian", "ternary")


def seed_of(generator: torch.Generator | None) -> int:
    """Return the seed a generator was started with (not its state), as a signed 64-bit number; None: torch's own."""
    seed = torch.initial_seed() if generator is None else generator.initial_seed()
    return (seed + 2**63) % 2**64 - 2**63


def random_rows(
    seed: int, name: str, rows: int, rank: int, distribution: str = "uniform", sparsity: float = 3.0
) -> Float[Tensor, "rows rank"]:
    """Draw independent numbers of mean 0 and variance 1, float64, on the CPU. More rows begin with the same ones.

    Args:
        seed: any 64-bit number.
        name: which stream of the seed, such as "A" or "B 3".
        rows: how many, >= 0.
        rank: numbers in a row, >= 1.
        distribution: "uniform" on [-√3, √3], "gaussian", or "ternary": ±√sparsity with probability 1/(2·sparsity)
            each, else 0.
        sparsity: >= 1, for "ternary". 1 has no zeros (binary), 3 has two thirds (the paper's sparse bases), √d is its
            "very sparse".

    Raises:
        TypeError, ValueError: an unknown distribution, or another argument out of range.
    """
    check_integer("rows", rows, low=0)
    check_integer("rank", rank, low=1)
    check_number("sparsity", sparsity, low=1)
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(key[:8], "big"))
    U = torch.rand(rows, rank, generator=stream, dtype=torch.float64)
    if distribution == "uniform":
        return (2 * U - 1) * math.sqrt(3)
    if distribution == "gaussian":
        return torch.special.ndtri(U.clamp_min(2**-54))  # 0 would become -∞
    if distribution == "ternary":
        half = 0.5 / sparsity
        return (U.ge(1 - half).double() - U.lt(half).double()) * math.sqrt(sparsity)
    raise ValueError(f"distribution: got {distribution!r}, wanted one of {DISTRIBUTIONS}")


def random_a(
    seed: int, rank: int, d: int, distribution: str = "uniform", sparsity: float = 3.0, *, redraw: bool = True
) -> Float[Tensor, "rank d"]:
    """Draw the one A of all blocks, (rank, d). A column without a non-zero number is drawn again.

    A is shared: a column of zeros in A is a column of zeros in ΔW, whatever is trained. The paper does not treat this
    case; `redraw=False` leaves such columns, which a ternary A has with probability (1 - 1/sparsity)^rank each.

    Raises:
        TypeError, ValueError: an argument out of range: rank >= 1, d >= 0, and sparsity in [1, 1000] where columns are
            drawn until they are not all zeros.
    """
    check_integer("d", d, low=0)
    check_number("sparsity", sparsity, low=1, high=1000 if redraw else math.inf)
    columns = random_rows(seed, "A", d, rank, distribution, sparsity)
    attempt = 0
    while redraw and bool((dead := ~columns.any(dim=1)).any()):
        attempt += 1
        columns[dead] = random_rows(seed, f"A {attempt}", d, rank, distribution, sparsity)[dead]
    return columns.T.contiguous()


class RandomBases:
    """A (rank, d) and B₁, B₂, ... (D, rank) of one seed on one device, as large as the largest layer needs.

    Use `shared_bases` to get one. Copies, also deep copies and unpickled ones, are the same object.

    Args:
        seed: of all streams.
        rank: r, >= 1.
        distribution, sparsity: see `random_rows`.
        device, dtype: where and how the numbers are kept.

    Raises:
        TypeError, ValueError: rank is no integer >= 1, sparsity not in [1, 1000], or an unknown distribution.

    Example:
        >>> import torch
        >>> from lowrank_ref.adapters.randlora_bases import shared_bases
        >>> bases = shared_bases(0, 4, "uniform", 1.0, torch.device("cpu"), torch.float32)
        >>> bases.grow(blocks=2, D=16, d=8)
        >>> bases.A.shape
        torch.Size([4, 8])
    """

    def __init__(
        self, seed: int, rank: int, distribution: str, sparsity: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.seed, self.rank, self.distribution, self.sparsity = seed, rank, distribution, sparsity
        probe = random_a(seed, rank, 1, distribution, sparsity).flatten()
        with torch.inference_mode(False):  # layers that train later hold the same tensors
            self.A = torch.empty(rank, 0, device=device, dtype=dtype)
            self.B = torch.empty(0, rank, 0, device=device, dtype=dtype)  # Bⱼ transposed, so that blocks lie in a row
            #: Seed and first column of A in millionths, which is what a checkpoint keeps of the bases.
            self.recipe = torch.tensor([seed, *(probe * 1e6).round().long().tolist()])
        self._rounded: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode(False)
    def grow(self, blocks: int, D: int, d: int) -> None:
        """Draw what a layer needs and is not there yet."""
        options: Any = (self.distribution, self.sparsity)
        if d > self.A.shape[1]:
            self.A = random_a(self.seed, self.rank, d, *options).to(self.A)
            self._rounded.clear()
        most, tallest = max(blocks, len(self.B)), max(D, self.B.shape[2])
        if (most, tallest) != (len(self.B), self.B.shape[2]):
            B = [random_rows(self.seed, f"B {j}", tallest, self.rank, *options).T.to(self.B.dtype) for j in range(most)]
            self.B = torch.stack(B).to(self.B)
            self._rounded.clear()

    def slices(
        self, blocks: int, D: int, d: int, dtype: torch.dtype | None = None
    ) -> tuple[Float[Tensor, "rank d"], Float[Tensor, "blocks D rank"]]:
        """Return A and B of one layer, views of the shared numbers. Another `dtype` rounds all of them once."""
        if dtype in (None, self.A.dtype):
            A, B = self.A, self.B
        else:
            if dtype not in self._rounded:
                with torch.inference_mode(False):
                    self._rounded[dtype] = self.A.to(dtype), self.B.to(dtype)
            A, B = self._rounded[dtype]
        return A[:, :d], B[:blocks, :, :D].transpose(1, 2)

    def __reduce__(self) -> tuple[Any, ...]:
        where = (self.A.device, self.A.dtype)
        size = (self.B.shape[0], self.B.shape[2], self.A.shape[1])
        return _again, ((self.seed, self.rank, self.distribution, self.sparsity, *where), size)


_shared: weakref.WeakValueDictionary[tuple[Any, ...], RandomBases] = weakref.WeakValueDictionary()


def shared_bases(
    seed: int, rank: int, distribution: str, sparsity: float, device: torch.device, dtype: torch.dtype
) -> RandomBases:
    """Return the bases of this description: those that a layer holds already, or new ones."""
    key = (seed, rank, distribution, sparsity, str(device), dtype)
    bases = _shared.get(key)
    if bases is None:
        bases = _shared[key] = RandomBases(*key[:4], device, dtype)
    return bases


def _again(description: tuple[Any, ...], size: tuple[int, int, int]) -> RandomBases:
    bases = shared_bases(*description)
    bases.grow(*size)
    return bases


def checked_bases(bases: RandomBases, recipe: Tensor, prefix: str = "") -> RandomBases:
    """Return the bases if they are those of the recipe, else raise a ValueError that names the layer by its prefix."""
    if bool(((recipe.cpu() - bases.recipe).abs() > 1).any()):
        raise ValueError(f"{prefix}recipe: got bases that their seed {bases.seed} does not draw here, wanted those")
    return bases


def writes(tensor: Tensor) -> int:
    """Return how often a tensor was written in place; 0 for those made in inference mode, which nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def stacked(B: Float[Tensor, "blocks D r"]) -> Float[Tensor, "rows D"]:
    """Return the columns of all Bⱼ as rows, (blocks·r, D): a view of the shared bases, no copy."""
    return B.transpose(1, 2).flatten(0, 1)


class _MixedRows(torch.autograd.Function):
    """ΛⱼAΓⱼ with a backward that keeps A, Λ and Γ only: not one (r, d) product per block."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(A, lam, gamma)
        return lam[:, :, None] * A * gamma[:, None, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[None, Tensor, Tensor]:
        A, lam, gamma = ctx.saved_tensors
        GA = G * A
        return None, torch.einsum("jki,ji->jk", GA, gamma), torch.einsum("jki,jk->ji", GA, lam)


def mixed_rows(
    A: Float[Tensor, "r d"], lam: Float[Tensor, "blocks r"], gamma: Float[Tensor, "blocks d"]
) -> Float[Tensor, "rows d"]:
    """Return ΛⱼAΓⱼ of all blocks, one below the other, (blocks·r, d). A gets no gradient."""
    return _MixedRows.apply(A, lam, gamma).flatten(0, 1)


def to_peft(
    A: Float[Tensor, "r d"],
    B: Float[Tensor, "blocks D r"],
    lam: Float[Tensor, "blocks r"],
    gamma: Float[Tensor, "blocks d"],
) -> dict[str, Tensor]:
    """Return the tensors of a PEFT layer that computes the same ΔW; its `randlora_alpha` is s·r.

    PEFT lays B (D, blocks, r) out block by block but ΛAΓ row by row, so its Bⱼ are columns j, j + blocks, ... A PEFT
    model keeps one B: layers with another number of blocks would slice it into other Bⱼ.
    """
    D, shape = B.shape[1], (B.shape[1], B.shape[0], B.shape[2])
    return {
        "randlora_A": A[:, None],
        "randlora_B": B.permute(1, 2, 0).reshape(D, -1).view(shape),
        "randlora_lambda": lam.T,
        "randlora_gamma": gamma,
    }


def from_peft(tensors: dict[str, Tensor], m: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (A, B, lam, gamma) of one (m, n) layer from PEFT's tensors; its A and B may be larger."""
    lam, gamma = tensors["randlora_lambda"].T, tensors["randlora_gamma"]
    blocks, rank = lam.shape
    flat = tensors["randlora_B"][: max(m, n), :blocks].flatten(1)
    return tensors["randlora_A"][:, 0, : min(m, n)], flat.unflatten(1, (rank, blocks)).permute(2, 0, 1), lam, gamma
