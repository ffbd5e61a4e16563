"""BitNet layers of transformers (`transformers.integrations.bitnet`, seen in version 5.23) as `PackedLinear`.

| in transformers                                                          | here                                |
|--------------------------------------------------------------------------|-------------------------------------|
| `BitLinear`: bytes (m/4, n), byte i of a column holds rows i, m/4 + i, … | the same four planes along a row    |
| `BitLinear`: y / (s · weight_scale)                                      | β = 1/weight_scale                  |
| `AutoBitLinear`, offline: weight -1, 0, 1; (y + b) · weight_scale        | β = weight_scale, and the bias is βb |
| `AutoBitLinear`, online: quantises its weight in each forward            | `BitLinear`, packed                 |
| an RMSNorm inside (`use_rms_norm`), ε from the config                    | stays a module of its own, in front |

Theirs rounds activations and sums in the model's dtype, ours in float32. So the results agree to rounding in float32,
and in 16 bits as far as those go.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ref.core.checks import check_loaded, check_number
from lowrank_ref.lowbit.ternary import BitLinear, PackedLinear, pack, unpack


def is_bitnet(module: nn.Module) -> bool:
    """Tell transformers' two BitNet layers. No import of transformers."""
    kind = type(module)
    return kind.__name__ in ("BitLinear", "AutoBitLinear") and kind.__module__ == "transformers.integrations.bitnet"


def from_bitnet(layer: nn.Module) -> nn.Module:
    """Return a `PackedLinear` that computes what a BitNet layer of transformers does; behind its norm, if it has one.

    For a whole model, loaded by `from_pretrained` as ever:

        replace_modules(model, "", from_bitnet, accepts=is_bitnet, own_forward=True)

    Args:
        layer: `BitLinear` or `AutoBitLinear`; it stays as it is.

    Returns:
        `PackedLinear`, or `nn.Sequential` of the layer's norm and it.

    Raises:
        TypeError: another layer.
        ValueError: weights that are not -1, 0 or 1, a scale that is not one number > 0, or tensors on the meta device.
    """
    if not is_bitnet(layer):
        raise TypeError(f"layer: got {type(layer).__name__}, wanted BitLinear or AutoBitLinear of transformers")
    theirs: Any = layer
    if type(layer).__name__ == "BitLinear":
        T = unpack(theirs.weight.T.contiguous(), theirs.out_features).T
        packed = _packed(T, theirs.weight_scale.float().reciprocal(), theirs.bias)
    elif theirs.online_quant:
        packed = PackedLinear(BitLinear(_linear(theirs.weight, theirs.bias), sub_norm=False))
    else:
        packed = _packed(theirs.weight, theirs.weight_scale.float(), theirs.bias)
        if packed.bias is not None:
            packed.bias.data.mul_(packed.beta)
    packed.train(layer.training)
    return packed if theirs.rms_norm is None else nn.Sequential(theirs.rms_norm, packed)


def _linear(W: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(1, 1, device="meta")
    linear.weight = nn.Parameter(W.detach())
    linear.bias = None if bias is None else nn.Parameter(bias.detach())  # type: ignore[assignment]
    return linear


def _packed(T: Tensor, beta: Tensor, bias: Tensor | None) -> PackedLinear:
    """Return a layer of codes T and scale β. A latent weight T has the codes T: its mean magnitude is at most 1."""
    check_loaded("layer.weight_scale", beta)
    if beta.numel() != 1:
        raise ValueError(f"layer.weight_scale: got {beta.numel()} numbers, wanted one for the whole matrix")
    check_number("layer.weight_scale", float(beta), low=0, open_low=True)
    pack(T)  # refuses anything but -1, 0 and 1
    packed = PackedLinear(BitLinear(_linear(T.to(torch.bfloat16), bias), sub_norm=False))
    packed.beta.fill_(float(beta))
    return packed
