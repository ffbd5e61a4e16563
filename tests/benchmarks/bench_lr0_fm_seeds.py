"""LR-TK0 and its rivals on digits, the shorter way: seed 0 tries all rates, four more seeds the one that it chose.

    python tests/benchmarks/bench_lr0_fm_seeds.py --out book/results/lr0_fm_small.json

It goes on where `bench_lr0_fm_small.py` was stopped, with eleven of its arms, in its part of the file.
"""

import json
from typing import Any

import torch
from bench_lr0_fm_small import ARMS, SEEDS, STEPS, adapt, frozen
from common import Runs, arguments

from lowrank_ref.lab.beds.blurred_digits import sharp_vit  # noqa: F401  what the rows depend on
from lowrank_ref.robustness.lr0_fm import MultiScaleDistillation  # noqa: F401

KEPT = (
    "tokens", "tokens, sharp only", "LoRA, queries and values", "biases and norms", "tokens, last feature",
    "one row a layer", "map of the feature", "tokens, first half", "tokens, last half", "tokens, cosine",
    "tokens, one scale",
)  # fmt: skip


def chosen_rate(rows: list[dict[str, Any]], arm: str) -> float:
    """The rate with the lowest mean disagreement, over the seeds that every rate has."""
    runs = {
        lr: {row["seed"]: row.get("valid disagreement", 1.0) for row in rows if (row["method"], row["lr"]) == (arm, lr)}
        for lr in ARMS[arm]
    }
    common = set.intersection(*map(set, runs.values()))
    return min(runs, key=lambda lr: sum(runs[lr][seed] for seed in sorted(common)))


def main() -> None:
    """Run the seeds that are missing."""
    args = arguments(__doc__ or "", ("digits",))
    torch.set_num_threads(1)
    steps, pretraining = (2, 2) if args.tiny else (STEPS, 250)
    setting = json.loads(args.out.read_text(encoding="utf-8"))["digits"]["setting"]
    runs = Runs(args.out, "digits", setting=setting, seconds=args.seconds)
    for seed in SEEDS:
        runs.row({"method": "frozen", "lr": 0.0, "seed": seed}, lambda seed=seed: frozen(seed, pretraining))
        for arm in KEPT:
            for lr in ARMS[arm] if seed == 0 else (chosen_rate(runs.rows, arm),):
                key = {"method": arm, "lr": lr, "seed": seed}
                runs.row(key, lambda a=arm, lr=lr, seed=seed: adapt(a, lr, seed, steps, pretraining))


if __name__ == "__main__":
    main()
