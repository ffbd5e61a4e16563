r"""SoRA: a gate between LoRA's two matrices, driven to exact zeros by a soft threshold, decides each layer's rank.

Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv 2311.11696v1 (EMNLP 2023).

| in the paper                                    | here                                                     |
|-------------------------------------------------|----------------------------------------------------------|
| z = W₀x + W_u(g ⊙ (W_d x))                      | `gated_update`, `gated_delta`, `SoRALinear`              |
| L₀ + λ·Σ‖g‖₁                                    | `l1_penalty`                                           |
| T_ξ(x) = sign(x)·max(abs x - ξ, 0)               | `soft_threshold`                                         |
| g ← T_ηλ(g - η∂L₀/∂g)                           | `ProximalGates`, after the optimizer's step              |
| deleting the components with g = 0              | `pruned_factors`, `SoRALinear.pruned`, `prune`           |
| the threshold of the official code              | `released_threshold`                                     |

Letters: W_d is A (r, n), W_u is B (m, r), g (r) the gate; η the gates' learning rate, λ the penalty, ξ the threshold.

Deviations. The gates are trained by Adam and then shrunk, as in the official code; a proximal step proper would follow
plain gradient descent. The paper couples ξ = ηλ to the learning rate; the official default keeps ξ constant
(`coupled=False`), and its operator also zeroes gates from ξ to 2ξ. The official trainer adds a second L1 term;
here there is none, unless you add `l1_penalty`. The scale s = α/r of the full rank stays after pruning.
Algorithm 1 is in `sora_schedule.py`. A layer trains r(m+n+1) numbers, Adam keeps twice that; pruned, r_k(m+n) are left.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_number
from lowrank_ref.core.layers import Model, adapters, replace_modules
from lowrank_ref.core.registry import PaperInfo


def gated_delta(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], g: Float[Tensor, " r"], scale: float
) -> Float[Tensor, "m n"]:
    """Return ΔW = s·B·diag(g)·A."""
    return scale * (B * g @ A)


def gated_update(
    x: Float[Tensor, "*batch n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], g: Float[Tensor, " r"], scale: float
) -> Float[Tensor, "*batch m"]:
    """Return s·B(g ⊙ (Ax)) for every row, r(m+n+1) products."""
    return scale * F.linear(g * F.linear(x, A), B)


def soft_threshold(x: Float[Tensor, "*any"], threshold: float) -> Float[Tensor, "*any"]:
    """Return T_ξ(x) = sign(x)·max(abs x - ξ, 0), which minimises ½(z - x)² + ξ·abs z over z; ξ < 0 is a ValueError.

    Example:
        >>> soft_threshold(torch.tensor([0.5, -0.25, 3.0]), 0.5).tolist()
        [0.0, 0.0, 2.5]
    """
    check_number("threshold", threshold, low=0)
    return x - x.clamp(-threshold, threshold)


def released_threshold(x: Float[Tensor, "*any"], threshold: float) -> Float[Tensor, "*any"]:
    """Return what the official code computes: shrink by ξ, then zero what is smaller than ξ after that.

    What lies between ξ and 2ξ ends at 0 as well: twice the dead zone, a jump of height ξ. ξ < 0: a ValueError.
    """
    check_number("threshold", threshold, low=0)
    x = torch.where(x > threshold, x - threshold, x)
    x = torch.where(x < -threshold, x + threshold, x)
    return torch.where(x.abs() < threshold, 0.0, x)


def l1_penalty(gates: Iterable[Float[Tensor, " _"]], strength: float) -> Float[Tensor, ""]:
    """Return λ·Σ‖g‖₁. As a term of the loss it makes gates small but not zero. λ < 0: a ValueError."""
    check_number("strength", strength, low=0)
    return strength * torch.stack([g.abs().sum() for g in gates]).sum()


def pruned_factors(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], g: Float[Tensor, " r"]
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "m k"]]:
    """Return A' = A[I] and B' = (B·diag(g))[:, I] for I = {i : g_i ≠ 0}, so that B'A' = B·diag(g)·A."""
    kept = g != 0
    return A[kept], (B * g)[:, kept]


class SoRALinear(LoRALinear):
    """LoRA with a trained gate on each of its r components: ΔW = s·B·diag(g)·A, where r is the most it can keep.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, the rank before anything is pruned.
        gate: "normal" draws g ~ N(0, 1), as the official code; "ones" starts as LoRA. Else a ValueError.
        generator: source of A and g.
        **options: alpha, dropout and scaling of `LoRALinear`, which also says what is refused.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.ranks import SoRALinear
        >>> SoRALinear(nn.Linear(6, 4), rank=2, gate="ones").g.tolist()
        [1.0, 1.0]
    """

    adapter_names = ("A", "B", "g")
    no_decay = ("g",)

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        gate: str = "normal",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if gate not in ("normal", "ones"):
            raise ValueError(f"gate: got {gate!r}, wanted 'normal' or 'ones'")
        super().__init__(base, rank, generator=generator, **options)
        place = generator.device if generator is not None else self.A.device
        draw = torch.randn(rank, generator=generator, dtype=self.A.dtype, device=place).to(self.A.device)
        self.g = nn.Parameter(draw if gate == "normal" else torch.ones_like(draw))

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·B·diag(g)·A."""
        return gated_delta(self.A, self.B, self.g, self.scale)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return s·B(g ⊙ (A·dropout(x)))."""
        return gated_update(self.dropout(x), self.A, self.B, self.g, self.scale)

    def step_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (diag(g)·A, B, s), all r components of them."""
        return self.g[:, None] * self.A, self.B, self.scale

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A', B', s) of the gates that are not zero."""
        return *pruned_factors(self.A, self.B, self.g), self.scale

    @torch.no_grad()
    def pruned(self) -> nn.Module:
        """Return a `LoRALinear` of the kept rank that computes the same, or the base itself if no gate is left."""
        A, B, scale = self.lora_factors()
        if not len(A):
            return self.base
        layer = LoRALinear(self.base, len(A), dropout=self.dropout.p, generator=torch.Generator())  # A is replaced
        layer.A, layer.B, layer.scale = nn.Parameter(A.clone()), nn.Parameter(B.clone()), scale
        return layer.train(self.training)


def rank_gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return path -> gate of every SoRA layer; a model without one raises a ValueError."""
    found = {path: layer.g for path, layer in adapters(model) if isinstance(layer, SoRALinear)}
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without a SoRALinear, wanted at least one")
    return found


def kept_ranks(model: nn.Module) -> dict[str, int]:
    """Return path -> number of gates that are not zero."""
    return {path: int(g.count_nonzero()) for path, g in rank_gates(model).items()}


def gate_groups(model: nn.Module, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return two groups: all other trained parameters with `weight_decay`, and the gates. ValueError: no gates."""
    check_number("weight_decay", weight_decay, low=0)
    own = {id(g): g for g in rank_gates(model).values()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    return [{"params": rest, "weight_decay": weight_decay}, {"params": list(own.values()), "weight_decay": 0.0}]


def prune(model: Model) -> Model:
    """Replace every SoRA layer inside the model by its `pruned()` layer; a model without one raises a ValueError."""
    return replace_modules(model, "", lambda layer: layer.pruned(), accepts=lambda m: isinstance(m, SoRALinear))


class ProximalGates(Action):
    """Shrinks every gate after each step of the optimizer: g ← T_ξ(g) with ξ = λ·η, η the gates' present learning rate.

    Attach it to the optimizer, or call `.step()` right after `optimizer.step()`: once a schedule has moved on, ξ is
    that of the next step, and 0 at the end. It is deterministic, so equal gates stay equal under DDP; keep gates
    unsharded under FSDP. The state is the penalty; the gates belong to the model.

    Args:
        model: holds at least one SoRA layer.
        optimizer: trains all its gates. With Adam a step is about η long whatever the gradient, so a gate that always
            pulls one way lives if λ < 1; noisy gates die earlier.
        penalty: λ >= 0.
        coupled: False takes ξ = λ at every step, as the official code does by default.
        operator: `soft_threshold`, or `released_threshold` to see what the official code computes.

    Raises:
        ValueError: no gate, a gate that the optimizer does not train, or penalty < 0.

    Example:
        >>> from torch import nn, optim
        >>> from lowrank_ref.ranks import ProximalGates, SoRALinear
        >>> layer = SoRALinear(nn.Linear(6, 4), rank=2)
        >>> optimizer = optim.Adam(layer.adapter_parameters().values(), lr=0.01)
        >>> proximal = ProximalGates(layer, optimizer, penalty=0.3).attach(optimizer)
    """

    state_names = ("penalty", "coupled")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        penalty: float,
        coupled: bool = True,
        operator: Callable[[Tensor, float], Tensor] = soft_threshold,
    ) -> None:
        check_number("penalty", penalty, low=0)
        self.gates, self.optimizer = rank_gates(model), optimizer
        self.penalty, self.coupled, self.operator = penalty, coupled, operator
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if strangers := [path for path, g in self.gates.items() if id(g) not in group_of]:
            raise ValueError(f"optimizer: got none of the gates of {strangers}, wanted all gates of the model")
        self._group = {path: group_of[id(g)] for path, g in self.gates.items()}  # an index: loading replaces the groups

    @torch.no_grad()
    def act(self) -> None:
        """Shrink all gates once."""
        for path, g in self.gates.items():
            lr = float(self.optimizer.param_groups[self._group[path]]["lr"])
            g.copy_(self.operator(g, self.penalty * lr if self.coupled else self.penalty))


PAPER = PaperInfo(
    key="sora",
    part="ranks",
    name="SoRA",
    title="Sparse Low-rank Adaptation of Pre-trained Language Models",
    authors=("Ning Ding", "Xingtai Lv", "Qiaosen Wang", "Yulin Chen", "Bowen Zhou", "Zhiyuan Liu", "Maosong Sun"),
    arxiv="2311.11696v1",
    summary="Start with more rank than needed and let exact zeros in a gate decide what each layer keeps.",
    use_when="you do not know the rank of each layer and can train at the largest one",
    instead={"lora": "a larger rank can be trained: cut it by its singular values halfway, and train on"},
    needs=("lora",),
    official_code="TsinghuaC3I/SoRA",
    code_licence="none stated",
    equations={"forward": "gated_update", "T_ξ": "soft_threshold", "step": "ProximalGates", "pruning": "prune"},
    deviations=("the true soft threshold, not the released one", "ξ follows the learning rate", "one L1 term, not two"),
    aliases=("sparse low-rank adaptation", "soft threshold", "proximal gradient", "rank pruning"),
    status="draft",
    verified="2026-11-30",
    changes={"2026-11-30": "Claims rest on rates chosen on validation data; a cut halfway is among the opponents."},
    layers={"SoRALinear": SoRALinear},
)
