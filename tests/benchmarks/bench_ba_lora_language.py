"""Two higher rates for the small language of `bench_ba_lora_small.py`: the highest of three was best for all arms.

    python tests/benchmarks/bench_ba_lora_language.py --out book/results/ba_lora_small.json --device cpu

The rows join those of the other script.
"""

import re
from functools import partial

import torch
from bench_ba_lora_small import WORDS, jobs, run_language
from common import Runs, arguments


def main() -> None:
    """Run all arms."""
    args = arguments(__doc__ or "", ("language",))
    torch.set_num_threads(1)
    share = 0.05 if args.tiny else 1.0
    setting = WORDS["language"].format(round(share * 100))
    runs = Runs(args.out, "language", setting=setting, seconds=args.seconds)
    for bed, _, arms, seeds in jobs("language"):
        for name, settings in arms.items():
            for label, s in settings.items():
                for lr in (0.02, 0.04) if re.search(args.only, name) else ():
                    for seed in list(seeds)[:1] if args.tiny else seeds:
                        key = {"bed": bed, "name": name, "method": f"{name}, {label}", "lr": lr, "seed": seed}
                        runs.row(key, partial(run_language, s, lr, seed, share=share))


if __name__ == "__main__":
    main()
