"""The base classes of layers that take the place of others: an adapter trains beside a layer, a weight layer is one."""

import inspect
from collections.abc import Callable
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_loaded
from lowrank_ref.core.products import autocasts, is_plain, lora_linear
from lowrank_ref.core.weights import current, has_own_forward, is_conv1d, updated, weight_of, with_weight


class _OwnSignature:
    """Shows the arguments of a class's `__init__` where its metaclass has a `__call__` for any, which hides them."""

    def __get__(self, cls: Any, kind: type) -> inspect.Signature:
        if cls is None:
            raise AttributeError("__signature__")
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


class _FreezesLast(type):
    """Freezes the base of an adapter when the adapter is whole: an error before that leaves the base as it was."""

    __signature__ = _OwnSignature()

    def __call__(cls, *args: Any, **options: Any) -> Any:
        layer = super().__call__(*args, **options)
        layer.base.requires_grad_(False)
        if layer.starts_from_weight:
            layer.remember_start()
        return layer


class Adapter(nn.Module, metaclass=_FreezesLast):
    """A frozen base layer plus a trained update. Base class of every adapter; it never changes the base.

    Args:
        base: the layer to adapt. Its parameters are frozen here.

    A subclass sets `adapter_names`, the names of the parameters it trains, and defines `delta_weight()`. It also sets
    `starts_from_weight` if its start depends on the base's weight.

    Casting the model to half precision leaves what an adapter owns in float32, where small steps still count; cast
    `p.data` of its parameters to have them in half precision all the same.

    Raises:
        TypeError: the base is an adapter already.
        ValueError: the base's weight has been offloaded by accelerate, or is on the meta device and the start needs it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowrank_ref.core.layers import Adapter
        >>> class Shift(Adapter):  # adds one trained number to every weight
        ...     adapter_names = ("shift",)
        ...     def __init__(self, base):
        ...         super().__init__(base)
        ...         self.shift = nn.Parameter(torch.ones(()))
        ...     def delta_weight(self):
        ...         return self.shift.expand_as(self.base.weight)
        >>> layer = Shift(nn.Embedding(5, 3))
        >>> torch.equal(layer.merged().weight, layer.base.weight + 1)
        True
    """

    adapter_names: tuple[str, ...] = ()
    starts_from_weight = False
    taken = "adapted already"
    _start: tuple[list[tuple[int, int]], Tensor] | None = None

    def __init__(self, base: nn.Module) -> None:
        if isinstance(base, Adapter):
            raise TypeError(f"base: got {type(base).__name__}, an adapter already; merge it before adapting again")
        weight: Any = getattr(base, "weight", None)
        if weight is not None and weight.is_meta and (self.starts_from_weight or hasattr(base, "_hf_hook")):
            raise ValueError(
                "base.weight: got no numbers (meta device, or offloaded by accelerate), wanted them loaded"
            )
        super().__init__()
        self.base = base
        self.train(base.training)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> trained parameter of this layer."""
        return {name: getattr(self, name) for name in self.adapter_names}

    def delta_weight(self) -> Float[Tensor, "..."]:
        """Return ΔW, so that the layer computes with W + ΔW. Linear layers: (m, n) = (out, in), also for `Conv1D`."""
        raise NotImplementedError

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """W + ΔW in the base's dtype and layout, with its gradient, for models that multiply with it themselves."""
        self.check_start()
        W, delta = current(self.base), self.delta_weight()
        return (W + (delta.T if is_conv1d(self.base) else delta)).to(W.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)

    @property
    def is_product(self) -> bool:
        """Whether `weight` and `bias` say all that forward does: not if it drops inputs of the update."""
        return not getattr(getattr(self, "dropout", None), "p", 0)

    def combined(
        self, out: Float[Tensor, "*shape"], update: Callable[[Tensor], Tensor], x: Tensor
    ) -> Float[Tensor, "*shape"]:
        """Return out + update(x), rounded once. The update is computed in the adapter's own dtype, or by bf16 autocast.

        float16 is too narrow for what lies between two factors, also under autocast: there the update has float32.
        """
        self.check_start()
        own, on = next(iter(self.adapter_parameters().values())).dtype, autocasts(x)
        x = x.to(own) if x.is_floating_point() and not on else x
        if on and torch.get_autocast_dtype(x.device.type) == torch.float16:
            with torch.autocast(x.device.type, enabled=False):
                return (out + update(x.to(own) if x.is_floating_point() else x)).to(out.dtype)
        return (out + update(x)).to(out.dtype)

    def merged(self) -> nn.Module:
        """Return a frozen layer of the base's class with weight W + ΔW: the same function at no extra cost.

        The sum is computed in float32 or wider and rounded once. The base stays as it is.

        Raises:
            TypeError: the base has hooks or a `forward` of its own, which a merge would lose.
            ValueError: ΔW holds NaN or infinity, the sum is too large for the base's dtype, or the base is on the meta
                device.
        """
        self.check_start()
        W = current(self.base)
        check_loaded("base.weight", W)
        with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
            delta = self.delta_weight()
            W = W.T if is_conv1d(self.base) else W
            return with_weight(self.base, updated(W, delta))

    def remember_start(self) -> None:
        """Note what the base's weight is, for the first forward to check that it still is."""
        self._start = self._own(), self.sample()

    def check_start(self) -> None:
        """Require that the base's weight is what this layer started from, unless its own numbers were written as well.

        Done once; the compiler sees nothing of it.

        Raises:
            ValueError: a base that was loaded after the surgery.
        """
        if torch.compiler.is_compiling() or self._start is None:
            return
        own, before = self._start
        if own == self._own() and not torch.allclose(before, self.sample(), 0.02, float(before.abs().max()) / 500):
            got = f"another weight than the one from which {type(self).__name__} starts"
            raise ValueError(f"base.weight: got {got}, wanted that one; load the base first, then adapt it")
        self._start = None

    def _own(self) -> list[tuple[int, int]]:
        """Return which tensors the trained parameters are, and how often each was written."""
        return [(id(p), 0 if p.is_inference() else p._version) for p in self.adapter_parameters().values()]

    def sample(self) -> Tensor:
        """Return a few entries of W, on the CPU."""
        W = current(self.base).detach()
        return W[tuple(slice(None, None, max(1, size // 8)) for size in W.shape)].to("cpu", torch.float32, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def gentle(t: Tensor) -> Tensor:
            new = fn(t)
            if not t.is_floating_point() or new.dtype == t.dtype or new.dtype.itemsize >= 4:
                return new
            return t.to(new.device, torch.promote_types(t.dtype, torch.float32))

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(gentle, recurse=False)


class AdaptedLinear(Adapter):
    """Base class of adapters of a linear layer: y = x Wᵀ + b + x ΔWᵀ.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`, floating point. Subclasses and hooks are called, never passed over.

    A subclass defines `delta_weight()`; it overrides `update` where a cheaper form than the (m, n) product exists.

    Raises:
        TypeError: no such layer, or one whose forward takes or returns something else than (..., n) and (..., m).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowrank_ref.core.layers import AdaptedLinear
        >>> class Rows(AdaptedLinear):  # trains one factor a row, ΔW = diag(g)·W
        ...     adapter_names = ("g",)
        ...     def __init__(self, base):
        ...         super().__init__(base)
        ...         self.g = nn.Parameter(torch.zeros(self.out_features))
        ...     def delta_weight(self):
        ...         return self.g[:, None] * self.base.weight
        >>> Rows(nn.Linear(4, 3))(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, base: nn.Module) -> None:
        m, n = weight_of(base).shape
        super().__init__(base)
        self.out_features, self.in_features = m, n
        if has_own_forward(base) and "forward" not in vars(base):
            self._try(base)

    def _try(self, base: nn.Module) -> None:
        W = weight_of(base)
        wanted = f"a layer that takes (..., {self.in_features}) and returns (..., {self.out_features})"
        try:
            with torch.no_grad():
                y = base(W.new_zeros(1, self.in_features))
        except Exception as error:
            raise TypeError(f"base: got {type(base).__name__}, which raises {error!r}, wanted {wanted}") from error
        if not isinstance(y, Tensor) or y.shape != (1, self.out_features):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"base: got {type(base).__name__}, which returns {got}, wanted {wanted}")

    def as_one(self, x: Tensor) -> bool:
        """Tell whether base and update may be computed as one product: both read this x, and the base is plain."""
        self.check_start()
        return (not self.training or self.is_product) and is_plain(self.base, x)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x ΔWᵀ."""
        return F.linear(x, self.delta_weight())

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return base(x) + x ΔWᵀ, shape (..., m)."""
        return self.combined(self.base(x), self.update, x)

    def extra_repr(self) -> str:
        """Show shape and rank in `print(model)`."""
        rank = f", rank {self.rank}" if hasattr(self, "rank") else ""
        return f"{self.in_features} -> {self.out_features}{rank}"


class FactoredLinear(AdaptedLinear):
    """Base class of adapters whose update is s·BA: base and update are one product where both read the same x.

    A subclass defines `delta_weight`, `update` and `lora_factors`. Where export writes other factors than a step needs,
    it overrides `step_factors` too.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import LoRALinear, RandLoRALinear
        >>> from lowrank_ref.core.layers import FactoredLinear
        >>> [issubclass(layer, FactoredLinear) for layer in (LoRALinear, RandLoRALinear)]
        [True, False]
    """

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B, s) with ΔW = s·BA: what export to PEFT's format writes."""
        raise NotImplementedError

    def step_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B, s) with ΔW = s·BA, through which gradients reach every trained number."""
        return self.lora_factors()

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return base(x) + x ΔWᵀ, shape (..., m): by `lora_linear` where base and update read the same x."""
        if not self.as_one(x):
            return super().forward(x)
        base: Any = self.base
        return lora_linear(x, weight_of(base), base.bias, *self.step_factors())


class WeightLayer(nn.Module):
    """Base class of layers that *are* the weight, in the place of a linear layer. With them, the whole model trains.

    A subclass that defines `dense_weight()` and computes x Wᵀ + b with it, and nothing else, says so by `is_product`.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.lowbit import BitLinear
        >>> from lowrank_ref.core.layers import WeightLayer, replace_linears
        >>> model = replace_linears(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "0", BitLinear)
        >>> isinstance(model[0], WeightLayer), all(p.requires_grad for p in model.parameters())
        (True, True)
    """

    #: Whether the rest of the model trains too; what is made for inference says False.
    rest_trains = True
    #: Whether x @ weight.T + bias is all that forward does, so that models may multiply with `weight` themselves.
    is_product = False
    taken = "replaced already"

    def __init__(self) -> None:
        super().__init__()
        if not self.is_product:
            self.register_forward_pre_hook(_call_me)


@no_type_check  # one code object of its own, for the compiler
def _call_me(layer: nn.Module, inputs: Any) -> None:
    """Do nothing: in eval mode PyTorch's `TransformerEncoderLayer` multiplies with `weight` unless it finds a hook."""


def of_base(name: str) -> Any:
    """Return a property that gives the base's attribute of this name, for models that read it from the layer."""
    return property(lambda self: getattr(self.base, name))


#: `weight` of a layer that keeps it in another form: what models read that multiply with it, or ask for its dtype.
dense = property(lambda self: self.dense_weight())
