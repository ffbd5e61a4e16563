"""Lower rates for Post-Squeeze and direct training, beside the six of another script (CPU, six minutes on a core).

    python tests/benchmarks/bench_lora_squeeze_post.py --out book/results/lora_squeeze_post.json

What is cut after the last step may be best trained at a lower rate than those of `bench_lora_squeeze_small.py`.
Network, task and training are the same, and the chapter joins the rows of both. The control of the larger target ranks,
a restart at the target rank, runs at all rates here.
"""

import re
from functools import partial

import torch
from bench_lora_squeeze_small import RATES, SEEDS, STEPS, Recipe, row
from common import Runs, arguments

LOWER = (0.0003, 0.0006, 0.00125, 0.0025)
ARMS = {
    **{f"direct, k={k}": Recipe(k) for k in (1, 2, 4, 8, 16)},
    **{f"Post 16 to k, k={k}": Recipe(16, ((1.0, k),)) for k in (1, 2, 4, 8)},
    **{f"Post 64 to k, k={k}": Recipe(64, ((1.0, k),)) for k in (1, 4, 8, 16)},
    **{f"restart at 3 %, k={k}": Recipe(k, restarts=(0.03,)) for k in (8, 16)},
}
#: Arms that the other script has not run.
ALL_RATES = ("Post 64 to k, k=1", "Post 64 to k, k=4", "restart at 3 %, k=8", "restart at 3 %, k=16")


def main() -> None:
    """Run all arms."""
    args = arguments(__doc__ or "", ("post",))
    torch.set_num_threads(1)
    steps = 10 if args.tiny else STEPS
    setting = f"digits turned, as in lora_squeeze_small; Adam, {steps} steps of 64 images, lower rates"
    runs = Runs(args.out, "post", setting=setting, seconds=args.seconds)
    for name, recipe in ARMS.items():
        rates = (*LOWER, *RATES) if name in ALL_RATES else LOWER
        for lr in rates[:1] if args.tiny else rates:
            for seed in SEEDS[:1] if args.tiny else SEEDS:
                if re.search(args.only, name):
                    key = {"method": name, "lr": lr, "seed": seed}
                    runs.row(key, partial(row, recipe, "turned", lr, seed, steps))


if __name__ == "__main__":
    main()
