"""What the benchmarks of rank pruning share: fixed ranks, statistics of batch norm, ranks of a stored arm, ResNets."""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.compression import from_matrix, rank_at_energy, split_model, to_matrix
from lowrank_ref.core.actions import Action
from lowrank_ref.core.linalg import svd

Ranks = dict[str, int]


@torch.no_grad()
def cut_in_place(model: nn.Module, ranks: Ranks, scheme: str) -> None:
    """Replace each weight by its best approximation of a given rank."""
    for path, rank in ranks.items():
        W = model.get_submodule(path).weight
        U, S, Vh = svd(to_matrix(W.detach(), scheme), rank)
        W.copy_(from_matrix(U * S @ Vh, tuple(W.shape), scheme))


class FixedRanks(Action):
    """Truncates to the same ranks from the start on, after every m-th step: TRP without its rule for ranks."""

    def __init__(self, model: nn.Module, ranks: Ranks, every: int, scheme: str) -> None:
        self.task, self.every, self.steps = (model, ranks, scheme), every, 0
        cut_in_place(*self.task)

    def act(self) -> None:
        """Count a step, and truncate if it is time."""
        self.steps += 1
        if self.steps % self.every == 0:
            cut_in_place(*self.task)


@torch.no_grad()
def with_new_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose batch norms take their statistics from these images anew."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    model.train()
    for part in x.split(250):
        model(part)
    return model.eval()


def split(model: nn.Module, ranks: Ranks, scheme: str = "channel") -> nn.Module:
    """Two layers for each, whatever they cost."""
    return split_model(model, ranks, scheme, always=True)


def thin(model: nn.Module, ranks: Ranks, scheme: str, seed: int) -> nn.Module:
    """Two layers for each, drawn anew."""
    model = split(model, ranks, scheme)
    torch.manual_seed(seed)
    for path in ranks:
        for conv in model.get_submodule(path).children():
            conv.reset_parameters()  # type: ignore[operator]
    return model


@torch.no_grad()
def energy_ranks(model: nn.Module, paths: Sequence[str], energy: float, scheme: str = "channel") -> Ranks:
    """The ranks that hold this share of the energy of each layer; the largest of a stack."""
    spectra = {path: torch.linalg.svdvals(to_matrix(model.get_submodule(path).weight, scheme)) for path in paths}
    return {path: int(rank_at_energy(S, energy).max()) for path, S in spectra.items()}


def best_ranks(rows: Sequence[dict[str, Any]], arm: str, rates: Sequence[float]) -> dict[int, Ranks]:
    """Seed -> ranks of an arm at the rate of the least mean validation loss, with new statistics of batch norm."""
    mine = [row for row in rows if row["method"] == arm and row["lr"] in rates]
    wanted = len(rates) * len({row["seed"] for row in mine})
    if not mine or len(mine) != wanted:
        raise ValueError(f"part trp: got {len(mine)} rows of {arm!r}, wanted {wanted or 'some'}; run it first")
    lr = min(
        rates, key=lambda lr: statistics.fmean(row.get("new statistics valid", 9e9) for row in mine if row["lr"] == lr)
    )
    start = "rank "
    return {
        row["seed"]: {key.removeprefix(start): rank for key, rank in row.items() if key.startswith(start)}
        for row in mine
        if row["lr"] == lr
    }


def guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A run that diverges is a row too."""
    try:
        return run()
    except (FloatingPointError, ValueError, torch.linalg.LinAlgError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


class Block(nn.Module):
    """Two 3x3 convolutions, and what came in."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.short = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs), nn.Sequential()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the two paths."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


def resnet(kind: str = "ResNet-20", *, inputs: int = 3, classes: int = 10, seed: int = 0) -> nn.Sequential:
    """ResNet-20 for pictures of 32x32, or ResNet-18 for 224x224, at random weights."""
    torch.manual_seed(seed)
    small = kind == "ResNet-20"
    widths, blocks = ((16, 32, 64), 3) if small else ((64, 128, 256, 512), 2)
    stem = nn.Conv2d(
        inputs, widths[0], 3 if small else 7, stride=1 if small else 2, padding=1 if small else 3, bias=False
    )
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    layers += [] if small else [nn.MaxPool2d(3, 2, 1)]
    before = widths[0]
    for place, width in enumerate(widths):
        for i in range(blocks):
            layers.append(Block(before, width, 2 if place and not i else 1))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
