"""Who finds the planted ranks: every allocator with its settings, on the bed whose answer is known.

An allocator is an entry of `ALLOCATORS`; each of its settings is an arm, tried at several rates. Adding one is one more
entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from adapter_arms import CutAt, Setup
from torch import nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.ranks import ProximalGates, SoRALinear, gate_groups, prune, prune_by_svd

LARGEST = 12  # rank of every layer before anything is taken away
TRUTH = (0, 1, 1, 8)
PER_RANK = 64  # numbers of a rank of a layer of width 32
KEPT = (6, 8, 10, 12, 16, 24)  # ranks in all that a cut may leave


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


ALLOCATORS = {
    "uniform": Allocator("nothing: one rank for all layers", "r", (1, 2, 3, 4, 5, 8, 12), uniform),
    "SVD cut": Allocator("singular values after training", "k", KEPT, cut),
    "cut, then finish": Allocator("singular values halfway", "k", KEPT, cut_halfway),
    "SoRA": Allocator("gates under an L1 pull", "λ", (0.1, 0.2, 0.4, 0.8, 1.2), sora),
    "oracle": Allocator("the truth", "", (0,), told, 0.02),
}


def arm(name: str, setting: float) -> str:
    """Return what rows call it: "uniform r=3", "oracle"."""
    letter = ALLOCATORS[name].letter
    return f"{name} {letter}={setting:g}" if letter else name
