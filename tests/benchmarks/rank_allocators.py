"""Who finds the planted ranks: every allocator with its settings, on the bed whose answer is known.

An allocator is an entry of `ALLOCATORS`; each of its settings is an arm, tried at several rates. Adding one is one more
entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from adapter_arms import ActAt, CutAt, Setup, train_what_is_left
from bench_increlora_small import Masking, Matrices
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.actions import Action
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds import planted_rank
from lowrank_ref.lab.data import array_batches
from lowrank_ref.ranks import (
    BayesianLoRALinear,
    CoDyRALinear,
    DiffoRALinear,
    GateSampler,
    IncreLoRALinear,
    ModuleSearch,
    ProximalGates,
    RankGrowth,
    RankSelection,
    SoRALinear,
    bit_cost,
    gate_groups,
    growth_groups,
    growth_schedule,
    keep_modules,
    logit_groups,
    module_logits,
    orthogonality_penalty,
    prune,
    prune_by_svd,
    top_modules,
    update_norms,
)

LARGEST = 12  # rank of every layer before anything is taken away
TRUTH = (0, 1, 1, 8)
PER_RANK = 64  # numbers of a rank of a layer of width 32
KEPT = (6, 8, 10, 12, 16, 24)  # ranks in all that a cut may leave
RANK = 8  # of a layer that a search has chosen
Scores = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Allocator:
    """What decides the ranks.

    Attributes:
        decides: what it decides by, in words.
        letter: of its setting.
        settings: what is tried of it, each at every rate.
        put: (model, setting, generator) -> changes the model in place; groups, actions and what ends the training.
        rate: learning rate in the middle of those tried first.
    """

    decides: str
    letter: str
    settings: tuple[float, ...]
    put: Callable[[nn.Module, Any, torch.Generator], Setup]
    rate: float = 0.01


def _lora(model: nn.Module, rank: int, generator: torch.Generator, pattern: str = "") -> None:
    replace_linears(model, pattern, partial(LoRALinear, rank=rank, alpha=2 * rank, generator=generator))


def uniform(model: nn.Module, rank: int, generator: torch.Generator) -> Setup:
    """The same rank everywhere."""
    _lora(model, rank, generator)
    return Setup()


def told(model: nn.Module, _: float, generator: torch.Generator) -> Setup:
    """The planted ranks."""
    for i, rank in enumerate(TRUTH):
        if rank:
            _lora(model, rank, generator, f"^layers.{i}$")
    return Setup()


def cut(model: nn.Module, kept: int, generator: torch.Generator) -> Setup:
    """The largest rank, cut in the end."""
    _lora(model, LARGEST, generator)

    def finish(trained: nn.Module) -> None:
        prune_by_svd(trained, PER_RANK * kept)

    return Setup(finish=finish)


def cut_halfway(model: nn.Module, kept: int, generator: torch.Generator) -> Setup:
    """The largest rank for half of the steps, then cut and trained on."""
    _lora(model, LARGEST, generator)
    budget = PER_RANK * kept
    return Setup(actions=lambda model, optimizer, steps: [CutAt(model, optimizer, at=steps // 2, budget=budget)])


def sora(model: nn.Module, penalty: float, generator: torch.Generator) -> Setup:
    """Gates that fall to zero."""
    alpha = 2 * LARGEST
    replace_linears(model, "", partial(SoRALinear, rank=LARGEST, alpha=alpha, gate="ones", generator=generator))

    def finish(trained: nn.Module) -> None:
        prune(trained)

    return Setup(
        groups=gate_groups(model),
        actions=lambda model, optimizer, steps: [ProximalGates(model, optimizer, penalty=penalty)],
        finish=finish,
    )


def increlora(model: nn.Module, budget: int, generator: torch.Generator, weight: float = 0.1) -> Setup:
    """Rank 1 everywhere, and a round each time until the budget is spent, at the latest halfway."""
    replace_linears(model, "", partial(IncreLoRALinear, capacity=LARGEST, generator=generator))

    def actions(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
        warmup, rounds = max(1, round(0.06 * steps)), budget - len(TRUTH)
        every = max(1, (steps // 2 - warmup) // rounds)
        growth = RankGrowth(model, optimizer, budget=budget, every=every, warmup=warmup)
        clocks = growth_schedule(optimizer, growth, steps=steps, warmup=warmup)

        def own_rates(*_: Any) -> None:  # the bed has just set those of its common schedule
            for group, lr in zip(optimizer.param_groups, clocks.get_last_lr()):
                group["lr"] = lr

        optimizer.register_step_pre_hook(own_rates)
        return [growth, clocks]

    penalty = (lambda model: weight * orthogonality_penalty(model)) if weight else None
    return Setup(growth_groups(model), actions, penalty=penalty)


def codyra(model: nn.Module, shrink: float, generator: torch.Generator) -> Setup:
    """Gates under a threshold that rises in the second half."""
    replace_linears(model, "", partial(CoDyRALinear, rank=LARGEST, generator=generator))

    def actions(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
        return [RankSelection(model, optimizer, steps=steps, shrink=shrink, levels=min(50, steps // 2 - 1))]

    def finish(trained: nn.Module) -> None:
        prune(trained)

    return Setup(gate_groups(model), actions, finish)


def bayesian(model: nn.Module, penalty: float, generator: torch.Generator) -> Setup:
    """Random gates on ranks and bits, which a price pushes shut."""
    alpha = 2 * LARGEST
    replace_linears(model, "", partial(BayesianLoRALinear, rank=LARGEST, alpha=alpha, generator=generator))

    def actions(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
        optimizer.param_groups[2]["lr"] = 0.1  # of the logits, whatever the others have
        return [GateSampler(model, generator=generator)]

    def finish(trained: nn.Module) -> None:
        trained.eval()

    return Setup(logit_groups(model, 1.0), actions, finish, lambda model: penalty * bit_cost(model))


class KeepAt(ActAt):
    """Ends a search after so many steps: LoRA of rank 8 where the choice fell, and nothing elsewhere."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scores: Scores, *, at: int, keep: int):
        super().__init__(at)
        self.model, self.optimizer, self.scores, self.keep = model, optimizer, scores, keep

    def now(self) -> None:
        """Choose."""
        chosen = top_modules(self.scores(self.model), self.keep)
        keep_modules(self.model, chosen, rank=RANK, generator=torch.Generator().manual_seed(self.at))
        train_what_is_left(self.model, self.optimizer)


class SearchUntil(Action):
    """A search that rests after so many steps."""

    state_names = ()

    def __init__(self, search: ModuleSearch, until: int):
        self.search, self.until = search, until

    def act(self) -> None:
        """Let θ move."""
        if self.search.steps < self.until:
            self.search.act()


def diffora(
    model: nn.Module, keep: int, generator: torch.Generator, scores: Scores = module_logits, lr: float = 0.1
) -> Setup:
    """A gate for each layer; after a third of the steps the layers with the largest gates get LoRA of rank 8."""
    alpha, task = 2 * LARGEST, planted_rank(generator.initial_seed())
    replace_linears(model, "", partial(DiffoRALinear, rank=LARGEST, alpha=alpha, generator=generator))
    batch = array_batches(task.x_train, task.y_train, batch=128, seed=1000 + generator.initial_seed())

    def actions(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
        at = max(2, steps // 3)
        search = ModuleSearch(model, lambda model, x, y: F.mse_loss(model(x), y), batch, lr=lr, warmup=min(20, at // 2))
        train_what_is_left(model, optimizer)  # θ is the search's
        return [SearchUntil(search, at), KeepAt(model, optimizer, scores, at=at, keep=keep)]

    return Setup(actions=actions)


def adalora(model: nn.Module, budget: int, generator: torch.Generator) -> Setup:
    """PEFT's AdaLoRA, from rank 12 to the budget between a tenth and half of the steps."""
    import peft

    torch.manual_seed(generator.initial_seed())  # all that PEFT draws from
    config = peft.AdaLoraConfig(
        init_r=LARGEST,
        target_r=budget // len(TRUTH),
        total_step=400,
        lora_alpha=2 * LARGEST,
        lora_dropout=0.0,
        target_modules=[f"layers.{i}" for i in range(len(TRUTH))],
    )
    inner: Any = peft.get_peft_model(model, config)

    def actions(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
        config.total_step, config.tinit, config.tfinal = steps, steps // 10, steps // 2
        config.deltaT = max(1, steps // 80)
        return [Masking(inner)]

    def finish(trained: nn.Module) -> None:
        inner.merge_and_unload()

    return Setup(None, actions, finish, lambda _: Matrices(inner).penalty())


ALLOCATORS = {
    "uniform": Allocator("nothing: one rank for all layers", "r", (1, 2, 3, 4, 5, 8, 12), uniform),
    "SVD cut": Allocator("singular values after training", "k", KEPT, cut),
    "cut, then finish": Allocator("singular values halfway", "k", KEPT, cut_halfway),
    "SoRA": Allocator("gates under an L1 pull", "λ", (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2), sora),
    "AdaLoRA": Allocator("importance, cut step by step", "k", (8, 12, 16, 24), adalora),
    "IncreLoRA": Allocator("importance, grown step by step", "k", KEPT, increlora),
    "IncreLoRA, no R": Allocator("the same without orthogonality", "k", KEPT, partial(increlora, weight=0.0)),
    "DiffoRA": Allocator("a gate for each layer", "K", (1, 2, 3), diffora),
    "DiffoRA, norms": Allocator(
        "the size of a layer's update", "K", (1, 2, 3), partial(diffora, scores=update_norms, lr=0.0)
    ),
    "CoDyRA": Allocator("gates under a late threshold", "c", (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8), codyra),
    "Bayesian-LoRA": Allocator("random gates that have a price", "μ", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3), bayesian),
    "oracle": Allocator("the truth", "", (0,), told, 0.02),
}


def arm(name: str, setting: float) -> str:
    """Return what rows call it: "uniform r=3", "oracle"."""
    letter = ALLOCATORS[name].letter
    return f"{name} {letter}={setting:g}" if letter else name
