"""Controls that LoLDU's benchmark lacks: its span in orthonormal directions, triangles of unit norms, units renumbered.

    python tests/benchmarks/bench_loldu_controls.py --out book/results/loldu_small.json

Each arm with seven rates and five seeds, 0.6 s a row on a CPU core, 350 rows. Rows are those of bench_loldu_small.py.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_loldu_small import HIGHER, SEEDS, SHIFTS, loldu
from bench_svfit_small import BY_VALUE
from common import Runs, arguments
from torch import nn

from lowrank_ref.adapters import LoLDULinear
from lowrank_ref.adapters.ldu_factors import ldu_gram
from lowrank_ref.adapters.loldu import ldu
from lowrank_ref.core.layers import replace_linears, weight_of
from lowrank_ref.lab.beds import digits_shift


class Whitened(LoLDULinear):
    """LoLDU's updates in orthonormal coordinates: the pivots move by M^(-1/2)η, and η trains."""

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        values, vectors = torch.linalg.eigh(ldu_gram(self.left.double(), self.right.double()))
        root = vectors * values.rsqrt() @ vectors.T
        self.register_buffer("root", root.to(self.left.dtype), persistent=False)

    def coefficients(self) -> torch.Tensor:
        """Return M^(-1/2)η."""
        return self.root @ self.delta


def whitened(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    """Draw nothing."""
    return Whitened(linear)


def unit_triangles(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    """Mix the entries of both triangles, then give columns and rows norm 1."""
    layer = LoLDULinear(linear, factors="triangular", generator=generator)
    layer.left /= layer.left.norm(dim=0)
    layer.right /= layer.right.norm(dim=1, keepdim=True)
    return layer


def adapt(model: nn.Module, generator: torch.Generator, make: Callable[..., nn.Module]) -> None:
    """Replace the three layers."""
    replace_linears(model, r"^layers\.", lambda linear: make(linear, generator))


def one_renumbered(model: nn.Module, generator: torch.Generator, which: int) -> None:
    """Adapt with 8 pivots a layer; the factors of one layer are those of its inputs in a drawn order."""
    replace_linears(model, r"^layers\.", lambda linear: loldu(8)(linear, generator))
    layer = model.layers[which]
    inputs = torch.randperm(layer.in_features, generator=generator)
    order, L, D, U = ldu(weight_of(layer.base).detach()[:, inputs])
    layer.left.copy_(L[order][:, :8])
    layer.D.copy_(D[:8])
    layer.right.copy_(U[:8, inputs.argsort()])


def hidden_renumbered(model: nn.Module, generator: torch.Generator) -> None:
    """Number the hidden units in a drawn order, which leaves the function as it is, then adapt with 8 pivots a layer."""
    first, middle, last = model.layers
    p, q = (torch.randperm(len(layer.weight), generator=generator) for layer in (first, middle))
    with torch.no_grad():
        first.weight.copy_(first.weight[p])
        first.bias.copy_(first.bias[p])
        middle.weight.copy_(middle.weight[q][:, p])
        middle.bias.copy_(middle.bias[q])
        last.weight.copy_(last.weight[:, q])
    replace_linears(model, r"^layers\.", lambda linear: loldu(8)(linear, generator))


#: Arm -> how it changes the model, its rates, and the shifts.
ARMS: dict[str, tuple[Any, tuple[float, ...], tuple[str, ...]]] = {
    "LoLDU, orthonormal": (partial(adapt, make=whitened), BY_VALUE, SHIFTS),
    "random triangles, unit norms": (partial(adapt, make=unit_triangles), BY_VALUE, SHIFTS[:2]),
    "LoLDU, hidden units renumbered r=8": (hidden_renumbered, HIGHER, ("negative",)),
    "LoLDU, pixels renumbered r=8": (partial(one_renumbered, which=0), HIGHER, ("negative",)),
    "LoLDU, last layer renumbered r=8": (partial(one_renumbered, which=2), HIGHER, ("negative",)),
}


def trained(change: Any, shift: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one arm on a shift; losses in nats."""
    try:
        found = digits_shift(change, lr, seed, steps=steps, shift=shift)
    except FloatingPointError:
        return {"error": "diverged"}
    return {name: round(found[name], 4) for name in ("trainable", "valid loss", "loss", "accuracy")}


def main() -> None:
    """Run the parts asked for; `--only` is matched with "shift, method"."""
    args = arguments(__doc__ or "", SHIFTS)
    torch.set_num_threads(1)
    steps = 20 if args.tiny else 200
    for shift in args.part:
        setting = f"controls on the digits {shift}, measured as the part {shift} is"
        runs = Runs(args.out, f"{shift}, controls", setting=setting, seconds=args.seconds)
        for name, (change, rates, shifts) in ARMS.items():
            if shift in shifts and re.search(args.only, f"{shift}, {name}"):
                for seed in SEEDS[:1] if args.tiny else SEEDS:
                    for lr in rates[:1] if args.tiny else rates:
                        key = {"method": name, "lr": lr, "seed": seed}
                        runs.row(key, partial(trained, change, shift, steps, lr, seed))


if __name__ == "__main__":
    main()
