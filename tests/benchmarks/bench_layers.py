"""One adapted linear layer beside PEFT's: time forward and backward, extra memory, and error against float64.

    python tests/benchmarks/bench_layers.py --out layers.json
    python tests/benchmarks/bench_layers.py --out layers.json --part model

A layer of 4096 x 4096 without bias, 8192 tokens, weight and inputs in bfloat16. The parts differ in the trained
factors: part 1 keeps them in float32 under autocast, the usual way to train; part 2 in float32 without autocast; part 3
in bfloat16. All methods of a part are timed in turn, round after round, so that a change of clock meets all of them.
Sensitive to other load on the GPU; about a minute in all.

The part "few" has 8 tokens and factors in bfloat16: all is launching there. The part "model" takes whole training
steps: a LLaMA-60M-shaped GPT in float32 under bfloat16 autocast, AdamW, full training beside LoRA and PEFT's LoRA of
rank 128 on all 56 matrices of its blocks, eager and compiled, each also replayed as a CUDA graph, with the casts and
kernels of a step counted. About two minutes more, most of it compiling.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import MIB, arguments, interleaved, peak_mib, reset_peak, save, synchronize
from graphs import captured
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ref.adapters import DoRALinear, LoRALinear, RandLoRALinear
from lowrank_ref.core.layers import AdaptedLinear, replace_linears, weight_of
from lowrank_ref.lab.models import GPT, llama_shape
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
        if part in ("bfloat16", "few"):
            for p in model.parameters():  # `.to` would leave the factors in float32
                p.data = p.data.to(torch.bfloat16)
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
    tokens = 8 if part == "few" else tokens
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
    times = interleaved if part == "few" else partial(timed, device=device)  # not ahead of the GPU, where all is launch
    repeats = 5 * repeats if part == "few" else repeats
    ahead = times({name: partial(forward, model) for name, model in models.items()}, repeats=repeats)
    whole = times({name: partial(both, model) for name, model in models.items()}, repeats=repeats)
    rows = []
    for name in models:
        row: dict[str, Any] = {"method": name, **{f"forward_{key}": value for key, value in ahead[name].items()}}
        row |= whole[name] | {"extra_mib": memory[name], "relative_error": wrong[name]}
        peer = PEERS.get(name)
        if peer in whole:
            row |= {"peer": peer, "time_ratio": round(whole[name]["median_ms"] / whole[peer]["median_ms"], 3)}
            row["forward_time_ratio"] = round(ahead[name]["median_ms"] / ahead[peer]["median_ms"], 3)
            row |= {"memory_ratio": round(memory[name] / memory[peer], 3)} if memory[peer] else {}
        rows.append(row)
        print(part, row, flush=True)
    setting = f"one linear layer {width} x {width} without bias, {tokens} tokens, weight and inputs bfloat16; "
    kinds = {"autocast": "factors float32, autocast", "float32": "factors float32, no autocast"}
    return {"setting": setting + kinds.get(part, "factors bfloat16, no autocast"), "rows": rows}


INSIDE = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"


def whole_models(shape: dict[str, int], length: int, rank: int, device: str) -> dict[str, GPT]:
    """Name -> model, ready to train; factors as after some steps, so that no gradient is zero."""
    seeded = partial(torch.Generator().manual_seed, 0)

    def full(model: GPT) -> GPT:
        return model

    def ours(model: GPT) -> GPT:
        return replace_linears(model, INSIDE, partial(LoRALinear, rank=rank, alpha=rank, generator=seeded()))

    def theirs(model: GPT) -> GPT:
        import peft

        names = ["q", "k", "v", "o", "gate", "up", "down"]
        return peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)

    models = {}
    for name, change in {"full training": full, f"LoRA r {rank}": ours, f"PEFT LoRA r {rank}": theirs}.items():
        try:
            models[name] = change(GPT(**shape, length=length, generator=seeded())).to(device)
        except ImportError:
            print("no PEFT on this machine: the rows without it still count", flush=True)
    return models


class Casts(TorchDispatchMode):
    """Counts casts from one dtype to another, and all operators that launch work."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and call."""
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in args if isinstance(t, Tensor)]
        if isinstance(result, Tensor) and tensors and not torch.is_inference_mode_enabled():
            moves = not function.is_view and result.numel() > 0 and "detach" not in str(function)
            self.operators += moves
            self.casts += "_to_copy" in str(function) and result.dtype != tensors[0].dtype
        return result


def kernels(step: Callable[[], Any]) -> dict[str, float]:
    """Return the number of kernels that a step launches, and how long the GPU is busy with them, in ms."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": len(events), "busy_ms": round(sum(e.time_range.elapsed_us() for e in events) / 1000, 2)}


def measure_models(tiny: bool, device: str) -> dict[str, Any]:
    """Time whole training steps, eager and compiled, each also recorded as a CUDA graph and replayed."""
    shape = {"dim": 32, "ffn": 64, "layers": 2, "heads": 2, "vocab_size": 64} if tiny else llama_shape("60M")
    batch, length, rank, repeats = (2, 32, 8, 2) if tiny else (64, 256, 128, 8)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape["vocab_size"], (batch, length + 1), generator=generator).to(device)
    steps, rows, held = {}, {}, []
    for name, model in whole_models(shape, length, rank, device).items():
        trained = [p for p in model.parameters() if p.requires_grad]
        ways = {"eager": model.loss, "compiled": torch.compile(model.loss)}
        if device == "cuda":
            ways |= {f"{way}, replayed": loss for way, loss in ways.items()}
        for way, loss in ways.items():
            replayed = way.endswith("replayed")
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda", capturable=replayed)

            def step(loss: Any = loss, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                with torch.autocast(device, torch.bfloat16):
                    value = loss(tokens[:, :-1], tokens[:, 1:])
                value.backward()
                optimizer.step()

            row: dict[str, Any] = {"method": name, "way": way, "trained": sum(p.numel() for p in trained)}
            held.append(optimizer)  # a graph does not keep the state that it writes to
            step = captured(step, optimizer).replay if replayed else step
            step()
            if way == "eager":
                with Casts() as counted:
                    step()
                row |= {"casts": counted.casts, "operators": counted.operators}
            if device == "cuda":
                row |= kernels(step)
                reset_peak()
                step()
                row["peak_mib"] = round(peak_mib())
            steps[f"{name}, {way}"], rows[f"{name}, {way}"] = step, row

    def several(step: Callable[[], Any]) -> None:
        for _ in range(4):  # in a row, as in training, where the host may run ahead of the GPU
            step()

    times = interleaved({key: partial(several, step) for key, step in steps.items()}, repeats=repeats)
    for key, row in rows.items():
        row |= {name: round(ms / 4, 3) for name, ms in times[key].items()}
        for peer in ("full training", f"PEFT LoRA r {rank}"):
            if other := times.get(f"{peer}, {row['way']}"):
                row[f"time_ratio_to_{peer}"] = round(times[key]["median_ms"] / other["median_ms"], 3)
        print("model", row, flush=True)
    setting = f"GPT {shape}, {batch} x {length} tokens, float32 weights, bf16 autocast, AdamW"
    return {"setting": setting, "rows": list(rows.values())}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("autocast", "float32", "bfloat16", "few", "model"))
    for part in args.part:
        found = measure_models(args.tiny, args.device) if part == "model" else measure(part, args.tiny, args.device)
        save(args.out, part, found, ("peft",))


if __name__ == "__main__":
    main()
