"""Low-precision training: weights, activations, gradients and optimizer states in narrow formats, each by choice.

Hao et al., "Low-Precision Training of Large Language Models: Methods, Challenges, and Opportunities", 2505.01043v1.
A survey defines no algorithm: here is one representative of each family, in one interface.

| what the survey's families share                 | here                                                        |
|--------------------------------------------------|-------------------------------------------------------------|
| fixed point and integer, float, block formats    | `GridFormat`, `TableFormat`, `FORMATS` in `number_formats`  |
| to the nearest, or stochastic                    | `nearest`, `stochastic` there                               |
| one scale for a tensor, a row, a block           | `Quantizer`, `QUANTIZERS`, `DelayedScale` in `quantizers`   |
| Y = XWᵀ, dX = dY·W, dW = dYᵀX, each quantised     | `quantized_linear`, `Recipe`, `QuantLinear`, `RECIPES`      |
| quantisation-aware training, straight-through    | `fake_quantize`, `learned_step` in `quantization_aware`     |
| loss scaling                                     | `LossScale` in `loss_scale`                                 |
| Hadamard rotation of both operands               | `rotate_blocks` in `rotations`                              |
| narrow weights and moments, Kahan summation      | `NarrowAdamW` in `narrow_adam`                              |
| real 8-bit products                              | `float8_product`, `int8_product` in `eight_bit_products`    |

Letters: X (t, n) inputs, a row a token; W (m, n); Y (t, m); s a scale, Q rounding, hats are quantised tensors.

Deviations. Everything is emulated: numbers are rounded and stored as float32, so nothing gets smaller or faster.
Products sum in float32 (tensor cores may sum in less). A quantiser's input is never clipped by a learned range but
for `learned_step`. Absmax scales divide by s; libraries multiply by 1/s, which can differ in the last bit.

Cost of an emulated layer: three products as ever, and about ten passes in float64 over each operand. Works under DDP.
No second derivatives. Under `torch.compile` a graph breaks at the product. Stochastic rounding draws from the layer's
generator, so processes that hold the same weights must hold equal generators.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_ref.core.checks import check_activations, check_integer, check_matrix, check_names
from lowrank_ref.core.layers import WeightLayer, weight_of
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.lowbit.quantizers import QUANTIZERS, Quantizer
from lowrank_ref.lowbit.rotations import rotate_blocks

#: The three products of a linear layer.
PRODUCTS = ("Y", "dX", "dW")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which operands of which products are quantised, and how. None leaves an operand as it is.

    Attributes:
        activation, weight, gradient: quantisers of X, W and dY.
        products: the products that take quantised operands, of `PRODUCTS`.
        reduced: each product quantises its operands anew, blocks along the axis over which it sums: hardware needs
            it for row and MX scales. False: X̂, Ŵ and the rounded dY are made once, blocks along rows, and used in all.
        rotation: width of the Hadamard blocks in dX and dW, 0 for none; asks for reduced.
        random_signs: whether each rotation draws signs of its own.

    Raises:
        TypeError, ValueError: an unknown product, or a rotation that is no power of two or not reduced.

    Example:
        >>> from lowrank_ref.lowbit import QUANTIZERS, Recipe
        >>> len(Recipe(weight=QUANTIZERS["int8 row"]).products)
        3
    """

    activation: Quantizer | None = None
    weight: Quantizer | None = None
    gradient: Quantizer | None = None
    products: tuple[str, ...] = PRODUCTS
    reduced: bool = False
    rotation: int = 0
    random_signs: bool = False

    def __post_init__(self) -> None:
        check_names("products", self.products, PRODUCTS)
        check_integer("rotation", self.rotation, low=0)
        if self.rotation and (self.rotation & (self.rotation - 1) or not self.reduced):
            raise ValueError(f"rotation: got {self.rotation}, wanted a power of two and reduced=True")


def _quantized(x: Tensor, quantizer: Quantizer | None, generator: torch.Generator | None) -> Tensor:
    return x if quantizer is None else quantizer(x, generator=generator)


def _product(A: Tensor, B: Tensor, a: Quantizer | None, b: Quantizer | None, recipe: Recipe, generator: Any) -> Tensor:
    """A·Bᵀ for A (p, k), B (q, k), both quantised along k, behind a rotation if the recipe has one."""
    if recipe.rotation:
        signs = None
        if recipe.random_signs:
            place = A.device if generator is None else generator.device
            signs = torch.randint(0, 2, (recipe.rotation,), generator=generator, device=place).to(A) * 2 - 1
        A, B = (rotate_blocks(M, recipe.rotation, signs) for M in (A, B))
    return _quantized(A, a, generator) @ _quantized(B, b, generator).mT


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, recipe: Recipe, generator: torch.Generator | None) -> Tensor:
        x_hat = _quantized(x, recipe.activation, generator)
        W_hat = _quantized(W, recipe.weight, generator)
        ctx.recipe, ctx.generator = recipe, generator
        once = [not recipe.reduced and name in recipe.products for name in ("dX", "dW")]
        ctx.save_for_backward(x_hat if once[1] else x, W_hat if once[0] else W)
        return x_hat @ W_hat.mT if "Y" in recipe.products else x @ W.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> Any:
        (x, W), recipe, generator = ctx.saved_tensors, ctx.recipe, ctx.generator
        if not recipe.reduced:
            G = _quantized(dY, recipe.gradient, generator)
            dX, dW = (G if name in recipe.products else dY for name in ("dX", "dW"))
            return dX @ W, dW.mT @ x, None, None
        found = []
        for name, A, B, b in (("dX", dY, W.mT, recipe.weight), ("dW", dY.mT, x.mT, recipe.activation)):
            inside = name in recipe.products
            found.append(_product(A, B, recipe.gradient, b, recipe, generator) if inside else A @ B.mT)
        return (*found, None, None)


def quantized_linear(
    x: Float[Tensor, "*batch t n"],
    W: Float[Tensor, "*batch m n"],
    recipe: Recipe,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch t m"]:
    """Return X̂Ŵᵀ; backward, dX = Q(dY)·Ŵ and dW = Q(dY)ᵀX̂. With axes before the last two, many layers at once.

    Args:
        x: inputs, a row a token. W: weight; the same leading axes, or none in both.
        recipe: what is quantised.
        generator: for stochastic rounding and random signs; None is PyTorch's global one.

    Raises:
        ValueError: leading axes that differ.
    """
    if x.shape[:-2] != W.shape[:-2] or x.shape[-1] != W.shape[-1]:
        raise ValueError(f"W: got shape {tuple(W.shape)}, wanted (..., m, n) for x of shape {tuple(x.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        return _QuantizedLinear.apply(x, W, recipe, generator)


class QuantLinear(WeightLayer):
    """A linear layer whose three products are quantised by a recipe. The weight itself stays in full precision.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; its weight and bias are copied, the bias is not quantised.
        recipe: what is quantised.
        generator: for stochastic rounding; its state is not part of the layer's.

    Raises:
        TypeError: base is no floating-point linear layer, or computes something else than x Wᵀ + b.
        ValueError: its weight is not finite or not loaded.

    Example:
        >>> import torch
        >>> from lowrank_ref.lowbit import RECIPES, QuantLinear
        >>> layer = QuantLinear(torch.nn.Linear(8, 4), RECIPES["int8"])
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, base: nn.Module, recipe: Recipe, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        W = weight_of(base).detach()
        if isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward:
            raise TypeError(f"base: got {type(base).__name__} with a forward of its own, wanted one that is x Wᵀ + b")
        check_matrix("base.weight", W)
        self.out_features, self.in_features = W.shape
        self.recipe, self.generator = recipe, generator
        self.weight = nn.Parameter(W.clone(memory_format=torch.contiguous_format))
        bias = cast(Tensor | None, base.bias)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.train(base.training)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return X̂Ŵᵀ + b in x's dtype; products in float32 or wider.

        Raises:
            TypeError, ValueError: x is not floating point of 16 bits or more, or not (..., n).
        """
        check_activations(x, self.in_features)
        wide = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        rows = x.reshape(-1, self.in_features).to(wide)
        y = quantized_linear(rows, self.weight.to(wide), self.recipe, generator=self.generator)
        y = y.view(*x.shape[:-1], self.out_features)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def dense_weight(self) -> Float[Tensor, "m n"]:
        """Return Ŵ, the weight that Y is computed with."""
        quantized = "Y" in self.recipe.products and self.recipe.weight is not None
        return self.recipe.weight(self.weight) if quantized else self.weight.detach()  # type: ignore[misc]

    def extra_repr(self) -> str:
        """Show the shape in `print(model)`."""
        return f"{self.in_features} -> {self.out_features}"


def _recipe(x: str, w: str, g: str, *, random: bool = False, **options: Any) -> Recipe:
    gradient = QUANTIZERS[g].at_random() if random else QUANTIZERS[g]
    return Recipe(activation=QUANTIZERS[x], weight=QUANTIZERS[w], gradient=gradient, **options)


#: Name -> recipe of a linear layer, after libraries and papers; Jetfire and NVFP4 round dY at random.
RECIPES: dict[str, Recipe] = {
    "exact": Recipe(),
    "bf16": _recipe("bf16", "bf16", "bf16"),
    "int8": _recipe("int8 row", "int8 row", "int8 row", reduced=True),
    "SwitchBack": _recipe("int8 row", "int8 tensor", "int8 row", products=("Y", "dX"), reduced=True),
    "Jetfire": _recipe("int8 32×32", "int8 32×32", "int8 32×32", random=True),
    "FP8 hybrid": _recipe("E4M3 tensor", "E4M3 tensor", "E5M2 tensor"),
    "MXFP8": _recipe("MXFP8", "MXFP8", "MXFP8", reduced=True),
    "NVFP4": _recipe("NVFP4", "NVFP4", "NVFP4", random=True, reduced=True),
    "MXFP4": _recipe("MXFP4", "MXFP4", "MXFP4", reduced=True),
    "W ternary, X int8": Recipe(activation=QUANTIZERS["int8 row"], weight=QUANTIZERS["ternary"]),
}


PAPER = PaperInfo(
    key="low_precision",
    part="lowbit",
    name="Low precision",
    title="Low-Precision Training of Large Language Models: Methods, Challenges, and Opportunities",
    authors=("Zhiwei Hao", "Jianyuan Guo", "Li Shen", "Yong Luo", "Han Hu", "Guoxia Wang", "Dianhai Yu", "Yonggang Wen")
    + ("Dacheng Tao",),
    arxiv="2505.01043v1",
    summary="Choose format, scale and rounding for weights, activations, gradients and moments, each by itself.",
    use_when="you train with 8 bits or fewer and want to know which tensor may be how coarse, and how to round it",
    instead={"hgf": "you want ternary weights in the deployed model", "galore": "only Adam's memory is in your way"},
    needs=("primer",),
    official_code="Hao840/Awesome-Low-Precision-Training",
    code_licence="none stated",
    equations={"Y, dX, dW": "quantized_linear", "who is quantised": "Recipe", "layer": "QuantLinear"},
    deviations=("everything is emulated in float32", "absmax divides by s, libraries multiply by 1/s"),
    aliases=("quantization", "mixed precision", "fp8", "int8", "MXFP4", "NVFP4", "stochastic rounding", "QAT")
    + ("loss scaling", "straight-through estimator", "LSQ", "NF4", "bfloat16"),
    status="draft",
    verified="2026-11-30",
)
