"""A small network learns upright digits; the task is the same digits turned by 90°, or shifted in another way."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from lowrank_ref.core.accounting import numel, state_bytes
from lowrank_ref.lab.beds._shared import Actions, Adapt, adapted, classification_loss
from lowrank_ref.lab.data import Arrays, array_batches, digits
from lowrank_ref.lab.models import MLP
from lowrank_ref.lab.train import linear_decay, train

__all__ = ["SHIFTS", "digits_shift", "pretrained_on_digits", "shifted_digits"]

SIZES = (64, 128, 128, 10)


SHIFTS = ("turned", "moved", "negative", "relabelled")


@functools.cache
def shifted_digits(shift: str = "turned") -> Arrays:
    """Return the digits as a task wants them, split as in `digits`.

    Args:
        shift: "turned" by 90°; "moved" by one pixel down and right, around the edge; "negative", black for white;
            "relabelled", the upright pictures with every label one higher and 0 for 9.

    Raises:
        ValueError: another shift.
    """
    if shift not in SHIFTS:
        raise ValueError(f"shift: got {shift!r}, wanted one of {SHIFTS}")
    data = digits(rotate=90 if shift == "turned" else 0)
    for part in ("train", "valid", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        if shift == "moved":
            x = x.unflatten(1, (8, 8)).roll((1, 1), (1, 2)).flatten(1)
        x = 0.4 - x if shift == "negative" else x  # pixels lie in [-0.3, 0.7]
        y = (y + 1) % 10 if shift == "relabelled" else y
        data = replace(data, **{f"x_{part}": x, f"y_{part}": y})
    return data


@functools.cache
def _upright_weights() -> dict[str, torch.Tensor]:
    data, model = digits(), MLP(SIZES, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    batch = array_batches(data.x_train, data.y_train, batch=128, seed=0)
    train(model, batch, classification_loss, optimizer, steps=300, progress=False)
    return model.state_dict()


def pretrained_on_digits() -> MLP:
    """Return an MLP 64-128-128-10 trained for 300 AdamW steps on 1,000 upright digits (about 0.5 s, once)."""
    model = MLP(SIZES)
    model.load_state_dict(_upright_weights())
    return model


@torch.no_grad()
def _measure(model: nn.Module, data: Arrays) -> dict[str, float]:
    logits = model(data.x_test)
    valid = model(data.x_valid)
    return {
        "train loss": F.cross_entropy(model(data.x_train), data.y_train).item(),
        "valid loss": F.cross_entropy(valid, data.y_valid).item(),
        "loss": F.cross_entropy(logits, data.y_test).item(),
        "accuracy": (logits.argmax(dim=1) == data.y_test).double().mean().item(),
    }


def digits_shift(
    adapt: Adapt,
    lr: float,
    seed: int,
    *,
    steps: int = 200,
    actions: Actions | None = None,
    loss_fn: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = classification_loss,
    finish: Callable[[nn.Module], Mapping[str, float] | None] | None = None,
    shift: str = "turned",
) -> dict[str, float]:
    """Adapt the upright network to digits turned by 90°, or another shift, and measure it.

    Args:
        adapt: (model, generator) -> changes the model in place, and may return optimizer groups whose "lr" is a factor
            on `lr`; None trains whatever still requires gradients.
        lr: first learning rate of Adam; it falls linearly to 0.
        seed: of the batches and of the generator handed to `adapt`.
        steps: optimizer steps of 64 images.
        actions: (model, optimizer) -> what acts after each step of the optimizer, such as a rank allocator.
        loss_fn: (model, images, labels) -> what is minimised, such as the cross-entropy and a regulariser.
        finish: called with the trained model before it is measured, and may change it in place, as a cut to a smaller
            rank does; the numbers that it returns join the others.
        shift: the task, see `shifted_digits`.

    Returns:
        "train loss", "valid loss" (on 297 images, to choose a rate by) and "loss" (on 500 test images) in nats,
        "accuracy" (share of the test images), "trainable", the count of numbers that train at the start, and "state
        bytes", the bytes of Adam's state at the end.
    """
    data, model = shifted_digits(shift), pretrained_on_digits()
    optimizer = adapted(adapt, model, lr, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    train(
        model,
        array_batches(data.x_train, data.y_train, batch=64, seed=seed),
        loss_fn,
        optimizer,
        steps=steps,
        schedule=linear_decay(steps),
        actions=actions(model, optimizer) if actions else (),
        progress=False,
    )
    counts = {"trainable": float(numel(trained)), "state bytes": float(state_bytes(optimizer))}
    more = dict(finish(model) or {}) if finish is not None else {}
    return {**_measure(model, data), **counts, **more}
