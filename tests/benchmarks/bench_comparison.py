"""All adapters on one bed, each at several sizes and at its own best learning rate; a second bed; allocators of ranks.

    python tests/benchmarks/bench_comparison.py --out book/results/comparison.json

digits_shift: a network 64-128-128-10 that reads upright digits learns turned ones. Budgets are what LoRA of rank 1, 2,
4 and 8 trains; at each, every method of `adapter_arms` at the largest size that fits. Five seeds; seven rates a factor
of 2 apart, more while the best by validation is at an edge, until all arms have as many. One CPU core, 1 s a row.
verses: the same methods on MiniLM's last two layers, two budgets, three seeds, five rates or more. A GPU, 2 s a row.
allocators: ranks found on the planted-rank bed, by every setting of every allocator. One CPU core, 1 s a row.

Any number of processes may run the same command at once: each takes arms that no other one holds. Run it until it
prints no row.
"""

import copy
import inspect
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter_arms import (
    METHODS,
    RANKS,
    SAMPLES,
    Bed,
    Setup,
    Sweep,
    arms,
    budgets,
    claimed,
    put,
    rates_tried,
    stored_size,
    widen,
)
from bench_lora_minilm import Top
from common import ROOT, Runs, arguments
from rank_allocators import ALLOCATORS, Allocator, arm
from torch import Tensor, nn
from verses_task import COUNTS, HEAD_LR, LINEAR, loss_fn, measured, state_of, train_top, verse_data

from lowrank_ref.lab.beds import (
    classification_loss,
    digits_shift,
    measure_planted,
    planted_rank,
    pretrained_on_digits,
    shifted_digits,
    train_planted,
)
from lowrank_ref.lab.results import code_digest

SEEDS = (0, 1, 2, 3, 4)
Row = Callable[[float, int], dict[str, Any]]


def some_images(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return one batch of turned training images."""
    data = shifted_digits("turned")
    rows = torch.randperm(len(data.x_train), generator=generator)[:SAMPLES]
    return [(data.x_train[rows], data.y_train[rows])]


DIGITS = Bed("digits", r"^layers\.", r"^layers\.2\.", classification_loss, some_images)


def digits_row(name: str, size: int, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train a method on the turned digits; losses in nats, "train s" with start and end."""
    made: list[Setup] = []

    def adapt(model: nn.Module, generator: torch.Generator) -> Any:
        made.append(put(name, model, size, DIGITS, generator))
        return made[0].groups

    def finish(model: nn.Module) -> Mapping[str, float]:
        more = made[0].finish(model) or {}
        return {**stored_size(model, DIGITS), **more}

    begin = time.perf_counter()
    try:
        actions = lambda model, optimizer: made[0].actions(model, optimizer, steps)  # noqa: E731
        found = digits_shift(adapt, lr, seed, steps=steps, actions=actions, finish=finish)
    except (FloatingPointError, torch.linalg.LinAlgError):
        return {"error": "diverged"}
    return rounded({**found, "train s": time.perf_counter() - begin})


def rounded(found: Mapping[str, float]) -> dict[str, Any]:
    """Round to five digits after the point; counts become whole numbers."""
    return {name: int(v) if float(v).is_integer() else round(float(v), 5) for name, v in found.items()}


def verses_row(name: str, size: int, bed: Bed, task: Any, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train a method and a new head on the verses."""
    layers, data, classes = task
    device = data["train"][0].device
    begin = time.perf_counter()
    top = Top(layers, classes).to(device)
    setup = put(name, top, size, bed, torch.Generator().manual_seed(seed))
    trainable = sum(p.numel() for path, p in top.named_parameters() if p.requires_grad and not path.startswith("head"))
    top.to(device)
    actions = lambda model, optimizer: setup.actions(model, optimizer, steps)  # noqa: E731
    try:
        optimizer = train_top(top, data, setup.groups, lr, seed, steps, actions)
        found = {"trainable": trainable, "state bytes": state_of(optimizer, top)}
        found |= setup.finish(top) or {}
        found |= stored_size(top, bed)
    except (FloatingPointError, ValueError, torch.linalg.LinAlgError):  # a cut of an update that is not finite
        return {"error": "diverged"}
    found |= measured(top, data)
    if found["valid loss"] != found["valid loss"]:
        return {"error": "diverged"}
    return rounded({**found, "train s": time.perf_counter() - begin})


def planted_row(name: str, setting: float, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Let an allocator find the ranks of a task of its own; "real" ranks are singular values above a quarter."""
    allocator, task, made = ALLOCATORS[name], planted_rank(seed), []

    def adapt(model: nn.Module, generator: torch.Generator) -> Any:
        if name == "oracle":
            model.requires_grad_(False)
        made.append(allocator.put(model, int(setting) if float(setting).is_integer() else setting, generator))
        return made[0].groups

    begin = time.perf_counter()
    try:
        actions = lambda model, optimizer: made[0].actions(model, optimizer, steps)  # noqa: E731
        penalty = lambda model: made[0].penalty(model) if made[0].penalty else torch.zeros(())  # noqa: E731
        model = train_planted(task, adapt, lr, seed=seed, steps=steps, actions=actions, penalty=penalty)
        made[0].finish(model)
    except (FloatingPointError, ValueError, torch.linalg.LinAlgError):
        return {"error": "diverged"}
    took = time.perf_counter() - begin
    real = measure_planted(task, model, tolerance=0.25)
    found = measure_planted(task, model) | {f"real {i}": real[f"rank {i}"] for i in range(len(task.ranks))}
    del found["train mse"]
    kept = {k: int(v) if k.startswith(("rank", "real")) else round(v, 7) for k, v in found.items()}
    return {**kept, "train s": round(took, 3)}


def told(runs: Runs, things: Iterable[Any]) -> Runs:
    """Let the rows' provenance name the files of a method too, and of what it runs on.

    `adapter_arms` and `rank_allocators` are left out: an entry more changes no other arm.
    """
    files = {Path(file) for file in map(_file, things) if file is not None}
    runs.today["files"] |= {str(path.relative_to(ROOT)): code_digest(path) for path in sorted(files)}
    return runs


def _file(thing: Any) -> str | None:
    module = inspect.getmodule(thing)
    name = module.__name__ if module is not None else ""
    return module.__file__ if module is not None and name.startswith("lowrank_ref.") else None


def swept(out: Path, part: str, todo: Mapping[str, tuple[Runs, Row, float]], *, seeds: Any, rates: int) -> None:
    """Run the arms that no other process holds, then bring all of them to the same number of rates."""
    tried, most_added = rates, 6 if rates > 2 else 0
    while True:
        for name, (runs, row, middle) in todo.items():
            with claimed(out, f"{part} {name}") as mine:
                if mine:
                    keyed = partial(_keyed, runs, name, row)
                    metric = "valid mse" if part == "allocators" else "valid loss"
                    widen(Sweep(keyed, seeds, metric).mean, middle, first=rates, rates=tried, most=most_added)
        rows = next(iter(todo.values()))[0].rows if todo else []
        most = rates_tried(rows, todo)
        if most <= tried:
            return
        tried = most


def _keyed(runs: Runs, name: str, row: Row, lr: float, seed: int) -> Mapping[str, Any]:
    return runs.row({"method": name, "lr": lr, "seed": seed}, lambda: row(lr, seed))


def main() -> None:
    """Run the parts asked for; `--only` is matched with "part, arm"."""
    args = arguments(__doc__ or "", ("digits_shift", "allocators", "verses"))
    torch.set_num_threads(1)
    rates, seeds = (2, SEEDS[:1]) if args.tiny else (7, SEEDS)

    def opened(part: str, setting: str, things: Iterable[Any], **extra: Any) -> Runs:
        return told(Runs(args.out, part, setting=setting, seconds=args.seconds, **extra), things)

    def wanted(part: str, name: str) -> bool:
        return re.search(args.only, f"{part}, {name}") is not None

    if "digits_shift" in args.part:
        steps, model = 10 if args.tiny else 200, pretrained_on_digits()
        setting = (
            f"MLP 64-128-128-10, pretrained on 1,000 upright digits, learns the same turned by 90°; {steps} steps of "
            "Adam on 64 images, the rate falling linearly to 0"
        )
        limits = budgets(model, DIGITS)
        todo = {}
        for name, (method, size) in arms(model, DIGITS, limits).items():
            if wanted("digits_shift", name):
                made = digits_files(method, size)
                runs = opened("digits_shift", setting, made, budgets=limits, ranks=list(RANKS))
                row = partial(named, method, size, partial(digits_row, method, size, steps=steps))
                todo[name] = runs, row, METHODS[method].rates["digits"]
        swept(args.out, "digits_shift", todo, seeds=seeds, rates=rates)
    if "allocators" in args.part:
        steps = 20 if args.tiny else 400
        setting = f"planted ranks 0, 1, 1, 8 in four layers of width 32; {steps} steps of Adam, a task a seed"
        todo = {}
        for method, allocator in ALLOCATORS.items():
            for value in allocator.settings:
                if wanted("allocators", arm(method, value)):
                    runs = opened(
                        "allocators", setting, planted_files(allocator), packages=("peft",), truth=[0, 1, 1, 8]
                    )
                    row = partial(named, method, value, partial(planted_row, method, value, steps=steps))
                    todo[arm(method, value)] = runs, row, allocator.rate
        swept(args.out, "allocators", todo, seeds=seeds, rates=min(rates, 5))
    if "verses" in args.part:
        verses(args, opened, wanted, seeds[:3], min(rates, 5))


def named(method: str, size: float, row: Row, lr: float, seed: int) -> dict[str, Any]:
    """Add to a row what its arm is: the method, and its size or setting."""
    return {"name": method, "size": size, **row(lr, seed)}


def digits_files(method: str, size: int) -> list[Any]:
    """Return the classes that a method puts on the network."""
    return new_classes(pretrained_on_digits(), lambda model, generator: put(method, model, size, DIGITS, generator))


def planted_files(allocator: Allocator) -> list[Any]:
    """Return the classes that an allocator puts on the network with planted ranks."""
    model, setting = copy.deepcopy(planted_rank(0).base), allocator.settings[-1]
    return new_classes(model, lambda model, generator: allocator.put(model, setting, generator))


def new_classes(model: nn.Module, change: Callable[[nn.Module, torch.Generator], Any]) -> list[Any]:
    """Return the classes of the modules that a change puts into a model."""
    before = {id(module) for module in model.modules()}
    change(model, torch.Generator().manual_seed(0))
    return list({type(module) for module in model.modules() if id(module) not in before})


def verses(args: Any, opened: Any, wanted: Any, seeds: Any, rates: int) -> None:
    """Run the second bed."""
    steps = 4 if args.tiny else 150
    task = verse_data(args.device, args.tiny)
    x, y = task[1]["train"]

    def some(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        rows = torch.randperm(len(x), generator=generator)[:SAMPLES].to(x.device)
        return [(x[rows], y[rows])]

    bed = Bed("verses", LINEAR, r"^head\.", loss_fn, some, beside=r"^head\.")
    top = Top(task[0], task[2])
    limits = budgets(top, bed, (1, 8))
    setting = (
        f"all-MiniLM-L6-v2, all linear layers of its last two blocks, {COUNTS['train']:,} training, {COUNTS['valid']} "
        f"validation and {COUNTS['test']:,} test verses of 24 tokens, {steps} steps of 32, Adam, the rate falling "
        f"linearly to 0, a new head beside at {HEAD_LR}"
    )
    todo = {}
    for name, (method, size) in arms(top, bed, limits).items():
        if wanted("verses", name):
            extra: dict[str, Any] = {"packages": ("transformers",), "budgets": limits, "ranks": [1, 8]}
            runs = opened("verses", setting, digits_files(method, min(size, 8)), **extra)
            row = partial(named, method, size, partial(verses_row, method, size, bed, task, steps=steps))
            todo[name] = runs, row, METHODS[method].rates["verses"]
    swept(args.out, "verses", todo, seeds=seeds, rates=rates)


if __name__ == "__main__":
    main()
