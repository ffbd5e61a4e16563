"""The smallest file of a model with NOLA: a seed a layer, coefficients in a few bits, and nothing else.

`core.io.save_adapters` writes the same in full precision, and other trained parameters with it.
"""

import hashlib
import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lowrank_ref.adapters.nola import NOLALinear
from lowrank_ref.adapters.nola_bases import check_recipe
from lowrank_ref.adapters.nola_bits import pack_codes, quantize, unpack_codes
from lowrank_ref.core.io import layer_cards, load_tensors, mismatches, plain_path, refuse, save_tensors
from lowrank_ref.core.layers import adapters


def _layers(model: nn.Module) -> list[NOLALinear]:
    """Return all adapters in the order of their paths."""
    found = {plain_path(model, path): layer for path, layer in adapters(model)}
    others = [path for path, layer in found.items() if not isinstance(layer, NOLALinear)]
    if others or not found:
        raise ValueError(f"model: got {others or 'no adapters'}, wanted NOLALinear adapters")
    return [cast(NOLALinear, found[path]) for path in sorted(found)]


def _tensors(model: nn.Module, layers: list[NOLALinear], coefficients: list[Tensor], bits: int) -> dict[str, Tensor]:
    """Return what a file of the model holds. Its card is the SHA-256 of paths, shapes and settings of all layers."""
    coded = [quantize(c, bits) for c in coefficients]
    cards = {path: {k: v for k, v in card.items() if k != "bits"} for path, card in layer_cards(model).items()}
    text = json.dumps([cards, [len(c) for c in coefficients]], sort_keys=True)
    return {
        "bits": torch.tensor(bits),
        "card": torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8),
        "codes": pack_codes(torch.cat([codes for codes, _ in coded]), bits),
        "recipes": torch.stack([layer.recipe.cpu() for layer in layers]),
        "steps": torch.stack([step for _, step in coded]),
    }


def save_nola(model: nn.Module, path: str | Path, bits: int = 4) -> None:
    """Write the smallest file that rebuilds the updates: codes of all coefficients, two steps and a recipe a layer.

    Args:
        model: its adapters are `NOLALinear`; what else trains is not written.
        path: file to create or replace.
        bits: of each coefficient, 2 to 8.

    Raises:
        TypeError, ValueError: bits out of range, another adapter or none, a coefficient that is not finite.
    """
    layers = _layers(model)
    coefficients = [c.detach().cpu() for layer in layers for c in (layer.alpha, layer.beta)]
    save_tensors(_tensors(model, layers, coefficients, bits), path, kind="nola")


@torch.no_grad()
def load_nola(model: nn.Module, path: str | Path) -> None:
    """Load what `save_nola` wrote into a model with the same layers: all of them, or none if something is wrong.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or foreign file, other layers or settings (rank, scale, start, k, l), or bases that the
            seeds do not draw here.
    """
    layers, file = _layers(model), load_tensors(path, kind="nola")
    bits = int(file["bits"]) if file.get("bits") is not None and file["bits"].ndim == 0 else 0
    if not 2 <= bits <= 8:
        raise ValueError(f"path: got {path} of {bits} bits, wanted a file of save_nola()")
    coefficients = [c for layer in layers for c in (layer.alpha, layer.beta)]
    wanted = _tensors(model, layers, [torch.zeros_like(c, device="cpu") for c in coefficients], bits)
    if not torch.equal(file.get("card", torch.empty(0)), wanted["card"]):
        raise ValueError(f"path: got {path}, of layers with other paths, shapes or settings, wanted those of the model")
    refuse(path, mismatches(file, wanted))
    for recipe in file["recipes"]:
        check_recipe(recipe, f"{path}: ")
    sizes = [len(c) for c in coefficients]
    codes = unpack_codes(file["codes"], bits, sum(sizes)).split(sizes)
    for c, code, step in zip(coefficients, codes, file["steps"], strict=True):
        c.copy_(code * step)
    for layer, recipe in zip(layers, file["recipes"], strict=True):
        layer.recipe.copy_(recipe)
