"""MNIST digits of 14x14 pixels, their corrupted copies, and residual networks of any size that learn them."""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.lab.data import mnist5k
from lowrank_ref.robustness.augmentation_chains import chained, consistent_loss
from lowrank_ref.robustness.corruptions import CORRUPTIONS, corrupt

__all__ = ["CorruptedDigits", "ResidualBlock", "corrupted_digits", "residual_network", "train_with_chains"]

#: Severities at which the test images are corrupted.
SHOWN = (2, 4)
TRAIN, VALID, TEST = 3200, 800, 600


@dataclass(frozen=True)
class CorruptedDigits:
    """Images (n, 1, 14, 14) in [0, 1] and labels.

    Attributes:
        train: 3,200 images to learn from.
        valid: 800 images to choose by.
        test: 600 images to report on.
        corrupted: (corruption, severity) -> the test images so corrupted, drawn once under seed 0.
    """

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    corrupted: dict[tuple[str, int], Tensor]


@functools.cache
def corrupted_digits() -> CorruptedDigits:
    """Return the digits of `mnist5k`, each 2x2 pixels averaged, and the corrupted test images.

    Its 4,000 training images are split in their order; its validation images are not used.
    """
    data = mnist5k()
    x, y = data.x_train[: TRAIN + VALID], data.y_train[: TRAIN + VALID]
    x, x_test = (F.avg_pool2d(part, 2) for part in (x, data.x_test[:TEST]))
    y_test = data.y_test[:TEST]
    generator = torch.Generator().manual_seed(0)
    keys = [(name, severity) for name in CORRUPTIONS for severity in SHOWN]
    corrupted = {key: corrupt(x_test, *key, generator=generator) for key in keys}
    return CorruptedDigits((x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]), (x_test, y_test), corrupted)


class ResidualBlock(nn.Module):
    """x + second(dropout(relu(first(norm(x))))), all of one width.

    Args:
        width: of the input, and between the two linear layers.
        dropout: in [0, 1).

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        check_integer("width", width, low=1)
        check_number("dropout", dropout, low=0, high=1 - 1e-9)
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Add the block's correction."""
        return x + self.second(self.dropout(F.relu(self.first(self.norm(x)))))


def residual_network(
    width: int, blocks: int, *, inputs: int = 196, classes: int = 10, dropout: float = 0.0, seed: int = 0
) -> nn.Sequential:
    """Return flatten, linear, blocks, norm, linear head: `model[:2 + k]` ends after k blocks, `model[-1]` is the head.

    Args:
        width: of all layers.
        blocks: how many, >= 1.
        inputs: pixels of an image.
        classes: logits.
        dropout: in the blocks.
        seed: PyTorch's own start is drawn under it; its random state stays as it was.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    check_integer("blocks", blocks, low=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [ResidualBlock(width, dropout) for _ in range(blocks)]
        return nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, width), *layers, nn.LayerNorm(width), nn.Linear(width, classes)
        )


def train_with_chains(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    seed: int,
    lr: float = 2e-3,
    batch: int = 100,
    weight: float | None = 12.0,
) -> nn.Module:
    """Train a model in place by AdamW, on clean images or by `consistent_loss` with two augmented views.

    The rate falls linearly to 0; a last, incomplete batch of an epoch is left out.

    Args:
        model: returns logits; in eval mode afterwards.
        x: images in [0, 1].
        y: labels.
        epochs: passes over the images; each epoch draws its views at once.
        seed: of order and augmentation. Dropout takes PyTorch's own generator, seeded with it inside.
        lr: first rate, > 0.
        batch: images a step.
        weight: λ of the consistency; None trains on clean images alone.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: epochs or lr out of range.
    """
    check_integer("epochs", epochs, low=1)
    check_number("lr", lr, low=0, open_low=True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2, fused=True)
    steps, done = epochs * (len(x) // batch), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for _ in range(epochs):
            views = [] if weight is None else [chained(x, generator=generator) for _ in range(2)]
            for rows in torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].split(batch):
                optimizer.param_groups[0]["lr"] = lr * (1 - done / steps)
                optimizer.zero_grad()
                if weight is None:
                    loss = F.cross_entropy(model(x[rows]), y[rows])
                else:
                    loss = consistent_loss(model, x[rows], [view[rows] for view in views], y[rows], weight=weight)
                loss.backward()
                optimizer.step()
                done += 1
    return model.eval()
