"""Determinantal point processes: subsets whose features span a large volume.

P(subset) is proportional to det L_subset, where L = E·Eᵀ is the Gram matrix of features E (n, d). So L has rank d at
most, no subset larger than that has a positive probability, and everything here costs O(n·d·k) and never makes L.

`greedy_dpp` looks for the likeliest subset by pivoted Cholesky: it takes what is furthest from the span of the taken.
`sample_k_dpp` draws exactly (Kulesza and Taskar, "k-DPPs", 2011): first k eigenvectors of L, then items by the same
recursion, in proportion to their distance from that span. All in float64.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowrank_ref.core.checks import check_integer, check_matrix
from lowrank_ref.core.linalg import svd

#: A squared distance this small next to the largest squared length counts as 0, and as a tie with the largest one.
VANISHING = 1e-10


def greedy_dpp(features: Float[Tensor, "n d"], count: int) -> tuple[Int64[Tensor, " count"], Float[Tensor, " count"]]:
    """Return the items taken one by one, each the furthest from the span of those before, and the squared distances.

    The distance of an item is L_cc - L_cS·L_SS⁻¹·L_Sc, so the logarithms of the distances add up to log det L_S. Of
    items that tie the first is taken; once the features span no more, distances are 0 and items come in their order.

    Args:
        features: one row an item.
        count: how many to take, 1 <= count <= n.

    Raises:
        TypeError, ValueError: features that are no finite matrix, or a count out of range.

    Example:
        >>> picks, distances = greedy_dpp(torch.tensor([[3.0, 0.0], [4.0, 0.0], [3.0, 1.0]]), 2)
        >>> picks.tolist(), distances.tolist()
        ([1, 2], [16.0, 1.0])
    """
    check_matrix("features", features)
    check_count("count", count, len(features))
    E = features.detach().double()
    residual = E.square().sum(dim=1)
    tiny = VANISHING * residual.max()
    columns, picks, gains = E.new_zeros(len(E), count), [], []
    free = torch.ones(len(E), dtype=torch.bool, device=E.device)
    for i in range(count):
        best = residual.masked_fill(~free, -1).max()
        pick = int((free & (residual >= best - tiny)).nonzero()[0])
        picks.append(pick)
        gains.append(residual[pick] if best > tiny else residual.new_zeros(()))
        free[pick] = False
        if best > tiny:
            residual = _eliminate(E @ E[pick], columns, i, pick, residual)
    return torch.tensor(picks, device=E.device), torch.stack(gains)


def sample_k_dpp(
    features: Float[Tensor, "n d"], count: int, *, generator: torch.Generator | None = None
) -> Int64[Tensor, " count"]:
    """Draw exactly `count` different items with P(S) = det L_S / Σ det L_S', and return them in the order of drawing.

    Args:
        features: one row an item.
        count: 1 <= count <= rank of the features.
        generator: source of the draws, on the CPU.

    Raises:
        TypeError, ValueError: features that are no finite matrix, or a count out of range: more items than the rank
            have volume 0.
    """
    check_matrix("features", features)
    check_count("count", count, len(features))
    U, S, _ = svd(features.detach().double())
    rank = int((VANISHING * S[0] < S).sum())
    if count > rank:
        raise ValueError(f"count: got {count}, wanted at most the rank of the features, {rank}")
    values = S[:rank].square() / S[:rank].square().mean()  # a common factor of all λ changes no probability
    e = elementary_symmetric(values, count)
    chosen, left = [], count
    for i in range(rank, 0, -1):  # λ_i is in with probability λ_i·e_{k-1}(λ_1..λ_{i-1}) / e_k(λ_1..λ_i)
        if left and _uniform(generator) * e[left, i] < values[i - 1] * e[left - 1, i - 1]:
            chosen.append(i - 1)
            left -= 1
    V = U[:, chosen]
    residual = V.square().sum(dim=1)  # the kernel V·Vᵀ of a projection: its residuals add up to the items left
    columns, picks = V.new_zeros(len(V), count), []
    for i in range(count):
        shares = residual.clamp_min(0).cumsum(0).cpu()
        place = torch.searchsorted(shares, _uniform(generator) * shares[-1], right=True)
        pick = min(int(place), len(V) - 1)
        picks.append(pick)
        residual = _eliminate(V @ V[pick], columns, i, pick, residual)
        residual[picks] = 0.0
    return torch.tensor(picks, device=V.device)


def elementary_symmetric(values: Float[Tensor, " n"], degree: int) -> Float[Tensor, "{degree}+1 n+1"]:
    """Return e[k, i], the sum of all products of k of the first i values; e[0, i] = 1.

    Example:
        >>> elementary_symmetric(torch.tensor([1.0, 2.0, 3.0]), 2)[:, 3].tolist()
        [1.0, 6.0, 11.0]
    """
    e = values.new_zeros(degree + 1, len(values) + 1)
    e[0] = 1
    for i, value in enumerate(values, start=1):
        e[1:, i] = e[1:, i - 1] + value * e[:-1, i - 1]
    return e


def log_volume(features: Float[Tensor, "n d"], picks: Int64[Tensor, " count"]) -> Float[Tensor, ""]:
    """Return log det L_S, twice the logarithm of the volume that the picked features span; -inf where it is 0."""
    E = features.detach().double()[picks]
    return torch.linalg.slogdet(E @ E.T).logabsdet


def k_dpp_log_probability(features: Float[Tensor, "n d"], picks: Int64[Tensor, " count"]) -> Float[Tensor, ""]:
    """Return log P(S) = log det L_S - log e_k(λ), for any order of the picks."""
    values = svd(features.detach().double())[1].square()
    mean = values.mean()
    normaliser = elementary_symmetric(values / mean, len(picks))[-1, -1].log() + len(picks) * mean.log()
    return log_volume(features, picks) - normaliser


def check_count(name: str, count: int, most: int) -> None:
    """Require an integer in [1, most].

    Raises:
        TypeError, ValueError: anything else.
    """
    check_integer(name, count, low=1)
    if count > most:
        raise ValueError(f"{name}: got {count}, wanted at most {most}")


# --- inside -----------------------------------------------------------------------------------------------------------


def _uniform(generator: torch.Generator | None) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _eliminate(row: Tensor, columns: Tensor, i: int, pick: int, residual: Tensor) -> Tensor:
    """Write column i of the Cholesky factor for this pick; return the residuals behind it. `row` is the kernel's."""
    column = (row - columns[:, :i] @ columns[pick, :i]) / residual[pick].sqrt()
    columns[:, i] = column
    return residual - column.square()
