"""A convolution as a matrix in three ways, as two layers of lower rank, and what these cost.

The weight is W (N, C, kh, kw): N output channels, C input channels. A linear layer is its own
matrix, whatever the scheme.

| scheme      | matrix                   | two layers of rank r                                     |
|-------------|--------------------------|----------------------------------------------------------|
| "channel"   | (N, C·kh·kw)             | kh x kw from C to r, then 1 x 1 from r to N              |
| "spatial"   | (C·kh, N·kw)             | kh x 1 from C to r, then 1 x kw from r to N              |
| "decoupled" | N matrices (C, kh·kw)    | 1 x 1 from C to N·r, then kh x kw in N groups of r       |
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.core.checks import check_rank, check_wide
from lowrank_ref.core.layers import Model, is_conv1d, linear_like, put_in_place, weight_of
from lowrank_ref.core.linalg import svd
from lowrank_ref.core.matching import Pattern, select

SCHEMES = ("channel", "spatial", "decoupled")


def check_scheme(scheme: str) -> None:
    """Require one of `SCHEMES`, or raise a ValueError."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: got {scheme!r}, wanted one of {SCHEMES}")


def to_matrix(W: Float[Tensor, "..."], scheme: str = "channel") -> Float[Tensor, "..."]:
    """Return a weight as the matrix, or the stack of matrices, whose rank counts.

    Args:
        W: (N, C, kh, kw) of a convolution; or (m, n) of a linear layer, which is returned as it is.
        scheme: "channel" gives (N, C·kh·kw), "spatial" (C·kh, N·kw), "decoupled" a stack (N, C, kh·kw).

    Raises:
        TypeError, ValueError: another scheme, or W is no floating-point tensor of 2 or 4 dimensions without empty ones.
    """
    check_scheme(scheme)
    check_wide("W", W)
    if W.ndim not in (2, 4) or 0 in W.shape:
        raise ValueError(f"W: got shape {tuple(W.shape)}, wanted (N, C, kh, kw) or (m, n) without empty sides")
    if W.ndim == 2:
        return W
    if scheme == "spatial":
        return W.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return W.flatten(1 if scheme == "channel" else 2)


def from_matrix(M: Float[Tensor, "..."], shape: tuple[int, ...], scheme: str = "channel") -> Float[Tensor, "..."]:
    """Return the weight of this shape whose matrix is M: the inverse of `to_matrix`."""
    if len(shape) == 4 and scheme == "spatial":
        N, C, kh, kw = shape
        return M.reshape(C, kh, N, kw).permute(2, 0, 1, 3)
    return M.reshape(shape)


def matrix_sides(shape: tuple[int, ...], scheme: str = "channel") -> tuple[int, int]:
    """Return the two sides of the matrix of a weight of this shape, or of each matrix of a stack."""
    rows, columns = to_matrix(torch.empty(shape, device="meta"), scheme).shape[-2:]
    return rows, columns


def split_macs(shape: tuple[int, ...], rank: int, scheme: str = "channel", *, stride: tuple[int, int] = (1, 1)) -> int:
    """Return multiplications per output position of the two layers of rank r; with stride 1 also their weights' count.

    channel r(C·kh·kw + N); spatial r(C·kh·s_w + N·kw); decoupled rN(C·s_h·s_w + kh·kw), as the first layer there leaves
    strides to the second; linear r(m + n). Positions that padding adds are left out.

    Raises:
        TypeError, ValueError: a rank that is no integer from 1 to the smaller side, or another scheme.

    Example:
        >>> 24 * 24 * 9, split_macs((24, 24, 3, 3), 7), split_macs((24, 24, 3, 3), 7, "spatial")
        (5184, 1680, 1008)
    """
    sides = matrix_sides(shape, scheme)
    check_rank(rank, sides)
    if len(shape) == 2 or scheme == "channel":
        return rank * sum(sides)
    more = stride[1] if scheme == "spatial" else stride[0] * stride[1]
    return rank * (sides[0] * more + sides[1]) * (shape[0] if scheme == "decoupled" else 1)


def pair_weights(
    W: Float[Tensor, "..."], rank: int, scheme: str = "channel"
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return the weights of the two layers whose product is the best of this rank for each matrix of W.

    Singular values go in equal parts √σ to both, as in TRP's released code; with "spatial" whole into the second.

    Raises:
        TypeError, ValueError: W is no finite weight, another scheme, or a rank out of range.
    """
    check_rank(rank, matrix_sides(tuple(W.shape), scheme))
    M = to_matrix(W.detach(), scheme)
    if W.ndim == 4 and scheme == "decoupled":
        parts = [svd(matrix, rank) for matrix in M]
        first = torch.cat([(U * S.sqrt()).T for U, S, _ in parts])  # (N·r, C)
        second = torch.stack([S.sqrt()[:, None] * Vh for _, S, Vh in parts])  # (N, r, kh·kw)
        return first[:, :, None, None], second.unflatten(2, W.shape[2:])
    U, S, Vh = svd(M, rank)
    if W.ndim == 2:
        return S.sqrt()[:, None] * Vh, U * S.sqrt()
    N, C, kh, kw = W.shape
    if scheme == "spatial":
        first, second = U.T.reshape(rank, C, kh), (S[:, None] * Vh).reshape(rank, N, kw)
        return first[..., None], second.transpose(0, 1)[:, :, None]
    return (S.sqrt()[:, None] * Vh).reshape(rank, C, kh, kw), (U * S.sqrt())[:, :, None, None]


def split_layer(layer: nn.Module, rank: int, scheme: str = "channel") -> nn.Sequential:
    """Return two new ordinary layers that compute what the layer does with its matrix cut to this rank.

    Stride, padding and dilation go along with the kernel's sides; the bias goes to the second.

    Args:
        layer: `nn.Conv2d` without groups and with padding by zeros, `nn.Linear` or GPT-2's `Conv1D`.
        rank: 1 to the smaller side of its matrix.
        scheme: see the table at the top.

    Raises:
        TypeError, ValueError: another layer, a rank out of range, or a weight that is not finite.
    """
    if not isinstance(layer, nn.Conv2d):
        first, second = pair_weights(weight_of(layer), rank, scheme)
        dtype, bias = weight_of(layer).dtype, layer.bias
        kind = type(layer) if is_conv1d(layer) and bias is not None else nn.Linear
        pair = linear_like(nn.Linear, first.to(dtype), None), linear_like(kind, second.to(dtype), bias)  # type: ignore[arg-type]
    else:
        check_conv("layer", layer)
        first, second = pair_weights(layer.weight, rank, scheme)
        groups = layer.out_channels if scheme == "decoupled" else 1
        reads = {"channel": (True, True), "spatial": (True, False), "decoupled": (False, False)}[scheme]
        sides = [{name: _sides(layer, name, on) for name in _NEUTRAL} for on in (reads, tuple(not r for r in reads))]
        pair = _conv(layer, first, None, 1, sides[0]), _conv(layer, second, layer.bias, groups, sides[1])
    thin = nn.Sequential(*pair)
    vars(thin)["taken"] = "factored"  # so that `save_pretrained` says what `from_pretrained` could not build
    return thin.train(layer.training)


def split_model(model: Model, ranks: Mapping[str, int], scheme: str = "channel", *, always: bool = False) -> Model:
    """Return a copy with two thin layers in the place of each named one, all else as it is. No retraining.

    Args:
        model: stays as it is.
        ranks: path -> rank.
        scheme: see the table at the top.
        always: split also where the pair would need as many multiplications as the layer, or more. Such a layer is
            else left whole, with all its ranks.

    Raises:
        TypeError, ValueError: no rank at all, a path that is no layer of the model, or as `split_layer`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        >>> split_model(model, {"2": 4})[2][0]
        Conv2d(16, 4, kernel_size=(3, 3), stride=(1, 1), bias=False)
    """
    model, modules = copy.deepcopy(model), dict(model.named_modules())
    if not ranks or (strangers := ranks.keys() - modules.keys()):
        raise ValueError(f"ranks: got {sorted(strangers) if ranks else 'none'}, wanted paths of layers of the model")
    new: dict[int, nn.Module] = {}
    for path, rank in ranks.items():
        layer: Any = model.get_submodule(path)
        pair = split_layer(layer, rank, scheme)
        shape = tuple(layer.weight.shape)
        if always or split_macs(shape, rank, scheme, stride=getattr(layer, "stride", (1, 1))) < math.prod(shape):
            new[id(layer)] = pair
    if id(model) in new:
        return cast(Model, new[id(model)])
    put_in_place(model, new)
    return model


def released_layers(model: nn.Module) -> list[str]:
    """Return the paths that the released code lists: convolutions with a kernel other than 1x1, but for the first."""
    convs = [path for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return convs[1:]


def prunable(model: nn.Module, pattern: Pattern | None = None) -> dict[str, Any]:
    """Return path -> layer of what a pattern means (see `replace_linears`); None takes `released_layers`.

    Raises:
        TypeError, ValueError: nothing matches; a weight is computed by a parametrisation or in a hook, which must be
            removed first; a convolution has groups, or padding with anything but zeros.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if pattern is None:
        found: dict[str, Any] = {path: layers[path] for path in released_layers(model)}
        if not found:
            raise ValueError(f"pattern: got None and {type(model).__name__} without a second convolution, wanted names")
    else:
        found = dict(select(model, layers, pattern))
    for path, layer in found.items():
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            raise ValueError(f"{path}: got a weight that is computed, wanted a parameter; remove its parametrisation")
        if isinstance(layer, nn.Conv2d):
            check_conv(path, layer)
    return found


def check_conv(name: str, layer: nn.Conv2d) -> None:
    """Require a convolution without groups, with padding by zeros, or raise a ValueError."""
    if layer.groups != 1 or layer.padding_mode != "zeros":
        got = f"groups = {layer.groups} and padding_mode = {layer.padding_mode!r}"
        raise ValueError(f"{name}: got {got}, wanted groups = 1 and padding_mode = 'zeros'")


#: What a side of a kernel does that moves nothing.
_NEUTRAL = {"stride": 1, "padding": 0, "dilation": 1}


def _sides(layer: nn.Conv2d, name: str, on: tuple[bool, ...]) -> object:
    """Return an option for the sides that a layer of the pair reads, and what is neutral for the others."""
    value = getattr(layer, name)
    if isinstance(value, str):  # "same" and "valid" mean the same for each side
        return value
    return tuple(v if here else _NEUTRAL[name] for v, here in zip(value, on))


def _conv(layer: nn.Conv2d, W: Tensor, bias: Tensor | None, groups: int, options: dict[str, object]) -> nn.Conv2d:
    size = (W.shape[1] * groups, W.shape[0], tuple(W.shape[2:]))
    conv = nn.Conv2d(*size, groups=groups, bias=bias is not None, device="meta", **options)  # type: ignore[arg-type]
    conv.weight = nn.Parameter(W.to(layer.weight.dtype, memory_format=torch.contiguous_format, copy=True))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv
