"""What the chapter on SLTrain is too short for, on its small language (CPU, about eight minutes).

    python tests/benchmarks/bench_sltrain_small.py --out book/results/sltrain_small.json

rates: each method's learning rate, tuned on seed 0. others: two methods that the chapter does not run itself, at their
best rates. shares: a fixed budget of numbers, split between BA and S in seven ways. long: four times as many steps.
"""

from functools import partial
from typing import Any

import torch
from common import arguments, block_groups, save
from torch import nn

from lowrank_ref.core.layers import replace_linears
from lowrank_ref.core.linalg import svd
from lowrank_ref.lab.beds import markov_language, markov_pretraining
from lowrank_ref.lab.models import GPT
from lowrank_ref.optimizers import GaLoreAdamW
from lowrank_ref.pretraining import SLTrainLinear

ALL_LINEAR = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"
BUDGET = 6  # numbers a matrix: 6(m + n), those of a product of rank 6


def split(linear: nn.Linear, rank: int, g: torch.Generator) -> SLTrainLinear:
    """Spend r(m+n) numbers on BA and the rest of the budget on S; s = 1."""
    m, n = linear.weight.shape
    density = (BUDGET - rank) * (m + n) / (m * n)
    return SLTrainLinear.from_linear(linear, rank=rank, density=density, alpha=max(rank, 1), generator=g)


def spectral(linear: nn.Linear, g: torch.Generator) -> SLTrainLinear:
    """Spend the whole budget on BA, started at the SVD of a random weight: the strongest low-rank start we know."""
    layer = split(linear, BUDGET, g)
    W = (torch.rand(linear.weight.shape, generator=g) * 2 - 1) / linear.in_features**0.5
    U, S, Vh = svd(W, BUDGET)
    layer.B.data, layer.A.data = U * S.sqrt(), S.sqrt()[:, None] * Vh
    return layer


def prepare(model: GPT, g: torch.Generator, lr: float, *, method: str) -> torch.optim.Optimizer:
    """Change the model as the method asks and build its optimizer. "split r" puts r(m+n) numbers into BA."""
    if method == "GaLore":
        return GaLoreAdamW(block_groups(model, rank=BUDGET, gap=50), lr=lr)
    name, _, rank = method.partition(" r=")
    layers = {"low-rank": partial(spectral, g=g), "low-rank, B = 0": partial(split, rank=BUDGET, g=g)}
    if rank:
        layers[name] = partial(split, rank=int(rank), g=g)
    if name != "full rank":
        replace_linears(model, ALL_LINEAR, layers[name]).requires_grad_(True)
    return torch.optim.Adam(model.parameters(), lr, fused=True)


@torch.no_grad()
def ranks(model: GPT) -> dict[str, float]:
    """Rank of a matrix (128, 48) of the last block."""
    layer = model.blocks[1].mlp.up
    W = layer.dense_weight() if isinstance(layer, SLTrainLinear) else layer.weight
    return {"rank": float(torch.linalg.matrix_rank(W))}


def main() -> None:
    """Run the parts asked for, saving after each run."""
    args = arguments(__doc__ or "", ("rates", "others", "shares", "long"))
    torch.set_num_threads(1)
    steps, more = (10, 20) if args.tiny else (300, 1200)
    fine = (0.005, 0.01, 0.02)
    plans: dict[str, tuple[int, dict[str, tuple[float, ...]], tuple[int, ...]]] = {
        "rates": (
            steps,
            {
                "full rank": (0.00125, 0.0025, 0.005, 0.01),
                "SLTrain r=3": fine,
                "low-rank": fine,
                "sparse only r=0": fine,
                "GaLore": (0.06, 0.12, 0.24),
                "low-rank, B = 0": (0.01,),
            },
            (0,),
        ),
        "others": (steps, {"sparse only r=0": (0.01,), "GaLore": (0.12,)}, (1, 2, 3)),
        "shares": (steps, {f"split r={rank}": (0.01,) for rank in range(BUDGET + 1)}, (1, 2)),
        "long": (
            more,
            {"full rank": fine[:2], "SLTrain r=3": fine[:2], "low-rank": fine[:2], "sparse only r=0": fine[:2]},
            (0,),
        ),
    }
    for part in args.part:
        count, grids, seeds = plans[part]
        rows: list[dict[str, Any]] = []
        for method, grid in grids.items():
            for lr in grid[:1] if args.tiny else grid:
                for seed in seeds:
                    found = markov_pretraining(partial(prepare, method=method), lr, seed, steps=count, measure=ranks)
                    rows.append(
                        {"method": method, "lr": lr, "seed": seed, **{k: round(v, 4) for k, v in found.items()}}
                    )
                    print(rows[-1], flush=True)
                    setting = f"GPT of two blocks, width 48, on the Markov language, {count} steps of 32 x 24 letters"
                    save(args.out, part, {"setting": setting, "entropy": round(markov_language()[2], 4), "rows": rows})


if __name__ == "__main__":
    main()
