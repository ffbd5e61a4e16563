r"""R-MTGB: boosting for many tasks, where a learned gate decides which of two shared functions a task follows.

Emami, Martínez-Muñoz and Hernández-Lobato, "R-MTGB: Robust-Multi-Task Gradient Boosting", arXiv 2507.11411v1.

| in the paper and its code                                    | here                             |
|--------------------------------------------------------------|----------------------------------|
| F(x, r) = A(x) + (1-σ(θ_r))·N(x) + σ(θ_r)·O(x) + S_r(x)      | `raw_score`, `gate`              |
| u = -∂ℓ/∂F, squared error and cross-entropy                  | `squared_residual`, `softmax_residual` |
| targets σ(θ)·u of the outlier tree, (1-σ(θ))·u of the other  | `gated_targets`                  |
| ∂L/∂θ_r                                                      | `gate_gradient`                  |
| three blocks: shared, gated, one per task                    | `boost`                          |

Letters: n rows, K outputs, T tasks, θ (T); A, N, O, S (n, K) are the sums of trees (not LoRA's factors): shared,
non-outlier, outlier, task-specific. Rounds M₁, M₂, M₃ are `rounds`, ν is `lr`.

The equations are those of the official code. Kept from it: F starts at 0; leaves are means, without a Newton step; the
gate's step is ν times a *sum* over rows; no regulariser on θ unless asked (the first abstract speaks of one).
Changed: θ₀ is an argument, not drawn from a global generator; at prediction tasks keep their numbers of training. As
(θ, N, O) → (-θ, O, N) changes nothing, "outlier" is only a name: `outlier_score` orders the two groups by size.

Low rank: without S the (T, n) table of all task functions is 1·Aᵀ + (1-g)·Nᵀ + g·Oᵀ, g = σ(θ): rank <= 2 per output.
Cost: M₁ + 2·M₂ + T·M₃ trees, T gates. NumPy on a CPU: torch.compile and DDP do not apply. Any learner can be the tree;
the scikit-learn estimators, kept apart so that this file and the registry need no scikit-learn: `r_mtgb_sklearn.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.registry import PaperInfo

#: Called as fit(X, targets) with targets (n, K); returns something with `.predict(X)`, shape (n, K), or (n,) for K = 1.
FitTree = Callable[[Any, Any], Any]
Scores = Float[np.ndarray, "n K"]  # one row per example, one column per output
Gates = Float[np.ndarray, "T"]  # θ, one number per task
Tasks = Int[np.ndarray, "n"]  # which task a row belongs to, 0 to T-1


def gate(theta: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return σ(θ) = 1/(1 + e^-θ), finite for every θ. The weight 1-σ(θ) of the other group is `gate(-theta)`."""
    return np.exp(-np.logaddexp(0.0, -theta))


def raw_score(A: Scores, N: Scores, O: Scores, S: Scores, theta: Gates, task: Tasks) -> Scores:
    """Return F = A + (1-σ)·N + σ·O + S, every row with the gate of its task (0 to T-1)."""
    other, own = gate(-theta)[task, None], gate(theta)[task, None]
    return A + (other * N + own * O) + S


def squared_residual(Y: Scores, F: Scores) -> Scores:
    """Return u = Y - F, the negative gradient of ½(Y - F)²."""
    return Y - F


def softmax(F: Scores) -> Scores:
    """Return the class probabilities of raw scores."""
    E = np.exp(F - F.max(axis=1, keepdims=True))
    return E / E.sum(axis=1, keepdims=True)


def softmax_residual(Y: Scores, F: Scores) -> Scores:
    """Return u = Y - softmax(F), the negative gradient of the cross-entropy; Y holds a 1 per row at its class."""
    return Y - softmax(F)


def squared_error(Y: Scores, F: Scores) -> float:
    """Return Σ ½(Y - F)², summed over rows and outputs."""
    return float(0.5 * np.square(Y - F).sum())


def log_loss(Y: Scores, F: Scores) -> float:
    """Return -Σ Y·log softmax(F) in nats, summed over rows."""
    return float((np.logaddexp.reduce(F, axis=1) - (Y * F).sum(axis=1)).sum())


class Loss(NamedTuple):
    """A loss, summed over rows, and its negative gradient by F."""

    value: Callable[..., float]
    residual: Callable[..., np.ndarray]


SQUARED, CROSS_ENTROPY = Loss(squared_error, squared_residual), Loss(log_loss, softmax_residual)


def gated_targets(u: Scores, theta: Gates, task: Tasks) -> tuple[Scores, Scores]:
    """Return σ·u = -∂ℓ/∂O, to which a round fits its outlier tree, and (1-σ)·u = -∂ℓ/∂N, for its non-outlier tree."""
    return gate(theta)[task, None] * u, gate(-theta)[task, None] * u


def gate_gradient(u: Scores, O: Scores, N: Scores, theta: Gates, task: Tasks) -> Gates:
    """Return ∂L/∂θ_r = -σ(θ_r)(1-σ(θ_r)) · Σ u·(O - N), the sum over rows of task r and outputs."""
    return -gate(theta) * gate(-theta) * np.bincount(task, (u * (O - N)).sum(axis=1), len(theta))


@dataclass
class Forest:
    """The trees of the three blocks, θ before and after every gated round (M₂+1, T), and the loss after every round."""

    shared: list[Any] = field(default_factory=list)
    outlier: list[Any] = field(default_factory=list)
    other: list[Any] = field(default_factory=list)
    specific: list[list[Any]] = field(default_factory=list)
    theta_path: list[Any] = field(default_factory=list)
    loss_path: list[float] = field(default_factory=list)


def boost(
    X: Any,
    Y: Scores,
    task: Tasks,
    theta: Gates,
    *,
    fit: FitTree,
    rounds: tuple[int, int, int],
    loss: Loss = SQUARED,
    lr: float = 0.1,
    gate_lr: float | None = None,
    gate_mean: bool = False,
    gate_l2: float = 0.0,
) -> Forest:
    """Grow the three blocks.

    Args:
        X: inputs, one row for each of Y; only handed to the trees.
        Y: targets, or classes as one-hot rows.
        task: number of each row's task, 0 to T-1; every task has a row.
        theta: θ₀, where the gates start. 0 is a dead point: both trees of a round are then the same for ever.
        fit: see `FitTree`.
        rounds: (M₁, M₂, M₃), each >= 0, at least one of them > 0.
        loss: `SQUARED` or `CROSS_ENTROPY`.
        lr: ν > 0.
        gate_lr: step size of θ, > 0; default ν.
        gate_mean: take the mean over the rows of a task instead of the sum, so that large tasks do not move faster.
        gate_l2: λ >= 0 of a penalty ½λθ².

    Raises:
        TypeError, ValueError: a setting out of range, or a task without rows.
    """
    gate_lr = lr if gate_lr is None else gate_lr
    counts = _checked_counts(task, theta, rounds, lr, gate_lr, gate_l2)
    scale = counts if gate_mean else np.ones_like(counts)
    rows = [np.flatnonzero(task == r) for r in range(len(theta))]
    A, N, O, S = (np.zeros_like(Y) for _ in range(4))
    forest = Forest(specific=[[] for _ in rows], theta_path=[theta])

    def grow(block: list[Any], inputs: Any, targets: np.ndarray) -> np.ndarray:
        block.append(fit(inputs, targets))
        return lr * tree_values(block[-1], inputs)

    for stage in (1,) * rounds[0] + (2,) * rounds[1] + (3,) * rounds[2]:
        u = loss.residual(Y, raw_score(A, N, O, S, theta, task))
        if stage == 1:
            A += grow(forest.shared, X, u)
        elif stage == 2:  # everything from the same F: the gates step with the old O and N
            slope = gate_gradient(u, O, N, theta, task) / scale + gate_l2 * theta
            for_outlier, for_other = gated_targets(u, theta, task)
            O += grow(forest.outlier, X, for_outlier)
            N += grow(forest.other, X, for_other)
            theta = theta - gate_lr * slope
            forest.theta_path.append(theta)
        else:
            for trees, i in zip(forest.specific, rows):
                S[i] += grow(trees, X[i], u[i])
        forest.loss_path.append(loss.value(Y, raw_score(A, N, O, S, theta, task)))
    return forest


def _checked_counts(
    task: Tasks, theta: Gates, rounds: tuple[int, int, int], lr: float, gate_lr: float, gate_l2: float
) -> Int[np.ndarray, "T"]:
    """Return the number of rows of each task."""
    for block, count in enumerate(rounds):
        check_integer(f"rounds[{block}]", count, low=0)
    if not any(rounds):
        raise ValueError(f"rounds: got {rounds}, wanted at least one round in a block")
    check_number("lr", lr, low=0, open_low=True)
    check_number("gate_lr", gate_lr, low=0, open_low=True)
    check_number("gate_l2", gate_l2, low=0)
    counts = np.bincount(task, minlength=len(theta))
    if len(counts) != len(theta) or not counts.all():
        raise ValueError(f"task: got {counts.tolist()} rows per task, wanted at least one in each of {len(theta)}")
    return counts


def tree_values(tree: Any, X: Any) -> Scores:
    """Return a tree's predictions as a matrix."""
    return np.asarray(tree.predict(X)).reshape(len(X), -1)


def staged_scores(forest: Forest, X: Any, task: Tasks, *, outputs: int, lr: float = 0.1) -> Iterator[Scores]:
    """Yield F of new rows after every round of `boost`, with the gates of that round; the last is the model's."""
    A, N, O, S = (np.zeros((len(X), outputs)) for _ in range(4))
    theta = forest.theta_path[0]
    for tree in forest.shared:
        A += lr * tree_values(tree, X)
        yield raw_score(A, N, O, S, theta, task)
    for outlier, other, theta in zip(forest.outlier, forest.other, forest.theta_path[1:]):
        O += lr * tree_values(outlier, X)
        N += lr * tree_values(other, X)
        yield raw_score(A, N, O, S, theta, task)
    rows = [np.flatnonzero(task == r) for r in range(len(theta))]
    for trees in zip(*forest.specific):
        for i, tree in zip(rows, trees):
            if len(i):
                S[i] += lr * tree_values(tree, X[i])
        yield raw_score(A, N, O, S, theta, task)


def final_scores(forest: Forest, X: Any, task: Tasks, *, outputs: int, lr: float = 0.1) -> Scores:
    """Return F of new rows after all rounds, shape (n, outputs); 0 if there are no trees."""
    F = np.zeros((len(X), outputs))
    for F in staged_scores(forest, X, task, outputs=outputs, lr=lr):  # noqa: B007
        pass
    return F


def task_functions(A: Scores, N: Scores, O: Scores, theta: Gates) -> Float[np.ndarray, "T n K"]:
    """Return F_r(x_j) without S for every task and row: for each output a (T, n) matrix of rank at most 2."""
    g = gate(theta)[:, None, None]
    return A + (1 - g) * N + g * O


def outlier_score(theta: Gates) -> Gates:
    """Return the weight on the function that fewer tasks lean to: σ(θ) or 1-σ(θ), whichever has its median below ½."""
    return gate(theta) if np.median(theta) <= 0 else gate(-theta)


PAPER = PaperInfo(
    key="r_mtgb",
    part="robustness",
    name="R-MTGB",
    title="R-MTGB: Robust-Multi-Task Gradient Boosting",
    authors=("Seyedsaman Emami", "Gonzalo Martínez-Muñoz", "Daniel Hernández-Lobato"),
    arxiv="2507.11411v1",
    summary="Learn many tasks together by boosting, and let a gate per task keep those apart that follow another rule.",
    use_when="you suspect that a few of many tasks follow another rule; where none does, gates part all the same",
    official_code="GAA-UAM/R-MTGB",
    code_licence="LGPL-2.1",
    equations={"F(x, r)": "raw_score", "u": "squared_residual", "block 2": "gated_targets", "∂L/∂θ": "gate_gradient"},
    deviations=("θ₀ from random_state", "task numbers of the training data at prediction", "groups ordered by size"),
    aliases=("robust multi-task gradient boosting", "MTGB", "outlier tasks"),
    status="draft",
    verified="2026-11-30",
    changes={"2026-11-30": "Verdicts are computed from stored runs; how far a high score can be trusted."},
)
