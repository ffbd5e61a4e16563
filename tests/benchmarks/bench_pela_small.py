"""PELA on a small network of digits: which term of the repair does what, and what is left of it in tasks.

    python tests/benchmarks/bench_pela_small.py --part repair --out book/results/pela_small.json
    python tests/benchmarks/bench_pela_small.py --part controls --out book/results/pela_small.json
    python tests/benchmarks/bench_pela_small.py --part tasks --out book/results/pela_small.json
    python tests/benchmarks/bench_pela_small.py --part minilm --out book/results/pela_small.json

repair: an MLP 64-128-128-128-128-10 with GELU that has learned the digits is cut at c, then 150 steps with one of the
losses, three rates an arm. "few" repairs with the first 100 of the 1,000 training images. The seeds of an arm train
together, in one call of vmap; so the first row of them tells the seconds of all.
controls (rows of "repair" too): rates beyond the edges, random factors of the scale that keeps variances, other rates
of the teacher, c = 12, and the rates of 100 images down to 0.00003.
tasks: the repaired networks, each at the rate that was best on the 297 validation images, learn tasks of 60 labels.
minilm: all-MiniLM-L6-v2 cut at c = 2 and repaired on verses without labels.
"""

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from common import Runs, arguments
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.compression import (
    Repair,
    WeLoreLinear,
    cut_model,
    feature_loss,
    max_deviation,
    plan_by_ratio,
    tapped,
)
from lowrank_ref.core.accounting import numel
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.data import array_batches, digits, verse_topics
from lowrank_ref.lab.models import MLP, embed_sentences, minilm
from lowrank_ref.lab.train import linear_decay

SIZES, CUT, TAPS = (64, 128, 128, 128, 128, 10), r"^layers\.[0-3]$", r"^activation$"
SEEDS, RATIOS = range(6), (2, 3, 4, 8)
RATES = {1: (1e-4, 3e-4, 1e-3), 2: (3e-4, 1e-3, 3e-3), 3: (3e-4, 1e-3, 3e-3), 4: (3e-4, 1e-3, 3e-3)}
RATES |= {8: (1e-3, 3e-3, 1e-2)}
TEACHING, STEPS, BATCH, FEW = 600, 150, 50, 100
FROBENIUS = 25.0  # so that the penalty on mean squares starts about as high as the other

#: Arm -> options of `Repair`, whether the task is there.
LOSSES = {
    "CE": (True, {"features": 0.0}),
    "FD": (False, {}),
    "WP": (False, {"features": 0.0, "penalty": 1.0}),
    "FD + WP": (False, {"penalty": 1.0}),
    "CE + FD": (True, {}),
    "CE + WP": (True, {"features": 0.0, "penalty": 1.0}),
    "CE + FD + WP": (True, {"penalty": 1.0}),
    "CE + FD + WP, ε = 0.5": (True, {"penalty": 1.0, "target": 0.5}),
    "logits": (False, {"features": 0.0, "logits": 1.0}),
    "CE + logits": (True, {"features": 0.0, "logits": 1.0}),
    "random start, CE + FD": (True, {}),
    "CE, 1.6 times the steps": (True, {"features": 0.0}),
    "random factors, CE": (True, {"features": 0.0}),
    "random factors, CE + FD": (True, {}),
}
OTHERS = ("CE + FD of other images", "CE + Frobenius")
RANDOM = ("random factors, CE", "random factors, CE + FD")  # of variance 1/n, biases stay
FEW_ARMS = ("CE", "FD", "CE + FD", "CE + FD + WP", "logits", "CE + logits")
#: Arm of 100 images at c = 8 -> further rates.
FEW_RATES = {
    "CE": (3e-5, 1e-4, 3e-4), "CE + FD": (3e-5, 1e-4, 3e-4), "CE + logits": (1e-4, 3e-4), "logits": (3e-4, 3e-3, 1e-2),
    "FD": (3e-4, 3e-2), "uncut, CE": (3e-5, 1e-4, 3e-4),
}  # fmt: skip
#: (Ratio, arm) -> further rates on all images.
MORE = {(8, arm): (3e-2,) for arm in ("CE", "FD", "FD + WP", "CE + FD", "CE + FD + WP", "random start, CE + FD")}
MORE |= {(8, "WP"): (1e-4, 3e-4)} | {(8, arm): (1e-3, 3e-3, 1e-2, 3e-2) for arm in RANDOM}
MORE |= {(12, arm): (1e-3, 3e-3, 1e-2, 3e-2) for arm in ("CE", "FD", "CE + FD")}
MORE |= {(2, arm): (1e-3, 3e-3) for arm in ("CE", "FD", "CE + FD", "CE + FD + WP")}
TEACHER_RATES, RETAUGHT = (
    (3e-4, 3e-3, 1e-2),
    {"direct": (0.0,), "CE": (1e-3, 3e-3, 1e-2), "CE + FD": (3e-3, 1e-2, 3e-2)},
)
MAIN_ARMS = ("CE", "FD", "FD + WP", "CE + FD", "CE + FD + WP")  # at c = 2 and 4
TASKS = {"five or more": 2, "turned by 90°": 10}
TASK_RATIOS, TASK_RATES, TASK_STEPS, LABELS = (3, 8), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 100, 60
STARTS = ("direct", "CE", "FD", "CE + FD", "CE + FD + WP", "CE + logits", "random start, CE + FD")

KINDS_OF_LOSS = {"valid loss": "valid", "loss": "test"}

MATRICES, BLOCKS = r"(query|key|value|dense)$", r"^encoder\.layer\.\d+$"
TEXT = {"FD": {}, "WP": {"features": 0.0, "penalty": 1.0}, "FD + WP": {"penalty": 1.0}, "last block": {}}
TEXT_STEPS, TEXT_RATES, TEXT_BATCH, WORDS, TEXT_SEEDS = 80, (1e-4, 3e-4, 1e-3), 16, 16, range(3)


class Both(nn.Module):
    """Student and teacher as one module, so that `functional_call` can put the weights of any seed into both."""

    def __init__(self, student: nn.Module, teacher: nn.Module, make: Callable[..., Any]):
        super().__init__()
        self.student, self.teacher = copy.deepcopy(student), copy.deepcopy(teacher)
        self.loss = make(self.student, self.teacher)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the loss of one seed."""
        return self.loss(self.student, x, y)


def stacked(models: list[nn.Module], prefix: str) -> dict[str, torch.Tensor]:
    """Return name -> the parameters of all models, stacked."""
    named = [dict(model.named_parameters()) for model in models]
    return {f"{prefix}.{name}": torch.stack([n[name].detach() for n in named]) for name in named[0]}


def fit(
    students: list[Any], teachers: list[Any], make: Any, batches: list[Any], lr: float, steps: int, decay: float = 0.0
) -> list[Any]:
    """Train copies of all students, each with its own teacher and batches, by AdamW with linear decay of the rate."""
    both = Both(students[0], teachers[0], make)
    frozen = {f"student.{n}" for n, p in students[0].named_parameters() if not p.requires_grad}
    own, fixed = stacked(students, "student"), stacked(teachers, "teacher")
    fixed |= {name: own.pop(name) for name in frozen}
    for p in own.values():
        p.requires_grad_(True)
    adam = torch.optim.AdamW(own.values(), lr=lr, weight_decay=decay)
    each = vmap(lambda p, q, x, y: functional_call(both, {**p, **q}, (x, y)))
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * linear_decay(steps)(step)
        x, y = (torch.stack(part) for part in zip(*(batch(step) for batch in batches)))
        adam.zero_grad()
        each(own, fixed, x, y).sum().backward()
        adam.step()
    trained = copy.deepcopy(students)
    for i, model in enumerate(trained):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if f"student.{name}" in own:
                    p.copy_(own[f"student.{name}"][i])
    return trained


def task_only(student: nn.Module, teacher: nn.Module) -> Any:
    """Return the loss without a teacher."""
    return lambda model, x, y: F.cross_entropy(model(x), y)


def drawn(seed: int) -> torch.Generator:
    """Return a generator of this seed."""
    return torch.Generator().manual_seed(seed)


def data_of(seed: int, images: int = 1000) -> Any:
    """Return batches of the first so many training images."""
    data = digits()
    return array_batches(data.x_train[:images], data.y_train[:images], batch=BATCH, seed=seed)


@functools.cache
def teachers(count: int, steps: int, lr: float = 1e-3) -> list[MLP]:
    """Return one trained network a seed."""
    fresh = [MLP(SIZES, activation=nn.GELU, generator=drawn(seed)) for seed in range(count)]
    return fit(fresh, fresh, task_only, [data_of(seed) for seed in range(count)], lr, steps, decay=0.01)


def other_images(student: nn.Module, teacher: nn.Module) -> Any:
    """Return CE + FD, with the features that the teacher has of the next image in the batch."""

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with tapped(student, TAPS) as own:
            z = model(x)
        with torch.no_grad(), tapped(teacher, TAPS) as original:
            teacher(x.roll(1, 0))
        return F.cross_entropy(z, y) + feature_loss(own, original)

    return loss


def frobenius(student: nn.Module, teacher: nn.Module) -> Any:
    """Return CE and the mean over matrices of the mean square of BA - W, times a constant."""
    pairs = [(student.layers[i], teacher.layers[i]) for i in range(4)]

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squares = [(s.B @ s.A - t.weight).square().mean() for s, t in pairs]
        return F.cross_entropy(model(x), y) + FROBENIUS * torch.stack(squares).mean()

    return loss


def loss_maker(arm: str) -> Any:
    """Return (student, teacher) -> loss of an arm."""
    if arm in OTHERS:
        return {"CE + FD of other images": other_images, "CE + Frobenius": frobenius}[arm]
    task, options = LOSSES[arm]
    return lambda s, t: Repair(s, t, TAPS, F.cross_entropy if task else None, **options)


def at_random(student: nn.Module, seed: int, variances: bool) -> nn.Module:
    """Draw the factors of a student anew: of variance 1/n, or with the biases, as PyTorch draws two linear layers."""
    g = drawn(1000 + seed)
    for layer in student.modules():
        if isinstance(layer, WeLoreLinear):
            with torch.no_grad():
                if variances:
                    for p in (layer.A, layer.B):
                        p.normal_(0, p.shape[1] ** -0.5, generator=g)
                    continue
                layer.A.uniform_(-(layer.A.shape[1] ** -0.5), layer.A.shape[1] ** -0.5, generator=g)
                for p in (layer.B, layer.bias):
                    p.uniform_(-(layer.rank**-0.5), layer.rank**-0.5, generator=g)
    return student


@functools.cache
def repaired(
    ratio: int, arm: str, lr: float, images: int, count: int, steps: int, teaching: float = 1e-3
) -> list[nn.Module]:
    """Cut the teachers and repair all seeds; ratio 1 leaves them uncut."""
    own = teachers(count, 4 * steps, teaching)
    students = [copy.deepcopy(t) for t in own]
    if ratio > 1:
        students = [cut_model(s, plan_by_ratio(s, ratio, CUT)) for s in students]
    if arm.startswith("random"):
        students = [at_random(s, seed, arm in RANDOM) for seed, s in enumerate(students)]
    if arm == "direct":
        return students
    batches = [data_of(100 + seed, images) for seed in range(count)]
    longer = round(1.6 * steps) if "steps" in arm else steps
    return fit(students, own, loss_maker(arm), batches, lr, longer)


@functools.cache
def small_nets(ratio: int, lr: float, count: int, steps: int, images: int = 1000) -> list[nn.Module]:
    """Train dense networks of the student's size from scratch, for the steps of teacher and repair together."""
    wanted = numel(repaired(ratio, "direct", 0.0, 1000, 1, steps)[0].parameters())
    width = max(w for w in range(4, 129) if numel(MLP((64, *[w] * 4, 10)).parameters()) <= wanted)
    fresh = [MLP((64, *[width] * 4, 10), activation=nn.GELU, generator=drawn(seed)) for seed in range(count)]
    batches = [data_of(seed, images) for seed in range(count)]
    return fit(fresh, fresh, task_only, batches, lr, 5 * steps, decay=0.01)


@torch.no_grad()
def measure(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Compare one student with the labels and with its teacher."""
    data = digits()
    with tapped(student, TAPS) as own:
        z = student(data.x_test)
    with tapped(teacher, TAPS) as original:
        wanted = teacher(data.x_test)
    row = {
        "valid loss": round(F.cross_entropy(student(data.x_valid), data.y_valid).item(), 5),
        "loss": round(F.cross_entropy(z, data.y_test).item(), 5),
        "accuracy": (z.argmax(1) == data.y_test).double().mean().item(),
        "agreement": (z.argmax(1) == wanted.argmax(1)).double().mean().item(),
        "trainable": numel(student.parameters()),
    }
    if own[0].shape == original[0].shape:
        row["by depth"] = [round(feature_loss([a], [b]).item(), 5) for a, b in zip(own, original)]
        row["features"] = round(feature_loss(own, original).item(), 5)
    pairs = [(s, t) for s, t in zip(student.layers, teacher.layers) if isinstance(s, WeLoreLinear)]
    if pairs:
        row["deviation"] = round(max(max_deviation(s.A, s.B, t.weight).item() for s, t in pairs), 5)
        far = [((s.B @ s.A - t.weight).norm() / t.weight.norm()).item() for s, t in pairs]
        row["distance"] = round(sum(far) / len(far), 5)
        row["mean deviation"] = round(sum(max_deviation(s.A, s.B, t.weight).item() for s, t in pairs) / len(pairs), 5)
    return row


def repair_arms(runs: Runs, tiny: bool, only: str) -> None:
    """Cut and repair at all ratios and rates."""
    count, steps = (2, 4) if tiny else (len(SEEDS), STEPS)
    own = teachers(count, 4 * steps)

    def store(method: str, lr: float, make: Callable[[], list[nn.Module]]) -> None:
        if re.search(only, method):
            for seed in range(count):
                key = {"method": method, "lr": lr, "seed": seed}
                runs.row(key, lambda seed=seed: measure(make()[seed], own[seed]))

    for ratio in (1, *RATIOS):
        store(f"c={ratio}: direct", 0.0, lambda r=ratio: repaired(r, "direct", 0.0, 1000, count, steps))
    few = tiny and 1
    for lr in RATES[1][: few or None]:
        store("c=1: CE", lr, lambda lr=lr: repaired(1, "CE", lr, 1000, count, steps))
    every = [arm for arm in (*LOSSES, *OTHERS) if arm not in RANDOM]
    for ratio, arms in {8: every, 3: every, 2: MAIN_ARMS, 4: MAIN_ARMS}.items():
        for lr in RATES[ratio][: few or None]:
            for arm in arms:
                how = lambda r=ratio, a=arm, lr=lr: repaired(r, a, lr, 1000, count, steps)  # noqa: E731
                store(f"c={ratio}: {arm}", lr, how)
            if ratio in (3, 8):
                store(f"c={ratio}: dense, equal size", lr, lambda r=ratio, lr=lr: small_nets(r, lr, count, steps))
            for arm in FEW_ARMS if ratio == 8 else ():
                how = lambda r=ratio, a=arm, lr=lr: repaired(r, a, lr, FEW, count, steps)  # noqa: E731
                store(f"c={ratio}, few: {arm}", lr, how)


def control_arms(runs: Runs, tiny: bool, only: str) -> None:
    """Run what a sceptic asked for."""
    count, steps = (2, 4) if tiny else (len(SEEDS), STEPS)
    few = tiny and 1

    def store(method: str, lr: float, make: Callable[[], list[nn.Module]], teaching: float = 1e-3) -> None:
        if re.search(only, method):
            for seed in range(count):
                key = {"method": method, "lr": lr, "seed": seed}
                against = lambda seed=seed: measure(make()[seed], teachers(count, 4 * steps, teaching)[seed])  # noqa: E731
                runs.row(key, against)

    def repair(method: str, ratio: int, arm: str, lr: float, images: int = 1000, teaching: float = 1e-3) -> None:
        store(method, lr, lambda: repaired(ratio, arm, lr, images, count, steps, teaching), teaching)

    for arm, rates in FEW_RATES.items():
        for lr in rates[: few or None]:
            ratio = 1 if arm.startswith("uncut") else 8
            repair(f"c=8, few: {arm}", ratio, arm.removeprefix("uncut, "), lr, FEW)
    for lr in RATES[8][: few or None]:
        store("c=8, few: dense, equal size", lr, lambda lr=lr: small_nets(8, lr, count, steps, FEW))
    repair("c=12: direct", 12, "direct", 0.0)
    for (ratio, arm), rates in MORE.items():
        for lr in rates[: few or None]:
            repair(f"c={ratio}: {arm}", ratio, arm, lr)
    for teaching in TEACHER_RATES[: few or None]:
        repair(f"teacher at {teaching:g}: uncut", 1, "direct", 0.0, 1000, teaching)
    for arm, rates in RETAUGHT.items():
        for lr in rates[: few or None]:
            repair(f"teacher at 0.01, c=8: {arm}", 8, arm, lr, 1000, 1e-2)
    store("c=8: dense, equal size", 3e-2, lambda: small_nets(8, 3e-2, count, steps))


def best_rate(rows: list[dict[str, Any]], method: str) -> float:
    """Return the rate with the lowest mean validation loss of these stored rows."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            found.setdefault(row["lr"], []).append(row["valid loss"])
    return min(found, key=lambda lr: sum(found[lr]) / len(found[lr]))


def labels_of(task: str, y: torch.Tensor) -> torch.Tensor:
    """Return the labels of a task."""
    return (y >= 5).long() if task == "five or more" else y


def task_data(task: str, seed: int) -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return batches of 60 labelled images, other ones for each seed, and the parts to measure on."""
    data = digits(rotate=90 if task.startswith("turned") else 0)
    rows = torch.randperm(1000, generator=drawn(seed))[:LABELS]
    parts = {p: (getattr(data, f"x_{p}"), labels_of(task, getattr(data, f"y_{p}"))) for p in ("valid", "test")}
    y = labels_of(task, data.y_train)[rows]
    return array_batches(data.x_train[rows], y, batch=LABELS // 2, seed=seed), parts


def with_head(model: nn.Module, classes: int, seed: int, rank: int = 0) -> nn.Module:
    """Return a copy with a new head; with a rank, LoRA on the four matrices in the place of full tuning."""
    model = copy.deepcopy(model).requires_grad_(True)
    if rank:
        g = drawn(seed)
        replace_linears(model, CUT, lambda base: LoRALinear(base, rank, alpha=2 * rank, generator=g))
    model.layers[4] = nn.Linear(128, classes)
    with torch.no_grad():
        for p in model.layers[4].parameters():
            p.uniform_(-(128**-0.5), 128**-0.5, generator=drawn(seed))
    return model


@functools.cache
def tuned(ratio: int, start: str, rate: float, task: str, lr: float, count: int, steps: int) -> list[dict[str, float]]:
    """Tune all seeds on a task and measure them."""
    if start in ("uncut", "LoRA"):
        begin = teachers(count, 4 * steps)
    else:
        begin = repaired(ratio, start, rate, 1000, count, steps)
    size = numel(repaired(ratio, "direct", 0.0, 1000, count, steps)[0].parameters())
    rank = size // (64 + 128 + 3 * 256) if start == "LoRA" else 0
    models = [with_head(m, TASKS[task], seed, rank) for seed, m in enumerate(begin)]
    data = [task_data(task, seed) for seed in range(count)]
    trained = fit(models, begin, task_only, [d[0] for d in data], lr, min(TASK_STEPS, steps))
    rows = []
    for model, (_, parts) in zip(trained, data):
        with torch.no_grad():
            z = {part: model(x) for part, (x, _) in parts.items()}
        row = {name: round(F.cross_entropy(z[p], parts[p][1]).item(), 5) for name, p in KINDS_OF_LOSS.items()}
        row["accuracy"] = (z["test"].argmax(1) == parts["test"][1]).double().mean().item()
        rows.append({**row, "trainable": numel(p for p in model.parameters() if p.requires_grad)})
    return rows


def task_arms(runs: Runs, rows: list[dict[str, Any]], tiny: bool, only: str) -> None:
    """Tune every start on every task."""
    count, steps = (2, 4) if tiny else (len(SEEDS), STEPS)
    for ratio in TASK_RATIOS[1:] if tiny else TASK_RATIOS:
        for start in (*STARTS[: None if ratio == 8 else 5], "uncut", "LoRA"):
            known = start not in ("direct", "uncut", "LoRA") and not tiny
            rate = best_rate(rows, f"c={ratio}: {start}") if known else 1e-3
            for task in TASKS:
                for lr in TASK_RATES[: 1 if tiny else None] if re.search(only, f"c={ratio}, {task}: {start}") else ():
                    for seed in range(count):
                        key = {"method": f"c={ratio}, {task}: {start}", "lr": lr, "seed": seed}
                        args = (ratio, start, rate, task, lr, count, steps)
                        runs.row(key, lambda a=args, seed=seed: {**tuned(*a)[seed], "repair lr": a[2]})


def sentence_batches(tokenizer: Any, texts: list[str], seed: int) -> Any:
    """Batches of named arguments, for `Repair`."""
    tokenizer.enable_truncation(WORDS)
    tokenizer.enable_padding(length=WORDS)
    codes = tokenizer.encode_batch(texts)
    ids, mask = (torch.tensor([getattr(c, name) for c in codes]) for name in ("ids", "attention_mask"))
    batch = array_batches(ids, mask, batch=TEXT_BATCH, seed=seed)

    def get(i: int) -> tuple[dict[str, torch.Tensor]]:
        rows, masks = batch(i)
        return ({"input_ids": rows, "attention_mask": masks},)

    return get


def spread(items: list[Any], count: int) -> list[Any]:
    """Pick so many items, evenly spread."""
    return [items[i * len(items) // count] for i in range(count)]


def text_arms(runs: Runs, tiny: bool, only: str) -> None:
    """Cut MiniLM at c = 2 and repair it on verses without labels."""
    data, (teacher, tokenizer) = verse_topics(), minilm()
    tokenizer.enable_truncation(WORDS)
    valid, test = spread(data.train[1::2], 8 if tiny else 96), spread(data.test, 8 if tiny else 192)
    seen = spread(data.train[::2], 64 if tiny else 2000)
    plan = plan_by_ratio(teacher, 2, MATRICES)
    start = cut_model(copy.deepcopy(teacher), plan)
    vectors = {name: embed_sentences(teacher, tokenizer, texts) for name, texts in (("valid", valid), ("test", test))}

    def look(model: nn.Module) -> dict[str, Any]:
        found = {n: embed_sentences(model, tokenizer, t) for n, t in (("valid", valid), ("test", test))}
        cosine = {name: (found[name] * vectors[name]).sum(1).mean().item() for name in found}
        near = (found["test"] @ found["test"].T).fill_diagonal_(-1).argmax(1)
        wanted = (vectors["test"] @ vectors["test"].T).fill_diagonal_(-1).argmax(1)
        pairs = Repair(model, teacher, BLOCKS, penalty=1.0).deviations()
        return {
            "valid cosine": round(cosine["valid"], 5), "cosine": round(cosine["test"], 5),
            "same neighbour": (near == wanted).double().mean().item(),
            "deviation": round(max(d.item() for d in pairs), 5), "trainable": numel(model.parameters()),
        }  # fmt: skip

    def repair(arm: str, lr: float, seed: int) -> dict[str, Any]:
        model = copy.deepcopy(start).train()
        taps = r"^encoder\.layer\.5$" if arm == "last block" else BLOCKS
        adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        steps = 2 if tiny else TEXT_STEPS
        model.eval()  # no dropout
        loss, batch = Repair(model, teacher, taps, **TEXT[arm]), sentence_batches(tokenizer, seen, seed)
        for step in range(steps):
            adam.param_groups[0]["lr"] = lr * linear_decay(steps)(step)
            adam.zero_grad()
            loss(model, *batch(step)).backward()
            adam.step()
        tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        return look(model)

    runs.row({"method": "direct", "lr": 0.0, "seed": 0}, lambda: look(copy.deepcopy(start)))
    for seed in list(TEXT_SEEDS)[: 1 if tiny else None]:
        for arm in TEXT if seed == 0 else ("FD", "FD + WP", "last block"):
            for lr in TEXT_RATES[: 1 if tiny else None] if re.search(only, f"{arm}, seed {seed}") else ():
                runs.row({"method": arm, "lr": lr, "seed": seed}, lambda a=arm, lr=lr, s=seed: repair(a, lr, s))


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("repair", "controls", "tasks", "minilm"))
    torch.set_num_threads(1)
    how = {"seconds": args.seconds}
    setting = (
        f"digits, MLP {SIZES} with GELU, {TEACHING} steps of AdamW at 1e-3, decay 0.01; matrices 0 to 3 cut; "
        f"{STEPS} steps of {BATCH} images, AdamW without decay, rate falling linearly to 0; few: {FEW} images"
    )
    if "repair" in args.part:
        repair_arms(Runs(args.out, "repair", setting=setting, **how), args.tiny, args.only)
    if "controls" in args.part:
        control_arms(Runs(args.out, "repair", setting=setting, **how), args.tiny, args.only)
    if "tasks" in args.part:
        told = f"{setting}; then {TASK_STEPS} steps on {LABELS} labelled images, a new head, all parameters"
        repairs = Runs(args.out, "repair", setting=setting, **how).rows
        task_arms(Runs(args.out, "tasks", setting=told, **how), repairs, args.tiny, args.only)
    if "minilm" in args.part:
        told = (
            f"all-MiniLM-L6-v2, 36 matrices cut at c = 2; {TEXT_STEPS} steps of {TEXT_BATCH} verses of {WORDS} tokens, "
            "AdamW without decay, rate falling linearly to 0, no labels, no dropout; 96 verses to choose by, 192 others"
        )
        text_arms(Runs(args.out, "minilm", setting=told, packages=("transformers",), **how), args.tiny, args.only)


if __name__ == "__main__":
    main()
