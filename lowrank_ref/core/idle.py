"""Notice an optimizer that was built before the surgery: it holds the old weights and none of what trains now."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from lowrank_ref.core.matching import capped

_layer_of = WeakIdKeyDictionary()  # old weight -> weak reference to the layer that trains in its place
_seen: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()


def watch(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Let every optimizer's first step look for these old layers' weights. `pairs` are (old layer, new layer)."""
    if not len(_layer_of):
        register_optimizer_step_pre_hook(_look)
    for old, new in pairs:
        for p in old.parameters():
            _layer_of[p] = weakref.ref(new)


def _look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Refuse the first step of an optimizer that was built too early.

    Raises:
        ValueError: it holds the old weight of a layer, which gets no gradient any more, and nothing that trains there.
    """
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    idle = []
    for p in held.values():
        layer = _layer_of[p]() if p in _layer_of else None
        training = [id(q) for q in layer.parameters() if q.requires_grad] if layer is not None else []
        if training and not held.keys() & training:
            idle.append(type(layer).__name__)
    if idle:
        got = f"the old weights of {len(idle)} layers that are {capped(set(idle))} now, and nothing that trains there"
        raise ValueError(f"optimizer: got {got}; build the optimizer after replace_linears")
    _seen.add(optimizer)
