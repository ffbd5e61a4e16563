"""A network knows an old task and learns a new one: how much of the old is left, at the same skill in the new?"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lowrank_ref.core.accounting import numel
from lowrank_ref.core.checks import check_number
from lowrank_ref.lab.beds._shared import Actions, Adapt, adapted, classification_loss
from lowrank_ref.lab.data import Arrays, array_batches, digits
from lowrank_ref.lab.models import MLP
from lowrank_ref.lab.train import linear_decay, train

__all__ = ["frontier", "knows_upright", "share_right", "train_upright", "two_tasks"]

_WIDTHS = (64, 256, 256, 10)


def train_upright(model: nn.Module, decay: float, seed: int, steps: int) -> nn.Module:
    """Train on upright digits, with AdamW at 0.003 and 128 images a step. Returns the model."""
    data = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay)
    batch = array_batches(data.x_train, data.y_train, batch=128, seed=seed)
    train(model, batch, classification_loss, optimizer, steps=steps, progress=False)
    return model


@functools.cache
def _upright_weights(decay: float, seed: int, steps: int) -> dict[str, torch.Tensor]:
    model = MLP(_WIDTHS, generator=torch.Generator().manual_seed(seed))
    return train_upright(model, decay, seed, steps).state_dict()


def knows_upright(decay: float = 0.5, seed: int = 0, *, steps: int = 800) -> MLP:
    """Return an MLP 64-256-256-10 that was trained on 1,000 upright digits (about 1.5 s, once).

    Args:
        decay: of AdamW; 0.5 leaves many weights near zero.
        seed: of weights and batches.
        steps: of training.
    """
    model = MLP(_WIDTHS)
    model.load_state_dict(_upright_weights(decay, seed, steps))
    return model


@torch.no_grad()
def share_right(model: nn.Module, data: Arrays, part: str = "test") -> float:
    """Return the share of right answers on one part of the data, "train", "valid" or "test"."""
    x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
    return (model(x).argmax(dim=1) == y).double().mean().item()


def two_tasks(
    adapt: Adapt,
    lr: float,
    seed: int,
    *,
    steps: int = 200,
    images: int = 1000,
    decay: float = 0.5,
    actions: Actions | None = None,
    loss_fn: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = classification_loss,
) -> dict[str, float]:
    """Teach the upright network the same digits turned by 90°, and ask it for both.

    Args:
        adapt: see `digits_shift`.
        lr: first learning rate of Adam; it falls linearly to 0.
        seed: of the network, of the batches, and of the generator handed to `adapt`.
        steps: optimizer steps of 64 images.
        images: of the turned training images, the first so many; the same at every seed.
        decay: of the pretraining.
        actions, loss_fn: see `digits_shift`.

    Returns:
        Shares of right answers, "old" and "new" on 500 test images, "old valid" and "new valid" on 297 others; and
        "trainable", the count of numbers that train.
    """
    model, old, new = knows_upright(decay, seed), digits(), digits(rotate=90)
    optimizer = adapted(adapt, model, lr, seed)
    count = numel(p for p in model.parameters() if p.requires_grad)
    train(
        model,
        array_batches(new.x_train[:images], new.y_train[:images], batch=64, seed=seed),
        loss_fn,
        optimizer,
        steps=steps,
        schedule=linear_decay(steps),
        actions=actions(model, optimizer) if actions else (),
        progress=False,
    )
    scores = {"old valid": share_right(model, old, "valid"), "new valid": share_right(model, new, "valid")}
    return {**scores, "old": share_right(model, old), "new": share_right(model, new), "trainable": float(count)}


def frontier(rows: Sequence[dict], level: float) -> dict[str, float] | None:
    """Return the scores of one arm and seed at the rate where its new-task validation score first reaches the level.

    Between two rates of the sweep everything is interpolated linearly; outside it, nothing is said.

    Args:
        rows: of the same arm and seed, each with "lr" and the scores of `two_tasks`.
        level: share of right answers.

    Returns:
        "old", "new", "old valid" and "lr" there, or None if no two neighbouring rates have the level between them.

    Raises:
        TypeError, ValueError: level is no number in [0, 1].

    Example:
        >>> low = {"lr": 1.0, "new valid": 0.5, "new": 0.5, "old": 1.0, "old valid": 1.0}
        >>> high = {"lr": 2.0, "new valid": 1.0, "new": 0.9, "old": 0.5, "old valid": 0.5}
        >>> frontier([high, low], 0.75)
        {'old': 0.75, 'new': 0.7, 'old valid': 0.75, 'lr': 1.5}
    """
    check_number("level", level, low=0, high=1)
    rows = sorted((row for row in rows if "new valid" in row), key=lambda row: row["lr"])
    for a, b in zip(rows, rows[1:]):
        if a["new valid"] < level <= b["new valid"]:
            t = (level - a["new valid"]) / (b["new valid"] - a["new valid"])
            return {key: a[key] + t * (b[key] - a[key]) for key in ("old", "new", "old valid", "lr")}
    return None
