"""Does Bayesian-LoRA find ranks and bits, and is what it finds smaller at equal error? CPU, 140 minutes on one core.

    python tests/benchmarks/bench_bayesian_lora_small.py --out book/results/bayesian_lora_small.json --device cpu

planted: four layers whose updates have rank 0, 1, 1 and 8; rank 12 to begin with. digits: digits turned by 90 degrees,
three layers, rank 8 to begin with. Arms: gates at several penalties and rates of the logits; the same without noise,
without a task gradient on the logits, with the code's penalty, start or exact divergence; and what needs no gates:
LoRA of one rank, LoRA cut by its singular values, cut and trained on, SoRA, and training in one width for all. Those
are also rounded after training, to 16 to 2 bits, one range a factor. "fixed" arms train from the start in the ranks of
a stored gated run, in its bits or in random bits of equal size: is what the gates chose better than a draw?

Sizes are bits of codes and 32 for each range. "curve" holds [kilobits, test, valid, rank, bits] of everything that was
made of one trained model.
"""

import copy
import itertools
import math
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.lab.beds import measure_planted, planted_rank, pretrained_on_digits, shifted_digits
from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.train import train
from lowrank_ref.ranks import ProximalGates, SoRALinear, gate_groups, prune, prune_by_svd
from lowrank_ref.ranks.bayesian_lora import BayesianLoRALinear
from lowrank_ref.ranks.bit_export import load_bits, save_bits
from lowrank_ref.ranks.bit_gates import (
    GateSampler,
    bit_cost,
    chain_divergence,
    gated_layers,
    logit_groups,
    prune_to_lora,
    stored_bits,
)
from lowrank_ref.ranks.residual_bits import codes_of

SEEDS = (1, 2, 3, 4, 5)
BITS = (16, 8, 6, 4, 2)
Curve = list[list[float]]


class Planted:
    """The planted ranks."""

    setting = "planted ranks 0, 1, 1, 8 of width 32, 1,024 noisy rows; Adam, batches of 128"
    rank, steps, cuts = 12, 1200, (6, 8, 10, 12, 14, 16, 20, 24, 32, 48)
    penalties, uniform, finishes = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (4, 8), (10, 14)
    widths, logit_rate, others, main = ((8, 8), (8, 4)), 0.05, (0.02, 0.1), 3e-3
    kinds = ("u = 1/2", "prior only", "separate ranks", "released start", "exact KL", "bop", "φ = 2")
    unsampled, beyond = (3e-4, 1e-3), {3e-4: 0.005, 3e-3: 0.16}
    plain, trained_cut, fixed = (0.005, 0.01, 0.02, 0.04), True, ("learned bits", "random bits 1", "random bits 2")

    def __init__(self, seed: int) -> None:
        self.task = planted_rank(seed)
        self.base, self.batch = self.task.base, 128
        self.x, self.y = self.task.x_train, self.task.y_train
        self.loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Errors on test and validation data."""
        found = measure_planted(self.task, model)
        return found["mse"], found["valid mse"]


class Digits:
    """The turned digits."""

    setting = "MLP 64-128-128-10 of upright digits, turned by 90 degrees; Adam, batches of 64"
    rank, steps, cuts = 8, 400, (2, 3, 4, 6, 8, 12, 16, 24)
    penalties, uniform, finishes = (3e-3, 1e-2, 3e-2, 1e-1), (1, 4), (4, 8)
    widths, logit_rate, others, main = ((8, 8), (5, 8), (8, 4), (4, 4)), 0.1, (), 1e-2
    kinds, unsampled, beyond = ("u = 1/2",), (3e-3, 3e-2, 1e-1), {}
    plain, trained_cut, fixed = (0.005, 0.01, 0.02, 0.04, 0.08), False, ()

    def __init__(self, seed: int) -> None:
        self.data = shifted_digits("turned")
        self.base, self.batch = pretrained_on_digits(), 64
        self.x, self.y = self.data.x_train, self.data.y_train
        self.loss = F.cross_entropy

    @torch.no_grad()
    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Losses on test and validation images, in nats."""
        test, valid = model(self.data.x_test), model(self.data.x_valid)
        return F.cross_entropy(test, self.data.y_test).item(), F.cross_entropy(valid, self.data.y_valid).item()


Bed = Planted | Digits


def fit(
    bed: Bed,
    model: nn.Module,
    groups: list[dict[str, Any]],
    lr: float,
    *,
    steps: int,
    seed: int,
    act: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> None:
    """Train with Adam; rates rise for 6 % of the steps and fall to 0. What acts attaches itself."""
    optimizer = torch.optim.Adam(groups, lr=lr)
    act(optimizer)
    warm = max(1, round(0.06 * steps))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        error = bed.loss(model(x), y)
        return error if penalty is None else error + penalty(model)

    batches = array_batches(bed.x, bed.y, batch=bed.batch, seed=seed)
    rise = lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))  # noqa: E731
    train(model, batches, loss, optimizer, steps=steps, schedule=rise, progress=False)


def adapted(bed: Bed, make: Callable[..., nn.Module], rank: int, seed: int, **options: Any) -> nn.Module:
    """The base with adapters of this rank, or of the most a layer can have."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(bed.base)

    def factory(base: nn.Linear) -> nn.Module:
        r = min(rank, *base.weight.shape)
        return make(base, r, alpha=2.0 * r, generator=generator, **options)

    return replace_linears(model, "", factory)


def trained_of(model: nn.Module) -> list[dict[str, Any]]:
    """One group of all that trains."""
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


# What is made of a trained model without gates.


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Round A and B of every LoRA layer of a copy to the nearest, one range each."""
    model = copy.deepcopy(model)
    for _, layer in adapters(model):
        for p in (layer.A, layer.B):
            limit = p.abs().max()
            step = 2 * torch.where(limit > 0, limit, 1.0) / (2.0**bits - 1)
            p.copy_(codes_of(p, limit, step) * step)
    return model


def kilobits(model: nn.Module, bits: int) -> float:
    """Codes and two ranges a layer."""
    sizes = [layer.A.numel() + layer.B.numel() for _, layer in adapters(model)]
    return (sum(sizes) * bits + 64 * len(sizes)) / 1000


def point(bed: Bed, model: nn.Module, size: float, bits: int) -> list[float]:
    """One entry of a curve."""
    test, valid = bed.measure(model)
    rank = sum(getattr(layer, "learned_rank", layer.rank) for _, layer in adapters(model))
    return [round(size, 3), float(f"{test:.5g}"), float(f"{valid:.5g}"), rank, bits]


def widths(bed: Bed, model: nn.Module) -> Curve:
    """A LoRA model in full precision, and rounded to each width."""
    found = [point(bed, model, kilobits(model, 32), 32)]
    return found + [point(bed, rounded(model, bits), kilobits(model, bits), bits) for bits in BITS]


def budget_of(bed: Bed, ranks: int) -> int:
    """Numbers in so many ranks, in layers of mean size."""
    shapes = [m.weight.shape for m in bed.base.modules() if isinstance(m, nn.Linear)]
    return ranks * sum(m + n for m, n in shapes) // len(shapes)


def cut_curves(bed: Bed, model: nn.Module) -> Curve:
    """Every cut by singular values, in every width."""
    cuts = (prune_by_svd(copy.deepcopy(model), budget_of(bed, k)) for k in bed.cuts)
    return [entry for less in cuts for entry in widths(bed, less)]


def ranks_of(model: nn.Module) -> list[int]:
    """Rank of each layer's adapter, 0 where none is left."""
    left = dict(adapters(model))
    return [getattr(layer, "rank", 0) for layer in (left.get(f"layers.{i}") for i in range(len(model.layers)))]


# Arms.


def gates(bed: Bed, lr: float, seed: int, *, penalty: float, rate: float, kind: str, steps: int) -> dict[str, Any]:
    """Train Bayesian-LoRA."""
    start = "released" if "released start" in kind else "base"
    gate = 2.0 if "φ = 2" in kind else 6.0
    model = adapted(bed, BayesianLoRALinear, bed.rank, seed, start=start, gate=gate)
    layers = gated_layers(model).values()
    cost = partial(bit_cost, cumulative=kind != "separate ranks", weighting="bop" if kind == "bop" else "const")
    if kind == "exact KL":
        cost = partial(chain_divergence, penalty=1.0)
    if kind == "prior only":  # the task's gradient never reaches the logits
        for layer in layers:
            layer.quantized = partial(blocked, layer)  # type: ignore[method-assign]

    def act(optimizer: torch.optim.Optimizer) -> None:
        generator = torch.Generator().manual_seed(seed + 1000)
        GateSampler(model, stochastic=kind != "u = 1/2", generator=generator).attach(optimizer)

    groups = logit_groups(model, lr, ratio=rate / lr)
    fit(bed, model, groups, lr, steps=steps, seed=seed, act=act, penalty=lambda m: penalty * cost(m))
    for layer in layers:
        vars(layer).pop("quantized", None)
    return model_of_gates(bed, model.eval(), exhaustive=not kind and rate == bed.logit_rate)


def blocked(layer: BayesianLoRALinear) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer multiplies with, without gradients for its logits."""
    logits = layer.rank_logits, layer.bit_logits
    for p in logits:
        p.requires_grad_(False)
    found = BayesianLoRALinear.quantized(layer)
    for p in logits:
        p.requires_grad_(True)
    return found


@torch.no_grad()
def model_of_gates(bed: Bed, model: nn.Module, *, exhaustive: bool) -> dict[str, Any]:
    """Numbers of a trained Bayesian-LoRA model, also after a trip through a file."""
    layers = list(gated_layers(model).values())
    size, bits = stored_bits(model) / 1000, [b for layer in layers for b in layer.learned_bits.values()]
    row: dict[str, Any] = {"curve": [point(bed, model, size, 0)], "bits": bits}
    row["ranks"] = [layer.learned_rank for layer in layers]
    row["used ranks"] = [int(layer.quantized()[2].count_nonzero()) for layer in layers]
    with tempfile.TemporaryDirectory() as folder:
        save_bits(model, f"{folder}/x")
        again = load_bits(copy.deepcopy(bed.base), f"{folder}/x").eval()
    row["file moves outputs"] = float(f"{(again(bed.x) - model(bed.x)).abs().max():.2g}")
    plain = copy.deepcopy(model)
    for layer in gated_layers(plain).values():
        layer.bit_logits.fill_(20.0)
    row["at 16 bits"] = float(f"{bed.measure(plain)[0]:.5g}")
    return row | (searched(bed, layers) if exhaustive and isinstance(bed, Planted) else {})


@torch.no_grad()
def searched(bed: Planted, layers: list[BayesianLoRALinear]) -> dict[str, Any]:
    """All 6,561 ways to give A and B of four layers 2, 4 or 8 bits, with the trained factors and learned ranks."""
    rows = 256
    x = torch.cat([bed.task.x_valid[:rows], bed.task.x_test[:rows]])
    y = torch.cat([bed.task.y_valid[:rows], bed.task.y_test[:rows]])
    weights, sizes = [], []
    for layer in layers:
        _, _, g = layer.quantized()
        k, own = layer.learned_rank, []
        for pair in itertools.product((2, 4, 8), repeat=2):
            A, B = (
                codes_of(p, (limit := p.abs().max()), (step := 2 * limit / (2.0**b - 1))) * step
                for p, b in zip((layer.A, layer.B), pair)
            )
            own.append(layer.base.weight + layer.scale * (B * g) @ A)
            sizes.append(k * 32 * sum(pair))
        weights.append(torch.stack(own))
    errors, bits = [], []
    for head in itertools.product(range(9), repeat=2):
        h = x
        for i, choice in enumerate(head):
            h = h + torch.tanh(h @ weights[i][choice].T)
        h = (h + torch.tanh(h @ weights[2].mT))[:, None]
        h = (h + torch.tanh(h @ weights[3].mT)).flatten(0, 1)
        errors.append((h - y).square().unflatten(1, (2, rows)).mean(dim=(2, 3)))
        per = torch.tensor(sizes).view(4, 9)
        bits.append((per[0][head[0]] + per[1][head[1]] + per[2][:, None] + per[3]).flatten())
    error, size = torch.cat(errors), torch.cat(bits)
    own_size = sum(32 * layer.learned_rank * (layer.learned_bits["A"] + layer.learned_bits["B"]) for layer in layers)
    fits, near = size <= own_size, (size - own_size).abs() <= 0.03 * own_size
    found: dict[str, Any] = {"A and B, kilobits": own_size / 1000}
    if bool(fits.any()):
        best = torch.where(fits, error[:, 0], torch.inf).argmin()
        found |= {"searched": float(f"{error[best, 1]:.5g}"), "searched kilobits": float(size[best]) / 1000}
    if bool(near.any()):
        found["random bits"] = float(f"{10 ** error[near, 1].log10().mean():.5g}")
        found["random bits, median"] = float(f"{error[near, 1].median():.5g}")
    h = x
    for layer in layers:
        h = h + torch.tanh(layer(h))
    found["same rows"] = float(f"{(h - y).square()[rows:].mean():.5g}")  # of the learned bits
    return found


def hold(model: nn.Module, widths: list[list[int]]) -> nn.Module:
    """Fix the bits of A, B and E of every layer, all ranks open."""
    for layer, own in zip(gated_layers(model).values(), widths, strict=True):
        with torch.no_grad():
            for logits, bits in zip(layer.bit_logits, own):
                logits[bits.bit_length() - 2 :] = -20.0
        layer.rank_logits.requires_grad_(False)
        layer.bit_logits.requires_grad_(False)
    return model


def one_width(bed: Bed, lr: float, seed: int, *, bits: int, rank: int, steps: int, cut: bool) -> dict[str, Any]:
    """Train A, B and E in one width, all ranks open: what is left of Bayesian-LoRA without its gates."""
    model = adapted(bed, BayesianLoRALinear, rank, seed, gate=20.0)
    hold(model, [[bits] * 3] * len(gated_layers(model)))
    fit(bed, model, trained_of(model), lr, steps=steps, seed=seed)
    row = model_of_gates(bed, model.eval(), exhaustive=False)
    return row | ({"cut": cut_curves(bed, prune_to_lora(model))} if cut else {})


def fixed(
    bed: Bed, lr: float, seed: int, *, steps: int, choice: str, gated: Callable[[int], tuple[list[int], list[int]]]
) -> dict[str, Any]:
    """Train from the start in the ranks of a gated run of this seed, in its bits or in random ones of equal size.

    Random: of 4,000 draws of 2, 4 or 8 bits for each A and B, E's bits kept, the nearest in size.
    """
    ranks, bits = gated(seed)
    widths = [bits[i : i + 3] for i in range(0, len(bits), 3)]
    if choice != "learned bits":
        draw = random.Random(f"{seed} {choice}")
        size = lambda ways: sum(k * (a + b) for k, (a, b, _) in zip(ranks, ways))  # noqa: E731
        draws = [[[draw.choice((2, 4, 8)), draw.choice((2, 4, 8)), own[2]] for own in widths] for _ in range(4000)]
        widths = min((ways for ways in draws if ways != widths), key=lambda ways: abs(size(ways) - size(widths)))
    each = iter(ranks)
    make = lambda base, _, **options: BayesianLoRALinear(base, k := next(each), **options | {"alpha": 2.0 * k})  # noqa: E731
    model = hold(adapted(bed, make, bed.rank, seed, gate=20.0), widths)
    fit(bed, model, trained_of(model), lr, steps=steps, seed=seed)
    return model_of_gates(bed, model.eval(), exhaustive=True)


def lora(bed: Bed, lr: float, seed: int, *, rank: int, steps: int) -> dict[str, Any]:
    """LoRA of one rank, rounded afterwards; the largest is also cut by its singular values."""
    model = adapted(bed, LoRALinear, rank, seed)
    fit(bed, model, trained_of(model), lr, steps=steps, seed=seed)
    row: dict[str, Any] = {"curve": widths(bed, model), "ranks": ranks_of(model)}
    if rank == bed.rank:
        row["cut"] = cut_curves(bed, model)
        cuts = (prune_by_svd(copy.deepcopy(model), budget_of(bed, k)) for k in bed.cuts)
        row["cut ranks"] = [ranks_of(less) for less in cuts]
    return row


def cut_and_finish(bed: Bed, lr: float, seed: int, *, ranks: int, steps: int) -> dict[str, Any]:
    """Two thirds of the steps at the largest rank, then the cut, then the last third."""
    model = adapted(bed, LoRALinear, bed.rank, seed)
    first = 2 * steps // 3
    fit(bed, model, trained_of(model), lr, steps=first, seed=seed)
    model = prune_by_svd(model, budget_of(bed, ranks))
    fit(bed, model, trained_of(model), lr, steps=steps - first, seed=seed + 500)
    return {"curve": widths(bed, model), "ranks": ranks_of(model)}


def sora(bed: Bed, lr: float, seed: int, *, pull: float, steps: int) -> dict[str, Any]:
    """SoRA, pruned, and rounded afterwards."""
    model = adapted(bed, SoRALinear, bed.rank, seed)
    act = lambda optimizer: ProximalGates(model, optimizer, penalty=pull).attach(optimizer)  # noqa: E731
    fit(bed, model, gate_groups(model), lr, steps=steps, seed=seed, act=act)
    prune(model)
    return {"curve": widths(bed, model), "ranks": ranks_of(model)}


@dataclass(frozen=True)
class Plan:
    """An arm: its run, the learning rates that it tries, and how many of the seeds."""

    run: Callable[..., dict[str, Any]]
    rates: tuple[float, ...]


def arms(bed: type[Bed], gated: Callable[[int], tuple[list[int], list[int]]]) -> dict[str, Plan]:
    """Arm -> its plan; `gated` gives ranks and bits of a stored gated run by its seed."""
    fast, slow, middle = (0.01, 0.02, 0.04, 0.08), (0.0025, 0.005, 0.01, 0.02), bed.plain
    if bed is Digits:
        slow = fast = middle
    found = {}
    for mu, rate in itertools.product(bed.penalties, (bed.logit_rate, *bed.others)):
        run, main = partial(gates, penalty=mu, rate=rate, kind=""), rate == bed.logit_rate
        few = rate < bed.logit_rate or (not main and mu > 3e-3)  # of no claim
        rates = (*fast, bed.beyond[mu]) if main and mu in bed.beyond else fast[:3] if few else fast
        found[f"B-LoRA μ={mu:g} φ-rate {rate:g}"] = Plan(run, rates)
    for kind, mu in [*((kind, bed.main) for kind in bed.kinds), *(("u = 1/2", mu) for mu in bed.unsampled)]:
        run = partial(gates, penalty=mu, rate=bed.logit_rate, kind=kind)
        rates = fast if kind in ("u = 1/2", "exact KL") else fast[:3]
        found[f"B-LoRA μ={mu:g} φ-rate {bed.logit_rate:g}, {kind}"] = Plan(run, rates)
    for choice in bed.fixed:
        found[f"fixed, {choice}"] = Plan(partial(fixed, choice=choice, gated=gated), bed.plain[:3])
    found |= {f"LoRA r={r}": Plan(partial(lora, rank=r), slow) for r in (*bed.uniform, bed.rank)}
    found |= {f"cut to {k}, finished": Plan(partial(cut_and_finish, ranks=k), slow) for k in bed.finishes}
    found |= {f"SoRA λ={pull:g}": Plan(partial(sora, pull=pull), middle) for pull in (0.4, 0.8)}
    for r, bits in bed.widths:
        found[f"{bits} bit r={r}"] = Plan(partial(one_width, bits=bits, rank=r, cut=False), middle)
    if bed.trained_cut:
        found[f"8 bit r={bed.rank}"] = Plan(partial(one_width, bits=8, rank=bed.rank, cut=True), middle)
    return found


def measured(bed: type[Bed], run: Callable[..., dict[str, Any]], lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One row: its numbers, or that it diverged. The first entry of its curve stands for it."""
    try:
        row = run(bed(seed), lr, seed, steps=steps)
    except (FloatingPointError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:80]}"}
    size, test, valid, rank, _ = row["curve"][0]
    row |= {"kilobits": size, "test": test, "valid": valid, "rank": rank}
    return row | {"log10 test": round(math.log10(test), 5), "log10 valid": round(math.log10(valid), 5)}


def chosen(runs: Runs, bed: type[Bed], seed: int) -> tuple[list[int], list[int]]:
    """Ranks and bits of the stored gated run of this seed at the main penalty, at the largest rate that converges."""
    name = f"B-LoRA μ={bed.main:g} φ-rate {bed.logit_rate:g}"
    rows = (row for row in runs.rows if (row["method"], row["seed"]) == (name, seed) and row["lr"] <= 0.08)
    row = max(rows, key=lambda row: row["lr"])
    return row["ranks"], row["bits"]


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("planted", "digits"))
    torch.set_num_threads(1)
    for part, bed in (("planted", Planted), ("digits", Digits)):
        if part not in args.part:
            continue
        steps = 6 if args.tiny else bed.steps
        setting = f"{bed.setting}; {steps} steps, rank {bed.rank} to begin with"
        runs = Runs(args.out, part, setting=setting, packages=("scikit-learn",), seconds=args.seconds)
        gated = partial(chosen, runs, bed)
        for seed, (name, plan) in itertools.product(SEEDS[:1] if args.tiny else SEEDS, arms(bed, gated).items()):
            for lr in plan.rates[:1] if args.tiny else plan.rates:
                if re.search(args.only, f"{name}, lr {lr:g}, seed {seed}"):
                    key = {"method": name, "lr": lr, "seed": seed}
                    runs.row(key, partial(measured, bed, plan.run, lr, seed, steps))


if __name__ == "__main__":
    main()
