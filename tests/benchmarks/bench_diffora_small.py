"""Which modules get an adapter: DiffoRA's search against cheaper choices, at equal numbers and equal total steps (CPU).

    python tests/benchmarks/bench_diffora_small.py --out book/results/diffora_small.json --device cpu

search, noisy: how many of the three planted modules of six each way to choose finds, at five rates.
search_again, noisy_again: three of these ways with seeds that no choice of a rate has seen.
planted, unequal: test error after training with the choice; in "unequal" all layers but one need something.
transformer: a vision transformer of four blocks, 28 modules, from upright digits to digits turned by 90 degrees.

AdaLoRA is PEFT's; without the package its rows are left out.
"""

import copy
import functools
import importlib.util
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bench_increlora_small import Masking, Matrices
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.adapters.gradient_start import gradient_sums
from lowrank_ref.core.accounting import numel
from lowrank_ref.core.groups import optimizer_groups
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.lab.beds import classification_loss, planted_rank
from lowrank_ref.lab.data import array_batches, digits
from lowrank_ref.lab.models import ViT
from lowrank_ref.lab.train import train
from lowrank_ref.ranks import (
    DiffoRALinear,
    ModuleSearch,
    ProximalGates,
    SoRALinear,
    couple_logits,
    keep_modules,
    module_logits,
    prune,
    prune_by_svd,
    top_modules,
    update_norms,
)
from lowrank_ref.ranks.diffora import search_layers

#: s of every adapter, whatever its rank.
SCALE = 2.0
#: Learning rate of θ where an arm's name tells no other one; the package's default is 0.1.
LOGIT_LR = 0.02
WARMUP = 20
SEEDS = (0, 1, 2, 3, 4)
NEW_SEEDS = (5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Bed:
    """A pretrained network, a task for it, and what all arms share."""

    base: nn.Module
    pattern: str
    data: tuple[Tensor, ...]  # x, y to train on, to validate, to test
    loss: Callable[..., Tensor]
    batch: int
    rank: int  # of LoRA everywhere: the budget
    high: int  # of the search, and of what is cut
    steps: int  # in all
    search: int  # of them, before a choice is made
    planted: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        """Return a copy of the pretrained network."""
        return copy.deepcopy(self.base)

    @functools.cached_property
    def costs(self) -> dict[str, int]:
        """Path -> numbers that one rank of a module costs."""
        found = replace_linears(self.model(), self.pattern, partial(LoRALinear, rank=1))
        return {path: layer.in_features + layer.out_features for path, layer in adapters(found)}

    @property
    def budget(self) -> int:
        """Numbers of LoRA everywhere."""
        return self.rank * sum(self.costs.values())

    def rank_of(self, chosen: Sequence[str]) -> dict[str, int]:
        """Spend the budget on some modules: one rank for all, then one more for each as long as it fits."""
        rank = self.budget // sum(self.costs[path] for path in chosen)
        most = {path: min(self.base.get_submodule(path).weight.shape) for path in chosen}
        ranks = {path: min(rank, most[path]) for path in chosen}
        for path in chosen:
            spent = sum(self.costs[p] * r for p, r in ranks.items())
            ranks[path] += ranks[path] < most[path] and spent + self.costs[path] <= self.budget
        return ranks


def planted_bed(seed: int, *, ranks: tuple[int, ...] = (0, 0, 0, 4, 4, 4), tiny: bool, **options: Any) -> Bed:
    """Six layers; the seed draws the task and the order of the planted ranks."""
    mixed = list(ranks)
    random.Random(seed).shuffle(mixed)
    task = planted_rank(seed, ranks=tuple(mixed), **options)
    data = task.x_train, task.y_train, task.x_valid, task.y_valid, task.x_test, task.y_test
    planted = tuple(f"layers.{i}" for i, r in enumerate(mixed) if r >= 4)
    steps = (12, 6) if tiny else (1200, 400)
    return Bed(task.base, r"^layers\.", data, squared, min(128, len(data[0])), 2, 4, *steps, planted)


class Pictures(nn.Module):
    """A small vision transformer that takes digits as rows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.vit = ViT(8, 2, dim=32, layers=4, heads=4, classes=10, channels=1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of rows (batch, 64)."""
        return self.vit(x.view(-1, 1, 8, 8))


@functools.cache
def vit_bed(*, tiny: bool) -> Bed:
    """The transformer, trained on upright digits, and digits turned by 90 degrees."""
    up, d, model = digits(), digits(rotate=90), Pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    batches = array_batches(up.x_train, up.y_train, batch=128, seed=0)
    steps = 3 if tiny else 300
    schedule = partial(rising_then_falling, steps=steps)
    train(model, batches, classification_loss, optimizer, steps=steps, schedule=schedule, progress=False)
    data = d.x_train, d.y_train, d.x_valid, d.y_valid, d.x_test, d.y_test
    steps = (12, 6) if tiny else (240, 80)
    return Bed(model.requires_grad_(False), r"blocks", data, classification_loss, 32, 2, 8, *steps)


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(x), y)


def rising_then_falling(step: int, steps: int) -> float:
    """Rise over 6 % of the steps, then fall to 0."""
    warm = max(1, round(0.06 * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def fit(
    bed: Bed,
    model: nn.Module,
    lr: float,
    seed: int,
    steps: int,
    *,
    rows: Tensor | None = None,
    actions: Callable[[torch.optim.Optimizer], list[Any]] | None = None,
    logit_lr: float | None = None,
) -> nn.Module:
    """Train what requires gradients, with Adam."""
    x, y = (t if rows is None else t[rows] for t in bed.data[:2])
    optimizer = torch.optim.Adam(optimizer_groups(model, lr))
    if logit_lr is not None:  # one level: θ beside A and B, at a rate of its own
        optimizer.param_groups[-1]["lr"] = logit_lr
    batches = array_batches(x, y, batch=min(bed.batch, len(x)), seed=seed)
    acting = actions(optimizer) if actions else []
    schedule = partial(rising_then_falling, steps=steps)
    train(model, batches, bed.loss, optimizer, steps=steps, schedule=schedule, actions=acting, progress=False)
    return model


def lora(
    bed: Bed,
    generator: torch.Generator,
    rank: int,
    kind: type = LoRALinear,
    *,
    scale: float = SCALE,
    **options: Any,
) -> nn.Module:
    """Return the network with an adapter on every module, all with the same s."""

    def make(base: nn.Linear) -> nn.Module:
        r = min(rank, *base.weight.shape)
        return kind(base, r, alpha=scale * r, generator=generator, **options)

    return replace_linears(bed.model(), bed.pattern, make)


def searched(bed: Bed, lr: float, seed: int, steps: int, how: str = "") -> tuple[nn.Module, ModuleSearch | None]:
    """Search; half of the training rows for A and B, the other half for θ, but for what `how` says."""
    generator = torch.Generator().manual_seed(seed)
    model = lora(bed, generator, bed.high, DiffoRALinear, scale=1.0 if "s = 1" in how else SCALE)
    logit_lr = told_number(r"θ at ([\d.]+)", how, LOGIT_LR)
    order = torch.randperm(len(bed.data[0]), generator=generator)
    one, two = order.chunk(2)
    if "softmax" in how:
        couple_logits(model)
    if "one level" in how:
        return fit(bed, model, lr, seed, steps, rows=one, logit_lr=logit_lr), None
    x, y = (t[one if "one split" in how else two] for t in bed.data[:2])
    if "shuffled" in how:
        y = y[torch.randperm(len(y), generator=generator)]
    batches = array_batches(x, y, batch=min(bed.batch, len(x)), seed=seed + 1000)
    search = ModuleSearch(model, bed.loss, batches, lr=logit_lr, warmup=0 if "no warm-up" in how else WARMUP)
    return fit(bed, model, lr, seed, steps, rows=one, actions=lambda _: [search]), search


def told_number(pattern: str, name: str, default: float) -> float:
    """Return the number in an arm's name, or the default."""
    return float(match[1]) if (match := re.search(pattern, name)) else default


def adalora(bed: Bed, lr: float, seed: int) -> tuple[nn.Module, int]:
    """Train PEFT's AdaLoRA from rank `high` to the budget; return the plain network, and the numbers that it keeps."""
    import peft

    torch.manual_seed(seed)
    config = peft.AdaLoraConfig(
        init_r=bed.high,
        target_r=bed.rank,
        tinit=bed.steps // 10,
        tfinal=bed.steps // 2,
        deltaT=max(1, bed.steps // 80),
        total_step=bed.steps,
        lora_alpha=int(SCALE * bed.high),
        lora_dropout=0.0,
        target_modules=list(bed.costs),
        orth_reg_weight=0.1,
    )
    inner: Any = peft.get_peft_model(bed.model(), config)
    judged = replace(bed, loss=lambda model, x, y: bed.loss(model, x, y) + model.penalty())
    model = fit(judged, Matrices(inner), lr, seed, bed.steps, actions=lambda _: [Masking(inner)])
    inner.base_model.update_and_allocate(bed.steps)
    kept = {
        path: int(model.model.get_submodule(f"base_model.model.{path}").lora_E["default"].count_nonzero())
        for path in bed.costs
    }
    return inner.merge_and_unload(), sum(rank * bed.costs[path] for path, rank in kept.items())


def chosen_by(scores: dict[str, float], count: int, bed: Bed) -> tuple[str, ...]:
    """Take the modules with the largest scores."""
    return top_modules(scores, min(count, len(bed.costs)))


def gradient_scores(bed: Bed) -> dict[str, float]:
    """Norm of the loss's gradient with respect to each weight, over all training rows, before any training."""
    model = bed.model()
    layers = {path: model.get_submodule(path) for path in bed.costs}
    found = gradient_sums(model, layers, bed.loss, [bed.data[:2]])
    return {path: float(G.norm()) for path, G in found.items()}


@torch.no_grad()
def measured(bed: Bed, model: nn.Module) -> dict[str, Any]:
    """Loss of validation rows, by which rates are chosen, and of test rows; of the planted beds its log10."""
    x, y = bed.data[4:]
    valid, loss = bed.loss(model, *bed.data[2:4]).item(), bed.loss(model, x, y).item()
    if bed.loss is squared:
        return {"valid": round(math.log10(valid), 4), "loss": round(math.log10(loss), 4)}
    right = (model(x).argmax(dim=1) == y).double().mean().item()
    return {"valid": round(valid, 5), "loss": round(loss, 5), "accuracy": round(right, 4)}


def found(bed: Bed, chosen: Sequence[str]) -> dict[str, Any]:
    """Which modules were chosen, by number, and how many of them are planted."""
    numbers = {"kept": [list(bed.costs).index(path) for path in chosen]}
    return numbers | ({"found": len(set(chosen) & set(bed.planted))} if bed.planted else {})


def run(bed: Bed, name: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one arm; its numbers, or that it diverged."""
    try:
        model, told = trained(bed, name, lr, seed)
        count = numel({id(p): p for _, a in adapters(model) for p in a.adapter_parameters().values()}.values())
        return {**measured(bed, model), "trainable": count, **told}
    except FloatingPointError:
        return {"error": "diverged"}


def trained(bed: Bed, name: str, lr: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Train one arm as its name says."""
    generator, steps = torch.Generator().manual_seed(seed), bed.steps
    K = int(match[1]) if (match := re.search(r"K=(\d+)", name)) else 0
    told: dict[str, Any] = {}
    if name.startswith("uniform"):
        rank = int(re.search(r"r=(\d+)", name)[1])  # type: ignore[index]
        rest = steps - bed.search if "fewer steps" in name else steps
        return fit(bed, lora(bed, generator, rank), lr, seed, rest), told
    if name == "AdaLoRA":
        model, told["trainable"] = adalora(bed, lr, seed)
        return model, told
    if name.startswith("SVD"):
        finish = "finished" in name
        model = fit(bed, lora(bed, generator, bed.high), lr, seed, bed.search if finish else steps)
        prune_by_svd(model, bed.budget)
        return (fit(bed, model, lr, seed + 500, steps - bed.search) if finish else model), told
    if name.startswith("SoRA"):
        model = lora(bed, generator, bed.high, SoRALinear, gate="ones")
        penalty = float(re.search(r"λ=([\d.]+)", name)[1])  # type: ignore[index]
        fit(bed, model, lr, seed, steps, actions=lambda optimizer: [ProximalGates(model, optimizer, penalty=penalty)])
        told["gates"] = sum(int(layer.g.count_nonzero()) for _, layer in adapters(model))
        prune(model)
        return (prune_by_svd(model, bed.budget) if list(adapters(model)) else model), told
    share = "none"
    if name.startswith("DiffoRA"):
        model, _ = searched(bed, told_number(r"search at ([\d.]+)", name, lr), seed, bed.search, name)
        scores = update_norms(model) if "by norm" in name else module_logits(model)
        if "smallest" in name or "other way" in name:
            scores = {path: -value for path, value in scores.items()}
        chosen, share = chosen_by(scores, K, bed), "by_type" if "shared" in name else "none"
        told["relaxed"] = measured(bed, model)["loss"]
        with torch.no_grad():
            for path, layer in search_layers(cut := copy.deepcopy(model)).items():
                if path not in chosen:
                    layer.B.zero_()
        told["cut"] = measured(bed, cut)["loss"]
        rest = steps if "search beside" in name else steps - bed.search
    else:
        rest = steps - bed.search if "fewer steps" in name else steps
        if name.startswith("norm"):
            early = max(2, bed.steps // 12)
            scores, rest = update_norms(fit(bed, lora(bed, generator, bed.high), lr, seed, early)), steps - early
        elif name.startswith("gradient"):
            scores = gradient_scores(bed)
        elif name.startswith("random"):
            paths = list(bed.costs)
            random.Random(f"{name.partition(',')[0]} {seed}").shuffle(paths)
            scores = {path: float(-paths.index(path)) for path in bed.costs}
        elif name.startswith("planted"):
            scores = {path: float(path in bed.planted) for path in bed.costs}
        chosen = chosen_by(scores, K, bed)
        model = lora(bed, torch.Generator(), bed.high, DiffoRALinear)
    ranks: Any = bed.rank_of(chosen) if share == "none" else bed.high
    model = keep_modules(model, chosen, rank=ranks, share=share, generator=torch.Generator().manual_seed(seed))
    return fit(bed, model, lr, seed + 500, rest), told | found(bed, chosen)


def choose(bed: Bed, name: str, lr: float, seed: int) -> dict[str, Any]:
    """Choose three modules in one way, without training them afterwards."""
    steps = max(2, bed.steps // 12) if "100 steps" in name else bed.search
    try:
        if name.startswith("LoRA"):
            model = fit(bed, lora(bed, torch.Generator().manual_seed(seed), bed.high), lr, seed, steps)
            scores = {"norm": update_norms(model)}
            prune_by_svd(model, bed.budget)
            ranks = {path: float(layer.rank) for path, layer in adapters(model)}
            scores["svd"] = {path: ranks.get(path, 0.0) for path in bed.costs}
        elif name == "gradient":
            scores = {"norm": gradient_scores(bed)}
        else:
            model, _ = searched(bed, lr, seed, steps, name)
            scores = {"θ": module_logits(model), "norm": update_norms(model)}
            gates = {path: layer.gate().item() for path, layer in search_layers(model).items()}
            scores["bare norm"] = {path: norm / gates[path] for path, norm in scores["norm"].items()}
    except FloatingPointError:
        return {"error": "diverged"}
    row = {}
    for kind, values in scores.items():
        row[f"found by {kind}"] = found(bed, chosen_by(values, len(bed.planted), bed))["found"]
        row[kind] = [round(value, 3) for value in values.values()]
    return row


SORA = ("SoRA λ=0.1", "SoRA λ=0.3", "SoRA λ=0.6")
PLANTED = (
    "DiffoRA K=3",
    "DiffoRA K=3, softmax",
    "DiffoRA K=3, by norm",
    "DiffoRA K=3, search beside",
    "DiffoRA K=3, smallest",
    "DiffoRA K=3, shared",
    "DiffoRA K=3, shared the other way",
    "planted K=3",
    "random K=3",
    "gradient K=3",
    "norm K=3",
    "uniform r=2",
    "uniform r=2, fewer steps",
    "uniform r=4",
    "SVD cut",
    "SVD cut, finished",
    *SORA,
    "DiffoRA K=3, θ at 0.1",
    "DiffoRA K=3, θ at 0.1, softmax",
    "DiffoRA K=3, θ at 0.1, smallest",
    "DiffoRA K=3, θ at 0.1, shared",
    "DiffoRA K=3, θ at 0.1, shared the other way",
    "DiffoRA K=2, θ at 0.1",
    "DiffoRA K=4, θ at 0.1",
    "AdaLoRA",
)
UNEQUAL = (
    "DiffoRA K=3",
    "DiffoRA K=3, by norm",
    "random K=3",
    "DiffoRA K=3, θ at 0.1",
    "planted K=3",
    "norm K=3",
    "uniform r=2",
    "SVD cut, finished",
)
VIT = (
    "random K=14",
    "DiffoRA K=14",
    "DiffoRA K=14, by norm",
    "DiffoRA K=14, θ at 0.1",
    "DiffoRA K=14, smallest",
    "uniform r=2",
    "SVD cut",
    "uniform r=2, fewer steps",
    "random K=14, fewer steps",
    "norm K=14",
    "DiffoRA K=14, θ at 0.1, smallest",
    "DiffoRA K=14, θ at 0.1, search at 0.003",
    "SVD cut, finished",
    "AdaLoRA",
)
CHOOSE = (
    "search",
    "search, softmax",
    "search, one split",
    "search, one level",
    "search, shuffled",
    "search, no warm-up",
    "search, θ at 0.005",
    "search, θ at 0.1",
    "LoRA",
    "LoRA, 100 steps",
    "search, θ at 0.05",
    "search, θ at 0.3",
    "search, θ at 0.1, one split",
    "search, θ at 0.1, one level",
)
CLEAN = (
    *CHOOSE,
    "search, θ at 0.1, shuffled",
    "search, θ at 0.1, no warm-up",
    "search, θ at 0.1, softmax",
    "search, θ at 0.1, softmax, s = 1",
)
AGAIN = ("search", "search, θ at 0.1", "LoRA, 100 steps")
PLANTED_RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)
VIT_RATES = (0.003, 0.006, 0.012, 0.024)
#: Rates of AdaLoRA over those of the others: its three factors start small.
FASTER = 2
PARTS = ("search", "noisy", "search_again", "noisy_again", "planted", "unequal", "transformer")
CHOICES = {"search": CLEAN, "noisy": CHOOSE, "search_again": AGAIN, "noisy_again": AGAIN}
SETTING = {
    "search": "six layers h + tanh(Wh), width 32, rank 4 planted in three of them, 1,024 rows, noise 0.05; 400 steps",
    "noisy": "the same with 256 rows and noise 0.2",
    "search_again": "the bed of part search, other seeds",
    "noisy_again": "the bed of part noisy, other seeds",
    "planted": "the bed of part search; 1,200 steps in all, 400 of them for a search; budget 768 numbers, s = 2",
    "unequal": "the same with planted ranks 0, 1, 2, 4, 4, 4 in an order drawn",
    "transformer": "ViT of 4 blocks, width 32, from upright digits to digits turned by 90 degrees; 240 steps of 32 in"
    " all, 80 for a search; budget LoRA r = 2 on 28 modules, s = 2",
}


def jobs(part: str, tiny: bool) -> list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Return (key, what to measure) of all rows of a part."""
    noisy = partial(planted_bed, rows=256, noise=0.2, tiny=tiny)
    beds = {
        "noisy": noisy,
        "noisy_again": noisy,
        "unequal": partial(planted_bed, ranks=(0, 1, 2, 4, 4, 4), tiny=tiny),
        "transformer": lambda seed: vit_bed(tiny=tiny),
    }
    bed: Callable[[int], Bed] = beds.get(part, partial(planted_bed, tiny=tiny))
    seeds = NEW_SEEDS if part.endswith("again") else SEEDS
    arms = {"planted": PLANTED, "unequal": UNEQUAL, "transformer": VIT, **CHOICES}
    work = choose if part in CHOICES else run
    listed = []
    for name in arms[part]:
        if name == "AdaLoRA" and importlib.util.find_spec("peft") is None:
            continue
        rates = VIT_RATES if part == "transformer" else PLANTED_RATES
        grid = [round(rate * (FASTER if name == "AdaLoRA" else 1), 4) for rate in rates]
        for lr in grid[:1] if tiny else grid:
            for seed in seeds[:1] if tiny else seeds:
                key = {"method": name, "lr": lr, "seed": seed}
                listed.append((key, lambda name=name, lr=lr, seed=seed: work(bed(seed), name, lr, seed)))
    if part in ("search", "noisy"):
        listed += [
            ({"method": "gradient", "lr": 0.0, "seed": seed}, lambda seed=seed: work(bed(seed), "gradient", 0.0, seed))
            for seed in (seeds[:1] if tiny else seeds)
        ]
    return listed


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", PARTS)
    torch.set_num_threads(1)
    for part in args.part:
        runs = Runs(args.out, part, setting=SETTING[part], seconds=args.seconds)
        for key, measure in jobs(part, args.tiny):
            if re.search(args.only, key.get("method", "")):
                runs.row(key, measure)


if __name__ == "__main__":
    main()
