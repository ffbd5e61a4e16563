"""LR tokens on a vision transformer of size S, on one GPU: accuracy at five resolutions, time and memory of a step.

    python tests/benchmarks/bench_lr0_fm.py --out book/results/lr0_fm_scale.json

96x96 renders of 12 classes, four widths of stripes in discs, squares and diamonds: fine stripes die first. A
transformer learns them sharp, and is then adapted without labels by every arm.
speed: a step of each arm, at random weights.
"""

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from common import Runs, arguments, milliseconds, peak_mib, reset_peak
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.accounting import numel
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.models import ViT
from lowrank_ref.lab.train import warmup_cosine
from lowrank_ref.robustness import MultiScaleDistillation, add_lr_tokens, low_resolution

SIDES, BUCKETS = (96, 48, 24, 16, 12), ((8, 14), (14, 28), (28, 56))
SEEDS, STEPS, PRETRAINING, BATCH = range(3), 300, 1500, 64
RATES = {"tokens": (1e-3, 3e-3, 1e-2, 3e-2), "LoRA": (3e-4, 1e-3, 3e-3, 1e-2), "all": (1e-4, 3e-4, 1e-3)}
ARMS = ("tokens", "tokens, first half", "tokens, last half", "LoRA", "norms", "all")


def renders(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return gray pictures, a disc, square or diamond filled with stripes of one of four widths, and their classes."""
    device = generator.device
    u = torch.rand(count, 5, generator=generator, device=device)
    kind, stripe = (u[:, 0] * 3).long(), (u[:, 1] * 4).long()
    grid = (torch.arange(side, device=device) + 0.5) / side
    x = grid[None, None, :] - (0.4 + 0.2 * u[:, 2, None, None])
    y = grid[None, :, None] - (0.4 + 0.2 * u[:, 3, None, None])
    forms = torch.stack([(x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs()), (x.abs() + y.abs()) / 1.4])
    distance = forms[kind, torch.arange(count, device=device)]
    waves = torch.tensor([6.0, 10.0, 15.0, 21.0], device=device)[stripe, None, None]
    lines = 0.5 + 0.5 * torch.sin(2 * torch.pi * waves * (grid[None, None, :] + u[:, 4, None, None]))
    return (torch.sigmoid(80 * (0.3 - distance)) * lines)[:, None], 4 * kind + stripe


def shape_of(tiny: bool) -> dict[str, int]:
    """Sizes of the transformer."""
    return {"dim": 32, "layers": 2, "heads": 2} if tiny else {"dim": 384, "layers": 12, "heads": 6}


def fit(loss: Callable[[int], Tensor], trained: list[Any], lr: float, steps: int, device: str) -> None:
    """Take steps of AdamW under bf16 autocast."""
    adam = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    factor = warmup_cosine(steps, warmup=max(1, steps // 10))
    for i in range(steps):
        adam.param_groups[0]["lr"] = lr * factor(i)
        adam.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            value = loss(i)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()


@functools.cache
def sharp(seed: int, device: str, tiny: bool) -> tuple[Any, Tensor]:
    """Return a frozen transformer without its head, and the class vectors."""
    model: Any = ViT(96, 8, classes=12, generator=torch.Generator().manual_seed(seed), **shape_of(tiny)).to(device)
    classes, model.head = model.head.weight, nn.Identity()
    g = torch.Generator(device).manual_seed(seed)

    def loss(step: int) -> Tensor:
        x, y = renders(4 if tiny else 128, 96, g)
        return F.cross_entropy(10 * F.normalize(model(x), dim=1) @ F.normalize(classes, dim=1).T, y)

    fit(loss, [*model.parameters(), classes], 1e-3, 2 if tiny else PRETRAINING, device)
    return model.requires_grad_(False), F.normalize(classes.detach(), dim=1)


def prepare(arm: str, model: Any, seed: int, tiny: bool) -> Any:
    """Add what trains; LoRA has as many numbers as tokens, up to one in the rank."""
    size, g = shape_of(tiny), torch.Generator().manual_seed(500 + seed)
    if arm == "all":
        return model.requires_grad_(True)
    if arm == "norms":
        for part in model.modules():
            part.requires_grad_(isinstance(part, nn.RMSNorm))
        return model
    count = (size["layers"] + 1) * 144 * size["dim"]
    if arm == "LoRA":
        rank = max(1, min(size["dim"], round(count / (size["layers"] * 4 * size["dim"]))))
        return replace_linears(model, r"attn\.(q|v)$", lambda base: LoRALinear(base, rank, alpha=2 * rank, generator=g))
    half = size["layers"] // 2
    first, last = ("|".join(map(str, part)) for part in (range(half), range(half, size["layers"])))
    blocks = {"tokens, first half": first, "tokens, last half": last}.get(arm, r"\d+")
    embed = "^embed$" if arm == "tokens" else None
    return add_lr_tokens(model, rf"^blocks\.({blocks})$", embed=embed, places=144, dim=size["dim"], generator=g)


def adapt(arm: str, lr: float, seed: int, device: str, tiny: bool) -> dict[str, Any]:
    """Train one arm, and measure it."""
    base, classes = sharp(seed, device, tiny)
    model = prepare(arm, copy.deepcopy(base), seed, tiny).to(device)
    loss = MultiScaleDistillation(BUCKETS).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    g, sides = torch.Generator(device).manual_seed(1000 + seed), torch.Generator().manual_seed(seed)

    def value(step: int) -> Tensor:
        x, _ = renders(4 if tiny else BATCH, 96, g)
        with torch.no_grad():
            t = F.normalize(base(x), dim=1)
        return loss(model, x, t, sides)

    fit(value, [*trained, loss.log_scale], lr, 2 if tiny else STEPS, device)
    found: dict[str, Any] = {"trainable": numel(trained)}
    valid, _ = renders(32 if tiny else 1024, 96, torch.Generator(device).manual_seed(77))
    test = renders(32 if tiny else 2048, 96, torch.Generator(device).manual_seed(78))
    with torch.no_grad():
        wanted = (base(valid) @ classes.T).argmax(1)
        missed = [
            ((F.normalize(model(low_resolution(valid, r)), dim=1) @ classes.T).argmax(1) != wanted) for r in SIDES
        ]
        found["valid disagreement"] = round(float(torch.stack(missed).double().mean()), 4)
        for r in SIDES:
            right = (F.normalize(model(low_resolution(test[0], r)), dim=1) @ classes.T).argmax(1) == test[1]
            found[f"at {r}"] = round(float(right.double().mean()), 4)
    return found


def speed(arm: str, device: str, tiny: bool) -> dict[str, Any]:
    """Milliseconds and peak memory of a step's forward and backward pass, at random weights."""
    g = torch.Generator().manual_seed(0)
    base: Any = ViT(96, 8, classes=12, generator=g, **shape_of(tiny)).to(device)
    base.head = nn.Identity()
    model = prepare(arm, copy.deepcopy(base).requires_grad_(False), 0, tiny).to(device)
    loss = MultiScaleDistillation(BUCKETS).to(device)
    x, _ = renders(4 if tiny else 128, 96, torch.Generator(device).manual_seed(0))
    t = F.normalize(base(x), dim=1).detach()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            value = loss(model, x, t, torch.Generator().manual_seed(0))
        value.backward()

    step()
    reset_peak()
    found = milliseconds(step, repeats=2 if tiny else 20)
    return {
        **found,
        "peak_mib": round(peak_mib(), 1),
        "trainable": numel(p for p in model.parameters() if p.requires_grad),
    }


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("renders", "speed"))
    if "speed" in args.part:
        setting = f"ViT {shape_of(args.tiny)} on 96x96 renders, batch 128, bf16 autocast, random weights, alone"
        runs = Runs(args.out, "speed", setting=setting, seconds=args.seconds)
        for arm in ARMS:
            runs.row({"method": arm}, functools.partial(speed, arm, args.device, args.tiny))
    if "renders" in args.part:
        train_arms(args)


def train_arms(args: Any) -> None:
    """Adapt with every arm, rate and seed."""
    setting = f"ViT {shape_of(args.tiny)} on 96x96 renders, patches of 8; {STEPS} steps of {BATCH}, bf16 autocast"
    runs = Runs(args.out, "renders", setting=setting, seconds=args.seconds)
    for seed in list(SEEDS)[: 1 if args.tiny else None]:
        for arm in ARMS:
            rates = RATES.get(arm, (1e-3, 3e-3, 1e-2))[: 1 if args.tiny else None]
            for lr in rates if re.search(args.only, f"{arm}, seed {seed}") else ():
                key = {"method": arm, "lr": lr, "seed": seed}
                runs.row(key, functools.partial(adapt, arm, lr, seed, args.device, args.tiny))


if __name__ == "__main__":
    main()
