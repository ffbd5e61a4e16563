r"""LambdaMART: boosted regression trees that learn to order a list, from features that count words.

    λ_i = Σ_{j: g_i>g_j} |Δ_ij| ρ_ij - Σ_{j: g_j>g_i} |Δ_ij| ρ_ji,      ρ_ij = 1 / (1 + e^{s_i - s_j})
    |Δ_ij| = |2^{g_i} - 2^{g_j}| · |1/log₂(1 + r_i) - 1/log₂(1 + r_j)| / ideal DCG,   r the present places, from 1
    a leaf's value = Σ λ / Σ w,  w_i = Σ_j |Δ_ij| ρ_ij (1 - ρ_ij): one Newton step

Burges, "From RankNet to LambdaRank to LambdaMART", 2010. Places are found anew before every tree; ties go to the
smaller number. Any learner can be the tree, if it has `apply`, which names the leaf of each row: no scikit-learn here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.robustness.lexical_rankers import Texts, WordIndex, bm25_weights, dirichlet_logs, text_lengths
from lowrank_ref.robustness.ranking_robustness import dcg, ranking

#: Called as fit(X, targets), X (rows, features) in float32; returns something with `apply(X)`, a leaf's number per row.
FitLeaves = Callable[[Any, Any], Any]


def swap_gains(grades: Int[Tensor, "q n"], scores: Float[Tensor, "q n"]) -> Float[Tensor, "q n n"]:
    """Return `|Δ_ij|`, how much nDCG changes when documents i and j swap places; 0 where nothing is relevant."""
    gain = 2.0 ** grades.double()
    discount = 1 / (ranking(scores).argsort(dim=1).double() + 2).log2()
    ideal = dcg(grades.double().sort(dim=1, descending=True).values)[:, None, None]
    gains, discounts = (v[:, :, None] - v[:, None, :] for v in (gain, discount))
    return (gains * discounts).abs() / ideal.where(ideal > 0, 1.0)


def lambdas(
    grades: Int[Tensor, "q n"], scores: Float[Tensor, "q n"]
) -> tuple[Float[Tensor, "q n"], Float[Tensor, "q n"]]:
    """Return λ, which sums to 0 over each query, and the curvature w >= 0.

    λ is minus the gradient of `Σ |Δ_ij| ln(1 + e^{s_j - s_i})` over pairs g_i > g_j, with `|Δ|` held fixed.

    Raises:
        TypeError, ValueError: as `ranking`, or grades of another shape.
    """
    if grades.shape != scores.shape:
        raise ValueError(f"grades: got shape {tuple(grades.shape)}, wanted {tuple(scores.shape)}")
    scores = scores.double()
    delta = swap_gains(grades, scores)
    above = (grades[:, :, None] > grades[:, None, :]).double()
    rho = torch.sigmoid(scores[:, None, :] - scores[:, :, None])  # ρ_ij of i above j
    push, bend = above * delta * rho, above * delta * rho * (1 - rho)
    return push.sum(2) - push.sum(1), bend.sum(2) + bend.sum(1)


class Leaves(NamedTuple):
    """A tree and the value of each of its leaves, by the leaf's number."""

    tree: Any
    values: Tensor


def boost_lambdas(
    X: Float[Tensor, "q n f"], grades: Int[Tensor, "q n"], *, fit: FitLeaves, rounds: int = 40, lr: float = 0.1
) -> list[Leaves]:
    """Grow trees on λ. Scores start at 0, so the first places are those of the documents' numbers.

    Args:
        X: features of n documents for each query.
        grades: of the same documents.
        fit: grows one tree.
        rounds: trees, >= 0.
        lr: what multiplies each tree, > 0.

    Raises:
        TypeError, ValueError: rounds or lr out of range, or as `lambdas`.
    """
    check_integer("rounds", rounds, low=0)
    check_number("lr", lr, low=0, open_low=True)
    rows = X.flatten(0, 1).float().numpy()
    scores = torch.zeros(grades.shape, dtype=torch.float64)
    found = []
    for _ in range(rounds):
        push, bend = (v.flatten() for v in lambdas(grades, scores))
        tree = fit(rows, push.numpy())
        leaf = torch.from_numpy(np.asarray(tree.apply(rows), dtype=np.int64))
        sums = torch.stack([torch.bincount(leaf, v) for v in (push, bend)])
        found.append(Leaves(tree, sums[0] / sums[1].clamp_min(1e-12)))
        scores = scores + lr * found[-1].values[leaf].view_as(scores)
    return found


def boosted_scores(trees: Sequence[Leaves], X: Float[Tensor, "*shape f"], lr: float = 0.1) -> Float[Tensor, "*shape"]:
    """Return lr · Σ of the leaves' values, 0 without trees. Use the lr of the training."""
    rows = X.flatten(0, -2).float().numpy()
    total = torch.zeros(len(rows), dtype=torch.float64)
    for tree, values in trees:
        total += lr * values[torch.from_numpy(np.asarray(tree.apply(rows), dtype=np.int64))]
    return total.view(X.shape[:-1])


#: What `count_features` returns, in this order.
FEATURES = ("BM25", "query likelihood", "words matched", "tf of matched words", "idf of matched words", "length")


def count_features(
    index: WordIndex, queries: Texts, documents: Texts, *, mu: float = 1000.0, per_word: bool = False
) -> Float[Tensor, "q n f"]:
    """Return six numbers of each pair, those of `FEATURES`; the last is the document's length.

    Args:
        index: of the corpus that is searched.
        queries: lists of words.
        documents: lists of words.
        mu: μ of the query likelihood.
        per_word: divide all but the length by the number of known words of the query: means in place of sums.

    Raises:
        TypeError, ValueError: no texts.
    """
    Q, C, lengths = index.count(queries), index.count(documents), text_lengths(documents)
    stands = (C > 0).double()
    logs = dirichlet_logs(C, lengths, index.shares, mu)
    weights = bm25_weights(C, lengths, index.idf, index.mean_length)
    sums = torch.stack([Q @ W.T for W in (weights, logs, stands, C, stands * index.idf)], dim=2)
    if per_word:
        sums = sums / Q.sum(1).clamp_min(1)[:, None, None]
    return torch.cat([sums, lengths.expand(len(Q), -1)[:, :, None]], dim=2)


class LambdaMART:
    """A ranker made of trees and features.

    Args:
        features: called with queries and documents; returns (q, n, f), such as `count_features` of an index.
        trees: what `boost_lambdas` returned.
        lr: that of the training, > 0.

    Raises:
        TypeError, ValueError: an lr out of range.

    Example:
        >>> from functools import partial
        >>> from lowrank_ref.robustness import LambdaMART, WordIndex, count_features
        >>> index = WordIndex([["red", "fish"], ["blue", "fish"]])
        >>> LambdaMART(partial(count_features, index), trees=[])([["red"]], [["red", "fish"]]).tolist()
        [[0.0]]
    """

    def __init__(self, features: Callable[[Texts, Texts], Tensor], trees: Sequence[Leaves], lr: float = 0.1) -> None:
        check_number("lr", lr, low=0, open_low=True)
        self.features, self.trees, self.lr = features, trees, lr

    def __call__(self, queries: Texts, documents: Texts) -> Float[Tensor, "q n"]:
        """Return the scores."""
        return boosted_scores(self.trees, self.features(queries, documents), self.lr)
