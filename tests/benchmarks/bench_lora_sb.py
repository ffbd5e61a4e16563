"""What LoRA-SB's start costs on a 1B-shaped model: time and memory of the gradient pass, the SVDs, the file's bytes.

    python tests/benchmarks/bench_lora_sb.py --out book/results/lora_sb_scale.json

start: gradients of all linear layers over 8 batches, as `gradient_sums` makes them (sums on the CPU), with sums on the
card, and by `backward` on weights that train; then truncated SVDs of all layers, and whole starts in groups.
files: the trained part of LoRA-SB, LoRA-XS and LoRA of rank 32, as `save_adapters` writes it.
"""

import gc
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_lora import build
from common import MIB, Runs, arguments, peak_mib, reset_peak, synchronize
from later_speeches import ALL_LINEAR
from torch import Tensor, nn

from lowrank_ref.adapters import LoRALinear, LoRASBLinear, LoRAXSLinear, start_lora_sb
from lowrank_ref.adapters.gradient_start import gradient_sums
from lowrank_ref.adapters.lora_sb import first_step, update_approximation
from lowrank_ref.core.accounting import parameter_report
from lowrank_ref.core.io import save_adapters
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.models import GPT, llama_shape


def loss_fn(model: GPT, x: Tensor) -> Tensor:
    """Return the loss of one batch of tokens under autocast."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return model.loss(x[:, :-1], x[:, 1:])


def targets(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> linear layer of the blocks."""
    return {path: module for path, module in model.named_modules() if re.search(ALL_LINEAR, path)}


def by_backward(model: GPT, batches: list[tuple[Tensor]]) -> None:
    """Let every weight of the blocks keep its gradient on the card."""
    model.requires_grad_(False)
    for layer in targets(model).values():
        layer.weight.requires_grad_(True)
    for batch in batches:
        loss_fn(model, *batch).backward()


def svds(model: GPT, rank: int) -> None:
    """Approximate a step of noise of every layer's shape."""
    generator = torch.Generator().manual_seed(0)
    for layer in targets(model).values():
        G = torch.randn(layer.weight.shape, device=layer.weight.device)
        update_approximation(first_step(G, 1e-3), rank, generator)


def measured(model: GPT, work: Any) -> dict[str, Any]:
    """Time one call after another one, and its peak of memory beyond the model's."""
    work(model)
    model.zero_grad(set_to_none=True)
    gc.collect()
    reset_peak()
    before, start = peak_mib(), time.perf_counter()
    work(model)
    synchronize()
    took = time.perf_counter() - start
    return {"s": round(took, 2), "extra_mib": round(peak_mib() - before)}


def size(model: GPT) -> dict[str, Any]:
    """Count what trains, and the bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(model, Path(folder) / "x")
        stored = (Path(folder) / "x").stat().st_size
    return {"trainable": parameter_report(model).trainable, "file_mib": round(stored / MIB, 2)}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("start", "files"))
    shape = {"dim": 32, "ffn": 64, "layers": 2, "heads": 2, "vocab_size": 64} if args.tiny else llama_shape("1B")
    batch, length, rank = (2, 16, 4) if args.tiny else (8, 512, 32)
    model = partial(build, shape, length, args.device)
    batches = [(torch.randint(shape["vocab_size"], (batch, length + 1), device=args.device),) for _ in range(8)]
    if "start" in args.part:
        setting = (
            f"GPT {shape}, bf16 under autocast, 8 batches of {batch} x {length} tokens, all linear layers, r {rank}"
        )
        runs = Runs(args.out, "start", setting=setting, seconds=args.seconds)
        todo: dict[str, Any] = {
            "gradient_sums, sums on the CPU": lambda m: gradient_sums(m, targets(m), loss_fn, batches),
            "gradient_sums, sums on the card": lambda m: gradient_sums(
                m, targets(m), loss_fn, batches, device=args.device
            ),
            "backward, gradients kept": lambda m: by_backward(m, batches),
            "SVDs": lambda m: svds(m, rank),
        }
        for name, work in todo.items():
            if re.search(args.only, name):
                runs.row({"method": name}, lambda work=work: measured(model(), work))
        for at_once, device in ((None, "cpu"), (None, args.device), (42, args.device)):
            where = "the CPU" if device == "cpu" else "the card"
            name = f"whole start, sums on {where}, {'all' if at_once is None else at_once} layers at once"
            if re.search(args.only, name):

                def whole(at_once: int | None = at_once, device: str = device) -> dict[str, Any]:
                    started, how = model(), {"rank": rank, "step_size": 1e-3, "at_once": at_once, "device": device}
                    gc.collect()
                    reset_peak()
                    before, begin = peak_mib(), time.perf_counter()
                    start_lora_sb(started, ALL_LINEAR, loss_fn, batches, **how)
                    synchronize()
                    return {"s": round(time.perf_counter() - begin, 2), "extra_mib": round(peak_mib() - before)}

                runs.row({"method": name}, whole)
    if "files" in args.part:
        runs = Runs(args.out, "files", setting=f"GPT {shape}, all linear layers, r {rank}", seconds=args.seconds)
        makes = {"LoRA": LoRALinear, "LoRA-XS": LoRAXSLinear, "LoRA-SB": LoRASBLinear.empty}
        for name, make in makes.items():
            if re.search(args.only, name):
                runs.row(
                    {"method": name},
                    lambda make=make: size(replace_linears(model(), ALL_LINEAR, partial(make, rank=rank))),
                )


if __name__ == "__main__":
    main()
