"""Maestro on whole models: the convolution, and surgery in both directions. The equations are in `maestro.py`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.compression.maestro import MaestroLinear, group_lasso, nested_optimum
from lowrank_ref.core.checks import check_floating, check_number
from lowrank_ref.core.layers import Model, is_linear, put_in_place, replace_modules


def filled(layer: Model, weight: Tensor, bias: Tensor | None) -> Model:
    """Give an ordinary layer copies of these tensors as its parameters."""
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return layer


class MaestroConv2d(MaestroLinear):
    """A convolution as b filters (C, k, k), then a 1x1 convolution that mixes them; W.reshape(m, C·k·k) = B·A.

    Args:
        A: (r, C·k·k); B: (m, r); bias: (m,) or None.
        like: the convolution whose kernel size, stride, padding and dilation to take.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.compression import MaestroConv2d
        >>> layer = MaestroConv2d.from_conv2d(nn.Conv2d(3, 4, kernel_size=3))
        >>> layer.rank, [tuple(conv.weight.shape) for conv in layer.plain(rank=1)]
        (4, [(1, 3, 3, 3), (4, 1, 1, 1)])
    """

    def __init__(self, A: Tensor, B: Tensor, bias: Tensor | None, *, like: nn.Conv2d) -> None:
        super().__init__(A, B, bias)
        self.filter = (like.in_channels, like.kernel_size[0], like.kernel_size[1])
        self.options: dict[str, Any] = {
            "stride": like.stride,
            "padding": like.padding,
            "dilation": like.dilation,
        }

    @classmethod
    def from_conv2d(cls, base: nn.Conv2d) -> "MaestroConv2d":
        """Split the filters of a convolution by the SVD of its matrix; the function stays the same.

        Raises:
            TypeError: another module, or a weight that is not floating point.
            ValueError: groups other than 1, or padding with anything but zeros.
        """
        if not isinstance(base, nn.Conv2d):
            raise TypeError(f"base: got {type(base).__name__}, wanted nn.Conv2d")
        check_floating("base.weight", base.weight)
        if base.groups != 1 or base.padding_mode != "zeros":
            got = f"groups = {base.groups} and padding_mode = {base.padding_mode!r}"
            raise ValueError(f"base: got {got}, wanted groups = 1 and padding_mode = 'zeros'")
        A, B = nested_optimum(base.weight.detach().flatten(1))
        A, B = A.to(base.weight.dtype), B.to(base.weight.dtype)
        return cls(A, B, base.bias, like=base).train(base.training)

    def dense_weight(self, width: int | None = None) -> Float[Tensor, "m C k1 k2"]:
        """Return the filters that the first `width` components multiply to, or all kept ones."""
        return super().dense_weight(width).unflatten(1, self.filter)

    def forward(self, x: Float[Tensor, "*batch C H W"]) -> Float[Tensor, "*batch m H2 W2"]:
        """Return the mix of the first b filters, with b = `width`."""
        h = F.conv2d(x, self.A[: self.width].unflatten(1, self.filter), **self.options)
        return F.conv2d(h, self.B[:, : self.width, None, None], self.bias)

    def first(self, W: Tensor, bias: Tensor | None) -> nn.Module:
        """Return an ordinary convolution with this matrix that reads what this layer reads."""
        channels, *kernel = self.filter
        conv = nn.Conv2d(channels, len(W), (kernel[0], kernel[1]), **self.options, bias=bias is not None, device="meta")
        return filled(conv, W.unflatten(1, self.filter), bias)

    def second(self, W: Tensor, bias: Tensor | None) -> nn.Module:
        """Return an ordinary 1x1 convolution with this weight."""
        conv = nn.Conv2d(W.shape[1], W.shape[0], 1, bias=bias is not None, device="meta")
        return filled(conv, W[:, :, None, None], bias)


def decompose(model: Model, pattern: str = "") -> Model:
    """Replace every linear layer and convolution whose path matches by its factors, at full rank, all of it trained.

    Args:
        model: changed in place; it computes what it did. All parameters are set to train.
        pattern: regular expression searched in the layer's path; "" takes every layer.

    Raises:
        ValueError: nothing matches, or a convolution with groups or another padding. The model is unchanged.

    Example:
        >>> net = decompose(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), "0")
        >>> net
        Sequential(
          (0): MaestroLinear(6 -> 5, rank 5 of 5)
          (1): ReLU()
          (2): Linear(in_features=5, out_features=2, bias=True)
        )
    """

    def split(layer: Any) -> MaestroLinear:
        conv = isinstance(layer, nn.Conv2d)
        return MaestroConv2d.from_conv2d(layer) if conv else MaestroLinear.from_linear(layer)

    return replace_modules(
        model, pattern, split, accepts=lambda m: is_linear(m) or isinstance(m, nn.Conv2d), trainable=""
    )


def maestro_layers(model: nn.Module) -> Iterator[tuple[str, MaestroLinear]]:
    """Iterate over (path, layer) of all Maestro layers, each once, in the order in which ranks are listed."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, MaestroLinear))


def penalty(model: nn.Module) -> Float[Tensor, ""]:
    """Return the hierarchical group lasso R, summed over the layers; add λR to the loss.

    All stored components count, dropped ones among them, as in the official code: the importance sums over all rows,
    and a dropped row that nothing pulls to zero would keep the tails before it large for ever.

    Raises:
        ValueError: the model holds no Maestro layer.
    """
    terms = [group_lasso(layer.A, layer.B) for _, layer in maestro_layers(model)]
    if not terms:
        raise ValueError(f"model: got {type(model).__name__} without Maestro layer, wanted at least one")
    return torch.stack(terms).sum()


@torch.no_grad()
def resorted(model: Model) -> Model:
    """Return a copy whose kept components are those of a fresh SVD of each weight: the same function, in SVD's order.

    Raises:
        ValueError: the model holds no Maestro layer.
    """
    model = copy.deepcopy(model)
    layers = [layer for _, layer in maestro_layers(model)]
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without Maestro layer, wanted at least one")
    for layer in layers:
        A, B = nested_optimum(layer.dense_weight().flatten(1))
        layer.A.copy_(A[: len(layer.A)])
        layer.B.copy_(B[:, : len(layer.A)])
    return model


@torch.no_grad()
def ranks_by_loss(
    model: nn.Module, loss: Callable[[nn.Module], float | Tensor], costs: Sequence[float], budget: float
) -> list[int]:
    """Return the ranks that a greedy search on the loss leaves within a budget, each at least 1.

    Every round tries to take a tenth of the components, at least one, from each layer in turn, and does so where
    the loss rises least per cost saved. No retraining.

    Args:
        model: stays as it is; the search begins at the ranks that its layers keep.
        loss: what to keep low, such as the loss of one large training batch; gets a copy in evaluation mode.
        costs, budget: as for `ranks_within`.

    Raises:
        ValueError: no Maestro layer, another number of costs, or rank 1 everywhere is already too much.
    """
    model = copy.deepcopy(model).eval()
    layers = [layer for _, layer in maestro_layers(model)]
    if not layers or len(layers) != len(costs):
        raise ValueError(f"costs: got {len(costs)}, wanted one for each of {len(layers)} layers, at least one")
    for cost in costs:
        check_number("costs", float(cost), low=0, open_low=True)
    check_number("budget", budget)
    if sum(costs) > budget:
        raise ValueError(f"budget: got {budget}, wanted at least {sum(costs)}, the price of rank 1 everywhere")
    now = float(loss(model))
    while sum(layer.rank * cost for layer, cost in zip(layers, costs)) > budget:
        tries: list[tuple[float, int, int, float]] = []
        for place, (layer, cost) in enumerate(zip(layers, costs)):
            if layer.rank > 1:
                old, fewer = layer.rank, max(1, layer.rank // 10)
                layer.rank = old - fewer
                then = float(loss(model))
                layer.rank = old
                tries.append(((then - now) / (fewer * cost), place, old - fewer, then))
        _, place, rank, now = min(tries)
        layers[place].rank = rank
    return [layer.rank for layer in layers]


def deployed(model: Model, ranks: Sequence[int] | None = None) -> Model:
    """Return a copy in which every Maestro layer is cut and made of ordinary layers. No retraining.

    Args:
        model: stays as it is.
        ranks: one per layer of `maestro_layers`, at most what the layer keeps; None keeps all of that.

    Raises:
        ValueError: no Maestro layer, another number of ranks, or one out of range.
    """
    model = copy.deepcopy(model)
    layers = [layer for _, layer in maestro_layers(model)]
    ranks = [layer.rank for layer in layers] if ranks is None else ranks
    if not layers or len(ranks) != len(layers):
        raise ValueError(f"ranks: got {list(ranks)}, wanted one for each of {len(layers)} layers, at least one")
    plain = {id(layer): layer.plain(rank) for layer, rank in zip(layers, ranks)}
    if id(model) in plain:
        return cast(Model, plain[id(model)])
    put_in_place(model, plain)
    return model
