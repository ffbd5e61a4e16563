r"""Robust rankers: five ways in which a list of search results can go wrong, each with a number.

Wu, Zhang, Guo, Fan and Cheng, "Are Neural Ranking Models Robust?", arXiv 2108.05018v4 (ACM TOIS 41(2), 2022).

| in the paper                                                    | here                                         |
|-----------------------------------------------------------------|----------------------------------------------|
| the list of a query                                             | `ranking`, `rank_of`                         |
| nDCG@k, ERR@k                                                   | `ndcg`, `expected_reciprocal_rank`           |
| MRR@k, AP                                                       | `reciprocal_rank`, `average_precision`       |
| task 1, queries like those of training: VNAP = Var(AP / E[AP])  | `normalised_variance`, `low_quantile`        |
| tasks 2 and 3, other queries, other documents: DR = (p' - p)/p  | `drop_rate`                                  |
| task 4, attacks on the query                                    | `drop_rate`, `worst_edit`; edits: `query_edits` |
| task 5, attacks on a document                                   | `success_rate`; edits: `document_edits`       |
| none: how sure is a number?                                     | `intervals`                                  |

Letters: q queries, n documents, g grades 0, 1, 2, …, s scores, p the mean of a metric over queries.

Status. Only the abstract was read; no official code is known. Names and tasks are the paper's, VNAP's quotient that of
a later paper which says it follows this one. Ours are: the mean in VNAP runs over the queries of the same ranker, the
sign of DR (negative is a drop), ties go to the document with the smaller number, and task 5 is success within a budget.

Mind that VNAP is (standard deviation / mean)²: a better mean alone lowers it. And DR compares two sets of queries, so
an easier second set raises it. Cost: a sort per query; rankers are in `lexical_rankers`, `lambda_mart` and
`neural_rankers`. A score is any number, so there are no layers here and nothing that DDP or compile would touch.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowrank_ref.core.checks import check_finite, check_floating, check_integer, check_number
from lowrank_ref.core.registry import PaperInfo

QueryScores = Float[Tensor, "q n"]
Grades = Int[Tensor, "q n"]
PerQuery = Float[Tensor, " q"]


def ranking(scores: QueryScores) -> Int[Tensor, "q n"]:
    """Return the documents of each query by falling score; among equal scores the smaller number comes first.

    Raises:
        TypeError, ValueError: scores are no finite floating-point matrix with a document at least.

    Example:
        >>> ranking(torch.tensor([[0.5, 2.0, 0.5]])).tolist()
        [[1, 0, 2]]
    """
    check_floating("scores", scores)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, wanted (queries, documents)")
    check_finite("scores", scores)
    return scores.sort(dim=1, descending=True, stable=True).indices


def rank_of(scores: QueryScores, document: Int[Tensor, " q"]) -> Int[Tensor, " q"]:
    """Return the place, from 1, of one document in the list of each query.

    Raises:
        ValueError: a document that is none, or as `ranking`.
    """
    places = ranking(scores).argsort(dim=1)
    if len(document) != len(scores) or not bool(((document >= 0) & (document < scores.shape[1])).all()):
        raise ValueError(
            f"document: got {document.tolist()[:8]}, wanted a number below {scores.shape[1]} for each query"
        )
    return places.gather(1, document[:, None])[:, 0] + 1


def _listed(grades: Tensor, scores: Tensor, cutoff: int | None) -> Tensor:
    """Grades in the order of the list, in float64, cut off."""
    if not isinstance(grades, Tensor) or grades.is_floating_point() or grades.is_complex():
        raise TypeError(f"grades: got {getattr(grades, 'dtype', type(grades).__name__)}, wanted whole numbers")
    order = ranking(scores)
    if grades.shape != scores.shape or bool((grades < 0).any()):
        raise ValueError(f"grades: got shape {tuple(grades.shape)}, wanted numbers >= 0, {tuple(scores.shape)}")
    if cutoff is not None:
        check_integer("cutoff", cutoff, low=1)
    return grades.gather(1, order).double()[:, :cutoff]


def _unless_empty(values: Tensor, grades: Tensor) -> Tensor:
    return values.where(grades.amax(1) > 0, math.nan)


def dcg(listed: Float[Tensor, "q k"]) -> PerQuery:
    """Return Σ_i (2^g_i - 1) / log₂(i + 1) of grades in the order of a list, i from 1."""
    places = torch.arange(2, listed.shape[1] + 2, dtype=torch.float64, device=listed.device)
    return ((2**listed - 1) / places.log2()).sum(1)


def ndcg(grades: Grades, scores: QueryScores, cutoff: int | None = 10) -> PerQuery:
    """Return DCG@k over that of the best list, in [0, 1]; NaN for a query without a relevant document.

    Args:
        grades: whole numbers >= 0, one a document.
        scores: of the ranker, finite.
        cutoff: k >= 1, or None for the whole list.

    Raises:
        TypeError, ValueError: other grades, scores or k.

    Example:
        >>> ndcg(torch.tensor([[0, 2, 1]]), torch.tensor([[3.0, 2.0, 1.0]])).round(decimals=3).tolist()
        [0.659]
    """
    best = dcg(_listed(grades, grades.double(), cutoff))
    return _unless_empty(dcg(_listed(grades, scores, cutoff)) / best, grades)


def expected_reciprocal_rank(grades: Grades, scores: QueryScores, cutoff: int | None = 10, top: int = 2) -> PerQuery:
    """Return ERR@k = Σ_i (1/i) R_i Π_{j<i} (1 - R_j), R = (2^g - 1)/2^top: a reader goes down until satisfied.

    Raises:
        TypeError, ValueError: as `ndcg`, or a grade above `top`.
    """
    listed = _listed(grades, scores, cutoff)
    check_integer("top", top, low=int(grades.max()))
    R = (2**listed - 1) / 2**top
    still = torch.cat([torch.ones_like(R[:, :1]), (1 - R).cumprod(1)[:, :-1]], dim=1)
    places = torch.arange(1, R.shape[1] + 1, dtype=torch.float64, device=R.device)
    return _unless_empty((R * still / places).sum(1), grades)


def reciprocal_rank(grades: Grades, scores: QueryScores, cutoff: int | None = 10) -> PerQuery:
    """Return 1/i of the first relevant document (g >= 1), 0 if the first k hold none. Errors: as `ndcg`."""
    hits = _listed(grades, scores, cutoff) > 0
    places = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    return _unless_empty((hits / places).amax(1), grades)


def average_precision(grades: Grades, scores: QueryScores) -> PerQuery:
    """Return the mean, over relevant documents (g >= 1), of the share of relevant ones down to their places.

    Its mean over queries is MAP. Errors: as `ndcg`.
    """
    hits = (_listed(grades, scores, None) > 0).double()
    places = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    return _unless_empty((hits * hits.cumsum(1) / places).sum(1) / hits.sum(1), grades)


def _values(name: str, values: Tensor) -> Tensor:
    check_floating(name, values)
    kept = values.double()[~values.isnan()]
    if values.ndim != 1 or not len(kept):
        raise ValueError(f"{name}: got {len(kept)} numbers in shape {tuple(values.shape)}, wanted one a query")
    return kept


def normalised_variance(metric: PerQuery) -> Float[Tensor, ""]:
    """Return Var_q(M(q) / E[M]) = (standard deviation / mean)²; VNAP if M is the average precision. NaN is left out.

    Raises:
        TypeError, ValueError: no number per query, or a mean that is not above 0.

    Example:
        >>> normalised_variance(torch.tensor([0.5, 1.0, 1.5])).round(decimals=3).item()
        0.167
    """
    kept = _values("metric", metric)
    if float(kept.mean()) <= 0:
        raise ValueError(f"metric: got the mean {float(kept.mean()):g}, wanted one above 0")
    return (kept / kept.mean()).var(correction=0)


def low_quantile(metric: PerQuery, share: float = 0.05) -> Float[Tensor, ""]:
    """Return the value below which this share of queries lies, interpolated: the worst case, but for outliers.

    Raises:
        TypeError, ValueError: no number per query, or a share outside [0, 1].
    """
    check_number("share", share, low=0, high=1)
    return _values("metric", metric).quantile(share)


def drop_rate(new: PerQuery, old: Float[Tensor, " p"]) -> Float[Tensor, ""]:
    """Return DR = (p_new - p_old) / p_old of the means: at least -1 for metrics >= 0, 0 if nothing changed.

    Raises:
        TypeError, ValueError: no number per query, or p_old is not above 0.

    Example:
        >>> drop_rate(torch.tensor([0.2, 0.4]), torch.tensor([0.5, 0.5])).round(decimals=3).item()
        -0.4
    """
    p_new, p_old = _values("new", new).mean(), _values("old", old).mean()
    if float(p_old) <= 0:
        raise ValueError(f"old: got the mean {float(p_old):g}, wanted one above 0")
    return (p_new - p_old) / p_old


def worst_edit(metric: Float[Tensor, "edits q"]) -> PerQuery:
    """Return what is left of each query under the worst of several edits."""
    return metric.amin(0)


def success_rate(places: Int[Tensor, " cases"], cutoff: int = 10) -> float:
    """Return the share of attacked documents that end within the first k. ValueError: no case, or k < 1."""
    check_integer("cutoff", cutoff, low=1)
    if not len(places):
        raise ValueError("places: got none, wanted one a case")
    return float((places <= cutoff).double().mean())


PAPER = PaperInfo(
    key="ranking_robustness",
    part="robustness",
    name="Ranking robustness",
    title="Are Neural Ranking Models Robust?",
    authors=("Chen Wu", "Ruqing Zhang", "Jiafeng Guo", "Yixing Fan", "Xueqi Cheng"),
    arxiv="2108.05018v4",
    summary="Five tests of what a ranker's average hides: variance, new queries, new documents, two kinds of attack.",
    use_when="you choose a ranker for queries and documents that will not be those you measured on",
    instead={"ramp": "your inputs are pictures, and an attack moves every pixel a little"},
    equations={"VNAP": "normalised_variance", "DR": "drop_rate", "nDCG": "ndcg", "ERR": "expected_reciprocal_rank"},
    deviations=("the mean in VNAP runs over the queries of the same ranker", "a negative DR is a drop"),
    aliases=("BM25", "query likelihood", "LambdaMART", "dual encoder", "KNRM", "LSI", "information retrieval", "VNAP"),
    status="draft",
    verified="2026-11-30",
)
