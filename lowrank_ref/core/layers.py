"""Surgery on models. The layers' base classes are in `bases.py`, how a weight is read and written in `weights.py`.

One rule for what trains, by family. An `Adapter` trains beside a frozen layer, and the rest of the model is frozen with
it. A `WeightLayer` *is* the weight (low-rank plus sparse, ternary, factored), and everything trains.

Each call logs a line to the logger "lowrank_ref": `logging.basicConfig(level=logging.INFO)` shows what it did.
"""

import functools
import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from lowrank_ref.core import huggingface, idle
from lowrank_ref.core.accounting import parameter_report
from lowrank_ref.core.bases import AdaptedLinear, Adapter, FactoredLinear, WeightLayer, dense
from lowrank_ref.core.matching import Pattern, capped, matcher, no_match, output_layers, select
from lowrank_ref.core.weights import (
    PLAIN,
    carry_hooks,
    has_own_forward,
    is_conv1d,
    is_linear,
    linear_like,
    weight_of,
    with_weight,
)

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "FactoredLinear",
    "Model",
    "WeightLayer",
    "adapters",
    "dense",
    "disabled",
    "is_conv1d",
    "is_linear",
    "linear_like",
    "merge_adapters",
    "put_in_place",
    "replace_linears",
    "replace_modules",
    "weight_of",
    "with_weight",
]

Model = TypeVar("Model", bound=nn.Module)
log = logging.getLogger("lowrank_ref")


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Iterate over (path, layer) of all adapters in the model, each layer once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


def put_in_place(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Put `new[id(old)]` wherever a module `old` stands in the model, also at its second place."""
    for path, old in list(model.named_modules(remove_duplicate=False)):
        if id(old) in new:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new[id(old)])


def replace_modules(
    model: Model,
    pattern: Pattern,
    factory: Callable[[Any], nn.Module],
    *,
    accepts: Callable[[nn.Module], bool],
    trainable: Pattern | None = None,
    own_forward: bool = False,
) -> Model:
    """Replace every module that the pattern means and that `accepts` takes, and set what trains.

    All new layers are built before the first one is put in place: an error leaves the model as it was.

    Args:
        model: changed in place.
        pattern: see `replace_linears`.
        factory: old module -> new module.
        accepts: which modules the factory can take; containers that match the pattern are passed over.
        trainable: see `replace_linears`.
        own_forward: the factory knows what subclasses of `nn.Linear` with a forward of their own compute.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: see `replace_linears`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted an nn.Module")
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(f"factory: got {factory!r}, wanted a function of a layer, such as partial(LoRALinear, rank=8)")
    huggingface.refuse_wrapped(model)
    named = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if path]
    hits = select(model, {p: m for p, m in named if accepts(m) and not _inside_adapter(model, p)}, pattern)
    old = {id(module): module for module in hits.values()}  # a layer at two places is built once
    first = {id(module): path for path, module in reversed(hits.items())}
    first = {key: first[key] for key in old}
    flags = {p: p.requires_grad for p in model.parameters()}
    before = [layer for _, layer in adapters(model)]
    try:
        new = {key: _build(model, first[key], old[key], factory, own_forward) for key in old}
        parts = [part for layer in new.values() for part in layer.modules()]
        ours = [part for part in parts if isinstance(part, Adapter)]
        bases = {id(p) for layer in [*before, *ours] for p in layer.base.parameters()}
        kept = _kept(model, trainable, bases)
    except BaseException:
        for p, trains in flags.items():
            p.requires_grad_(trains)
        raise
    weights = [part.rest_trains for part in parts if isinstance(part, WeightLayer)]
    freezes = not any(weights) if weights else bool(ours) and not before  # a later call keeps what the first one kept
    for p in flags:
        if id(p) not in bases and (p.is_floating_point() or p.is_complex()):
            p.requires_grad_(id(p) in kept or any(weights) or (p.requires_grad and not freezes))
    put_in_place(model, new)
    for key, layer in new.items():
        if not any(part is old[key] for part in layer.modules()):
            carry_hooks(old[key], layer)
    for encoder in (module for module in model.modules() if isinstance(module, nn.TransformerEncoder)):
        if any(not getattr(part, "is_product", True) for part in encoder.modules()):
            encoder.use_nested_tensor = False  # made for layers that multiply with `weight`
    huggingface.follow_ties(model)
    huggingface.guard_saving(model)
    idle.watch([(old[key], layer) for key, layer in new.items()])
    changed = {first[key]: (old[key], layer) for key, layer in new.items()}
    _report(model, changed, {id(p) for p, trains in flags.items() if trains})
    return model


def replace_linears(
    model: Model, pattern: Pattern, factory: Callable[[Any], nn.Module], *, trainable: Pattern | None = None
) -> Model:
    """Put a new layer in the place of every linear layer that `pattern` means, and set what trains.

    Adapters freeze the rest of the model, but for what `trainable` names; a second call with adapters freezes no more
    than the layers that it adapts. With layers that are the weight themselves (SLTrain, ternary, Maestro) everything
    trains but the bases of adapters: freeze afterwards what should not.

    Takes `nn.Linear` and GPT-2's `Conv1D`. A layer that stands at two places is replaced by one new layer at both. A
    weight that is tied to another layer stays tied until the adapter is merged. Build the optimizer afterwards.

    Args:
        model: changed in place.
        pattern: a regular expression searched in the layer's path, such as r"attention\\.self\\.(query|value)$"; or a
            list of names, each the end of a path, such as ["query", "value"]; or "all-linear", which takes all but
            output layers and heads.
        factory: linear layer -> new layer, such as `partial(LoRALinear, rank=8)`.
        trainable: parameters that keep training in full beside adapters: a regular expression searched in their paths,
            such as r"^classifier\\.", or a list of names of modules or parameters. The bases of adapters stay frozen.

    Returns:
        The same model.

    Raises:
        TypeError: the factory returns no module or refuses a layer; a quantised layer matches; a layer's own `forward`
            or type of result would be lost.
        ValueError: the pattern matches no linear layer (the message lists near candidates); `trainable` matches no
            parameter; the model holds PEFT's layers or is a `DistributedDataParallel`; the factory refuses a layer; the
            model multiplies with the layer's weight itself, past what the new layer does. The model is unchanged.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, replace_linears
        >>> model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> _ = replace_linears(model, r"^0$", partial(LoRALinear, rank=2))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.A', '0.B']
    """
    return replace_modules(model, pattern, factory, accepts=is_linear, trainable=trainable)


def merge_adapters(model: Model) -> Model:
    """Replace every adapter by its `merged()` layer, in place; the model is then plain PyTorch again.

    All merges are computed before the first is put in place. A tied weight comes loose (the other holder keeps the old
    value), and saving and loading a transformers model keeps it loose. Hooks on an adapter move to the merged layer.

    Raises:
        TypeError: a base has hooks or a `forward` of its own, which the merge would lose. The model is unchanged.
        ValueError: the model holds no adapter or is one itself, or an update is not finite. The model is unchanged.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, merge_adapters, replace_linears
        >>> merge_adapters(replace_linears(nn.Sequential(nn.Linear(6, 2)), "0", partial(LoRALinear, rank=2)))
        Sequential(
          (0): Linear(in_features=6, out_features=2, bias=True)
        )
    """
    found = _found(model)
    merged = {}
    for path, layer in found.items():
        with _at(path):
            merged[id(layer)] = layer.merged()
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    untied = any(holders[id(p)] > 1 for layer in found.values() for p in layer.base.parameters())
    put_in_place(model, merged)
    for layer in found.values():
        carry_hooks(layer, merged[id(layer)])
    idle.watch([(layer, merged[id(layer)]) for layer in found.values()])
    huggingface.follow_ties(model)
    config: Any = getattr(model, "config", None)
    if untied and not hasattr(model, "all_tied_weights_keys") and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # transformers before 5 ties by this flag alone
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Switch all adapters off for a while: `with disabled(model): model(x)` computes what the base model computes.

    Inside, every base stands in its adapter's place. To go from one set of adapters to another, load over:
    `load_adapters(model, "b")` puts B's numbers where A's were.

    Raises:
        ValueError: the model holds no adapter or is one itself.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, disabled, replace_linears
        >>> model = replace_linears(nn.Sequential(nn.Linear(6, 2)), "0", partial(LoRALinear, rank=2))
        >>> with disabled(model):
        ...     print(model)
        Sequential(
          (0): Linear(in_features=6, out_features=2, bias=True)
        )
    """
    found = _found(model)
    put_in_place(model, {id(layer): layer.base for layer in found.values()})
    huggingface.follow_ties(model)
    try:
        yield model
    finally:
        put_in_place(model, {id(layer.base): layer.train(layer.base.training) for layer in found.values()})
        huggingface.follow_ties(model)


def _found(model: nn.Module) -> dict[str, Adapter]:
    found = dict(adapters(model))
    if not found or isinstance(model, Adapter):
        raise ValueError(f"model: got {type(model).__name__}, wanted a model that contains an adapter")
    return found


def _inside_adapter(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), Adapter) for i in range(len(parts)))


@contextmanager
def _at(path: str) -> Iterator[None]:
    """Let an error say at which layer it came up."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(f"{error} (at {path})") from error


def _build(
    model: nn.Module, path: str, old: nn.Module, factory: Callable[[Any], nn.Module], own_forward: bool
) -> nn.Module:
    """Build one new layer, and refuse it where the model would compute something else with it."""
    with _at(path):
        new = factory(old)
    kind = type(new).__name__
    if not isinstance(new, nn.Module):
        raise TypeError(f"factory: got {new!r} for {path}, wanted an nn.Module")
    linear = isinstance(old, PLAIN) or is_conv1d(old)
    if isinstance(new, WeightLayer) and linear and has_own_forward(old) and not own_forward:
        own = f"{type(old).__name__} with a forward of its own"
        raise TypeError(f"{path}: got {own}, which {kind} would not run; leave it out of the pattern")
    names = path.split(".")
    for i in range(len(names)):
        owner: Any = type(model.get_submodule(".".join(names[:i])))
        asks = issubclass(owner, nn.TransformerEncoderLayer | nn.TransformerEncoder)  # these look for hooks first
        if not getattr(new, "is_product", True) and not asks and _multiplies(owner, ".".join(names[i:])):
            got = f"{kind} in {owner.__name__}, which takes its `weight` and passes over what else it does"
            raise ValueError(f"{path}: got {got}; leave it out of the pattern, or take dropout = 0 if it has one")
    return new


@functools.cache
def _multiplies(kind: Any, name: str) -> bool:
    """Tell by its source whether a class takes `self.<name>.weight` for more than its dtype, device or shape."""
    harmless = r"\.(?:dtype|device|shape|size|ndim|requires_grad)\b"
    taken = re.compile(rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!{harmless}|\s*=[^=])")
    setup = ("__init__", "_init", "reset", "_reset", "tie", "_tie", "set_", "resize", "_resize")
    wanted = {"weight", *name.split(".")}
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for method, function in vars(owner).items():
            function = inspect.unwrap(function) if callable(function) else function
            code = getattr(function, "__code__", None)
            if code is None or method.startswith(setup) or not wanted <= {*code.co_names}:  # most: no source is read
                continue
            try:
                if taken.search(inspect.getsource(function)):
                    return True
            except OSError:  # no source at hand
                continue
    return False


def _kept(model: nn.Module, trainable: Pattern | None, bases: set[int]) -> set[int]:
    """Return the ids of the parameters that `trainable` means, without those of adapters' bases."""
    if trainable is None:
        return set()
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied one has two names
    whole, kept = matcher("trainable", trainable), set[int]()
    for name in [None] if isinstance(trainable, str) else trainable:
        hits = {id(p) for path, p in named.items() if (whole(path) if name is None else f".{name}." in f".{path}.")}
        if not hits:
            which, part = ("which", trainable) if name is None else (f"of which {name!r}", [name])
            raise ValueError(no_match(f"trainable: got {trainable!r}, {which}", part, named))
        kept |= hits
    if kept <= bases:
        what = "matches only weights of adapted layers; every adapter keeps its base frozen"
        raise ValueError(f"trainable: got {trainable!r}, which {what}, wanted other parameters")
    return kept - bases


def _report(model: nn.Module, changed: dict[str, tuple[nn.Module, nn.Module]], trained: set[int]) -> None:
    """Log what was done, and warn of heads: that trained before and do not now, or are adapted themselves.

    Args:
        changed: path -> (old layer, new layer).
        trained: ids of the parameters that trained before.
    """
    new = [layer for _, layer in changed.values()]
    verb = "adapts" if any(isinstance(layer, Adapter) for layer in new) else "replaces"
    kinds, report = capped({type(layer).__name__ for layer in new}), parameter_report(model)
    numbers = f"trains {report.trainable:,} of {report.total:,} numbers"
    log.info("%s %d layers (%s): %s; %s", verb, len(new), kinds, capped(changed), numbers)
    for path in huggingface.frozen_heads(model):
        if any(id(p) in trained for p in model.get_submodule(path).parameters()):
            hint = f'if it is new, let it train with trainable=["{path}"]'
            log.warning("replace_linears: froze the head %r with the rest of the model; %s", path, hint)
    outputs = output_layers(model)
    for path, (old, layer) in changed.items():
        if isinstance(layer, Adapter) and not isinstance(old, Adapter) and path in outputs:
            hint = 'leave it out of the pattern ("all-linear" does), and name it in `trainable` if it is new'
            log.warning("replace_linears: adapts the output layer %r as well; if that is not meant, %s", path, hint)
