"""SaRA's files: the trained numbers, and the mask in one of three ways.

`core.io.save_adapters` writes 9 bytes a trained number (a float32, its place, whether it is active). Here it is 4 and

    masks       bytes           what loading needs
    "derived"   32 a file       the same base: the mask is found again, and its SHA-256 compared
    "bits"      mn/8 a layer    a base of the same shapes, which may be cast
    "places"    4 a number      the same
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_ref.adapters.sara import SaRALinear, sara_layers
from lowrank_ref.core.io import load_tensors, mismatches, plain_path, refuse, save_tensors

#: How a file tells which weights it holds.
MASKS = ("derived", "bits", "places")


def _layers(model: nn.Module) -> dict[str, SaRALinear]:
    """Return plain path -> layer."""
    return {plain_path(model, path): layer for path, layer in sorted(sara_layers(model).items())}


def packed_mask(support: Tensor, size: int) -> Tensor:
    """Return a mask of `size` entries, true at these places, as ⌈size/8⌉ bytes; entry i is bit i mod 8 of byte i/8.

    Example:
        >>> packed_mask(torch.tensor([0, 3, 8]), 10).tolist()
        [9, 1]
    """
    bits = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8)
    bits[support.long().cpu()] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked_mask(packed: Tensor) -> Tensor:
    """Return the places of a packed mask, in rising order."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().nonzero()[:, 0]


def _digest(layers: dict[str, SaRALinear]) -> Tensor:
    """Return the SHA-256 of paths, shapes and masks."""
    total = hashlib.sha256()
    for path, layer in layers.items():
        total.update(json.dumps([path, layer.out_features, layer.in_features, len(layer.support)]).encode())
        total.update(packed_mask(layer.support, layer.out_features * layer.in_features).numpy().tobytes())
    return torch.tensor(list(total.digest()), dtype=torch.uint8)


def _tensors(layers: dict[str, SaRALinear], masks: str) -> dict[str, Tensor]:
    found = {f"{path}.values": layer.values.detach().cpu() for path, layer in layers.items()}
    if masks == "derived":
        return found | {"digest": _digest(layers)}
    for path, layer in layers.items():
        places = layer.support.cpu()
        size = layer.out_features * layer.in_features
        found[f"{path}.{masks}"] = packed_mask(places, size) if masks == "bits" else places
    return found


def save_sara(model: nn.Module, path: str | Path, masks: str = "derived") -> None:
    """Write the trained weights of all SaRA layers, and where they stand; what else trains is not written.

    Args:
        model: holds at least one SaRA layer.
        path: file to create or replace.
        masks: one of `MASKS`.

    Raises:
        ValueError: no SaRA layer, other masks, or a number that is not finite.

    Example:
        >>> import copy
        >>> from tempfile import TemporaryDirectory
        >>> from lowrank_ref.adapters import SaRALinear, load_sara, save_sara
        >>> base = nn.Linear(6, 4)
        >>> trained, fresh = SaRALinear(copy.deepcopy(base)), SaRALinear(base)
        >>> _ = trained.values.data.add_(1.0)
        >>> with TemporaryDirectory() as folder:
        ...     save_sara(trained, f"{folder}/x")
        ...     load_sara(fresh, f"{folder}/x")
        >>> torch.equal(fresh.values, trained.values)
        True
    """
    if masks not in MASKS:
        raise ValueError(f"masks: got {masks!r}, wanted one of {MASKS}")
    tensors = _tensors(_layers(model), masks)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: got NaN or infinite entries, wanted finite numbers")
    save_tensors(tensors, path, kind=f"sara, masks {masks}")


@torch.no_grad()
def load_sara(model: nn.Module, path: str | Path) -> None:
    """Load what `save_sara` wrote into a model with SaRA layers of the same sizes at the same paths: all or nothing.

    All entries are active again.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or foreign file, other layers or counts, or a derived mask of another base.
    """
    layers, errors = _layers(model), []
    for masks in MASKS:
        try:
            file = load_tensors(path, kind=f"sara, masks {masks}")
            break
        except ValueError as error:
            errors.append(error)
    else:
        raise errors[0]
    wanted = _tensors(layers, masks)
    refuse(path, mismatches(file, wanted))
    supports = {}
    if masks == "derived" and not torch.equal(file["digest"], wanted["digest"]):
        raise ValueError(f"path: got {path} for another mask, wanted that of this model; is it the same base?")
    for name, layer in layers.items() if masks != "derived" else ():
        places = unpacked_mask(file[f"{name}.bits"]) if masks == "bits" else file[f"{name}.places"]
        size, rises = layer.out_features * layer.in_features, bool((places.diff() > 0).all())
        if len(places) != len(layer.support) or not rises or (len(places) and not 0 <= places[0] <= places[-1] < size):
            raise ValueError(f"{name}.{masks}: got {len(places)} places, wanted {len(layer.support)} below {size}")
        supports[name] = places
    for name, layer in layers.items():
        layer.values.copy_(file[f"{name}.values"])
        layer.active.fill_(True)
        if name in supports:
            layer.support.copy_(supports[name])
