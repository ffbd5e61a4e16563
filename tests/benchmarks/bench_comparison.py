"""All adapters on one bed (digits turned by 90°), each at several sizes and at its own best learning rate.

    python tests/benchmarks/bench_comparison.py --out book/results/comparison.json

Each scale is s = 2, at which rsLoRA and LoRA are the same. `make notebooks` runs this before the chapters; the page
`comparison` renders the file. A file with the same numbers is left as it is.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import arguments, save
from torch import nn

from lowrank_ref.adapters import DoRALinear, LoRALinear, PiSSALinear, RandLoRALinear
from lowrank_ref.analysis import MPSLinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds import digits_shift, pretrained_on_digits
from lowrank_ref.lab.compare import compare
from lowrank_ref.ranks import ProximalGates, SoRALinear, gate_groups, kept_ranks

LAYERS = r"^layers\."
RATES = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1)
#: Method -> sizes. A size is a rank; for MPS a rank and a bond; for SoRA a rank to start from and a penalty.
SIZES: dict[str, list[tuple[float, ...]]] = {
    "LoRA": [(1,), (2,), (4,), (8,)],
    "PiSSA": [(1,), (2,), (4,), (8,)],
    "DoRA": [(1,), (2,), (4,), (8,)],
    "RandLoRA": [(64,), (32,), (16,), (4,)],
    "SoRA": [(8, 1.0), (8, 0.5), (8, 0.25), (8, 0.0)],
    "MPS": [(2, 2), (4, 3), (8, 4), (16, 8)],
    "full": [()],
}


def factory(method: str, size: tuple[float, ...], generator: torch.Generator) -> Callable[[Any], nn.Module]:
    """Return linear layer -> adapter. The last layer has 10 outputs, which bounds its rank."""

    def build(base: nn.Linear) -> nn.Module:
        rank = min(int(size[0]), *base.weight.shape)
        alpha: dict[str, Any] = {"alpha": 2.0 * rank, "generator": generator}
        if method == "RandLoRA":
            return RandLoRALinear(base, rank, generator=generator)
        if method == "MPS":
            return MPSLinear(base, rank, bond=int(size[1]), **alpha)
        return {"LoRA": LoRALinear, "PiSSA": PiSSALinear, "DoRA": DoRALinear, "SoRA": SoRALinear}[method](
            base, rank, **alpha
        )

    return build


def run(name: str, lr: float, seed: int) -> dict[str, float]:
    """Train once; "numbers" is what has to be stored in the end."""
    method, _, text = name.partition(" ")
    size = tuple(json.loads(text or "[]"))
    seen: list[nn.Module] = []

    def adapt(model: nn.Module, generator: torch.Generator) -> list[dict[str, Any]] | None:
        seen.append(model)
        if method == "full":
            model.requires_grad_(True)
            return None
        replace_linears(model, LAYERS, factory(method, size, generator))
        return gate_groups(model) if method == "SoRA" else None

    actions = partial(ProximalGates, penalty=size[1]) if method == "SoRA" else None
    result = digits_shift(adapt, lr, seed, actions=actions and (lambda *both: [actions(*both)]))
    result["numbers"] = result["trainable"]
    if method == "SoRA":
        shapes = {path: module.base.weight.shape for path, module in seen[0].named_modules() if hasattr(module, "g")}
        result["numbers"] = float(sum(rank * sum(shapes[path]) for path, rank in kept_ranks(seen[0]).items()))
    return result


def main() -> None:
    """Run all, and write the rows of each method and size at its best learning rate."""
    args = arguments(__doc__ or "", ("digits_shift",))
    torch.set_num_threads(1)
    pretrained_on_digits()  # once, before processes share it
    names = [f"{method} {json.dumps(size)}" for method, sizes in SIZES.items() for size in sizes]
    names, rates, seeds = (names[:2], RATES[:1], (0,)) if args.tiny else (names, RATES, (0, 1, 2))
    grid = {name: tuple(rate / 4 for rate in rates) if name.startswith("full") else rates for name in names}
    result = compare(run, names, lrs=grid, seeds=seeds, progress=False)
    best = result.best()
    rows = [
        {
            "method": name.partition(" ")[0],
            "size": json.loads(name.partition(" ")[2]),
            "lr": best[name].lr,
            "edge": best[name].edge,
            **{key: [round(v, 5) for v in result.at_best(key)[name]] for key in ("loss", "accuracy")},
            **{key: round(sum(v) / len(v)) for key in ("numbers", "trainable") for v in [result.at_best(key)[name]]},
        }
        for name in names
    ]
    setting = "64-128-128-10 network, digits turned by 90°, 200 Adam steps of 64, lr falls linearly; 3 seeds, 6 rates"
    new = {"setting": setting, "rows": rows}
    old = json.loads(args.out.read_text())["digits_shift"] if args.out.exists() else {}
    if any(old.get(key) != value for key, value in new.items()):
        save(args.out, "digits_shift", new)


if __name__ == "__main__":
    main()
