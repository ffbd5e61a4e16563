"""One adapted linear layer beside PEFT's: time forward and backward, extra memory, and error against float64.

    python tests/benchmarks/bench_layers.py --out layers.json

A layer of 4096 x 4096 without bias, 8192 tokens, weight and inputs in bfloat16. The parts differ in the trained
factors: part 1 keeps them in float32 under autocast, the usual way to train; part 2 in float32 without autocast; part 3
in bfloat16. All methods of a part are timed in turn, round after round, so that a change of clock meets all of them.
Sensitive to other load on the GPU; about a minute in all.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import MIB, arguments, peak_mib, reset_peak, save, synchronize
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import DoRALinear, LoRALinear, RandLoRALinear
from lowrank_ref.core.layers import AdaptedLinear, weight_of
from lowrank_ref.pretraining import SLTrainLinear

#: Method -> the method it is compared with.
PEERS = {
    "LoRA r 8": "PEFT LoRA r 8",
    "LoRA r 64": "PEFT LoRA r 64",
    "DoRA r 8": "PEFT DoRA r 8",
    "RandLoRA r 32": "PEFT RandLoRA r 32",
    "RandLoRA r 32, fused": "PEFT RandLoRA r 32",
    "SLTrain r 128": "trained nn.Linear",
}


class Sink(torch.autograd.Function):
    """End of a graph: takes y, keeps nothing of it, and sends the given gradient back, as a next layer would."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gradient: Tensor) -> Tensor:
        """Return a number."""
        ctx.gradient = gradient
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        """Return the gradient."""
        return ctx.gradient, None


def peft_layer(base: nn.Linear, kind: str, rank: int, **options: Any) -> nn.Module:
    """Adapt with the PEFT library; trained factors in float32, its default."""
    import peft

    config = getattr(peft, f"{kind}Config")(r=rank, target_modules=["0"], **options)
    return peft.get_peft_model(nn.Sequential(base), config)


def methods(tiny: bool) -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """Name -> function from a bfloat16 layer to the layer to measure. Tiny layers have smaller ranks."""
    eight, many, basis, thick = (2, 4, 4, 4) if tiny else (8, 64, 32, 128)
    seeded = partial(torch.Generator().manual_seed, 0)
    return {
        "frozen nn.Linear": lambda base: base.requires_grad_(False),
        "trained nn.Linear": lambda base: base,
        "LoRA r 8": lambda base: LoRALinear(base, eight, alpha=2 * eight, generator=seeded()),
        "PEFT LoRA r 8": partial(peft_layer, kind="Lora", rank=eight, lora_alpha=2 * eight),
        "LoRA r 64": lambda base: LoRALinear(base, many, alpha=2 * many, generator=seeded()),
        "PEFT LoRA r 64": partial(peft_layer, kind="Lora", rank=many, lora_alpha=2 * many),
        "DoRA r 8": lambda base: DoRALinear(base, eight, alpha=2 * eight, generator=seeded()),
        "PEFT DoRA r 8": partial(peft_layer, kind="Lora", rank=eight, lora_alpha=2 * eight, use_dora=True),
        "RandLoRA r 32": lambda base: RandLoRALinear(base, basis, generator=seeded()),
        "RandLoRA r 32, fused": lambda base: RandLoRALinear(base, basis, fused=True, generator=seeded()),
        "PEFT RandLoRA r 32": partial(peft_layer, kind="RandLora", rank=basis, randlora_alpha=20 * basis),
        "SLTrain r 128": lambda base: SLTrainLinear.from_linear(base, rank=thick, density=0.03, generator=seeded()),
    }


def build(part: str, tiny: bool, width: int, device: str) -> dict[str, nn.Module]:
    """Make all layers, their trained numbers moved as training would, so that no gradient is zero."""
    models = {}
    for name, make in methods(tiny).items():
        torch.manual_seed(0)
        base = nn.Linear(width, width, bias=False).to(torch.bfloat16)
        try:
            model = make(base)
        except ImportError:
            print("no PEFT on this machine: the rows without it still count", flush=True)
            continue
        if part == "bfloat16":
            model.to(torch.bfloat16)
        elif name.startswith("SLTrain"):
            if part == "float32":  # nothing in it stays in bfloat16
                continue
            model.float()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and name != "trained nn.Linear":
                    p.add_(torch.randn_like(p), alpha=0.1 * float(p.abs().mean()) or 0.02)
        models[name] = model.to(device)
    return models


def leaves(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the tensors whose gradients are wanted: x and every trained parameter."""
    return {"x": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}


def errors(model: nn.Module, x: Tensor, gradient: Tensor, autocast: bool) -> dict[str, float]:
    """Return the relative errors of output and gradients against float64: the definition, or PEFT's own code."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = model(x)
    wanted = leaves(model, x)
    got = {"output": y, **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), gradient)))}
    exact, z = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    if isinstance(exact, AdaptedLinear):
        out = F.linear(z, weight_of(exact.base) + exact.delta_weight())
    else:
        out = F.linear(z, exact.dense_weight()) if isinstance(exact, SLTrainLinear) else exact(z)
    true = leaves(exact, z)
    found = {"output": out, **dict(zip(true, torch.autograd.grad(out, list(true.values()), gradient.double())))}
    return {name: float(f"{(got[name].double() - found[name]).norm() / found[name].norm():.2e}") for name in found}


def timed(runs: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Time all runs in turn, round after round, with CUDA events; return median and spread (max - min) in ms."""
    times: dict[str, list[Any]] = {name: [] for name in runs}
    for i in range(repeats + 3):
        for name, run in runs.items():
            if device == "cuda":
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[0].record()
                run()
                marks[1].record()
                times[name] += [marks] if i >= 3 else []
            else:
                begin = time.perf_counter()
                run()
                times[name] += [1000 * (time.perf_counter() - begin)] if i >= 3 else []
        synchronize()
    result = {}
    for name, values in times.items():
        ms = [v[0].elapsed_time(v[1]) if device == "cuda" else v for v in values]
        result[name] = {"median_ms": round(statistics.median(ms), 3), "spread_ms": round(max(ms) - min(ms), 3)}
    return result


def extra_mib(run: Callable[[], Any], device: str) -> float:
    """Return the peak of memory during a run above what was there before, in MiB; 0 without a GPU."""
    run()
    synchronize()
    reset_peak()
    before = torch.cuda.memory_allocated() / MIB if device == "cuda" else 0.0
    run()
    synchronize()
    return round(peak_mib() - before, 1)


def measure(part: str, tiny: bool, device: str) -> dict[str, Any]:
    """Measure all methods with one choice of dtypes."""
    width, tokens, repeats = (64, 96, 2) if tiny else (4096, 8192, 20)
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(tokens, width, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    models = build(part, tiny, width, device)
    autocast = part == "autocast"

    def forward(model: nn.Module) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return Sink.apply(model(x), gradient)

    def both(model: nn.Module) -> None:
        torch.autograd.grad(forward(model), list(leaves(model, x).values()))

    wrong = {name: errors(model, x, gradient, autocast) for name, model in models.items()}
    memory = {name: extra_mib(partial(both, model), device) for name, model in models.items()}
    ahead = timed({name: partial(forward, model) for name, model in models.items()}, device, repeats)
    whole = timed({name: partial(both, model) for name, model in models.items()}, device, repeats)
    rows = []
    for name in models:
        row: dict[str, Any] = {"method": name, **{f"forward_{key}": value for key, value in ahead[name].items()}}
        row |= whole[name] | {"extra_mib": memory[name], "relative_error": wrong[name]}
        peer = PEERS.get(name)
        if peer in whole:
            row |= {"peer": peer, "time_ratio": round(whole[name]["median_ms"] / whole[peer]["median_ms"], 3)}
            row |= {"memory_ratio": round(memory[name] / memory[peer], 3)} if memory[peer] else {}
        rows.append(row)
        print(part, row, flush=True)
    setting = f"one linear layer {width} x {width} without bias, {tokens} tokens, weight and inputs bfloat16; "
    kinds = {"autocast": "factors float32, autocast", "float32": "factors float32, no autocast"}
    return {"setting": setting + kinds.get(part, "factors bfloat16, no autocast"), "rows": rows}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("autocast", "float32", "bfloat16"))
    for part in args.part:
        save(args.out, part, measure(part, args.tiny, args.device), ("peft",))


if __name__ == "__main__":
    main()
