r"""ALLoRA: LoRA without dropout and scale, whose gradients shrink, row by row, as the update grows.

Huang and Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692v1, section 4.2.

| in the paper                                     | here                                                   |
|--------------------------------------------------|--------------------------------------------------------|
| 1/√(x + 1/c₀²) (figure 6)                        | `adaptive_factor`                                      |
| cᵢ = 1/√(norm of row i of BA + 1/c₀²) (4.2)      | `row_factors`, `update_row_norms`                      |
| f̃ = f, g̃ᵢ = cᵢ gᵢ; the input's g stays (4.2)   | `rescaled_gradient` of BA; without BA `allora_update`  |
| the family: by outputs, adaptive scale (4.3)     | `allora_family`: `output_factors`, `asf_update`        |
| E[loss] under dropout (3.1), proposition 1 (3.3) | `allora_flaws`: `rank_dropout_penalty`, `ripple_bound` |

Letters: W (m, n) is the paper's n₁ × n₂; A (r, n), B (m, r); c₀ is the paper's η, here `boost`, the factor of
a row that is zero; the optimizer's rate is the paper's base rate. The norm is not squared: c falls as 1/√norm.

Deviations. A is drawn as in LoRA; the paper does not say how. c is computed with the forward, in float32 or wider, from
an r × r Gram matrix; the paper's listing makes BA. The repository that the paper names could not be read: this file is
held to the listing in its appendix F.

The update is an ordinary LoRA of scale 1 and is merged and exported as one. Training is not descent on a loss: there is
no double backward, and line searches, gradient checks and clipping see rescaled gradients.

Cost per layer: as LoRA, r(m+n) trained numbers, Adam 2r(m+n); m factors for each forward, O((m+n)r²); one thin product
more in backward, 2mr FLOPs a token.
"""

import contextlib
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowrank_ref.adapters.lora import delta_weight, init_factors, lora_update
from lowrank_ref.core.checks import check_number
from lowrank_ref.core.layers import AdaptedLinear, weight_of
from lowrank_ref.core.products import computing_dtype, lora_linear
from lowrank_ref.core.registry import PaperInfo


def check_boost(boost: float) -> None:
    """Require c₀ in [1e-6, 1e6]: 1/c₀² has to be a number in float32.

    Raises:
        TypeError, ValueError: anything else.
    """
    check_number("boost", boost, low=1e-6, high=1e6)


def adaptive_factor(size: Float[Tensor, "*shape"], boost: float) -> Float[Tensor, "*shape"]:
    """Return 1/√(size + 1/c₀²): c₀ at size 0, falling, and about 1/√size where size is far above 1/c₀².

    Example:
        >>> adaptive_factor(torch.tensor([0.0, 0.75, 99.75]), 2.0).tolist()
        [2.0, 1.0, 0.10000000149011612]
    """
    return (size + boost**-2).rsqrt()


@torch.no_grad()
def update_row_norms(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> Float[Tensor, " m"]:
    """Return the norms of the rows of BA as √(bᵢ·AAᵀ·bᵢ), without BA, in float32 or wider also under autocast.

    The error is eps·κ(A)² of the norm at worst, where a row lies along the smallest singular vector of A.

    Example:
        >>> update_row_norms(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]])).tolist()
        [10.0, 0.0]
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    own = contextlib.nullcontext() if A.is_meta else torch.autocast(A.device.type, enabled=False)
    with own:
        A, B = A.to(wide), B.to(wide)
        return ((B @ (A @ A.T)) * B).sum(dim=1).clamp(min=0).sqrt()


def row_factors(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], boost: float) -> Float[Tensor, " m"]:
    """Return cᵢ = 1/√(‖(BA)ᵢ‖ + 1/c₀²), one for each output, a constant in backward (section 4.2).

    Example:
        >>> row_factors(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.15], [0.0]]), 2.0).tolist()
        [1.0, 2.0]
    """
    return adaptive_factor(update_row_norms(A, B), boost)


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, delta: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        return delta.view_as(delta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        (c,) = ctx.saved_tensors
        return c[:, None] * G, None


def rescaled_gradient(delta: Float[Tensor, "m n"], factors: Float[Tensor, " m"]) -> Float[Tensor, "m n"]:
    """Return delta as it is; row i of its gradient is multiplied with cᵢ on the way back (section 4.2).

    x @ rescaled_gradient(B @ A, c).T is ALLoRA by its definition: x gets the gradient of plain LoRA.

    Example:
        >>> B, A = torch.ones(2, 1, requires_grad=True), torch.tensor([[3.0, 4.0]])
        >>> rescaled_gradient(B @ A, torch.tensor([1.0, 10.0])).sum().backward()
        >>> B.grad.tolist()
        [[7.0], [70.0]]
    """
    return cast(Tensor, _Rescaled.apply(delta, factors.detach().to(delta.dtype)))


class _RescaledLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, c: Tensor, W: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        t = rows @ A.T
        ctx.save_for_backward(x, A, B, c, t, W)
        out = t @ B.T if W is None else F.linear(rows, W.to(x.dtype), bias).addmm_(t, B.T)
        return out.view(*x.shape[:-1], len(B))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, c, t, W = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), dY.reshape(-1, len(B)).to(A.dtype)
        if c.ndim == 1:  # diag(c) goes to B, which is thinner than the gradient
            dA, dB = (g @ (c[:, None] * B)).T @ rows, c[:, None] * (g.T @ t)
        else:
            scaled = c.reshape(g.shape) * g
            dA, dB = (scaled @ B).T @ rows, scaled.T @ t
        dx, u = None, g @ B
        if ctx.needs_input_grad[0]:
            dx = (u @ A if W is None else (g @ W.to(g.dtype)).addmm_(u, A)).view(x.shape)
        return dx, dA, dB, None, None, None


def allora_update(
    x: Float[Tensor, "*batch n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], factors: Float[Tensor, "*rows m"]
) -> Float[Tensor, "*batch m"]:
    """Return B(Ax) for every row, without BA. Of its gradient g, A and B get c ⊙ g, and x gets g.

    Args:
        x: activations.
        A, B: trained factors.
        factors: c, (m,) or of the output's shape; a constant.

    Products are computed in the dtype of autocast where it is on, else in that of x. A double backward raises a
    RuntimeError.
    """
    parts = (t.to(computing_dtype(x)) for t in (x, A, B, factors.detach()))
    return cast(Tensor, _RescaledLoRA.apply(*parts, None, None))


class ALLoRALinear(AdaptedLinear):
    """A frozen linear layer with a trained update BA, whose gradients are rescaled row by row.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, 1 <= r <= min(m, n).
        boost: c₀, in [1e-6, 1e6]: what multiplies the gradients of a row that has not moved.
        generator: source of A.

    Subclasses with other factors override `gradient_factors`.

    Raises:
        TypeError, ValueError: base is no floating-point linear layer; rank or boost out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import ALLoRALinear
        >>> layer = ALLoRALinear(nn.Linear(4, 3), rank=2, boost=2.0)
        >>> layer.delta_weight().abs().max().item(), layer.gradient_factors().tolist()
        (0.0, [2.0, 2.0, 2.0])
    """

    adapter_names = ("A", "B")

    def __init__(
        self, base: nn.Module, rank: int = 8, *, boost: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        W = weight_of(base).detach()
        A, B = init_factors(W, rank, generator)
        check_boost(boost)
        super().__init__(base)
        self.rank, self.boost = rank, float(boost)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return BA, with rescaled gradients."""
        delta = delta_weight(self.A, self.B, 1.0)
        return rescaled_gradient(delta, self.gradient_factors()) if torch.is_grad_enabled() else delta

    def gradient_factors(self, x: Float[Tensor, "*batch n"] | None = None) -> Float[Tensor, "*rows m"]:
        """Return c, what multiplies the gradients of A and B; relatives may read x, ALLoRA does not."""
        return row_factors(self.A, self.B, self.boost)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return B(Ax), with rescaled gradients."""
        if not torch.is_grad_enabled():
            return lora_update(x, self.A, self.B, 1.0)
        return allora_update(x, self.A, self.B, self.gradient_factors(x))

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return base(x) + B(Ax): one function, as LoRA's, where both read the same x and the base is frozen."""
        base: Any = self.base
        if not self.as_one(x) or any(p.requires_grad for p in base.parameters()):
            return super().forward(x)
        W, bias = weight_of(base), base.bias
        if not torch.is_grad_enabled():
            return lora_linear(x, W, bias, self.A, self.B, 1.0)
        dtype = computing_dtype(x)
        parts = (t.to(dtype) for t in (x, self.A, self.B, self.gradient_factors(x).detach()))
        return cast(Tensor, _RescaledLoRA.apply(*parts, W, None if bias is None else bias.to(dtype)))

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B, 1), what export to PEFT's format writes: trained on there, it is plain LoRA."""
        return self.A, self.B, 1.0


PAPER = PaperInfo(
    key="allora",
    part="adapters",
    name="ALLoRA",
    title="ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    authors=("Hai Huang", "Randall Balestriero"),
    arxiv="2410.09692v1",
    summary="Drop LoRA's dropout and scale, and let each row's gradients shrink as its update grows.",
    use_when="you train with plain SGD, cannot clip, and the rate may be too large",
    instead={"lora": "you train with Adam, or can clip gradients"},
    needs=("lora",),
    official_code="rbalestr-lab/allora",
    code_licence="unknown: the repository could not be read",
    equations={
        "figure 6": "adaptive_factor",
        "section 4.2, norms": "update_row_norms",
        "section 4.2, factors": "row_factors",
        "section 4.2, gradients": "rescaled_gradient",
    },
    deviations=("row norms from a Gram matrix", "A is uniform, as LoRA's code draws it"),
    aliases=("adaptive learning rate LoRA", "ALLoRA-OD", "ASF-LoRA", "dropout-free LoRA"),
    status="draft",
    verified="2026-11-29",
    layers={"ALLoRALinear": ALLoRALinear},
)
