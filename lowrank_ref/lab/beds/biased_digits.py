"""Digits with a bias planted where one wants it: in what a network was pretrained on, or in what it is adapted to."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_ref.core.checks import check_number
from lowrank_ref.lab.beds._shared import Adapt, adapted, classification_loss
from lowrank_ref.lab.data import array_batches, digits
from lowrank_ref.lab.models import MLP
from lowrank_ref.lab.train import linear_decay, train

__all__ = ["BiasedDigits", "biased_digits", "marked", "train_biased"]

#: Classes from here on are rare in a skewed task; a mark in the pretraining stands for them.
RARE = 5
WIDTHS = (64, 128, 128, 10)
PRETRAINING, TASK, VALID = 600, 500, 250
INK, PAPER = 0.7, -0.3

Rows = tuple[Tensor, Tensor]


def marked(x: Tensor, on: Tensor) -> Tensor:
    """Return images (rows, 64) whose two pixels in the upper left corner are white where `on`, else black."""
    return torch.cat([torch.where(on[:, None], INK, PAPER).to(x.dtype).expand(-1, 2), x[:, 2:]], dim=1)


@dataclass(frozen=True)
class BiasedDigits:
    """What `biased_digits` made: a pretrained network, a task for it, and images that show its biases.

    Attributes:
        weights: of the pretrained network.
        old: images and labels of the pretraining, as the network saw them.
        new: images and labels of the task's training set, as they are seen.
        valid, test: upright images and true labels, all classes alike, without marks.
        contrast, shift: how the task shows an upright image.
        marks: whether the pretraining had marks.
    """

    weights: dict[str, Tensor]
    old: Rows
    new: Rows
    valid: Rows
    test: Rows
    contrast: float
    shift: tuple[int, int]
    marks: bool

    def model(self) -> MLP:
        """Return the pretrained network, a new one at every call."""
        model = MLP(WIDTHS)
        model.load_state_dict(self.weights)
        return model

    def as_task(self, x: Tensor) -> Tensor:
        """Return upright images as the task shows them."""
        return _as_task(x, self.contrast, self.shift)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return shares of right answers on the test images, and as "valid ..." on the validation images.

        "minority", "majority" and "accuracy" are those of classes 5 to 9, of 0 to 4, and of all, in the task; "old" is
        that of the upright images. With marks, every image is shown with one and without; "aligned" and "opposed" are
        those of images whose mark says what it said in the pretraining, and of the others, "reliance" the difference.
        """
        found: dict[str, float] = {}
        for prefix, (x, y) in (("valid ", self.valid), ("", self.test)):
            rare = y >= RARE
            views = [partial(marked, on=on) for on in (rare, ~rare)] if self.marks else [nn.Identity()]
            new, old = (
                torch.stack([model(view(shown)).argmax(1) == y for view in views]).double()
                for shown in (self.as_task(x), x)
            )
            parts = {"minority": new[:, rare], "majority": new[:, ~rare], "accuracy": new, "old": old}
            if self.marks:
                parts |= {"aligned": new[0], "opposed": new[1], "reliance": new[0] - new[1]}
            found |= {prefix + name: part.mean().item() for name, part in parts.items()}
        return found


def _as_task(x: Tensor, contrast: float, shift: tuple[int, int]) -> Tensor:
    """Return images moved around the edge, (down, right), and paler."""
    return PAPER + contrast * (x.unflatten(1, (8, 8)).roll(shift, (1, 2)).flatten(1) - PAPER)


@functools.cache
def biased_digits(
    seed: int,
    *,
    contrast: float = 0.6,
    shift: tuple[int, int] = (1, 0),
    kept: float = 0.06,
    flipped: float = 0.15,
    wrong: float = 0.0,
    agreement: float | None = None,
) -> BiasedDigits:
    """Pretrain a network on 600 digits (0.4 s) and make a task of 500 others, shown lower and paler; 250 validate.

    Args:
        seed: of the split, the network and the biases.
        contrast: of the task's images, in (0, 1].
        shift: pixels down and right in the task.
        kept: share of classes 5 to 9 that stays in the task's training set.
        flipped: share of the task's training labels that a random class from 0 to 4 takes the place of.
        wrong: share of the labels in the *pretraining* that a random other class takes the place of.
        agreement: how often a mark in the corner tells, in the *pretraining*, whether the class is 5 to 9; in the task
            every second image has one, whatever its class. None: no marks.

    Raises:
        TypeError, ValueError: a number out of range.
    """
    check_number("contrast", contrast, low=0, high=1, open_low=True)
    for name, share in {"kept": kept, "flipped": flipped, "wrong": wrong, "agreement": agreement or 0.0}.items():
        check_number(name, share, low=0, high=1)
    g = torch.Generator().manual_seed(seed)
    every = digits()
    x, y = (torch.cat([getattr(every, f"{kind}_{part}") for part in ("train", "valid", "test")]) for kind in "xy")
    rows = torch.randperm(len(x), generator=g)
    x, y = x[rows], y[rows]
    old, task, valid, test = _cut(len(x))

    def chance(share: float, count: int) -> Tensor:
        return torch.rand(count, generator=g) < share

    x_old, y_old = x[old], y[old]
    others = (y_old + torch.randint(1, 10, y_old.shape, generator=g)) % 10
    if agreement is not None:
        x_old = marked(x_old, (y_old >= RARE) == chance(agreement, len(y_old)))
    y_old = torch.where(chance(wrong, len(y_old)), others, y_old)

    stays = (y[task] < RARE) | chance(kept, TASK)
    x_new, y_new = _as_task(x[task], contrast, shift)[stays], y[task][stays]
    majority = torch.randint(RARE, y_new.shape, generator=g)
    y_new = torch.where(chance(flipped, len(y_new)), majority, y_new)
    if agreement is not None:
        x_new = marked(x_new, chance(0.5, len(x_new)))

    model = MLP(WIDTHS, generator=g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    batch = array_batches(x_old, y_old, batch=64, seed=seed)
    train(model, batch, classification_loss, optimizer, steps=300, progress=False)
    sets = (x_old, y_old), (x_new, y_new), (x[valid], y[valid]), (x[test], y[test])
    return BiasedDigits(model.state_dict(), *sets, contrast, shift, agreement is not None)


def _cut(count: int) -> tuple[slice, ...]:
    ends = (0, PRETRAINING, PRETRAINING + TASK, PRETRAINING + TASK + VALID, count)
    return tuple(slice(a, b) for a, b in zip(ends, ends[1:]))


def train_biased(
    data: BiasedDigits,
    adapt: Adapt,
    lr: float,
    seed: int,
    *,
    steps: int = 200,
    loss_fn: Callable[[nn.Module, Tensor, Tensor], Tensor] = classification_loss,
    finish: Callable[[nn.Module], Mapping[str, float] | None] | None = None,
) -> dict[str, float]:
    """Adapt the pretrained network to the task by Adam on batches of 64, the rate falling to 0; return its `measure`.

    Args:
        data: of `biased_digits`.
        adapt, lr, seed, steps, loss_fn, finish: as for `digits_shift`.
    """
    model = data.model()
    optimizer = adapted(adapt, model, lr, seed)
    batch = array_batches(*data.new, batch=64, seed=seed)
    train(model, batch, loss_fn, optimizer, steps=steps, schedule=linear_decay(steps), progress=False)
    more = dict(finish(model) or {}) if finish is not None else {}
    return data.measure(model) | more
