r"""LoRA: freeze W, train a low-rank correction s·B·A beside it. With rsLoRA's scale and LoRA+'s two learning rates.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685v2, section 4.1.

| in the paper                              | here                                        |
|-------------------------------------------|---------------------------------------------|
| h = W₀x + ΔWx = W₀x + BAx (eq. 3)         | `lora_update`; with the base: `lora_linear` |
| ΔW = (α/r)·BA                             | `delta_weight`, `lora_scaling`              |
| A random, B = 0 (section 4.1)             | `init_factors`                              |
| α/√r (rsLoRA, 2312.03732)                 | `rslora_scaling`                            |
| lr of B = λ · lr of A (LoRA+, 2402.12354) | `lora_plus_groups`                          |

Letters: the paper's d × k weight is W (m, n) here; A (r, n), B (m, r); s is the scale.

Deviations. The paper draws A from a Gaussian; its code, and this file, from U(-1/√n, 1/√n). The official code merges
inside `eval()` and subtracts inside `train()`, which lets the frozen weight drift; here a merge makes a new layer and
the base is never written.

Cost per layer: r(m+n) trained numbers, Adam state 2r(m+n) instead of 2mn, 2r(m+n) extra FLOPs a token until merged,
then none. Embeddings and convolutions are in `embedding_conv.py`, the relatives DoRA and PiSSA in `dora_pissa.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_number, check_rank
from lowrank_ref.core.layers import FactoredLinear, adapters, weight_of
from lowrank_ref.core.registry import PaperInfo


def lora_scaling(alpha: float, rank: int) -> float:
    """Return s = α/r, the scale of LoRA (section 4.1). α <= 0 raises a ValueError."""
    check_number("alpha", alpha, low=0, open_low=True)
    return alpha / rank


def rslora_scaling(alpha: float, rank: int) -> float:
    """Return s = α/√r, the scale of rsLoRA: output and gradient keep their size when r grows (arXiv 2312.03732).

    Raises:
        TypeError, ValueError: alpha is not a number > 0.
    """
    check_number("alpha", alpha, low=0, open_low=True)
    return alpha / math.sqrt(rank)


def delta_weight(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], scale: float) -> Float[Tensor, "m n"]:
    """Return ΔW = s·B·A, shape (m, n), of rank at most r.

    Example:
        >>> delta_weight(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]), 0.5).tolist()
        [[1.5, 3.0], [0.0, 0.0]]
    """
    return scale * (B @ A)


def lora_update(
    x: Float[Tensor, "*batch n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], scale: float
) -> Float[Tensor, "*batch m"]:
    """Return s·B(Ax) for every row, r(m+n) products instead of mn (equation 3)."""
    return scale * F.linear(F.linear(x, A), B)


def init_factors(
    W: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Return A ~ U(-1/√n, 1/√n) and B = 0, so that training starts at the base model.

    They are float32 or wider, even beside a half-precision W: small updates would be lost in bfloat16.

    Raises:
        TypeError, ValueError: rank is not an integer in [1, min(m, n)].
    """
    m, n = W.shape
    check_rank(rank, (m, n))
    dtype = torch.promote_types(W.dtype, torch.float32)
    device = generator.device if generator is not None else W.device
    A = torch.rand(rank, n, generator=generator, dtype=dtype, device=device).mul_(2).sub_(1).div_(math.sqrt(n))
    return A.to(W.device), torch.zeros(m, rank, dtype=dtype, device=W.device)


def lora_plus_groups(model: nn.Module, lr: float, *, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Return optimizer groups with lr·ratio for every B and lr for every other trained parameter (LoRA+).

    Args:
        model: holds at least one LoRA layer.
        lr: learning rate of A, > 0.
        ratio: λ >= 1; 1 is plain LoRA.

    Raises:
        ValueError: no LoRA layer, or ratio < 1.
    """
    check_number("lr", lr, low=0, open_low=True)
    check_number("ratio", ratio, low=1)
    B = {id(p): p for _, layer in adapters(model) if (p := layer.adapter_parameters().get("B")) is not None}
    if not B:
        raise ValueError("model: got no LoRA layer, wanted at least one with a factor B")
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in B]
    return [{"params": rest, "lr": lr}, {"params": list(B.values()), "lr": lr * ratio}]


class LoRALinear(FactoredLinear):
    """A frozen linear layer with a trained update s·B·A.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, 1 <= r <= min(m, n).
        alpha: α > 0; the scale is `scaling(alpha, rank)`.
        dropout: probability in [0, 1) of zeroing an input of the update (not of the base).
        scaling: `lora_scaling` or `rslora_scaling`.
        generator: source of A.

    A subclass that changes the update overrides `delta_weight`, `update` and `step_factors` together: a merge uses the
    first, forward one of the other two.

    Raises:
        TypeError, ValueError: base is no floating-point linear layer; rank, alpha or dropout out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import LoRALinear
        >>> layer = LoRALinear(nn.Linear(4, 3), rank=2, alpha=4)
        >>> layer.delta_weight().abs().max().item(), layer.scale
        (0.0, 2.0)
    """

    adapter_names: tuple[str, ...] = ("A", "B")

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        scaling: Callable[[float, int], float] = lora_scaling,
        generator: torch.Generator | None = None,
    ) -> None:
        W = weight_of(base)
        check_rank(rank, W.shape)
        check_number("alpha", alpha, low=0, open_low=True)
        check_number("dropout", dropout, low=0, high=1 - 1e-9)
        super().__init__(base)
        self.rank, self.scale = rank, scaling(alpha, rank)
        self.dropout = nn.Dropout(dropout).train(base.training)
        A, B = self.initial_factors(W.detach(), generator)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def initial_factors(self, W: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return A and B to start from."""
        return init_factors(W, self.rank, generator)

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·B·A."""
        return delta_weight(self.A, self.B, self.scale)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return s·B(A·dropout(x))."""
        return lora_update(self.dropout(x), self.A, self.B, self.scale)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B, s) with ΔW = s·BA (before DoRA rescales): what export to PEFT's format writes."""
        return self.A, self.B, self.scale


PAPER = PaperInfo(
    key="lora",
    part="adapters",
    name="LoRA",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    authors=(
        "Edward J. Hu",
        "Yelong Shen",
        "Phillip Wallis",
        "Zeyuan Allen-Zhu",
        "Yuanzhi Li",
        "Shean Wang",
        "Lu Wang",
        "Weizhu Chen",
    ),
    arxiv="2106.09685v2",
    summary="Fine-tune a large network by training two thin matrices beside each frozen weight.",
    use_when="you adapt a finished model and the change it needs is of low rank: look at the spectrum of ΔW first",
    instead={
        "galore": "all of the weight should move, and only optimizer memory is short",
        "randlora": "the spectrum of ΔW is flat",
    },
    needs=("primer",),
    official_code="microsoft/LoRA",
    code_licence="MIT",
    equations={"equation 3": "lora_update", "ΔW = (α/r)·BA": "delta_weight", "initialisation": "init_factors"},
    deviations=("A is uniform, as in the code, not Gaussian", "merging makes a new layer"),
    aliases=("low-rank adaptation", "rsLoRA", "LoRA+", "DoRA", "PiSSA"),
    status="checked",
    verified="2026-11-23",
    changes={"2026-11-24": "Says which verses MiniLM saw in training."},
    layers={"LoRALinear": LoRALinear},
)
