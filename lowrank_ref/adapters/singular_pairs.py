"""Which pairs (uᵢ, vᵢ) of singular vectors SVFit trains: its own choice, controls, and a mark to know them again.

Singular vectors belong to W, but not to W alone: where two values are equal or nearly so, another processor or library
finds other vectors of the same span, and where values are zero, any. So a checkpoint has to hold the bases, or a
`fingerprint` of them which the loader compares.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_rank
from lowrank_ref.core.linalg import svd

#: What `choose_pairs` can choose. All but the first are controls.
PAIRS = ("top", "bottom", "any", "shuffled", "random")


def choose_pairs(
    W: Float[Tensor, "m n"], rank: int, pairs: str = "top", generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Return the r pairs that train, as U (m, r), S (r) and Vh (r, n), float32 or wider.

    Args:
        W: the frozen weight.
        rank: r.
        pairs: "top" is the method. Controls: "bottom" and "any" (drawn) take other singular triples; "shuffled" keeps
            the top r of U and V, but no vᵢ stays with its uᵢ; "random" has random orthonormal columns instead. In the
            last two S is that of the top r.
        generator: source of what is drawn.

    Raises:
        TypeError, ValueError: what `svd` refuses, unknown pairs, or rank 1 to be shuffled.
    """
    if pairs not in PAIRS or (pairs == "shuffled" and rank == 1):
        raise ValueError(f"pairs: got {pairs!r} of rank {rank}, wanted one of {PAIRS}, shuffled from rank 2 on")
    check_rank(rank, W.shape)
    U, S, Vh = svd(W)
    draws = U.new_empty(0, device=generator.device if generator is not None else U.device)
    if pairs == "bottom":
        chosen = torch.arange(len(S) - rank, len(S))
    elif pairs == "any":
        chosen = torch.randperm(len(S), generator=generator, device=draws.device)[:rank].sort().values
    else:
        chosen = torch.arange(rank)
    chosen = chosen.to(U.device)
    U, S, Vh = U[:, chosen], S[chosen], Vh[chosen]
    if pairs == "shuffled":  # one cycle through all: nobody keeps a partner
        cycle = torch.randperm(rank, generator=generator, device=draws.device).to(U.device)
        Vh = Vh.index_copy(0, cycle, Vh[cycle.roll(1)])
    if pairs == "random":
        shapes = (len(U), rank), (Vh.shape[1], rank)
        U, V = (torch.linalg.qr(draws.new_empty(s).normal_(generator=generator).to(U.device)).Q for s in shapes)
        Vh = V.T
    return U.contiguous(), S.contiguous(), Vh.contiguous()


def fingerprint(U: Float[Tensor, "m r"], Vh: Float[Tensor, "r n"]) -> Float[Tensor, " r"]:
    """Return (aᵀuᵢ)(vᵢᵀb), a and b fixed waves of norm √m and √n: sizes about 1, and the same for (-uᵢ, -vᵢ)."""
    a, b = (torch.arange(1.0, size + 1, dtype=U.dtype, device=U.device) for size in (len(U), Vh.shape[1]))
    return (2**0.5 * torch.cos(a) @ U) * (Vh @ (2**0.5 * torch.cos(b)))
