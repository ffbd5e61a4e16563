"""What the chapter on IncreLoRA is too short for, on small networks (CPU, about an hour on one core).

    python tests/benchmarks/bench_increlora_small.py --out book/results/increlora_small.json --device cpu

planted: four layers whose updates have the ranks 0, 1, 1, 8, found with a total rank of 12.
digits: an MLP learns turned digits with a total rank of 9, three a layer on average.
race: how ranks and scores of one planted task develop, for other intervals, rates and choosers.
layer: bytes, time and peak memory of a training step of four 4096 x 4096 layers (best on a GPU).

Every arm has six rates and five seeds (on planted, a task each), Adam, the same batches, the same warm-up and linear
decay. AdaLoRA is PEFT's; without the package its rows are left out.
"""

import copy
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Runs, arguments, milliseconds, peak_mib, reset_peak
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.accounting import numel
from lowrank_ref.core.layers import AdaptedLinear, adapters, replace_linears
from lowrank_ref.lab.beds import classification_loss, planted_rank, pretrained_on_digits
from lowrank_ref.lab.data import array_batches, digits
from lowrank_ref.lab.train import train
from lowrank_ref.ranks import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, prune_by_svd
from lowrank_ref.ranks.growing_linear import IncreLoRALinear, grown_ranks
from lowrank_ref.ranks.growth_schedule import clock, growth_groups, growth_schedule
from lowrank_ref.ranks.increlora import RankGrowth, orthogonality, orthogonality_penalty

SEEDS = (0, 1, 2, 3, 4)
RATES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
#: Arms of IncreLoRA: name -> what differs from the package's defaults, and from the course of `grown`.
GROWING: dict[str, dict[str, Any]] = {
    "IncreLoRA": {},
    "random": {"chooser": "random"},
    "in turn": {"chooser": "in turn"},
    "norm of ΔW": {"chooser": "norm"},
    "gradient": {"chooser": "gradient"},
    "I alone": {"chooser": "importance"},
    "no orthogonality": {"weight": 0.0},
    "no advance": {"advance": False},
    "neither": {"weight": 0.0, "advance": False},
    "reserve redrawn": {"chooser": "redrawn"},
    "norm 1": {"std": None},
    "norm 1, no orthogonality": {"std": None, "weight": 0.0},
    "norm 1, no advance": {"std": None, "advance": False},
    "norm 1, neither": {"std": None, "weight": 0.0, "advance": False},
    "squared R": {"squared": True},
    "one clock": {"restart": False},
    "every 10": {"every": 0.25},
    "score by √(mn)": {"power": 0.5},
}


@dataclass(frozen=True)
class Bed:
    """A task: a network before the change, batches, a loss, a measure on validation and test data, and the budget."""

    model: nn.Module
    batch: Callable[[int], Any]
    loss: Callable[..., Tensor]
    measure: Callable[[nn.Module], dict[str, float]]
    layers: tuple[str, ...]
    budget: int
    steps: int
    every: int

    @property
    def warmup(self) -> int:
        """Steps to the full rate."""
        return max(1, round(0.06 * self.steps))

    @property
    def numbers(self) -> int:
        """What the same rank in all layers costs."""
        return self.budget // len(self.layers) * sum(sum(self.shape(path)) for path in self.layers)

    def shape(self, path: str) -> tuple[int, int]:
        """Shape (m, n) of a layer."""
        m, n = self.model.get_submodule(path).weight.shape  # type: ignore[union-attr, misc]
        return int(m), int(n)


@torch.no_grad()
def planted_measure(task: Any, model: nn.Module) -> dict[str, float]:
    """Logarithms to base 10 of the squared errors."""
    error = lambda x, y: math.log10(F.mse_loss(model(x), y).item())  # noqa: E731
    return {"valid": error(task.x_valid, task.y_valid), "loss": error(task.x_test, task.y_test)}


@torch.no_grad()
def digits_measure(data: Any, model: nn.Module) -> dict[str, float]:
    """Cross-entropies in nats, and accuracy."""
    valid, test = model(data.x_valid), model(data.x_test)
    return {
        "valid": F.cross_entropy(valid, data.y_valid).item(),
        "loss": F.cross_entropy(test, data.y_test).item(),
        "accuracy": (test.argmax(1) == data.y_test).double().mean().item(),
    }


def bed(part: str, seed: int, steps: int | None = None) -> Bed:
    """Make the task of a part."""
    if part == "digits":
        data, base = digits(rotate=90), pretrained_on_digits()
        batch = array_batches(data.x_train, data.y_train, batch=64, seed=seed)
        layers = tuple(name for name, m in base.named_modules() if isinstance(m, nn.Linear))
        measure = partial(digits_measure, data)
        return Bed(base, batch, classification_loss, measure, layers, 9, steps or 400, 20)
    task = planted_rank(seed)
    batch = array_batches(task.x_train, task.y_train, batch=128, seed=seed)
    loss = lambda model, x, y: F.mse_loss(model(x), y)  # noqa: E731
    layers = tuple(f"layers.{i}" for i in range(4))
    return Bed(task.base, batch, loss, partial(planted_measure, task), layers, 12, steps or 800, 40)


def fit(
    bed: Bed,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    actions: Sequence[Any] = (),
    penalty: Callable[[nn.Module], Tensor] | None = None,
    clocked: bool = False,
) -> None:
    """Train along the common schedule, or along the clocks among the actions."""
    steps = steps or bed.steps
    warmup = max(1, round(0.06 * steps))

    def loss(model: nn.Module, *rows: Tensor) -> Tensor:
        error = bed.loss(model, *rows)
        return error if penalty is None else error + penalty(model)

    schedule = None if clocked else lambda step: clock(step, warmup=warmup, total=steps)
    train(model, bed.batch, loss, optimizer, steps=steps, schedule=schedule, actions=actions, progress=False)


def fresh(bed: Bed) -> nn.Module:
    """A copy of the network in which everything could train."""
    return copy.deepcopy(bed.model).requires_grad_(True)


# IncreLoRA and its controls.


class Chosen(RankGrowth):
    """Rounds by another choice than I·U."""

    kind = "random"
    draw: torch.Generator

    def scores(self) -> Tensor:
        """What a round ranks by."""
        layers = list(self.layers.values())
        if self.kind == "random":
            return torch.rand(len(layers), generator=self.draw)
        if self.kind == "in turn":
            return torch.tensor([-float(len(times)) for times in self.births.values()])
        if self.kind == "norm":
            return torch.stack([layer.delta_weight().detach().norm() for layer in layers])
        if self.kind in ("importance", "gradient"):
            return self.importance
        return super().scores()

    def _end_or_watch(self) -> None:
        super()._end_or_watch()
        if self.kind == "gradient" and not self.finished:
            for layer in self.layers.values():
                layer.score = lambda delta, G: G.abs().mean()

    @torch.no_grad()
    def _round(self) -> None:
        before = {path: layer.grown for path, layer in self.layers.items()}
        super()._round()
        for path, layer in self.layers.items() if self.kind == "redrawn" else ():
            if layer.grown > before[path]:
                for p in (getattr(layer, f"{name}{layer.grown}") for name in "AB"):
                    p.copy_(0.02 * torch.randn(p.shape, generator=self.draw))
                    self.optimizer.state.pop(p, None)


class Traced(RankGrowth):
    """Keeps scores and ranks as they were every 20 steps."""

    def act(self) -> None:
        """Act, and note down."""
        super().act()
        if self.steps % 20 == 0:
            trace = vars(self).setdefault("trace", [])
            trace.append([float(f"{v:.3g}") for v in RankGrowth.scores(self).tolist()])


class TracedChosen(Traced, Chosen):
    """Both."""


def spread_out(model: nn.Module) -> None:
    """Make the vectors of all components about 1 long."""
    for _, layer in adapters(model):
        for name, p in layer.named_parameters(recurse=False):
            if name[0] in "AB":
                p.data *= 1 / (0.02 * (layer.in_features if name[0] == "A" else layer.out_features) ** 0.5)


def grown(
    bed: Bed,
    lr: float,
    seed: int,
    *,
    chooser: str | None = None,
    weight: float = 0.1,
    squared: bool = False,
    every: float = 1.0,
    restart: bool = True,
    std: float | None = 0.02,
    power: float = 1.0,
    traced: bool = False,
    **options: Any,
) -> tuple[nn.Module, RankGrowth]:
    """Train IncreLoRA."""
    generator = torch.Generator().manual_seed(seed)
    factory = partial(IncreLoRALinear, capacity=bed.budget, std=std or 0.02, generator=generator, **options)
    model = replace_linears(fresh(bed), list(bed.layers), factory)
    if std is None:
        spread_out(model)
    optimizer = torch.optim.Adam(growth_groups(model), lr=lr)
    kind = {(False, False): RankGrowth, (False, True): Traced, (True, False): Chosen, (True, True): TracedChosen}
    make: Any = kind[chooser is not None, traced]
    if chooser is not None:
        make = type(chooser, (make,), {"kind": chooser, "draw": torch.Generator().manual_seed(1000 + seed)})
    interval = max(1, round(bed.every * every))
    growth = make(model, optimizer, budget=bed.budget, every=interval, power=power)
    schedule = growth_schedule(optimizer, growth, steps=bed.steps, warmup=bed.warmup, restart=restart)
    actions = [growth, schedule]
    penalty = (lambda m: weight * orthogonality_penalty(m, squared=squared)) if weight else None
    fit(bed, model, optimizer, actions=actions, penalty=penalty, clocked=True)
    return model, growth


# The others.


def lora_on(model: nn.Module, bed: Bed, ranks: Sequence[int], seed: int) -> None:
    """Put LoRA of these ranks on the layers, s = 2; rank 0 leaves a layer frozen."""
    generator = torch.Generator().manual_seed(seed)
    rank_of = dict(zip(bed.layers, ranks))
    model.requires_grad_(False)
    for path, rank in rank_of.items():
        if rank:
            rank = min(rank, *bed.shape(path))
            replace_linears(model, [path], partial(LoRALinear, rank=rank, alpha=2.0 * rank, generator=generator))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What trains."""
    return [p for p in model.parameters() if p.requires_grad]


def lora(bed: Bed, lr: float, seed: int, ranks: Sequence[int], steps: int | None = None) -> nn.Module:
    """Train LoRA of these ranks."""
    model = fresh(bed)
    lora_on(model, bed, ranks, seed)
    fit(bed, model, torch.optim.Adam(trained(model), lr=lr), steps=steps)
    return model


def svd_form(bed: Bed, lr: float, seed: int, ranks: Sequence[int]) -> nn.Module:
    """Train s·BΛA of these fixed ranks, at least 1, with the orthogonality."""
    model, generator = fresh(bed), torch.Generator().manual_seed(seed)
    for path, rank in zip(bed.layers, ranks):
        factory = partial(IncreLoRALinear, rank=min(rank, *bed.shape(path)), capacity=rank, generator=generator)
        replace_linears(model, [path], factory)
    fit(bed, model, torch.optim.Adam(trained(model), lr=lr), penalty=lambda m: 0.1 * orthogonality_penalty(m))
    return model


def cut_then_finish(bed: Bed, lr: float, seed: int, share: float, budget: int) -> nn.Module:
    """Train LoRA r = 12 for a part of the steps, cut, and go on with the kept factors and a new optimizer."""
    model = lora(bed, lr, seed, [12] * len(bed.layers), steps=round(share * bed.steps))
    prune_by_svd(model, budget)
    fit(bed, model, torch.optim.Adam(trained(model), lr=lr), steps=bed.steps - round(share * bed.steps))
    return model


def sora(bed: Bed, lr: float, seed: int, penalty: float) -> nn.Module:
    """Train SoRA from rank 12; what is over the budget is cut by SVD."""
    generator, model = torch.Generator().manual_seed(seed), fresh(bed)
    for path in bed.layers:
        rank = min(12, *bed.shape(path))
        replace_linears(model, [path], partial(SoRALinear, rank=rank, alpha=2.0 * rank, generator=generator))
    optimizer = torch.optim.Adam(gate_groups(model), lr=lr)
    fit(bed, model, optimizer, actions=[ProximalGates(model, optimizer, penalty=penalty)])
    kept = sum(kept_ranks(model).values())
    prune(model)
    if any(True for _ in adapters(model)) and numbers(model) > bed.numbers:
        prune_by_svd(model, bed.numbers)
    model.kept = kept  # type: ignore[assignment]
    return model


class Matrices(nn.Module):
    """PEFT's AdaLoRA model, and its orthogonality, which PEFT adds to a model's own loss only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the model does."""
        return self.model(x)

    def penalty(self) -> Tensor:
        """Return 0.1·R."""
        layers = [m for m in self.modules() if hasattr(m, "lora_E")]
        parts = [orthogonality(m.lora_A["default"], m.lora_B["default"]) for m in layers]
        return 0.1 * torch.stack(parts).mean() / 2


class Masking:
    """PEFT's allocation after each step."""

    def __init__(self, model: Any):
        self.model, self.steps = model, 0

    def step(self) -> None:
        """Allocate; gradients are still there."""
        self.steps += 1
        self.model.base_model.update_and_allocate(self.steps)

    def state_dict(self) -> dict[str, int]:
        """How many steps were taken; the masks are the model's."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int], /) -> None:
        """Go on counting where a run stopped."""
        self.steps = state["steps"]


def adalora(bed: Bed, lr: float, seed: int, first: int) -> nn.Module:
    """Train PEFT's AdaLoRA from rank `first` to the budget, and return the plain network with its weights."""
    import peft

    torch.manual_seed(seed)
    config = peft.AdaLoraConfig(
        init_r=first,
        target_r=bed.budget // len(bed.layers),
        tinit=bed.steps // 10,
        tfinal=bed.steps // 2,
        deltaT=max(1, bed.steps // 80),
        total_step=bed.steps,
        lora_alpha=8 * first,
        lora_dropout=0.0,
        target_modules=list(bed.layers),
        orth_reg_weight=0.1,
    )
    inner: Any = peft.get_peft_model(fresh(bed), config)
    model = Matrices(inner)
    optimizer = torch.optim.Adam(trained(model), lr=lr)
    fit(bed, model, optimizer, actions=[Masking(inner)], penalty=lambda m: m.penalty())
    inner.base_model.update_and_allocate(bed.steps)
    return inner.merge_and_unload()


def numbers(model: nn.Module) -> int:
    """Numbers of all LoRA layers."""
    return sum(numel(layer.lora_factors()[:2]) for _, layer in adapters(model))  # type: ignore[operator]


@torch.no_grad()
def result(bed: Bed, model: nn.Module) -> dict[str, Any]:
    """Measure a trained network: errors, ranks by singular values over 1e-4, and numbers of its factors."""
    ranks = []
    for path in bed.layers:
        layer, base = model.get_submodule(path), bed.model.get_submodule(path)
        update = layer.delta_weight() if isinstance(layer, AdaptedLinear) else layer.weight - base.weight
        ranks.append(int((torch.linalg.svdvals(update.double()) > 1e-4).sum()))
    cost = sum(r * sum(bed.shape(path)) for r, path in zip(ranks, bed.layers))
    found = {key: round(value, 5) for key, value in bed.measure(model.eval()).items()}
    return {**found, "ranks": ranks, "rank": sum(ranks), "numbers": cost}


def run(part: str, name: str, lr: float, seed: int, steps: int | None) -> dict[str, Any]:
    """Train one arm and measure it."""
    task = bed(part, seed, steps)
    uniform = [task.budget // len(task.layers)] * len(task.layers)
    try:
        if name in GROWING:
            model, growth = grown(task, lr, seed, **GROWING[name])
            more = {"active": list(grown_ranks(model).values())}
            return result(task, model) | more
        if name.startswith("SoRA"):
            model = sora(task, lr, seed, float(name.partition("=")[2]))
            return result(task, model) | {"kept": int(model.kept)}  # type: ignore[arg-type]
        return result(task, baseline(task, name, lr, seed, uniform))
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        return {"error": type(error).__name__}


def baseline(task: Bed, name: str, lr: float, seed: int, uniform: list[int]) -> nn.Module:
    """Train an arm that does not grow."""
    if match := re.fullmatch(r"LoRA r=(\d+)", name):
        return lora(task, lr, seed, [int(match[1])] * len(task.layers))
    if name == "LoRA r=12, cut":
        return prune_by_svd(lora(task, lr, seed, [12] * len(task.layers)), task.numbers)
    if match := re.fullmatch(r"cut after ([\d.]+), finish", name):
        return cut_then_finish(task, lr, seed, float(match[1]), task.numbers)
    if match := re.fullmatch(r"AdaLoRA from (\d+)", name):
        return adalora(task, lr, seed, int(match[1]))
    if name == "SVD form, equal ranks":
        return svd_form(task, lr, seed, uniform)
    if name == "SVD form, IncreLoRA's ranks":
        return svd_form(task, lr, seed, FOUND)
    if name == "oracle":
        return lora(task, lr, seed, (0, 1, 1, 8))
    return lora(task, lr, seed, FOUND[::-1] if "reversed" in name else FOUND)


#: What IncreLoRA finds on each of the five planted tasks at its best rate.
FOUND = (1, 1, 1, 9)
#: Arms that do not grow.
BASELINES = (
    "LoRA r=3",
    "LoRA r=12, cut",
    "cut after 0.5, finish",
    "SoRA λ=0.4",
)
DIGITS = ("IncreLoRA", "random", "in turn", "score by √(mn)", *BASELINES)
PLANTED = (
    *(name for name in GROWING if name != "score by √(mn)"),
    *("oracle", *BASELINES, "SoRA λ=0.8", "AdaLoRA from 12", "SVD form, equal ranks"),
    "SVD form, IncreLoRA's ranks",
    *("LoRA, IncreLoRA's ranks", "LoRA, IncreLoRA's ranks reversed"),
)


def race(every: int, lr: float, chooser: str, steps: int | None) -> dict[str, Any]:
    """Follow one run on the planted task of seed 1."""
    task = bed("planted", 1, steps)
    kind = None if chooser == "score" else chooser
    model, growth = grown(task, lr, 1, chooser=kind, every=every / task.every, traced=True)
    births = {path: list(times) for path, times in growth.births.items()}
    return result(task, model) | {"births": births, "scores": vars(growth).get("trace", [])}


def layer_step(name: str, device: str, size: int) -> dict[str, Any]:
    """Train four wide layers one step, at the end of growth or in its middle."""
    reset_peak()
    with torch.device(device):
        base = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(4)])
    generator = torch.Generator().manual_seed(0)
    rank = int(name.rpartition("=")[2])
    if name.startswith("IncreLoRA"):
        model = replace_linears(base, "", partial(IncreLoRALinear, rank=rank, capacity=rank + 1, generator=generator))
        optimizer = torch.optim.Adam(growth_groups(model), lr=1e-3)
        growth = RankGrowth(model, optimizer, budget=4 * rank + 4, every=10**9)
        if "done" in name:
            for layer in growth.layers.values():
                layer.finish()
                layer.score = None
    else:
        model = replace_linears(base, "", partial(LoRALinear, rank=rank, generator=generator))
        optimizer = torch.optim.Adam(trained(model), lr=1e-3)
    x = torch.randn(2048, size, generator=torch.Generator().manual_seed(1)).to(device)

    def one() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        for layer in model:
            if isinstance(layer, IncreLoRALinear):
                layer.take_score()

    timing = milliseconds(one, repeats=20)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    stored = sum(p.nbytes for layer in model for p in layer.parameters(recurse=False))
    return {"state_bytes": state, "stored_bytes": stored, "peak_mib": round(peak_mib()), **timing}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("planted", "digits", "race", "layer"))
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    steps = 60 if args.tiny else None
    setting = {
        "planted": "planted ranks 0, 1, 1, 8 (d = 32, 1,024 rows, noise 0.05), total rank 12, 800 steps of 128 rows",
        "digits": "MLP 64-128-128-10, pretrained on 1,000 upright digits, turned by 90°, total rank 9, 400 steps",
        "race": "the planted task of seed 1, 800 steps; scores I·U every 20 steps",
        "layer": "four linear layers 4096 x 4096, float32, 2,048 rows, one step of Adam",
    }
    for part in args.part:
        runs = Runs(args.out, part, setting=setting[part], seconds=args.seconds)
        if part in ("planted", "digits"):
            for name in PLANTED if part == "planted" else DIGITS:
                if "AdaLoRA" in name and importlib.util.find_spec("peft") is None:
                    continue
                if re.search(args.only, name):
                    for lr in (0.02,) if args.tiny else RATES:
                        for seed in SEEDS[:1] if args.tiny else SEEDS:
                            measure = partial(run, part, name, lr, seed, steps)
                            runs.row({"method": name, "lr": lr, "seed": seed}, measure)
        if part == "race":
            for chooser in ("score", "random", "in turn"):
                for every in (10, 20, 40, 80):
                    for lr in (0.005, 0.01, 0.02, 0.04):
                        measure = partial(race, every, lr, chooser, steps)
                        if re.search(args.only, chooser):
                            runs.row({"method": chooser, "every": every, "lr": lr}, measure)
        if part == "layer":
            for name in ("LoRA r=2", "LoRA r=4", "IncreLoRA, scoring, r=2", "IncreLoRA, done, r=2"):
                if re.search(args.only, name):
                    measure = partial(layer_step, name, args.device, 64 if args.tiny else 4096)
                    runs.row({"method": name}, measure)


if __name__ == "__main__":
    main()
