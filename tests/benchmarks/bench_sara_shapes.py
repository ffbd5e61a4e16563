"""SaRA on a diffusion model that is small enough for a CPU core: which weights, at equal skill in the new style.

    python tests/benchmarks/bench_sara_shapes.py --out book/results/sara_shapes.json

A transformer of 0.15 million weights takes noise off filled shapes of 16x16 pixels (trained for two minutes, and kept
beside the results), then learns 64 outlined ones; loss on fresh pictures of both, five rates and seeds, 5 s a row.
"""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_sara import BLOCKS, adapt, in_blocks, seeded
from common import Runs, arguments
from torch import nn

from lowrank_ref.adapters.weight_selection import RULES, pick_entries
from lowrank_ref.lab.beds.shapes import Denoiser, denoising_loss, shapes

SEEDS, DENSITY = (0, 1, 2, 3, 4), 0.2
DOUBLING = tuple(2**i for i in range(5))
RATES = {
    **{f"{rule} 20 %": tuple(2.5e-4 * k for k in DOUBLING) for rule in RULES},
    "all weights": tuple(5e-5 * k for k in DOUBLING),
    "LoRA, equal count": tuple(1.25e-4 * k for k in DOUBLING),
}


def pretrained(path: Path, steps: int) -> Denoiser:
    """Train on filled shapes with AdamW, decay 0.1; or load what an earlier call has trained."""
    model = Denoiser(16, 4, dim=64, layers=3, heads=4, generator=torch.Generator().manual_seed(0))
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    draw = seeded(1, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 2 - 2 * i / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        denoising_loss(model, shapes(64, side=16, generator=draw), generator=draw).backward()
        optimizer.step()
        schedule.step()
    torch.save(model.state_dict(), path)
    return model


@torch.no_grad()
def losses(model: nn.Module, count: int) -> dict[str, float]:
    """Return the losses on filled ("old") and outlined ("new") shapes; "valid" on others, to choose rates by."""
    found = {}
    for name, outlined, seed in (("old", False, 7), ("new", True, 8), ("old valid", False, 9), ("new valid", True, 10)):
        x = shapes(count, outlined=outlined, side=16, generator=seeded(seed, "cpu"))
        found[name] = round(float(denoising_loss(model, x, generator=seeded(seed, "cpu"))), 5)
    return found


def styled(base: nn.Module, method: str, lr: float, seed: int, steps: int, count: int) -> dict[str, Any]:
    """Learn outlined shapes from 64 pictures: Adam, the rate falling linearly to 0."""
    model, x = copy.deepcopy(base), shapes(64, outlined=True, side=16, generator=seeded(20, "cpu"))
    params, draw = adapt(model, method, seed, DENSITY), seeded(30 + seed, "cpu")
    optimizer = torch.optim.Adam(params, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    for _ in range(steps):
        optimizer.zero_grad()
        denoising_loss(model, x[torch.randint(64, (32,), generator=draw)], generator=draw).backward()
        optimizer.step()
        schedule.step()
    return {**losses(model, count), "trainable": sum(p.numel() for p in params)}


def zeroed(base: nn.Module, rule: str, share: float, count: int) -> dict[str, Any]:
    """Set a share of the weights of every matrix of the blocks to zero."""
    model = copy.deepcopy(base)
    for W in in_blocks(model).values():
        places = pick_entries(W.detach(), round(share * W.numel()), rule, seeded(3, "cpu"))
        W.data.view(-1)[places.long()] = 0.0
    return losses(model, count)


def main() -> None:
    """Run the parts asked for; `--only` is matched with the method or rule."""
    args = arguments(__doc__ or "", ("zero", "style"))
    torch.set_num_threads(1)
    steps, count = (5, 16) if args.tiny else (200, 1024)
    kept = args.out.with_name("sara_shapes_pretrained.pt")
    base = pretrained(kept, 5 if args.tiny else 4000)
    setting = (
        "a transformer of 0.15 million weights that takes noise off filled shapes of 16x16 pixels, 4,000 AdamW steps "
        f"of 64 pictures, decay 0.1; weights of {BLOCKS} only; mean squared error of the noise, 1,024 pictures"
    )
    if "zero" in args.part:
        runs = Runs(args.out, "zero", setting=setting, seconds=args.seconds)
        for rule in RULES:
            for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6):
                if re.search(args.only, rule):
                    runs.row({"rule": rule, "share": share}, partial(zeroed, base, rule, share, count))
    if "style" in args.part:
        more = "; it learns 64 outlined shapes by 200 Adam steps of 32, the rate falling linearly to 0"
        runs = Runs(args.out, "style", setting=setting + more, seconds=args.seconds)
        for seed in SEEDS[:1] if args.tiny else SEEDS:
            for method, rates in RATES.items():
                for lr in rates[:1] if args.tiny else rates:
                    if re.search(args.only, method):
                        key = {"method": method, "lr": lr, "seed": seed}
                        runs.row(key, partial(styled, base, method, lr, seed, steps, count))


if __name__ == "__main__":
    main()
