"""Exchange LoRA layers with huggingface/peft: save them as a PEFT folder, or load one into a plain model.

`lowrank_ref.core.peft` reads and writes the folder; this file says which layer becomes which entry. PEFT need not be
installed.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_ref.adapters.dora_pissa import DoRALinear
from lowrank_ref.adapters.embedding_conv import LoRAConv2d, LoRAEmbedding
from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.io import mismatches, refuse
from lowrank_ref.core.layers import Adapter, Model, adapters, is_conv1d, is_linear, replace_modules, weight_of
from lowrank_ref.core.peft import PEFT_HEADS, PeftLayer, read_peft, write_peft


def save_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str = "",
    task_type: str | None = None,
    plain_lora: bool = False,
) -> None:
    """Write the trained part of a model so that `peft.PeftModel.from_pretrained(base, folder)` computes the same.

    Layers with `lora_factors()` become LoRA (PiSSA one of rank 2r on the original base), `DoRALinear` becomes DoRA, and
    every module with another trained parameter is saved in full. (So is a module whose path ends with that of such a
    module: PEFT cannot tell them apart.)

    Args:
        model: holds at least one adapter.
        folder: created if needed.
        base_model: name or path of the base model, for the reader's information.
        task_type: "CAUSAL_LM", "SEQ_CLS" and so on, or None. Heads that PEFT trains for the task are saved too.
        plain_lora: refuse content that many serving engines cannot load, see `write_peft`.

    Raises:
        ValueError: another kind of adapter, an adapter whose base trains too, an adapted or trained module that stands
            at two places (PEFT would take them apart), or what `write_peft` refuses.
    """
    layers = {path: _entry(path, layer) for path, layer in adapters(model)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    owners = {name.rpartition(".")[0] for name in trained} - layers.keys()
    if inside := sorted(name for name in owners if _inside(name, layers)):
        raise ValueError(f"model: got trained parameters in {inside}, wanted every adapter's base frozen")
    paths = [path for path, _ in model.named_modules() if not _inside(path, layers)]
    endings = (*owners, *PEFT_HEADS.get(task_type or "", ()))
    full = {path for path in paths if path.endswith(endings)}  # as PEFT will
    extra = {path: model.get_submodule(path).state_dict() for path in full if not _inside(path, full)}
    _refuse_shared(model, {f"{path}.{name}" for path, state in extra.items() for name in state})
    ambiguous = any(path.endswith(tuple(f".{target}" for target in layers)) for path in paths if path not in layers)
    write_peft(
        folder,
        layers,
        extra=extra,
        base_model=base_model,
        task_type=task_type,
        plain_lora=plain_lora,
        exact_targets=ambiguous,
    )


@torch.no_grad()
def load_peft(model: Model, folder: str | Path) -> Model:
    """Wrap the layers that a PEFT folder names, and load its factors and fully trained modules; those then train.

    Args:
        model: the plain base model. Changed in place, or not at all.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The same model, with `LoRALinear`, `DoRALinear`, `LoRAEmbedding` and `LoRAConv2d` layers.

    Raises:
        ValueError: what `read_peft` refuses, or a module or tensor that the model lacks, that the file lacks, or that
            has another shape; all are listed.
    """
    checkpoint = read_peft(folder)
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    problems = [f"adapter: {path} is one already, wanted a plain model" for path, _ in adapters(model)]
    for path, entry in checkpoint.layers.items():
        got, wanted = _delta_shape(entry), _base_shape(modules.get(path))
        if got != wanted:
            problems.append(f"{path}: the file adapts {got}, the model has {wanted or 'no such layer'}")
    if not checkpoint.config.get("layers_to_transform"):
        unnamed = [path for path in modules if checkpoint.adapts(path) and path not in checkpoint.layers]
        problems += [f"missing: {path} is a target without factors" for path in unnamed if _base_shape(modules[path])]
    saved = {name: t for name, t in state.items() if checkpoint.saves(name.rpartition(".")[0])}
    refuse(folder, [*problems, *mismatches(checkpoint.extra, saved)])
    _refuse_shared(model, {*checkpoint.layers, *saved})
    entries = {id(modules[path]): entry for path, entry in checkpoint.layers.items()}
    trained = [re.escape(name) for name, _ in model.named_parameters() if name in saved]
    replace_modules(
        model,
        "",
        lambda module: _wrap(module, entries[id(module)]),
        accepts=lambda module: id(module) in entries,
        trainable=f"^({'|'.join(trained)})$" if trained else None,
    )
    for name, tensor in saved.items():
        tensor.copy_(checkpoint.extra[name])
    return model


def _entry(path: str, layer: Adapter) -> PeftLayer:
    factors = getattr(layer, "lora_factors", None)
    if factors is None:
        raise ValueError(f"model: got {type(layer).__name__} at {path!r}, wanted adapters with lora_factors()")
    kind = "conv1d" if is_conv1d(layer.base) else _base_shape(layer.base)[0]
    A, B, scale = factors()
    return PeftLayer(kind, A, B, scale, layer.magnitude if isinstance(layer, DoRALinear) else None)


def _wrap(module: Any, entry: PeftLayer) -> Adapter:
    """Build the adapter that computes with the entry's factors."""
    linear = LoRALinear if entry.magnitude is None else DoRALinear
    kinds: dict[str, Any] = {"embedding": LoRAEmbedding, "conv2d": LoRAConv2d}
    layer = kinds.get(entry.kind, linear)(module, 1, generator=torch.Generator())  # its start is thrown away
    layer.rank, layer.scale = entry.rank, entry.scale
    for name, value in {"A": entry.A, "B": entry.B, "magnitude": entry.magnitude}.items():
        if value is not None:
            setattr(layer, name, nn.Parameter(value.to(layer.A)))
    return layer


def _base_shape(module: nn.Module | None) -> tuple[Any, ...]:
    """Kind of a layer and shape of its weight; () for what cannot be adapted."""
    if module is not None and is_linear(module):
        return "linear", *weight_of(module).shape
    kind = "embedding" if isinstance(module, nn.Embedding) else "conv2d" if isinstance(module, nn.Conv2d) else ""
    return (kind, *cast(Tensor, module.weight).shape) if module is not None and kind else ()


def _delta_shape(entry: PeftLayer) -> tuple[Any, ...]:
    """Kind and shape of the weight that an entry updates."""
    if entry.kind == "embedding":
        return "embedding", entry.A.shape[1], entry.B.shape[0]
    return "linear" if entry.kind == "conv1d" else entry.kind, entry.B.shape[0], *entry.A.shape[1:]


def _inside(path: str, places: Iterable[str]) -> bool:
    return any(path.startswith(f"{place}.") for place in places)


def _refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """PEFT replaces or copies a module at one path only, so a module or parameter with two would come apart."""
    named = [*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    count = Counter(id(thing) for _, thing in named)
    shared = [name for name, thing in named if count[id(thing)] > 1 and (name in names or isinstance(thing, Adapter))]
    if shared:
        raise ValueError(f"model: got {shared}, which stand at two places, wanted trained modules at one place only")
