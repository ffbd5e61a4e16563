"""CoDyRA at scale: a small language model learns four new languages in a row (one GPU, 20 minutes).

    python tests/benchmarks/bench_codyra.py --out book/results/codyra_scale.json

languages: a GPT of six blocks, width 512, pretrained on a mixture of five languages, learns four others one after the
other, all linear layers of the blocks adapted. In a language, two letters decide the odds of the next; each has 16
letters of 64. Rates are chosen on validation sentences. steps: time and memory of a training step.
"""

import copy
import re
from functools import cache, partial
from typing import Any

import torch
from bench_codyra_small import LORA, Setting, actions_of, finish, optimizer_of
from common import Runs, arguments, milliseconds, peak_mib, reset_peak
from torch import Tensor, nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lab.train import linear_decay, train, warmup_cosine
from lowrank_ref.ranks import start_task, task_scores

VOCABULARY, LETTERS, PLACES, OLD, NEW = 64, 16, 64, 5, 4
LAYERS = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"
ARMS = {
    "LoRA r=16": LORA,
    "LoRA r=1": Setting(rank=1),
    "LoRA r=16, merged × 0.6": Setting(factor=0.6),
    "LoRA r=16, decay 1": Setting(decay=1.0),
    "LoRA r=16, replay 500": Setting(replay=500),
    "CoDyRA, shrink 0.65": Setting(gate="normal", shrink=0.65),
    "CoDyRA, shrink 0.65, w untrained": Setting(gate="normal", shrink=0.65, trained=False),
    "CoDyRA, w = 1, rate × 7, shrink 1": Setting(gate="ones", ratio=7.0, shrink=1.0),
}
RATES = (0.000125, 0.00025, 0.0005, 0.001, 0.002, 0.004)


@cache
def language(number: int, device: str) -> dict[str, Tensor]:
    """Sentences of one language: training, validation and test."""
    g = torch.Generator().manual_seed(1000 + number)
    letters = torch.randperm(VOCABULARY, generator=g)[:LETTERS]
    odds = (2.2 * torch.randn(LETTERS, LETTERS, LETTERS, generator=g, dtype=torch.float64)).softmax(dim=-1)
    edges = odds.cumsum(dim=-1)[..., :-1]
    chain = list(torch.randint(LETTERS, (2, 5_000), generator=g))
    for u in torch.rand(20 + PLACES + 1, 5_000, generator=g, dtype=torch.float64):
        chain.append((u[:, None] > edges[chain[-2], chain[-1]]).sum(dim=-1))
    rows = letters[torch.stack(chain[-PLACES - 1 :], dim=1)].to(device)
    return {"train": rows[:4_000], "valid": rows[4_000:4_500], "test": rows[4_500:]}


def batches(rows: Tensor, seed: int, width: int = 32) -> Any:
    """Batches of sentences and what follows each letter."""
    index = array_batches(torch.arange(len(rows)), torch.arange(len(rows)), batch=width, seed=seed)

    def batch(i: int) -> tuple[Tensor, Tensor]:
        picked = rows[index(i)[0].to(rows.device)]
        return picked[:, :-1], picked[:, 1:]

    return batch


def loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Nats a letter, bf16 autocast."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return model.loss(x, y)


@cache
def pretrained(device: str, steps: int) -> GPT:
    """The model that knows five languages."""
    g = torch.Generator().manual_seed(0)
    model = GPT(VOCABULARY, dim=512, layers=6, heads=8, length=PLACES, generator=g).to(device)
    rows = torch.cat([language(i, device)["train"] for i in range(OLD)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = warmup_cosine(steps, warmup=max(1, steps // 20))
    train(model, batches(rows, 0, 64), loss, optimizer, steps=steps, schedule=schedule, clip=1.0, progress=False)
    return model


@torch.no_grad()
def look(model: GPT, device: str, part: str, count: int) -> list[float]:
    """Loss on some sentences of each new language, then on some of the old ones together."""
    new = [language(OLD + i, device)[part][:count] for i in range(NEW)]
    old = torch.cat([language(i, device)[part][: count // 2] for i in range(OLD)])
    return [loss(model, rows[:, :-1], rows[:, 1:]).item() for rows in (*new, old)]


def adapt(model: nn.Module, s: Setting, generator: torch.Generator) -> None:
    """Put fresh adapters into all linear layers of the blocks."""
    if s.gate is not None:
        start_task(model, LAYERS, s.rank, gate=s.gate, generator=generator)
    else:
        make = partial(LoRALinear, rank=s.rank, alpha=float(s.rank), generator=generator)
        replace_linears(model, LAYERS, make)


def run(name: str, lr: float, seed: int, *, device: str, steps: int, before: int, count: int) -> dict[str, Any]:
    """Learn four languages in an order that the seed turns."""
    s, model = ARMS[name], copy.deepcopy(pretrained(device, before))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    order = [(seed + i) % NEW for i in range(NEW)]
    old = [language(i, device)["train"][: s.replay // OLD] for i in range(OLD)] if s.replay else []
    R, tells = [], []
    try:
        for place, task in enumerate(order):
            generator = torch.Generator().manual_seed(1000 * seed + place)
            adapt(model, s, generator)
            optimizer = optimizer_of(model, s, lr)
            actions = actions_of(model, optimizer, s, steps, generator)
            rows = language(OLD + task, device)["train"]
            batch = new = batches(rows, 100 * seed + place, 16 if old else 32)
            if old:
                kept = batches(torch.cat(old), 100 * seed + place + 50, 16)
                batch = lambda i, a=new, b=kept: tuple(torch.cat(p) for p in zip(a(i), b(i)))  # noqa: E731
            schedule = linear_decay(steps)
            train(model, batch, loss, optimizer, steps=steps, schedule=schedule, actions=actions, progress=False)
            tells.append(finish(model, s))
            old += [rows[: s.replay]] if s.replay else []
            seen = look(model, device, "test", count)
            R.append([seen[i] for i in order])
    except FloatingPointError:
        return {"error": "diverged"}
    scores = task_scores(-torch.tensor(R, dtype=torch.float64))
    valid = look(model, device, "valid", count)
    drift = sum((p - start[n]).square().sum().item() for n, p in model.named_parameters())
    found = {
        "valid all": (sum(valid[:NEW]) / NEW + valid[NEW]) / 2,
        "plasticity": sum(R[i][i] for i in range(NEW)) / NEW,
        "last": -scores.last,
        "forgetting": scores.forgetting,
        "old languages": seen[NEW],
        "drift": drift**0.5,
    }
    means = {key: sum(t[key] for t in tells) / len(tells) for key in tells[0]}
    return {k: round(v, 4) for k, v in (found | means).items()}


def step_costs(name: str, device: str, before: int, repeats: int) -> dict[str, Any]:
    """Time and peak memory of a training step."""
    s, model = ARMS[name], copy.deepcopy(pretrained(device, before))
    adapt(model, s, torch.Generator().manual_seed(0))
    optimizer = optimizer_of(model, s, 1e-3)
    actions = actions_of(model, optimizer, s, 200, torch.Generator())
    batch = batches(language(OLD, device)["train"], 0)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, *batch(0)).backward()
        optimizer.step()
        for action in actions:
            action.step()

    step()
    reset_peak()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    timing = milliseconds(step, repeats=repeats)
    found = {"trainable": count, **timing, "peak_mib": round(peak_mib())}
    finish(model, s)
    return found | {"parameters after": sum(p.numel() for p in model.parameters())}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("languages", "steps"))
    torch.set_num_threads(1)
    steps, before, count = (4, 2, 2) if args.tiny else (150, 1500, 500)
    setting = (
        f"GPT of six blocks, width 512, {before} steps on five languages, then four others in a row, {steps} steps of "
        "32 sentences of 64 letters each, bf16 autocast; the order of the four turns with the seed"
    )
    if "languages" in args.part:
        runs = Runs(args.out, "languages", setting=setting, seconds=args.seconds)
        for name in ARMS:
            if re.search(args.only, name):
                for lr in RATES[:1] if args.tiny else RATES:
                    for seed in range(1 if args.tiny else 3):
                        measure = partial(
                            run, name, lr, seed, device=args.device, steps=steps, before=before, count=count
                        )
                        runs.row({"method": name, "lr": lr, "seed": seed}, measure)
    if "steps" in args.part:
        runs = Runs(args.out, "steps", setting=f"one training step; {setting}", seconds=args.seconds)
        for name in ("LoRA r=16", "CoDyRA, shrink 0.65"):
            if re.search(args.only, name):
                repeats = 3 if args.tiny else 50
                runs.row({"method": name}, partial(step_costs, name, args.device, before, repeats))


if __name__ == "__main__":
    main()
