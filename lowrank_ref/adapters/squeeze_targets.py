"""LoRA-Squeeze on a model: which layers can be squeezed, to which ranks, and how their factors are read and written."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core import huggingface
from lowrank_ref.core.actions import innermost
from lowrank_ref.core.checks import check_integer
from lowrank_ref.core.layers import AdaptedLinear, adapters
from lowrank_ref.core.matching import capped
from lowrank_ref.core.peft import pattern_rank, rank_patterns

#: One rank for all layers, or a `rank_pattern` of PEFT, from a regular expression for the end of a path to a rank.
Ranks = int | Mapping[str, int]


def squeezable(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return path -> layer of all adapters, whose updates must be products of two factors, as LoRA's are.

    Raises:
        ValueError: no adapter, or one that is no such product (DoRA, RandLoRA, embeddings, convolutions).
    """
    found = dict(adapters(model))
    plain = {path: a for path, a in found.items() if isinstance(a, AdaptedLinear) and hasattr(a, "lora_factors")}
    plain = {path: layer for path, layer in plain.items() if not hasattr(layer, "magnitude")}  # which DoRA rescales to
    if not plain or len(plain) < len(found):
        got = capped(f"{type(a).__name__} at {path!r}" for path, a in found.items() if path not in plain)
        raise ValueError(f"model: got {got or type(model).__name__}, wanted LoRA layers and no other adapters")
    return plain


def target_ranks(model: nn.Module, rank: Ranks) -> dict[str, int]:
    """Return path -> rank to squeeze to, never more than the layer has; layers that no pattern names are left out.

    Raises:
        TypeError: a rank is no integer.
        ValueError: a rank below 1, a pattern that names no layer, or what `squeezable` refuses.
    """
    layers = squeezable(model)
    if not isinstance(rank, Mapping):
        check_integer("rank", rank, low=1)
        wanted = dict.fromkeys(layers, rank)
    else:
        for key, k in rank.items():
            check_integer(f"rank[{key!r}]", k, low=1)
        idle = [key for key in rank if not any(pattern_rank({key: 1}, path) for path in layers)]
        if idle or not rank:
            got = f"{capped(idle)}, which names no layer" if idle else "no pattern"
            raise ValueError(f"rank: got {got}, wanted expressions for the ends of some of {capped(layers)}")
        named = {path: pattern_rank(rank, path) for path in layers}
        wanted = {path: k for path, k in named.items() if k is not None}
    return {path: min(k, lora_parts(layers[path])[0].shape[0]) for path, k in wanted.items()}


def peft_ranks(model: nn.Module) -> dict[str, Any]:
    """Return "r", "lora_alpha", "rank_pattern", "alpha_pattern" of a model, for `peft.LoraConfig(**...)`.

    Raises:
        ValueError: what `squeezable` refuses.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, replace_linears
        >>> from lowrank_ref.adapters import peft_ranks, squeeze
        >>> net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4))
        >>> model = replace_linears(net, "", partial(LoRALinear, rank=4, alpha=8))
        >>> peft_ranks(squeeze(model, {"2": 1}))
        {'r': 4, 'lora_alpha': 8, 'rank_pattern': {'^2': 1}, 'alpha_pattern': {'^2': 2}}
    """
    parts = {path: lora_parts(layer) for path, layer in squeezable(model).items()}
    return rank_patterns({path: (len(A), scale) for path, (A, _, scale) in parts.items()})


def trained_layers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, LoRALinear]:
    """Return path -> layer of all LoRA layers, whose factors the optimizer must train.

    Raises:
        TypeError: no optimizer of PyTorch.
        ValueError: another kind of adapter, a factor that is sharded, has hooks, or is not trained by the optimizer.
    """
    huggingface.refuse_wrapped(model)
    layers = squeezable(model)
    held = {id(p) for group in innermost(optimizer).param_groups for p in group["params"]}
    for path, layer in layers.items():
        if type(layer) is not LoRALinear:
            raise ValueError(f"model: got {type(layer).__name__} at {path!r}, wanted LoRALinear only")
        if any(id(p) not in held for p in layer.adapter_parameters().values()):
            raise ValueError(f"optimizer: got no factors of {path!r}, wanted all of the model")
        for p in layer.adapter_parameters().values():
            if hasattr(p, "placements") or getattr(p, "_post_accumulate_grad_hooks", None) or p._backward_hooks:
                raise ValueError(f"model: got sharded factors or hooks on them at {path!r}, wanted plain parameters")
    return layers  # type: ignore[return-value]


def lora_parts(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Return A, B and s of a layer, without their graph."""
    A, B, scale = layer.lora_factors()  # type: ignore[operator]
    return A.detach(), B.detach(), scale


def lora_of(layer: AdaptedLinear, A: Tensor, B: Tensor, scale: float) -> LoRALinear:
    """Return a `LoRALinear` with these factors on the layer's base, with its dropout and mode."""
    dropout = getattr(getattr(layer, "dropout", None), "p", 0.0)
    new = LoRALinear(layer.base, len(A), dropout=dropout, generator=torch.Generator())  # its start is thrown away
    set_factors(new, A, B, scale)
    return new.train(layer.training)


def set_factors(layer: LoRALinear, A: Tensor, B: Tensor, scale: float) -> None:
    """Give a layer new parameters, of any rank: a graph that is still alive keeps the shapes of the old ones."""
    old, parts = (layer.A, layer.B), (A.detach(), B.detach())
    new = [t.clone(memory_format=torch.contiguous_format) for t in parts]
    layer.A, layer.B = (nn.Parameter(t, requires_grad=p.requires_grad) for t, p in zip(new, old))
    layer.rank, layer.scale = len(A), float(scale)


def take_rank(layer: LoRALinear, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Give the parameters of a layer the shape of the factors that it is about to load: a hook of `load_state_dict`."""
    A, B = state.get(f"{prefix}A"), state.get(f"{prefix}B")
    if not isinstance(A, Tensor) or not isinstance(B, Tensor) or A.ndim != 2:
        return
    (m, n), k = (layer.out_features, layer.in_features), len(A)
    if k != len(layer.A) and A.shape == (k, n) and B.shape == (m, k) and 1 <= k <= min(m, n):
        for p, shape in ((layer.A, (k, n)), (layer.B, (m, k))):
            p.grad, p.data = None, p.data.new_zeros(shape)
        layer.rank = k
