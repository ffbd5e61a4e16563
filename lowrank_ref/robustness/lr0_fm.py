r"""LR0.FM: how to score robustness to low resolution, and LR-TK0: trained tokens that repair it in a frozen model.

Pathak, Marjit, Vyas and Rawat, arXiv 2502.03950; from shyammarjit/LR0.FM, scores at 8c7ccb6, the rest at aabd8b8.

| in the paper and its code                               | here                                             |
|---------------------------------------------------------|--------------------------------------------------|
| γ, Γ (equation 1), SAR and WAR                          | `robustness_scores.py`                           |
| down to r x r pixels and up again                       | `low_resolution` of `low_resolution.py`          |
| x + T_i in front of block i, T_0 after the embedding    | `LRTokens`, `add_lr_tokens`                      |
| CLIP(t, s)                                              | `contrastive_distance`                           |
| L = Σ_j CLIP(t, s_j)                                    | `MultiScaleDistillation`                         |

Letters: T_i (P, d) for P patches of width d; t the frozen model's feature of the sharp picture, s_j ours of version j.

Deviations. The code counts four pictures of one caption in a batch as negatives; here a batch is what you hand over. It
clamps a scale that is frozen, not the trained one. `cosine_distance` stands there as a comment.

Cost: (N + 1)·P·d trained numbers for N blocks, as many additions a picture, no longer sequence; backward goes through
all frozen blocks, for four views a picture. Tokens are tied to a grid of patches. FSDP is not tested.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.bases import Adapter
from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.layers import adapters, disabled, replace_modules
from lowrank_ref.core.matching import Pattern, select
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.robustness.low_resolution import Bucket, draw_sides, low_resolution


class LRTokens(Adapter):
    """A trained matrix T that is added to the tokens which a module reads, or returns.

    Args:
        base: a block, whose first argument is tokens (..., places, dim); or a patch embedding, which returns them.
        places: P, patches of a picture; 1 adds the same row to all of them, which is a bias.
        dim: width d of a token.
        prefix: leading tokens that stay as they are, such as a class token.
        after: add to what the base returns, not to what it reads.
        std: standard deviation >= 0 of the start, 0.02 in EVA's code. At 0 training starts at the frozen model.
        generator: draws the start.

    Nothing can be merged into a weight: T depends on the place. `disabled` switches it off.

    Raises:
        TypeError, ValueError: an argument out of range; in forward, tokens of another shape.

    Example:
        >>> import torch
        >>> from lowrank_ref.robustness import LRTokens
        >>> block = LRTokens(torch.nn.Identity(), 4, 3, std=0.0)
        >>> block(torch.ones(2, 4, 3)).sum().item(), block.T.numel()
        (24.0, 12)
    """

    adapter_names = ("T",)

    def __init__(
        self,
        base: nn.Module,
        places: int,
        dim: int,
        *,
        prefix: int = 0,
        after: bool = False,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        check_integer("places", places, low=1)
        check_integer("dim", dim, low=1)
        check_integer("prefix", prefix, low=0)
        check_number("std", std, low=0)
        super().__init__(base)
        self.prefix, self.after = prefix, after
        like = next(base.parameters(), torch.empty(0))
        device = generator.device if generator is not None else like.device
        dtype = torch.promote_types(like.dtype, torch.float32)
        T = std * torch.randn(places, dim, generator=generator, dtype=dtype, device=device)
        self.T = nn.Parameter(T.to(like.device))

    def __getattr__(self, name: str) -> Any:
        """Return what the base has, for models that ask a block for more than its output."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def added(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Return x + T on all tokens behind the prefix, in the dtype of x. ValueError: tokens of another shape."""
        places, dim = self.T.shape
        found = x.shape[-2] - self.prefix if isinstance(x, Tensor) and x.ndim > 1 else None
        if found is None or x.shape[-1] != dim or found < 1 or places not in (1, found):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: got {got}, wanted tokens (..., {self.prefix} + {places}, {dim})")
        T = self.T.expand(found, dim)
        return (x + (F.pad(T, (0, 0, self.prefix, 0)) if self.prefix else T)).to(x.dtype)

    def forward(self, x: Any, *args: Any, **options: Any) -> Any:
        """Return base(x + T, ...), or base(x, ...) + T with `after`."""
        out = self.base(x if self.after else self.added(x), *args, **options)
        return self.added(out) if self.after else out

    def merged(self) -> nn.Module:
        """Raise a TypeError: T is no update of a weight."""
        raise TypeError("LRTokens: got a merge, wanted none: T depends on the place; `disabled` switches it off")

    def extra_repr(self) -> str:
        """Show the shape of T in `print(model)`."""
        return f"{tuple(self.T.shape)}, prefix {self.prefix}" + (", after" if self.after else "")


def add_lr_tokens(
    model: nn.Module,
    blocks: Pattern,
    *,
    places: int,
    dim: int,
    embed: Pattern | None = None,
    prefix: int = 0,
    std: float = 0.02,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put tokens T_1 ... T_N in front of the blocks that the pattern means, T_0 behind `embed`, and freeze the rest.

    Args:
        model: changed in place.
        blocks: see `replace_linears`; such as r"blocks\\.\\d+$".
        places, dim: see `LRTokens`.
        embed: what turns a picture into patches; its output has no prefix. None leaves T_0 out.
        prefix, std, generator: see `LRTokens`; starts are drawn in the order of the model's modules.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: as `LRTokens`, or a pattern that matches nothing. The model is unchanged.
    """
    modules = {path: m for path, m in model.named_modules() if path and not isinstance(m, nn.ModuleList)}
    first = set(select(model, modules, embed)) if embed is not None else set()
    found = {path: path in first for path in (*first, *select(model, modules, blocks))}
    after = {id(modules[path]): where for path, where in found.items()}

    def wrapped(base: nn.Module) -> LRTokens:
        late = after[id(base)]
        return LRTokens(base, places, dim, prefix=0 if late else prefix, after=late, std=std, generator=generator)

    return replace_modules(model, list(found), wrapped, accepts=lambda module: id(module) in after)


def contrastive_distance(
    t: Float[Tensor, "batch dim"], s: Float[Tensor, "batch dim"], log_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return CLIP(t, s): of all pictures in the batch, t_i has to find s_i and s_i has to find t_i, in nats.

    t and s are unit rows; the cross-entropy of the softmax over κ·t·sᵀ with κ = exp(log_scale), by rows and by
    columns, averaged.
    """
    z = log_scale.exp() * t @ s.T
    own = torch.arange(len(t), device=t.device)
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def cosine_distance(
    t: Float[Tensor, "batch dim"], s: Float[Tensor, "batch dim"], log_scale: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Return the mean of 1 - <t_i, s_i> for unit rows: no other picture takes part, and no scale."""
    return 1 - (t * s).sum(1).mean()


class MultiScaleDistillation(nn.Module):
    """The loss Σ_j CLIP(t, s_j): a model learns from itself what it saw before the picture lost its detail.

    Args:
        buckets: (low, high) of each version's sides, drawn evenly; the paper's, of 224. () trains on sharp ones alone.
        scale: κ > 0 at the start; its logarithm is trained: give it to the optimizer.
        distance: (t, s, log κ) -> loss.

    Raises:
        TypeError, ValueError: a scale that is not > 0, or a bucket that is none.

    Example:
        >>> from lowrank_ref.robustness import MultiScaleDistillation
        >>> len(MultiScaleDistillation(((4, 8), (8, 16))).buckets)
        2
    """

    def __init__(
        self,
        buckets: Sequence[Bucket] = ((16, 32), (32, 64), (64, 128)),
        *,
        scale: float = 1 / 0.07,
        distance: Callable[[Tensor, Tensor, Tensor], Tensor] = contrastive_distance,
    ) -> None:
        check_number("scale", scale, low=0, open_low=True)
        for bucket in buckets:
            draw_sides(bucket, 0)
        super().__init__()
        self.buckets, self.distance = tuple(buckets), distance
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(
        self,
        model: nn.Module,
        x: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, "batch dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss. `model` maps pictures to features; t is the teacher's, by default `teacher_features`."""
        t = teacher_features(model, x) if t is None else t
        views = [x, *(low_resolution(x, draw_sides(bucket, len(x), generator)) for bucket in self.buckets)]
        s = F.normalize(model(torch.cat(views)), dim=-1).unflatten(0, (len(views), len(x)))
        return torch.stack([self.distance(t, s_j, self.log_scale) for s_j in s]).sum()


@torch.no_grad()
def teacher_features(model: nn.Module, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch dim"]:
    """Return the unit features of x with all adapters switched off. ValueError: the model holds no adapter."""
    if not any(adapters(model)):
        raise ValueError("model: got no adapter to switch off, wanted one, or the features t of a frozen copy")
    with disabled(model):
        return F.normalize(model(x), dim=-1)


PAPER = PaperInfo(
    key="lr0_fm",
    part="robustness",
    name="LR0.FM",
    title="LR0.FM: Low-Res Benchmark and Improving Robustness for Zero-Shot Classification in Foundation Models",
    authors=("Priyank Pathak", "Shyam Marjit", "Shruti Vyas", "Yogesh S Rawat"),
    arxiv="2502.03950",
    summary="Score how a frozen model bears small pictures, and repair it with tokens learned from its own features.",
    use_when="you have a frozen vision transformer, pictures of unknown resolution and no labels",
    instead={"lora": "weights may change: LoRA of as many numbers was not told apart or ahead, and it merges"},
    needs=("lora",),
    official_code="shyammarjit/LR0.FM",
    code_licence="none stated",
    equations={"x + T_i": "LRTokens", "CLIP(t, s)": "contrastive_distance", "L": "MultiScaleDistillation"},
    deviations=("the scale κ is not clamped", "no checkpoint is picked", "pictures are not rounded to 8 bits"),
    aliases=("LR-TK0", "low resolution", "weighted aggregated robustness", "zero-shot classification"),
    status="draft",
    verified="2026-11-30",
)
