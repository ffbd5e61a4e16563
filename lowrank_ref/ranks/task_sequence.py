"""A sequence of tasks: start one with CoDyRA's layers, finish it by a merge, and score the whole sequence.

    for task in tasks:
        start_task(model, "all-linear", rank=16, generator=generator)
        ...                                      # train, with a new optimizer and a new `RankSelection`
        left = finish_task(model)                # rank and norm of what was merged, layer by layer

R[t, i] is the accuracy on task i after task t was learned, both counted from 0, T tasks in all.

| in the papers                                        | here                    |
|------------------------------------------------------|-------------------------|
| mean over i of R[T-1, i]                             | `TaskScores.last`       |
| mean over all t and i                                | `TaskScores.average`    |
| mean over i >= 1 of the mean of R[t, i] over t < i   | `TaskScores.transfer`   |
| mean over i < T-1 of R[i, i] - R[T-1, i]             | `TaskScores.forgetting` |

Transfer is what the model can do before it is taught, and Forgetting what it can no longer do at the end. The released
code of CoDyRA leaves accuracies of exactly 0 out of Transfer; here they count.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.core.checks import check_integer, check_matrix
from lowrank_ref.core.layers import Model, adapters, merge_adapters, replace_linears, weight_of
from lowrank_ref.core.matching import Pattern
from lowrank_ref.ranks.codyra import CoDyRALinear
from lowrank_ref.ranks.sora import SoRALinear, kept_ranks


@dataclass(frozen=True)
class MergedUpdate:
    """What a task left in one layer: `rank`, its weights that are not 0, and `norm`, ‖ΔW‖_F.

    Example:
        >>> import torch
        >>> from lowrank_ref.ranks import finish_task, start_task
        >>> model = start_task(torch.nn.Sequential(torch.nn.Linear(8, 4)), "", rank=2)
        >>> finish_task(model)  # nothing was trained: B is 0
        {'0': MergedUpdate(rank=2, norm=0.0)}
    """

    rank: int
    norm: float


def start_task(
    model: Model,
    pattern: Pattern,
    rank: int = 8,
    *,
    gate: str = "ones",
    trainable: Pattern | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Put fresh CoDyRA layers in the place of linear ones; r is cut to min(m, n) where a layer is smaller.

    The model computes what it did. Build the optimizer, and its `RankSelection`, afterwards.

    Args:
        model: changed in place; plain, or with its last task finished.
        pattern, trainable: as in `replace_linears`.
        rank: r >= 1.
        gate: see `CoDyRALinear`.
        generator: source of all A and w.

    Raises:
        TypeError, ValueError: see `replace_linears` and `CoDyRALinear`; or the last task is not finished. The model is
            unchanged.
    """
    check_integer("rank", rank, low=1)
    if open_ones := [path for path, layer in adapters(model) if isinstance(layer, SoRALinear)]:
        raise ValueError(f"model: got a task that is not finished, at {open_ones[:3]}, wanted finish_task(model) first")
    make = partial(CoDyRALinear, gate=gate, generator=generator)
    return replace_linears(model, pattern, lambda W: make(W, min(rank, *weight_of(W).shape)), trainable=trainable)


@torch.no_grad()
def finish_task(model: nn.Module) -> dict[str, MergedUpdate]:
    """Merge every adapter of the model into its base, in place, and say what each CoDyRA layer leaves.

    The model is plain PyTorch again, of the base's size; the next task starts from it, with a new optimizer.

    Returns:
        path -> what was merged there.

    Raises:
        TypeError, ValueError: no layer with gates inside, or see `merge_adapters`. The model is unchanged.
    """
    ranks, layers = kept_ranks(model), dict(adapters(model))
    left = {path: MergedUpdate(rank, layers[path].delta_weight().norm().item()) for path, rank in ranks.items()}
    merge_adapters(model)
    return left


@dataclass(frozen=True)
class TaskScores:
    """Four means of a matrix of accuracies, in its unit; see `task_scores`.

    Attributes:
        last: all tasks, after the last one.
        average: all tasks, after each of them.
        transfer: each task before it is taught.
        forgetting: accuracy right after a task minus that at the end, of all tasks but the last.

    Example:
        >>> import torch
        >>> from lowrank_ref.ranks import task_scores
        >>> task_scores(torch.tensor([[0.75, 0.5], [0.5, 1.0]]))
        TaskScores(last=0.75, average=0.6875, transfer=0.5, forgetting=0.25)
    """

    last: float
    average: float
    transfer: float
    forgetting: float


def task_scores(R: Float[Tensor, "tasks tasks"]) -> TaskScores:
    """Return the four means of R, where R[t, i] is the accuracy on task i after task t.

    Raises:
        TypeError: R is no floating-point tensor.
        ValueError: R is not square, has fewer than two rows, or holds NaN or infinity.

    Example:
        >>> scores = task_scores(torch.tensor([[0.8, 0.5], [0.6, 0.9]]))
        >>> [round(v, 3) for v in (scores.last, scores.average, scores.transfer, scores.forgetting)]
        [0.75, 0.7, 0.5, 0.2]
    """
    check_matrix("R", R)
    count = len(R)
    if R.shape != (count, count) or count < 2:
        raise ValueError(f"R: got shape {tuple(R.shape)}, wanted (T, T) with T >= 2 tasks")
    R = R.double()
    before = torch.stack([R[:i, i].mean() for i in range(1, count)])
    lost = (R.diagonal() - R[-1])[:-1]
    return TaskScores(*(v.item() for v in (R[-1].mean(), R.mean(), before.mean(), lost.mean())))
