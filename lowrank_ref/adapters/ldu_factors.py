"""Which pairs (lᵢ, uᵢ) LoLDU trains: those of elimination, and controls; how z starts; how to know the pairs again.

Unlike singular vectors, columns of P·L and rows of U depend on the order in which a layer's inputs are numbered, and
the order of rows decides between pivots of equal size. Rounding W can change a pivot, and with it all that follows.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.adapters.singular_pairs import fingerprint
from lowrank_ref.core.checks import check_rank

#: What `choose_factors` can choose: the method, the same span in other units, and controls.
LDU_FACTORS = ("ldu", "normalised", "unpermuted", "shuffled", "triangular", "orthogonal", "identity")

#: Ways to start z; the last four are those that the official code does not compensate.
LDU_STARTS = ("lu", "uniform", "normal", "constant", "s_uniform", "s_normal", "ones", "zeros")


def _mixed(T: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a lower trapezoidal T with the entries below its diagonal at other places below it."""
    rows, columns = torch.tril_indices(len(T), T.shape[1], -1, device=T.device)
    device = generator.device if generator is not None else T.device
    places = torch.randperm(len(rows), generator=generator, device=device).to(T.device)
    return T.index_put((rows, columns), T[rows[places], columns[places]])


def _orthonormal(T: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return random orthonormal columns in the shape of T."""
    device = generator.device if generator is not None else T.device
    noise = torch.empty(T.shape, dtype=T.dtype, device=device).normal_(generator=generator)
    return torch.linalg.qr(noise.to(T.device)).Q


def choose_factors(
    order: Int[Tensor, " m"],
    L: Float[Tensor, "m k"],
    D: Float[Tensor, " k"],
    U: Float[Tensor, "k n"],
    rank: int,
    factors: str = "ldu",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Return left (m, r), D (r) and right (r, n), of which left·diag(δ)·right is trained.

    Args:
        order, L, D, U: what `loldu.ldu` returns.
        rank: r, the first r.
        factors: "ldu" is the method, left = L[order]. "normalised": columns of left and rows of right have norm 1, D is
            multiplied by the norms. Controls: "unpermuted" leaves left = L, in the order of elimination; "shuffled"
            keeps both sets of directions, but no uᵢ stays with its lᵢ; "triangular" puts the entries below the diagonal
            of L, and those above the diagonal of U, at random places there; "orthogonal" has random orthonormal columns
            and rows; "identity" has L = U = I.
        generator: source of what is drawn.

    Raises:
        TypeError, ValueError: rank out of range, unknown factors, or rank 1 to be shuffled.
    """
    check_rank(rank, (len(L), U.shape[1]))
    if factors not in LDU_FACTORS or (factors == "shuffled" and rank == 1):
        wanted = f"one of {LDU_FACTORS}, shuffled from rank 2 on"
        raise ValueError(f"factors: got {factors!r} of rank {rank}, wanted {wanted}")
    if factors == "triangular":
        L, U = _mixed(L, generator), _mixed(U.T, generator).T
    if factors == "identity":
        L, U = (torch.eye(*T.shape, dtype=T.dtype, device=T.device) for T in (L, U))
    left, D, right = (L if factors == "unpermuted" else L[order])[:, :rank], D[:rank], U[:rank]
    if factors == "normalised":
        lengths = left.norm(dim=0), right.norm(dim=1)
        left, D, right = left / lengths[0], D * lengths[0] * lengths[1], right / lengths[1][:, None]
    if factors == "orthogonal":
        left, right = _orthonormal(left, generator), _orthonormal(right.T, generator).T
    if factors == "shuffled":  # one cycle through all: nobody keeps a partner
        device = generator.device if generator is not None else D.device
        cycle = torch.randperm(rank, generator=generator, device=device).to(D.device)
        right = right.index_copy(0, cycle, right[cycle.roll(1)])
    return left.clone(memory_format=torch.contiguous_format), D.clone(), right.contiguous().clone()


def start_diagonal(
    D: Float[Tensor, " r"], start: str = "lu", generator: torch.Generator | None = None
) -> Float[Tensor, " r"]:
    """Return z⁰, where z starts: "lu" is D, "constant" m, "uniform" a uniform draw within half of m of either sign.

    "normal" is N(m, sd²), with m the mean of D and sd its deviation (r - 1 in the denominator); "s_uniform" is
    U(-1, 1), "s_normal" N(0, 1); "ones" and "zeros" are what they say.

    Raises:
        ValueError: another start.
    """
    if start not in LDU_STARTS:
        raise ValueError(f"start: got {start!r}, wanted one of {LDU_STARTS}")
    mean, new = D.mean(), torch.empty_like(D, device=generator.device if generator is not None else D.device)
    if start in ("uniform", "s_uniform"):
        half = mean.abs() / 2 if start == "uniform" else 1.0
        return new.uniform_(-1, 1, generator=generator).to(D.device) * half
    if start in ("normal", "s_normal"):
        noise = new.normal_(generator=generator).to(D.device)
        return noise if start == "s_normal" else mean + noise * (D.std() if len(D) > 1 else 0.0)
    if start in ("ones", "zeros"):
        return torch.full_like(D, float(start == "ones"))
    return D.clone() if start == "lu" else mean.expand_as(D).clone()


def factor_mark(left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]) -> Float[Tensor, " 4"]:
    """Return four numbers of size about 1 that tell factors apart: Σᵢ √2 cos(f·i)·pᵢ/√r, f = 1 to 4.

    pᵢ is the `singular_pairs.fingerprint` of lᵢ and uᵢ, each divided by its norm.
    """
    p = fingerprint(F.normalize(left, dim=0), F.normalize(right, dim=1))
    i = torch.arange(1.0, len(p) + 1, dtype=p.dtype, device=p.device)
    waves = torch.cos(torch.arange(1.0, 5.0, dtype=p.dtype, device=p.device)[:, None] * i)
    return (2 / len(p)) ** 0.5 * (waves @ p)


def ldu_gram(left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]) -> Float[Tensor, "r r"]:
    """Return Mᵢⱼ = (lᵢᵀlⱼ)(uᵢᵀuⱼ), by which ‖P·L·diag(δ)·U‖² = δᵀMδ. For SVFit M is the identity."""
    return (left.T @ left) * (right @ right.T)


def nearest_diagonal(
    left: Float[Tensor, "m r"], wanted: Float[Tensor, "m n"], right: Float[Tensor, "r n"]
) -> Float[Tensor, " r"]:
    """Return the δ whose P·L·diag(δ)·U is nearest to a wanted change, the solution of Mδ = (lᵢᵀ wanted uᵢ)ᵢ."""
    return torch.linalg.solve(ldu_gram(left, right), (left.T @ wanted * right).sum(dim=1))


def check_mark(state_dict: dict[str, Any], prefix: str, own: Float[Tensor, " 4"]) -> None:
    """Require that a stored `factor_mark`, if there is one of the right shape, is the layer's own.

    Raises:
        ValueError: it differs by more than 0.005.
    """
    got = state_dict.get(f"{prefix}mark")
    if got is None or got.is_meta or got.shape != own.shape:
        return  # what PyTorch says of those is better
    if not torch.allclose(got.to(own), own, rtol=0, atol=5e-3):
        raise ValueError(f"{prefix}mark: got that of other factors, wanted that of this layer's weight")


def check_elimination(state_dict: dict[str, Any], prefix: str, W: Float[Tensor, "m n"], own: dict[str, Tensor]) -> None:
    """Require that stored factors are about those of this weight: r steps of elimination give W's first r columns.

    Says nothing where names are missing, shapes differ or the weight comes along; PyTorch says that better.

    Raises:
        ValueError: factors of another weight. Those of a rounded one are welcome.
    """
    got = [state_dict[key] for key in (f"{prefix}{name}" for name in own) if key in state_dict]
    fits = [g.shape for g in got if not g.is_meta] == [t.shape for t in own.values()]
    if not fits or W.is_meta or any(key.startswith(f"{prefix}base.") for key in state_dict):
        return
    left, D, right, W = (t.to(own["left"]) for t in (*got, W))
    columns = W[:, : len(D)]
    if (left * D @ right[:, : len(D)] - columns).norm() > 0.3 * columns.norm():
        raise ValueError(f"{prefix}left, {prefix}right: got those of another weight, wanted those of this layer's")
