"""More arms on digits: a lower rate where the lowest was best, other scales, other tokens, all weights.

    python tests/benchmarks/bench_lr0_fm_more.py --out book/results/lr0_fm_small.json

It goes on where `bench_lr0_fm_seeds.py` ended. Seed 0 tries all rates, four more seeds the one that it chose.
"""

import json

import torch
from bench_lr0_fm_small import MIDDLE, SEEDS, STEPS, adapt
from common import Runs, arguments

from lowrank_ref.lab.beds.blurred_digits import sharp_vit  # noqa: F401  what the rows depend on
from lowrank_ref.robustness.lr0_fm import MultiScaleDistillation  # noqa: F401

MORE = {
    "one row a layer": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "map of the feature": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "tokens, middle scale": MIDDLE, "tokens, factored": (3e-3, 1e-2, 3e-2), "all": (3e-4, 1e-3, 3e-3),
    "tokens, from zero": (3e-3,),
}  # fmt: skip


def main() -> None:
    """Run the arms one after the other."""
    args = arguments(__doc__ or "", ("digits",))
    torch.set_num_threads(1)
    steps, pretraining = (2, 2) if args.tiny else (STEPS, 250)
    setting = json.loads(args.out.read_text(encoding="utf-8"))["digits"]["setting"]
    runs = Runs(args.out, "digits", setting=setting, seconds=args.seconds)
    for arm, rates in MORE.items():
        missed = {}
        for lr in rates:
            key = {"method": arm, "lr": lr, "seed": 0}
            row = runs.row(key, lambda a=arm, lr=lr: adapt(a, lr, 0, steps, pretraining))
            missed[lr] = row.get("valid disagreement", 1.0)
        lr = min(rates, key=missed.__getitem__)
        for seed in SEEDS[1:]:
            key = {"method": arm, "lr": lr, "seed": seed}
            runs.row(key, lambda a=arm, lr=lr, seed=seed: adapt(a, lr, seed, steps, pretraining))


if __name__ == "__main__":
    main()
