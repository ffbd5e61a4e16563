"""Is it luck? Arms on the five planted tasks at one rate each, from six other draws of their factors (CPU).

python tests/benchmarks/bench_increlora_draws.py --out book/results/increlora_small.json --device cpu
"""

import re
from functools import partial
from typing import Any

import torch
from bench_increlora_small import SEEDS, baseline, bed, grown, result
from common import Runs, arguments

from lowrank_ref.ranks.growing_linear import grown_ranks

#: Arm -> (rate, what differs from IncreLoRA, or None for a rival).
ARMS: dict[str, tuple[float, dict[str, Any] | None]] = {
    "IncreLoRA": (0.08, {}),
    "no orthogonality": (0.01, {"weight": 0.0}),
    "reserve redrawn": (0.08, {"chooser": "redrawn"}),
    "gradient": (0.08, {"chooser": "gradient"}),
    "LoRA r=12, cut": (0.01, None),
    "cut after 0.5, finish": (0.02, None),
}


def run(name: str, task: int, draw: int, steps: int | None) -> dict[str, Any]:
    """Train an arm on a task from a draw."""
    (lr, options), work = ARMS[name], bed("planted", task, steps)
    if options is None:
        return result(work, baseline(work, name, lr, 100 * draw + task, []))
    model, _ = grown(work, lr, 100 * draw + task, **options)
    return result(work, model) | {"active": list(grown_ranks(model).values())}


def main() -> None:
    """Run what is asked for."""
    args = arguments(__doc__ or "", ("draws",))
    torch.set_num_threads(1)
    runs = Runs(args.out, "draws", setting="as planted, six draws a task", seconds=args.seconds)
    for name in ARMS:
        for draw in range(1, 2 if args.tiny else 7):
            for task in SEEDS[:1] if args.tiny else SEEDS:
                if re.search(args.only, name):
                    measure = partial(run, name, task, draw, 60 if args.tiny else None)
                    runs.row({"method": name, "seed": task, "draw": draw}, measure)


if __name__ == "__main__":
    main()
