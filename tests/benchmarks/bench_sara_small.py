"""What the chapter on SaRA is too short for: which weights, which penalty, and what of them, on an old and a new task.

    python tests/benchmarks/bench_sara_small.py --out book/results/sara_small.json

many, few: a network that knows upright digits learns the same digits turned, from 1,000 or from 100 images; each arm at
seven or eight rates and eight seeds, 0.3 s a row on a CPU core, 0.8 s with a rank loss. Rows tell how many answers are
right on the old and on the new task. `--only` is matched with "part, method, seed 3".
zero: points that the old task loses when weights are set to zero. wake: whether weights that were idle stay so.
"""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear, MomentRestart, ProgressiveSelection, SaRALinear, rank_penalty
from lowrank_ref.adapters.sara import sara_layers
from lowrank_ref.adapters.weight_selection import RULES, pick_entries, threshold_for_density
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds.two_tasks import knows_upright, share_right, train_upright, two_tasks
from lowrank_ref.lab.data import digits

SEEDS, STEPS = tuple(range(8)), 200
#: Rates in factors of 1.5.
SPARSE = tuple(round(0.002 * 1.5**i, 6) for i in range(8))
DENSE = tuple(round(0.0004 * 1.5**i, 6) for i in range(8))
LORA = tuple(round(0.0007 * 1.5**i, 6) for i in range(8))


def sara(model: nn.Module, generator: torch.Generator, rule: str = "smallest", density: float = 0.2) -> None:
    """Train this share of the weights of every layer; biases are frozen."""
    replace_linears(model, "", lambda base: SaRALinear(base, density, rule=rule, generator=generator))


def full(model: nn.Module, generator: torch.Generator) -> None:
    """Train all weights; biases are frozen."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("weight"))


def lora(model: nn.Module, generator: torch.Generator, rank: int | None = None) -> None:
    """LoRA of a rank, or of as many numbers in every layer as a fifth of its weights."""

    def make(base: nn.Linear) -> nn.Module:
        m, n = base.weight.shape
        own = max(1, round(0.2 * m * n / (m + n))) if rank is None else min(rank, m, n)
        return LoRALinear(base, own, generator=generator)

    replace_linears(model, "", make)


def trained(model: nn.Module) -> list[Tensor]:
    """Return all numbers that train."""
    return [p for p in model.parameters() if p.requires_grad]


class Penalised:
    """Cross-entropy plus λ times a penalty: a nuclear norm (one layer drawn a step), or squares."""

    def __init__(self, kind: str, strength: float, seed: int) -> None:
        self.kind, self.strength, self.start = kind, strength, list[Tensor]()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        if self.kind.startswith("nuclear"):
            of = "weight" if self.kind == "nuclear on P" else "update"
            return loss + self.strength * rank_penalty(model, of=of, one=True, generator=self.generator)
        ps = trained(model)
        if not self.start:
            self.start = [p.detach().clone() if self.kind == "L2 to start" else torch.zeros_like(p) for p in ps]
        return loss + self.strength * torch.stack([(p - q).square().sum() for p, q in zip(ps, self.start)]).sum()


class Arm(NamedTuple):
    """How an arm adapts the network, its rates, its penalty (kind, λ), and what acts in the middle of the run."""

    adapt: Callable[[nn.Module, torch.Generator], None]
    rates: tuple[float, ...]
    penalty: tuple[str, float] | None = None
    half: str = ""


def acts(half: str, seed: int, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return what acts after half of the steps, attached to the optimizer."""
    if not half:
        return []
    if half == "moments forgotten":
        return [MomentRestart(optimizer, [steps // 2]).attach(optimizer)]
    rule = "random" if "random" in half else "below"
    moments = "reset" if "forgotten" in half else "keep"
    generator = torch.Generator().manual_seed(seed)
    selection = ProgressiveSelection(model, optimizer, at=steps // 2, moments=moments, rule=rule, generator=generator)
    return [selection.attach(optimizer)]


def penalised(name: str, adapt: Any, kind: str, strengths: tuple[float, ...], rates: Any) -> dict[str, Arm]:
    """Return an arm a strength."""
    return {f"{name}, {kind}, {s:g}": Arm(adapt, rates, (kind, s)) for s in strengths}


FOUR = (3e-4, 1e-3, 3e-3, 1e-2)
RULE = {rule: partial(sara, rule=rule) for rule in RULES}
#: Arms of both parts.
SHARED = {
    **{rule: Arm(adapt, SPARSE) for rule, adapt in RULE.items()},
    "all weights": Arm(full, DENSE),
    "LoRA, equal count": Arm(lora, LORA),
    "LoRA r=4": Arm(partial(lora, rank=4), LORA),
    **penalised("smallest", RULE["smallest"], "nuclear on P", FOUR, SPARSE[1:7]),
    **penalised("smallest", RULE["smallest"], "nuclear on the update", FOUR, SPARSE[1:7]),
    **penalised("smallest", RULE["smallest"], "L2", FOUR, SPARSE[1:7]),
    **penalised("smallest", RULE["smallest"], "L2 to start", (1e-3, 3e-3, 1e-2, 3e-2), SPARSE[1:7]),
    **penalised("random", RULE["random"], "nuclear on P", (1e-3, 3e-3), SPARSE[1:7]),
    **penalised("random", RULE["random"], "L2", (1e-3, 3e-3), SPARSE[1:7]),
    **penalised("all weights", full, "L2 to start", (1e-3, 3e-3, 1e-2, 3e-2), DENSE),
    "smallest, selected anew": Arm(RULE["smallest"], SPARSE, half="selected anew"),
    "smallest, as many random frozen": Arm(RULE["smallest"], SPARSE, half="as many random frozen"),
}
ARMS = {
    "many": {
        **SHARED,
        **{f"smallest, {share:g}": Arm(partial(sara, density=share), SPARSE) for share in (0.05, 0.1, 0.4)},
        "smallest, selected anew, moments forgotten": Arm(
            RULE["smallest"], SPARSE, half="selected anew, moments forgotten"
        ),
        "smallest, moments forgotten": Arm(RULE["smallest"], SPARSE, half="moments forgotten"),
    },
    "few": SHARED,
}
IMAGES = {"many": 1000, "few": 100}


def measured(arm: Arm, images: int, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one arm; shares of right answers, and for sparse arms the share of |P| below θ at the end."""
    seen: list[nn.Module] = []

    def adapt(model: nn.Module, generator: torch.Generator) -> None:
        arm.adapt(model, generator)
        seen.append(model)

    options: dict[str, Any] = {"loss_fn": Penalised(*arm.penalty, seed)} if arm.penalty else {}
    try:
        found = two_tasks(
            adapt, lr, seed, steps=steps, images=images, actions=partial(acts, arm.half, seed, steps), **options
        )
    except FloatingPointError:
        return {"error": "diverged"}
    if any(isinstance(layer, SaRALinear) for layer in seen[0].modules()):
        layers = [*sara_layers(seen[0]).values()]
        below = sum(int((a.values.abs() < a.threshold).sum()) for a in layers)
        found["below"] = below / sum(len(a.values) for a in layers)
        found["active"] = float(sum(int(a.active.sum()) for a in layers))
    return {name: round(value, 4) for name, value in found.items()}


def places(model: nn.Module, rule: str, share: float, one: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """Return path -> flat places of this share of the weights, of each tensor, or by one threshold for all of them."""
    weights = {name: p.detach() for name, p in model.named_parameters() if name.endswith("weight")}
    counts = {name: round(share * W.numel()) for name, W in weights.items()}
    if one:
        theta = threshold_for_density(weights.values(), share)
        counts = {name: int((W.abs() < theta).sum()) for name, W in weights.items()}
    return {name: pick_entries(W, counts[name], rule, generator).long() for name, W in weights.items()}


def points_lost(model: nn.Module, chosen: dict[str, Tensor]) -> float:
    """Return how many points of 100 the old task loses when these weights are zero."""
    other, data = copy.deepcopy(model), digits()
    for name, p in other.named_parameters():
        if name in chosen:
            p.data.view(-1)[chosen[name]] = 0.0
    return 100 * (share_right(model, data) - share_right(other, data))


def zeroed(rule: str, share: float, decay: float, one: bool, steps: int, seed: int) -> dict[str, Any]:
    """Set a share of the weights to zero; random ones in five drawings."""
    model, generator = knows_upright(decay, seed, steps=steps), torch.Generator().manual_seed(seed)
    draws = 5 if rule == "random" else 1
    lost = [points_lost(model, places(model, rule, share, one, generator)) for _ in range(draws)]
    return {"lost": round(sum(lost) / draws, 3)}


def woken(decay: float, steps: int, before: int, seed: int) -> dict[str, Any]:
    """Train on; what became of the 20 % that were smallest, and of a random fifth?"""
    model, generator = knows_upright(0.5, seed, steps=before), torch.Generator().manual_seed(seed)
    cohorts = {rule: places(model, rule, 0.2, False, generator) for rule in ("smallest", "random")}
    bounds = {
        n: p.detach().flatten()[cohorts["smallest"][n]].abs().max()
        for n, p in model.named_parameters()
        if n in cohorts["smallest"]
    }
    found = {f"{rule}, lost before": points_lost(model, chosen) for rule, chosen in cohorts.items()}
    train_upright(model, decay, 100 + seed, steps)
    sizes = {name: p.detach().flatten().abs() for name, p in model.named_parameters()}
    for rule, chosen in cohorts.items():
        still = sum(int((sizes[name][at] <= bounds[name]).sum()) for name, at in chosen.items())
        found[f"{rule}, below"] = still / sum(map(len, chosen.values()))
        found[f"{rule}, lost"] = points_lost(model, chosen)
    found["all, below"] = sum(int((sizes[n] <= b).sum()) for n, b in bounds.items()) / sum(
        len(sizes[n]) for n in bounds
    )
    found["newly smallest, lost"] = points_lost(model, places(model, "smallest", 0.2, False, generator))
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("many", "few", "zero", "wake"))
    torch.set_num_threads(1)
    steps, before, seeds = (10, 20, SEEDS[:1]) if args.tiny else (STEPS, 800, SEEDS)
    for part in (p for p in ("many", "few") if p in args.part):
        setting = (
            "MLP 64-256-256-10, pretrained on 1,000 upright digits (800 steps of AdamW, decay 0.5), learns "
            f"{IMAGES[part]} of them turned by 90 degrees; Adam, {steps} steps of 64 images, the rate falling "
            "linearly to 0; a fifth of the weights of each layer trains where nothing else is said"
        )
        runs = Runs(args.out, part, setting=setting, seconds=args.seconds)
        for seed in seeds:
            for name, arm in ARMS[part].items():
                if re.search(args.only, f"{part}, {name}, seed {seed}"):
                    for lr in arm.rates[:1] if args.tiny else arm.rates:
                        key = {"method": name, "lr": lr, "seed": seed}
                        runs.row(key, partial(measured, arm, IMAGES[part], steps, lr, seed))
    if "zero" in args.part:
        setting = "the pretrained MLP; a share of its weights set to zero, per layer or by one threshold for all layers"
        runs = Runs(args.out, "zero", setting=setting, seconds=args.seconds)
        for seed in seeds:
            if re.search(args.only, f"zero, seed {seed}"):
                for decay in (0.5, 0.0):
                    for rule, one in (*((rule, False) for rule in RULES), ("smallest", True)):
                        for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
                            key = {"rule": rule, "share": share, "decay": decay, "one": one, "seed": seed}
                            runs.row(key, partial(zeroed, rule, share, decay, one, before, seed))
    if "wake" in args.part:
        setting = (
            "the pretrained MLP, trained on with the same loss and rate; the fifth of its weights that was smallest"
        )
        runs = Runs(args.out, "wake", setting=setting, seconds=args.seconds)
        for seed in seeds:
            if re.search(args.only, f"wake, seed {seed}"):
                for decay in (0.5, 0.0):
                    for more in (20,) if args.tiny else (1000, 4000):
                        key = {"decay": decay, "steps": more, "seed": seed}
                        runs.row(key, partial(woken, decay, more, before, seed))


if __name__ == "__main__":
    main()
