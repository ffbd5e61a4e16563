"""What the chapter on LoLDU is too short for: its starts, its scale, other factors, and other methods of its size.

    python tests/benchmarks/bench_loldu_small.py --out book/results/loldu_small.json

turned, negative, moved, relabelled: each arm with its own grid of rates and five seeds on a shift of the digits, 0.7 s
a row on a CPU core. Rows tell, beside the losses, after how many steps an arm was below 0.6 nats on validation and on
test images (looked at every 10 steps; 210: never).
cost: milliseconds of an LU factorisation and of an SVD, and bytes of files.
"""

import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_svfit_small import BY_LORA, BY_VALUE, Plan, Watch, adapt, core, doubling, lora, pairs
from common import Runs, arguments, milliseconds
from torch import nn

from lowrank_ref.adapters import LoLDULinear, NOLALinear, RandLoRALinear
from lowrank_ref.adapters.ldu_factors import LDU_STARTS
from lowrank_ref.adapters.loldu import ldu
from lowrank_ref.core.io import save_adapters
from lowrank_ref.core.layers import replace_linears, weight_of
from lowrank_ref.lab.beds import digits_shift

SEEDS = (0, 1, 2, 3, 4)
SHIFTS = ("turned", "negative", "moved", "relabelled")
#: The head trains at this rate wherever it trains beside something else.
HEAD_LR = 0.016


def loldu(rank: int = 1000, **options: Any) -> Callable[[nn.Linear, torch.Generator], nn.Module]:
    """Return what makes a LoLDU layer with as many pivots as it has, up to rank."""

    def make(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
        return LoLDULinear(linear, min(rank, *linear.weight.shape), generator=generator, **options)

    return make


def head_only(model: nn.Module, generator: torch.Generator) -> None:
    """Train the last layer as it is, and nothing else."""
    for path, p in model.named_parameters():
        p.requires_grad_(path.startswith("layers.2"))


def renumbered(rank: int = 1000) -> Callable[[nn.Linear, torch.Generator], nn.Module]:
    """Return what makes a LoLDU layer whose inputs were numbered in a drawn order when its weight was factored."""

    def make(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
        layer = LoLDULinear(linear, min(rank, *linear.weight.shape))
        inputs = torch.randperm(layer.in_features, generator=generator)
        order, L, D, U = ldu(weight_of(linear).detach()[:, inputs])
        layer.left.copy_(L[order][:, : layer.rank])
        layer.D.copy_(D[: layer.rank])
        layer.right.copy_(U[: layer.rank, inputs.argsort()])
        return layer

    return make


def randlora(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    """RandLoRA in one block, the least that it can train: 2·min(m, n) numbers."""
    return RandLoRALinear(linear, min(linear.weight.shape), generator=generator)


def nola(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    """NOLA of rank 8 with 34 matrices for each factor: 68 numbers a layer, 204 in all."""
    return NOLALinear(linear, 8, bases=34, generator=generator)


def with_head(model: nn.Module, generator: torch.Generator, make: Any, lr: float) -> list[dict[str, Any]]:
    """Adapt all layers but the last, which trains as it is, at its own rate."""
    replace_linears(model, r"^layers\.[01]", lambda linear: make(linear, generator), trainable=r"^layers\.2")
    head = [p for path, p in model.named_parameters() if path.startswith("layers.2")]
    body = [p for path, p in model.named_parameters() if p.requires_grad and not path.startswith("layers.2")]
    return [{"params": body}, {"params": head, "lr": HEAD_LR / lr}]


BY_PIVOT, HIGHER = doubling(2**-8), doubling(2**-6)
#: Arms on all four shifts.
EVERYWHERE = {
    "LoLDU": Plan(loldu(), BY_PIVOT),
    "LoLDU, unit norms": Plan(loldu(factors="normalised"), BY_VALUE),
    "SVFit": Plan(pairs(), BY_VALUE),
    "random pairs": Plan(loldu(factors="orthogonal"), BY_VALUE),
    "LoRA r=8": Plan(lora(8), BY_LORA),
    "LoRA r=1": Plan(lora(1), BY_LORA),
    "core r=8": Plan(core(8), doubling(2**-5)),
    "RandLoRA, one block": Plan(randlora, doubling(2**-10)),
    "NOLA k=34": Plan(nola, doubling(2**-6)),
    "biases": Plan(None, doubling(0.02)),
}
SIZES = {
    f"{name} r={r}": Plan(make(r), grid)
    for r in (8, 32)
    for name, make, grid in (
        ("LoLDU", loldu, HIGHER),
        ("LoLDU, unit norms", partial(loldu, factors="normalised"), BY_VALUE),
        ("SVFit", partial(pairs, "top"), BY_VALUE),
        ("random pairs", partial(loldu, factors="orthogonal"), BY_VALUE),
        ("LoLDU, inputs renumbered", renumbered, HIGHER),
    )
}
#: Arms on the turned and the negative digits.
CONTROLS = {
    **SIZES,
    "LoLDU, inputs renumbered": Plan(renumbered(), BY_PIVOT),
    "random triangles": Plan(loldu(factors="triangular"), BY_PIVOT),
    "shuffled pairs": Plan(loldu(factors="shuffled"), BY_PIVOT),
    "no permutation": Plan(loldu(factors="unpermuted"), BY_PIVOT),
    "L = U = I": Plan(loldu(factors="identity"), BY_VALUE),
    "scale alone": Plan(loldu(trains="scale"), BY_PIVOT),
    "diagonal and scale": Plan(loldu(trains="both"), BY_PIVOT),
    "head only": Plan(None, doubling(0.008), "head only"),
    "LoLDU and head": Plan(loldu(), BY_PIVOT, "head"),
    "LoRA r=8 and head": Plan(lora(8), BY_LORA, "head"),
    "LoRA r=1 and head": Plan(lora(1), BY_LORA, "head"),
}
#: Arms on the turned digits.
STARTS = {
    **{f"start {s}": Plan(loldu(start=s), BY_PIVOT) for s in LDU_STARTS if s != "lu"},
    **{f"start {s}, uncompensated": Plan(loldu(start=s, compensated=False), HIGHER) for s in LDU_STARTS if s != "lu"},
    **{f"start {s}, scale too": Plan(loldu(start=s, trains="both"), BY_PIVOT) for s in ("uniform", "ones", "zeros")},
}
#: More rates of some arms on the turned digits: how wide is the window?
WINDOWS = {
    "LoLDU": tuple(2.0**k for k in (-12, -11, -10, -9, -1, 0)),
    "LoLDU, unit norms": tuple(2.0**k for k in (-7, -6, -5, -4, 4, 5)),
    "SVFit": tuple(2.0**k for k in (-7, -6, -5, -4, 4, 5)),
    "LoRA r=8": tuple(0.004 * 2.0**k for k in (-4, -3, -2, -1, 7, 8)),
}


def arms(shift: str) -> dict[str, Plan]:
    """Return the arms of a shift."""
    found = EVERYWHERE | (CONTROLS if shift in ("turned", "negative") else {}) | (STARTS if shift == "turned" else {})
    wider = WINDOWS if shift == "turned" else {}
    return {name: plan._replace(rates=(*plan.rates, *wider.get(name, ()))) for name, plan in found.items()}


def measured(plan: Plan, shift: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one arm on a shift; losses in nats."""
    if plan.pattern == "head only":
        change: Any = head_only
    else:
        change = partial(with_head, make=plan.make, lr=lr) if plan.pattern == "head" else partial(adapt, plan=plan)
    watches: list[Watch] = []

    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Watch]:
        watches.append(Watch(model, shift))
        return watches

    try:
        found = digits_shift(change, lr, seed, steps=steps, actions=watch, shift=shift)
    except FloatingPointError:
        return {"error": "diverged"}
    kept = {name: round(found[name], 4) for name in ("trainable", "valid loss", "loss", "accuracy")}
    return {**kept, "valid steps": watches[0].reached["valid"], "steps": watches[0].reached["test"]}


def cost(what: str, device: str, size: int) -> dict[str, Any]:
    """Time one factorisation of a Gaussian matrix in float32."""
    W = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    run = {"LU": lambda: torch.linalg.lu(W), "SVD": lambda: torch.linalg.svd(W, full_matrices=False)}[what]
    return milliseconds(run, repeats=3, warmup=1)


def file_bytes(method: str, size: int) -> dict[str, Any]:
    """Save one adapted layer."""
    linear = nn.Linear(size, size)
    make = {
        "LoLDU, no factors": partial(LoLDULinear, store_bases=False),
        "LoLDU": LoLDULinear,
        "LoRA r=8": lambda base: lora(8)(base, torch.Generator().manual_seed(0)),
    }[method]
    model = replace_linears(nn.Sequential(linear), "0", make)
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(model, file := Path(folder, "x"))
        return {"bytes": file.stat().st_size, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def main() -> None:
    """Run the parts asked for; `--only` is matched with "shift, method"."""
    args = arguments(__doc__ or "", (*SHIFTS, "cost"))
    torch.set_num_threads(1)
    steps = 20 if args.tiny else 200
    for shift in (s for s in SHIFTS if s in args.part):
        setting = (
            f"MLP 64-128-128-10, pretrained on 1,000 upright digits, learns the same {shift}; Adam, {steps} steps "
            "of 64 images, the rate falling linearly to 0"
        )
        runs = Runs(args.out, shift, setting=setting, seconds=args.seconds)
        for name, plan in arms(shift).items():
            if re.search(args.only, f"{shift}, {name}"):
                for seed in SEEDS[:1] if args.tiny else SEEDS:
                    for lr in plan.rates[:1] if args.tiny else plan.rates:
                        key = {"method": name, "lr": lr, "seed": seed}
                        runs.row(key, partial(measured, plan, shift, steps, lr, seed))
    if "cost" in args.part and re.search(args.only, "cost"):
        setting = "one square float32 matrix; on the CPU one thread"
        runs = Runs(args.out, "cost", setting=setting, seconds=args.seconds)
        sizes = (64,) if args.tiny else (384, 768, 1024, 2048, 4096)
        for device in dict.fromkeys(("cpu", args.device)):
            for size in sizes:
                for what in ("LU", "SVD"):
                    if size <= 2048 or device != "cpu":
                        runs.row({"what": what, "device": device, "size": size}, partial(cost, what, device, size))
        for method in ("LoLDU, no factors", "LoLDU", "LoRA r=8"):
            for size in sizes[:2]:
                runs.row({"what": "file", "method": method, "size": size}, partial(file_bytes, method, size))


if __name__ == "__main__":
    main()
