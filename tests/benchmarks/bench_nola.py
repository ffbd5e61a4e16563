"""NOLA at scale: what drawing the bases costs, on a model of GPT-2 medium's shape (a GPU to itself, 2 minutes).

    python tests/benchmarks/bench_nola.py --out book/results/nola_scale.json

cost: query and value of all 24 layers (d = 1024) adapted, random tokens, bf16 autocast: ms a step, peak memory, size of
the file in full precision and with 4 bits. NOLA draws its bases in blocks, all of a factor at once as the official code
does, or keeps them; beside it LoRA of rank 8 and 1.
"""

import copy
import gc
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Runs, arguments, milliseconds, peak_mib, reset_peak

from lowrank_ref.adapters import LoRALinear, NOLALinear, nola_bases, save_nola
from lowrank_ref.core.accounting import parameter_report
from lowrank_ref.core.io import save_adapters
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.models import GPT

Adapt = Callable[[GPT], Any]


def adapted(model: GPT, kind: Any, **options: Any) -> GPT:
    """Adapt query and value of every layer."""
    generator = torch.Generator().manual_seed(0)
    return replace_linears(model, r"attn\.[qv]$", partial(kind, generator=generator, **options))


def methods(rank: int) -> dict[str, Adapt]:
    """Name -> what prepares a model."""
    found: dict[str, Adapt] = {f"LoRA r={r}": partial(adapted, kind=LoRALinear, rank=r) for r in (1, rank)}
    for k in (64, 512):
        options = {"kind": NOLALinear, "rank": rank, "bases": k}
        found[f"NOLA r={rank} k={k}, in blocks"] = partial(adapted, **options)
        found[f"NOLA r={rank} k={k}, a factor at once"] = partial(adapted, **options)
        found[f"NOLA r={rank} k={k}, compiled"] = partial(adapted, **options)
        found[f"NOLA r={rank} k={k}, kept"] = partial(adapted, keep=True, **options)
    return found


def sizes(model: GPT, name: str) -> dict[str, int]:
    """Bytes of the files that hold the adapters."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        save_adapters(model, path)
        found["file_bytes"] = path.stat().st_size
        if name.startswith("NOLA"):
            save_nola(model, path, 4)
            found["packed_bytes"] = path.stat().st_size
    return found


def measure(base: GPT, name: str, prepare: Adapt, x: torch.Tensor, device: str) -> dict[str, Any]:
    """Train for a few steps; return time, memory and the sizes of the files."""
    model: Any = prepare(copy.deepcopy(base)).to(device)
    blocks = nola_bases.GPU_BLOCK
    nola_bases.GPU_BLOCK = 2**40 if "at once" in name else blocks
    runs = torch.compile(model.loss) if "compiled" in name else model.loss
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=device == "cuda")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            runs(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()

    step()
    reset_peak()
    row = {"trainable": parameter_report(model).trainable, **milliseconds(step, repeats=20), **sizes(model, name)}
    nola_bases.GPU_BLOCK = blocks
    return {**row, "peak_mib": round(peak_mib())}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("cost",))
    shape = {"dim": 1024, "ffn": 4096, "layers": 24, "heads": 16, "vocab_size": 50257}
    batch, length, rank = 8, 512, 8
    if args.tiny:
        shape, batch, length = {"dim": 32, "ffn": 64, "layers": 1, "heads": 2, "vocab_size": 64}, 2, 16
    torch.manual_seed(0)
    base = GPT(**shape, length=length, generator=torch.Generator().manual_seed(0))
    x = torch.randint(shape["vocab_size"], (batch, length + 1), device=args.device)
    setting = (
        f"GPT, {shape['layers']} layers, d = {shape['dim']}, float32 under bf16 autocast, {batch} x {length} tokens"
    )
    runs = Runs(args.out, "cost", setting=setting, seconds=args.seconds)
    for name, prepare in methods(rank).items():
        if re.search(args.only, name):
            runs.row({"method": name}, partial(measure, base, name, prepare, x, args.device))
            gc.collect()


if __name__ == "__main__":
    main()
