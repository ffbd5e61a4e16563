"""Files: tensors with strict loading, and the trained part of a model. PEFT's folders are in `lowrank_ref.core.peft`.

Loading never guesses. A missing, extra, mis-shaped or non-finite tensor raises, and the message lists all of them; the
model is written only after everything has been checked. Files appear whole or not at all: they are written beside
their place and then moved onto it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lowrank_ref.core.checks import check_finite
from lowrank_ref.core.layers import adapters

FORMAT = "lowrank_ref"


def write_file(path: Path, data: bytes) -> None:
    """Write a file in one step: a crash leaves the old file or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def cpu_copy(tensor: Tensor) -> Tensor:
    """Copy to contiguous CPU memory that no other tensor shares, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a safetensors file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: got {path}, no whole safetensors file ({error}), wanted one") from error


def refuse(where: str | Path, problems: Iterable[str]) -> None:
    """Raise a ValueError that lists the problems found at a place, if there are any."""
    lines = list(problems)
    if lines:
        raise ValueError("\n  ".join([f"{where}: got {len(lines)} mismatch(es), wanted none", *lines]))


def mismatches(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield a line for each tensor of a file that is not what the model wants."""
    for name in sorted(wanted.keys() - got.keys()):
        yield f"missing: {name} {tuple(wanted[name].shape)}"
    for name in sorted(got.keys() - wanted.keys()):
        yield f"extra: {name} {tuple(got[name].shape)}"
    for name in sorted(got.keys() & wanted.keys()):
        if got[name].shape != wanted[name].shape:
            yield f"shape: {name} is {tuple(got[name].shape)} in the file, {tuple(wanted[name].shape)} in the model"
        elif got[name].is_floating_point() != wanted[name].is_floating_point():
            yield f"dtype: {name} is {got[name].dtype} in the file, {wanted[name].dtype} in the model"
        elif not bool(torch.isfinite(got[name]).all()):
            yield f"not finite: {name}"


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, *, kind: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors to a safetensors file.

    Args:
        tensors: name -> tensor, of any shape and dtype; views and shared memory are written as copies.
        path: file to create or replace; its folder exists.
        kind: what the file holds, such as "adapters"; `load_tensors` asks for the same.
        metadata: further strings to keep in the file's header.
    """
    header = {**(metadata or {}), "format": FORMAT, "kind": kind}
    write_file(Path(path), safetensors.torch.save({n: cpu_copy(t) for n, t in tensors.items()}, header))


def load_tensors(path: str | Path, *, kind: str) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Raises:
        ValueError: the file is truncated, no safetensors file, or of another format or kind.
    """
    return _load(Path(path), kind)[0]


def _load(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = read_safetensors(path)
    got = metadata.get("format"), metadata.get("kind")
    if got != (FORMAT, kind):
        raise ValueError(f"path: got {path} of format and kind {got}, wanted {(FORMAT, kind)}")
    return tensors, metadata


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything an adapter owns (not its base) and every other trained parameter. A shared tensor comes once."""
    homes = [f"{path}." if path else "" for path, _ in adapters(model)]
    if not homes:
        raise ValueError("model: got no adapter layer, wanted at least one")
    state: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = any(name.startswith(home) and not name.startswith(f"{home}base.") for home in homes)
        if own or tensor.requires_grad:
            state.setdefault(id(tensor), (name, tensor))
    return dict(state.values())


def _layer_cards(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path -> class of each adapter and its plain numbers and words (rank, scale), which say what its tensors mean."""
    return {
        path: {"class": type(layer).__name__}
        | {k: v for k, v in vars(layer).items() if type(v) in (int, float, str) and not k.startswith("_")}
        for path, layer in adapters(model)
    }


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the trained part of a model: adapters with their buffers, and all other trained parameters.

    Args:
        model: holds at least one adapter. The frozen base is not written.
        path: file to create or replace.

    Raises:
        ValueError: no adapter, or a tensor with NaN or infinity.
    """
    state = _trained_state(model)
    for name, tensor in state.items():
        check_finite(name, tensor)
    save_tensors(state, path, kind="adapters", metadata={"layers": json.dumps(_layer_cards(model), sort_keys=True)})


@torch.no_grad()
def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Load what `save_adapters` wrote into a model that was adapted in the same way.

    Args:
        model: same adapters at the same paths, same trained parameters. Changed in place, or not at all.
        path: the file.

    Raises:
        ValueError: a name, shape, class or number (rank, scale) differs, or a value is not finite; all are listed.
    """
    path = Path(path)
    tensors, metadata = _load(path, "adapters")
    state = _trained_state(model)
    got, wanted = json.loads(metadata.get("layers", "{}")), _layer_cards(model)
    layers = (
        f"layer {name or 'model'}: {got.get(name)} in the file, {wanted.get(name)} in the model"
        for name in sorted(got.keys() | wanted.keys())
        if got.get(name) != wanted.get(name)
    )
    refuse(path, [*layers, *mismatches(tensors, state)])
    model.load_state_dict(tensors, strict=False)  # not a plain copy: a layer may have to act on what it loads
