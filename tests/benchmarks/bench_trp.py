"""TRP on residual networks, on a GPU: time of split networks and of truncations, and accuracy on real digits.

    python tests/benchmarks/bench_trp.py --part latency --part steps --out book/results/trp_scale.json
    python tests/benchmarks/bench_trp.py --part trp --out book/results/trp_scale.json
    python tests/benchmarks/bench_trp.py --part rivals --out book/results/trp_scale.json

latency: dense and split networks at random weights, eager and as a CUDA graph, batch 1 and 256; cpu: on one CPU core.
Both are sensitive to other load.
steps: a training step, and a truncation of all listed layers by SVD and by the Gram matrix.
trp, rivals: ResNet-20 on scikit-learn's digits scaled to 32x32; the second part reads the ranks of the first.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from common import Runs, arguments, interleaved, milliseconds
from rank_pruning import FixedRanks, Ranks, best_ranks, energy_ranks, guarded, resnet, split, thin, with_new_statistics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowrank_ref.compression import TrainedRankPruning, matrix_sides, rank_limit, released_layers, split_model
from lowrank_ref.lab.data import array_batches, digits

RATES, SEEDS = (0.03, 0.1, 0.3), range(3)
STEPS, BATCH, EVERY = 300, 100, 10
TRP_ARMS = {"TRP": "channel", "TRP, spatial": "spatial"}
RIVALS = ("dense", "thin", "cut at 0.5", "fixed ranks")


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiplications for one picture, counted by PyTorch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    return counter.get_total_flops() // 2


def at_share(model: nn.Module, share: float, scheme: str) -> Ranks:
    """Rank of each listed layer: a share of its output channels."""
    return {path: max(1, round(share * model.get_submodule(path).out_channels)) for path in released_layers(model)}


def at_limit(model: nn.Module, energy: float, scheme: str) -> Ranks:
    """Rank of each listed layer: the most that truncation with this energy leaves as it is."""
    sides = {
        path: matrix_sides(tuple(model.get_submodule(path).weight.shape), scheme) for path in released_layers(model)
    }
    return {path: min(rank_limit(energy), *pair) for path, pair in sides.items()}


def variants(dense: nn.Module) -> dict[str, nn.Module]:
    """Name -> network: dense, and split in several ways."""
    found = {"dense": dense}
    for scheme in ("channel", "spatial"):
        found[f"{scheme}, rank limit of e = 0.9"] = split_model(dense, at_limit(dense, 0.9, scheme), scheme)
    found["channel, r = 0.5 N"] = split_model(dense, at_share(dense, 0.5, "channel"), "channel")
    found["channel, r = 0.9 N"] = split(dense, at_share(dense, 0.9, "channel"))
    return found


def graphed(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Replay the forward pass as a CUDA graph."""
    if x.device.type != "cuda":
        return lambda: model(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph.replay


@torch.no_grad()
def latency(kind: str, dtype: str, batch: int, device: str) -> dict[str, Any]:
    """Milliseconds of a forward pass of all variants in turn, eager and, on a GPU, as a CUDA graph."""
    side, number = 32 if kind == "ResNet-20" else 224, getattr(torch, dtype)
    x = torch.randn(batch, 3, side, side, device=device, dtype=number).contiguous(memory_format=torch.channels_last)
    models = {name: m.to(device, number).eval() for name, m in variants(resnet(kind)).items()}
    models = {name: m.to(memory_format=torch.channels_last) for name, m in models.items()}
    runs: dict[str, Callable[[], Any]] = {f"{name}; eager": partial(m, x) for name, m in models.items()}
    if device == "cuda":
        runs |= {f"{name}; graph": graphed(m, x) for name, m in models.items()}
    return {
        "ms": interleaved(runs, repeats=10),
        "macs": {name: macs(m, x) for name, m in models.items()},
        "numbers": {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()},
    }


def steps(kind: str, batch: int, device: str) -> dict[str, Any]:
    """Milliseconds of a training step, and of a truncation by SVD and by the Gram matrix."""
    side = 32 if kind == "ResNet-20" else 224
    model = resnet(kind).to(device)
    x, y = torch.randn(batch, 3, side, side, device=device), torch.zeros(batch, device=device).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    found = {"step": milliseconds(step, repeats=10)}
    for name, gram in (("SVD", False), ("Gram", True)):
        found[name] = milliseconds(TrainedRankPruning(model, gram=gram).truncate, repeats=3, warmup=1)
    return {"ms": found}


@cache
def data(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Part -> pictures (n, 1, 32, 32) and labels, on the device."""
    d = digits()
    parts = {name: (getattr(d, f"x_{name}"), getattr(d, f"y_{name}")) for name in ("train", "valid", "test")}
    wide = {name: F.interpolate(x.view(-1, 1, 8, 8), size=(32, 32), mode="bilinear") for name, (x, _) in parts.items()}
    return {name: (wide[name].to(device), y.to(device)) for name, (_, y) in parts.items()}


def falling(step: int, steps: int) -> float:
    """A tenth of the rate from half of the steps on, a hundredth from three quarters on: as in the paper."""
    return 1.0 if step < steps // 2 else 0.1 if step < steps * 3 // 4 else 0.01


def fit(
    model: nn.Module, lr: float, seed: int, device: str, steps: int, *, first: int = 0, last: int | None = None,
    attach: Callable[[Any], Any] | None = None,
) -> nn.Module:  # fmt: skip
    """SGD with momentum 0.9 and decay 1e-4 under bf16 autocast; `attach`'s action is detached before the last step."""
    x, y = data(device)["train"]
    rows = array_batches(torch.arange(len(x)), torch.arange(len(x)), batch=BATCH, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    action = attach(optimizer) if attach is not None else None
    model.train()
    for step in range(first, steps if last is None else last):
        optimizer.param_groups[0]["lr"] = lr * falling(step, steps)
        if action is not None and step == steps - 1:
            action.detach()
        index = rows(step)[0].to(device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError("loss: got no finite number, wanted one")
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, device: str, name: str = "") -> dict[str, float]:
    """Loss on validation images, accuracy on test images."""
    (x, y), (u, v) = data(device)["valid"], data(device)["test"]
    found = {"valid": F.cross_entropy(model.eval()(x), y), "accuracy": (model(u).argmax(1) == v).double().mean()}
    return {f"{name} {key}".strip(): round(float(value), 5) for key, value in found.items()}


def both_statistics(model: nn.Module, device: str) -> dict[str, float]:
    """Loss and accuracy, as it is and with new statistics of batch norm."""
    renewed = with_new_statistics(model, data(device)["train"][0])
    return {**measured(model, device), **measured(renewed, device, "new statistics")}


def network(seed: int, device: str) -> nn.Sequential:
    """ResNet-20 for pictures of one channel."""
    return resnet(inputs=1, seed=seed).to(device)


def run_trp(scheme: str, lr: float, seed: int, device: str, steps: int) -> dict[str, Any]:
    """Train with truncations, split."""
    model = network(seed, device)
    pruning = TrainedRankPruning(model, scheme=scheme, every=EVERY, gram=True)
    pruning.truncate()
    fit(model, lr, seed, device, steps, attach=pruning.attach)
    ranks = energy_ranks(model, tuple(pruning.layers), 0.9, scheme)
    small = split(model, ranks, scheme)
    found = {
        **both_statistics(small, device),
        **measured(model, device, "before"),
        "macs": macs(small, data(device)["test"][0]),
    }
    return found | {f"rank {path}": rank for path, rank in ranks.items()}


def run_rival(name: str, sets: dict[str, Ranks], lr: float, seed: int, device: str, steps: int) -> dict[str, Any]:
    """One row of a rival at the ranks of TRP."""
    ranks, x = sets[""], data(device)["train"][0]
    if name == "thin":
        small = fit(thin(network(seed, device), ranks, "channel", 1000 + seed), lr, seed, device, steps)
        return {**both_statistics(small, device), "macs": macs(small, x)}
    if name == "fixed ranks":
        model = network(seed, device)
        model = fit(model, lr, seed, device, steps, attach=FixedRanks(model, ranks, EVERY, "channel").attach)
        small = split(model, ranks)
        return {**both_statistics(small, device), **measured(model, device, "before"), "macs": macs(small, x)}
    if name.startswith("cut at"):
        place = round(float(re.findall(r"[\d.]+\d", name)[0]) * steps)
        small = split(fit(network(seed, device), lr, seed, device, steps, last=place), ranks)
        found = measured(small, device, "at the cut")
        fitted = fit(small, lr, seed, device, steps, first=place)
        return found | both_statistics(fitted, device) | {"macs": macs(small, x)}
    model = fit(network(seed, device), lr, seed, device, steps)
    found = {**both_statistics(model, device), "macs": macs(model, x)}
    for kind, scheme in (("", "channel"), ("spatial", "spatial")):
        small = split(model, sets[kind], scheme)
        cut = f"cut {kind}".strip()
        found |= measured(small, device, cut) | measured(
            with_new_statistics(small, x), device, f"{cut}, new statistics"
        )
    kept = split(model, energy_ranks(model, tuple(ranks), 0.9))
    return found | measured(kept, device, "cut at e = 0.9") | {"macs at e = 0.9": macs(kept, x)}


TIMES = {
    "latency": "forward pass at random weights, channels_last; median of 10 in turns",
    "cpu": "forward pass at random weights on one CPU core, channels_last; median of 10 in turns",
    "steps": "training step under bf16 autocast, SGD; truncation of all listed layers, float32",
}


def timed(args: Any, part: str) -> None:
    """Measure and store the rows of a part of times."""
    runs = Runs(args.out, part, setting=TIMES[part], seconds=args.seconds)
    if part == "steps":
        for kind, batch in (("ResNet-20", 128), ("ResNet-18", 64)):
            batch = 2 if args.tiny else batch
            if re.search(args.only, kind):
                runs.row({"network": kind, "batch": batch}, partial(steps, kind, batch, args.device))
        return
    device = "cpu" if part == "cpu" else args.device
    for kind in ("ResNet-20", "ResNet-18")[: 1 if part == "cpu" or args.tiny else 2]:
        for dtype in ("float32", "bfloat16")[: 1 if device == "cpu" else 2]:
            for batch in (1, 2) if args.tiny else (1, 32) if device == "cpu" else (1, 256):
                key = {"network": kind, "dtype": dtype, "batch": batch}
                runs.row(key, partial(latency, kind, dtype, batch, device))


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("latency", "cpu", "steps", "trp", "rivals"))
    torch.set_num_threads(1)
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    length = 4 if args.tiny else STEPS
    setting = f"ResNet-20 on 1,000 digits scaled to 32x32, {length} steps of {BATCH} under bf16 autocast"
    for part in args.part:
        if part in TIMES:
            timed(args, part)
            continue
        runs = Runs(args.out, part, setting=setting, packages=("scikit-learn",), seconds=args.seconds)
        rates, seeds = (RATES[:1], [0]) if args.tiny else (RATES, SEEDS)
        if part == "rivals":
            rows = Runs(args.out, "trp", setting=setting, seconds=args.seconds).rows
            sets = {k: best_ranks(rows, arm, rates) for k, arm in (("", "TRP"), ("spatial", "TRP, spatial"))}
        for name in TRP_ARMS if part == "trp" else RIVALS:
            for lr in rates:
                for seed in seeds if re.search(args.only, name) else ():
                    if part == "trp":
                        run = partial(run_trp, TRP_ARMS[name], lr, seed, args.device, length)
                    else:
                        own = {kind: found[seed] for kind, found in sets.items()}
                        run = partial(run_rival, name, own, lr, seed, args.device, length)
                    runs.row({"method": name, "lr": lr, "seed": seed}, partial(guarded, run))


if __name__ == "__main__":
    main()
