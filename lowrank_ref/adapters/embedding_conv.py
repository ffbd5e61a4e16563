"""LoRA beyond linear layers: embeddings and convolutions.

Both follow PEFT. For a convolution that is a k×k convolution to r channels and then 1×1; the official code reshapes a
matrix product instead, and its Conv1d and Conv3d fail for k > 1.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.lora import delta_weight, init_factors, lora_scaling
from lowrank_ref.core.bases import Adapter, of_base
from lowrank_ref.core.checks import check_number, check_wide
from lowrank_ref.core.weights import has_own_forward


class LoRAEmbedding(Adapter):
    """A frozen embedding (num, dim) with a trained update s·(BA)ᵀ; A = 0 and B is random, the reverse of `LoRALinear`.

    Args:
        base: `nn.Embedding` itself (subclasses rescale its rows) without `max_norm` (which rewrites them in forward).
        rank: r, 1 <= r <= min(num, dim).
        alpha: α > 0; the scale is `scaling(alpha, rank)`.
        scaling: `lora_scaling` or `rslora_scaling`.
        generator: source of B.

    Raises:
        TypeError, ValueError: another base, or an argument out of range.

    Example:
        >>> import torch
        >>> from lowrank_ref.adapters import LoRAEmbedding
        >>> layer = LoRAEmbedding(torch.nn.Embedding(7, 5), rank=2)
        >>> layer(torch.tensor([0, 6])).shape
        torch.Size([2, 5])
    """

    adapter_names = ("A", "B")
    base: nn.Embedding
    num_embeddings, embedding_dim, padding_idx = map(of_base, ("num_embeddings", "embedding_dim", "padding_idx"))

    def __init__(
        self,
        base: nn.Embedding,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        scaling: Callable[[float, int], float] = lora_scaling,
        generator: torch.Generator | None = None,
    ) -> None:
        if type(base) is not nn.Embedding or base.max_norm is not None:
            raise TypeError(f"base: got {base!r}, wanted nn.Embedding without max_norm")
        check_wide("base.weight", base.weight)
        check_number("alpha", alpha, low=0, open_low=True)
        uniform, zero = init_factors(base.weight.detach(), rank, generator)  # (r, dim), (num, r)
        super().__init__(base)
        self.rank, self.scale = rank, scaling(alpha, rank)
        device = generator.device if generator is not None else uniform.device
        normal = torch.randn(uniform.T.shape, generator=generator, dtype=uniform.dtype, device=device)
        self.A, self.B = nn.Parameter(zero.T.contiguous()), nn.Parameter(normal.to(uniform.device))

    def delta_weight(self) -> Float[Tensor, "num dim"]:
        """Return s·(BA)ᵀ, shape (num, dim)."""
        return delta_weight(self.A, self.B, self.scale).T

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Return the rows of W + s·(BA)ᵀ, shape (..., dim)."""
        return self.combined(self.base(tokens), self.update, tokens)

    def update(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Return the rows of s·(BA)ᵀ, without forming it."""
        rows = F.embedding(tokens, self.A.T, padding_idx=self.base.padding_idx)
        return self.scale * F.linear(rows, self.B)

    def extra_repr(self) -> str:
        """Show shape and rank in `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank {self.rank}"

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A (r, num), B (dim, r) and s: what export to PEFT's format writes."""
        return self.A, self.B, self.scale


class LoRAConv2d(Adapter):
    """A frozen convolution with a trained k×k convolution to r channels followed by a 1×1 convolution, times s.

    Args:
        base: `nn.Conv2d` with groups = 1 (a grouped update cannot be merged).
        rank: r, 1 <= r <= min(out, in·k·k).
        alpha: α > 0; the scale is `scaling(alpha, rank)`.
        dropout: probability in [0, 1) of zeroing an input of the update (not of the base).
        scaling: `lora_scaling` or `rslora_scaling`.
        generator: source of A.

    Raises:
        TypeError, ValueError: another base, one with a `forward` of its own, or an argument out of range.

    Example:
        >>> import torch
        >>> from lowrank_ref.adapters import LoRAConv2d
        >>> layer = LoRAConv2d(torch.nn.Conv2d(3, 4, kernel_size=3, stride=2), rank=2)
        >>> layer(torch.ones(1, 3, 7, 7)).shape, layer.A.shape, layer.B.shape
        (torch.Size([1, 4, 3, 3]), torch.Size([2, 3, 3, 3]), torch.Size([4, 2, 1, 1]))
    """

    adapter_names = ("A", "B")
    base: nn.Conv2d
    in_channels, out_channels, kernel_size = map(of_base, ("in_channels", "out_channels", "kernel_size"))
    stride, padding, dilation, groups = map(of_base, ("stride", "padding", "dilation", "groups"))

    def __init__(
        self,
        base: nn.Conv2d,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        scaling: Callable[[float, int], float] = lora_scaling,
        generator: torch.Generator | None = None,
    ) -> None:
        own = not isinstance(base, nn.Conv2d) or (has_own_forward(base) and "forward" not in vars(base))
        if own or base.groups != 1:  # a subclass that pads by itself, say: the update would not
            raise TypeError(f"base: got {base!r}, wanted nn.Conv2d with groups=1 and no forward of its own")
        check_wide("base.weight", base.weight)
        check_number("alpha", alpha, low=0, open_low=True)
        check_number("dropout", dropout, low=0, high=1 - 1e-9)
        A, B = init_factors(base.weight.detach().flatten(1), rank, generator)
        super().__init__(base)
        self.rank, self.scale = rank, scaling(alpha, rank)
        self.dropout = nn.Dropout(dropout).train(base.training)
        self.A = nn.Parameter(A.view(rank, *base.weight.shape[1:]))
        self.B = nn.Parameter(B[:, :, None, None].clone())

    def delta_weight(self) -> Float[Tensor, "out in_ k1 k2"]:
        """Return the update of the kernel, shape (out, in, k, k)."""
        return delta_weight(self.A.flatten(1), self.B.flatten(1), self.scale).view_as(self.base.weight)

    def forward(self, x: Float[Tensor, "*batch in_ h w"]) -> Float[Tensor, "*batch out h2 w2"]:
        """Return base(x) + s·B(A(dropout(x))); padding, stride and dilation belong to A."""
        return self.combined(self.base(x), self.update, x)

    def update(self, x: Float[Tensor, "*batch in_ h w"]) -> Float[Tensor, "*batch out h2 w2"]:
        """Return s·B(A(dropout(x)))."""
        return self.scale * F.conv2d(self.base._conv_forward(self.dropout(x), self.A, None), self.B)

    def extra_repr(self) -> str:
        """Show the rank in `print(model)`."""
        return f"rank {self.rank}"

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A (r, in, k, k), B (out, r, 1, 1) and s: what export to PEFT's format writes."""
        return self.A, self.B, self.scale
