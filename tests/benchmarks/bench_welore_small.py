"""WeLore's two halves on small models: which ranks to keep (MiniLM), and what to train afterwards (a small GPT).

    python tests/benchmarks/bench_welore_small.py --part minilm --out book/results/welore_small.json
    python tests/benchmarks/bench_welore_small.py --part tuning --out book/results/welore_small.json

minilm: all-MiniLM-L6-v2, its 36 matrices, every arm of `spectral_arms`. 256 test verses in 16 groups: mean cosine to
the vectors of the uncut model, and accuracy of a linear probe fitted on vectors of the uncut model. Compression has no
seed and no rate: the groups of verses are what intervals rest on. 3 s a row.
tuning: a GPT of width 64 that has learned the Markov language. "cut": half of the rank asked for, then 150 steps of
tuning of the low-rank components, of the others, and of controls. "uncut": the same sets of matrices, dense and whole,
learn the language read backwards. Embedding, head and norms are frozen everywhere. 1 to 3 s a row on a core.
"""

import copy
import functools
import re
from typing import Any

import torch
from common import Runs, arguments
from later_speeches import base_model
from spectral_arms import Cutter, dealt, grouped
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.compression import RankPlan, WeLoreLinear, cut_model, plan_ranks, plan_within
from lowrank_ref.core.accounting import numel, state_bytes
from lowrank_ref.core.layers import put_in_place, replace_linears
from lowrank_ref.lab.beds import markov_language
from lowrank_ref.lab.data import array_batches, verse_topics
from lowrank_ref.lab.models import GPT, embed_sentences, minilm
from lowrank_ref.lab.train import train, warmup_cosine

MINILM = r"layer\.\d+\.(attention.*(query|key|value|dense)|(intermediate|output)\.dense)$"
GROUPS, VERSES, PROBED, SEEN, WORDS = 16, 256, 3000, 512, 32

SIZE = {"vocab_size": 16, "dim": 64, "layers": 2, "heads": 4, "length": 24}
PRETRAINING, SEEDS = 1500, range(5)
RATES = {"cut": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), "uncut": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
STEPS = {"cut": 150, "uncut": 300}
ARMS = {
    "cut": ("LRC", "N-LRC", "both", "LoRA", "LRC places, dense", "dealt LRC", "uniform, all", "tail, all"),
    "uncut": ("LRC places", "N-LRC places", "random places", "all"),
}


def spread(items: list[Any], count: int) -> list[Any]:
    """Pick so many items, evenly spread."""
    return [items[i * len(items) // count] for i in range(count)]


def encoder_arms(runs: Runs, tiny: bool, only: str) -> None:
    """Cut MiniLM in all ways."""
    data, (model, tokenizer) = verse_topics(), minilm()
    tokenizer.enable_truncation(WORDS)
    counts = (64, 300, 64) if tiny else (VERSES, PROBED, SEEN)
    texts, labels = spread(data.test, counts[0]), torch.stack(spread(list(data.test_labels), counts[0]))
    probed, classes = spread(data.train, counts[1]), torch.stack(spread(list(data.train_labels), counts[1]))
    calibration = spread(data.train, counts[2])
    vectors = embed_sentences(model, tokenizer, probed)
    probe = torch.zeros(len(data.classes), vectors.shape[1] + 1, requires_grad=True)
    with_one = F.pad(vectors, (0, 1), value=1.0)
    lbfgs = torch.optim.LBFGS([probe], max_iter=200, line_search_fn="strong_wolfe")

    def fit() -> torch.Tensor:
        lbfgs.zero_grad()
        value = F.cross_entropy(with_one @ probe.T, classes) + 1e-4 * probe.square().sum()
        value.backward()
        return value

    lbfgs.step(fit)
    weight = probe.detach()
    original = embed_sentences(model, tokenizer, texts)
    cutter = Cutter(model, MINILM, lambda: embed_sentences(model, tokenizer, calibration))

    def score() -> dict[str, list[float]]:
        found = embed_sentences(model, tokenizer, texts)
        right = (F.pad(found, (0, 1), value=1.0) @ weight.T).argmax(1) == labels
        cosine = (found * original).sum(1)
        return {"cosine": grouped(cosine, GROUPS), "accuracy": grouped(right.double(), GROUPS)}

    whole = {path: min(shape) for path, shape in cutter.shapes.items()}
    key = {"method": "uncut", "at": "-", "value": 0.0, "draw": 0}
    runs.row(key, lambda: cutter.measure(whole, 0, score))
    for key, ranks, aware in cutter.arms():
        if re.search(only, key["method"]):
            runs.row(key, lambda ranks=ranks, aware=aware: cutter.measure(ranks, aware, score) | {"ranks": ranks})


@functools.cache
def languages() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return bed -> sentences to train on, to choose by and to report on; "uncut" reads them backwards."""
    rows, held_out, _ = markov_language()
    parts = rows[:-1000], rows[-1000:], held_out
    return {"cut": parts, "uncut": tuple(part.flip(1) for part in parts)}


def batches(rows: torch.Tensor, batch: int, seed: int) -> Any:
    """Batches of sentences."""
    return array_batches(rows[:, :-1], rows[:, 1:], batch=batch, seed=seed)


@torch.no_grad()
def loss_of(model: GPT, rows: torch.Tensor) -> float:
    """Loss in nats a letter."""
    return round(model.loss(rows[:, :-1], rows[:, 1:]).item(), 5)


@functools.cache
def pretrained(seed: int, steps: int) -> GPT:
    """Return a GPT that has learned the language; made once a machine."""

    def learn(model: GPT) -> GPT:
        adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        how = {"steps": steps, "schedule": warmup_cosine(steps, warmup=steps // 10), "clip": 1.0, "progress": False}
        train(model, batches(languages()["cut"][0], 64, seed), GPT.loss, adam, **how)
        return model

    def make() -> GPT:
        return GPT(**SIZE, generator=torch.Generator().manual_seed(seed))

    return base_model(f"welore {SIZE} {seed} {steps}", make, learn)


def weights_at(model: nn.Module, paths: Any) -> list[nn.Parameter]:
    """Parameters of the layers at these paths."""
    return [p for path in paths for p in model.get_submodule(path).parameters()]


def undo(model: nn.Module) -> nn.Module:
    """Multiply all factors out again: the cut function with dense matrices."""
    put_in_place(model, {id(m): m.to_linear() for m in model.modules() if isinstance(m, WeLoreLinear)})
    return model


def uniform(plan: RankPlan) -> RankPlan:
    """The same share of every matrix, as large as the plan."""
    ranks = {path: int(plan.kept * m * n / (m + n)) for path, (m, n) in plan.shapes.items()}
    return RankPlan(ranks, plan.shapes, tuple(ranks), plan.threshold, plan.nominal)


def prepare(bed: str, arm: str, model: GPT, seed: int) -> tuple[GPT, list[nn.Parameter], float, RankPlan]:
    """Cut, choose what trains; return also the loss before tuning."""
    plan = plan_ranks(model, 0.5, r"^blocks\.")
    low, rest = plan.low_rank, [path for path in plan.ranks if path not in plan.low_rank]
    kept = {path: plan.ranks[path] if path in low else min(plan.shapes[path]) for path in plan.ranks}
    moved = dealt(kept, plan.shapes, seed)
    elsewhere = tuple(path for path in moved if moved[path] < min(plan.shapes[path]))
    if bed == "cut":
        cut_model(model, {
            "dealt LRC": RankPlan(moved, plan.shapes, elsewhere, plan.threshold, plan.nominal),
            "uniform, all": uniform(plan),
            "tail, all": plan_within(model, plan.kept, r"^blocks\."),
        }.get(arm, plan))  # fmt: skip
    if arm in ("LoRA", "LRC places, dense"):
        undo(model)
    start = loss_of(model, languages()[bed][2])
    if arm == "LoRA":
        rank = max(1, round(plan.trainable / sum(map(sum, plan.shapes.values()))))
        g = torch.Generator().manual_seed(seed)
        replace_linears(model, r"^blocks\.", lambda base: LoRALinear(base, rank, alpha=2 * rank, generator=g))
        return model, [p for p in model.parameters() if p.requires_grad], start, plan
    which = {
        "N-LRC": rest, "N-LRC places": rest, "both": plan.ranks, "all": plan.ranks,
        "uniform, all": plan.ranks, "tail, all": plan.ranks, "dealt LRC": elsewhere, "random places": elsewhere,
    }.get(arm, low)  # fmt: skip
    return model, weights_at(model, which), start, plan


def tune(bed: str, arm: str, lr: float, seed: int, tiny: bool) -> dict[str, Any]:
    """Tune once."""
    model = copy.deepcopy(pretrained(seed, 30 if tiny else PRETRAINING))
    rows, valid, test = languages()[bed]
    whole, steps = loss_of(model, languages()["cut"][2]), 5 if tiny else STEPS[bed]
    model, trained, start, plan = prepare(bed, arm, model, seed)
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    adam = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    how = {"steps": steps, "schedule": warmup_cosine(steps, warmup=steps // 10), "progress": False}
    try:
        train(model, batches(rows, 32, 100 + seed), GPT.loss, adam, **how)
    except FloatingPointError as error:
        return {"error": f"FloatingPointError: {error}"}
    return {
        "valid loss": loss_of(model, valid), "loss": loss_of(model, test), "start": start, "whole": whole,
        "trainable": numel(trained), "state bytes": state_bytes(adam), "reached": round(plan.reached, 4),
        "kept": round(plan.kept, 4), "low rank": len(plan.low_rank),
    }  # fmt: skip


def tuning_arms(runs: Runs, tiny: bool, only: str) -> None:
    """Tune with all arms, rates and seeds."""
    for seed in list(SEEDS)[: 1 if tiny else None]:
        for bed, arms in ARMS.items():
            for arm in arms:
                for lr in RATES[bed][: 1 if tiny else None] if re.search(only, f"{bed}: {arm}, seed {seed}") else ():
                    key = {"method": f"{bed}: {arm}", "lr": lr, "seed": seed}
                    runs.row(key, lambda b=bed, a=arm, lr=lr, seed=seed: tune(b, a, lr, seed, tiny))


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("minilm", "tuning"))
    torch.set_num_threads(1)
    options = {"seconds": args.seconds, "packages": ("transformers",)}
    if "minilm" in args.part:
        setting = (
            f"all-MiniLM-L6-v2, 36 matrices; {VERSES} test verses, {WORDS} tokens at most, in {GROUPS} groups; probe "
            f"fitted on {PROBED:,} and "
            f"covariances taken from {SEEN} training verses, spread evenly; {len(verse_topics().classes)} classes"
        )
        encoder_arms(Runs(args.out, "minilm", setting=setting, **options), args.tiny, args.only)
    if "tuning" in args.part:
        setting = (
            f"GPT {SIZE}, {PRETRAINING} steps of 64 sentences, AdamW at 3e-3; ERR 50 % asked, min_ratio 0.4999; tuned "
            f"{STEPS['cut']} steps (cut) and {STEPS['uncut']} (uncut) of 32 sentences, AdamW, cosine to a tenth"
        )
        tuning_arms(Runs(args.out, "tuning", setting=setting, **options), args.tiny, args.only)


if __name__ == "__main__":
    main()
