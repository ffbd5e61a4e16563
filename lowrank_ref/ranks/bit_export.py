"""Whole numbers in place of factors: the file of a trained Bayesian-LoRA model, and layers made from it.

A file holds the codes of A, B and E in their learned bits, for the learned rank only, and three ranges β a layer. What
is loaded computes with code · step, the same bits as the trained layer in eval mode; in memory it takes float32 again.
"""

import json
import math
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from lowrank_ref.core.checks import check_finite, check_integer
from lowrank_ref.core.io import load_tensors, plain_path, read_safetensors, save_tensors
from lowrank_ref.core.layers import Model, is_linear, replace_modules, weight_of
from lowrank_ref.ranks.bayesian_lora import BayesianLoRALinear
from lowrank_ref.ranks.bit_gates import gated_layers
from lowrank_ref.ranks.residual_bits import step_sizes

__all__ = ["load_bits", "pack_integers", "save_bits", "unpack_integers"]

KIND, NAMES = "adapters in bits", ("A", "B", "E", "limits")
#: A logit that is open, and with the other sign shut, whatever is drawn.
SURE = 20.0


def check_width(bits: int) -> None:
    """Require 2, 4, 8, 16 or 32 bits.

    Raises:
        TypeError, ValueError: anything else.
    """
    check_integer("bits", bits)
    if bits not in (2, 4, 8, 16, 32):
        raise ValueError(f"bits: got {bits}, wanted 2, 4, 8, 16 or 32")


def pack_integers(codes: Int64[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Write codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1 one after the other, lowest bit first, ⌈k·bits/8⌉ bytes.

    Raises:
        TypeError, ValueError: bits not 2, 4, 8, 16 or 32, or a code out of range.

    Example:
        >>> pack_integers(torch.tensor([1, -1, 0, 0]), 2).tolist()  # stored one higher: 2, 0, 1, 1
        [82]
    """
    check_width(bits)
    most = 2 ** (bits - 1) - 1
    if codes.numel() and bool((codes.abs() > most).any()):
        raise ValueError(f"codes: got {int(codes.abs().max())} at most, wanted sizes up to {most} with {bits} bits")
    above = codes.flatten()[:, None] + most
    flat = ((above >> torch.arange(bits, device=codes.device)) & 1).flatten()
    flat = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack_integers(data: UInt8[Tensor, " bytes"], bits: int, shape: tuple[int, ...]) -> Int64[Tensor, "*shape"]:
    """Return the codes that `pack_integers` wrote, in this shape.

    Raises:
        TypeError, ValueError: another number of bytes than they take, bits not 2, 4, 8, 16 or 32, or a code that is
            never written.
    """
    check_width(bits)
    count, most = math.prod(shape), 2 ** (bits - 1) - 1
    wanted = -(-count * bits // 8)
    if data.dtype != torch.uint8 or data.shape != (wanted,):
        got = f"{data.dtype} of shape {tuple(data.shape)}"
        raise ValueError(f"data: got {got}, wanted {wanted} bytes for {count} codes of {bits} bits")
    flat = ((data.long()[:, None] >> torch.arange(8, device=data.device)) & 1).flatten()[: count * bits]
    codes = (flat.view(count, bits) << torch.arange(bits, device=data.device)).sum(1) - most
    if bool((codes > most).any()):
        raise ValueError(f"data: got the code {int(codes.max())}, wanted at most {most} with {bits} bits")
    return codes.view(shape)


@torch.no_grad()
def save_bits(model: nn.Module, path: str | Path) -> None:
    """Write all Bayesian-LoRA layers of a model, by deterministic gates, to a safetensors file.

    Args:
        model: holds at least one such layer. Nothing else of it is written.
        path: file to create or replace; its folder exists.

    Raises:
        ValueError: no such layer, a factor that is not finite, or what `save_tensors` refuses.
        OSError: the folder is missing, full or read-only.

    Example:
        >>> import os
        >>> from tempfile import TemporaryDirectory
        >>> from lowrank_ref.ranks import BayesianLoRALinear, load_bits, save_bits
        >>> model = nn.Sequential(BayesianLoRALinear(nn.Linear(64, 64), rank=8, bits=4))
        >>> with TemporaryDirectory() as folder:
        ...     save_bits(model, f"{folder}/x")
        ...     again = load_bits(nn.Sequential(model[0].base), f"{folder}/x").eval()
        >>> torch.equal(again[0].delta_weight(), model.eval()[0].delta_weight())
        True
    """
    tensors, cards = {}, {}
    for place, layer in gated_layers(model).items():
        home, k, widths = plain_path(model, place), layer.learned_rank, layer.learned_bits
        for name in "ABE":
            check_finite(f"{home}.{name}", getattr(layer, name))
        (A, *_), (B, *_), (E, *_) = layer.codes()
        for name, codes in zip("ABE", (A[:k], B[:, :k], E[:k])):
            tensors[f"{home}.{name}"] = pack_integers(codes.long(), widths[name])
        tensors[f"{home}.limits"] = layer.ranges()
        cards[home] = {"rank": k, "bits": list(widths.values()), "scale": layer.scale}
    save_tensors(tensors, path, kind=KIND, metadata={"layers": json.dumps(cards, sort_keys=True)})


def load_bits(model: Model, path: str | Path) -> Model:
    """Put Bayesian-LoRA layers with the numbers of a file in the place of the linear layers at their paths.

    Their rank is the learned one, their gates are as sure as ±20, and their ranges stay.

    Args:
        model: has plain linear layers there. Changed in place, or not at all.
        path: what `save_bits` wrote.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or of another kind, or its layers do not fit the model.
    """
    tensors = load_tensors(path, kind=KIND)
    cards = json.loads(read_safetensors(Path(path))[1].get("layers", "{}"))
    wanted = {f"{home}.{name}" for home in cards for name in NAMES}
    if not cards or wanted != tensors.keys():
        raise ValueError(f"path: got tensors {sorted(tensors)[:5]}, wanted those of layers at {sorted(cards)[:5]}")
    modules = dict(model.named_modules())
    if strangers := sorted(home for home in cards if home not in modules or not is_linear(modules[home])):
        raise ValueError(f"path: got layers at {strangers}, wanted linear layers of the model there")
    homes = {id(modules[home]): home for home in cards}

    @torch.no_grad()
    def filled(base: nn.Module) -> nn.Module:
        home, (m, n) = homes[id(base)], weight_of(base).shape
        k, widths, limits = cards[home]["rank"], cards[home]["bits"], tensors[f"{home}.limits"]
        layer = BayesianLoRALinear(base, k, bits=max(4, *widths), gate=SURE, generator=torch.Generator())
        layer.scale = cards[home]["scale"]
        layer.limits = limits.to(layer.A)
        parts = zip(("A", "B", "E"), widths, ((k, n), (m, k), (k,)), limits, layer.bit_logits)
        for name, bits, shape, limit, logits in parts:
            opened = bits.bit_length() - 2
            step = step_sizes(limit, len(logits))[opened]
            values = unpack_integers(tensors[f"{home}.{name}"], bits, shape).to(limit.dtype) * step
            setattr(layer, name, nn.Parameter(values.to(layer.A)))
            logits[opened:] = -SURE
        return layer

    return replace_modules(model, "", filled, accepts=lambda module: id(module) in homes)
