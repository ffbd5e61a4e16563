"""Controls of LoRA-Squeeze's chapter: which part of a squeeze gives its gain (CPU, a quarter of an hour on a core).

    python tests/benchmarks/bench_lora_squeeze_controls.py --out book/results/lora_squeeze_controls.json

A squeeze cuts the rank *and* makes Adam start again. Here are arms that do one without the other: cuts that carry the
moments along, restarts of a part of Adam's state, and Adam that forgets sooner. Network, tasks, rates and seeds are
those of `bench_lora_squeeze_small.py`, and the chapter joins the rows of both.
"""

import re
from functools import partial

import torch
from bench_lora_squeeze_small import RATES, SEEDS, STEPS, Recipe, halves, row
from common import Runs, arguments

CARRY = (("moments", "carry"),)
EARLY = (0.03,)


def causes(k: int) -> dict[str, Recipe]:
    """What a squeeze does at 3 % of the steps, part by part."""
    parts = ("first moments", "A", "B")
    return {
        f"16 to k at 3 %, carried, k={k}": Recipe(16, ((0.03, k),), options=CARRY),
        f"balance at 3 %, carried, k={k}": Recipe(k, ((0.03, k),), options=CARRY),
        **{f"restart at 3 %, {part} only, k={k}": Recipe(k, restarts=EARLY, forgets=part) for part in parts},
        f"direct, β₂ = 0.99, k={k}": Recipe(k, betas=(0.9, 0.99)),
        f"direct, β₂ = 0.9, k={k}": Recipe(k, betas=(0.9, 0.9)),
    }


def others(k: int) -> dict[str, Recipe]:
    """Controls of single tables: PEFT's split alone, warm arms at 30 % and at the ends of the stages."""
    stages = tuple(t for t, _ in halves(k))
    return {
        f"16 to k at 30 %, left, k={k}": Recipe(16, ((0.3, k),), options=(("split", "left"),)),
        f"rate again at 30 %, warm, k={k}": Recipe(k, warmup=30, again=(0.3,)),
        f"restart at 30 %, warm, k={k}": Recipe(k, restarts=(0.3,), warmup=30, again=(0.3,)),
        f"restart each stage, warm, k={k}": Recipe(k, restarts=stages, warmup=30, again=stages),
    }


#: Task -> name of an arm -> its recipe.
ARMS = {
    "turned": {
        **{name: recipe for k in (1, 2, 4) for name, recipe in causes(k).items()},
        **{name: recipe for k in (1, 4) for name, recipe in others(k).items()},
    },
    "relabelled": {f"16 to k at 3 %, carried, k={k}": Recipe(16, ((0.03, k),), options=CARRY) for k in (1, 4)},
}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", tuple(ARMS))
    torch.set_num_threads(1)
    steps = 10 if args.tiny else STEPS
    for task in args.part:
        setting = f"digits {task}, as in lora_squeeze_small; Adam, {steps} steps of 64 images, controls"
        runs = Runs(args.out, task, setting=setting, seconds=args.seconds)
        for name, recipe in ARMS[task].items():
            for lr in RATES[:1] if args.tiny else RATES:
                for seed in SEEDS[:1] if args.tiny else SEEDS:
                    if re.search(args.only, name):
                        key = {"method": name, "lr": lr, "seed": seed}
                        runs.row(key, partial(row, recipe, task, lr, seed, steps))


if __name__ == "__main__":
    main()
