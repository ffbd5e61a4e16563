"""Look at each optimizer's first step: built before the surgery? The rate of full fine-tuning? Decay of gates?"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from lowrank_ref.core.matching import capped

#: Adam at this rate or below moves a factor that starts at zero too slowly; it is the default of transformers' Trainer.
FULL_RATE = 5e-5
ADAMS = torch.optim.Adam | torch.optim.AdamW | torch.optim.NAdam | torch.optim.RAdam | torch.optim.Adamax
log = logging.getLogger("lowrank_ref")
_layer_of = WeakIdKeyDictionary()  # old weight -> weak reference to the layer that trains in its place
_seen: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()
_watching: list[Any] = []


def watch(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Let every optimizer's first step look for these old layers' weights. `pairs` are (old layer, new layer)."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_look))
    for old, new in pairs:
        for p in old.parameters():
            _layer_of[p] = weakref.ref(new)


def _look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Refuse an optimizer that was built too early; warn of a rate that is too low, or of decay that falls on gates.

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
    living: list[Any] = [layer for layer in (ref() for ref in _layer_of.values()) if layer is not None]
    spared = {
        id(getattr(m, name)): f"{name} of {type(m).__name__}" for m in living for name in getattr(m, "no_decay", ())
    }
    for decay, ps in ((group.get("weight_decay") or 0.0, group["params"]) for group in optimizer.param_groups):
        if decay and (hit := {spared[id(p)] for p in ps if id(p) in spared}):
            advice = "take optimizer_groups(model, lr, weight_decay), in a Trainer as optimizers=(optimizer, None)"
            log.warning(
                "weight decay %g falls on %s, which it should not shrink; %s", decay, capped(sorted(hit)), advice
            )
            break
    layers = [layer for layer in living if getattr(layer, "starts_from_weight", True) is False]
    factors = {id(p) for layer in layers for p in layer.adapter_parameters().values()}
    for group in optimizer.param_groups if isinstance(optimizer, ADAMS) else ():
        rate = float(group.get("initial_lr", group["lr"]))
        if 0 < rate <= FULL_RATE and any(id(p) in factors for p in group["params"]):
            log.warning("learning rate %g is one for full fine-tuning; adapters want about ten times as much", rate)
            break
