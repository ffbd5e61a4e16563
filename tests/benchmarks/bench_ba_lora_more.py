"""What `bench_ba_lora_small.py` left open: a fifth, higher rate where the fourth was best, and the marked pretraining.

    python tests/benchmarks/bench_ba_lora_more.py --out book/results/ba_lora_small.json --device cpu

skew, contrast: the fifth rate, for the arms whose best rate was the highest and for those they are compared with. wrong
and mark: the arms that the chapter shows, at the upper three rates. The rows join those of the other script.
"""

import re
from functools import partial

import torch
from bench_ba_lora_small import RATES, WORDS, jobs, run_digits
from common import Runs, arguments

HIGHER = {"PiSSA": 0.04, "LoRA": 0.08}
#: Part -> its arms.
ARMS = {
    "skew": r"PiSSA|CR|all|LoRA.*|balanced, CR|replay",
    "contrast": r".*",
    "wrong": r"PiSSA|CR",
    "mark": r"PiSSA|LoRA|CR, strong|CR, clean teacher, strong",
}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", tuple(ARMS))
    torch.set_num_threads(1)
    share = 0.05 if args.tiny else 1.0
    for part in args.part:
        runs = Runs(args.out, part, setting=WORDS[part].format(round(share * 200)), seconds=args.seconds)
        for bed, options, arms, seeds in jobs(part):
            for name, settings in arms.items():
                if not (re.fullmatch(ARMS[part], name) and re.search(args.only, f"{bed}: {name}")):
                    continue
                for label, s in settings.items():
                    for lr in (HIGHER[s.kind],) if part in ("skew", "contrast") else RATES[s.kind][1:]:
                        for seed in list(seeds)[:1] if args.tiny else seeds:
                            key = {"bed": bed, "name": name, "method": f"{name}, {label}", "lr": lr, "seed": seed}
                            runs.row(key, partial(run_digits, s, options, lr, seed, share=share))


if __name__ == "__main__":
    main()
