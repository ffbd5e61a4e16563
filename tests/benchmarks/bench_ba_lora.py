"""What BA-LoRA's terms cost in a language model: milliseconds a step and peak memory (GPU, a minute).

    python tests/benchmarks/bench_ba_lora.py --out book/results/ba_lora_scale.json

A LLaMA-shaped GPT with 32,000 tokens, bf16 weights, trained on random tokens of which the second half of each window
is a response. Arms: LoRA; PiSSA; PiSSA with each term; all terms; the teacher as the model without its adapters, or as
a second copy; the singular values exactly, or from a sketch. Nothing is learned here: only cost is measured.
"""

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import MIB, Runs, arguments, milliseconds, peak_mib, reset_peak
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import (
    LoRALinear,
    OutputPenalty,
    PiSSALinear,
    response_logits,
    singular_penalty,
    teacher_logits,
)
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.models import GPT

EXACT = partial(singular_penalty, top=10, norm="frobenius")
#: Arm -> (layer, which λ are on, teacher, the singular values).
ARMS: dict[str, tuple[Any, tuple[int, int, int], str, Any]] = {
    "LoRA": (LoRALinear, (0, 0, 0), "", None),
    "PiSSA": (PiSSALinear, (0, 0, 0), "", None),
    "LoRA, CR": (LoRALinear, (1, 0, 0), "adapters off", None),
    "CR": (PiSSALinear, (1, 0, 0), "adapters off", None),
    "CR, second copy": (PiSSALinear, (1, 0, 0), "copy", None),
    "DR": (PiSSALinear, (0, 1, 0), "", None),
    "SVD, sketch": (PiSSALinear, (0, 0, 1), "", None),
    "all, sketch": (PiSSALinear, (1, 1, 1), "adapters off", None),
    "all, sketch, second copy": (PiSSALinear, (1, 1, 1), "copy", None),
    "SVD, exact": (PiSSALinear, (0, 0, 1), "", EXACT),
    "all, exact": (PiSSALinear, (1, 1, 1), "adapters off", EXACT),
}


def step_of(arm: str, base: GPT, batch: int, rank: int) -> tuple[Callable[[], None], nn.Module]:
    """Return a function that takes one step of an arm, and its model."""
    make, on, kind, singular = ARMS[arm]
    teacher = copy.deepcopy(base) if kind == "copy" else None
    model = base
    replace_linears(model, r"blocks\.", partial(make, rank=rank, alpha=float(rank)))
    penalty = OutputPenalty.generation()
    changes = {"penalties": tuple(a * b for a, b in zip(penalty.penalties, on))}
    penalty = OutputPenalty.generation(**changes | ({} if singular is None else {"singular": singular}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    device = base.head.weight.device
    tokens = torch.randint(base.head.out_features, (batch, base.length), device=device)
    labels = tokens.clone()
    labels[:, : base.length // 2] = -100

    def teach() -> Tensor | None:
        if not kind:
            return None
        with torch.no_grad():
            found = teacher(tokens) if teacher is not None else teacher_logits(model, tokens)
        return response_logits(found, labels)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            z = response_logits(model(tokens), labels)
            loss = F.cross_entropy(z, labels[:, 1:][labels[:, 1:] != -100])
            target = teach()
        with torch.autocast(device.type, enabled=False):
            loss = loss.float() + penalty(z, target)
        loss.backward()
        optimizer.step()

    return step, model


def measure(arm: str, *, tiny: bool, device: str) -> dict[str, Any]:
    """Time and peak memory of one arm."""
    gc.collect()
    shape = {"dim": 32, "layers": 1, "heads": 2, "length": 16} if tiny else {
        "dim": 2048, "layers": 16, "heads": 32, "length": 512, "ffn": 5632}  # fmt: skip
    with torch.device(device):
        base = GPT(64 if tiny else 32_000, **shape).to(torch.bfloat16)
    weights = sum(p.numel() for p in base.parameters())
    step, model = step_of(arm, base, 2 if tiny else 8, 2 if tiny else 64)
    step()
    reset_peak()
    slow = "exact" in arm and not tiny
    times = milliseconds(step, repeats=2 if slow else 10, warmup=1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**times, "peak_mib": round(peak_mib()), "weights_mib": round(weights * 2 / MIB), "trainable": trained}


def main() -> None:
    """Measure all arms."""
    args = arguments(__doc__ or "", ("cost",))
    setting = (
        "GPT of 16 blocks of width 2048 with 32,000 tokens (bf16 weights and autocast, float32 adapters of rank 64 on "
        "all matrices of the blocks), 8 windows of 512 random tokens of which the last 256 are the response, AdamW"
    )
    runs = Runs(args.out, "cost", setting=setting, seconds=args.seconds)
    for arm in ARMS:
        runs.row({"method": arm}, partial(measure, arm, tiny=args.tiny, device=args.device))


if __name__ == "__main__":
    main()
