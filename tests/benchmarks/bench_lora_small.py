"""What the chapter on LoRA is too short for, on small networks (CPU, an hour or two on one core).

    python tests/benchmarks/bench_lora_small.py --out book/results/lora_small.json

digits: every arm on digits turned by 90 degrees: LoRA at ranks 1 to 64 with three rules for its scale, several α, its
relatives, full fine-tuning whose update is cut to rank r afterwards, and what each forgets of the upright digits.
batch: small and large batches at equal numbers of images.
new_domain: the arms of `bench_lora`'s part of that name on a GPT of two blocks, and a few more.
old_domain: the same with more of the old text, as a control.

The layer 128 -> 10 holds no more than rank 10; the rule for the scale is applied to the rank that a layer has.
Rates: as in `bench_lora`, by a pilot with a seed of its own; on the digits five rates and five seeds.
"""

import re
from functools import partial
from typing import Any

import torch
from bench_lora import ARMS, CONTROL, Plan, domain_shift, tuned
from common import Runs, arguments
from later_speeches import ALL_LINEAR, REST, messages, more_of_the_old
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import DoRALinear, LoRALinear, PiSSALinear, lora_plus_groups
from lowrank_ref.core.accounting import numel
from lowrank_ref.core.layers import AdaptedLinear, replace_linears
from lowrank_ref.core.linalg import svd
from lowrank_ref.lab.beds import classification_loss, pretrained_on_digits
from lowrank_ref.lab.data import Arrays, array_batches, digits
from lowrank_ref.lab.train import linear_decay, train

RANKS = (1, 2, 4, 8, 16, 32, 64)
SEEDS = (0, 1, 2, 3, 4)
FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0)
LOWER = (1.0, 0.5, 0.25, 0.125, 0.0625)  # what is to be cut likes lower rates
IMAGES = 12_800  # 200 steps of 64


LAYERS = {
    "DoRA": DoRALinear,
    "DoRA, norm in the gradient": partial(DoRALinear, detach_norm=False),
    "PiSSA": PiSSALinear,
}

#: Arm of the digits -> rate at which its pilot starts.
DIGITS = {
    "full": 0.006,
    "full, no biases": 0.006,
    "full, to be cut": 0.006,
    "head": 0.1,
    "biases": 0.1,
    **{f"LoRA r={r}": 0.03 for r in RANKS},
    **{f"LoRA, α=16 r={r}": 0.03 for r in RANKS if r != 8},  # r = 8 has s = 2 by all three rules
    **{f"rsLoRA r={r}": 0.03 for r in RANKS if r != 8},
    **{f"LoRA, α={a} r={r}": 0.015 for a in (4, 64, 128, 256, 512) for r in (4, 16, 64)},
    "LoRA+ r=4": 0.006,
    "PiSSA r=4": 0.01,
    "DoRA r=4": 0.03,
    "DoRA, norm in the gradient r=4": 0.03,
}
#: Arms of the small GPT, whose matrices have rank 128.
DOMAIN = {
    **{
        name: ARMS[name]
        for name in (
            "full",
            "blocks only",
            "embeddings + head only",
            "LoRA r 8",
            "LoRA r 64",
            "LoRA r 8 + embeddings + head",
            "embeddings only",
            "head only",
            "all but norms",
        )
    },
    "LoRA r 128": Plan(1e-3, targets=ALL_LINEAR, rank=128),
    "LoRA r 8 + embeddings + head, rates 1:1": Plan(3.2e-3, dense=REST, targets=ALL_LINEAR, rank=8),
    "LoRA r 8 + embeddings + head, rates 2:1": Plan(3.2e-3, dense=REST, targets=ALL_LINEAR, rank=8, ratio=2),
}
BATCHES = (8, 64, 512)
BATCH_ARMS = {"full, no biases": 0.006, "LoRA r=4": 0.03, "LoRA r=32": 0.015}


def adapt(model: nn.Module, name: str, generator: torch.Generator) -> list[dict[str, Any]]:
    """Adapt the network in place as the arm's name says; return optimizer groups whose "lr" is a factor."""
    kind, _, rank = name.partition(" r=")
    kind, _, alpha = kind.partition(", α=")
    wanted = {"full": ".", "head": r"layers\.2", "biases": "bias"}.get(kind, "weight" if "full" in kind else "")
    if wanted:
        for path, p in model.named_parameters():
            p.requires_grad_(re.search(wanted, path) is not None)
    else:
        layer = LAYERS.get(kind, LoRALinear)

        def factory(linear: nn.Linear) -> nn.Module:
            r = min(int(rank), *linear.weight.shape)
            by_rule = 2 * (8 * r) ** 0.5 if kind == "rsLoRA" else 2 * r  # α: s = 2 at r = 8, or at every r
            return layer(linear, rank=r, alpha=float(alpha or by_rule), generator=generator)

        replace_linears(model, r"^layers\.", factory)
    if kind == "LoRA+":
        return lora_plus_groups(model, 1.0)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1.0}]


@torch.no_grad()
def updates(model: nn.Module) -> list[Tensor]:
    """Return what was added to each weight."""
    found = []
    for old, new in zip(pretrained_on_digits().layers, model.layers):  # type: ignore[arg-type]
        found.append(new.delta_weight() if isinstance(new, AdaptedLinear) else new.weight - old.weight)
    return found


@torch.no_grad()
def cut_losses(model: nn.Module, data: Arrays) -> dict[str, float]:
    """Losses of a fully fine-tuned network after the update of every layer is cut to rank r."""
    found, model_updates, old = {}, updates(model), pretrained_on_digits()
    for rank in RANKS:
        for layer, before, dW in zip(model.layers, old.layers, model_updates):  # type: ignore[arg-type]
            U, S, Vh = svd(dW, min(rank, *dW.shape))
            layer.weight.copy_(before.weight + (U * S) @ Vh)
        new = model(data.x_test)
        found[f"cut {rank} valid"] = F.cross_entropy(model(data.x_valid), data.y_valid).item()
        found[f"cut {rank} loss"] = F.cross_entropy(new, data.y_test).item()
        found[f"cut {rank} accuracy"] = (new.argmax(1) == data.y_test).double().mean().item()
    return found


def share(values: Tensor, rank: int) -> float:
    """Energy in the first `rank` singular values; 1 where there is none at all."""
    whole = values.square().sum().item()
    return values[:rank].square().sum().item() / whole if whole else 1.0


def turned(name: str, lr: float, seed: int, *, batch: int = 64, images: int = IMAGES) -> dict[str, Any]:
    """Train one arm on the turned digits with Adam, the rate falling linearly to 0; measure it on both tasks."""
    data, upright, model = digits(rotate=90), digits(), pretrained_on_digits()
    groups = adapt(model, name, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam([{**group, "lr": lr * group["lr"]} for group in groups])
    steps = max(1, images // batch)
    batches = array_batches(data.x_train, data.y_train, batch=batch, seed=seed)
    try:
        schedule = linear_decay(steps)
        train(model, batches, classification_loss, optimizer, steps=steps, schedule=schedule, progress=False)
    except FloatingPointError:
        return {"error": "diverged"}
    with torch.no_grad():
        valid, new, old = (model(x) for x in (data.x_valid, data.x_test, upright.x_test))
        added, before = updates(model), pretrained_on_digits().layers
        middle = torch.linalg.svdvals(added[1].double())
        found = {
            "trainable": numel([p for group in groups for p in group["params"]]),
            "valid": F.cross_entropy(valid, data.y_valid).item(),
            "loss": F.cross_entropy(new, data.y_test).item(),
            "accuracy": (new.argmax(1) == data.y_test).double().mean().item(),
            "old loss": F.cross_entropy(old, upright.y_test).item(),
            "old accuracy": (old.argmax(1) == upright.y_test).double().mean().item(),
            "rank": int((middle > 1e-4 * middle[0]).sum()),
            **{f"energy {r}": share(middle, r) for r in (4, 16)},
            **{
                f"moved {i}": (dW.norm() / layer.weight.norm()).item()
                for i, (dW, layer) in enumerate(zip(added, before))
            },
        }
        cuts = cut_losses(model, data) if name == "full, to be cut" else {}
    return {k: round(v, 5) for k, v in {**found, **cuts}.items()}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("digits", "batch", "new_domain", "old_domain"))
    torch.set_num_threads(1)
    images = 640 if args.tiny else IMAGES
    network = "MLP 64-128-128-10, pretrained on 1,000 upright digits, learns the same turned by 90 degrees; Adam"

    def pair(part: str, setting: str) -> tuple[Runs, Runs]:
        pilot, runs = (Runs(args.out, p, setting=setting, seconds=args.seconds) for p in (f"{part}_pilot", part))
        return pilot, runs

    if "digits" in args.part:
        both = pair("digits", f"{network}, {images // 64} steps of 64 images")
        for name, start in DIGITS.items():
            if re.search(args.only, name):
                factors = LOWER if name == "full, to be cut" else FACTORS
                tuned(*both, name, start, partial(turned, name, images=images), seeds=SEEDS, factors=factors)
    if "batch" in args.part:
        both = pair("batch", f"{network}, {images:,} images in batches of three sizes")
        for name, start in BATCH_ARMS.items():
            for batch in BATCHES:
                arm = f"{name}, batch {batch}"
                if re.search(args.only, arm):
                    measure = partial(turned, name, batch=batch, images=images)
                    tuned(*both, arm, start * (batch / 64) ** 0.5, measure, seeds=SEEDS, factors=FACTORS)
    for part, wanted in (("new_domain", "."), ("old_domain", CONTROL)):
        if part in args.part:
            text = messages(300 if args.tiny else 1024, args.tiny)
            domain_shift(
                args.out,
                part,
                arms={n: p for n, p in DOMAIN.items() if re.search(args.only, n) and re.search(wanted, n)},
                text=more_of_the_old(text) if part == "old_domain" else text,
                shape={"dim": 128, "layers": 2, "heads": 4},
                pre_steps=3 if args.tiny else 400,
                steps=2 if args.tiny else 200,
                batch=8,
                length=64,
                most=256,
                device="cpu",
                seconds=args.seconds,
            )


if __name__ == "__main__":
    main()
