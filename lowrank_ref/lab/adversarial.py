"""Adversarial training against one norm or several, with the schemes that the robustness chapters compare.

    RAMP = Scheme(loss, norms=(math.inf, 1), projection=cosine_projection)
    model = train_robust(model, x, y, RAMP, threat, lr=0.2, epochs=15, seed=0)

SGD with momentum 0.9, a rate that falls linearly to 0, PGD of a few steps on every batch. A twin that trains on clean
images runs beside the model only where a scheme fuses the two.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.train import linear_decay, train
from lowrank_ref.robustness.attacks import pgd
from lowrank_ref.robustness.ramp import GradientProjection, Projection, max_loss

__all__ = ["Scheme", "train_robust"]


@dataclass(frozen=True)
class Scheme:
    """How to train against several attacks.

    Attributes:
        loss: (logits at each attack, labels) -> number to minimise. With a single norm all of them are cross-entropy.
        norms: which attacks run on every batch.
        draw: run one of them instead, drawn anew for every batch.
        projection: fuse with a natural twin after every epoch, by this projection of `ramp`; None trains alone.
    """

    loss: Callable[[Sequence[Tensor], Tensor], Tensor] = field(default_factory=lambda: max_loss)
    norms: tuple[float, ...] = (math.inf, 1)
    draw: bool = False
    projection: Projection | None = None


def train_robust(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    scheme: Scheme,
    threat: Mapping[float, float],
    *,
    lr: float,
    epochs: int,
    seed: int,
    batch: int = 100,
    steps: int = 5,
    warmup: int = 0,
) -> nn.Module:
    """Return a copy of the model, trained by the scheme.

    Args:
        model: where to start; stays as it is.
        x: images in [0, 1].
        y: labels.
        scheme: what to train on.
        threat: norm -> radius.
        lr: first learning rate.
        epochs: passes over the images.
        seed: of batches and draws.
        batch: images a step.
        steps: of the attacks.
        warmup: epochs over which the radii grow from 0 in a straight line.
    """
    model = copy.deepcopy(model)
    twin = copy.deepcopy(model) if scheme.projection else None
    both = nn.ModuleList([model, twin] if twin else [model])
    per_epoch = len(x) // batch
    actions = (
        [GradientProjection(model, twin, projection=scheme.projection, every=per_epoch)]
        if twin and scheme.projection
        else []
    )
    batches = array_batches(x, y, batch=batch, seed=seed)
    draws = torch.Generator().manual_seed(seed)

    def numbered(i: int) -> tuple[int, Tensor, Tensor]:
        return i, *batches(i)

    def loss_fn(_: nn.Module, i: int, x: Tensor, y: Tensor) -> Tensor:
        share = min(1.0, (i + 1) / (warmup * per_epoch)) if warmup else 1.0
        norms = scheme.norms
        if scheme.draw:
            norms = (norms[int(torch.randint(len(norms), (1,), generator=draws))],)
        attacked = [pgd(model, x, y, norm=p, epsilon=share * threat[p], steps=steps).x_best for p in norms]
        loss = scheme.loss([model(u) for u in attacked], y)
        return loss if twin is None else loss + F.cross_entropy(twin(x), y)  # disjoint weights: two losses in one

    optimizer = torch.optim.SGD(both.parameters(), lr=lr, momentum=0.9)
    total = epochs * per_epoch
    schedule = linear_decay(total)
    train(both, numbered, loss_fn, optimizer, steps=total, schedule=schedule, actions=actions, progress=False)
    return model
