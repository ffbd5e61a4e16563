"""What the chapter on NOLA is too short for, on small networks (CPU, 20 minutes on one core).

    python tests/benchmarks/bench_nola_small.py --out book/results/nola_small.json --device cpu

turned: digits turned by 90 degrees. NOLA with 16 to 128 bases at ranks 1 to 8, and what else costs so little.
negative: the same images with light and dark exchanged, the main arms.

Every arm has seven rates and five seeds. After training, coefficients (of LoRA: A and B) are also rounded to 8, 4, 3
and 2 bits, one step for each vector or matrix.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear, NOLALinear
from lowrank_ref.adapters.nola_bits import rounded
from lowrank_ref.core.accounting import numel
from lowrank_ref.core.layers import AdaptedLinear, replace_linears, weight_of
from lowrank_ref.lab.beds import classification_loss, pretrained_on_digits
from lowrank_ref.lab.data import Arrays, array_batches, digits
from lowrank_ref.lab.train import linear_decay, train

SEEDS = (0, 1, 2, 3, 4)
BITS = (8, 4, 3, 2)
RATES = {
    "NOLA": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    "LoRA": (0.00375, 0.0075, 0.015, 0.03, 0.06, 0.12, 0.24),
    "random": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "biases": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
}
#: Main arms, run on both tasks.
MAIN = (
    "NOLA r=8 k=16",
    "NOLA r=8 k=32",
    "NOLA r=8 k=64",
    "LoRA r=1",
    "LoRA r=2",
    "LoRA r=4",
    "LoRA r=8",
    "LoRA r=1, first layer only",
    "random pairs",
    "biases",
)
ARMS = (
    *MAIN,
    *(f"NOLA r={r} k={k}" for r in (8, 4, 2, 1) for k in (16, 32, 64, 128) if r < 8 or k == 128),
    "LoRA r=1, first and last layer",
    "NOLA r=8 k=32, one row repeated",
    "NOLA r=8 k=32, no A₀",
    "NOLA r=8 k=32, no A₀, α/√n",
    "random core",
    "random matrices",
    *(f"NOLA r=8 k=32, {bits} bits in training" for bits in (4, 3, 2)),
)


class RandomPairs(AdaptedLinear):
    """ΔW = U diag(d) Vᵀ with frozen random orthonormal U and V, of rank min(m, n); d is trained, from 0."""

    adapter_names = ("d",)

    def __init__(self, base: nn.Module, *, generator: torch.Generator) -> None:
        m, n = weight_of(base).shape
        super().__init__(base)
        self.rank = min(m, n)
        for name, size in (("U", m), ("V", n)):
            Q = torch.linalg.qr(torch.randn(size, self.rank, generator=generator)).Q
            self.register_buffer(name, Q)
        self.d = nn.Parameter(torch.zeros(self.rank))

    def delta_weight(self) -> Tensor:
        """Return U diag(d) Vᵀ."""
        return (self.U * self.d) @ self.V.T  # type: ignore[operator]


class RandomMixture(AdaptedLinear):
    """ΔW = Σ cᵢMᵢ with 64 frozen random matrices of norm 1; c is trained, from 0.

    core: M = uₐv_bᵀ with 8 random orthonormal u and 8 v, so ΔW = UCVᵀ with C (8, 8). Else M has normal entries.
    """

    adapter_names = ("c",)

    def __init__(self, base: nn.Module, *, core: bool, generator: torch.Generator) -> None:
        m, n = weight_of(base).shape
        super().__init__(base)
        if core:
            U, V = (torch.linalg.qr(torch.randn(size, 8, generator=generator)).Q for size in (m, n))
            M = torch.einsum("ma,nb->abmn", U, V).flatten(0, 1)
        else:
            M = torch.randn(64, m, n, generator=generator) / (m * n) ** 0.5
        self.register_buffer("M", M)
        self.c = nn.Parameter(torch.zeros(64))

    def delta_weight(self) -> Tensor:
        """Return Σ cᵢMᵢ."""
        return torch.tensordot(self.c, self.M, dims=1)


def adapt(model: nn.Module, name: str, generator: torch.Generator) -> None:
    """Adapt the network in place as the arm's name says. LoRA and NOLA have s = 2."""
    kind, rank, bases = name.split()[0], re.search(r"r=(\d+)", name), re.search(r"k=(\d+)", name)
    if kind == "biases":
        for path, p in model.named_parameters():
            p.requires_grad_("bias" in path)
        return
    bits = re.search(r"(\d) bits", name)

    def factory(linear: nn.Linear) -> nn.Module:
        if rank is None and name == "random pairs":
            return RandomPairs(linear, generator=generator)
        if rank is None:
            return RandomMixture(linear, core=name == "random core", generator=generator)
        r = min(int(rank[1]), *linear.weight.shape)
        if bases is None:
            return LoRALinear(linear, r, alpha=2 * r, generator=generator)
        options: dict[str, Any] = {"bases": int(bases[1]), "keep": True, "generator": generator}
        if "repeated" in name:  # all r rows of A alike, all columns of B: the update of rank 1, r times
            return NOLALinear(linear, 1, scale=2.0 * r, **options)
        start = "random" if "no A₀" in name else "offset"
        layer = NOLALinear(linear, r, start=start, bits=int(bits[1]) if bits else None, **options)
        if "α/√n" in name:  # the start of A is then as large as A₀
            layer.alpha.data /= linear.in_features**0.5
        return layer

    layers = {"first layer only": r"^layers\.0$", "first and last layer": r"^layers\.[02]$"}
    replace_linears(model, layers.get(name.partition(", ")[2], r"^layers\."), factory)


def task(negative: bool) -> Arrays:
    """The digits, turned or negative."""
    if not negative:
        return digits(rotate=90)
    data = digits()
    return replace(data, x_train=0.4 - data.x_train, x_valid=0.4 - data.x_valid, x_test=0.4 - data.x_test)


@torch.no_grad()
def measured(model: nn.Module, data: Arrays, prefix: str = "") -> dict[str, float]:
    """Loss of validation images, by which rates are chosen, and of test images."""
    valid, test = model(data.x_valid), model(data.x_test)
    return {
        f"{prefix}valid": F.cross_entropy(valid, data.y_valid).item(),
        f"{prefix}loss": F.cross_entropy(test, data.y_test).item(),
        f"{prefix}accuracy": (test.argmax(1) == data.y_test).double().mean().item(),
    }


def run(name: str, lr: float, seed: int, *, negative: bool, steps: int) -> dict[str, Any]:
    """Train one arm with Adam on batches of 64 images, the rate falling linearly to 0."""
    data, model = task(negative), pretrained_on_digits()
    adapt(model, name, torch.Generator().manual_seed(seed))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    batches = array_batches(data.x_train, data.y_train, batch=64, seed=seed)
    try:
        schedule = linear_decay(steps)
        train(model, batches, classification_loss, optimizer, steps=steps, schedule=schedule, progress=False)
    except FloatingPointError:
        return {"error": "diverged"}
    found = {"trainable": numel(trained), **measured(model, data)}
    if "training" not in name and name.startswith(("NOLA", "LoRA")):
        exact = [p.detach().clone() for p in trained]
        for bits in BITS:
            for p, value in zip(trained, exact):
                p.data.copy_(rounded(value, bits))
            found |= measured(model, data, f"{bits} bits ")
    return {k: round(v, 5) for k, v in found.items()}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("turned", "negative"))
    torch.set_num_threads(1)
    steps = 10 if args.tiny else 200
    for part in args.part:
        what = "turned by 90 degrees" if part == "turned" else "with light and dark exchanged"
        setting = (
            f"MLP 64-128-128-10, pretrained on 1,000 upright digits, learns the same {what}; {steps} steps of Adam"
        )
        runs = Runs(args.out, part, setting=setting, seconds=args.seconds)
        for name in ARMS if part == "turned" else MAIN:
            if re.search(args.only, name):
                for lr in RATES[name.split()[0]]:
                    for seed in SEEDS[:1] if args.tiny else SEEDS:
                        measure = partial(run, name, lr, seed, negative=part == "negative", steps=steps)
                        runs.row({"method": name, "lr": lr, "seed": seed}, measure)


if __name__ == "__main__":
    main()
