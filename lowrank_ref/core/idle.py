"""Look at an optimizer's first step after a surgery: built too early? Does it train, at which rate, with what decay?"""

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
    """Let every optimizer's next step look for these old layers' weights. `pairs` are (old layer, new layer)."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_look))
    _seen.clear()
    for old, new in pairs:
        for p in old.parameters():
            _layer_of[p] = weakref.ref(new)


def _look(optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
    """Refuse an optimizer that was built too early; warn of one that moves little or nothing, or shrinks gates.

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
    in_backward = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in held.values())
    closure = any(a is not None and a is not optimizer for a in (*arguments, *options.values()))
    if living and not in_backward and not closure and all(p.grad is None for p in held.values()):
        what = "none of the optimizer's %d tensors has a gradient, so that its step changes nothing"
        log.warning(what + "; build it from what trains, after the surgery, and call backward first", len(held))
    _warn_of_decay(optimizer, living)
    if isinstance(optimizer, ADAMS):
        _warn_of_rate(optimizer, living)


def _warn_of_decay(optimizer: torch.optim.Optimizer, living: list[Any]) -> None:
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


def _warn_of_rate(optimizer: torch.optim.Optimizer, living: list[Any]) -> None:
    """Warn of a rate that is too low for factors that start at zero, or for weights that are kept in 16 bits."""
    factors, told = set(), False
    for layer in (layer for layer in living if hasattr(layer, "adapter_parameters")):
        for p in layer.adapter_parameters().values():
            if not layer.starts_from_weight or not (p.is_meta or p.any()):  # DoRA's B, whatever else it starts from
                factors.add(id(p))
    lost, rates = 0, [0.0]
    for group in optimizer.param_groups:
        rate = float(group.get("initial_lr", group["lr"]))
        if not told and 0 < rate <= FULL_RATE and any(id(p) in factors for p in group["params"]):
            log.warning("learning rate %g is one for full fine-tuning; adapters want about ten times as much", rate)
            told = True
        if few := sum(_loses(p, rate) for p in group["params"] if rate and p.grad is not None) if living else 0:
            lost, rates = lost + few, [*rates, rate]
    if lost:
        what = "steps of %g are lost in most numbers of %d trained tensors, which are kept in 16 bits"
        log.warning(what + "; let what trains be float32 (p.data = p.data.float()), and take autocast", rates[-1], lost)


def _loses(p: torch.Tensor, rate: float) -> bool:
    """Tell whether most numbers of a tensor in 16 bits stay what they are when `rate` is taken off."""
    if type(p.detach()) is not torch.Tensor or p.is_meta or p.dtype not in (torch.bfloat16, torch.float16):
        return False
    few = p.detach().flatten()[:4096]
    return bool((few - rate == few).float().mean() > 0.5)
