"""Read and write the weight of one layer, whatever keeps it: a parameter, a parametrisation, or a hook of PyTorch's.

A weight here is always W (m, n) = (out, in), as `nn.Linear` stores it. GPT-2's `Conv1D` stores the transpose;
`weight_of` and `with_weight` hide that, so a method never asks which of the two it sits on.
"""

import copy
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lowrank_ref.core.checks import check_matrix, check_wide

#: Kinds of layers whose `forward` is known to compute with `weight` and `bias` alone.
PLAIN = (nn.Linear, nn.Conv2d, nn.Embedding)
_FORWARDS = frozenset(kind.forward for kind in PLAIN)  # as they are now, should anybody exchange one later
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' GPT-2 `Conv1D`, a linear layer whose weight is stored (in, out). No import of transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Tell layers that compute x Wᵀ + b: `nn.Linear` and GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_quantised(module: nn.Module) -> bool:
    """Tell linear layers whose weight is no floating-point matrix, such as those of bitsandbytes."""
    return is_linear(module) and not cast(Tensor, module.weight).is_floating_point()


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether a layer computes anything else than its kind does: a subclass's `forward`, or one set on the layer.

    accelerate, for one, sets `forward` on a layer to move its weight to the device first.
    """
    of_class, own = type(module).forward, vars(module).get("forward")
    known = of_class in _FORWARDS or is_conv1d(module)
    return not known or (own is not None and getattr(own, "__func__", None) is not of_class)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether calling the layer runs somebody's hook, also one for all modules."""
    own = vars(module)
    return any([own[name] for name in _HOOKS]) or bool(nn.modules.module._has_any_global_hook())


def weight_of(module: nn.Module) -> Float[Tensor, "m n"]:
    """Return the layer's weight as (out, in), a view for `Conv1D`.

    Raises:
        TypeError: the module is no linear layer, or its weight is not floating point of 16 bits or more (quantised).
        ValueError: the weight is no matrix.
    """
    if not is_linear(module):
        raise TypeError(f"base: got {type(module).__name__}, wanted nn.Linear or GPT-2's Conv1D")
    weight = current(module)
    if weight.ndim != 2:
        raise ValueError(f"base.weight: got shape {tuple(weight.shape)}, wanted a matrix (out, in)")
    return weight.T if is_conv1d(module) else weight


def current(module: nn.Module) -> Tensor:
    """Return `module.weight` as the next forward would see it.

    The old-style `weight_norm`, `spectral_norm` and `prune` compute it in a hook of forward: after a `load_state_dict`
    the attribute is stale until then.

    Raises:
        TypeError: it is not floating point.
    """
    weight: Any = module._parameters.get("weight")
    if weight is None:
        for hook in module._forward_pre_hooks.values():
            pure = isinstance(hook, WeightNorm | BasePruningMethod)
            if pure or (isinstance(hook, SpectralNorm) and not module.training):  # which iterates while it trains
                cast(Any, hook)(module, None)
        weight = module.weight
    check_wide("base.weight", weight)
    return weight


def updated(W: Float[Tensor, "*shape"], delta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return W + ΔW, added in float32 or wider and rounded once to W's dtype.

    Raises:
        ValueError: ΔW holds NaN or infinity, which a merge would hide in the weights; or the sum is too large for W's
            dtype.
    """
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("delta_weight: got NaN or infinite entries, wanted a finite update to merge")
    wide = torch.promote_types(delta.dtype, torch.float32)
    total = (W.to(wide) + delta.to(wide)).to(W.dtype)
    if not bool(torch.isfinite(total).all()):
        most = torch.finfo(W.dtype).max
        raise ValueError(f"W + delta_weight: got entries beyond {most:g}, wanted what {W.dtype} can hold; cast W first")
    return total


def with_weight(module: nn.Module, weight: Float[Tensor, "..."]) -> nn.Module:
    """Return a new frozen layer of the same class that computes with `weight`, rounded once to the old dtype.

    The copy shares no memory with the original, so a tied weight elsewhere in the model keeps its value. A
    parametrisation or old-style hook that computed the old weight is left behind: the new one is a parameter.

    Args:
        module: `nn.Linear`, GPT-2's `Conv1D`, `nn.Conv2d`, `nn.Embedding`, or a subclass that inherits their forward.
        weight: (out, in) for linear layers, else in the shape of the module's own weight.

    Raises:
        TypeError: the layer has a `forward` of its own, or hooks, which the new layer would not run.
    """
    if has_own_forward(module):
        name = type(module).__name__
        raise TypeError(f"base: got {name} with a forward of its own, which a merge would lose; keep the adapter")
    hooks = [hook for name in _HOOKS for hook in vars(module)[name].values() if not _of_torch(hook)]
    if hooks:
        raise TypeError(f"base: got {len(hooks)} hooks, which a merge would lose, wanted none; remove them before it")
    kind: Any = type_before_parametrizations(module)
    new = kind.__new__(kind)
    nn.Module.__init__(new)
    lost = {*vars(new), "weight", "forward", "_compiled_call_impl"}
    vars(new).update({name: value for name, value in vars(module).items() if name not in lost})
    weight = weight.T if is_conv1d(module) else weight
    new.weight = nn.Parameter(weight.detach().to(current(module).dtype, copy=True).contiguous())
    for store in ("_parameters", "_buffers", "_modules"):  # the bias, and what a subclass may have
        rest = vars(module)[store].items()
        rest = {k: v for k, v in rest if k.partition("_")[0] not in ("weight", "parametrizations")}
        vars(new)[store].update(copy.deepcopy(rest))
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        new.bias = nn.Parameter(bias.detach().clone())  # also one that is computed
    return new.requires_grad_(False).train(module.training)


def linear_like(kind: type[nn.Module], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None) -> nn.Module:
    """Return a new trained layer of this class, `nn.Linear` or GPT-2's `Conv1D`, with copies of weight and bias."""
    new: Any = kind.__new__(kind)
    nn.Module.__init__(new)
    m, n = weight.shape
    transposed = kind.__name__ == "Conv1D"
    vars(new).update({"nf": m, "nx": n} if transposed else {"out_features": m, "in_features": n})
    weight = weight.T if transposed else weight
    new.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    new.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return new


def trained_factors(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], bias: Float[Tensor, " m"] | None
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
    """Return copies of A, B and bias that train, for a layer that is B(Ax) + bias.

    Raises:
        TypeError, ValueError: A or B is no finite matrix of floating point, or they do not fit together.
    """
    check_matrix("A", A)
    check_matrix("B", B)
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"B: got {B.shape[1]} columns, wanted {A.shape[0]}, one for each row of A")
    A, B = (M.detach().clone(memory_format=torch.contiguous_format) for M in (A, B))
    return nn.Parameter(A), nn.Parameter(B), None if bias is None else nn.Parameter(bias.detach().clone())


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let `new` run the hooks that were set on `old`; their handles remove them still. A computed weight's stay."""
    for name in (*_HOOKS, *_FLAGS):
        theirs = vars(old)[name]
        for key in [key for key, hook in theirs.items() if _of_torch(hook)]:
            del theirs[key]
        theirs.update(vars(new)[name])
        vars(new)[name] = theirs  # the same dict, which the handles know
    new._is_full_backward_hook = new._is_full_backward_hook or old._is_full_backward_hook


def _of_torch(hook: Any) -> bool:
    """Tell a hook that computes a weight, which goes where that weight goes."""
    return isinstance(hook, WeightNorm | BasePruningMethod | SpectralNorm)
