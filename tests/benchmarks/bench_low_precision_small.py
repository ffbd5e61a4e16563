"""Which tensor of a training step may be how coarse: an MLP on scikit-learn's digits, one tensor narrow at a time.

    python tests/benchmarks/bench_low_precision_small.py --part tensors --out book/results/low_precision_small.json
    python tests/benchmarks/bench_low_precision_small.py --part products --out book/results/low_precision_small.json
    python tests/benchmarks/bench_low_precision_small.py --part outliers --out book/results/low_precision_small.json

tensors: one of the stored weights (rounded to nearest or at random, with Kahan's sum, or with a full-precision copy),
activations, gradients (to nearest or at random), first and second moments is narrow, all else float32. "Without 0":
the smallest value that a second moment may take is the smallest positive one of its format.
products: MXFP4 in one of the three products of every layer, or in all, with random rounding and Hadamard rotations;
of Y also one operand alone, absmax scales, the last layer exact, and int4.
outliers: four of the 64 inputs are 100 times as large, or nothing but these is seen; int8 against E4M3 and int4, with
one scale a row and a block.
The networks of all seeds and rates train side by side, as one batch of matrices; 3 to 10 s an arm on a core.
"""

import functools
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.lab.data import array_batches, digits
from lowrank_ref.lab.models import MLP
from lowrank_ref.lowbit import QUANTIZERS, NarrowAdamW, Quantizer, Recipe, quantized_linear
from lowrank_ref.lowbit.number_formats import TableFormat

SIZES, BATCH, STEPS, SEEDS = (64, 64, 64, 10), 50, 200, 5
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
FORMATS = ("E4M3 row", "E5M2 row", "int8 row", "int4 row", "MXFP4", "NVFP4", "ternary")
FACTOR, COLUMNS = 100.0, (10, 26, 42, 58)


@dataclass(frozen=True)
class Setting:
    """What is narrow in a run: a recipe for the products, and quantisers for storage."""

    recipe: Recipe = Recipe()
    weight: Quantizer | None = None
    first: Quantizer | None = None
    second: Quantizer | None = None
    compensated: bool = False
    factor: float = 1.0
    alone: bool = False  # the other inputs are 0
    exact_last: bool = False  # the last layer's products are exact


def without_zero(name: str) -> Quantizer:
    """A quantiser for second moments, of the positive values of a format alone."""
    q = QUANTIZERS[name]
    values = q.form.values()
    form = TableFormat(f"{q.form.name} without 0", q.form.bits, tuple(values[values > 0].tolist()))
    return replace(q, form=form)


def tensor_arms() -> dict[str, Setting]:
    """Name -> setting of the part "tensors": "tensor: format"."""
    arms = {"float32": Setting()}
    for name in FORMATS:
        q = QUANTIZERS[name] if name != "ternary" else replace(QUANTIZERS[name], block=(1, None))
        random = q.at_random()
        arms |= {
            f"weights, stored: {name}": Setting(weight=q),
            f"weights, stored at random: {name}": Setting(weight=random),
            f"weights, in products: {name}": Setting(Recipe(weight=q)),
            f"activations: {name}": Setting(Recipe(activation=q)),
            f"gradients: {name}": Setting(Recipe(gradient=q)),
            f"gradients, at random: {name}": Setting(Recipe(gradient=random)),
        }
        if name != "ternary":
            arms |= {f"first moment: {name}": Setting(first=q), f"second moment: {name}": Setting(second=q)}
    bf16 = QUANTIZERS["bf16"]
    arms |= {"weights, stored: bf16": Setting(weight=bf16), "first moment: bf16": Setting(first=bf16)}
    arms |= {
        "weights, stored at random: bf16": Setting(weight=bf16.at_random()),
        "second moment: bf16": Setting(second=bf16),
    }
    for name in ("bf16", "int8 row", "E4M3 row", "int4 row"):
        arms[f"weights, stored, Kahan: {name}"] = Setting(weight=QUANTIZERS[name], compensated=True)
    signed, unsigned = QUANTIZERS["dynamic 8-bit"], QUANTIZERS["dynamic 8-bit, unsigned"]
    arms["first moment: dynamic 8-bit"] = Setting(first=signed)
    arms["second moment: dynamic 8-bit"] = Setting(second=unsigned)
    arms["both moments: dynamic 8-bit"] = Setting(first=signed, second=unsigned)
    arms["both moments, v without 0: dynamic 8-bit"] = Setting(first=signed, second=without_zero(unsigned.form.name))
    for name in ("E4M3 row", "int8 row", "int4 row"):
        arms[f"second moment, without 0: {name}"] = Setting(second=without_zero(name))
    arms["both moments: int8 row"] = Setting(first=QUANTIZERS["int8 row"], second=QUANTIZERS["int8 row"])
    arms["both moments: bf16"] = Setting(first=bf16, second=bf16)
    return arms


def product_arms() -> dict[str, Setting]:
    """Name -> setting of the part "products"."""
    q = QUANTIZERS["MXFP4"]
    careful = replace(q, stochastic=True, headroom=0.75)
    base = Recipe(activation=q, weight=q, gradient=q, reduced=True)
    random = Recipe(activation=careful, weight=careful, gradient=careful, reduced=True)
    arms = {"float32": Setting()}
    arms |= {f"MXFP4 in {name}": Setting(replace(base, products=(name,))) for name in ("Y", "dX", "dW")}
    arms |= {
        "MXFP4 in all": Setting(base),
        "MXFP4 in dX and dW": Setting(replace(base, products=("dX", "dW"))),
        "dX and dW, at random": Setting(replace(random, products=("dX", "dW"))),
        "dX and dW, fixed Hadamard": Setting(replace(base, products=("dX", "dW"), rotation=32)),
        "dX and dW, at random, Hadamard": Setting(
            replace(random, products=("dX", "dW"), rotation=32, random_signs=True)
        ),
        "Hadamard alone": Setting(Recipe(reduced=True, rotation=32, random_signs=True)),
    }
    only_Y = replace(base, products=("Y",), gradient=None)
    absmax, int4 = replace(q, rule="absmax"), QUANTIZERS["int4 row"]
    arms |= {
        "MXFP4 in Y, X alone": Setting(replace(only_Y, weight=None)),
        "MXFP4 in Y, W alone": Setting(replace(only_Y, activation=None)),
        "MXFP4 in Y, absmax scales": Setting(replace(only_Y, activation=absmax, weight=absmax)),
        "MXFP4 in Y, last layer exact": Setting(only_Y, exact_last=True),
        "int4 row in Y": Setting(replace(only_Y, activation=int4, weight=int4)),
    }
    return arms


def outlier_arms() -> dict[str, Setting]:
    """Name -> setting of the part "outliers"."""
    arms = {}
    for name in ("int8 row", "E4M3 row", "int4 row", "int8 block", "MXFP8"):
        for factor in (1.0, FACTOR):
            arms[f"{name}, ×{factor:g}"] = Setting(Recipe(activation=QUANTIZERS[name]), factor=factor)
    arms["float32, nothing else"] = Setting(factor=FACTOR, alone=True)
    return arms | {f"float32, ×{factor:g}": Setting(factor=factor) for factor in (1.0, FACTOR)}


ARMS = {"tensors": tensor_arms, "products": product_arms, "outliers": outlier_arms}


@functools.cache
def data(factor: float, alone: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Part -> digits and labels; four columns of pixels are multiplied, the others 0 if these are alone."""
    d, scale = digits(), torch.full((64,), 0.0 if alone else 1.0)
    scale[list(COLUMNS)] = factor
    return {part: (getattr(d, f"x_{part}") * scale, getattr(d, f"y_{part}")) for part in ("train", "valid", "test")}


class Batch(nn.Module):
    """Networks of one shape side by side: layer i has weights (networks, m, n) and biases (networks, 1, m)."""

    def __init__(self, seeds: list[int], recipes: list[Recipe], generator: torch.Generator) -> None:
        super().__init__()
        nets = [MLP(SIZES, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        layers = list(zip(*(net.layers for net in nets)))
        self.weights = nn.ParameterList(torch.stack([one.weight.detach() for one in layer]) for layer in layers)
        self.biases = nn.ParameterList(torch.stack([one.bias.detach()[None] for one in layer]) for layer in layers)
        self.recipes, self.generator = recipes, generator

    def forward(self, x: Tensor) -> Tensor:
        """Map (networks, rows, inputs) to logits."""
        for i, (W, b, recipe) in enumerate(zip(self.weights, self.biases, self.recipes)):
            x = quantized_linear(F.relu(x) if i else x, W, recipe, generator=self.generator) + b
        return x


def losses(model: Batch, x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    """Loss in nats and accuracy of each network on the same rows."""
    with torch.no_grad():
        logits = model(x.expand(len(model.weights[0]), *x.shape))
    nats = [F.cross_entropy(z, y).item() for z in logits]
    return nats, (logits.argmax(-1) == y).double().mean(1).tolist()


@functools.cache
def trained(part: str, arm: str, steps: int, count: int) -> dict[tuple[float, int], dict[str, Any]]:
    """Train an arm with all rates and seeds. A rate falls along a cosine to a tenth; biases are stored in float32."""
    setting, places = ARMS[part]()[arm], [(lr, seed) for lr in RATES for seed in range(count)]
    rows, generator = data(setting.factor, setting.alone), torch.Generator().manual_seed(1)
    recipes = [setting.recipe] * 2 + [Recipe() if setting.exact_last else setting.recipe]
    model = Batch([seed for _, seed in places], recipes, generator)
    stored = {"weight": setting.weight, "first": setting.first, "second": setting.second}
    narrow = NarrowAdamW(model.weights.parameters(), **stored, compensated=setting.compensated, generator=generator)
    plain = NarrowAdamW(model.biases.parameters())
    rates = torch.tensor([lr for lr, _ in places])[:, None, None]  # each network its own
    draws = [array_batches(*rows["train"], batch=BATCH, seed=100 + seed) for seed in range(count)]
    for step in range(steps):
        falling = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        x, y = (torch.stack(t).repeat(len(RATES), *[1] * t[0].ndim) for t in zip(*(draw(step) for draw in draws)))
        model.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").div(BATCH).backward()
        for optimizer in (narrow, plain):
            optimizer.param_groups[0]["lr"] = rates * falling
            optimizer.step()
    found: list[dict[str, Any]] = [{} for _ in places]
    for name, split in (("train ", "train"), ("valid ", "valid"), ("", "test")):
        nats, right = losses(model, *rows[split])
        for row, loss, accuracy in zip(found, nats, right):
            row |= {f"{name}loss": round(loss, 5), f"{name}accuracy": round(accuracy, 5)}
    diverged = {"error": "FloatingPointError: loss is not finite"}
    return dict(zip(places, (row if math.isfinite(row["valid loss"]) else diverged for row in found)))


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", tuple(ARMS))
    torch.set_num_threads(1)
    steps, count = (3, 2) if args.tiny else (STEPS, SEEDS)
    for part in args.part:
        setting = (
            f"digits, MLP {SIZES}, {steps} steps of {BATCH}, AdamW without decay, rate falling along a cosine to a "
            f"tenth; rates chosen on validation loss; {count} seeds"
        )
        runs = Runs(args.out, part, setting=setting, seconds=args.seconds)
        for arm in ARMS[part]():
            for lr in RATES if re.search(args.only, arm) else ():
                for seed in range(count):
                    key = {"method": arm, "lr": lr, "seed": seed}
                    runs.row(key, lambda p=part, a=arm, lr=lr, s=seed: dict(trained(p, a, steps, count)[lr, s]))


if __name__ == "__main__":
    main()
