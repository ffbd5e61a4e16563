"""Two more rates, one at each end, for the arms of IncreLoRA's ablation: some were best at the last one tried (CPU).

python tests/benchmarks/bench_increlora_rates.py --out book/results/increlora_small.json --device cpu
"""

import re
from functools import partial

import torch
from bench_increlora_small import SEEDS, run
from common import Runs, arguments

RATES = (0.0025, 0.32)
ARMS = ("IncreLoRA", "no orthogonality", "no advance", "neither", "reserve redrawn")


def main() -> None:
    """Run what is asked for."""
    args = arguments(__doc__ or "", ("ablation",))
    torch.set_num_threads(1)
    setting = "as planted, the rates 0.0025 and 0.32"
    runs = Runs(args.out, "ablation", setting=setting, seconds=args.seconds)
    for name in ARMS:
        for lr in RATES:
            for seed in SEEDS[:1] if args.tiny else SEEDS:
                if re.search(args.only, name):
                    measure = partial(run, "planted", name, lr, seed, 60 if args.tiny else None)
                    runs.row({"method": name, "lr": lr, "seed": seed}, measure)


if __name__ == "__main__":
    main()
