"""What surgery owes to transformers models: tied weights, `save_pretrained`, PEFT's layers. Imports nothing of theirs.

transformers (5 and later) keeps the ties of a model by name, and reads them whenever it saves, loads or resizes. An
adapter moves a weight from "lm_head.weight" to "lm_head.base.weight"; a merge may take it off its tie.
"""

import functools
import inspect
import sys
import warnings
from collections import Counter
from typing import Any

from torch import nn

from lowrank_ref.core.matching import heads


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse models in which another library has taken the layers already.

    Raises:
        ValueError: PEFT's layers, or a model inside DistributedDataParallel.
    """
    for path, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            got = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
            raise ValueError(f"model: got PEFT's {got}, wanted plain layers; call its merge_and_unload() first")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model: got DistributedDataParallel, which would not see new parameters; change model first"
            )


def frozen_heads(model: nn.Module) -> list[str]:
    """Return the paths of a task's heads, nothing of which trains."""
    owned = {path: list(model.get_submodule(path).parameters()) for path in heads(model)}
    return [path for path, ps in owned.items() if ps and not any(p.requires_grad for p in ps)]


def follow_ties(model: nn.Module) -> None:
    """Bring the lists of tied weights up to date after surgery: follow names that moved, drop ties that came loose.

    A file keeps one tensor of each tie, and loading fills in the others. So where the tie with the first holder came
    loose, what is tied to another one still gets memory of its own. If all ties were those of one output layer, they
    go together, and the config says so for readers that look at nothing else.
    """
    for module in model.modules():
        ties = vars(module).get("all_tied_weights_keys")
        if not ties:
            continue
        now = dict(module.named_parameters(remove_duplicate=False))
        names = {_place(target, now): _place(source, now) for target, source in ties.items()}
        left = {target: source for target, source in names.items() if now.get(target) is now.get(source)}
        config: Any = getattr(module, "config", None)
        if len(left) < len(ties) and len({target.rpartition(".")[0] for target in ties}) == 1:
            left = {}
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
        module.all_tied_weights_keys = module._tied_weights_keys = left  # type: ignore[assignment]
        held = {id(now.get(source)) for source in names.values()}
        for target in sorted(names.keys() & now.keys() - left.keys()):
            parent, _, leaf = target.rpartition(".")
            old = now[target]
            if id(old) in held:
                setattr(module.get_submodule(parent), leaf, nn.Parameter(old.detach().clone(), old.requires_grad))
            held.add(id(old))


def _place(name: str, now: dict[str, nn.Parameter]) -> str:
    """Return the name of a parameter after it moved into an adapter, or out of one."""
    parent, _, leaf = name.rpartition(".")
    inside = f"{parent}.base.{leaf}" if parent else name
    outside = ".".join([*parent.split(".")[:-1], leaf]) if parent.endswith("base") else name
    return next((place for place in (name, inside, outside) if place in now), name)


def guard_saving(model: nn.Module) -> None:
    """Let `save_pretrained` warn while a model holds layers that `from_pretrained` cannot build.

    Classes get the warning, not this model: it may be a part of the one that is saved.
    """
    kinds: list[Any] = [type(module) for module in model.modules()]
    for kind in [*kinds, getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", nn.Module)]:
        owners = (owner for owner in kind.__mro__ if inspect.isfunction(vars(owner).get("save_pretrained")))
        owner: Any = next(owners, None)
        if owner is not None and not hasattr(owner.save_pretrained, "warns"):
            owner.save_pretrained = _warning(owner.save_pretrained)


def _warning(save: Any) -> Any:
    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        # Trainer's checkpoints go this way too. A class may call that of its parent: one warning is enough.
        if type(self).save_pretrained is save_pretrained and (foreign := Counter(_foreign(self))):
            listing = ", ".join(f"{count} {name}" for name, count in foreign.items())
            warnings.warn(
                f"save_pretrained: the model holds {listing}, which from_pretrained does not build: it would load them "
                "as new random or as other layers. To keep them, use save_adapters or save_peft (or save_tensors of "
                "the state dict); to have plain weights, merge_adapters (or to_linear) first. As a checkpoint to "
                "resume from in a model that was changed in the same way, the folder is fine.",
                stacklevel=2,
            )
        return save(self, *args, **options)

    save_pretrained.warns = True  # type: ignore[attr-defined]
    return save_pretrained


def _foreign(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if getattr(module, "taken", "")]
