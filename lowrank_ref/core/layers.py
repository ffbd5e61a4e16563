"""The one base class of adapters, and surgery on models.

A weight here is always W (m, n) = (out, in), as `nn.Linear` stores it. GPT-2's `Conv1D` stores the transpose;
`weight_of` hides that, so an adapter never asks which of the two it sits on.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_floating

Model = TypeVar("Model", bound=nn.Module)


def is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' GPT-2 `Conv1D`, a linear layer whose weight is stored (in, out). No import of transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Tell layers that compute x Wᵀ + b: `nn.Linear` and GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def weight_of(module: nn.Module) -> Float[Tensor, "m n"]:
    """Return the layer's weight as (out, in), a view for `Conv1D`.

    Raises:
        TypeError: the module is no linear layer, or its weight is not floating point (a quantised base).
    """
    if not is_linear(module):
        raise TypeError(f"base: got {type(module).__name__}, wanted nn.Linear or GPT-2's Conv1D")
    weight = cast(Tensor, module.weight)
    check_floating("base.weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"base.weight: got shape {tuple(weight.shape)}, wanted a matrix (out, in)")
    return weight.T if is_conv1d(module) else weight


def with_weight(module: nn.Module, weight: Float[Tensor, "m n"]) -> nn.Module:
    """Return a new layer like `module` that computes with `weight` (out, in), rounded once to the old dtype.

    The copy shares no memory with the original, so a tied weight elsewhere in the model keeps its value.
    """
    old = weight_of(module)
    copy: Any = type(module).__new__(type(module)) if is_conv1d(module) else nn.Linear(1, 1, device="meta")
    if is_conv1d(module):
        nn.Module.__init__(copy)
        copy.nf, copy.nx = old.shape
        weight = weight.T
    else:
        copy.out_features, copy.in_features = old.shape
    copy.weight = nn.Parameter(weight.detach().to(old.dtype, copy=True).contiguous(), requires_grad=False)
    bias = cast(Tensor | None, module.bias)
    copy.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return copy.train(module.training)


class Adapter(nn.Module):
    """A frozen base layer plus a trained update. Base class of every adapter; it never changes the base.

    Args:
        base: the layer to adapt. Its parameters are frozen here.

    A subclass sets `adapter_names`, the names of the parameters it trains, and defines `merged()`.
    """

    adapter_names: tuple[str, ...] = ()

    def __init__(self, base: nn.Module) -> None:
        if isinstance(base, Adapter):
            raise TypeError(f"base: got {type(base).__name__}, an adapter already; merge it before adapting again")
        super().__init__()
        self.base = base
        base.requires_grad_(False)
        self.train(base.training)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> trained parameter of this layer."""
        return {name: getattr(self, name) for name in self.adapter_names}

    def merged(self) -> nn.Module:
        """Return a plain layer that computes the same function at no extra cost. The base stays as it is."""
        raise NotImplementedError


class AdaptedLinear(Adapter):
    """Base class of adapters of a linear layer: y = x Wᵀ + b + x ΔWᵀ.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`, floating point.

    A subclass defines `delta_weight()`; it overrides `update` where a cheaper form than the (m, n) product exists.
    """

    def __init__(self, base: nn.Module) -> None:
        m, n = weight_of(base).shape
        super().__init__(base)
        self.out_features, self.in_features = m, n

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return ΔW (m, n), so that the layer computes with W + ΔW."""
        raise NotImplementedError

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x ΔWᵀ."""
        return F.linear(x, self.delta_weight())

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return base(x) + x ΔWᵀ, shape (..., m). The update is computed in the adapter's own dtype."""
        dtype = next(iter(self.adapter_parameters().values())).dtype
        out = self.base(x)
        return out + self.update(x if torch.is_autocast_enabled() else x.to(dtype)).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a frozen layer of the base's type with weight W + ΔW, added in float32 or wider and rounded once.

        Raises:
            ValueError: ΔW holds NaN or infinity; a merge would hide it in the weights.
        """
        delta = self.delta_weight()
        if not bool(torch.isfinite(delta).all()):
            raise ValueError("delta_weight: got NaN or infinite entries, wanted a finite update to merge")
        wide = torch.promote_types(delta.dtype, torch.float32)
        return with_weight(self.base, weight_of(self.base).to(wide) + delta.to(wide))

    def extra_repr(self) -> str:
        """Show the shape in `print(model)`."""
        return f"{self.in_features} -> {self.out_features}"


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
    pattern: str,
    factory: Callable[[Any], nn.Module],
    *,
    accepts: Callable[[nn.Module], bool],
    trainable: str | None = None,
) -> Model:
    """Replace every module whose path matches and that `accepts` takes; freeze the rest of the model.

    All new layers are built before the first one is put in place: an error leaves the model as it was.

    Args:
        model: changed in place.
        pattern: regular expression, searched in the module's path, such as r"attn\\.(q|v)$".
        factory: old module -> new module.
        accepts: which modules the factory can take; containers that match the pattern are passed over.
        trainable: regular expression of parameter paths that keep training in full, such as r"^classifier\\.".

    Returns:
        The same model.

    Raises:
        ValueError: nothing matches; the message lists near candidates. Or `trainable` matches no parameter.
    """
    inner = ((name, module) for name, module in model.named_modules() if name)  # the model itself has no place to swap
    candidates = {name: module for name, module in inner if accepts(module) and not _inside_adapter(model, name)}
    hits = {name: module for name, module in candidates.items() if re.search(pattern, name)}
    if not hits:
        raise ValueError(_no_match("pattern", pattern, list(candidates)))
    names = [name for name, _ in model.named_parameters()]
    kept = [name for name in names if trainable is not None and re.search(trainable, name)]
    if trainable is not None and not kept:
        raise ValueError(_no_match("trainable", trainable, names))
    was_training = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        built = {id(module): factory(module) for module in hits.values()}
    except Exception:
        for name, p in model.named_parameters():
            p.requires_grad_(was_training[name])
        raise
    first_time = not any(True for _ in adapters(model))  # a second call must not freeze what the first one kept
    for name, p in model.named_parameters():
        if name in kept:
            p.requires_grad_(True)
        elif first_time:
            p.requires_grad_(False)
    put_in_place(model, built)
    return model


def replace_linears(
    model: Model, pattern: str, factory: Callable[[Any], nn.Module], *, trainable: str | None = None
) -> Model:
    """Adapt every linear layer whose path matches `pattern`; freeze everything else.

    Takes `nn.Linear` and GPT-2's `Conv1D`. A layer that stands at two places is replaced by one adapter at both. A
    weight that is tied to another layer stays tied until the adapter is merged.

    Args:
        model: changed in place.
        pattern: regular expression searched in the layer's path, such as r"attention\\.self\\.(query|value)$".
        factory: linear layer -> adapter, such as `partial(LoRALinear, rank=8)`.
        trainable: regular expression of parameter paths that keep training in full, such as r"^classifier\\.".

    Returns:
        The same model.

    Raises:
        ValueError: the pattern matches no linear layer; the message lists near candidates. The model is unchanged.

    Example:
        >>> from functools import partial
        >>> from lowrank_ref.adapters import LoRALinear
        >>> model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> _ = replace_linears(model, r"^0$", partial(LoRALinear, rank=2))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.A', '0.B']
    """
    return replace_modules(model, pattern, factory, accepts=is_linear, trainable=trainable)


def merge_adapters(model: Model) -> Model:
    """Replace every adapter by its `merged()` layer, in place; the model is then plain PyTorch again.

    All merges are computed before the first is put in place. A tied weight comes loose (the other holder keeps the old
    value); a transformers config is then told so, since saving and loading would tie it again.

    Raises:
        ValueError: the model holds no adapter or is one itself, or an update is not finite. The model is unchanged.
    """
    found = dict(adapters(model))
    if not found or isinstance(model, Adapter):
        raise ValueError(f"model: got {type(model).__name__}, wanted a model that contains an adapter to merge")
    merged = {id(layer): layer.merged() for layer in found.values()}
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    untied = any(holders[id(p)] > 1 for layer in found.values() for p in layer.base.parameters())
    put_in_place(model, merged)
    config: Any = getattr(model, "config", None)
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return model


def _inside_adapter(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), Adapter) for i in range(len(parts)))


def _no_match(argument: str, pattern: str, names: list[str]) -> str:
    plain = re.sub(r"[^\w.]+", ".", pattern)
    near = difflib.get_close_matches(plain, names, n=4, cutoff=0.3) or names[:4]
    listing = ", ".join(near) if near else "none: the model has no such module"
    return f"{argument}: got {pattern!r}, which matches nothing; near candidates are: {listing}"
