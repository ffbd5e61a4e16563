"""What the chapter on LoRA-Squeeze is too short for, on small networks (CPU, about 25 minutes on one core).

    python tests/benchmarks/bench_lora_squeeze_small.py --out book/results/lora_squeeze_small.json

turned, relabelled: LoRA at its target rank, squeezed at the end, on the way, once or in halves, and the controls that
only restart Adam, only balance the factors, or only let the rate rise again; six rates and six seeds an arm.
layers: each layer of a trained LoRA squeezed alone, to every rank: the energy that is kept, and what the loss becomes.
planted: ranks by energy where the true ranks are known.
speed: the SVD of a product with and without the dense matrix, its error and, on a GPU, its time.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Runs, arguments, interleaved, peak_mib, reset_peak
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import (
    LoRALinear,
    LoRASqueezer,
    MomentRestart,
    halving_plan,
    ranks_for_energy,
    rewarmed,
    squeeze,
)
from lowrank_ref.adapters.lora_squeeze import retained_energy, squeezed_factors
from lowrank_ref.core.accounting import numel
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.core.linalg import factored_svd, randomized_factored_svd, randomized_svd, svd
from lowrank_ref.lab.beds import (
    classification_loss,
    measure_planted,
    planted_rank,
    pretrained_on_digits,
    shifted_digits,
    train_planted,
)
from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.train import linear_decay, train

STEPS, SEEDS = 300, tuple(range(6))
RATES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
SCALE = 2.0


@dataclass(frozen=True)
class Recipe:
    """How one arm trains.

    Attributes:
        rank: of the layers at the start.
        squeezes: (share of the steps, rank), in order; a share of 1 is after the last step.
        restarts: shares of the steps at which Adam forgets, and nothing else happens.
        forgets: what it forgets there: "all", the state of "A" or of "B" only, or the "first moments" only.
        betas: Adam's.
        more: further steps after the 300, at a rate that falls to 0 once more.
        long: 360 steps of one falling rate.
        warmup: steps over which the rate rises, at the start and after each of `again`.
        again: shares of the steps after which the rate rises again.
        options: of `LoRASqueezer`.
    """

    rank: int
    squeezes: tuple[tuple[float, int], ...] = ()
    restarts: tuple[float, ...] = ()
    forgets: str = "all"
    betas: tuple[float, float] = (0.9, 0.999)
    more: int = 0
    long: bool = False
    warmup: int = 0
    again: tuple[float, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def halves(rank: int) -> tuple[tuple[float, int], ...]:
    """Equal stages from 16 down to a rank."""
    return tuple((step / STEPS, k) for step, k in halving_plan(16, rank, STEPS).items())


def core(k: int) -> dict[str, Recipe]:
    """The arms that every task gets."""
    return {
        f"direct, k={k}": Recipe(k),
        f"restart at 3 %, k={k}": Recipe(k, restarts=(0.03,)),
        f"balance at 3 %, k={k}": Recipe(k, ((0.03, k),)),
        f"16 to k at 3 %, k={k}": Recipe(16, ((0.03, k),)),
        f"16 to k at 30 %, k={k}": Recipe(16, ((0.3, k),)),
        f"halves, k={k}": Recipe(16, halves(k)),
        f"Post 16 to k, k={k}": Recipe(16, ((1.0, k),)),
        f"Cont 240 + 60, k={k}": Recipe(16, ((0.8, k),)),
    }


def further(k: int) -> dict[str, Recipe]:
    """Arms of the main task: longer runs, other sources, other choices."""
    one, left, carry = ("scale", 1.0), ("split", "left"), ("moments", "carry")
    other = {"s' = 1": (one,), "left, s' = 1": (one, left), "carried": (carry,)}
    return {
        f"16 to k at 10 %, k={k}": Recipe(16, ((0.1, k),)),
        f"restart at 30 %, k={k}": Recipe(k, restarts=(0.3,)),
        f"balance at 30 %, k={k}": Recipe(k, ((0.3, k),)),
        f"2k to k at 30 %, k={k}": Recipe(2 * k, ((0.3, k),)),
        **({f"4k to k at 30 %, k={k}": Recipe(4 * k, ((0.3, k),))} if k == 1 else {}),
        f"direct 360, k={k}": Recipe(k, long=True),
        f"direct 300 + 60, k={k}": Recipe(k, more=60),
        f"Cont 300 + 60, k={k}": Recipe(16, ((1.0, k),), more=60),
        **{f"16 to k at 30 %, {name}, k={k}": Recipe(16, ((0.3, k),), options=o) for name, o in other.items()},
        f"direct, warm, k={k}": Recipe(k, warmup=30),
        f"rate again at 10 %, warm, k={k}": Recipe(k, warmup=30, again=(0.1,)),
        f"restart at 10 %, warm, k={k}": Recipe(k, restarts=(0.1,), warmup=30, again=(0.1,)),
        f"balance at 10 %, warm, k={k}": Recipe(k, ((0.1, k),), warmup=30, again=(0.1,)),
        f"16 to k at 10 %, warm, k={k}": Recipe(16, ((0.1, k),), warmup=30, again=(0.1,)),
        f"16 to k at 30 %, warm, k={k}": Recipe(16, ((0.3, k),), warmup=30, again=(0.3,)),
        f"halves, warm, k={k}": Recipe(16, halves(k), warmup=30, again=tuple(t for t, _ in halves(k))),
    }


#: Task -> name of an arm -> its recipe.
ARMS = {
    "turned": {
        **{name: recipe for k in (1, 2, 4) for name, recipe in core(k).items()},
        **{name: recipe for k in (1, 4) for name, recipe in further(k).items()},
        "direct, k=8": Recipe(8),
        "Post 16 to k, k=8": Recipe(16, ((1.0, 8),)),
        **{f"Post 64 to k, k={k}": Recipe(64, ((1.0, k),)) for k in (1, 4, 8, 16)},
        "direct, k=16": Recipe(16),
        "direct, k=64": Recipe(64),
    },
    "relabelled": {name: recipe for k in (1, 4) for name, recipe in core(k).items()},
}


def lora(base: nn.Linear, rank: int, generator: torch.Generator) -> LoRALinear:
    """A LoRA layer of this rank, or the largest that fits, with s = 2."""
    r = min(rank, *base.weight.shape)
    return LoRALinear(base, r, alpha=SCALE * r, generator=generator)


def adapted(rank: int, seed: int) -> nn.Module:
    """The pretrained network with LoRA on all layers."""
    generator = torch.Generator().manual_seed(seed)
    return replace_linears(pretrained_on_digits(), "", partial(lora, rank=rank, generator=generator))


class PartRestart(MomentRestart):
    """Forgets a part of Adam's state only; second moments and counts of steps of the rest stay."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, times: list[int], part: str) -> None:
        super().__init__(optimizer, times)
        self.part = part
        self.forgotten = {getattr(layer, part) for _, layer in adapters(model)} if part in ("A", "B") else set()

    def act(self) -> None:
        """Count a step, and forget the part if it is time."""
        self.steps += 1
        if self.steps not in self.times:
            return
        for p in list(self.optimizer.state):
            if self.part == "first moments":
                self.optimizer.state[p]["exp_avg"].zero_()
            elif p in self.forgotten:
                del self.optimizer.state[p]


def fit(recipe: Recipe, task: str, lr: float, seed: int, steps: int) -> tuple[nn.Module, dict[str, float]]:
    """Train one arm; return the model and the energy that each squeeze kept, the least of all layers."""
    data, model, kept = shifted_digits(task), adapted(recipe.rank, seed), {}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, betas=recipe.betas)
    at = lambda share: max(1, round(share * steps))  # noqa: E731
    if plan := {at(t): k for t, k in recipe.squeezes if t < 1}:
        squeezer = LoRASqueezer(model, optimizer, plan, **dict(recipe.options)).attach(optimizer)
    if times := [at(t) for t in recipe.restarts]:
        whole = recipe.forgets == "all"
        restart = MomentRestart(optimizer, times) if whole else PartRestart(model, optimizer, times, recipe.forgets)
        restart.attach(optimizer)
    total = steps * 6 // 5 if recipe.long else steps
    schedule = rewarmed(linear_decay(total), [0, *map(at, recipe.again)] if recipe.warmup else [], recipe.warmup)
    batch = array_batches(data.x_train, data.y_train, batch=64, seed=seed)
    train(model, batch, classification_loss, optimizer, steps=total, schedule=schedule, progress=False)
    if plan:
        kept = {f"kept at {t}": round(min(v.values()), 4) for t, v in squeezer.kept.items()}
    for t, k in recipe.squeezes:
        if t == 1:
            energies = [retained_energy(factored_svd(a.A.detach(), a.B.detach())[1]) for _, a in adapters(model)]
            kept["kept at the end"] = round(min(float(V[min(k, len(V)) - 1]) for V in energies), 4)
            squeeze(model, k)
    if recipe.more:
        more = steps // 5
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        batch = array_batches(data.x_train, data.y_train, batch=64, seed=1000 + seed)
        train(model, batch, classification_loss, optimizer, steps=more, schedule=linear_decay(more), progress=False)
    return model, kept


@torch.no_grad()
def measured(model: nn.Module, task: str) -> dict[str, float]:
    """Losses in nats on the three parts of the data, the share of test digits told, and the trained numbers."""
    data = shifted_digits(task)
    parts = {"train loss": "train", "valid loss": "valid", "loss": "test"}
    found = {
        name: F.cross_entropy(model(getattr(data, f"x_{part}")), getattr(data, f"y_{part}")).item()
        for name, part in parts.items()
    }
    found["accuracy"] = (model(data.x_test).argmax(dim=1) == data.y_test).double().mean().item()
    return {**found, "trainable": numel(p for p in model.parameters() if p.requires_grad)}


def row(recipe: Recipe, task: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train and measure one arm; or that it diverged."""
    try:
        model, kept = fit(recipe, task, lr, seed, steps)
    except FloatingPointError:
        return {"error": "diverged"}
    return {k: round(v, 5) for k, v in {**measured(model, task), **kept}.items()}


def layer_by_layer(seed: int, steps: int) -> dict[str, Any]:
    """Squeeze each layer of one trained LoRA of rank 16 alone, to all ranks."""
    model, _ = fit(Recipe(16), "turned", 0.02, seed, steps)
    found, whole = [], measured(model, "turned")
    for path, layer in adapters(model):
        A, B = layer.A.detach().clone(), layer.B.detach().clone()
        for k in (1, 2, 3, 4, 6, 8):
            A_new, B_new, S = squeezed_factors(A, B, layer.scale, k)
            layer.A.data, layer.B.data = A_new, B_new
            numbers = measured(model, "turned")
            found.append([path, k, round(float(retained_energy(S)[k - 1]), 5), round(numbers["loss"], 5)])
        layer.A.data, layer.B.data = A, B
    return {"loss": round(whole["loss"], 5), "squeezed": found}


def planted(share: float, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train LoRA of rank 8 where ranks 0, 1, 1, 8 are planted, squeeze by energy, and measure before and after."""
    task = planted_rank(seed)

    def adapt(model: nn.Module, generator: torch.Generator) -> None:
        replace_linears(model, "", partial(lora, rank=8, generator=generator))

    model = train_planted(task, adapt, lr=lr, seed=seed, steps=steps)
    before = measure_planted(task, model)["mse"]
    ranks = ranks_for_energy(model, share)
    squeeze(model, ranks)
    return {
        "mse before": round(before, 6),
        "mse": round(measure_planted(task, model)["mse"], 6),
        "ranks": list(ranks.values()),
    }


def ways(side: int, rank: int, device: str) -> dict[str, Any]:
    """Name -> a function that decomposes one product of random factors: float32 on a GPU, float64 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cuda" else torch.float64
    A = torch.randn(rank, side, generator=generator, dtype=dtype).to(device)
    B = torch.randn(side, rank, generator=generator, dtype=dtype).to(device)
    k, sketch = rank // 4, torch.Generator(device).manual_seed(1)

    def by_core() -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = factored_svd(A, B)
        return U[:, :k], S[:k], Vh[:k]

    return {
        "dense": lambda: svd(B @ A, k),
        "dense, sketch": lambda: randomized_svd(B @ A, k, oversample=10, generator=sketch),
        "QR and core": by_core,
        "factors, sketch": lambda: randomized_factored_svd(A, B, k, generator=sketch),
    }


def timed(side: int, rank: int, device: str, repeats: int) -> dict[str, Any]:
    """Error against the dense SVD, peak memory, and time of each way, in turns."""
    calls = ways(side, rank, device)
    found: dict[str, Any] = {}
    U, S, Vh = calls["dense"]()
    for name, call in calls.items():
        reset_peak()
        u, s, vh = call()
        found[name] = {
            "error": float(((u * s) @ vh - (U * S) @ Vh).norm() / S.norm()),
            "peak MiB": round(peak_mib(), 1),
        }
    times = interleaved(calls, repeats=repeats, warmup=1)
    return {name: {**numbers, **times[name]} for name, numbers in found.items()}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("turned", "relabelled", "layers", "planted", "speed"))
    torch.set_num_threads(1)
    steps, seeds = (10, SEEDS[:1]) if args.tiny else (STEPS, SEEDS)
    network = "MLP 64-128-128-10, pretrained on 1,000 upright digits"
    for task in ("turned", "relabelled"):
        if task in args.part:
            setting = f"{network}, digits {task}; Adam, {steps} steps of 64 images, rate falls linearly to 0"
            runs = Runs(args.out, task, setting=setting, seconds=args.seconds)
            for name, recipe in ARMS[task].items():
                for lr in RATES[:1] if args.tiny else RATES:
                    for seed in seeds:
                        if re.search(args.only, name):
                            key = {"method": name, "lr": lr, "seed": seed}
                            runs.row(key, partial(row, recipe, task, lr, seed, steps))
    if "layers" in args.part:
        setting = f"{network}, digits turned; LoRA r = 16 at 0.02, {steps} steps; [path, k, V(k), test loss]"
        runs = Runs(args.out, "layers", setting=setting, seconds=args.seconds)
        for seed in seeds:
            runs.row({"seed": seed}, partial(layer_by_layer, seed, steps))
    if "planted" in args.part:
        few = 10 if args.tiny else 300
        runs = Runs(
            args.out, "planted", setting=f"planted ranks 0, 1, 1, 8; LoRA r = 8, {few} steps", seconds=args.seconds
        )
        for share in (0.9, 0.95, 0.99, 0.999):
            for lr in (0.005, 0.02):
                for seed in seeds:
                    runs.row({"share": share, "lr": lr, "seed": seed}, partial(planted, share, lr, seed, few))
    if "speed" in args.part:
        runs = Runs(args.out, "speed", setting=f"one product of factors on {args.device}", seconds=args.seconds)
        sizes = (
            [(64, 16)] if args.tiny else [(1024, 64), (4096, 64)] if args.device == "cuda" else [(512, 64), (1024, 64)]
        )
        for side, rank in sizes:
            key = {"side": side, "rank": rank, "device": args.device}
            runs.row(key, partial(timed, side, rank, args.device, 2 if args.tiny else 5))


if __name__ == "__main__":
    main()
