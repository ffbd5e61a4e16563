r"""Ternary weights and int8 activations (BitNet b1.58), trained straight through the rounding and stored in 2 bits.

Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv 2402.17764, with the norm and the
per-token scale of the 2B4T report (2504.12285). A weight keeps a full-precision latent copy while it trains.

| in the paper                              | here                                             |
|-------------------------------------------|--------------------------------------------------|
| β = mean abs W, T = clip(round(W/β), ±1)  | `absmean`, `ternary_codes`                       |
| s = 127/max abs x per token, round(s·x)   | `absmax_scale`, `int8_codes`                     |
| straight-through estimator                | `straight_through`                               |
| y = (x_q Tᵀ)·β/s                          | `ternary_linear` to train, `packed_linear` after |
| y = (x Tᵀ)·β, activations in 16 bits      | `packed_matmul`                                  |
| BitLinear with sub-norm                   | `BitLinear`, frozen and packed: `PackedLinear`   |

**Layout of packed weights.** `pack` turns codes T (m, n) into bytes (m, P), P = ⌈n/4⌉. A row is cut into four planes of
P columns; byte j holds the j-th code of each, T[j], T[P+j], T[2P+j], T[3P+j], the first in the lowest two bits. A
weight w is stored as w + 1, so that 0, 1, 2 mean -1, 0, 1, and 3 is an error. A row too short for its four planes is
filled up with zero weights (code 1). The bytes j, j+1, ... of one load meet pieces of x that lie side by side: the
layout that the GPU kernel in `kernels/ternary.py` wants. Beside the bytes stands one scale β: W̃ = βT.

Deviations. Both products multiply whole numbers and scale afterwards; their sums stay below 2²⁴, so float32 holds them
exactly and packed inference gives the same bits as training. Under bfloat16 autocast the whole numbers are still
exact, only the sum is rounded; with float16 it can overflow. β and s are float32 or wider always, also after a cast
such as `model.to(torch.bfloat16)`. The official GPU code has another layout, made for its thread order; transformers
packs along the rows and may store 1/β (`bitnet.py` converts). On a GPU the product of `PackedLinear` is the kernel's
(`fast.py`), with the same bits.

β counts as a constant in the gradient. Were it the function of W that the first row makes it, W would get the gradient
mean(∂W̃ ∘ T)·sign(W) even if rounding had none and were not passed straight through.

Cost: m⌈n/4⌉ + 4 bytes a matrix instead of 2mn in bfloat16. Training saves nothing: latent weight and Adam's state stay.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_activations, check_integer, check_loaded, check_matrix, check_wide
from lowrank_ref.core.io import load_tensors, mismatches, refuse
from lowrank_ref.core.layers import Model, WeightLayer, dense, replace_modules, weight_of
from lowrank_ref.kernels import EPS
from lowrank_ref.lowbit import fast


def absmean(W: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
    """Return β, the mean of abs W, at least 1e-5, in float32 or wider. Detached: its gradient does not reach W."""
    return W.detach().to(torch.promote_types(W.dtype, torch.float32)).abs().mean().clamp(min=EPS)


def ternary_codes(W: Float[Tensor, "m n"], beta: Float[Tensor, ""]) -> Float[Tensor, "m n"]:
    """Return T = clip(round(W/β), -1, 1), each -1, 0 or 1, in β's dtype. Halves round to even, so ±β/2 becomes 0.

    Example:
        >>> ternary_codes(torch.tensor([[0.9, -0.2, -2.0, 0.5]]), torch.tensor(1.0)).tolist()
        [[1.0, -0.0, -1.0, 0.0]]
    """
    return (W.to(beta.dtype) / beta).round().clamp(-1, 1)


def absmax_scale(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch 1"]:
    """Return s = 127/max abs x for every token (row), without gradient."""
    return 127 / x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=EPS)


def int8_codes(x: Float[Tensor, "*batch n"], scale: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch n"]:
    """Return round(s·x), whole numbers from -127 to 127 (clipped to int8 as in the paper), in x's dtype."""
    return (x * scale).round().clamp(-128, 127)


def straight_through(x: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return exactly `rounded`, whose gradient is handed to x as if nothing had been rounded."""
    return rounded.detach() + (x - x.detach())


def ternary_linear(x: Float[Tensor, "*batch n"], W: Float[Tensor, "m n"]) -> Float[Tensor, "*batch m"]:
    """Return x̃ W̃ᵀ = (x_q Tᵀ)·β/s. The gradients are dW = dYᵀx̃ and dx = dY W̃, with quantised operands in both.

    Args:
        x: normalised activations, float32 or wider.
        W: latent weight.
    """
    s, beta = absmax_scale(x), absmean(W)
    codes = straight_through(x * s, int8_codes(x, s))
    y = F.linear(codes, straight_through(W.to(beta.dtype) / beta, ternary_codes(W, beta)).to(x.dtype))
    return y * (beta / s).to(x.dtype)


def pack(T: Shaped[Tensor, "m n"]) -> UInt8[Tensor, "m bytes"]:
    """Store four codes a byte, in the layout at the top of this file.

    Raises:
        ValueError: no matrix, an entry that is not -1, 0 or 1, or T is on the meta device.

    Example:
        >>> pack(torch.tensor([[-1, 0, 1, 1, 0]])).tolist()  # planes (-1, 0), (1, 1), (0, 0 filled up), (0, 0)
        [[88, 89]]
    """
    if T.ndim != 2 or 0 in T.shape:
        raise ValueError(f"T: got shape {tuple(T.shape)}, wanted a matrix (m, n) with m, n >= 1")
    check_loaded("T", T)
    bad = int(((T != -1) & (T != 0) & (T != 1)).sum())
    if bad:
        raise ValueError(f"T: got {bad} entries of {T.numel()} outside {{-1, 0, 1}}, wanted none")
    codes = F.pad(T.to(torch.int8), (0, -T.shape[1] % 4)).add(1).to(torch.uint8).unflatten(1, (4, -1))
    return codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6


def unpack(packed: UInt8[Tensor, "m bytes"], n: int) -> Int8[Tensor, "m n"]:
    """Return the codes that `pack` stored for rows of n.

    Raises:
        TypeError, ValueError: n is not an integer that takes this many bytes a row, or packed is no matrix of bytes.
    """
    check_integer("n", n)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != (n + 3) // 4:
        got = f"{packed.dtype} of shape {tuple(packed.shape)}"
        raise ValueError(f"packed, n: got {got} for n = {n}, wanted uint8 (m, ⌈n/4⌉)")
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts[:, None]) & 3).flatten(1)[:, :n].to(torch.int8) - 1


def packed_bytes(m: int, n: int) -> int:
    """Bytes of the packed codes of an (m, n) matrix: m⌈n/4⌉. The scale takes 4 more."""
    return m * ((n + 3) // 4)


def packed_linear(
    x: Float[Tensor, "*batch n"], packed: UInt8[Tensor, "m bytes"], beta: Float[Tensor, ""]
) -> Float[Tensor, "*batch m"]:
    """Return (x_q Tᵀ)·β/s from packed weights: the same bits as `ternary_linear`, without autocast and for n < 132,000.

    This is the definition that a kernel has to meet: it unpacks T and multiplies whole numbers in x's dtype.
    """
    s = absmax_scale(x)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(int8_codes(x, s), unpack(packed, x.shape[-1]).to(x.dtype))
    return y * (beta / s).to(x.dtype)


def packed_matmul(
    x: Float[Tensor, "*batch n"], packed: UInt8[Tensor, "m bytes"], beta: Float[Tensor, ""]
) -> Float[Tensor, "*batch m"]:
    """Return (x Tᵀ)·β from packed weights and activations as they are, not quantised: two bits for the weights only.

    Raises:
        TypeError: x is not floating point. ValueError: its width does not take this many bytes a row.
    """
    check_wide("x", x)
    return F.linear(x, unpack(packed, x.shape[-1]).to(x.dtype)) * beta.to(x.dtype)


class KeepsWide(WeightLayer):
    """Leaves the single numbers named in `wide` in float32 where a cast such as `.half()` would make them narrower.

    A layer has one to three of them, and each scales a whole term of its output.
    """

    wide: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        mine = [getattr(self, name) for name in self.wide]
        kept = {id(t) for t in [*mine, *(t.grad for t in mine)]}

        def gentle(t: Tensor) -> Tensor:
            new = fn(t)
            narrow = id(t) in kept and new.element_size() < min(4, t.element_size())
            return t.to(new.device, torch.float32) if narrow else new

        return super()._apply(gentle, recurse)


class Ternary(KeepsWide):
    """What trained and packed layers share: a norm's gain (or no norm), a product with W̃, and a bias (or none)."""

    def __init__(self, m: int, n: int, gain: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = m, n
        self.gain = None if gain is None else nn.Parameter(gain.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def normalised(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return RMSNorm(x), or x where the layer has no norm, in float32 or wider. This is what gets quantised.

        Raises:
            TypeError, ValueError: x is not floating point of 16 bits or more, or not (..., n).
        """
        check_activations(x, self.in_features)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x if self.gain is None else F.rms_norm(x, (self.in_features,), self.gain.to(x.dtype), EPS)

    def product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x̃ W̃ᵀ for normalised x."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x̃ W̃ᵀ + b, shape (..., m), in x's dtype.

        Raises:
            TypeError, ValueError: x is not floating point of 16 bits or more, or not (..., n).
        """
        y = self.product(self.normalised(x))
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the shape in `print(model)`."""
        return f"{self.in_features} -> {self.out_features}"


class BitLinear(Ternary):
    """A linear layer that computes with ternary weights and int8 activations, and trains a latent weight.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; its weight and bias are copied, the bias stays in full precision.
        sub_norm: RMSNorm with a trained gain before quantising, as the recipe wants; False where a norm comes before.

    Raises:
        TypeError: base is no floating-point linear layer, or computes something else than x Wᵀ + b.
        ValueError: its weight is not finite or not loaded.

    Example:
        >>> import torch
        >>> from lowrank_ref.lowbit import BitLinear
        >>> layer = BitLinear(torch.nn.Linear(8, 4))
        >>> layer(torch.randn(2, 8)).shape, layer.dense_weight().unique().numel() <= 3
        (torch.Size([2, 4]), True)
    """

    def __init__(self, base: nn.Module, *, sub_norm: bool = True) -> None:
        W = weight_of(base).detach()
        if isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward:
            raise TypeError(f"base: got {type(base).__name__} with a forward of its own, wanted one that is x Wᵀ + b")
        check_matrix("base.weight", W)
        m, n = W.shape
        super().__init__(m, n, W.new_ones(n) if sub_norm else None, cast(Tensor | None, base.bias))
        self.weight = nn.Parameter(W.clone(memory_format=torch.contiguous_format))
        self.train(base.training)

    def product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x̃ W̃ᵀ, with straight-through gradients."""
        return ternary_linear(x, self.weight)

    def dense_weight(self) -> Float[Tensor, "m n"]:
        """Return W̃ = βT."""
        beta = absmean(self.weight)
        return ternary_codes(self.weight.detach(), beta) * beta


class PackedLinear(Ternary):
    """A trained `BitLinear`, packed and frozen: buffers `codes` (m, ⌈n/4⌉) of bytes and `beta`. Computes the same.

    A third buffer, `width` (n, 0), takes no memory: its shape keeps the n, which the bytes do not tell, in every file.

    Args:
        layer: the layer to pack; it stays as it is.

    Raises:
        TypeError, ValueError: no `BitLinear`, or its latent weight is not finite.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.lowbit import BitLinear, PackedLinear
        >>> PackedLinear(BitLinear(nn.Linear(8, 4))).codes.shape  # four weights a byte
        torch.Size([4, 2])
    """

    wide = ("beta",)
    codes: Tensor
    beta: Tensor
    rest_trains, weight = False, dense
    width: Tensor

    def __init__(self, layer: BitLinear) -> None:
        if not isinstance(layer, BitLinear):
            raise TypeError(f"layer: got {type(layer).__name__}, wanted BitLinear")
        W = layer.weight.detach()
        check_matrix("layer.weight", W)
        super().__init__(layer.out_features, layer.in_features, layer.gain, layer.bias)
        beta = absmean(W)
        self.register_buffer("codes", pack(ternary_codes(W, beta)))
        self.register_buffer("beta", beta)
        self.register_buffer("width", W.new_empty(self.in_features, 0, dtype=torch.uint8))
        self.requires_grad_(False).train(layer.training)

    def product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x̃ W̃ᵀ from the packed weights, on a GPU by the kernel."""
        return (
            fast.packed_linear(x, self.codes, self.beta) if fast.takes(x) else packed_linear(x, self.codes, self.beta)
        )

    def dense_weight(self) -> Float[Tensor, "m n"]:
        """Return W̃ = βT."""
        return unpack(self.codes, self.in_features) * self.beta


def pack_model(model: Model) -> Model:
    """Replace every `BitLinear` by its packed form, in place, and freeze the model.

    Raises:
        ValueError: the model contains no `BitLinear`.
    """
    return replace_modules(model, "", PackedLinear, accepts=lambda module: isinstance(module, BitLinear))


def load_packed(model: nn.Module, path: str | Path) -> None:
    """Load into a packed model what `save_tensors(model.state_dict(), path, kind="packed")` wrote.

    Raises:
        ValueError: the file is damaged or of another kind, a name or shape differs, or codes are no bytes or hold a 3;
            all are listed and the model is unchanged.
    """
    path = Path(path)
    tensors, state = load_tensors(path, kind="packed"), model.state_dict()
    packed = [f"{name}.codes".lstrip(".") for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    found = {name: tensors[name] for name in packed if name in tensors}
    wrong = (
        f"not codes 0, 1, 2: {n}" for n, c in found.items() if c.dtype != torch.uint8 or bool((c & c >> 1 & 0x55).any())
    )
    refuse(path, [*mismatches(tensors, state), *wrong])
    model.load_state_dict(tensors)
