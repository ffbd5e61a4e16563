"""What the benchmarks of rankers share: trees, attacks on documents, and the numbers of a row."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_ref.robustness import (
    LambdaMART,
    WordIndex,
    average_precision,
    boost_lambdas,
    count_features,
    drop_rate,
    expected_reciprocal_rank,
    low_quantile,
    ndcg,
    normalised_variance,
    reciprocal_rank,
    substitution_attack,
    worst_edit,
)

Texts = Sequence[Sequence[str]]
Ranker = Callable[[Texts, Texts], Tensor]


def grow(X: Any, y: Any) -> Any:
    """Grow a tree of eight leaves."""
    from sklearn.tree import DecisionTreeRegressor

    return DecisionTreeRegressor(max_leaf_nodes=8, min_samples_leaf=20, random_state=0).fit(X, y)


def fit_trees(
    index: WordIndex, queries: Texts, documents: Texts, grades: Tensor, seed: int, *, mu: float, per_word: bool,
    rounds: int, pool: int = 40,
) -> list[Any]:  # fmt: skip
    """Fit LambdaMART: for each query the relevant documents and the top of BM25, `pool` in all, and as many drawn."""
    X = count_features(index, queries, documents, mu=mu, per_word=per_word)
    first = (X[:, :, 0] + 1e6 * (grades > 0)).argsort(dim=1, descending=True, stable=True)[:, :pool]
    g = torch.Generator().manual_seed(seed)
    rows = torch.cat([first, torch.randint(len(documents), (len(queries), pool), generator=g)], dim=1)
    X, grades = X.gather(1, rows[:, :, None].expand(-1, -1, X.shape[2])), grades.gather(1, rows)
    return boost_lambdas(X, grades, fit=grow, rounds=rounds)


def lambda_mart(index: WordIndex, trees: list[Any], *, mu: float, per_word: bool) -> LambdaMART:
    """Put trees on the features of an index."""
    return LambdaMART(partial(count_features, index, mu=mu, per_word=per_word), trees)


def effectiveness(metric: str, scores: Tensor, grades: Tensor) -> Tensor:
    """Return the metric of each query."""
    return {"ndcg": ndcg, "mrr": reciprocal_rank}[metric](grades, scores)


def summary(scores: Tensor, grades: Tensor, metric: str) -> dict[str, float]:
    """Return task 1: means, VNAP, variance and the value of the worst twentieth."""
    AP, M = average_precision(grades, scores), effectiveness(metric, scores, grades)
    found = {
        "iid": M.mean().item(),
        "ndcg": ndcg(grades, scores).mean().item(),
        "mrr": reciprocal_rank(grades, scores).mean().item(),
        "map": AP.mean().item(),
        "err": expected_reciprocal_rank(grades, scores).mean().item(),
        "VNAP": normalised_variance(AP).item(),
        "variance": M.var(correction=0).item(),
        "p5": low_quantile(M).item(),
    }
    return {name: round(value, 5) for name, value in found.items()}


def drops(old: Tensor, sets: dict[str, Tensor]) -> dict[str, float]:
    """Return, for each set, its mean and its DR against the old values; several edits (edits, q) also by the worst."""
    found = {}
    for name, new in sets.items():
        if new.ndim == 2:
            found[f"DR {name}, worst"] = drop_rate(worst_edit(new), old).item()
            new = new.mean(0)
        found[name] = new.mean().item()
        found[f"DR {name}"] = drop_rate(new, old).item()
    return {name: round(value, 5) for name, value in found.items()}


def attacked_places(
    ranker: Ranker, query: Sequence[str], documents: Texts, scores: Tensor, target: int, paths: Texts
) -> list[int]:
    """Return the place of each version of the target among the other documents; a tie counts against it."""
    others = torch.cat([scores[:target], scores[target + 1 :]])
    return [int((others >= s - 1e-9).sum()) + 1 for s in ranker([query], paths)[0]]


def targets(scores: Tensor, grades: Tensor, place: int = 100) -> int:
    """Return the first document from this place on (or from the middle of a short list) that has grade 0."""
    order = scores.argsort(descending=True, stable=True)
    return int(next(d for d in order[min(place, len(order) // 2) - 1 :] if grades[d] == 0))


def attack(
    ranker: Ranker, query: Sequence[str], documents: Texts, scores: Tensor, grades: Tensor, words: Sequence[str],
    budget: int,
) -> list[int]:  # fmt: skip
    """Attack a document of place 100 by substitutions; return its places for 0 to `budget` words."""
    target = targets(scores, grades)
    path = substitution_attack(lambda texts: ranker([query], texts)[0], documents[target], words, budget)
    return attacked_places(ranker, query, documents, scores, target, path)
