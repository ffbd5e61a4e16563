r"""CoDyRA: tasks come one after the other; each gets fresh LoRA gates that fall to zeros, and what is left is merged.

Lu et al., "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with
Dynamic Rank-Selective LoRA", arXiv 2412.01004v1; the method as the authors' page and code state it (repository
Artificer-AI-Lab/CoDyRA, page at 3eed0cc, code at c1691e4).

| in the paper                                       | here                                                     |
|----------------------------------------------------|----------------------------------------------------------|
| ΔW = Σ wᵢ B[:, i] A[i, :]                           | SoRA's `gated_delta`; `CoDyRALinear`, whose w is `g`     |
| w ← T_κ(w - η∂L/∂w)                                | SoRA's `soft_threshold`; `RankSelection`                 |
| κ_t, from 0 to κ_max                               | `threshold_ramp`, `ramp_of_shrink`                       |
| W^t = W^(t-1) + B[:, I] diag(w_I) A[I, :]          | `weight_after_task`; with a model, `task_sequence.py`    |
| ‖ΔW‖ <= √ρ·‖B‖‖A‖ (proposition 1)                  | `update_norm_bound`                                      |
| F <= ‖∇ℓ‖‖ΔW‖ + (L/2)‖ΔW‖² (proposition 1)          | `forgetting_bound`                                       |
| Last, Average, Transfer, Forgetting                | `task_scores` of `task_sequence.py`                      |

Letters: W is (m, n), A (r, n), B (m, r), w (r) the importance weights (SoRA's gates g), ρ the number of them that are
not 0, κ the threshold. What SoRA has not: the cycle of start, ramp and merge over tasks, and a threshold that is 0 for
the first half of a task's steps and does not follow the learning rate.

Deviations. The true soft threshold; SoRA's `released_threshold`, which is also the released one here, is an option.
The knob is the sum of all thresholds, since each counts per step. A ramp too short for its levels raises; the released
code then never shrinks.
Cost per layer and task: r(m+n+1) trained numbers, Adam state twice that; after the merge none.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.ranks.sora import ProximalGates, SoRALinear, pruned_factors, soft_threshold


def threshold_ramp(steps: int, largest: float, *, levels: int = 50, dense: float = 0.5) -> list[float]:
    """Return κ after each step of a task: 0 in its dense share, then `levels` even ones from 0 to the largest.

    As the released code counts, from step 0: the level grows at every step that is not in the dense share and is a
    multiple of ⌊(1 - dense)·steps / levels⌋, up to the last one; the first shrinkage follows one step later.

    Args:
        steps: optimizer steps of the task, enough for one step a level outside the dense share.
        largest: κ_max >= 0.
        levels: whole number >= 2, 0 among them.
        dense: share of the steps without a threshold, in [0, 1).

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range, or too few steps for the levels.

    Example:
        >>> threshold_ramp(8, 1.5, levels=4)
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.5, 1.5]
    """
    check_integer("steps", steps, low=1)
    check_integer("levels", levels, low=2)
    check_number("largest", largest, low=0)
    check_number("dense", dense, low=0, high=1 - 1e-9)
    first = dense * steps
    every = int((steps - first) // levels)
    if every < 1:
        raise ValueError(f"steps: got {steps}, of which {steps - first:g} shrink, wanted {levels} such steps or more")
    level, ramp = 0, []
    for step in range(steps):
        level += step >= first and step % every == 0
        ramp.append(largest * (min(level, levels - 1) / (levels - 1)) if step > first else 0.0)
    return ramp


def ramp_of_shrink(steps: int, shrink: float, *, levels: int = 50, dense: float = 0.5) -> list[float]:
    """Return the ramp whose thresholds sum to `shrink` >= 0: how far a weight without gradient falls in a task.

    The released κ_max = 0.005 over 500 steps is a shrink of 0.65. TypeError, ValueError: as `threshold_ramp`.

    Example:
        >>> ramp = ramp_of_shrink(500, 0.65)
        >>> round(max(ramp), 5), round(sum(ramp), 5)
        (0.005, 0.65)
    """
    check_number("shrink", shrink, low=0)
    unit = threshold_ramp(steps, 1.0, levels=levels, dense=dense)
    return [shrink / sum(unit) * kappa for kappa in unit]


def chance_ranks(rank: int, shrink: float) -> float:
    """Return how many of r weights w ~ N(0, 1) a shrink c leaves if no gradient moves them: 2r(1 - Φ(c)).

    Raises:
        TypeError, ValueError: rank is no whole number >= 1, or shrink no number >= 0.

    Example:
        >>> round(chance_ranks(16, 0.65), 2)
        8.25
    """
    check_integer("rank", rank, low=1)
    check_number("shrink", shrink, low=0)
    return rank * math.erfc(shrink / math.sqrt(2))


def weight_after_task(
    W: Float[Tensor, "m n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], w: Float[Tensor, " r"]
) -> Float[Tensor, "m n"]:
    """Return W + Σ wᵢ B[:, i] A[i, :] over I = {i : wᵢ ≠ 0}; W itself if I is empty."""
    kept_A, kept_B = pruned_factors(A, B, w)
    return W + kept_B @ kept_A if len(kept_A) else W


def update_norm_bound(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], w: Float[Tensor, " r"]) -> Float[Tensor, ""]:
    """Return √ρ·‖B‖₂‖A‖₂·max abs w >= ‖B diag(w) A‖_F, ρ nonzero weights. The paper's has no max: there abs w <= 1."""
    norms = torch.linalg.matrix_norm(B, 2) * torch.linalg.matrix_norm(A, 2)
    return w.count_nonzero().to(w.dtype).sqrt() * norms * w.abs().max()


def forgetting_bound(gradient_norm: float, smoothness: float, update_norm: float) -> float:
    """Return ‖∇ℓ‖·‖ΔW‖ + (L/2)·‖ΔW‖²: most that an old loss ℓ with L-Lipschitz gradient can rise by.

    Raises:
        TypeError, ValueError: one of the three is no number >= 0.

    Example:
        >>> forgetting_bound(gradient_norm=0.5, smoothness=2.0, update_norm=3.0)
        10.5
    """
    for name, value in (("gradient_norm", gradient_norm), ("smoothness", smoothness), ("update_norm", update_norm)):
        check_number(name, value, low=0)
    return gradient_norm * update_norm + 0.5 * smoothness * update_norm**2


class CoDyRALinear(SoRALinear):
    """SoRA's layer with scale 1: ΔW = B·diag(w)·A; the weights w are its parameter `g`.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, the most components that a task can keep. The released code takes 16.
        gate: "ones" starts as LoRA; "normal" draws w ~ N(0, 1), as the released code. Else a ValueError.
        generator: source of A and w.
        dropout: as in `LoRALinear`, which also says what is refused.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.ranks import CoDyRALinear
        >>> CoDyRALinear(nn.Linear(6, 4), rank=2).scale
        1.0
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        gate: str = "ones",
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, gate=gate, dropout=dropout, generator=generator)
        self.scale = 1.0


class RankSelection(ProximalGates):
    """Shrinks the weights of a model after each step of one task, by the thresholds of `ramp_of_shrink`.

    Attach it to the task's optimizer, or call `.step()` right after `optimizer.step()`; each task has a new one. After
    the last step the largest threshold stays. For DDP and FSDP see `ProximalGates`.

    Args:
        model: holds at least one layer with gates (`start_task`).
        optimizer: trains all its gates.
        steps: optimizer steps of the task.
        shrink: sum of all thresholds, >= 0; 0.65 in the released run, whose weights start as N(0, 1).
        levels, dense: of `threshold_ramp`.
        operator: `soft_threshold`, or SoRA's `released_threshold`, which is also the one of CoDyRA's released code.

    Attributes:
        thresholds: κ after each step.
        done: steps so far.

    Raises:
        TypeError, ValueError: no gate, one that the optimizer does not train, or as `threshold_ramp`.

    Example:
        >>> from torch import nn, optim
        >>> from lowrank_ref.ranks import CoDyRALinear, RankSelection
        >>> layer = CoDyRALinear(nn.Linear(6, 4), rank=2)
        >>> optimizer = optim.Adam(layer.adapter_parameters().values(), lr=0.01)
        >>> selection = RankSelection(layer, optimizer, steps=200, shrink=0.65).attach(optimizer)
        >>> len(selection.thresholds), selection.done
        (200, 0)
    """

    state_names = ("done",)  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        shrink: float = 0.4,
        levels: int = 50,
        dense: float = 0.5,
        operator: Callable[[Tensor, float], Tensor] = soft_threshold,
    ) -> None:
        self.thresholds = ramp_of_shrink(steps, shrink, levels=levels, dense=dense)
        super().__init__(model, optimizer, penalty=0.0, coupled=False, operator=operator)
        self.done = 0

    def act(self) -> None:
        """Shrink all weights by the present threshold, and count the step."""
        self.penalty = self.thresholds[min(self.done, len(self.thresholds) - 1)]
        super().act()
        self.done += 1

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take back what `state_dict` returned; the state of something else raises a TypeError or ValueError."""
        self._check_keys(state)
        check_integer("done", state["done"], low=0)
        super().load_state_dict(state)


PAPER = PaperInfo(
    key="codyra",
    part="ranks",
    name="CoDyRA",
    title="Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with "
    "Dynamic Rank-Selective LoRA",
    authors=("Haodong Lu", "Chongyang Zhao", "Minhui Xue", "Lina Yao", "Kristen Moore", "Dong Gong"),
    arxiv="2412.01004v1",
    summary="Learn tasks one after the other with merged LoRA updates whose gates fall to zeros, and forget less.",
    use_when="you learn tasks in sequence, may keep no old data, and the model must stay one plain network",
    instead={
        "sora": "there is one task only: the gate is the same, and its threshold follows the learning rate",
        "lora": "a simpler means will do: LoRA, of whose update 0.7 was merged, kept as much of the old tasks here",
    },
    needs=("sora",),
    official_code="Artificer-AI-Lab/CoDyRA",
    code_licence="Apache-2.0 by its README",
    equations={"κ_t": "threshold_ramp", "step": "RankSelection", "end of a task": "weight_after_task"},
    deviations=("the true soft threshold", "the knob is the sum of thresholds", "a ramp that is too short raises"),
    aliases=("continual learning", "catastrophic forgetting", "rank-selective LoRA", "importance weights"),
    status="draft",
    verified="2026-11-29",
    layers={"CoDyRALinear": CoDyRALinear},
)
