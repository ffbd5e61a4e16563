r"""SLTrain: pretrain with W = s·BA + S, where S is sparse with a random support that is drawn once and never changes.

The product is cheap but cannot leave rank r; a few trained entries at random places give W full rank. Han et al.,
"SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", arXiv 2406.02214v2.

| in the paper                                        | here                                  |
|-----------------------------------------------------|---------------------------------------|
| support I: δmn places, uniform at random, fixed     | `random_support`                      |
| A random, B = 0, V random                           | `init_parameters`                     |
| S: the values V at the places I, zero elsewhere     | `sparse_matrix`                       |
| W = s·BA + S, s = α/r                               | `dense_weight`                        |
| backward: ∇B, ∇A and ∇V from ∇W = dYᵀX              | `parameter_gradients`                 |
| only x, B, A, I and V are stored for backward       | `product`, `product_gradients`        |
| parameters and memory                               | `parameter_count`, `training_bytes`   |

Letters: the paper's V is `values` (k,), its I is `support` (k,), flat places i·n + j in rising order; δ is `density`.
A (r, n), B (m, r), s = α/r is `scale`.

Deviations. A bias is drawn like `nn.Linear`'s, in the official code from ±1/√m. Its trainable scale tanh(θ) is left
out, and so is its dropout argument, which it ignores. rank = 0 (only S) and density = 0 (only BA) are allowed. 8-bit
moments and per-layer updates come from `lowrank_ref.optimizers`, whose `GaLoreAdamW8bit` without a rank is plain AdamW.

Cost per layer: r(m+n) + ⌊δmn⌋ trained numbers (+m), Adam state twice that, 8 bytes of index a value. FLOPs on top of a
dense layer's: 2rmn in forward, 6rmn in backward; one (m, n) temporary at a time in both. DDP sends rank 0's support to
all. FSDP2 shards A, B and the values but not the support: start every process with the same seed.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_number, check_rank
from lowrank_ref.core.layers import WeightLayer, dense, is_conv1d, linear_like, weight_of
from lowrank_ref.core.registry import PaperInfo


def random_support(m: int, n: int, density: float, generator: torch.Generator | None = None) -> Int64[Tensor, " k"]:
    """Draw ⌊δmn⌋ different places of an (m, n) matrix, uniformly, as sorted flat indices i·n + j.

    Raises:
        TypeError, ValueError: m or n is no integer >= 1, or density δ is not in [0, 1].
    """
    check_integer("m", m, low=1)
    check_integer("n", n, low=1)
    check_number("density", density, low=0, high=1)
    device = generator.device if generator is not None else None
    return torch.randperm(m * n, generator=generator, device=device)[: int(density * (m * n))].sort().values


def init_parameters(
    m: int, n: int, rank: int, nonzeros: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"], Float[Tensor, " k"]]:
    """Return A and values from U(-1/√n, 1/√n), as `nn.Linear` draws its weight, and B = 0. So W = S at the start."""
    device = generator.device if generator is not None else None
    drawn = (torch.rand(*shape, generator=generator, device=device) for shape in ((rank, n), (nonzeros,)))
    A, values = ((2 * u - 1) / math.sqrt(n) for u in drawn)
    return A, torch.zeros(m, rank, device=device), values


def sparse_matrix(
    values: Float[Tensor, " k"], support: Int64[Tensor, " k"], shape: tuple[int, int]
) -> Float[Tensor, "m n"]:
    """Return S, dense, with the values at their places and zeros elsewhere."""
    return values.new_zeros(shape[0] * shape[1]).index_add(0, support, values).view(shape)


def dense_weight(
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    values: Float[Tensor, " k"],
    support: Int64[Tensor, " k"],
    scale: float,
) -> Float[Tensor, "m n"]:
    """Return W = s·BA + S: the product, and the values added at their places. One (m, n) matrix is made, not two."""
    W = (scale * B) @ A
    W.view(-1).index_add_(0, support, values)  # in place is safe: the product's backward does not need its result
    return W


def parameter_gradients(
    G: Float[Tensor, "m n"],
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    support: Int64[Tensor, " k"],
    scale: float,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"], Float[Tensor, " k"]]:
    """Return the gradients of A, B and the values from that of W: s·BᵀG, s·GAᵀ, and G at the places of the support."""
    return (scale * B).T @ G, G @ (scale * A).T, G.reshape(-1)[support]


def product(x: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scale: float) -> Tensor:
    """Return x Wᵀ, shape (..., m), with W = s·BA + S. Backward keeps the arguments, none of which is as large as W."""
    return F.linear(x, dense_weight(A, B, values, support, scale))


def product_gradients(
    dY: Tensor, x: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, A, B and the values. W and its gradient G are never alive together."""
    dx = dY @ dense_weight(A, B, values, support, scale)
    G = dY.reshape(-1, dY.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return dx, *parameter_gradients(G, A, B, support, scale)


# One opaque operator each for forward and backward. With an autograd.Function, torch.compile would see that backward
# builds the same W as forward, and keep it: the memory that this method saves.
_product = torch.library.custom_op("lowrank_ref::sltrain_product", product, mutates_args=())
_gradients = torch.library.custom_op("lowrank_ref::sltrain_gradients", product_gradients, mutates_args=())
_product.register_fake(lambda x, A, B, values, support, scale: x.new_empty(*x.shape[:-1], len(B)))
_gradients.register_fake(lambda dY, *tensors: tuple(map(torch.empty_like, tensors[:4])))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.scale = inputs[-1]


def _backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(dY, *ctx.saved_tensors, ctx.scale), None, None


_product.register_autograd(_backward, setup_context=_save)


class SLTrainLinear(WeightLayer):
    """A linear layer with the weight s·BA + S, all of it trained, in the place of an `nn.Linear`.

    Args:
        in_features, out_features: n and m.
        rank: r, 0 <= r <= min(m, n); 0 leaves S alone.
        density: δ in [0, 1], the share of entries in S; 0 leaves BA alone, which with B = 0 cannot start in a deep
            network without biases: every gradient is zero.
        alpha: α > 0; the scale is α/r. The paper's α shrinks with the model: 32, 16, 16, 8, 8 from 60M to 7B.
        bias: whether to add one.
        generator: source of everything random.

    Raises:
        TypeError, ValueError: an argument out of range.

    Example:
        >>> from lowrank_ref.pretraining import SLTrainLinear
        >>> layer = SLTrainLinear(8, 6, rank=2, density=0.25)
        >>> layer.A.shape, layer.B.shape, len(layer.values)
        (torch.Size([2, 8]), torch.Size([6, 2]), 12)
    """

    support: Tensor
    bias: nn.Parameter | None
    is_product, weight = True, dense

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 128,
        density: float = 0.03,
        alpha: float = 32.0,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        m, n = out_features, in_features
        support = random_support(m, n, density, generator)
        if rank != 0:
            check_rank(rank, (m, n))
        check_number("alpha", alpha, low=0, open_low=True)
        self.in_features, self.out_features, self.rank = n, m, rank
        self.kind: type[nn.Module] = nn.Linear
        self.scale = alpha / rank if rank else 1.0
        self.register_buffer("support", support)
        self.A, self.B, self.values = map(nn.Parameter, init_parameters(m, n, rank, len(support), generator))
        drawn = nn.Parameter(init_parameters(m, n, 0, m, generator)[2]) if bias else None
        self.register_parameter("bias", drawn)

    @classmethod
    def from_linear(cls, base: nn.Module, **options: Any) -> "SLTrainLinear":
        """Return a fresh layer in the place of `base`: same shape, device and dtype, a copy of its bias, a new weight.

        Args:
            base: `nn.Linear` or GPT-2's `Conv1D`; its weight is thrown away, since no frozen part could hold it.
            options: rank, density, alpha, generator.
        """
        W = weight_of(base)
        layer = cls(W.shape[1], W.shape[0], **options, bias=False).to(W.device, W.dtype)
        if isinstance(base.bias, Tensor):
            layer.bias = nn.Parameter(base.bias.detach().clone())
        layer.kind = type(base) if is_conv1d(base) else nn.Linear
        return layer.train(base.training)

    def dense_weight(self) -> Float[Tensor, "m n"]:
        """Return W = s·BA + S."""
        return dense_weight(self.A, self.B, self.values, self.support, self.scale)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x Wᵀ + b, in the dtype of autocast where it is on."""
        tensors = [x, self.A, self.B, self.values]
        if torch.is_autocast_enabled(x.device.type):  # autocast does not look into an operator
            tensors = [t.to(torch.get_autocast_dtype(x.device.type)) for t in tensors]
        y = _product(*tensors, self.support, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """Return a plain layer with the weight W, for inference: `nn.Linear`, or `Conv1D` if that was replaced."""
        return linear_like(self.kind, self.dense_weight(), self.bias).train(self.training)


def parameter_count(m: int, n: int, rank: int, density: float) -> int:
    """Return r(m+n) + ⌊δmn⌋, the trained numbers of a layer without bias."""
    return rank * (m + n) + int(density * (m * n))


def training_bytes(parameters: int, nonzeros: int = 0, *, weight: int = 2, moment: float = 2) -> float:
    """Return the bytes of weights, Adam's two moments and the int64 support, without gradients and activations.

    Of the trained `parameters`, `nonzeros` need an index. A number takes `weight` bytes and each of its two moments
    `moment`; 2 is bfloat16, as in the paper's estimate.
    """
    return parameters * (weight + 2 * moment) + 8 * nonzeros


PAPER = PaperInfo(
    key="sltrain",
    part="pretraining",
    name="SLTrain",
    title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    authors=(
        *("Andi Han", "Jiaxiang Li", "Wei Huang", "Mingyi Hong"),
        *("Akiko Takeda", "Pratik Jawanpuria", "Bamdev Mishra"),
    ),
    arxiv="2406.02214v2",
    summary="Pretrain with a product of two thin matrices plus a few trained entries at fixed random places.",
    use_when="you pretrain and weights with their optimizer state must shrink together",
    instead={"galore": "the weights fit and only Adam's state does not"},
    needs=("lora", "galore"),
    official_code="andyjm3/SLTrain",
    code_licence="Apache-2.0",
    equations={"support I": "random_support", "W = s·BA + S": "dense_weight", "∇B, ∇A, ∇V": "parameter_gradients"},
    deviations=("the bias is nn.Linear's", "no trainable scale", "rank = 0 and density = 0 are allowed"),
    aliases=("sparse plus low-rank", "random sparse support"),
    status="draft",
    verified="2026-11-24",
)
