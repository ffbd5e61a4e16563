"""What the chapter on SVFit is too short for: four shifts of the digits, every control, and MiniLM.

    python tests/benchmarks/bench_svfit_small.py --out book/results/svfit_small.json

digits: each arm with seven rates and five seeds on each of four shifts, 0.3 s a row on a CPU core. Rows tell, beside
the losses, after how many steps an arm was below 0.6 nats on validation and on test images (looked at every 10 steps;
210: never).
verses: from which group of books a verse is, by the last two layers of MiniLM; query and value are adapted, where
SVFit trains a sixteenth of what LoRA of rank 8 does. Seven rates and three seeds, 2 s a row on a GPU.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_lora_minilm import FROZEN, Top, run_layer, tokens
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear, PiSSALinear, SingularCoreLinear, SVFitLinear
from lowrank_ref.adapters.svfit import energy_rank
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.core.linalg import svd
from lowrank_ref.lab.beds import digits_shift, shifted_digits
from lowrank_ref.lab.data import array_batches, verse_topics
from lowrank_ref.lab.models import minilm

SEEDS = (0, 1, 2, 3, 4)
LEVEL, EVERY, NEVER = 0.6, 10, 210


class Plan(NamedTuple):
    """How an arm adapts a linear layer, where, and the rates that it tries."""

    make: Callable[[nn.Linear, torch.Generator], nn.Module] | None
    rates: tuple[float, ...]
    pattern: str = r"^layers\."


def doubling(start: float) -> tuple[float, ...]:
    """Return seven rates from `start` on, each twice the last."""
    return tuple(start * 2**i for i in range(7))


def capped(rank: int, linear: nn.Linear) -> int:
    """Return the rank, or what the layer can have."""
    return min(rank, *linear.weight.shape)


def pairs(kind: str = "top", rank: int = 1000, **options: Any) -> Callable[[nn.Linear, torch.Generator], nn.Module]:
    """Return what makes an SVFit layer with these pairs; a rank of 0 is that of 99 % of the layer's energy."""

    def make(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
        r = capped(rank, linear) if rank else energy_rank(svd(linear.weight.detach())[1])
        return SVFitLinear(linear, r, pairs=kind, generator=generator, **options)

    return make


def core(rank: int, form: str = "additive") -> Callable[[nn.Linear, torch.Generator], nn.Module]:
    """Return what makes an r x r core."""
    return lambda linear, generator: SingularCoreLinear(linear, capped(rank, linear), form=form)


def lora(rank: int, layer: Any = LoRALinear) -> Callable[[nn.Linear, torch.Generator], nn.Module]:
    """Return what makes LoRA or PiSSA with scale 2."""

    def make(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
        r = capped(rank, linear)
        return layer(linear, r, alpha=2 * r, generator=generator)

    return make


BY_VALUE, BY_CORE, BY_LORA = doubling(0.125), doubling(0.03125), doubling(0.004)
DIGITS = {
    "SVFit": Plan(pairs(), BY_VALUE),
    "shuffled pairs": Plan(pairs("shuffled"), BY_VALUE),
    "random pairs": Plan(pairs("random"), BY_VALUE),
    "SVFit, multiplicative": Plan(pairs(form="multiplicative"), BY_CORE),
    "LoRA r=8": Plan(lora(8), BY_LORA),
    "LoRA r=1": Plan(lora(1), BY_LORA),
    "LoRA r=1, first layer": Plan(lora(1), BY_LORA, r"layers\.0"),
    "LoRA r=1, middle layer": Plan(lora(1), BY_LORA, r"layers\.1"),
    "PiSSA r=8": Plan(lora(8, PiSSALinear), doubling(0.002)),
    "core r=8": Plan(core(8), BY_CORE),
    "LoRA-XS r=8": Plan(core(8, "multiplicative"), BY_CORE),
    "biases": Plan(None, doubling(0.02)),
    **{
        f"{name} r={r}": Plan(pairs(kind, r), BY_VALUE)
        for r in (8, 32)
        for name, kind in (("SVFit", "top"), ("bottom", "bottom"), ("any", "any"))
    },
    **{f"{kind} pairs r={r}": Plan(pairs(kind, r), BY_VALUE) for r in (8, 32) for kind in ("shuffled", "random")},
    **{
        f"{name} 99 %": Plan(pairs(kind, 0), BY_VALUE)
        for name, kind in (("SVFit", "top"), ("bottom", "bottom"), ("any", "any"))
    },
}
ON_TWO_SHIFTS = re.compile("^(any|bottom)|99 %$")  # which values: only on the turned and the negative digits
VERSES = {
    "head only": Plan(None, doubling(0.001), "nothing"),
    "SVFit": Plan(pairs(), doubling(0.015625)),
    "shuffled pairs": Plan(pairs("shuffled"), doubling(0.015625)),
    "random pairs": Plan(pairs("random"), doubling(0.015625)),
    "LoRA r=8": Plan(lora(8), doubling(0.001)),
    "LoRA r=1": Plan(lora(1), doubling(0.001)),
    "PiSSA r=8": Plan(lora(8, PiSSALinear), doubling(0.00025)),
    "core r=19": Plan(core(19), doubling(0.004)),
    "biases": Plan(None, doubling(0.004), r"(query|value)\.bias$"),
}
QUERY_VALUE, HEAD_LR = r"(query|value)$", 0.01


class Watch:
    """Looks at the losses every few steps; an action that changes nothing."""

    def __init__(self, model: nn.Module, shift: str) -> None:
        self.model, self.data, self.step_count = model, shifted_digits(shift), 0
        self.reached = {"valid": NEVER, "test": NEVER}

    @torch.no_grad()
    def step(self) -> None:
        """Note the first time that a loss is below the level."""
        self.step_count += 1
        if self.step_count % EVERY == 0:
            for part in self.reached:
                x, y = getattr(self.data, f"x_{part}"), getattr(self.data, f"y_{part}")
                if self.reached[part] == NEVER and F.cross_entropy(self.model(x), y) < LEVEL:
                    self.reached[part] = self.step_count

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


def adapt(model: nn.Module, generator: torch.Generator, plan: Plan) -> None:
    """Adapt the network in place, or leave nothing to train but its biases."""
    if plan.make is None:
        for path, p in model.named_parameters():
            p.requires_grad_(path.endswith("bias"))
    else:
        replace_linears(model, plan.pattern, lambda linear: plan.make(linear, generator))


def shifted(plan: Plan, shift: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one arm on a shift; losses in nats."""
    watches: list[Watch] = []

    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Watch]:
        watches.append(Watch(model, shift))
        return watches

    try:
        found = digits_shift(partial(adapt, plan=plan), lr, seed, steps=steps, actions=watch, shift=shift)
    except FloatingPointError:
        return {"error": "diverged"}
    kept = {name: round(found[name], 4) for name in ("trainable", "valid loss", "loss", "accuracy")}
    return {**kept, "valid steps": watches[0].reached["valid"], "steps": watches[0].reached["test"]}


def verse_data(device: str, tiny: bool) -> tuple[Any, dict[str, tuple[Tensor, Tensor]], int]:
    """Return MiniLM's last layers, the activations of the frozen ones with labels by part, and the classes."""
    data = verse_topics()
    encoder, tokenizer = minilm()
    tokenizer.no_padding()
    encoder.to(device)
    found = {}
    for part, count in (("train", 2000), ("valid", 400), ("test", 1000)):
        labels = getattr(data, f"{part}_labels")
        ids, labels = tokens(tokenizer, getattr(data, part), labels, 64 if tiny else count)
        chunks = []
        with torch.no_grad():
            for rows in ids.to(device).split(100):
                hidden = encoder.embeddings(rows)
                for layer in encoder.encoder.layer[:FROZEN]:
                    hidden = run_layer(layer, hidden)
                chunks.append(hidden)
        found[part] = torch.cat(chunks), labels.to(device)
    return encoder.encoder.layer[FROZEN:], found, len(data.classes)


def verse_run(plan: Plan, layers: Any, data: Any, classes: int, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one arm and a new head on the verses; the head has one rate for all arms but its own."""
    x, y = data["train"]
    top = Top(layers.cpu(), classes)
    if plan.make is None:
        for path, p in top.layers.named_parameters():
            p.requires_grad_(re.search(plan.pattern, path) is not None)
    else:
        generator = torch.Generator().manual_seed(seed)
        replace_linears(top, QUERY_VALUE, lambda linear: plan.make(linear, generator), trainable="^head")
    top.to(x.device)
    body, head = [p for p in top.layers.parameters() if p.requires_grad], list(top.head.parameters())
    groups = [{"params": body, "rate": lr}, {"params": head, "rate": HEAD_LR if body else lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    batch = array_batches(x, y, batch=32, seed=seed)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - i / steps)
        inputs, labels = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(top(inputs), labels).backward()
        optimizer.step()
    found: dict[str, Any] = {"trainable": sum(p.numel() for p in body)}
    for name, part in (("valid loss", "valid"), ("loss", "test")):
        inputs, labels = data[part]
        with torch.no_grad():
            logits = torch.cat([top(rows) for rows in inputs.split(100)])
        found[name] = round(F.cross_entropy(logits, labels).item(), 4)
        found[name.replace("loss", "accuracy")] = round((logits.argmax(1) == labels).float().mean().item(), 4)
    return found if found["valid loss"] == found["valid loss"] else {"error": "diverged"}


def main() -> None:
    """Run the parts asked for; `--only` is matched with "shift, method"."""
    args = arguments(__doc__ or "", ("digits", "verses"))
    torch.set_num_threads(1)
    if "digits" in args.part:
        steps = 20 if args.tiny else 200
        for shift in ("turned", "negative", "moved", "relabelled"):
            setting = (
                f"MLP 64-128-128-10, pretrained on 1,000 upright digits, learns the same {shift}; Adam, {steps} steps "
                "of 64 images, the rate falling linearly to 0"
            )
            runs = Runs(args.out, shift, setting=setting, seconds=args.seconds)
            for name, plan in DIGITS.items():
                left_out = shift in ("moved", "relabelled") and ON_TWO_SHIFTS.search(name)
                if re.search(args.only, f"{shift}, {name}") and not left_out:
                    for seed in SEEDS[:1] if args.tiny else SEEDS:
                        for lr in plan.rates:
                            key = {"method": name, "lr": lr, "seed": seed}
                            runs.row(key, partial(shifted, plan, shift, steps, lr, seed))
    if "verses" in args.part:
        steps = 2 if args.tiny else 150
        setting = (
            "all-MiniLM-L6-v2, query and value of its last two layers, 2,000 training, 400 validation and 1,000 test "
            f"verses of 24 tokens, {steps} steps of 32, Adam, the rate falling linearly to 0, a new head at {HEAD_LR}"
        )
        runs = Runs(args.out, "verses", setting=setting, packages=("transformers",), seconds=args.seconds)
        wanted = {name: plan for name, plan in VERSES.items() if re.search(args.only, f"verses, {name}")}
        if wanted:
            layers, data, classes = verse_data(args.device, args.tiny)
        for name, plan in wanted.items():
            for seed in SEEDS[:3]:
                for lr in plan.rates:
                    key = {"method": name, "lr": lr, "seed": seed}
                    runs.row(key, partial(verse_run, plan, layers, data, classes, steps, lr, seed))


if __name__ == "__main__":
    main()
