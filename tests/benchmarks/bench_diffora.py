"""DiffoRA at scale: what a step of the search costs beside a step of LoRA (a GPU to itself, 1 minute).

    python tests/benchmarks/bench_diffora.py --out book/results/diffora_scale.json

cost: all seven linear layers of all 24 blocks (d = 1024) searched, random tokens, bf16 autocast: ms a step and peak
memory of LoRA everywhere, of the gates at one level, of the search on two levels, and of LoRA on half of the modules.
"""

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Runs, arguments, interleaved, peak_mib, reset_peak

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.accounting import parameter_report
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.models import GPT
from lowrank_ref.ranks import DiffoRALinear, ModuleSearch, keep_modules, module_logits, top_modules

RANK = 8
METHODS = ("LoRA r=8", "gates, one level", "search, two levels", "LoRA r=16 on half", "LoRA r=8, twice the tokens")


def adapted(model: GPT, kind: Any) -> GPT:
    """Adapt every linear layer of the blocks."""
    generator = torch.Generator().manual_seed(0)
    return replace_linears(model, r"^blocks\.", partial(kind, rank=RANK, alpha=2 * RANK, generator=generator))


def stepper(base: GPT, name: str, x: torch.Tensor, device: str) -> tuple[int, Callable[[], None]]:
    """Return the trained numbers of a method, θ included, and a step of its training."""
    model: Any = adapted(copy.deepcopy(base), LoRALinear if name.startswith("LoRA r=8") else DiffoRALinear)
    if "half" in name:
        logits = module_logits(model)
        keep_modules(model, top_modules(logits, len(logits) // 2), rank=2 * RANK)
    model.to(device)
    mine = torch.cat([x, x]) if "twice" in name else x
    count = parameter_report(model).trainable  # before a search takes θ away from the optimizer

    def loss(model: GPT, rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model.loss(rows[:, :-1], rows[:, 1:])

    search = ModuleSearch(model, loss, lambda i: (x.flip(0),), warmup=0) if "search" in name else None
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=device == "cuda")
    if search is not None:
        search.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, mine).backward()
        optimizer.step()

    return count, step


def peak_of(base: GPT, name: str, x: torch.Tensor, device: str) -> int:
    """Return the peak of memory of a second step, with no other model of this script on the card than the base."""
    gc.collect()
    _, step = stepper(base, name, x, device)
    step()
    reset_peak()
    step()
    return round(peak_mib())


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("cost",))
    shape: dict[str, int] = {"dim": 1024, "ffn": 4096, "layers": 24, "heads": 16, "vocab_size": 50257}
    batch, length = 8, 512
    if args.tiny:
        shape, batch, length = {"dim": 32, "ffn": 64, "layers": 2, "heads": 2, "vocab_size": 64}, 2, 16
    torch.manual_seed(0)
    base = GPT(**shape, length=length, generator=torch.Generator().manual_seed(0))
    x = torch.randint(shape["vocab_size"], (batch, length + 1), device=args.device)
    setting = (
        f"GPT, {shape['layers']} layers, d = {shape['dim']}, all linear layers of the blocks adapted, float32 under "
        f"bf16 autocast, {batch} x {length} tokens; peaks one by one, times in turns, median and max - min of 30 steps"
    )
    runs = Runs(args.out, "cost", setting=setting, seconds=args.seconds)
    peaks = {name: peak_of(base, name, x, args.device) for name in METHODS}
    gc.collect()
    counts, steps = {}, {}
    for name in METHODS:
        counts[name], steps[name] = stepper(base, name, x, args.device)
    times = interleaved(steps, repeats=30, warmup=5)
    for name in METHODS:
        row = {"trainable": counts[name], **times[name], "peak_mib": peaks[name]}
        runs.row({"method": name}, lambda row=row: row)


if __name__ == "__main__":
    main()
