"""The weights of a known network move by updates of known rank; a student sees noisy inputs and outputs."""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.layers import AdaptedLinear
from lowrank_ref.lab.beds._shared import Actions, Adapt, adapted
from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.train import train

__all__ = ["PlantedRank", "TanhResidual", "measure_planted", "planted_rank", "train_planted"]


class TanhResidual(nn.Module):
    """Layers `layers.0`, `layers.1`, ...: h becomes h + tanh(W h), without biases, so that ΔW is all there is to learn.

    Args:
        width: d; every W is (d, d), drawn from N(0, 1/d).
        depth: number of layers.
        generator: draws the weights.
    """

    def __init__(self, width: int, depth: int, *, generator: torch.Generator | None = None):
        super().__init__()
        bare = functools.partial(nn.utils.skip_init, nn.Linear, width, width, bias=False)
        self.layers = nn.ModuleList(bare() for _ in range(depth))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / math.sqrt(width)

    def forward(self, h: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """Map inputs to outputs of the same width."""
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return h


@dataclass(frozen=True)
class PlantedRank:
    """A regression task whose answer is known: base weights W, and updates ΔW that are to be found.

    Attributes:
        base: the network before the change.
        updates: ΔW (d, d) of each layer, with `ranks[i]` singular values 1 and the others 0.
        ranks: the planted ranks.
        x_train, y_train: inputs N(0, 1) and noisy outputs of the network with W + ΔW.
        x_valid, y_valid, x_test, y_test: the same without noise, two other draws.
        noise: standard deviation of the noise on each training output.
    """

    base: TanhResidual
    updates: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor
    noise: float

    def floor(self, numbers: float) -> float:
        """Return the mean squared test error to expect of an efficient fit of so many free numbers.

        It is the classical noise² · numbers / (training rows · outputs): every free number costs the same, needed or
        not. A matrix of rank r has r(2d - r) free numbers.
        """
        return self.noise**2 * numbers / self.y_train.numel()


@functools.lru_cache(maxsize=4)
def planted_rank(
    seed: int = 0,
    *,
    ranks: tuple[int, ...] = (0, 1, 1, 8),
    width: int = 32,
    rows: int = 1024,
    noise: float = 0.05,
) -> PlantedRank:
    """Draw a task: everything, weights, updates, inputs and noise, comes from the seed.

    Args:
        seed: of the task.
        ranks: planted rank of each layer, 0 to `width`; their number is the depth of the network.
        width: d.
        rows: of the training data; as many validate, and as many test.
        noise: standard deviation of the noise on each training output.

    Raises:
        ValueError: no rank, or one outside [0, width].
    """
    if not ranks or not all(0 <= r <= width for r in ranks):
        raise ValueError(f"ranks: got {ranks}, wanted at least one number, each from 0 to width = {width}")
    g = torch.Generator().manual_seed(seed)
    base = TanhResidual(width, len(ranks), generator=g).requires_grad_(False)
    U, V = torch.linalg.qr(torch.randn(2, len(ranks), width, width, generator=g)).Q
    updates = tuple(u[:, :r] @ v[:, :r].T for u, v, r in zip(U, V, ranks))
    teacher = copy.deepcopy(base)
    for layer, update in zip(teacher.layers, updates):
        layer.weight += update
    x = torch.randn(2 * rows, width, generator=g)
    y = teacher(x)
    y_train = y[:rows] + noise * torch.randn(rows, width, generator=g)
    x_valid = torch.randn(rows, width, generator=g)
    held_out = x_valid, teacher(x_valid), x[rows:], y[rows:]
    return PlantedRank(base, updates, tuple(ranks), x[:rows], y_train, *held_out, noise)


def _squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def train_planted(
    task: PlantedRank,
    adapt: Adapt,
    lr: float,
    *,
    seed: int = 0,
    steps: int = 800,
    actions: Actions | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    every: int = 0,
) -> nn.Module:
    """Adapt a copy of the base network to the task, with Adam on batches of 128 rows.

    Args:
        task: from `planted_rank`.
        adapt: (model, generator) -> changes the model in place, and may return optimizer groups whose "lr" is a factor
            on `lr`; None trains whatever still requires gradients.
        lr: largest learning rate; it rises over the first 6 % of the steps and then falls linearly to 0.
        seed: of the batches and of the generator handed to `adapt`.
        steps: optimizer steps, at least 2.
        actions: (model, optimizer) -> what acts after each step of the optimizer, such as a rank allocator.
        penalty: model -> a number to add to the loss, such as an L1 norm or a divergence.
        evaluate: called with the model every `every` steps and at the end, for what it notes down.
        every: steps between two such calls; 0 calls only at the end.

    Returns:
        The trained model.

    Raises:
        ValueError: steps below 2, of which one rises and one falls.
    """
    if steps < 2:
        raise ValueError(f"steps: got {steps}, wanted at least 2")
    model = copy.deepcopy(task.base).requires_grad_(True)
    optimizer = adapted(adapt, model, lr, seed)
    warm = max(1, round(0.06 * steps))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        error = _squared_error(model, x, y)
        return error if penalty is None else error + penalty(model)

    train(
        model,
        array_batches(task.x_train, task.y_train, batch=min(128, len(task.x_train)), seed=seed),
        loss,
        optimizer,
        steps=steps,
        schedule=lambda step: min((step + 1) / warm, (steps - step) / (steps - warm)),
        actions=actions(model, optimizer) if actions else (),
        evaluate=evaluate,
        every=every,
        progress=False,
    )
    return model


@torch.no_grad()
def measure_planted(task: PlantedRank, model: nn.Module, *, tolerance: float = 1e-4) -> dict[str, float]:
    """Compare a trained student with the truth.

    The rank of a layer is the number of singular values of its update above `tolerance`; planted ones are 1. The
    default counts what the update holds at all. Noise alone gives values of about 0.02 to 0.05, so 0.25 counts
    what a reader of the spectrum would call real.

    Args:
        task: the task it was trained on.
        model: layers at the paths of `task.base`: adapters (`delta_weight()`), or plain layers, whose update is their
            weight minus the base's.
        tolerance: smallest singular value that counts, > 0.

    Returns:
        "mse", the mean squared error on the noiseless test rows; "valid mse" on the validation rows, to choose a rate
        by; "train mse" on the noisy ones; "rank", the sum of the
        ranks; and for each layer i "rank i" and "error i", the Frobenius distance of its update to the planted one.
    """
    numbers = {
        "mse": _squared_error(model, task.x_test, task.y_test).item(),
        "valid mse": _squared_error(model, task.x_valid, task.y_valid).item(),
        "train mse": _squared_error(model, task.x_train, task.y_train).item(),
        "rank": 0.0,
    }
    for i, (base, planted) in enumerate(zip(task.base.layers, task.updates)):
        layer: Any = model.get_submodule(f"layers.{i}")
        update = layer.delta_weight() if isinstance(layer, AdaptedLinear) else layer.weight - base.weight
        rank = int((torch.linalg.svdvals(update.double()) > tolerance).sum())
        numbers |= {f"rank {i}": float(rank), f"error {i}": (update - planted).norm().item()}
        numbers["rank"] += rank
    return numbers
