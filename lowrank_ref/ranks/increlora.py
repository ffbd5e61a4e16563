r"""IncreLoRA: every layer starts at rank 1, and while training goes on the layers that matter most get more components.

Zhang et al., "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", 2308.12043v1.

| in the paper                                      | here                                                      |
|---------------------------------------------------|-----------------------------------------------------------|
| ΔW = s·Σ λᵢbᵢaᵢ = s·BΛA                           | `component_sum`, `IncreLoRALinear` in `growing_linear.py` |
| S = mean of abs(ΔW ∘ ∂L/∂ΔW)                      | `sensitivity`                                             |
| I ← β₁I + (1 - β₁)S, U ← β₂U + (1 - β₂)abs(S - I) | `smoothed`                                                |
| the h largest I·U get q more components           | `largest`, `RankGrowth`                                   |
| R, orthogonality of A's rows and of B's columns   | `orthogonality`, `orthogonality_penalty`                  |
| advance learning with a reserve of λ = 1e-5       | `IncreLoRALinear.grow`, `IncreLoRALinear.newcomers`       |
| each new group of parameters warms up by itself   | `clock`, `growth_schedule` in `growth_schedule.py`        |

Letters: A (r, n) has the aᵢ as rows, B (m, r) the bᵢ as columns, λ (r) has any sign; s is the scale, G = ∂L/∂ΔW.

Deviations. s is constant, so that growth adds 1e-5·s·b aᵀ and nothing else; the official code has α/r of the present
rank, `scaling=lora_scaling`. Its score is divided by √(mn), not mn: `power=0.5`. After the last round it goes on
training the unused reserve by R; here that rests. It lets all layers that tie grow; here the first ones. Its rounds
come before the step, with one score more.
Cost per layer: (r + q)(m + n) + r trained numbers with their Adam state, capacity·(m + n + 1) stored ones. While scores
are taken, ΔW and G are (m, n) matrices; afterwards a step costs what LoRA's does.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.ranks.growing_linear import IncreLoRALinear, growing_layers


def sensitivity(delta: Float[Tensor, "m n"], G: Float[Tensor, "m n"], power: float = 1.0) -> Float[Tensor, ""]:
    """Return S = Σ abs(ΔW ∘ G) / (mn)^power: the paper's mean, or with power 0.5 what the official code computes."""
    return (delta * G).abs().sum() / delta.numel() ** power


def smoothed(
    S: Float[Tensor, " k"], importance: Float[Tensor, " k"], spread: Float[Tensor, " k"], betas: tuple[float, float]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return the new I = β₁I + (1 - β₁)S and U = β₂U + (1 - β₂)abs(S - I), where U sees the new I.

    Example:
        >>> I, U = torch.zeros(1), torch.zeros(1)
        >>> for S in (1.0, 3.0):
        ...     I, U = smoothed(torch.tensor([S]), I, U, (0.85, 0.85))
        >>> round(I.item(), 4), round(U.item(), 5)
        (0.5775, 0.47175)
    """
    importance = betas[0] * importance + (1 - betas[0]) * S
    return importance, betas[1] * spread + (1 - betas[1]) * (S - importance).abs()


def largest(scores: Float[Tensor, " k"], count: int) -> list[int]:
    """Return the places of the `count` largest scores, falling; of equal ones the first comes first."""
    return torch.argsort(scores, descending=True, stable=True)[:count].tolist()


def orthogonality(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], *, squared: bool = False) -> Float[Tensor, ""]:
    """Return the distances of AAᵀ and of BᵀB from the identity, added: Frobenius norms, or their squares as printed."""
    off = (M - torch.eye(len(A), dtype=A.dtype, device=A.device) for M in (A @ A.T, B.T @ B))
    norms = [torch.linalg.matrix_norm(M) for M in off]
    return sum((norm.square() if squared else norm for norm in norms), A.new_zeros(()))


def orthogonality_penalty(model: nn.Module, *, squared: bool = False) -> Float[Tensor, ""]:
    """Return R, the mean over the factors of all IncreLoRA layers, reserves included; add 0.1·R to the loss.

    Raises:
        ValueError: the model holds no IncreLoRA layer.
    """
    layers = _layers(model)
    parts = [(A, B) for A, _, B in (layer.components() for layer in layers.values())]
    return torch.stack([orthogonality(A, B, squared=squared) for A, B in parts]).mean() / 2


def _layers(model: nn.Module) -> dict[str, IncreLoRALinear]:
    layers = dict(growing_layers(model))
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without an IncreLoRALinear, wanted at least one")
    return layers


class RankGrowth(Action):
    """Gives out rank while a model trains: every `every` steps the `count` layers with the largest I·U grow once.

    When the budget is spent, or no layer has room, the reserves rest and scoring ends. With several backward passes a
    step, S is their mean. A loss scale multiplies all scores alike. Ranks are in the model's state.

    Args:
        model: holds IncreLoRA layers, uncompiled until the budget is spent.
        optimizer: holds all their parameters, also those that train later: the groups of `growth_groups(model)`.
        budget: total rank in the end, at least that of the start and at most that of all capacities.
        every: ν >= 1, steps between two rounds.
        warmup: no round up to this step, >= 0; None takes `every`.
        count: h >= 1, layers that grow in a round.
        betas: β₁ and β₂, each in [0, 1).
        power: what a score is divided by, (mn)^power. 1 is the paper's mean; 0.5, the official code's, favours
            large layers.

    Raises:
        TypeError, ValueError: no layer, blocks of different sizes, an option out of range, a budget that is not met by
            whole blocks or that the layers cannot hold, or an optimizer without a parameter of theirs.

    Example:
        >>> import torch
        >>> from lowrank_ref.ranks import IncreLoRALinear, RankGrowth, growth_groups
        >>> model = torch.nn.Sequential(IncreLoRALinear(torch.nn.Linear(6, 4)), IncreLoRALinear(torch.nn.Linear(4, 2)))
        >>> optimizer = torch.optim.Adam(growth_groups(model), lr=0.01)
        >>> growth = RankGrowth(model, optimizer, budget=3, every=2, warmup=0).attach(optimizer)
        >>> for _ in range(2):
        ...     model(torch.ones(1, 6)).sum().backward()
        ...     optimizer.step()
        >>> growth.total
        3
    """

    state_names = ("steps", "importance", "spread", "births")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        budget: int,
        every: int,
        warmup: int | None = None,
        count: int = 1,
        betas: tuple[float, float] = (0.85, 0.85),
        power: float = 1.0,
    ) -> None:
        self.layers, self.optimizer = _layers(model), optimizer
        for name, value, low in (("every", every, 1), ("count", count, 1), ("budget", budget, self.total)):
            check_integer(name, value, low=low)
        check_integer("warmup", every if warmup is None else warmup, low=0)
        for beta in betas:
            check_number("betas", beta, low=0, high=1 - 1e-9)
        check_number("power", power, low=0, high=1)
        self._check(budget)
        self.budget, self.every, self.warmup, self.count = budget, every, every if warmup is None else warmup, count
        self.betas, self.power, self.steps = betas, power, 0
        place = next(next(iter(self.layers.values())).parameters()).device
        self.importance, self.spread = torch.zeros(2, len(self.layers), dtype=torch.float64, device=place)
        self.births: dict[str, tuple[int, ...]] = dict.fromkeys(self.layers, ())
        self._end_or_watch()

    def _check(self, budget: int) -> None:
        blocks = {layer.block for layer in self.layers.values()}
        if len(blocks) > 1:
            raise ValueError(f"model: got blocks of sizes {sorted(blocks)}, wanted one size")
        most = sum(layer.rank + (layer.growths - layer.grown) * layer.block for layer in self.layers.values())
        if budget > most or (budget - self.total) % blocks.pop():
            raise ValueError(f"budget: got {budget}, wanted {self.total} plus whole blocks, at most {most}")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        own = {path: {id(p) for p in layer.parameters(recurse=False)} for path, layer in self.layers.items()}
        lost = [path for path, ids in own.items() if not ids <= held]
        if lost:
            raise ValueError(f"optimizer: got not all parameters of {lost[:4]}, wanted those of growth_groups(model)")

    @property
    def total(self) -> int:
        """Total rank now."""
        return sum(layer.rank for layer in self.layers.values())

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or no layer has room."""
        return self.total >= self.budget or not any(layer.room for layer in self.layers.values())

    def scores(self) -> Float[Tensor, " k"]:
        """Return I·U of every layer: what a round ranks them by. A control of an experiment overrides this."""
        return self.importance * self.spread

    def act(self) -> None:
        """Note the scores of this step, and let layers grow if it is time and one of them has a score.

        RuntimeError: no backward pass has been noted by then, as in a compiled model.
        """
        self.steps += 1
        seen = [layer.take_score() for layer in self.layers.values()]
        if self.finished:
            return
        if passed := any(S is not None for S in seen):
            S = torch.stack([self.spread.new_zeros(()) if S is None else S.to(self.spread) for S in seen])
            self.importance, self.spread = smoothed(S, self.importance, self.spread, self.betas)
        if self.steps > self.warmup and self.steps % self.every == 0:
            if bool(self.importance.any()):
                self._round()
            elif not passed:
                raise RuntimeError("act: got no score of any layer, wanted backward passes, uncompiled")

    def _round(self) -> None:
        layers, paths = list(self.layers.values()), list(self.layers)
        places = [i for i in largest(self.scores(), len(layers)) if layers[i].room]
        for i in places[: min(self.count, (self.budget - self.total) // layers[0].block)]:
            layers[i].grow()
            self.births[paths[i]] += (self.steps,)
        self._end_or_watch()

    def _end_or_watch(self) -> None:
        for layer in self.layers.values():
            layer.score = None if self.finished else partial(sensitivity, power=self.power)
            if self.finished:
                layer.finish()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take back what `state_dict` returned; load the model first. The state of something else: a ValueError."""
        self._check_keys(state)
        I, U = (state[name].to(self.spread) for name in ("importance", "spread"))
        if state["births"].keys() != self.births.keys() or not I.shape == U.shape == self.spread.shape:
            raise ValueError(f"state: got layers {sorted(state['births'])}, wanted {sorted(self.births)}")
        if lost := [path for path, steps in state["births"].items() if len(steps) != self.layers[path].grown]:
            raise ValueError(f"state: got growths that {lost[:4]} have not made, wanted the model loaded before")
        self.steps, self.importance, self.spread, self.births = state["steps"], I, U, dict(state["births"])
        self._end_or_watch()


PAPER = PaperInfo(
    key="increlora",
    part="ranks",
    name="IncreLoRA",
    title="IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
    authors=("Feiyu Zhang", "Liangzhi Li", "Junhao Chen", "Zhouqiang Jiang", "Bowen Wang", "Yiming Qian"),
    arxiv="2308.12043v1",
    summary="Start every layer at rank 1 and let the layers that matter most grow while training goes on.",
    use_when="you have a total rank to give out, cannot train a larger one, and layers need very different ones",
    instead={"lora": "a larger rank fits: cut it after half of the run", "sora": "there is no budget to keep"},
    needs=("lora",),
    official_code="FeiyuZhang98/IncreLoRA",
    code_licence="none stated; its loralib folder MIT",
    equations={
        "S": "sensitivity",
        "I, U": "smoothed",
        "h largest": "largest",
        "R": "orthogonality",
        "rounds": "RankGrowth",
    },
    deviations=("s does not shrink as the rank grows", "the budget is never passed", "the unused reserve rests"),
    aliases=("incremental parameter allocation", "rank allocation", "advance learning", "growing rank"),
    status="draft",
    verified="2026-11-29",
    layers={"IncreLoRALinear": IncreLoRALinear},
)
