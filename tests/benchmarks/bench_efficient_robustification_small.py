"""Efficient robustification against its rivals on MNIST digits of 14x14 pixels (CPU).

    python tests/benchmarks/bench_efficient_robustification_small.py --part tuning \
        --out book/results/efficient_robustification_small.json --device cpu

tuning: arms that tune the last block, the first, low-rank updates of all layers, or everything; with a
teacher and without. classes: the same on digits 0 to 4 only, to see what happens to digits 5 to 9. forgetting: the last
block once more on digits 0 to 4, measured under corruption too, and with a combined head that reads the old block.

Of each seed there is one large network (clean images), one small teacher (AugMix), one weak teacher (a tenth of its
epochs), and two epochs of augmented images; all arms share them. Every arm has three or four rates. Two more teachers
ask what of the teacher counts: one that learned clean images only, and one of four epochs. The loss of the combined
head on 800 images that were not trained on, clean and augmented, chooses the rate; 600 test images report, clean and
in twelve corruptions of two severities. No corruption is seen before.
"""

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds import corrupted_digits, residual_network, train_with_chains
from lowrank_ref.lab.data import digits
from lowrank_ref.robustness import (
    Heads,
    ThreeHeads,
    average_heads,
    certainty,
    chained,
    choose_head,
    interpolated,
    jensen_shannon,
    student_loss,
    surest_head,
    weighted_distillation,
)

WIDTH, BLOCKS, TEACHER, TEACHER_BLOCKS = 96, 4, 40, 2
LARGE_EPOCHS, TEACHER_EPOCHS, SHORT_EPOCHS, WEAK_EPOCHS, EPOCHS, BATCH = 6, 10, 4, 1, 2, 100
LIGHT = ("fog", "brightness", "contrast")


@dataclass(frozen=True)
class Arm:
    """What is tuned ("last", "first", "all", or a rank of LoRA), and what it learns from.

    `teacher`: None, "robust", "weak", "short", "clean" (learned clean images only), "self" (the large network) or
    "shuffled" (the robust one's answers, dealt to other images of the class).
    `omega`: None (ones), "entropy", or "dealt". `copies`: augmented copies that the teacher answers, the second without
    labels. `old`: the combined head reads the untouched block.
    """

    where: str | int = "last"
    teacher: str | None = "robust"
    omega: str | None = "entropy"
    kd_weight: float = 1.0
    label_weight: float = 1.0
    consistency: float = 0.0
    augment: bool = True
    copies: int = 1
    old: bool = False


KD = Arm()
AUG = Arm(teacher=None, omega=None)
ARMS: dict[str, Arm] = {
    "last, augmented": AUG,
    "last, taught": KD,
    "last, taught, ω = 1": replace(KD, omega=None),
    "last, taught, ω dealt": replace(KD, omega="dealt"),
    "last, taught, answers shuffled": replace(KD, teacher="shuffled"),
    "last, taught, weak teacher": replace(KD, teacher="weak"),
    "last, taught, clean teacher": replace(KD, teacher="clean"),
    "last, taught, teacher of 4 epochs": replace(KD, teacher="short"),
    "last, taught, two copies": replace(KD, copies=2),
    "last, taught, λ = 3": replace(KD, kd_weight=3.0),
    "last, taught, itself": replace(KD, teacher="self"),
    "last, consistent": replace(AUG, consistency=12.0),
    "first, taught": replace(KD, where="first"),
    "LoRA r=4, augmented": replace(AUG, where=4),
    "LoRA r=4, taught": replace(KD, where=4),
    "LoRA r=4, consistent": replace(AUG, where=4, consistency=12.0),
    "full, augmented": replace(AUG, where="all"),
    "full, taught": replace(KD, where="all"),
    "full, consistent": replace(AUG, where="all", consistency=12.0),
    "full, consistent, mixed": replace(AUG, where="all", consistency=12.0),
}
#: Arms of the part `classes`.
FIVE = ("last, taught", "LoRA r=4, taught", "full, augmented", "full, consistent")
#: Arms of the part `forgetting`.
FORGET = {"last, taught": KD, "last, taught, m on the old block": replace(KD, old=True)}
RATES = {
    "last": (1e-3, 3e-3, 1e-2, 3e-2),
    "LoRA": (3e-3, 1e-2, 3e-2),
    "first": (1e-3, 3e-3, 1e-2, 3e-2),
    "full": (3e-4, 1e-3, 3e-3),
}


@dataclass(frozen=True)
class Start:
    """What all arms of a seed share."""

    large: nn.Sequential
    teacher: nn.Sequential
    weak: nn.Sequential
    short: nn.Sequential
    plain: nn.Sequential
    rows: list[Tensor]  # rows of the training images, one tensor for each batch of all epochs
    views: tuple[Tensor, Tensor]  # two augmented copies (epochs, images, 1, 14, 14)
    answers: dict[str, Tensor]  # teacher's name -> logits at the first view (epochs, images, classes)
    omegas: dict[str, Tensor]  # (epochs, images)
    second: tuple[Tensor, Tensor]  # the robust teacher's answers and weights at the second view
    seconds: dict[str, float]


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


@lru_cache(maxsize=1)
def start(seed: int) -> Start:
    """Train the large network and the teachers, and draw the augmented images."""
    x, y = corrupted_digits().train
    clock = [time.process_time()]
    large = train_with_chains(residual_network(WIDTH, BLOCKS, seed=seed), x, y, epochs=LARGE_EPOCHS, seed=seed,
                              weight=None, lr=1e-3)  # fmt: skip
    clock.append(time.process_time())
    small = partial(residual_network, TEACHER, TEACHER_BLOCKS, dropout=0.1, seed=100 + seed)
    teacher = train_with_chains(small(), x, y, epochs=TEACHER_EPOCHS, seed=100 + seed)
    clock.append(time.process_time())
    weak = train_with_chains(small(), x, y, epochs=WEAK_EPOCHS, seed=100 + seed)
    short = train_with_chains(small(), x, y, epochs=SHORT_EPOCHS, seed=100 + seed)
    plain = train_with_chains(small(), x, y, epochs=TEACHER_EPOCHS, seed=100 + seed, weight=None)
    g = seeded(1000 + seed)
    views = tuple(torch.stack([chained(x, generator=g) for _ in range(EPOCHS)]) for _ in range(2))
    rows = [part for _ in range(EPOCHS) for part in torch.randperm(len(x), generator=g).split(BATCH)]
    answers: dict[str, Tensor] = {}
    with torch.no_grad():
        models = {"robust": teacher, "weak": weak, "short": short, "clean": plain, "self": large}
        for name, model in models.items():
            answers[name] = torch.stack([model(view) for view in views[0]])
        omegas = {name: certainty(z.flatten(0, 1).softmax(1)).view(EPOCHS, -1) for name, z in answers.items()}
        again = torch.stack([teacher(view) for view in views[1]])
    second = again, certainty(again.flatten(0, 1).softmax(1)).view(EPOCHS, -1)
    omegas["dealt"] = omegas["robust"][:, torch.randperm(len(x), generator=g)]
    order = torch.empty(len(x), dtype=torch.long)
    for k in range(10):
        of_class = torch.nonzero(y == k).flatten()
        order[of_class] = of_class[torch.randperm(len(of_class), generator=g)]
    answers["shuffled"] = answers["robust"][:, order]
    omegas["shuffled"] = omegas["robust"][:, order]
    seconds = {"large": round(clock[1] - clock[0], 1), "teacher": round(clock[2] - clock[1], 1)}
    return Start(large, teacher, weak, short, plain, rows, views, answers, omegas, second, seconds)


class CombinedOnOld(ThreeHeads):
    """Three heads of which the combined one reads the untouched block."""

    def new_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the unclean and of the combined head."""
        h = self.prefix(x)
        return self.unclean(self.tuned(h)), self.combined(self.original(h))


def student_of(arm: Arm, large: nn.Sequential, seed: int) -> ThreeHeads:
    """The large network with three heads; what the arm tunes requires gradients."""
    large = copy.deepcopy(large)
    first = {"last": 1 + BLOCKS, "first": 2}.get(str(arm.where), 1)
    student = (CombinedOnOld if arm.old else ThreeHeads)(large[:first], large[first:-1], large[-1])
    if isinstance(arm.where, int):
        layer = partial(LoRALinear, rank=arm.where, alpha=2.0 * arm.where, generator=seeded(seed))
        replace_linears(student, r"^tuned\.", layer, trainable=r"^(unclean|combined)\.")
    if arm.where == "first":
        student.tuned[1:].requires_grad_(False)
    return student


def fit(arm: Arm, lr: float, seed: int, *, only: int = 10) -> ThreeHeads:
    """Tune by Adam, its rate falling linearly to 0; on the digits below `only`."""
    shared, (x, y) = start(seed), corrupted_digits().train
    student = student_of(arm, shared.large, seed)
    with torch.no_grad():  # the prefix is frozen: once is enough
        clean = student.prefix(x)
        views = [torch.stack([student.prefix(v) for v in view]) for view in shared.views] if arm.augment else [None] * 2
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, fused=True)

    def heads(h: Tensor) -> tuple[Tensor, Tensor]:
        tuned = student.tuned(h)
        return student.unclean(tuned), student.combined(student.original(h) if arm.old else tuned)

    for step, rows in enumerate(shared.rows):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(shared.rows))
        epoch, rows = step * BATCH // len(x), rows[y[rows] < only]
        n = len(rows)
        batch = [clean[rows], *(clean[rows] if view is None else view[epoch][rows] for view in views)]
        u, m = heads(torch.cat(batch if arm.consistency or arm.copies == 2 else batch[:2]))
        teacher = omega = None
        if arm.teacher:
            teacher = shared.answers[arm.teacher][epoch][rows]
        if arm.omega:
            name = "dealt" if arm.omega == "dealt" else arm.teacher
            omega = shared.omegas[str(name)][epoch][rows]
        options = {"kd_weight": arm.kd_weight, "label_weight": arm.label_weight}
        loss = student_loss(u[n : 2 * n], m[n : 2 * n], m[:n], y[rows], teacher, omega, **options)
        if arm.copies == 2:
            z, weight = (t[epoch][rows] for t in shared.second)
            loss = loss + arm.kd_weight * sum(weighted_distillation(t[2 * n :], z, weight) for t in (u, m))
        if arm.consistency:
            loss = loss + arm.consistency * sum(jensen_shannon(z.split(n)) for z in (u, m))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError("loss: got no finite number, wanted one")
    return student.eval()


# --- measuring --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def held_out() -> dict[str, tuple[Tensor, Tensor]]:
    """Images to choose by, clean and augmented."""
    x, y = corrupted_digits().valid
    return {"clean": (x, y), "augmented": (chained(x, generator=seeded(77)), y)}


@lru_cache(maxsize=8)
def flattened(seed: int, first: int) -> tuple[Tensor, Tensor]:
    """Prefix outputs of the clean and corrupted test images (sets, images, ...), and the original's logits there."""
    data, model = corrupted_digits(), start(seed).large
    with torch.no_grad():
        x = torch.cat([data.test[0], *data.corrupted.values()])
        h = model[:first](x)
        return h, model[first:](h)


def groups() -> dict[str, Tensor]:
    """Name -> which of the test sets (the first is clean) it averages over."""
    names = [name for name, _ in corrupted_digits().corrupted]
    found = {"clean": [0], "corrupted": range(1, 1 + len(names))}
    found["without light"] = [1 + i for i, name in enumerate(names) if name not in LIGHT]
    return {name: torch.tensor(list(places)) for name, places in found.items()}


def choices(heads: Heads) -> dict[str, Tensor]:
    """Name -> logits of every way to choose."""
    ways = {"clean head": heads.clean, "unclean head": heads.unclean, "combined head": heads.combined}
    ways |= {"chosen": heads.pick(choose_head(heads)), "surest of 2": heads.pick(surest_head(heads))}
    ways |= {"surest of 3": heads.pick(surest_head(heads, count=3)), "average": average_heads(heads)}
    return ways


def shares(right: Tensor, name: str) -> dict[str, float]:
    """Accuracy in every group of test sets; right is (sets, images)."""
    return {f"{name}, {group}": float(right[places].mean()) for group, places in groups().items()}


@torch.no_grad()
def on_valid(student: ThreeHeads, classes: int = 10) -> float:
    """Loss of the combined head on held-out images of the first classes, clean and augmented."""
    pairs = ((x[y < classes], y[y < classes]) for x, y in held_out().values())
    return sum(F.cross_entropy(student.new_heads(x)[1], y).item() for x, y in pairs) / 2


@torch.no_grad()
def measure(student: ThreeHeads, seed: int) -> dict[str, Any]:
    """Accuracies of all heads and choices, and the mean of each corruption for the combined head."""
    data = corrupted_digits()
    y = data.test[1].repeat(1 + len(data.corrupted))
    first = len(student.prefix)
    h, clean = flattened(seed, first)
    tuned = student.tuned(h)
    heads = Heads(clean, student.unclean(tuned), student.combined(tuned))
    found = {"valid": on_valid(student)}
    right = {n: (z.argmax(1) == y).double().view(-1, 600) for n, z in choices(heads).items()}
    either = torch.maximum(right["clean head"], right["unclean head"])
    right |= {"oracle": either, "random": (right["clean head"] + right["unclean head"]) / 2}
    for name, value in right.items():
        found |= shares(value, name)
    index = choose_head(heads).view(-1, 600)
    found |= {"share of unclean, clean": float((index[0] == 1).double().mean())}
    found |= {"share of unclean, corrupted": float((index[1:] == 1).double().mean())}
    each = right["combined head"][1:].mean(1).view(-1, 2).mean(1)
    found |= {f"combined head, {name}": float(v) for name, v in zip(dict.fromkeys(k[0] for k in data.corrupted), each)}
    same = (heads.clean.argmax(1) == heads.combined.argmax(1)).double().view(-1, 600)
    found |= {"agreement, clean": float(same[0].mean())}
    return {name: round(value, 5) for name, value in found.items()}


def ridge(f: Tensor, target: Tensor, g: Tensor, penalty: float = 1.0) -> Tensor:
    """Predictions at features g of a ridge regression of the target on standardised features f."""
    mean, sd = f.mean(0), f.std(0).clamp_min(1e-6)
    f, g = (torch.cat([(t - mean) / sd, torch.ones(len(t), 1)], 1).double() for t in (f, g))
    eye = penalty * torch.eye(f.shape[1], dtype=torch.float64)
    return g @ torch.linalg.solve(f.T @ f + eye, f.T @ target.double())


def slant(x: Tensor) -> Tensor:
    """How far strokes lean: covariance of row and column over the variance of the row, weighted by ink."""
    p = x.flatten(2).squeeze(1) / x.sum((1, 2, 3), keepdim=True).flatten(1)
    rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij"))
    r, c = (t - (p * t).sum(1, keepdim=True) for t in (rows, columns))
    return (p * r * c).sum(1) / (p * r * r).sum(1)


@torch.no_grad()
def transfer(features: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """What linear probes read off features: the digits of another source, and the slant of these."""
    other, data = digits(), corrupted_digits()

    def enlarge(x: Tensor) -> Tensor:
        return F.interpolate((x + 0.3).view(-1, 1, 8, 8), size=(14, 14), mode="bilinear").clamp(0, 1)

    f, g = features(enlarge(other.x_train)), features(enlarge(other.x_test))
    right = (ridge(f, F.one_hot(other.y_train, 10), g).argmax(1) == other.y_test).double().mean()
    (x, _), (u, _) = data.train, data.test
    wanted = slant(u)
    error = ridge(features(x[:1000]), slant(x[:1000])[:, None], features(u)).flatten() - wanted
    r2 = 1 - error.square().mean() / (wanted - wanted.mean()).square().mean()
    return {"probe of other digits": round(float(right), 5), "probe of slant": round(float(r2), 5)}


def between(student: ThreeHeads, seed: int) -> dict[str, float]:
    """WiSE-FT: the combined head on weights between the original and the tuned ones."""
    ends = [nn.Sequential(student.original, student.clean), nn.Sequential(student.tuned, student.combined)]
    found = {}
    for share in (0.25, 0.5, 0.75):
        part = interpolated(*ends, share)
        found |= alone(nn.Sequential(student.prefix, part), f"WiSE-FT {share:g}", seed)
    return found


@torch.no_grad()
def alone(model: nn.Module, name: str, seed: int) -> dict[str, float]:
    """Loss on held-out images and accuracies of a model with one head."""
    data = corrupted_digits()
    y, x = data.test[1], torch.stack([data.test[0], *data.corrupted.values()])
    right = (model(x.flatten(0, 1)).argmax(1).view(-1, 600) == y).double()
    loss = sum(F.cross_entropy(model(u), v).item() for u, v in held_out().values()) / 2
    return {f"{name}, valid": round(loss, 5)} | {k: round(v, 5) for k, v in shares(right, name).items()}


@torch.no_grad()
def low_rank(student: ThreeHeads, seed: int) -> dict[str, float]:
    """The tuned layers with their update cut to rank r, and the share of its energy that this keeps."""
    found = {}
    for rank in (1, 4, 16):
        cut, kept = copy.deepcopy(student), []
        layers = dict(cut.original.named_modules())
        for path, layer in cut.tuned.named_modules():
            if isinstance(layer, nn.Linear):
                W = layers[path].weight
                U, S, Vh = torch.linalg.svd(layer.weight - W, full_matrices=False)
                kept.append(float(S[:rank].square().sum() / S.square().sum()))
                layer.weight.copy_(W + (U[:, :rank] * S[:rank]) @ Vh[:rank])
        found |= alone(nn.Sequential(cut.prefix, cut.tuned, cut.combined), f"rank {rank}", seed)
        found[f"rank {rank}, energy"] = round(sum(kept) / len(kept), 5)
    return found


def run(name: str, lr: float, seed: int) -> dict[str, Any]:
    """One row."""
    arm = ARMS[name]
    student = fit(arm, lr, seed)
    found = {"trainable": sum(p.numel() for p in student.parameters() if p.requires_grad)}
    found |= measure(student, seed) | transfer(lambda x: student.tuned(student.prefix(x)))
    if name.startswith("full") and "consistent" not in name:
        found |= between(student, seed) if name == "full, augmented" else low_rank(student, seed)
    if name.endswith("mixed"):
        found |= between(student, seed)
    return found


def run_classes(name: str, lr: float, seed: int) -> dict[str, Any]:
    """Tune on digits 0 to 4; look at 5 to 9."""
    return {key: round(value, 5) for key, value in on_classes(fit(ARMS[name], lr, seed, only=5)).items()}


@torch.no_grad()
def on_classes(student: ThreeHeads) -> dict[str, float]:
    """Accuracy of every head and choice on the digits that were seen and on the others."""
    data = corrupted_digits()
    found = {"valid": on_valid(student, 5)}
    x, y = data.test
    heads = student(x)
    ways = choices(heads) | {"old head on tuned layers": student.clean(student.tuned(student.prefix(x)))}
    for way, z in ways.items():
        right = (z.argmax(1) == y).double()
        found |= {f"{way}, seen": float(right[y < 5].mean()), f"{way}, unseen": float(right[y >= 5].mean())}
    return found | transfer(lambda x: student.tuned(student.prefix(x)))


def run_forgetting(name: str, lr: float, seed: int) -> dict[str, Any]:
    """Tune on digits 0 to 4; look at all digits, clean and corrupted, whoever answers."""
    return {key: round(value, 5) for key, value in on_all(fit(FORGET[name], lr, seed, only=5), seed).items()}


@torch.no_grad()
def on_all(student: ThreeHeads, seed: int) -> dict[str, float]:
    """Accuracy of every choice on clean and corrupted test images: all digits, 0 to 4, 5 to 9."""
    data = corrupted_digits()
    y = data.test[1]
    h, clean = flattened(seed, len(student.prefix))
    tuned = student.tuned(h)
    below = student.original(h) if isinstance(student, CombinedOnOld) else tuned
    heads = Heads(clean, student.unclean(tuned), student.combined(below))
    ways = choices(heads) | {"average of 2": clean.softmax(1) + heads.unclean.softmax(1)}
    found = {"valid": on_valid(student, 5)}
    for way, z in ways.items():
        right = (z.argmax(1).view(-1, len(y)) == y).double()
        for group, part in {"clean": right[:1], "corrupted": right[1:]}.items():
            for digits_, rows in {"all": y >= 0, "seen": y < 5, "unseen": y >= 5}.items():
                found[f"{way}, {group}, {digits_}"] = float(part[:, rows].mean())
    index = choose_head(heads).view(-1, len(y)).double()
    return found | {"share of unclean, clean": float(index[0].mean()),
                    "share of unclean, corrupted": float(index[1:].mean())}  # fmt: skip


def more_teachers(seed: int) -> dict[str, Any]:
    """The other teachers as they are, and the average of the original and the short one."""
    shared, data = start(seed), corrupted_digits()
    found = alone(shared.short, "teacher of 4 epochs", seed) | alone(shared.plain, "clean teacher", seed)
    x = torch.cat([data.test[0], *data.corrupted.values()])
    with torch.no_grad():
        z = shared.large(x).softmax(1) + shared.short(x).softmax(1)
    right = (z.argmax(1).view(-1, 600) == data.test[1]).double()
    name = "average of original and teacher of 4 epochs"
    return found | {key: round(value, 5) for key, value in shares(right, name).items()}


@torch.no_grad()
def pair(shared: Start) -> dict[str, float]:
    """The large network beside the teacher, nothing tuned: the surer of the two, and their average."""
    data = corrupted_digits()
    y, x = data.test[1], torch.cat([data.test[0], *data.corrupted.values()])
    one, two = shared.large(x), shared.teacher(x)
    ways = {"surer of original and teacher": torch.stack([one, two])[surest_head((one, two)), torch.arange(len(x))]}
    ways["average of original and teacher"] = one.softmax(1) + two.softmax(1)
    found: dict[str, float] = {}
    for name, z in ways.items():
        found |= shares((z.argmax(1).view(-1, 600) == y).double(), name)
    return {name: round(value, 5) for name, value in found.items()}


def untouched(seed: int) -> dict[str, Any]:
    """The original and the teachers, as they are; the threads' seconds of their training."""
    shared = start(seed)
    found = alone(shared.large, "original", seed) | alone(shared.teacher, "teacher", seed)
    found |= transfer(shared.large[:-1])
    found |= {f"{key} of the teacher": v for key, v in transfer(shared.teacher[:-1]).items()}
    found |= alone(shared.weak, "weak teacher", seed) | pair(shared)
    weak = shared.answers["weak"][0].argmax(1), shared.answers["robust"][0].argmax(1)
    y = corrupted_digits().train[1]
    told = {
        f"{k}, augmented training images": float((z == y).double().mean()) for k, z in zip(("weak", "robust"), weak)
    }
    return found | told | {f"seconds, {k}": v for k, v in shared.seconds.items()}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("tuning", "classes", "forgetting"))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    setting = (
        "3,200 digits of 14x14 train, 800 choose, 600 test, clean and in 12 corruptions of 2 severities; residual "
        f"networks of width {WIDTH} with {BLOCKS} blocks ({LARGE_EPOCHS} clean epochs) and {TEACHER} with "
        f"{TEACHER_BLOCKS} ({TEACHER_EPOCHS} epochs of AugMix); {EPOCHS} epochs of Adam on {BATCH} images a student"
    )
    seeds = range(1 if args.tiny else 5)
    for seed in seeds:  # seeds outside: what they share is made once
        for part in args.part:
            options = {"setting": setting, "packages": ("scikit-learn", "mlxtend"), "seconds": args.seconds}
            runs = Runs(args.out, part, **options)
            if part == "tuning":
                runs.row({"method": "untouched", "lr": 0.0, "seed": seed}, partial(untouched, seed))
                runs.row({"method": "more teachers", "lr": 0.0, "seed": seed}, partial(more_teachers, seed))
            for name in {"tuning": ARMS, "classes": FIVE, "forgetting": FORGET}[part]:
                rates = RATES[re.split(r"[ ,]", name)[0]]
                for lr in rates[:1] if args.tiny else rates:
                    if re.search(args.only, name):
                        measured = {"tuning": run, "classes": run_classes, "forgetting": run_forgetting}[part]
                        runs.row({"method": name, "lr": lr, "seed": seed}, partial(measured, name, lr, seed))


if __name__ == "__main__":
    main()
