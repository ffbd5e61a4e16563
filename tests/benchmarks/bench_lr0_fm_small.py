"""LR-TK0 on digits: tokens, their controls, and other ways to train as few numbers by the same loss.

    python tests/benchmarks/bench_lr0_fm_small.py --out book/results/lr0_fm_small.json

Every arm tries four rates with seeds 0 and 1; the rate whose answers agree most with those of the frozen model on
sharp validation pictures (no label is used) runs with seeds 2, 3 and 4 too. A seed makes its own frozen model. On a
core a row takes 3 s, a frozen model 10 s.
"""

import copy
import functools
import re
from typing import Any

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.accounting import numel
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds import shapes
from lowrank_ref.lab.beds.blurred_digits import (
    BUCKETS,
    SHAPE,
    SharpViT,
    agreement,
    distil,
    resolution_accuracies,
    sharp_vit,
)
from lowrank_ref.robustness import LRTokens, add_lr_tokens, cosine_distance

MIDDLE, LOW, HIGH = (1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2, 1e-1)
ARMS = {
    "tokens": MIDDLE, "tokens, sharp only": MIDDLE, "tokens, one scale": MIDDLE, "tokens, cosine": MIDDLE,
    "tokens, first half": MIDDLE, "tokens, last half": MIDDLE, "tokens, last feature": HIGH, "one row a layer": HIGH,
    "LoRA, queries and values": MIDDLE, "LoRA, all matrices": MIDDLE, "biases and norms": MIDDLE,
    "map of the feature": HIGH, "last block": LOW, "all": LOW, "tokens, from shapes": MIDDLE,
    "LoRA, from shapes": MIDDLE,
}  # fmt: skip
CHOOSING, SEEDS, STEPS = (0, 1), range(5), 100


@functools.cache
def base_of(seed: int, steps: int) -> SharpViT:
    """The frozen model of a seed."""
    return sharp_vit(seed, steps=steps)


@functools.cache
def rendered() -> Tensor:
    """Gray pictures of shapes, of the size of the digits."""
    x = shapes(4000, side=28, generator=torch.Generator().manual_seed(0))
    return (x.mean(1, keepdim=True) + 1) / 2


class Product(nn.Module):
    """T = U W of a rank, started from normal U and W so that the entries of T have standard deviation 0.02."""

    def __init__(self, rank: int, generator: torch.Generator):
        super().__init__()
        self.rank, self.generator = rank, generator

    def forward(self, U: Tensor, W: Tensor) -> Tensor:
        """Return T."""
        return U @ W

    def right_inverse(self, T: Tensor) -> tuple[Tensor, Tensor]:
        """Draw U and W; of T only the shape counts."""
        std, (places, dim) = (0.02 / self.rank**0.5) ** 0.5, T.shape
        U = std * torch.randn(places, self.rank, generator=self.generator)
        return U, std * torch.randn(self.rank, dim, generator=self.generator)


def with_biases(model: Any) -> nn.Module:
    """Give every matrix of the blocks a bias, 0 at first; these and the gains of all norms train."""
    for part in model.blocks.modules():
        if isinstance(part, nn.Linear):
            part.bias = nn.Parameter(torch.zeros(part.out_features))
    for part in model.modules():
        if isinstance(part, nn.RMSNorm):
            part.requires_grad_(True)
    return model


def prepare(arm: str, model: Any, seed: int) -> nn.Module:
    """Add what trains."""
    g = torch.Generator().manual_seed(500 + seed)
    if arm == "all":
        return model.requires_grad_(True)
    if arm == "last block":
        model.blocks[-1].requires_grad_(True)
        return model
    if arm == "biases and norms":
        return with_biases(model)
    if arm == "map of the feature":
        model.head = nn.Linear(32, 32)
        nn.init.eye_(model.head.weight), nn.init.zeros_(model.head.bias)
        return model
    if arm.startswith("LoRA"):
        everywhere = arm == "LoRA, all matrices"
        pattern, rank = (r"^blocks\.", 1) if everywhere else (r"attn\.(q|v)$", 5)
        return replace_linears(model, pattern, lambda base: LoRALinear(base, rank, alpha=2 * rank, generator=g))
    blocks, embed = {
        "tokens, first half": (r"^blocks\.[01]$", None), "tokens, last half": (r"^blocks\.[23]$", None),
        "tokens, last feature": ("^norm$", None),
    }.get(arm, (r"^blocks\.\d$", "^embed$"))  # fmt: skip
    places, std = 1 if arm == "one row a layer" else 16, 0.0 if arm == "tokens, from zero" else 0.02
    model = add_lr_tokens(model, blocks, embed=embed, places=places, dim=32, std=std, generator=g)
    if arm == "tokens, factored":
        for part in [part for part in model.modules() if isinstance(part, LRTokens)]:
            parametrize.register_parametrization(part, "T", Product(2, g))
    return model


def measure(base: SharpViT, model: nn.Module) -> dict[str, Any]:
    """Return accuracies, and how often answers differ from those on sharp pictures."""
    accuracies = {f"at {side}": round(a, 4) for side, a in resolution_accuracies(base, model).items()}
    return {"valid disagreement": round(1 - agreement(base, model), 4), **accuracies}


def adapt(arm: str, lr: float, seed: int, steps: int, pretraining: int) -> dict[str, Any]:
    """Train one arm once."""
    base = base_of(seed, pretraining)
    model = prepare(arm, copy.deepcopy(base.model), seed)
    trainable = numel([p for p in model.parameters() if p.requires_grad])
    buckets = {
        "tokens, sharp only": (), "tokens, one scale": (BUCKETS[0],) * 3, "tokens, middle scale": (BUCKETS[1],) * 3,
    }.get(arm, BUCKETS)  # fmt: skip
    options: dict[str, Any] = {"pictures": rendered()} if arm.endswith("from shapes") else {}
    if arm == "tokens, cosine":
        options["distance"] = cosine_distance
    try:
        distil(base, model, lr=lr, seed=seed, steps=steps, buckets=buckets, **options)
    except FloatingPointError as error:
        return {"error": f"FloatingPointError: {error}"}
    return {"trainable": trainable, **measure(base, model)}


def frozen(seed: int, pretraining: int) -> dict[str, Any]:
    """The frozen model."""
    base = base_of(seed, pretraining)
    return {"trainable": 0, **measure(base, base.model)}


def best_rate(rows: list[dict[str, Any]], arm: str) -> float:
    """The rate with the lowest mean disagreement over the choosing seeds."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["method"] == arm and row["seed"] in CHOOSING:
            found.setdefault(row["lr"], []).append(row.get("valid disagreement", 1.0))
    return min(sorted(found), key=lambda lr: sum(found[lr]))


def main() -> None:
    """Run everything."""
    args = arguments(__doc__ or "", ("digits",))
    torch.set_num_threads(1)
    steps, pretraining = (2, 2) if args.tiny else (STEPS, 250)
    setting = (
        f"ViT {SHAPE}, 4x4 patches of 7x7 pixels, MNIST digits; frozen after {pretraining} steps on sharp ones; "
        f"{steps} steps of 16 pictures, AdamW, cosine to a tenth; sides {BUCKETS}; 400 digits validate, 600 test"
    )
    runs = Runs(args.out, "digits", setting=setting, seconds=args.seconds)
    for seed in CHOOSING[:1] if args.tiny else SEEDS:
        key = {"method": "frozen", "lr": 0.0, "seed": seed}
        runs.row(key, lambda seed=seed: frozen(seed, pretraining))
        for arm, rates in ARMS.items():
            if not re.search(args.only, arm):
                continue
            rates = rates[:1] if args.tiny else rates if seed in CHOOSING else (best_rate(runs.rows, arm),)
            for lr in rates:
                key = {"method": arm, "lr": lr, "seed": seed}
                runs.row(key, lambda a=arm, lr=lr, seed=seed: adapt(a, lr, seed, steps, pretraining))


if __name__ == "__main__":
    main()
