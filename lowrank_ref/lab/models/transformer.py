"""Transformers in LLaMA's style, causal on text and non-causal on pictures."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "Attention", "Block", "SwiGLU", "ViT", "llama_shape"]


class Attention(nn.Module):
    """Multi-head attention with four separate bias-free matrices `q`, `k`, `v`, `o`, each (dim, dim).

    Raises:
        ValueError: heads do not divide dim.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, wanted a divisor of dim = {dim}")
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Mix places of x (batch, length, dim)."""
        batch, length, dim = x.shape
        q, k, v = (
            f(x).view(batch, length, self.heads, dim // self.heads).transpose(1, 2)  # (batch, heads, length, head)
            for f in (self.q, self.k, self.v)
        )
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).reshape(batch, length, dim))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), three bias-free matrices."""

    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.gate = nn.Linear(dim, ffn, bias=False)
        self.up = nn.Linear(dim, ffn, bias=False)
        self.down = nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every place of x (batch, length, dim) by itself."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """LLaMA's block: x + attn(norm x), then x + mlp(norm x)."""

    def __init__(self, dim: int, heads: int, ffn: int, *, causal: bool):
        super().__init__()
        self.attn_norm = nn.RMSNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, causal=causal)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, ffn)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Transform x (batch, length, dim)."""
        x = x + self.attn(self.attn_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A causal language model with LLaMA's blocks, without biases.

    The matrices of block i are `blocks.i.attn.q`, `.k`, `.v`, `.o`, `blocks.i.mlp.gate`, `.up`, `.down`.

    Args:
        vocab_size: number of tokens.
        dim: width of the residual stream, divisible by heads.
        layers: number of blocks.
        heads: attention heads; with rope, dim / heads must be even.
        length: most tokens in one window.
        ffn: hidden width of the MLP; default 8/3 dim, rounded up to a multiple of 8.
        rope: rotary positions; False learns one vector per place instead.
        tie: use the embedding as output matrix too.
        generator: draws the weights: normal with deviation 0.02, and 0.02 / sqrt(2 layers) for the matrices `o` and
            `down` that write into the residual stream (GPT-2's rule).
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        length: int,
        ffn: int | None = None,
        rope: bool = True,
        tie: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(vocab_size, dim)
        self.places = None if rope else nn.Parameter(torch.zeros(length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ffn or _default_ffn(dim), causal=True) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        if rope:
            cos, sin = _rotation_table(length, dim // heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        _normal_init(self, layers, generator)

    def forward(self, tokens: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
        """Return the logits of the next token at every place.

        Raises:
            ValueError: more tokens than `length`.
        """
        n = tokens.shape[1]
        if n > self.length:
            raise ValueError(f"tokens: got {n} in a row, wanted at most length = {self.length}")
        x = self.embed(tokens)
        if self.places is not None:
            x, rotation = x + self.places[:n], None
        else:
            rotation = (self.cos[:n], self.sin[:n])
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))

    def loss(self, tokens: Int64[Tensor, "batch length"], targets: Int64[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Return the mean cross-entropy in nats per token; exp of it is the perplexity."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(
        self,
        tokens: Int64[Tensor, "batch length"],
        steps: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int64[Tensor, "batch longer"]:
        """Continue `tokens` by `steps` sampled tokens; only the last `length` tokens are seen."""
        for _ in range(steps):
            logits = self(tokens[:, -self.length :])[:, -1] / temperature
            new = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens


class ViT(nn.Module):
    """A vision transformer: patches as words, learned places, non-causal blocks, the mean of all places to `head`.

    Args:
        image: side of the square picture in pixels, divisible by patch.
        patch: side of a patch.
        dim: width, divisible by heads.
        layers: number of blocks.
        heads: attention heads.
        classes: number of logits.
        channels: channels of the picture.
        generator: draws the weights, as in GPT.

    Raises:
        ValueError: patch does not divide image, or heads do not divide dim.
    """

    def __init__(
        self,
        image: int,
        patch: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        classes: int,
        channels: int = 1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if image % patch:
            raise ValueError(f"patch: got {patch}, wanted a divisor of image = {image}")
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, dim, bias=False)
        self.places = nn.Parameter(torch.zeros((image // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, _default_ffn(dim), causal=False) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes, bias=False)
        _normal_init(self, layers, generator)

    def forward(self, x: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "batch classes"]:
        """Map pictures to logits."""
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (batch, patches, channels * patch^2)
        x = self.embed(patches) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def llama_shape(name: str) -> dict[str, int]:
    """Return the sizes that low-rank pretraining papers use, ready for `GPT(**llama_shape("60M"), length=256)`.

    Args:
        name: "60M", "130M", "350M" or "1B" (58.1, 134.1, 368.0 and 1,339.1 million parameters, untied).

    Raises:
        ValueError: another name.
    """
    shapes = {
        "60M": (512, 1376, 8, 8),
        "130M": (768, 2048, 12, 12),
        "350M": (1024, 2736, 24, 16),
        "1B": (2048, 5461, 24, 32),
    }
    if name not in shapes:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(shapes)}")
    return dict(zip(("dim", "ffn", "layers", "heads"), shapes[name]), vocab_size=32_000)


def _default_ffn(dim: int) -> int:
    return math.ceil(dim * 8 / 3 / 8) * 8


def _rotation_table(length: int, head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head / 2) of place p times frequency 10000^(-2j / head)."""
    if head % 2:
        raise ValueError(f"dim / heads: got {head}, wanted an even number for rotary positions")
    frequency = 10_000.0 ** (-torch.arange(0, head, 2) / head)
    angle = torch.outer(torch.arange(length), frequency)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_j, x_{j + head/2}) of x (batch, heads, length, head) by the angle of their place."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@torch.no_grad()
def _normal_init(model: nn.Module, layers: int, generator: torch.Generator | None) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # norms keep their ones
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            parameter.normal_(0, 0.02 / math.sqrt(2 * max(layers, 1)) if residual else 0.02, generator=generator)
