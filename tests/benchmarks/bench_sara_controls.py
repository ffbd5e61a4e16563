"""Two controls of SaRA's experiment: a network without weight decay, and finer strengths of two penalties.

    python tests/benchmarks/bench_sara_controls.py --out book/results/sara_controls.json

Arms, bed and training are those of `bench_sara_small.py`, part "many"; 0.3 to 1 s a row on a CPU core.
"""

import re
from functools import partial
from typing import Any

import torch
from bench_sara_small import ARMS, DENSE, LORA, RULE, SEEDS, SPARSE, STEPS, Arm, full, lora, measured, penalised
from common import Runs, arguments

from lowrank_ref.lab.beds.two_tasks import two_tasks

PARTS = {
    "no decay": {
        "smallest": Arm(RULE["smallest"], SPARSE[:6]),
        "random": Arm(RULE["random"], SPARSE[:6]),
        "all weights": Arm(full, DENSE[:6]),
        "LoRA, equal count": Arm(lora, LORA[1:7]),
    },
    "strengths": {
        **penalised("smallest", RULE["smallest"], "nuclear on P", (0.002, 0.0045), SPARSE[2:7]),
        **penalised("smallest", RULE["smallest"], "L2", (0.002, 0.0045), SPARSE[2:7]),
    },
}


def without_decay(arm: Arm, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one arm on a network that was pretrained without weight decay."""
    found = two_tasks(arm.adapt, lr, seed, steps=steps, decay=0.0)
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Run the parts asked for; `--only` is matched with "part, method, seed 3"."""
    args = arguments(__doc__ or "", tuple(PARTS))
    torch.set_num_threads(1)
    assert not PARTS["strengths"].keys() & ARMS["many"].keys()  # rows of both files are joined
    steps = 10 if args.tiny else STEPS
    for part in args.part:
        decay = "0" if part == "no decay" else "0.5"
        setting = (
            f"MLP 64-256-256-10, pretrained on 1,000 upright digits (800 steps of AdamW, decay {decay}), learns 1,000 "
            f"turned ones; Adam, {steps} steps of 64 images, the rate falling linearly to 0"
        )
        runs = Runs(args.out, part, setting=setting, seconds=args.seconds)
        for seed in SEEDS[:1] if args.tiny else SEEDS:
            for name, arm in PARTS[part].items():
                if re.search(args.only, f"{part}, {name}, seed {seed}"):
                    for lr in arm.rates[:1] if args.tiny else arm.rates:
                        row = without_decay if part == "no decay" else partial(measured, images=1000)
                        runs.row(
                            {"method": name, "lr": lr, "seed": seed}, partial(row, arm, steps=steps, lr=lr, seed=seed)
                        )


if __name__ == "__main__":
    main()
