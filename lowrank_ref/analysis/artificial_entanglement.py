r"""Read a matrix as a quantum state of a chain, and plot how much each half of the chain knows about the other.

Chen et al., "Artificial Entanglement in the Fine-Tuning of Large Language Models", arXiv 2601.06788v1: fingerprints of
weight updates, of attention matrices, and an adapter that is a matrix product state (MPS).

| in the paper                                        | here                                          |
|-----------------------------------------------------|-----------------------------------------------|
| dimensions factored into primes, one site each      | `factor_sites`                                |
| ψ = vec(W)/‖W‖, its Schmidt values at a cut         | `schmidt_probabilities`                       |
| entanglement entropy S = -Σ p log p                 | `entropy`                                     |
| entropy profile over all cuts                       | `entropy_profile`                             |
| "entanglement valley" at the centre                 | `valley_depth`, `rank_ceiling`                |
| random-matrix baselines                             | `page_entropy`, `marchenko_pastur_density`    |
| attention matrix softmax(QKᵀ/√d)                    | `attention_matrix`                            |
| MPS adaptation                                      | `MPSLinear`, in `mps_adapter`                 |

All entropies are in **nats**; `Profile.bits` is in bits. Letters: W (m, n); d_1 ... d_N the sites; D_k their
product up to cut k, the rows of the state there; p its squared Schmidt values, which sum to 1; r the rank of an update.

Reconstructed, since we know of no official code and the text leaves it open: the order of the sites (digits of the row
index, most significant first, then those of the column index; primes rising), and the depth of a valley. Any size
works: a large prime factor is one large site. `pad_to_binary` is the other way out, where shapes must be compared.
The Page value is that of complex states; weights are real, and theirs is lower, by less than 1/(2n).

Cost: one float64 eigenvalue problem per cut, of size min(D_k, mn/D_k) <= √(mn); nearly all of it at the middle cuts.
The exponential of S at the row|column cut is an effective rank of W, with squared singular values.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.analysis.mps_adapter import MPSLinear
from lowrank_ref.core.checks import check_finite, check_floating, check_integer, check_matrix
from lowrank_ref.core.linalg import effective_rank
from lowrank_ref.core.registry import PaperInfo


def factor_sites(size: int) -> tuple[int, ...]:
    """Return the prime factors of a dimension >= 1, rising, the most significant first; () for 1. Else a ValueError.

    Example:
        >>> factor_sites(384), factor_sites(7)
        ((2, 2, 2, 2, 2, 2, 2, 3), (7,))
    """
    check_integer("size", size, low=1)
    found, prime = [], 2
    while prime * prime <= size:
        while size % prime == 0:
            found.append(prime)
            size //= prime
        prime += 1
    return (*found, size) if size > 1 else tuple(found)


def pad_to_binary(W: Float[Tensor, "m n"]) -> Float[Tensor, "M N"]:
    """Return W with zero rows and columns up to the next powers of two: all sites binary, same singular values."""
    m, n = (2 ** math.ceil(math.log2(size)) for size in W.shape)
    padded = W.new_zeros(m, n)
    padded[: W.shape[0], : W.shape[1]] = W
    return padded


def schmidt_probabilities(W: Float[Tensor, "..."], left: int) -> Float[Tensor, " values"]:
    """Return the squared Schmidt values p of the state vec(W)/‖W‖ between its first digits and the rest.

    They are the eigenvalues of the smaller Gram matrix of W reshaped to (left, numel/left), in float64: right to about
    1e-16 each, which changes an entropy by less than 1e-11.

    Args:
        W: any shape, floating point, finite, not all zero; read row by row.
        left: D_k, the product of the sites left of the cut; divides the number of entries.

    Returns:
        p (min(left, numel/left)), falling, >= 0, sum 1, float64, without gradient.

    Raises:
        TypeError, ValueError: W or left is not as described.
    """
    check_floating("W", W)
    check_finite("W", W)
    check_integer("left", left, low=1)
    if W.numel() == 0 or W.numel() % left:
        raise ValueError(f"left: got {left}, wanted a divisor of the {W.numel()} entries of W")
    M = W.detach().double()
    peak = M.abs().max()
    if peak == 0:
        raise ValueError("W: got all zeros, wanted a matrix that can be normalised")
    M = M.reshape(left, -1) / peak  # entries of 1e-200 would underflow when squared
    gram = M @ M.T if M.shape[0] <= M.shape[1] else M.T @ M
    p = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return p / p.sum()


def entropy(p: Float[Tensor, " values"]) -> float:
    """Return S = -Σ p log p in nats, of numbers >= 0 that are normalised here; 0·log 0 = 0.

    Example:
        >>> round(entropy(torch.tensor([0.5, 0.5, 0.0])) / math.log(2), 12)
        1.0
    """
    return max(math.log(effective_rank(p)), 0.0)


@dataclass(frozen=True)
class Profile:
    """Entropies of all cuts of a chain.

    Attributes:
        left: D_1, ..., D_{N-1}: sizes of the part left of each cut.
        entropy: S_1, ..., S_{N-1} in nats, float64, on the CPU.
        boundary: index in both of the row|column cut, where left = m.

    Example:
        >>> import torch
        >>> from lowrank_ref.analysis import entropy_profile
        >>> profile = entropy_profile(torch.eye(4))
        >>> profile.left, round(profile.bits[profile.boundary].item(), 6)
        ((2, 4, 8), 2.0)
    """

    left: tuple[int, ...]
    entropy: Float[Tensor, " cuts"]
    boundary: int

    @property
    def bits(self) -> Float[Tensor, " cuts"]:
        """The entropies in bits; then a binary site adds at most 1."""
        return self.entropy / math.log(2)


def _chain(m: int, n: int) -> tuple[tuple[int, ...], int]:
    """Sizes left of the cuts of an (m, n) matrix, and the index of the row|column cut."""
    check_integer("m", m, low=2)
    check_integer("n", n, low=2)
    rows = factor_sites(m)
    return tuple(accumulate((*rows, *factor_sites(n)), mul))[:-1], len(rows) - 1


def entropy_profile(W: Float[Tensor, "m n"]) -> Profile:
    """Return the entropy of every cut of the chain of sites of W: rows first, then columns.

    Args:
        W: matrix (m, n), m, n >= 2, floating point, finite, not all zero. Scale and sign do not matter.

    Raises:
        TypeError, ValueError: W is not as described.

    Example:
        >>> entropy_profile(torch.eye(4)).bits.round(decimals=9).tolist()
        [1.0, 2.0, 1.0]
    """
    check_matrix("W", W)
    left, boundary = _chain(*W.shape)
    S = [entropy(schmidt_probabilities(W, size)) for size in left]
    return Profile(left, torch.tensor(S, dtype=torch.float64), boundary)


def rank_ceiling(m: int, n: int, rank: int | None = None) -> Float[Tensor, " cuts"]:
    """Return the highest entropy, in nats, that any (m, n) matrix of this rank can have at each cut.

    It is the logarithm of the most Schmidt values there can be: min(D_k, mn/D_k), and r·m/D_k left of the row|column
    cut, r·D_k/m right of it, r at it. Rank None is min(m, n), no restriction; below m, n = 2 or rank = 1 a ValueError.
    """
    r = min(m, n) if rank is None else rank
    check_integer("rank", r, low=1)
    left, boundary = _chain(m, n)
    most = [
        min(D, m * n // D, r * (m // D if k <= boundary else D // m))  # one of m and D divides the other
        for k, D in enumerate(left)
    ]
    return torch.tensor(most, dtype=torch.float64).log()


def valley_depth(profile: Profile) -> float:
    """Return how far, in nats, S at the row|column cut lies below the mean of the highest S on either side.

    Positive is a valley, negative a peak.

    Raises:
        ValueError: rows or columns have one site only, so that one side has no cut.
    """
    S, k = profile.entropy, profile.boundary
    if not 0 < k < len(S) - 1:
        raise ValueError(f"profile: got cuts {profile.left}, wanted at least one on each side of the row|column cut")
    return float((S[:k].max() + S[k + 1 :].max()) / 2 - S[k])


def page_entropy(m: int, n: int) -> float:
    """Return the mean entropy, in nats, of a random complex (m, n) state: Σ_{k=n+1}^{mn} 1/k - (m-1)/(2n) for m <= n.

    Page's formula (1993). Large: log m - m/(2n), real entries too: `marchenko_pastur_density`. m, n < 1: ValueError.

    Example:
        >>> round(page_entropy(1, 5), 12), round(page_entropy(2, 2), 12)
        (0.0, 0.333333333333)
    """
    m, n = sorted((m, n))
    check_integer("m", m, low=1)
    harmonic = torch.digamma(torch.tensor([m * n + 1.0, n + 1.0], dtype=torch.float64))
    return float(harmonic[0] - harmonic[1]) - (m - 1) / (2 * n)


def marchenko_pastur_density(x: Float[Tensor, "*shape"], ratio: float) -> Float[Tensor, "*shape"]:
    """Return the density of x = m·p for a large Gaussian (m, n) matrix, ratio = m/n in (0, 1], p as above.

    Its mean is 1 and its mean of x·log x is ratio/2, so S = log m - m/(2n). Another ratio raises a ValueError.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: got {ratio!r}, wanted 0 < m/n <= 1")
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    inside = ((high - x) * (x - low)).clamp_min(0).sqrt()
    return inside / (2 * math.pi * ratio * torch.where(x > 0, x, 1.0))


def attention_matrix(
    Q: Float[Tensor, "*batch T d"], K: Float[Tensor, "*batch T d"], *, causal: bool = False
) -> Float[Tensor, "*batch T T"]:
    """Return P = softmax(QKᵀ/√d), every row a distribution; `causal` lets place t see places 1 ... t only."""
    scores = Q @ K.mT / math.sqrt(Q.shape[-1])
    if causal:
        places = torch.arange(Q.shape[-2], device=Q.device)
        scores = scores.masked_fill(places > places[:, None], -math.inf)
    return scores.softmax(dim=-1)


PAPER = PaperInfo(
    key="artificial_entanglement",
    part="analysis",
    name="Artificial entanglement",
    title="Artificial Entanglement in the Fine-Tuning of Large Language Models",
    authors=("Min Chen", "Zihan Wang", "Canyu Chen", "Zeguan Wu", "Manling Li", "Junyu Liu"),
    arxiv="2601.06788v1",
    summary="Plot the entanglement entropy of a weight update cut by cut, and know how much of it is rank alone.",
    use_when="you compare updates and want to know what is rank and what is training",
    instead={"lora": "you look for a smaller adapter: the MPS adapter is no better at equal size"},
    needs=("lora",),
    equations={"sites": "factor_sites", "Schmidt values": "schmidt_probabilities", "profile": "entropy_profile"},
    deviations=("order of the sites reconstructed", "layout and start of the MPS cores reconstructed"),
    aliases=("entanglement entropy", "entanglement valley", "matrix product state", "MPS adapter", "tensor train"),
    status="draft",
    verified="2026-11-24",
    layers={"MPSLinear": MPSLinear},
)
