"""What the chapter on CoDyRA is too short for: sequences of tasks, and planted ranks (CPU, 25 minutes on one core).

    python tests/benchmarks/bench_codyra_small.py --out book/results/codyra_small.json --device cpu

turned: a network of upright digits learns digits turned by 90, 180 and 270 degrees, one task after the other, in the
six orders. regressions: four regressions in a row, each with an update of rank 2 and inputs of its own. planted: one
task with planted ranks 0, 1, 1, 8, for allocators of ranks.

Rates are chosen on validation data, everything else is measured on test data.
"""

import copy
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.actions import Action
from lowrank_ref.core.layers import adapters, merge_adapters, replace_linears, weight_of
from lowrank_ref.lab.beds import (
    TanhResidual,
    classification_loss,
    measure_planted,
    planted_rank,
    pretrained_on_digits,
    train_planted,
)
from lowrank_ref.lab.data import Arrays, array_batches, digits
from lowrank_ref.lab.train import linear_decay, train, warmup_cosine
from lowrank_ref.ranks import (
    ProximalGates,
    RankSelection,
    SoRALinear,
    gate_groups,
    kept_ranks,
    prune_by_svd,
    start_task,
    task_scores,
)
from lowrank_ref.ranks.codyra import update_norm_bound
from lowrank_ref.ranks.sora import rank_gates, released_threshold, soft_threshold

ANGLES = (90, 180, 270)
ORDERS = tuple(itertools.permutations(range(3)))
BATCH = 64


@dataclass(frozen=True)
class Setting:
    """One arm: what is put into the model for each task, and what happens to it.

    Attributes:
        rank: r, cut to min(m, n) where a layer is smaller.
        gate: None for LoRA, else how w starts: "normal" or "ones".
        shrink: sum of CoDyRA's thresholds.
        falling: thresholds in proportion to the rate, which falls from the first step on, instead of the late ramp.
        start: what w is multiplied with at the start.
        trained: whether w gets gradients.
        ratio: rate of w over that of A and B.
        sora: λ of SoRA's coupled step in the place of CoDyRA's ramp.
        released: the released operator, AdamW's β₂ = 0.9999 and a cosine.
        random: from half of the steps on, this share of the components, drawn at random, is at 0.
        factor: what ΔW is multiplied with before the merge.
        decay: weight decay of A and B.
        share: of the steps.
        svd: share of the numbers to which ΔW is cut by its singular values before the merge.
        replay: images of each earlier task (and of the pretraining) that are kept; half of every batch are such.
        once: one adapter for all tasks, never merged.
    """

    rank: int = 16
    gate: str | None = None
    shrink: float = 0.0
    falling: bool = False
    start: float = 1.0
    trained: bool = True
    ratio: float = 1.0
    sora: float | None = None
    released: bool = False
    random: float = 0.0
    factor: float = 1.0
    decay: float = 0.0
    share: float = 1.0
    svd: float | None = None
    replay: int = 0
    once: bool = False


LORA = Setting()
GATED = Setting(gate="normal")
ONES = Setting(gate="ones")
#: Arms with all twelve seeds on the digits.
MAIN = {
    "LoRA r=16": LORA,
    "LoRA r=4": replace(LORA, rank=4),
    "LoRA r=1": replace(LORA, rank=1),
    "LoRA r=16, replay 100": replace(LORA, replay=100),
    "LoRA r=16, decay 1": replace(LORA, decay=1.0),
    "LoRA r=16, merged × 0.7": replace(LORA, factor=0.7),
    "CoDyRA, shrink 0.65": replace(GATED, shrink=0.65),
    "CoDyRA, shrink 0.65, w untrained": replace(GATED, shrink=0.65, trained=False),
    "CoDyRA, w = 1, rate × 7, shrink 1": replace(ONES, ratio=7.0, shrink=1.0),
    "CoDyRA, w = 1, shrink 0.4": replace(ONES, shrink=0.4),
    "LoRA r=16, decay 3": replace(LORA, decay=3.0),
}
OTHERS = {
    "LoRA r=8": replace(LORA, rank=8),
    "LoRA r=2": replace(LORA, rank=2),
    "LoRA r=16, one adapter": replace(LORA, once=True),
    "LoRA r=16, replay 20": replace(LORA, replay=20),
    "LoRA r=16, decay 0.3": replace(LORA, decay=0.3),
    "LoRA r=16, merged × 0.5": replace(LORA, factor=0.5),
    "LoRA r=16, half the steps": replace(LORA, share=0.5),
    "LoRA r=16, SVD to half": replace(LORA, svd=0.5),
    "SoRA λ=0.4": replace(GATED, sora=0.4),
    "SoRA λ=0.8": replace(GATED, sora=0.8),
    "CoDyRA, shrink 0.3": replace(GATED, shrink=0.3),
    "CoDyRA, shrink 1": replace(GATED, shrink=1.0),
    "CoDyRA, shrink 1, w untrained": replace(GATED, shrink=1.0, trained=False),
    "CoDyRA, shrink 1.5": replace(GATED, shrink=1.5),
    "CoDyRA, shrink 0": GATED,
    "CoDyRA, shrink 0, w untrained": replace(GATED, trained=False),
    "CoDyRA, random half": replace(GATED, random=0.484),
    "CoDyRA, as released": replace(GATED, shrink=0.65, released=True),
    "CoDyRA, w = 1, shrink 0.4, w untrained": replace(ONES, shrink=0.4, trained=False),
    "CoDyRA, shrink 0.65, falling": replace(GATED, shrink=0.65, falling=True),
    "CoDyRA, w = 1, shrink 0.4, w untrained, falling": replace(ONES, shrink=0.4, trained=False, falling=True),
    "CoDyRA, w = 0.6, w untrained": replace(ONES, start=0.6, trained=False),
    "CoDyRA, w = 1, rate × 7, shrink 1.5": replace(ONES, ratio=7.0, shrink=1.5),
    "CoDyRA, w = 1, rate × 7, shrink 0": replace(ONES, ratio=7.0),
}
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
#: Arms whose best rate is higher; as many rates.
FASTER = r"r=1$|r=2$|half the steps|× 0\.5|decay [13]|untrained|shrink 1"
#: Controls that need no more than a passage through plasticity 0.7: the five lowest rates.
LOWER = r"falling|w = 0\.6"
REGRESSIONS = {
    name: (MAIN | OTHERS)[name]
    for name in (
        *("LoRA r=16", "LoRA r=4", "LoRA r=1", "LoRA r=16, one adapter", "LoRA r=16, replay 100"),
        *("LoRA r=16, decay 1", "LoRA r=16, merged × 0.5", "LoRA r=16, SVD to half", "SoRA λ=0.4"),
        *("CoDyRA, shrink 0.3", "CoDyRA, shrink 0.65", "CoDyRA, shrink 0.65, w untrained", "CoDyRA, shrink 1.5"),
        "CoDyRA, w = 1, rate × 7, shrink 1",
    )
}
#: Planted ranks: total ranks that a cut leaves, of 48; ten are planted.
PLANTED = {
    "oracle": LORA,
    **{f"LoRA r={r}": replace(LORA, rank=r) for r in (3, 5, 8, 12)},
    **{f"LoRA r=12, cut to {k}": replace(LORA, rank=12, svd=float(k)) for k in (10, 20)},
    **{f"LoRA r=12, cut to {k}, then trained": replace(LORA, rank=12, svd=float(k)) for k in (10, 20)},
    "SoRA λ=0.4": replace(GATED, rank=12, sora=0.4),
    "SoRA λ=0.8": replace(GATED, rank=12, sora=0.8),
    "SoRA w = 1, λ=0.4": replace(ONES, rank=12, sora=0.4),
    **{f"CoDyRA, shrink {c:g}": replace(GATED, rank=12, shrink=c) for c in (0.3, 0.65, 1.0, 1.5)},
    "CoDyRA, shrink 0.65, w untrained": replace(GATED, rank=12, shrink=0.65, trained=False),
    "CoDyRA, w = 1, shrink 1": replace(ONES, rank=12, shrink=1.0),
    "CoDyRA, w = 1, rate × 4, shrink 1": replace(ONES, rank=12, ratio=4.0, shrink=1.0),
}


@dataclass
class Task:
    """Training data of one task, and its loss."""

    x: Tensor
    y: Tensor
    loss: Callable[..., Tensor] = field(default=classification_loss)


class RandomZeros(Action):
    """From a step on, a share of the components, drawn once, has w = 0."""

    def __init__(self, model: nn.Module, after: int, share: float, generator: torch.Generator) -> None:
        self.done, self.after = 0, after
        self.dead = [(g, torch.rand(len(g), generator=generator) < share) for g in rank_gates(model).values()]

    @torch.no_grad()
    def act(self) -> None:
        """Set them to zero."""
        self.done += 1
        for g, dead in self.dead if self.done > self.after else ():
            g[dead] = 0.0


def put_in(model: nn.Module, s: Setting, generator: torch.Generator) -> None:
    """Adapt all layers for a task."""
    if s.gate is not None:
        start_task(model, "", s.rank, gate=s.gate, generator=generator)
        for g in rank_gates(model).values():
            g.data.mul_(s.start)
        return

    def lora(linear: nn.Module) -> nn.Module:
        rank = min(s.rank, *weight_of(linear).shape)
        return LoRALinear(linear, rank, alpha=float(rank), generator=generator)  # scale 1, as CoDyRA

    replace_linears(model, "", lora)


def optimizer_of(model: nn.Module, s: Setting, lr: float) -> torch.optim.Optimizer:
    """AdamW over what trains; w in a group of its own."""
    betas = (0.9, 0.9999) if s.released else (0.9, 0.999)
    if s.gate is None:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": s.decay, "lr": lr}]
    else:
        rest, gates = gate_groups(model, weight_decay=s.decay)
        groups = [rest | {"lr": lr}, gates | {"lr": lr * (s.ratio if s.trained else 0.0)}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=0.0)


def actions_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, s: Setting, steps: int, generator: torch.Generator
) -> list[Action]:
    """What acts after each step."""
    if s.gate is None:
        return []
    if s.sora is not None:
        return [ProximalGates(model, optimizer, penalty=s.sora)]
    if s.random:
        return [RandomZeros(model, steps // 2, s.random, generator)]
    operator = released_threshold if s.released else soft_threshold
    levels = min(50, steps // 2)  # less in a tiny run only
    selection = RankSelection(model, optimizer, steps=steps, shrink=s.shrink, levels=levels, operator=operator)
    if s.falling:
        rate = [linear_decay(steps)(i) for i in range(steps)]
        selection.thresholds = [s.shrink * r / sum(rate) for r in rate]
    return [selection]


def mixed(new: Callable[[int], Any], old: Sequence[tuple[Tensor, Tensor]], seed: int) -> Callable[[int], Any]:
    """Replace half of every batch by kept rows of old tasks."""
    if not old:
        return new
    x, y = (torch.cat(part) for part in zip(*old))
    kept = array_batches(x, y, batch=min(BATCH // 2, len(x)), seed=seed + 77)

    def batch(i: int) -> tuple[Tensor, Tensor]:
        (x, y), (u, v) = new(i), kept(i)
        return torch.cat([x[: BATCH // 2], u]), torch.cat([y[: BATCH // 2], v])

    return batch


def gates_of(model: nn.Module) -> Tensor:
    """All w of a model, one after the other."""
    return torch.cat([g.detach().clone() for g in rank_gates(model).values()])


def area(score: Tensor, alive: Tensor) -> float:
    """AUC: how often a living component began with a larger score than a dead one. NaN where all share a fate."""
    if bool(alive.all()) or not bool(alive.any()):
        return float("nan")
    pairs = score[alive][:, None] - score[~alive]
    return ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()


@torch.no_grad()
def finish(model: nn.Module, s: Setting) -> dict[str, float]:
    """Cut, scale and merge what the task has left; norm, bound and rank of it."""
    if s.svd is not None:
        whole = sum(a.rank * (a.in_features + a.out_features) for _, a in adapters(model))  # type: ignore[operator]
        prune_by_svd(model, int(s.svd * whole))
    norm, bound, rank = 0.0, 0.0, 0
    for _, layer in adapters(model):
        if isinstance(layer, LoRALinear):
            w = layer.g if isinstance(layer, SoRALinear) else torch.ones(layer.rank)
            layer.B.mul_(s.factor)
            norm += layer.delta_weight().square().sum().item()
            bound += update_norm_bound(layer.A, layer.B, w).square().item()
            rank += int(w.count_nonzero())
    if any(True for _ in adapters(model)):
        merge_adapters(model)
    return {"norm": norm**0.5, "bound": bound**0.5, "rank": float(rank)}


def sequence(
    model: nn.Module, tasks: Sequence[Task], memory: Task | None, s: Setting, lr: float, seed: int, steps: int,
    look: Callable[[nn.Module], dict[str, list[float]]],
) -> tuple[list[dict[str, list[float]]], dict[str, float]]:  # fmt: skip
    """Learn the tasks one after the other; return what `look` sees after each, and means over the tasks."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    old = [(memory.x[: s.replay], memory.y[: s.replay])] if memory is not None and s.replay else []
    steps, seen, tells, fates = round(s.share * steps), [], [], []
    for place, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        if not (s.once and place):
            put_in(model, s, generator)
        optimizer = optimizer_of(model, s, lr)
        actions = actions_of(model, optimizer, s, steps, generator)
        before = gates_of(model) if s.gate is not None else None
        batch = mixed(array_batches(task.x, task.y, batch=BATCH, seed=100 * seed + place), old, seed)
        schedule = warmup_cosine(steps, warmup=0, final=0.0) if s.released else linear_decay(steps)
        train(model, batch, task.loss, optimizer, steps=steps, schedule=schedule, actions=actions, progress=False)
        if before is not None:
            fates.append((before.abs(), gates_of(model) != 0))
        if not s.once or place == len(tasks) - 1:
            tells.append(finish(model, s))
        if s.replay:
            old.append((task.x[: s.replay], task.y[: s.replay]))
        seen.append(look(model))
    drift = sum((p - start[name]).square().sum().item() for name, p in model.named_parameters() if name in start)
    means = {name: sum(t[name] for t in tells) / len(tells) for name in tells[0]} | {"drift": drift**0.5}
    if fates:
        auc = area(*(torch.cat(part) for part in zip(*fates)))
        means |= {"auc": auc} if auc == auc else {}
    return seen, means


# Digits.


@cache
def turned(angle: int) -> Arrays:
    """The digits, turned."""
    return digits(rotate=angle)


@cache
def moved() -> tuple[Tensor, Tensor]:
    """Upright test images moved by one pixel in each of four directions, around the edge: nobody trains on such."""
    data = turned(0)
    x = data.x_test.unflatten(1, (8, 8))
    parts = [x.roll(by, axis).flatten(1) for by in (1, -1) for axis in (1, 2)]
    return torch.cat(parts), data.y_test.repeat(4)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images."""
    return (model(x).argmax(1) == y).double().mean().item()


@torch.no_grad()
def look_at_digits(model: nn.Module, order: Sequence[int]) -> dict[str, list[float]]:
    """Accuracies on the tasks in their order, then on upright and moved images."""
    sets = [turned(ANGLES[i]) for i in order] + [turned(0)]
    test = [accuracy(model, d.x_test, d.y_test) for d in sets] + [accuracy(model, *moved())]
    return {"test": test, "valid": [accuracy(model, d.x_valid, d.y_valid) for d in sets]}


def run_turned(name: str, lr: float, seed: int, *, steps: int) -> dict[str, Any]:
    """Learn three turned digits in the order of the seed."""
    order, model = ORDERS[seed % len(ORDERS)], pretrained_on_digits()
    tasks = [Task(turned(ANGLES[i]).x_train, turned(ANGLES[i]).y_train) for i in order]
    memory, look = Task(turned(0).x_train, turned(0).y_train), partial(look_at_digits, order=order)
    try:
        seen, means = sequence(model, tasks, memory, (MAIN | OTHERS)[name], lr, seed, steps, look)
    except FloatingPointError:
        return {"error": "diverged"}
    R = torch.tensor([s["test"][:3] for s in seen], dtype=torch.float64)
    scores, end = task_scores(R), seen[-1]
    found = {
        "valid all": sum(end["valid"]) / 4,
        "all": sum(end["test"][:4]) / 4,
        "plasticity": R.diagonal().mean().item(),
        **vars(scores),
        "upright": end["test"][3],
        "upright after one": seen[0]["test"][3],
        "moved": end["test"][4],
    }
    return {k: round(v, 4) for k, v in (found | means).items()}


# Regressions.


@cache
def regressions(seed: int, count: int = 4, width: int = 32) -> tuple[nn.Module, list[dict[str, Tensor]], Tensor]:
    """A network, tasks that move it by rank 2 in a layer on a subspace of inputs, and 612 inputs of all directions."""
    g = torch.Generator().manual_seed(seed)
    base = TanhResidual(width, 3, generator=g).requires_grad_(False)
    tasks = []
    for t in range(count):
        U, V, Q = (torch.linalg.qr(torch.randn(width, 10, generator=g)).Q for _ in range(3))
        teacher: Any = copy.deepcopy(base)
        teacher.layers[t % 3].weight.data += 1.5 * U[:, :2] @ V[:, :2].T
        x = torch.randn(3 * 512, 10, generator=g) @ Q.T + 0.1 * torch.randn(3 * 512, width, generator=g)
        y = teacher(x)
        noisy = y[:512] + 0.1 * torch.randn(512, width, generator=g)
        parts = {"x": x[:512], "y": noisy, "x_valid": x[512:1024], "y_valid": y[512:1024]}
        tasks.append(parts | {"x_test": x[1024:], "y_test": y[1024:]})
    return base, tasks, torch.randn(612, width, generator=g)


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(x), y)


def run_regressions(name: str, lr: float, seed: int, *, steps: int) -> dict[str, Any]:
    """Learn four regressions; errors are mean squared errors on noiseless test rows."""
    base, data, inputs = regressions(seed)
    model, wanted = copy.deepcopy(base).requires_grad_(True), base(inputs)
    (inputs, kept), (wanted, kept_wanted) = inputs.split([512, 100]), wanted.split([512, 100])

    @torch.no_grad()
    def look(model: nn.Module) -> dict[str, list[float]]:
        errors = [[squared(model, d[f"x_{p}"], d[f"y_{p}"]).item() for d in data] for p in ("test", "valid")]
        return {"test": errors[0], "valid": errors[1], "general": [squared(model, inputs, wanted).item()]}

    tasks = [Task(d["x"], d["y"], squared) for d in data]
    memory = Task(kept, kept_wanted, squared)
    try:
        seen, means = sequence(model, tasks, memory, REGRESSIONS[name], lr, seed, steps, look)
    except FloatingPointError:
        return {"error": "diverged"}
    R = torch.tensor([s["test"] for s in seen], dtype=torch.float64)
    scores = task_scores(-R)
    found = {
        "valid last": sum(seen[-1]["valid"]) / len(data),
        "last": -scores.last,
        "plasticity": R.diagonal().mean().item(),
        "forgetting": scores.forgetting,
        "general": seen[-1]["general"][0],
    }
    return {k: round(v, 5) for k, v in (found | means).items()}


# Planted ranks.


def oracle(model: nn.Module, generator: torch.Generator) -> None:
    """LoRA of the planted ranks."""
    for i, rank in enumerate((0, 1, 1, 8)):
        if rank:
            make = partial(LoRALinear, rank=rank, alpha=float(rank), generator=generator)
            replace_linears(model, f"^layers.{i}$", make)


def cut_and_train(task: Any, s: Setting, lr: float, seed: int, steps: int) -> nn.Module:
    """Train for half of the steps, cut by singular values, train on with a new Adam; the rate goes as in one run."""
    model = copy.deepcopy(task.base).requires_grad_(True)
    put_in(model, s, torch.Generator().manual_seed(seed))
    batch, warm = array_batches(task.x_train, task.y_train, batch=128, seed=seed), round(0.06 * steps)
    for first, last in ((0, steps // 2), (steps // 2, steps)):

        def rate(i: int, first: int = first) -> float:
            return min((first + i + 1) / warm, (steps - first - i) / (steps - warm))

        adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        later = partial(lambda i, first: batch(first + i), first=first)
        train(model, later, squared, adam, steps=last - first, schedule=rate, progress=False)
        if not first:
            prune_by_svd(model, int(64 * (s.svd or 0)))
    return model


def run_planted(name: str, lr: float, seed: int, *, steps: int) -> dict[str, Any]:
    """One task with planted ranks."""
    task, s = planted_rank(seed), PLANTED[name]
    if name.endswith("then trained"):
        return {k: round(v, 6) for k, v in measure_planted(task, cut_and_train(task, s, lr, seed, steps)).items()}
    notes: dict[str, Any] = {}

    def adapt(model: nn.Module, generator: torch.Generator) -> list[dict[str, Any]] | None:
        if name == "oracle":
            return oracle(model, generator)
        put_in(model, s, generator)
        if s.gate is None:
            return None
        notes["start"] = gates_of(model).abs()
        rest, gates = gate_groups(model)
        return [rest, gates | {"lr": s.ratio if s.trained else 0.0}]

    def actions(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Action]:
        return actions_of(model, optimizer, s, steps, torch.Generator())

    model = train_planted(task, adapt, lr, seed=seed, steps=steps, actions=actions)
    extra: dict[str, float] = {}
    if s.gate is not None:
        auc = area(notes["start"], gates_of(model) != 0)
        extra = {"gates": float(sum(kept_ranks(model).values()))} | ({"auc": auc} if auc == auc else {})
    if s.svd is not None:
        prune_by_svd(model, int(64 * s.svd))
    return {k: round(v, 6) for k, v in (measure_planted(task, model) | extra).items()}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("turned", "regressions", "planted"))
    torch.set_num_threads(1)
    length = 10 if args.tiny else None
    for part in args.part:
        run, arms, steps, setting = {
            "turned": (
                run_turned,
                MAIN | OTHERS,
                200,
                "MLP 64-128-128-10 of upright digits learns digits turned by 90, 180 and 270 degrees in a row; seed k "
                "has order k mod 6 of the six; {} steps of AdamW of 64 images a task, all layers, scale 1",
            ),
            "regressions": (
                run_regressions,
                REGRESSIONS,
                300,
                "tanh network of width 32 and 3 layers, four regressions of rank 2 in a row, {} steps of AdamW a task",
            ),
            "planted": (
                run_planted,
                PLANTED,
                400,
                "planted ranks 0, 1, 1, 8 of width 32, gates and LoRA of r = 12, {} steps of Adam, scale 1",
            ),
        }[part]
        steps = length or steps
        runs = Runs(args.out, part, setting=setting.format(steps), seconds=args.seconds)
        for name in arms:
            if not re.search(args.only, name):
                continue
            if part == "turned":
                rates = tuple(2 * lr for lr in RATES) if re.search(FASTER, name) else RATES
                rates = rates[:5] if re.search(LOWER, name) else rates
                seeds = range(12 if name in MAIN else 6)
            elif part == "regressions":
                rates, seeds = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016), range(6)
            else:
                rates, seeds = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08), range(5)
            for lr in rates:
                for seed in list(seeds)[:1] if args.tiny else seeds:
                    runs.row({"method": name, "lr": lr, "seed": seed}, partial(run, name, lr, seed, steps=steps))


if __name__ == "__main__":
    main()
