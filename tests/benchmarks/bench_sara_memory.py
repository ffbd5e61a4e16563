"""What a training step of SaRA holds in memory, byte by byte, beside other ways to train: on a CPU, by the profiler.

    python tests/benchmarks/bench_sara_memory.py --out book/results/sara_memory.json

A transformer of 10.6 million weights in float32. "extra": the most that a step holds beyond what was there before it,
activations and gradients included; "state": what the optimizer keeps; "places": masks or places. Time on one core.
"""

import re
from functools import partial
from typing import Any

import torch
from bench_sara import Naive, adapt, masked_step, seeded
from common import MIB, Runs, arguments, milliseconds
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lowrank_ref.adapters.sara import sara_layers
from lowrank_ref.adapters.weight_selection import pick_entries
from lowrank_ref.core.accounting import nbytes, state_bytes
from lowrank_ref.lab.beds.shapes import Denoiser, denoising_loss, shapes

METHODS = ("SaRA", "SaRA, autograd's graph", "dense gradients, masked", "LoRA, equal count", "LoRA r=4", "all weights")


def peak_bytes(run: Any) -> int:
    """Return the most that PyTorch's allocator held above its start while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    result: Any = watched.profiler
    events = sorted((e.start_ns(), e.nbytes()) for e in result.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, size in events:
        held += size
        peak = max(peak, held)
    return peak


def prepared(
    method: str, density: float, dim: int, layers: int
) -> tuple[nn.Module, list[Tensor], dict[Tensor, Tensor]]:
    """Return a denoiser, what trains in it, and masks of dense gradients."""
    model: nn.Module = Denoiser(32, 4, dim=dim, layers=layers, heads=dim // 32, generator=seeded(0, "cpu"))
    if method == "SaRA, autograd's graph":
        model = Naive(model, density)
        return model, [*model.values], {}
    if method == "dense gradients, masked":
        params, masks = adapt(model, "all weights", 0), {}
        for W in params:
            masks[W] = torch.zeros_like(W, dtype=torch.bool)
            masks[W].view(-1)[pick_entries(W.detach(), round(density * W.numel())).long()] = True
        return model, params, masks
    return model, adapt(model, {"SaRA": "smallest"}.get(method, method), 0, density), {}


def measured(method: str, batch: int, density: float, tiny: bool) -> dict[str, Any]:
    """Measure one way to train."""
    model, params, masks = prepared(method, density, *((32, 1) if tiny else (384, 6)))
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0)
    x, draw = shapes(batch, generator=seeded(0, "cpu")), seeded(1, "cpu")

    def step() -> None:
        denoising_loss(model, x, generator=draw).backward()
        masked_step(masks, optimizer) if masks else optimizer.step()
        optimizer.zero_grad()

    step()  # makes the state
    found = {"extra MiB": peak_bytes(step) / MIB, "state MiB": state_bytes(optimizer) / MIB}
    found["places MiB"] = nbytes(masks.values()) / MIB
    if method == "SaRA":
        found["places MiB"] = nbytes(t for a in sara_layers(model).values() for t in (a.support, a.active)) / MIB
    found["trainable"] = sum(int(m.sum()) for m in masks.values()) or sum(p.numel() for p in params)
    return {**{k: round(v, 3) for k, v in found.items()}, **milliseconds(step, repeats=2 if tiny else 7, warmup=1)}


def main() -> None:
    """Run all; `--only` is matched with the method."""
    args = arguments(__doc__ or "", ("memory",))
    torch.set_num_threads(1)
    setting = (
        "a transformer of 10.6 million weights in its blocks, float32, pictures of 64 patches, AdamW, one CPU core"
    )
    runs = Runs(args.out, "memory", setting=setting, seconds=args.seconds)
    for density, batch in ((0.05, 1), (0.05, 16), (0.2, 1)):
        for method in METHODS:
            if re.search(args.only, method):
                key = {"method": method, "batch": batch, "density": density}
                runs.row(key, partial(measured, method, batch, density, args.tiny))


if __name__ == "__main__":
    main()
