"""What the chapter on ALLoRA is too short for: the method, its family and its rivals, and the three flaws of LoRA.

    python tests/benchmarks/bench_allora_small.py --out book/results/allora_small.json

adam, 200 steps and the like: each arm with seven rates (`FEWER`: five) and five seeds on the turned digits, by Adam or
SGD, in 200 or 50 steps. negative: the main arms on the negative digits.
map: final training loss over scale or c₀ and rate, at a constant rate: LoRA with scale s beside ALLoRA with c₀ = s²,
whose first steps of SGD are equal. Eight seeds; one factor a layer, made in two more ways, at two rates.
dropout: LoRA on 64 images with dropout on its inputs, up to 1,000 steps of Adam.
noise: the last layer alone under a squared error, where the expected loss under dropout is known: trained on it, and
on one or 16 masks a step. noise, falling: one dropout, one mask or none, while the rate falls to 0.
start: two factors that are not zero at the start beside LoRA, 10 to 200 steps.
depth: scales in networks of two and eight layers.

A row takes 0.1 to 1 s on a CPU core.
"""

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import ALLoRALinear, DoRALinear, LoRALinear, PiSSALinear, lora_plus_groups
from lowrank_ref.adapters.allora import adaptive_factor, update_row_norms
from lowrank_ref.adapters.allora_family import ALLoRAVariant, ASFLoRALinear
from lowrank_ref.adapters.allora_flaws import CompensatedLoRALinear, RankDropoutLoRALinear, rank_dropout_penalty
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.lab.beds import classification_loss, pretrained_on_digits, shifted_digits
from lowrank_ref.lab.data import Arrays, array_batches, digits
from lowrank_ref.lab.models import MLP
from lowrank_ref.lab.train import linear_decay, train

SEEDS, RANK = (0, 1, 2, 3, 4), 4
Make = Callable[..., nn.Module]


class Plan(NamedTuple):
    """How an arm adapts a linear layer, and how it trains."""

    make: Make
    rates: tuple[float, ...]
    clip: float | None = None
    ratio: float = 1.0  # of LoRA+


def doubling(middle: float, count: int = 7) -> tuple[float, ...]:
    """Return rates a factor of 2 apart around `middle`."""
    return tuple(middle * 2.0 ** (i - count // 2) for i in range(count))


def lora(scale: float, kind: Any = LoRALinear, **options: Any) -> Make:
    """Return what makes LoRA of rank 4 with this scale."""
    return partial(kind, rank=RANK, alpha=RANK * scale, **options)


class DroppedALLoRALinear(ALLoRALinear):
    """ALLoRA with dropout of 0.05 on its inputs: the paper's ALLoRA+D."""

    def as_one(self, x: Tensor) -> bool:
        """Return False: base and update read different inputs."""
        return False

    def update(self, x: Tensor) -> Tensor:
        """Return BA·dropout(x)."""
        return super().update(F.dropout(x, 0.05, self.training))


class LayerALLoRALinear(ALLoRALinear):
    """ALLoRA with one factor a layer: by the largest norm of its rows, or ("RMS") the root of their mean square."""

    def __init__(self, base: nn.Module, *, size: str, **options: Any) -> None:
        super().__init__(base, **options)
        self.size = size

    def gradient_factors(self, x: Tensor | None = None) -> Tensor:
        """Return c, the same m times."""
        norms = update_row_norms(self.A, self.B)
        size = norms.amax() if self.size == "least" else norms.square().mean().sqrt()
        return adaptive_factor(size, self.boost).expand(len(norms))


class LargerA(LoRALinear):
    """LoRA of scale 1 with A drawn √s times as large: what a scale of s is, but for the rate."""

    def __init__(self, base: nn.Module, *, scale: float, **options: Any) -> None:
        super().__init__(base, alpha=options["rank"], **options)
        self.A.data.mul_(math.sqrt(scale))


class OnlyB(LoRALinear):
    """LoRA whose A stays as it was drawn."""

    def __init__(self, base: nn.Module, **options: Any) -> None:
        super().__init__(base, **options)
        self.A.requires_grad_(False)


class ZeroA(LoRALinear):
    """LoRA that starts with A = 0 and a random B."""

    def initial_factors(self, W: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return A = 0 and a drawn B."""
        B, A = super().initial_factors(W.T, generator)
        return A.T.contiguous(), B.T.contiguous()


def allora(boost: float, kind: Any = ALLoRALinear, **options: Any) -> Make:
    """Return what makes ALLoRA of rank 4 with this c₀, or a relative."""
    return partial(kind, rank=RANK, boost=boost, **options)


# --- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(model: nn.Module, data: Arrays) -> dict[str, float]:
    """Losses in nats on all three splits, and the share of right test images; NaN where they overflow."""
    model.eval()
    found = {
        name: F.cross_entropy(model(getattr(data, f"x_{part}")), getattr(data, f"y_{part}")).item()
        for name, part in (("train loss", "train"), ("valid loss", "valid"), ("loss", "test"))
    }
    found["accuracy"] = (model(data.x_test).argmax(dim=1) == data.y_test).double().mean().item()
    model.train()
    return {name: round(value, 4) for name, value in found.items()}


def norms(model: nn.Module) -> dict[str, float]:
    """Norms over all adapters: of A, of what training added to it, and of B."""
    layers = [layer for _, layer in adapters(model)]
    pairs = {
        "norm A": [layer.A for layer in layers],
        "moved A": [layer.A - layer.A_at_start for layer in layers],
        "norm B": [layer.B for layer in layers],
    }
    return {k: round(torch.cat([t.detach().flatten() for t in v]).norm().item(), 4) for k, v in pairs.items()}


def optimizer_of(name: str, model: nn.Module, lr: float, ratio: float) -> torch.optim.Optimizer:
    """Return Adam, SGD, or SGD with momentum 0.9."""
    groups: Any = [p for p in model.parameters() if p.requires_grad]
    if ratio != 1:
        groups = lora_plus_groups(model, lr, ratio=ratio)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9 if name == "momentum" else 0.0)


def fine_tune(
    plan: Plan,
    optimizer: str,
    lr: float,
    seed: int,
    *,
    model: nn.Module,
    data: Arrays,
    looks: Sequence[int],
    decay: bool = False,
    batch: int = 64,
    watch: Callable[[nn.Module], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Train all layers; return what was measured after each number of steps in `looks`, as "loss 200"."""  # fmt: skip
    torch.manual_seed(seed)  # dropout draws from the global generator
    g = torch.Generator().manual_seed(seed)
    replace_linears(model, r"^layers\.", lambda linear: plan.make(linear, generator=g))
    for _, layer in adapters(model):
        layer.A_at_start = layer.A.detach().clone()
    steps, found, end = optimizer_of(optimizer, model, lr, plan.ratio), {}, max(looks)
    batches = array_batches(data.x_train, data.y_train, batch=batch, seed=seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = [group["lr"] for group in steps.param_groups]
    model.train()
    for i in range(end):
        for group, rate in zip(steps.param_groups, first):
            group["lr"] = rate * (1 - i / end if decay else 1.0)
        steps.zero_grad()
        value = classification_loss(model, *batches(i))
        if not math.isfinite(value.item()):
            return {**found, "error": f"diverged in step {i + 1}"}
        value.backward()
        if plan.clip is not None:
            nn.utils.clip_grad_norm_(trained, plan.clip)
        steps.step()
        if i + 1 in looks:
            numbers = measured(model, data) | (watch(model) if watch else {})
            if not math.isfinite(numbers["train loss"]):
                return {**found, "error": f"diverged in step {i + 1}"}
            found |= {f"{name} {i + 1}": value for name, value in numbers.items()}
    return {**found, "trainable": sum(p.numel() for p in trained)}


def ordinary(plan: Plan, optimizer: str, shift: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Adapt the digits network to a shift with a falling rate."""
    found = fine_tune(
        plan, optimizer, lr, seed, model=pretrained_on_digits(), data=shifted_digits(shift), looks=(steps,), decay=True
    )
    return {name.removesuffix(f" {steps}"): value for name, value in found.items()}


# --- tuned: the method, its family, its rivals -----------------------------------------------------------------------

#: Arm -> what it is, and the middle of its rates under Adam and under SGD.
ARMS: dict[str, tuple[dict[str, Any], float, float]] = {
    "LoRA s=1": ({"make": lora(1)}, 0.04, 0.2),
    "LoRA s=2": ({"make": lora(2)}, 0.04, 0.1),
    "LoRA s=4": ({"make": lora(4)}, 0.02, 0.05),
    "LoRA s=8": ({"make": lora(8)}, 0.01, 0.025),
    "LoRA s=2, dropout 0.05": ({"make": lora(2, dropout=0.05)}, 0.04, 0.1),
    "LoRA s=2, dropout 0.1": ({"make": lora(2, dropout=0.1)}, 0.04, 0.1),
    "LoRA s=2, clipped": ({"make": lora(2), "clip": 1.0}, 0.04, 0.4),
    "LoRA s=1, clipped": ({"make": lora(1), "clip": 1.0}, 0.08, 0.8),
    "LoRA+ s=2": ({"make": lora(2), "ratio": 16.0}, 0.01, 0.025),
    "DoRA s=2": ({"make": lora(2, DoRALinear)}, 0.04, 0.2),
    "ALLoRA c₀=1": ({"make": allora(1.0)}, 0.04, 0.2),
    "ALLoRA c₀=1.4": ({"make": allora(2**0.5)}, 0.04, 0.2),
    "ALLoRA c₀=2": ({"make": allora(2.0)}, 0.04, 0.2),
    "ALLoRA c₀=4": ({"make": allora(4.0)}, 0.04, 0.1),
    "ALLoRA c₀=16": ({"make": allora(16.0)}, 0.04, 0.05),
    "ALLoRA c₀=2, dropout 0.05": ({"make": allora(2.0, DroppedALLoRALinear)}, 0.04, 0.2),
    "ALLoRA c₀=2, clipped": ({"make": allora(2.0), "clip": 1.0}, 0.04, 0.8),
    "ALLoRA-OD c₀=2": ({"make": allora(2.0, ALLoRAVariant, factors="outputs")}, 0.04, 0.2),
    "ASF-LoRA c₀=2": ({"make": allora(2.0, ASFLoRALinear)}, 0.04, 0.2),
    "inverse c₀=2": ({"make": allora(2.0, ALLoRAVariant, factors="inverse")}, 0.04, 0.2),
    "layer mean c₀=2": ({"make": allora(2.0, ALLoRAVariant, factors="layer")}, 0.04, 0.2),
    "constant c₀=2": ({"make": allora(2.0, ALLoRAVariant, factors="constant")}, 0.04, 0.1),
    "input rescaled c₀=2": ({"make": allora(2.0, ALLoRAVariant, rescale_input=True)}, 0.04, 0.2),
}
#: Arms with fewer rates than seven.
FEWER = {"LoRA s=1, clipped": 5}
#: Arms on the negative digits, too.
MAIN = ("LoRA s=1", "LoRA s=2", "LoRA s=4", "DoRA s=2", "ALLoRA c₀=1", "ALLoRA c₀=2", "ALLoRA c₀=4")


def plan_of(name: str, optimizer: str, shift: str = "turned") -> Plan:
    """Return an arm with its rates for this optimizer; on the negative digits those of SGD are twice as high."""
    what, adam, sgd = ARMS[name]
    sgd *= 2 if shift == "negative" else 1
    return Plan(rates=doubling(adam if optimizer == "adam" else sgd, FEWER.get(name, 7)), **what)


# --- map: scale or c₀ against the rate --------------------------------------------------------------------------------

#: s of LoRA; ALLoRA's c₀ beside it is its square.
SCALES = (1.0, 2.0, 2.0**1.5, 4.0, 8.0)
#: Optimizer -> the rates, the seeds, the longest gradient.
MAPS = {
    "sgd": (doubling(0.1, 6), range(8), None),
    "sgd, clipped": (doubling(0.4, 6), range(4), 1.0),
    "adam": (doubling(0.02, 6), range(4), None),
}


def map_arms(optimizer: str) -> dict[str, Callable[[float], Make]]:
    """Return name -> what makes a layer at a scale."""
    both: dict[str, Callable[[float], Make]] = {"LoRA": lora, "ALLoRA": lambda s: allora(s * s)}
    if optimizer != "sgd":
        return both
    parts = {f"ALLoRA, {kind}": kind for kind in ("layer", "constant")}
    return both | {n: lambda s, k=k: allora(s * s, ALLoRAVariant, factors=k) for n, k in parts.items()}  # type: ignore[misc]


#: One factor a layer, made otherwise: name -> its size; at two rates only, and where LoRA may be lost.
LAYERS = {"ALLoRA, layer RMS": "RMS", "ALLoRA, layer least": "least"}


def mapped(make: Make, optimizer: str, lr: float, seed: int, looks: Sequence[int]) -> dict[str, Any]:
    """Train at a constant rate; keep training losses."""
    plan = Plan(make, (), clip=MAPS[optimizer][2])
    name = optimizer.split(",")[0]
    found = fine_tune(plan, name, lr, seed, model=pretrained_on_digits(), data=shifted_digits(), looks=looks)
    return {name: value for name, value in found.items() if name.startswith(("train loss", "error"))}


# --- flaw 1: dropout -------------------------------------------------------------------------------------------------

DROPOUTS, DROPOUT_RATES = (0.0, 0.05, 0.1, 0.3, 0.9), (0.005, 0.01, 0.02, 0.04)


def few_images(count: int) -> Arrays:
    """Return the turned digits with as many training images."""
    data = shifted_digits()
    return data.__class__(**{**vars(data), "x_train": data.x_train[:count], "y_train": data.y_train[:count]})


def dropped(dropout: float, lr: float, seed: int, looks: Sequence[int]) -> dict[str, Any]:
    """Fine-tune on 64 images with LoRA of rank 8 and scale 2, by Adam at a constant rate."""
    make = partial(LoRALinear, rank=8, alpha=16, dropout=dropout)
    model, data = pretrained_on_digits(), few_images(64)
    return fine_tune(Plan(make, ()), "adam", lr, seed, model=model, data=data, looks=looks, watch=norms)


@functools.cache
def features() -> tuple[Tensor, Tensor, Tensor, Tensor, nn.Linear]:
    """Return what the last layer reads and should give, for 512 training and 500 test images, and that layer.

    It has learned the upright digits by ridge regression.
    """
    model, data, upright = pretrained_on_digits(), shifted_digits(), digits()
    below = nn.Sequential(model.layers[0], nn.ReLU(), model.layers[1], nn.ReLU())
    with torch.no_grad():
        h, x_train, x_test = (below(x) for x in (upright.x_train, data.x_train[:512], data.x_test))
        last = nn.Linear(h.shape[1], 10, bias=False)
        gram = h.T @ h + 10 * torch.eye(h.shape[1])
        last.weight.copy_(torch.linalg.solve(gram, h.T @ F.one_hot(upright.y_train, 10).float()).T)
    y_train, y_test = (F.one_hot(y, 10).float() for y in (data.y_train[:512], data.y_test))
    return x_train, y_train, x_test, y_test, last


def noisy(
    masks: int, dropout: float, lr: float, seed: int, looks: Sequence[int], decay: bool = False
) -> dict[str, Any]:
    """Train the last layer's LoRA on a squared error: on so many masks a step, 0 for the expectation over all."""
    x_train, y_train, x_test, y_test, last = features()
    layer = LoRALinear(copy.deepcopy(last), 8, alpha=8, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    batches, found = array_batches(x_train, y_train, batch=64, seed=seed), {}
    steps = torch.optim.Adam([layer.A, layer.B], lr=lr)
    for i in range(max(looks)):
        x, y = batches(i)
        out, hidden = layer.base(x), F.linear(x, layer.A)
        if masks:
            kept = F.dropout(hidden.expand(masks, *hidden.shape), dropout)
            value = (out + F.linear(kept, layer.B) - y).square().sum(dim=-1).mean()
        else:
            plain = (out + F.linear(hidden, layer.B) - y).square().sum(dim=-1)
            value = (plain + rank_dropout_penalty(x, layer.A, layer.B, dropout)).mean()
        steps.param_groups[0]["lr"] = lr * (1 - i / max(looks) if decay else 1.0)
        steps.zero_grad()
        value.backward()
        steps.step()
        if i + 1 in looks:
            with torch.no_grad():
                found[f"loss {i + 1}"] = round((layer(x_test) - y_test).square().sum(dim=1).mean().item(), 5)
    return found


# --- flaw 2: B = 0 ---------------------------------------------------------------------------------------------------

#: Arm -> what it is, and the middle of its rates under Adam and under SGD; the scale is 1.
STARTS: dict[str, tuple[dict[str, Any], float, float]] = {
    "LoRA": ({"make": lora(1)}, 0.04, 0.2),
    "A = 0": ({"make": lora(1, ZeroA)}, 0.04, 0.2),
    "both drawn": ({"make": lora(1, CompensatedLoRALinear)}, 0.04, 0.2),
    "PiSSA": ({"make": lora(1, PiSSALinear)}, 0.02, 0.1),
    "B only": ({"make": lora(1, OnlyB)}, 0.16, 3.2),
    "LoRA+": ({"make": lora(1), "ratio": 16.0}, 0.01, 0.05),
    "dropout 0.1": ({"make": lora(1, RankDropoutLoRALinear, dropout=0.1)}, 0.04, 0.2),
    "ALLoRA c₀=4": ({"make": allora(4.0)}, 0.04, 0.1),
}


def started(plan: Plan, optimizer: str, lr: float, seed: int, looks: Sequence[int]) -> dict[str, Any]:
    """Train at a constant rate, and look early."""
    return fine_tune(plan, optimizer, lr, seed, model=pretrained_on_digits(), data=shifted_digits(), looks=looks)


# --- flaw 3: the scale -----------------------------------------------------------------------------------------------


@functools.cache
def deep_weights(depth: int) -> dict[str, Tensor]:
    """Return the weights of a network of so many layers that has learned upright digits."""
    data, model = digits(), MLP((64,) * depth + (10,), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    batch = array_batches(data.x_train, data.y_train, batch=128, seed=0)
    train(model, batch, classification_loss, optimizer, steps=600, schedule=linear_decay(600), progress=False)
    return model.state_dict()


DEPTHS = (2, 8)
#: Arm -> what makes it, and the middle of its rates under Adam for each depth.
DEEP: dict[str, tuple[Make, float, float]] = {
    "LoRA s=1": (lora(1), 0.08, 0.02),
    "LoRA s=4": (lora(4), 0.04, 0.01),
    "LoRA s=8": (lora(8), 0.02, 0.005),
    "A larger, s=8": (partial(LargerA, rank=RANK, scale=8.0), 0.08, 0.02),
    "ALLoRA c₀=16": (allora(16.0), 0.08, 0.02),
}


def deep(make: Make, depth: int, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Adapt a network of so many layers with a falling rate."""
    model = MLP((64,) * depth + (10,))
    model.load_state_dict(deep_weights(depth))
    found = fine_tune(Plan(make, ()), "adam", lr, seed, model=model, data=shifted_digits(), looks=(steps,), decay=True)
    return {name.removesuffix(f" {steps}"): value for name, value in found.items()}


# --- all rows --------------------------------------------------------------------------------------------------------

DATA = "MLP 64-128-128-10, pretrained on 1,000 upright digits; all three layers adapted, rank 4, batches of 64"
PARTS: dict[str, str] = {
    **{
        f"{name}, {steps} steps": f"{DATA}; the same digits turned; {name}, {steps} steps, the rate falls linearly to 0"
        for name in ("adam", "sgd")
        for steps in (200, 50)
    },
    "negative": f"{DATA}; the digits in negative; 200 steps, the rate falls linearly to 0",
    "map": f"{DATA}; the same digits turned; constant rate; training losses",
    "dropout": f"{DATA}, but rank 8, scale 2, 64 images turned; Adam, constant rate",
    "noise": "last layer of the same MLP alone, LoRA of rank 8, scale 1; squared error; 512 images; Adam, steady rate",
    "noise, falling": "as noise, but dropout 0.4 alone, and the rate falls linearly to 0",
    "start": f"{DATA}; the same digits turned; constant rate; scale 1",
    "depth": "MLPs of 2 and 8 layers of width 64, pretrained on upright digits, learn them turned; rank 4; 200 steps",
}
Row = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def rows(part: str, tiny: bool) -> Iterator[Row]:
    """Yield key and measurement of every row of a part."""
    seeds: Sequence[int] = SEEDS[:1] if tiny else SEEDS
    if part.endswith("steps") or part == "negative":
        shift, optimizers, length = "negative", ["adam", "sgd"], 200
        if part != "negative":
            shift, optimizers, length = "turned", [part.split(",")[0]], int(part.split()[1])
        for optimizer in optimizers:
            for name in MAIN if part == "negative" else ARMS:
                plan = plan_of(name, optimizer, shift)
                steps = 20 if tiny else length
                for seed in seeds:
                    for lr in plan.rates[:1] if tiny else plan.rates:
                        key = {"optimizer": optimizer, "steps": steps, "method": name, "lr": lr, "seed": seed}
                        yield key, partial(ordinary, plan, optimizer, shift, steps, lr, seed)
    if part == "map":
        looks = (10, 20) if tiny else (50, 200)
        for optimizer, (rates, many, _) in MAPS.items():
            for name, at in map_arms(optimizer).items():
                for scale in SCALES[:1] if tiny else SCALES:
                    for lr in rates[:1] if tiny else rates:
                        for seed in many[:1] if tiny else many:
                            key = {"optimizer": optimizer, "method": name, "scale": scale, "lr": lr, "seed": seed}
                            yield key, partial(mapped, at(scale), optimizer, lr, seed, looks)
        for name, size in LAYERS.items():
            for scale in SCALES[1:2] if tiny else SCALES[1:]:
                for lr in (0.1,) if tiny else (0.1, 0.2):
                    for seed in range(1 if tiny else 8):
                        make = allora(scale * scale, LayerALLoRALinear, size=size)
                        key = {"optimizer": "sgd", "method": name, "scale": scale, "lr": lr, "seed": seed}
                        yield key, partial(mapped, make, "sgd", lr, seed, looks)
    if part == "dropout":
        looks = (10, 20) if tiny else (20, 50, 200, 500, 1000)
        for p in DROPOUTS:
            for seed in seeds:
                for lr in DROPOUT_RATES[:1] if tiny else DROPOUT_RATES:
                    key = {"place": "inputs" if p else "-", "dropout": p, "lr": lr, "seed": seed}
                    yield key, partial(dropped, p, lr, seed, looks)
    if part == "noise":
        looks = (10, 20) if tiny else (10, 30, 100, 300, 1000, 3000)
        for masks in (0, 1, 16):
            for p in (0.05, 0.1, 0.2, 0.4):
                for seed in seeds if tiny else range(10):
                    key = {"masks": masks, "dropout": p, "lr": 0.01, "seed": seed}
                    yield key, partial(noisy, masks, p, 0.01, seed, looks)
    if part == "noise, falling":
        for end in (10,) if tiny else (300,):
            for masks in (0, 1):
                for seed in seeds if tiny else range(10):
                    key = {"masks": masks, "dropout": 0.4, "lr": 0.01, "steps": end, "seed": seed}
                    yield key, partial(noisy, masks, 0.4, 0.01, seed, (end,), True)
    if part == "start":
        looks = (10, 20) if tiny else (10, 20, 50, 200)
        for i, optimizer in enumerate(("adam", "sgd")):
            for name, (what, *middles) in STARTS.items():
                plan = Plan(rates=doubling(middles[i]), **what)
                for seed in seeds:
                    for lr in plan.rates[:1] if tiny else plan.rates:
                        key = {"optimizer": optimizer, "method": name, "lr": lr, "seed": seed}
                        yield key, partial(started, plan, optimizer, lr, seed, looks)
    if part == "depth":
        for i, depth in enumerate(DEPTHS):
            for name, (make, *middles) in DEEP.items():
                for seed in seeds:
                    for lr in doubling(middles[i])[:1] if tiny else doubling(middles[i]):
                        key = {"depth": depth, "method": name, "lr": lr, "seed": seed}
                        yield key, partial(deep, make, depth, lr, seed, 20 if tiny else 200)


def main() -> None:
    """Run the parts asked for; `--only` is matched with "part, optimizer, method"."""
    args = arguments(__doc__ or "", tuple(PARTS))
    torch.set_num_threads(1)
    for part in args.part:
        runs = Runs(args.out, part, setting=PARTS[part], seconds=args.seconds)
        for key, measure in rows(part, args.tiny):
            if re.search(args.only, f"{part}, {key.get('optimizer', '')}, {key.get('method', '')}"):
                runs.row(key, measure)


if __name__ == "__main__":
    main()
