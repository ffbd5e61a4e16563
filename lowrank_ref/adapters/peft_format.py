"""Exchange LoRA layers with huggingface/peft: save them as a PEFT folder, or load one into a plain model.

`lowrank_ref.core.peft` reads and writes the folder; this file says which layer becomes which entry. PEFT need not be
installed.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_ref.adapters.dora_pissa import DoRALinear
from lowrank_ref.adapters.embedding_conv import LoRAConv2d, LoRAEmbedding
from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.io import holds, load_all, load_plain, mismatches, plain_path, plain_state, refuse
from lowrank_ref.core.layers import Adapter, Model, adapters, is_conv1d, is_linear, log, replace_modules, weight_of
from lowrank_ref.core.peft import PEFT_HEADS, PeftLayer, read_peft, task_name, write_peft

#: Modules without a forward, which PEFT cannot train in full.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def save_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    plain_lora: bool = False,
) -> None:
    """Write the trained part of a model so that `peft.PeftModel.from_pretrained(base, folder)` computes the same.

    Layers with `lora_factors()` become LoRA (PiSSA one of rank 2r on the original base), `DoRALinear` becomes DoRA, and
    every module with another trained parameter is saved in full. (So is a module whose path ends with that of such a
    module: PEFT cannot tell them apart.) PEFT knows one dropout for all layers: the most common is written.

    Args:
        model: holds at least one adapter. It may be compiled or wrapped by DDP.
        folder: created if needed.
        base_model: name or path of the base model, for PEFT's `AutoPeftModel...`; None asks the model's config.
        task_type: "CAUSAL_LM", "SEQ_CLS" and so on, or None. Heads that PEFT trains for the task are saved too.
        plain_lora: refuse content that many serving engines cannot load, see `write_peft`.

    Raises:
        ValueError: another kind of adapter, one of rank 0, an adapter whose base trains too or is a convolution that
            PEFT would adapt in another way, an adapted or trained module that stands at two places (PEFT would take
            them apart), a trained module without a forward (`nn.ModuleList`), or what `write_peft` refuses.

    Example:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, load_peft, save_peft, replace_linears
        >>> make = lambda: replace_linears(nn.Sequential(nn.Linear(6, 2)), "0", partial(LoRALinear, rank=2))
        >>> with TemporaryDirectory() as folder:
        ...     save_peft(make(), folder)
        ...     model = load_peft(nn.Sequential(nn.Linear(6, 2)), folder)
        >>> model[0].rank
        2
    """
    task_type, named = task_name(task_type), _named(model)
    layers = {path: _entry(path, layer) for path, layer in named.items() if isinstance(layer, Adapter)}
    trained = {plain_path(model, name) for name, p in model.named_parameters() if p.requires_grad}
    owners = {name.rpartition(".")[0] for name in trained} - layers.keys()
    if inside := sorted(name for name in owners if _inside(name, layers)):
        raise ValueError(f"model: got trained parameters in {inside}, wanted every adapter's base frozen")
    paths = [path for path in named if not _inside(path, layers)]
    endings = (*owners, *PEFT_HEADS.get(task_type or "", ()))
    full = {path for path in paths if path.endswith(endings)}  # as PEFT will
    if lists := sorted(path for path in full if isinstance(named[path], _CONTAINERS)):
        raise ValueError(f"model: got trained parameters in {lists}, lists without a forward, wanted them in a module")
    extra = {path: plain_state(named[path]) for path in full if not _inside(path, full)}
    _refuse_shared(model, {f"{path}.{name}" for path, state in extra.items() for name in state})
    ambiguous = any(path.endswith(tuple(f".{target}" for target in layers)) for path in paths if path not in layers)
    root = named[""]
    source = type(root).__module__, getattr(getattr(root, "config", None), "_name_or_path", None)
    mapping = {"base_model_class": type(root).__name__, "parent_library": source[0]}
    write_peft(
        folder,
        layers,
        extra=extra,
        base_model=str(source[1] or "") if base_model is None else base_model,
        auto_mapping=mapping if task_type is None and source[0].startswith("transformers.") else None,
        task_type=task_type,
        plain_lora=plain_lora,
        exact_targets=ambiguous,
    )


@torch.no_grad()
def load_peft(model: Model, folder: str | Path) -> Model:
    """Wrap the layers that a PEFT folder names, and load its factors and fully trained modules; those then train.

    Where the folder names another base than the model's config, the logger "lowrank_ref" warns.

    Args:
        model: the plain base model, also compiled. Changed in place, or not at all.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The same model, with `LoRALinear`, `DoRALinear`, `LoRAEmbedding` and `LoRAConv2d` layers and the folder's
        dropout (not on embeddings, where PEFT has none either).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: what `read_peft` refuses, a model in DDP (which would not see the new parameters), or a module or
            tensor that the model lacks, that the file lacks, that has another shape, that the model's dtype cannot hold
            or that PEFT computes in another way; all are listed.

    Example:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, load_peft, replace_linears, save_peft
        >>> with TemporaryDirectory() as folder:
        ...     save_peft(replace_linears(nn.Sequential(nn.Linear(6, 2)), "0", partial(LoRALinear, rank=2)), folder)
        ...     print(load_peft(nn.Sequential(nn.Linear(6, 2)), folder)[0].extra_repr())
        6 -> 2, rank 2
    """
    if any(isinstance(m, nn.DataParallel | nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError("model: got one wrapped for parallel training, wanted it plain: load first, then wrap")
    modules, state = _named(model), plain_state(model)
    root = modules[""]
    checkpoint = read_peft(folder, embeddings=_embeddings(modules))
    problems = [f"adapter: {path} is one already, wanted a plain model" for path, _ in adapters(root)]
    for path, entry in checkpoint.layers.items():
        got, wanted = _delta_shape(entry), _base_shape(modules.get(path))
        if got != wanted:
            problems.append(f"{path}: the file adapts {got}, the model has {wanted or 'no such layer'}")
        else:
            problems += [f"{path}: {why}" for why in _obstacles(modules[path], entry)]
    if not checkpoint.config.get("layers_to_transform") and checkpoint.config.get("target_modules") != "all-linear":
        unnamed = [path for path in modules if path not in checkpoint.layers and _base_shape(modules[path])]
        problems += [f"missing: no factors where {p} is a target without them" for p in unnamed if checkpoint.adapts(p)]
    saved = {name: t for name, t in state.items() if checkpoint.saves(name.rpartition(".")[0])}
    frozen = {name: t for name, t in state.items() if name in checkpoint.base}
    new, old = checkpoint.extra | checkpoint.base, saved | frozen
    refuse(folder, [*problems, *mismatches(new, old)])
    _refuse_shared(root, {*checkpoint.layers, *saved})
    load = partial(load_plain, root, strict=False)
    before = {name: t.clone() for name, t in old.items()}
    load_all(folder, [(load, new, before)])
    entries = {id(modules[path]): entry for path, entry in checkpoint.layers.items()}
    trained = [re.escape(name) for name, _ in root.named_parameters() if plain_path(root, name) in saved]
    try:
        replace_modules(
            root,
            "",
            lambda module: _wrap(module, entries[id(module)]),
            accepts=lambda module: id(module) in entries,
            trainable=f"^({'|'.join(trained)})$" if trained else None,
        )
    except Exception:
        load(before)
        raise
    there, here = (
        checkpoint.config.get("base_model_name_or_path"),
        getattr(getattr(root, "config", 0), "_name_or_path", 0),
    )
    if there and here and Path(str(there)).name != Path(str(here)).name:
        log.warning(
            "load_peft: the folder is made for the base %r, the model is %r; see that they are the same", there, here
        )
    return model


def _embeddings(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the embedding and the head that a transformers model names."""
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            found.append(getattr(modules[""], method)())
    return [path for path, module in modules.items() if any(module is one for one in found)]


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Plain path -> module; of a module and its wrappers, the module."""
    return {plain_path(model, path): module for path, module in model.named_modules()}


def _entry(path: str, layer: Adapter) -> PeftLayer:
    name, factors = type(layer).__name__, getattr(layer, "lora_factors", None)
    if factors is None:
        why = getattr(layer, "no_lora", "")
        raise ValueError(f"model: got {name} at {path!r}, wanted adapters with lora_factors(){why and '; ' + why}")
    kind = "conv1d" if is_conv1d(layer.base) else _base_shape(layer.base)[0]
    A, B, scale = factors()
    if not len(A):
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise ValueError(f"model: got shapes {shapes} from the {name} at {path!r}, rank 0, wanted prune(model) before")
    dropout = getattr(layer, "dropout", None)
    magnitude = layer.magnitude if isinstance(layer, DoRALinear) else None
    entry = PeftLayer(kind, A, B, scale, magnitude, dropout.p if isinstance(dropout, nn.Dropout) else 0.0)
    refuse(f"model: {path}", _obstacles(layer.base, entry))
    return entry


def _obstacles(base: Any, entry: PeftLayer) -> Iterable[str]:
    """Say what keeps the entry from meaning the same here and in PEFT, whose convolution A knows only size and step."""
    if isinstance(base, nn.Conv2d):
        own = type(base), base.padding_mode, base.dilation, base.groups
        if own != (nn.Conv2d, "zeros", (1, 1), 1):
            yield f"PEFT leaves out what is special in {base!r}, wanted nn.Conv2d with zero padding and no dilation"
    if base.weight.is_meta:
        yield "the layer is on the meta device, load its weights first"
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    if not all(holds(wide, t) for t in (entry.A, entry.B, entry.magnitude) if t is not None):
        yield f"factors of {entry.A.dtype} would change in {wide}"


def _wrap(module: Any, entry: PeftLayer) -> Adapter:
    """Build the adapter that computes with the entry's factors."""
    linear = LoRALinear if entry.magnitude is None else DoRALinear
    kinds: dict[str, Any] = {"embedding": LoRAEmbedding, "conv2d": LoRAConv2d}
    options = {} if entry.kind == "embedding" else {"dropout": entry.dropout}
    layer = kinds.get(entry.kind, linear)(module, 1, generator=torch.Generator(), **options)  # its start is thrown away
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
    raw = [*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    named = [(plain_path(model, name), thing) for name, thing in raw]
    count = Counter(id(thing) for _, thing in named)
    shared = [name for name, thing in named if count[id(thing)] > 1 and (name in names or isinstance(thing, Adapter))]
    if shared:
        raise ValueError(f"model: got {shared}, which stand at two places, wanted trained modules at one place only")
