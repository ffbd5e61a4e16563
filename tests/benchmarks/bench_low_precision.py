"""Low-precision products and training on a GPU: time and error of 8-bit products, and of emulated recipes in a GPT.

    python tests/benchmarks/bench_low_precision.py --part products --out book/results/low_precision_scale.json
    python tests/benchmarks/bench_low_precision.py --part pretraining --out book/results/low_precision_scale.json

products: y = x·Wᵀ for square matrices in bfloat16, float8 (E4M3·E4M3, E5M2·E4M3, one scale a tensor or a row) and
int8, the quantisation of both factors timed apart and included; error against float64 on 256 rows. Peak memory.
pretraining: a GPT on English text by its letters; recipes of all its matrices, emulated, and narrow moments.
Float8 wants compute capability 8.9; elsewhere the definition computes and the row says so. Half a minute a size, and 5
to 20 minutes for a run of pretraining on an H200 (guesses: not run yet).
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Runs, arguments, evaluate, interleaved, peak_mib, reset_peak, train_step
from torch import Tensor, nn

from lowrank_ref.core.accounting import state_bytes
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.data import CharTokenizer, english_text, token_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lowbit import QUANTIZERS, RECIPES, NarrowAdamW, QuantLinear, float8_product, int8_product
from lowrank_ref.lowbit.eight_bit_products import scaled_product, takes_scaled, to_float8

SIDES = (512, 1024, 2048, 4096, 8192)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PAIRS = {"E4M3·E4M3": (E4M3, E4M3), "E5M2·E4M3": (E5M2, E4M3)}
SIZE = {"dim": 512, "layers": 8, "heads": 8, "length": 256}
ARMS = ("exact", "bf16", "int8", "FP8 hybrid", "MXFP8", "NVFP4", "MXFP4", "8-bit moments", "linear 8-bit moments")
RATES, STEPS, SEEDS = (3e-4, 1e-3, 3e-3), 300, range(3)


def factors(side: int, device: str) -> tuple[Tensor, Tensor]:
    """Two square Gaussian matrices in bfloat16."""
    g = torch.Generator().manual_seed(0)
    x, W = (torch.randn(side, side, generator=g) for _ in range(2))
    return x.to(device, torch.bfloat16), W.to(device, torch.bfloat16)


def error(run: Callable[[], Tensor], x: Tensor, W: Tensor) -> float:
    """Relative root mean square error on the first 256 rows, against float64."""
    exact = x[:256].double() @ W.double().mT
    return round(float((run()[:256].double() - exact).norm() / exact.norm()), 6)


def products(side: int, device: str) -> dict[str, Any]:
    """Milliseconds of all products in turn, with and without the quantisation, their errors, and peak memory."""
    x, W = factors(side, device)
    whole: dict[str, Callable[[], Tensor]] = {"bf16": lambda: x @ W.mT, "int8 row": partial(int8_product, x, W)}
    apart: dict[str, Callable[[], Tensor]] = {}
    for name, (first, second) in PAIRS.items():
        for rows in (False, True):
            key = f"{name}, {'row' if rows else 'tensor'}"
            (q, s), (p, r) = to_float8(x, first, rows=rows), to_float8(W, second, rows=rows)
            apart[key] = partial(scaled_product, q, s, p, r)
            whole[key] = partial(float8_product, x, W, x_dtype=first, W_dtype=second, rows=rows)
    q8, p8 = (M.div(M.abs().amax() / 127).round().to(torch.int8) for M in (x, W))
    apart |= {"bf16": whole["bf16"], "int8 row": lambda: torch._int_mm(q8, p8.mT)}
    memory = {}
    for name, run in whole.items():
        reset_peak()
        run()
        memory[name] = round(peak_mib(), 1)
    return {
        "float8 units": takes_scaled(x.device),
        "ms, product": interleaved(apart, repeats=20, warmup=5),
        "ms, with quantisation": interleaved(whole, repeats=20, warmup=5),
        "error": {name: error(run, x, W) for name, run in whole.items()},
        "peak MiB": memory,
    }


def pretrain(arm: str, lr: float, seed: int, device: str, steps: int, size: dict[str, int]) -> dict[str, Any]:
    """Train a GPT once: the validation text chooses the rate, the test text reports."""
    text = english_text()
    tokenizer = CharTokenizer(text.train + text.valid + text.test)
    tokens = tokenizer.encode(text.train)
    parts = {
        "train": tokens,
        "valid": tokenizer.encode(text.valid),
        "test": tokenizer.encode(text.test),
    }
    draw = {
        name: token_batches(
            part, batch=32 if name == "train" else 16, length=size["length"], seed=seed if name == "train" else 0
        )
        for name, part in parts.items()
    }
    model: nn.Module = GPT(tokenizer.vocab_size, **size, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator(device).manual_seed(seed)
    if arm in RECIPES and arm != "exact":
        replace_linears(model, r"^blocks\.", lambda base: QuantLinear(base, RECIPES[arm], generator=generator))
    model.to(device)
    moments = {
        "8-bit moments": ("dynamic 8-bit", "dynamic 8-bit, unsigned"), "linear 8-bit moments": ("int8 row", "int8 row")
    }.get(arm)  # fmt: skip
    stored = {} if moments is None else dict(zip(("first", "second"), (QUANTIZERS[name] for name in moments)))
    optimizer = NarrowAdamW(model.parameters(), lr, **stored)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / (steps // 10 + 1), (steps - step) / steps)
        train_step(model, optimizer, draw["train"](step), device)
    found = {f"{name} loss": round(evaluate(model, draw[name], 20, device), 5) for name in ("valid", "test")}
    if not all(map(lambda v: v == v and abs(v) < float("inf"), found.values())):
        return {"error": "FloatingPointError: loss is not finite"}
    return found | {"state bytes": state_bytes(optimizer)}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("products", "pretraining"))
    torch.set_num_threads(1)
    if "products" in args.part:
        setting = "y = x·Wᵀ, square Gaussian matrices in bfloat16; median of 20 in turns"
        runs = Runs(args.out, "products", setting=setting, seconds=args.seconds)
        for side in (32, 64) if args.tiny else SIDES:
            if re.search(args.only, str(side)):
                runs.row({"side": side}, partial(products, side, args.device))
    if "pretraining" in args.part:
        steps, size = (2, {"dim": 32, "layers": 1, "heads": 2, "length": 32}) if args.tiny else (STEPS, SIZE)
        setting = f"GPT {size} on letters of English text, {steps} steps of 32 windows, bf16 autocast outside recipes"
        runs = Runs(args.out, "pretraining", setting=setting, seconds=args.seconds)
        for seed in list(SEEDS)[: 1 if args.tiny else None]:
            for arm in ARMS:
                for lr in RATES[: 1 if args.tiny else None] if re.search(args.only, arm) else ():
                    key = {"method": arm, "lr": lr, "seed": seed}
                    runs.row(key, partial(pretrain, arm, lr, seed, args.device, steps, size))


if __name__ == "__main__":
    main()
