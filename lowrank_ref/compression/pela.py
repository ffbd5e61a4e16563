"""PELA: cut every matrix of a trained network to factors, then repair the small network once, before any task.

Guo, Wang and Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arXiv 2310.10700
(CVPR 2024); what is left open is taken from the repository guoyang9/PELA at e0d3e1f, whose three code bases differ.

| in the paper and its code                            | here                                                     |
|------------------------------------------------------|----------------------------------------------------------|
| r = ⌊mn / (c(m+n))⌋                                  | `rank_at_ratio`, `plan_by_ratio`                         |
| W ≈ B·A, B = U_r·√S_r, A = √S_r·V_rᵀ                 | `cut_model` in `spectral_cut`, `WeLoreLinear`            |
| L_FD = (1/L) Σ_l MSE(F_l of student, F_l of teacher) | `feature_loss`; `tapped` in `feature_taps`               |
| ‖BA - W‖_max, largest absolute entry                 | `max_deviation`                                          |
| L_WP = (1/M) Σ_i (‖B_iA_i - W_i‖_max - ε)²           | `perturbation_loss`                                      |
| L = L_task + α·L_FD + β·MSE(logits) + γ·L_WP         | `Repair`; α, β, γ are `features`, `logits`, `penalty`    |

Letters: W (m, n) a weight of the teacher, which is the original network, frozen; c the compression ratio, r the rank;
F_l the output of block l, all places of it; ε is called `target`, as deviations below it are pushed up to it.

Deviations. The paper writes an infinity norm, the code takes the largest absolute entry; so does this. The student
runs once a batch (in the DeiT code twice); the teacher stays in eval mode (not so in the ALBEF code). A rank is from 1
to min(m, n). The teacher's weights are found by paths, not by parts of names. W - BA is formed in float32 or wider.

Cost. A matrix has r(m+n) numbers, a c-th of mn at most, and so has the optimizer's state in tasks. The repair holds the
teacher beside the student: its weights, a forward pass without gradients a step and, where γ > 0, one product (m, n) a
matrix. Nothing is merged afterwards. Works under DDP. FSDP shards weights; the penalty does not work there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.compression.feature_taps import tapped
from lowrank_ref.compression.input_covariances import matching_linears
from lowrank_ref.compression.spectral_cut import RankPlan
from lowrank_ref.compression.welore import WeLoreLinear, rank_reduction
from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.layers import weight_of
from lowrank_ref.core.matching import Pattern
from lowrank_ref.core.registry import PaperInfo


def rank_at_ratio(m: int, n: int, ratio: float) -> int:
    """Return r = ⌊mn / (c(m+n))⌋, the largest rank whose factors hold at most mn/c numbers; from 1 to min(m, n).

    TypeError, ValueError: a side of the matrix is no integer >= 1, or the ratio c no number > 0.

    Example:
        >>> rank_at_ratio(768, 768, 2), rank_at_ratio(768, 3072, 3)
        (192, 204)
    """
    check_integer("m", m, low=1)
    check_integer("n", n, low=1)
    check_number("ratio", ratio, low=0, open_low=True)
    return max(1, min(m, n, int(m * n // (ratio * (m + n)))))


def plan_by_ratio(
    model: nn.Module, ratio: float, pattern: Pattern = "all-linear", *, least_outputs: int = 10
) -> RankPlan:
    """Plan PELA's cut for `cut_model`: the same ratio c for every matrix, whatever its singular values are.

    Args:
        model, ratio: the model stays as it is; c > 0, in the paper's code 1.5 to 3.
        pattern: see `replace_linears`; leave out heads, patch embeddings and what is tied.
        least_outputs: matrices with fewer outputs stay dense, 10 in the code.

    Raises:
        TypeError, ValueError: see `replace_linears` and `rank_at_ratio`; or no matrix has so many outputs.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.compression import cut_model, plan_by_ratio
        >>> model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 2))
        >>> plan = plan_by_ratio(model, 2, "")
        >>> cut_model(model, plan)[0], plan.parameters  # 4·(12 + 24) of 288, and the small one whole, 48
        (WeLoreLinear(12 -> 24, rank 4), 192)
    """
    check_integer("least_outputs", least_outputs, low=1)
    weights = {path: weight_of(layer) for path, layer in matching_linears(model, pattern).items()}
    shapes = {path: (W.shape[0], W.shape[1]) for path, W in weights.items()}
    low = tuple(path for path, (m, _) in shapes.items() if m >= least_outputs)
    if not low:
        raise ValueError(f"least_outputs: got {least_outputs}, more than any of {len(shapes)} matrices has")
    ranks = {path: rank_at_ratio(*shape, ratio) if path in low else min(shape) for path, shape in shapes.items()}
    sizes = [min(shape) for shape in shapes.values()]
    return RankPlan(ranks, shapes, low, 0.0, rank_reduction([q - r for q, r in zip(sizes, ranks.values())], sizes))


def feature_loss(student: Sequence[Float[Tensor, "..."]], teacher: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """Return L_FD, the mean over blocks of the mean squared difference of features; no gradient to the teacher's.

    Raises:
        ValueError: no features, another number of them, or shapes that differ.
    """
    got, wanted = ([tuple(f.shape) for f in side] for side in (student, teacher))
    if not got or got != wanted:
        raise ValueError(f"student: got features of shapes {got[:4]}, wanted those of the teacher, {wanted[:4]}")
    return torch.stack([F.mse_loss(s, t.detach()) for s, t in zip(student, teacher)]).mean()


def max_deviation(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], W: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
    """Return ‖BA - W‖_max, the largest absolute entry. Its gradient reaches one entry, or is shared by equal ones.

    Example:
        >>> max_deviation(torch.zeros(1, 2), torch.zeros(2, 1), torch.tensor([[1.0, -2.0], [3.0, 4.0]])).item()
        4.0
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    with torch.autocast(W.device.type, enabled=False):
        return (B.to(wide) @ A.to(wide) - W.detach().to(wide)).abs().amax()


def perturbation_loss(deviations: Iterable[Float[Tensor, ""]], target: float = 0.0) -> Float[Tensor, ""]:
    """Return L_WP, the mean of (d - ε)² over the largest deviations d of all matrices.

    The target is ε >= 0: a deviation below it is pushed up. TypeError, ValueError: no deviations, or another ε.
    """
    check_number("target", target, low=0)
    found = list(deviations)
    if not found:
        raise ValueError("deviations: got none, wanted one for each matrix")
    return (torch.stack(found) - target).square().mean()


class Repair:
    """PELA's intermediate training as a loss: `repair(model, inputs, *targets)`, the form that a training loop takes.

    Args:
        student: a copy of the teacher, cut by `cut_model`. Everything in it trains.
        teacher: the original network. It is put in eval mode, and its parameters are frozen.
        taps: the blocks whose outputs are compared, before a final norm, see `tapped`.
        task: called as `task(logits, *targets)`, such as `F.cross_entropy`; None leaves the task out.
        features, logits: α and β, >= 0. β is 0 in all released recipes.
        penalty, target: γ and ε, >= 0. γ is 0 in the released recipes of DeiT, 1 elsewhere; ε is 0 for Swin, else 1e-3.

    Raises:
        TypeError, ValueError: an option is out of range, nothing is left to minimise, student and teacher share
            parameters, `taps` means no module, or, with γ > 0, the student holds no factors or the teacher no matrix of
            their shape at the same path.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> from torch.nn import functional as F
        >>> from lowrank_ref.compression import Repair, cut_model, plan_by_ratio
        >>> teacher = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 2))
        >>> student = cut_model(copy.deepcopy(teacher), plan_by_ratio(teacher, 2, r"^0$"))
        >>> repair = Repair(student, teacher, r"^1$", F.cross_entropy)
        >>> sorted(repair.terms(student, torch.ones(5, 12), torch.zeros(5, dtype=torch.long)))
        ['features', 'task']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        taps: Pattern,
        task: Callable[..., Tensor] | None = None,
        *,
        features: float = 1.0,
        logits: float = 0.0,
        penalty: float = 0.0,
        target: float = 0.0,
    ) -> None:
        for name, value in {"features": features, "logits": logits, "penalty": penalty, "target": target}.items():
            check_number(name, value, low=0)
        if task is None and not features + logits + penalty:
            raise ValueError("task: got None with α = β = γ = 0, wanted something to minimise")
        if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("student: got parameters of the teacher, wanted a deep copy")
        for model in (student, teacher):
            with tapped(model, taps):  # raises before anything changes
                pass
        self.pairs = _pairs(student, teacher) if penalty else []
        self.student, self.teacher, self.taps, self.task = student, teacher.eval().requires_grad_(False), taps, task
        self.features, self.logits, self.penalty, self.target = features, logits, penalty, target

    def terms(self, model: nn.Module, inputs: Any, *targets: Any) -> dict[str, Tensor]:
        """Return name -> term times its factor, of "task", "features", "logits" and "penalty" those that are not 0.

        Args:
            model: the student, or what DDP or `torch.compile` made of it; called once.
            inputs: a tensor, or a mapping of named arguments, as transformers' models take them.
            targets: handed to the task, behind the logits.
        """
        found = {}
        with tapped(self.student, self.taps) as own:
            output = _call(model, inputs)
        if self.task is not None:
            found["task"] = self.task(output, *targets)
        if self.features or self.logits:
            with torch.no_grad(), tapped(self.teacher, self.taps) as original:
                wanted = _call(self.teacher, inputs)
            if self.features:
                found["features"] = self.features * feature_loss(own, original)
            if self.logits:
                found["logits"] = self.logits * feature_loss([output], [wanted])
        if self.penalty:
            found["penalty"] = self.penalty * perturbation_loss(self.deviations(), self.target)
        return found

    def deviations(self) -> list[Tensor]:
        """Return ‖BA - W‖_max of each matrix."""
        return [max_deviation(layer.A, layer.B, weight_of(old)) for layer, old in self.pairs]

    def __call__(self, model: nn.Module, inputs: Any, *targets: Any) -> Tensor:
        """Return L, the sum of all terms."""
        return torch.stack([*self.terms(model, inputs, *targets).values()]).sum()


def _call(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(output, "logits", output)


def _pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[WeLoreLinear, nn.Module]]:
    """Factors of the student, and the teacher's layer at the same path."""
    old, found = dict(teacher.named_modules()), []
    for path, layer in student.named_modules():
        if isinstance(layer, WeLoreLinear):
            if path not in old or weight_of(old[path]).shape != (len(layer.B), layer.A.shape[1]):
                raise ValueError(f"teacher: got no matrix of the student's shape at {path!r}, wanted the original")
            found.append((layer, old[path]))
    if not found:
        raise ValueError(f"student: got {type(student).__name__} without factors, wanted one from cut_model")
    return found


PAPER = PaperInfo(
    key="pela",
    part="compression",
    name="PELA",
    title="PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
    authors=("Yangyang Guo", "Guangzhi Wang", "Mohan Kankanhalli"),
    arxiv="2310.10700",
    summary="Cut a network once, repair it with the original as teacher, and use it as an ordinary, smaller network.",
    use_when="you want a trained network smaller, and have inputs, but few labels, to repair the cut with",
    instead={"welore": "you have no data to repair with", "maestro": "one network shall be cut to many sizes"},
    needs=("welore",),
    official_code="guoyang9/PELA",
    code_licence="Apache-2.0",
    equations={"r": "rank_at_ratio", "L_FD": "feature_loss", "L_WP": "perturbation_loss", "L": "Repair"},
    deviations=("one pass of the student a batch, and a teacher in eval mode", "ranks from 1 to min(m, n)"),
    aliases=("intermediate pre-training", "feature distillation", "weight perturbation", "low-rank student"),
    status="draft",
    verified="2026-11-30",
)
