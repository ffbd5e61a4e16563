"""What the chapter on BA-LoRA is too short for: four beds with planted biases (CPU, 25 minutes on one core).

    python tests/benchmarks/bench_ba_lora_small.py --out book/results/ba_lora_small.json --device cpu

skew: the task lacks half of its classes, and labels are wrong. contrast: the same where the pretrained network sees
more of it, or less. wrong: the task is clean, labels of the pretraining were wrong. mark: a mark told the class in the
pretraining, and tells nothing in the task. language: a small GPT learns a language with its letters relabelled, from
few sentences of which a tenth of the letters are wrong.

Each arm is tried at four settings of its own knob, beside four rates (language: two and three): as many trials each.
Settings and rates are chosen on validation data, everything else is measured on test data.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import (
    LoRALinear,
    OutputPenalty,
    PiSSALinear,
    covariance_penalty,
    response_logits,
    singular_penalty,
    teacher_logits,
    temperature_kl,
)
from lowrank_ref.adapters.ba_lora import PUBLISHED
from lowrank_ref.core.layers import adapters, merge_adapters, replace_linears, weight_of
from lowrank_ref.lab.beds import BiasedDigits, biased_digits, markov_language, train_biased
from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lab.train import linear_decay, train, warmup_cosine

RANK = 4


@dataclass(frozen=True)
class Setting:
    """One arm at one setting of its knob.

    Attributes:
        kind: "PiSSA", "LoRA" or "full".
        penalties: λ1, λ2, λ3.
        steps: optimizer steps.
        power: class c weighs n_c^-power in the loss, n_c its count in the training set.
        adjust: τ; after training τ·log(share of the class) is taken off the logits.
        back: share of the update that is taken back after training.
        decay: what the sum of ‖ΔW‖² is multiplied with in the loss.
        teacher: whose outputs λ1 pulls to: "own" is the pretrained network; "ignorant", the uniform distribution;
            "shuffled", the pretrained network's on another image of the batch; "clean", those of the same network
            pretrained with marks that tell nothing.
        replay: so many images of the pretraining are kept; half of every batch are such.
    """

    kind: str = "PiSSA"
    penalties: tuple[float, float, float] = (0.0, 0.0, 0.0)
    steps: int = 200
    power: float = 0.0
    adjust: float = 0.0
    back: float = 0.0
    decay: float = 0.0
    teacher: str = "own"
    replay: int = 0


PISSA, LORA, FULL = Setting(), Setting("LoRA"), Setting("full")
CR, DR, SVD = (0.1, 0.2, 0.4, 0.8), (1e-4, 1e-3, 3e-3, 1e-2), (0.01, 0.03, 0.1, 0.3)
#: λ1 where the task is clean and a strong pull only hurts.
LIGHT = (0.02, 0.05, 0.1, 0.2)
PAPER = PUBLISHED
ALL = ((0.2, 1e-4, 0.03), (0.2, 1e-3, 0.3), (0.4, 1e-4, 0.03), (0.4, 1e-3, 0.3))


def knob(base: Setting, field: str, values: Any) -> dict[str, Setting]:
    """Setting's name -> setting, with one field changed."""
    return {f"{field} {value}": replace(base, **{field: value}) for value in values}


def weighted(base: Setting, *penalties: tuple[float, float, float]) -> dict[str, Setting]:
    """Setting's name -> setting, with other λ."""
    return {"λ " + " ".join(f"{v:g}" for v in p): replace(base, penalties=p) for p in penalties}


def scaled(*factors: float) -> list[tuple[float, float, float]]:
    """Return the paper's λ, times these."""
    return [tuple(round(c * v, 4) for v in PAPER) for c in factors]


STEPS = (50, 100, 200, 400)
#: Arm -> its settings, by name.
SKEW: dict[str, dict[str, Setting]] = {
    "PiSSA": knob(PISSA, "steps", STEPS),
    "LoRA": knob(LORA, "steps", STEPS),
    "full": knob(FULL, "steps", STEPS),
    "CR": weighted(PISSA, *((v, 0.0, 0.0) for v in CR)),
    "DR": weighted(PISSA, *((0.0, v, 0.0) for v in DR)),
    "SVD": weighted(PISSA, *((0.0, 0.0, v) for v in SVD)),
    "CR + DR": weighted(PISSA, *((a, b, 0.0) for a in CR[1:3] for b in DR[:2])),
    "CR + SVD": weighted(PISSA, *((a, 0.0, b) for a in CR[1:3] for b in (0.03, 0.3))),
    "DR + SVD": weighted(PISSA, *((0.0, a, b) for a in DR[:2] for b in (0.03, 0.3))),
    "all": weighted(PISSA, *ALL),
    "all, paper's ratios": weighted(PISSA, *scaled(0.1, 0.3, 1.0, 3.0)),
    "LoRA, CR": weighted(LORA, *((v, 0.0, 0.0) for v in CR)),
    "LoRA, all": weighted(LORA, *ALL),
    "taken back": knob(PISSA, "back", (0.2, 0.3, 0.4, 0.6)),
    "‖ΔW‖²": knob(PISSA, "decay", (3e-4, 1e-3, 3e-3, 1e-2)),
    "balanced loss": knob(PISSA, "power", (0.25, 0.5, 0.75, 1.0)),
    "balanced, CR": {
        f"power {p}, λ {v:g}": replace(PISSA, power=p, penalties=(v, 0.0, 0.0)) for p in (0.5, 1.0) for v in CR[1:3]
    },
    "logits adjusted": knob(PISSA, "adjust", (0.25, 0.5, 0.75, 1.0)),
    "CR, ignorant": weighted(replace(PISSA, teacher="ignorant"), *((v, 0.0, 0.0) for v in CR)),
    "CR, shuffled": weighted(replace(PISSA, teacher="shuffled"), *((v, 0.0, 0.0) for v in CR)),
    "replay": knob(PISSA, "replay", (10, 20, 50, 100)),
}
#: The paper's own λ, term by term: nothing to tune but the rate.
TERMS = {
    f"paper's λ: {name}": weighted(PISSA, tuple(v * on for v, on in zip(PAPER, mask)))
    for name, mask in {
        "CR": (1, 0, 0), "DR": (0, 1, 0), "SVD": (0, 0, 1), "CR + DR": (1, 1, 0), "CR + SVD": (1, 0, 1),
        "DR + SVD": (0, 1, 1), "all": (1, 1, 1), "none": (0, 0, 0),
    }.items()
}  # fmt: skip
LIGHT_CR = weighted(PISSA, *((v, 0.0, 0.0) for v in LIGHT))
CLEAN = {
    "PiSSA": SKEW["PiSSA"],
    "CR": LIGHT_CR,
    "all": weighted(PISSA, *((v, b, c) for v in (0.05, 0.1) for b, c in ((1e-4, 0.03), (1e-3, 0.3)))),
}
MARK = {
    **CLEAN,
    "LoRA": SKEW["LoRA"],
    "full": SKEW["full"],
    "CR, strong": SKEW["CR"],
    "CR, clean teacher": weighted(replace(PISSA, teacher="clean"), *((v, 0.0, 0.0) for v in LIGHT)),
    "CR, clean teacher, strong": weighted(replace(PISSA, teacher="clean"), *((v, 0.0, 0.0) for v in CR)),
}
RATES = {"PiSSA": (0.0025, 0.005, 0.01, 0.02), "LoRA": (0.005, 0.01, 0.02, 0.04), "full": (0.0005, 0.001, 0.002, 0.004)}

FAIR = {"kept": 1.0, "flipped": 0.0}
BEDS = {
    "skew": {"skew": {}},
    "contrast": {"contrast 1": {"contrast": 1.0}, "weak": {"contrast": 0.5, "shift": (1, 1)}},
    "wrong": {f"wrong {w:g}": FAIR | {"wrong": w} for w in (0.0, 0.3, 0.6)},
    "mark": {"mark": FAIR | {"agreement": 0.95}, "no mark": FAIR | {"agreement": 0.5}},
}


# --- digits -----------------------------------------------------------------------------------------------------------


def adapt(s: Setting, model: nn.Module, generator: torch.Generator) -> None:
    """Adapt all layers, or none."""
    if s.kind == "full":
        return

    def layer(linear: nn.Module) -> nn.Module:
        rank = min(RANK, *weight_of(linear).shape)
        kind = PiSSALinear if s.kind == "PiSSA" else LoRALinear
        return kind(linear, rank, alpha=float(rank), generator=generator)  # scale 1

    replace_linears(model, "", layer)


def pull(s: Setting, teacher: nn.Module | None, seed: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Return (model, x, student's logits) -> the teacher's logits."""
    g = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def logits(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        if s.teacher == "ignorant":
            return torch.zeros_like(z)
        if s.teacher == "clean":
            return teacher(x)
        own = teacher_logits(model, x)
        return own[torch.randperm(len(x), generator=g)] if s.teacher == "shuffled" else own

    return logits


def loss_of(s: Setting, data: BiasedDigits, teacher: nn.Module | None, seed: int) -> Callable[..., Tensor]:
    """What is minimised."""
    penalty, logits = OutputPenalty(penalties=s.penalties), pull(s, teacher, seed)
    counts = torch.bincount(data.new[1], minlength=10).clamp_min(1).float()
    weight = counts**-s.power / (counts**-s.power * counts).sum() * counts.sum()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = model(x)
        per = F.cross_entropy(z, y, reduction="none")
        value = (per * weight[y]).mean() + penalty(z, logits(model, x, z) if s.penalties[0] else None)
        if s.decay:
            value = value + s.decay * sum(layer.delta_weight().square().sum() for _, layer in adapters(model))
        return value

    return loss


@torch.no_grad()
def finish(model: nn.Module, s: Setting, data: BiasedDigits) -> dict[str, float]:
    """Take back or adjust, and look at the logits of the validation images."""
    if s.back:
        merge_adapters(model)
        for p, start in zip(model.parameters(), data.model().parameters()):
            p.copy_(torch.lerp(p, start, s.back))
    if s.adjust:
        share = torch.bincount(data.new[1], minlength=10).clamp_min(1) / len(data.new[1])
        last = model.layers[-1]
        getattr(last, "base", last).bias.sub_(s.adjust * share.log())
    x = data.as_task(data.valid[0])
    z, teacher = model(x), data.model()(x)
    return {
        "kl": temperature_kl(z, teacher).item(),
        "covariance": covariance_penalty(z).item(),
        "share": -singular_penalty(z, top=5).item(),
    }


def mixed(data: BiasedDigits, count: int) -> BiasedDigits:
    """Give a task's training set as many kept images of the pretraining as it has of its own."""
    (x, y), (u, v) = data.new, (part[:count] for part in data.old)
    rows = torch.arange(len(x)) % count
    return replace(data, new=(torch.cat([x, u[rows]]), torch.cat([y, v[rows]])))


def run_digits(s: Setting, options: dict[str, Any], lr: float, seed: int, *, share: float) -> dict[str, Any]:
    """Train one arm once on a bed."""
    data = biased_digits(seed, **options)
    teacher = biased_digits(seed, **options | {"agreement": 0.5}).model() if s.teacher == "clean" else None
    seen = mixed(data, s.replay) if s.replay else data
    numbers = train_biased(
        seen, partial(adapt, s), lr, seed,
        steps=max(1, round(share * s.steps)), loss_fn=loss_of(s, data, teacher, seed),
        finish=partial(finish, s=s, data=data),
    )  # fmt: skip
    return rounded({"valid error": 1 - numbers["valid accuracy"], **numbers})


def rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    """Five digits are enough."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in numbers.items()}


# --- language ---------------------------------------------------------------------------------------------------------

LETTERS, PROMPT, LENGTH = 16, 12, 24
OFFICIAL = OutputPenalty.generation().penalties
#: The matrix of a batch's logits has 16 columns, of which the official ten singular values would be most.
TOP = 4
HUNDRED = replace(PISSA, steps=100)
LANGUAGE = {
    "PiSSA": knob(PISSA, "steps", (50, 100)),
    "CR": weighted(HUNDRED, *((v, 0.0, 0.0) for v in (0.025, 0.25))),
    "DR": weighted(HUNDRED, *((0.0, v, 0.0) for v in (0.005, 0.05))),
    "SVD": weighted(HUNDRED, *((0.0, 0.0, v) for v in (0.005, 0.1))),
    "all": weighted(HUNDRED, *(tuple(c * v for v in OFFICIAL) for c in (1, 10))),
}
LANGUAGE_RATES = (0.0025, 0.005, 0.01)


@functools.cache
def language_base(steps: int) -> dict[str, Tensor]:
    """Weights of a GPT that speaks the Markov language."""
    rows, _, _ = markov_language()
    model = GPT(LETTERS, dim=48, layers=2, heads=2, length=LENGTH, generator=torch.Generator().manual_seed(0))
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    batch = array_batches(rows[:, :-1], rows[:, 1:], batch=32, seed=0)
    schedule = warmup_cosine(steps, warmup=steps // 10)
    train(model, batch, GPT.loss, adam, steps=steps, schedule=schedule, clip=1.0, progress=False)
    return model.state_dict()


def relabelled(rows: Tensor, seed: int) -> Tensor:
    """The task's language: four letters have changed places."""
    g = torch.Generator().manual_seed(seed)
    four = torch.randperm(LETTERS, generator=g)[:4]
    table = torch.arange(LETTERS)
    table[four] = four.roll(1)
    return table[rows]


def responses(rows: Tensor) -> Tensor:
    """Labels: the letters after the prompt."""
    return torch.cat([torch.full_like(rows[:, :PROMPT], -100), rows[:, PROMPT:]], 1)


def response_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the response, in nats a letter."""
    return F.cross_entropy(response_logits(model(tokens), labels), labels[:, 1:][labels[:, 1:] != -100])


def run_language(s: Setting, lr: float, seed: int, *, share: float) -> dict[str, Any]:
    """Adapt the GPT once."""
    rows, held_out, _ = markov_language()
    rows, held_out = rows[:, :LENGTH], held_out[:, :LENGTH]
    g = torch.Generator().manual_seed(seed)
    clean = relabelled(rows[torch.randperm(len(rows), generator=g)[:300]], seed)
    noise = torch.randint(LETTERS, clean.shape, generator=g)
    seen = torch.where(torch.rand(clean.shape, generator=g) < 0.1, noise, clean)
    model = GPT(LETTERS, dim=48, layers=2, heads=2, length=LENGTH)
    model.load_state_dict(language_base(max(1, round(share * 400))))
    model.eval()
    replace_linears(model, r"blocks\.", partial(PiSSALinear, rank=RANK, alpha=float(RANK)))
    singular = partial(singular_penalty, top=TOP, norm="frobenius")
    penalty = OutputPenalty.generation(penalties=s.penalties, singular=singular)

    def loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
        z = response_logits(model(tokens), labels)
        teacher = response_logits(teacher_logits(model, tokens), labels) if s.penalties[0] else None
        return F.cross_entropy(z, labels[:, 1:][labels[:, 1:] != -100]) + penalty(z, teacher)

    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = max(1, round(share * s.steps))
    batch = array_batches(seen, responses(seen), batch=16, seed=seed)
    train(model, batch, loss, adam, steps=steps, schedule=linear_decay(steps), progress=False)
    with torch.no_grad():
        parts = {"valid loss": held_out[:300], "loss": held_out[300:600]}
        found = {k: response_loss(model, *both(relabelled(part, seed))).item() for k, part in parts.items()}
        found["old"] = response_loss(model, *both(held_out[300:600])).item()
        base = GPT(LETTERS, dim=48, layers=2, heads=2, length=LENGTH)
        base.load_state_dict(language_base(max(1, round(share * 400))))
        found["start old"] = response_loss(base, *both(held_out[300:600])).item()
        found["start"] = response_loss(base, *both(relabelled(held_out[300:600], seed))).item()
    return rounded(found)


def both(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and labels."""
    return rows, responses(rows)


# --- all --------------------------------------------------------------------------------------------------------------

WORDS = {
    "skew": "MLP 64-128-128-10 pretrained on 600 digits; task: 500 others lower and paler, 6 % of classes 5 to 9 kept, "
    "15 % of labels wrong; {} steps of Adam of 64 images, rank 4, scale 1",
    "contrast": "as skew, at contrast 1, and at contrast 0.5 moved along the diagonal; {} steps",
    "wrong": "task: 500 digits lower and paler, all classes, right labels; 0, 30 or 60 % of the labels of the "
    "pretraining wrong; {} steps",
    "mark": "task as in wrong; in the pretraining two white pixels told classes 5 to 9 with 95 %, or with 50 %; "
    "{} steps",
    "language": "GPT of width 48 on the Markov language; task: four of 16 letters relabelled, 300 sentences, 10 % of "
    "the letters wrong, the first 12 of 24 are a prompt; {} steps, rank 4, scale 1",
}


def jobs(part: str) -> list[tuple[str, dict[str, Any], dict[str, dict[str, Setting]], range]]:
    """(bed, its options, arms, seeds) of a part."""
    arms = {
        "skew": SKEW | TERMS,
        "contrast": {name: SKEW[name] for name in ("PiSSA", "LoRA", "CR", "all")},
        "wrong": CLEAN,
        "mark": MARK,
        "language": LANGUAGE,
    }[part]
    if part == "language":
        return [("language", {}, arms, range(5))]
    few = {"no mark": ("PiSSA", "CR, strong")}
    seeds = range(6 if part in ("skew", "mark") else 5)
    return [
        (bed, options, {n: a for n, a in arms.items() if n in few.get(bed, arms)}, seeds)
        for bed, options in BEDS[part].items()
    ]


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", tuple(WORDS))
    torch.set_num_threads(1)
    share = 0.05 if args.tiny else 1.0
    for part in args.part:
        setting = WORDS[part].format(math.ceil(share * (100 if part == "language" else 200)))
        runs = Runs(args.out, part, setting=setting, seconds=args.seconds)
        for bed, options, arms, seeds in jobs(part):
            for name, settings in arms.items():
                if not re.search(args.only, name):
                    continue
                for label, s in settings.items():
                    rates = LANGUAGE_RATES if part == "language" else RATES[s.kind]
                    for lr in rates:
                        for seed in list(seeds)[:1] if args.tiny else seeds:
                            key = {"bed": bed, "name": name, "method": f"{name}, {label}", "lr": lr, "seed": seed}
                            if part == "language":
                                runs.row(key, partial(run_language, s, lr, seed, share=share))
                            else:
                                runs.row(key, partial(run_digits, s, options, lr, seed, share=share))


if __name__ == "__main__":
    main()
