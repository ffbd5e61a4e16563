"""A fifth rate for tokens and LoRA on digits: LoRA's best was the highest tried.

    python tests/benchmarks/bench_lr0_fm_rates.py --out book/results/lr0_fm_small.json

It goes on where `bench_lr0_fm_seeds.py` ended, and runs the other seeds too if seed 0 prefers the new rate.
"""

import json

import torch
from bench_lr0_fm_small import ARMS, SEEDS, STEPS, adapt
from common import Runs, arguments

from lowrank_ref.lab.beds.blurred_digits import sharp_vit  # noqa: F401  what the rows depend on
from lowrank_ref.robustness.lr0_fm import MultiScaleDistillation  # noqa: F401

RATE, MORE = 0.1, ("tokens", "LoRA, queries and values")


def main() -> None:
    """Run one more rate."""
    args = arguments(__doc__ or "", ("digits",))
    torch.set_num_threads(1)
    setting = json.loads(args.out.read_text(encoding="utf-8"))["digits"]["setting"]
    runs = Runs(args.out, "digits", setting=setting, seconds=args.seconds)
    for arm in MORE:
        for seed in SEEDS:
            key = {"method": arm, "lr": RATE, "seed": seed}
            row = runs.row(key, lambda a=arm, seed=seed: adapt(a, RATE, seed, STEPS, 250))
            first = [r for r in runs.rows if r["method"] == arm and r["seed"] == 0 and r["lr"] in ARMS[arm]]
            if min(r["valid disagreement"] for r in first) <= row.get("valid disagreement", 1.0):
                break


if __name__ == "__main__":
    main()
