"""The smallest networks: a multilayer perceptron and a convolutional network."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MLP", "ConvNet"]


class MLP(nn.Module):
    """Linear layers `layers.0`, `layers.1`, ... with an activation between them (none after the last).

    Args:
        sizes: widths from input to output, at least two, for example (64, 128, 128, 10).
        activation: makes the module between layers.
        generator: draws the weights, uniformly within 1/sqrt(inputs) as PyTorch does.

    Raises:
        ValueError: fewer than two sizes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes: got {tuple(sizes)}, wanted at least an input and an output width")
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in zip(sizes, sizes[1:]))
        self.activation = activation()
        _uniform_init(self, generator)

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """Map inputs to outputs (logits, when the target is a class)."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class ConvNet(nn.Module):
    """3x3 convolutions `convs.0`, ..., each with ReLU and a halving of the picture; mean over places; `head`.

    Args:
        channels: outputs of each convolution; with three of them a 28x28 picture ends at 3x3.
        classes: number of logits.
        inputs: channels of the picture.
        generator: draws the weights, uniformly within 1/sqrt(inputs of a filter) as PyTorch does.

    Raises:
        ValueError: no channels.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64),
        classes: int = 10,
        *,
        inputs: int = 1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not channels:
            raise ValueError("channels: got none, wanted at least one convolution")
        self.convs = nn.ModuleList(nn.Conv2d(m, n, 3, padding=1) for m, n in zip((inputs, *channels), channels))
        self.head = nn.Linear(channels[-1], classes)
        _uniform_init(self, generator)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Map pictures to logits."""
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.head(x.mean(dim=(2, 3)))


@torch.no_grad()
def _uniform_init(model: nn.Module, generator: torch.Generator | None) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
