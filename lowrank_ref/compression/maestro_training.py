"""What acts while a Maestro network trains: which layer is cut where in the next step, and which components go.

Both are actions: `.step()` comes after `optimizer.step()`, and `state_dict()` lets a run resume in the same bits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ref.compression.maestro import importance, rank_pairs
from lowrank_ref.compression.maestro_layers import maestro_layers
from lowrank_ref.core.checks import check_integer, check_number

__all__ = ["JointRankSampler", "RankSampler", "RankShrinker"]


class RankSampler:
    """Ordered dropout on ranks: cut one layer in each step, so that all (layer, b) come once a pass, mixed.

    The first cut is set here, the next by every `step()`. Cuts act in training mode only. When a layer has shrunk, a
    new pass begins.

    Args:
        model: holds at least one Maestro layer.
        generator: decides the order, on the CPU; None is PyTorch's global one. Seed it alike on all processes.

    Raises:
        ValueError: no Maestro layer.
    """

    def __init__(self, model: nn.Module, *, generator: torch.Generator | None = None) -> None:
        self.layers = [layer for _, layer in maestro_layers(model)]
        if not self.layers:
            raise ValueError(f"model: got {type(model).__name__} without Maestro layer, wanted at least one")
        self.generator = generator
        self.ranks: list[int] = []
        self.order: list[int] = []
        self.position = 0
        self.step()

    def step(self) -> None:
        """Choose the next pair."""
        ranks = [layer.rank for layer in self.layers]
        if ranks != self.ranks or self.position == len(self.order):
            self.ranks, self.position = ranks, 0
            self.order = torch.randperm(sum(ranks), generator=self.generator).tolist()
        self.position += 1
        self._apply()

    def _apply(self) -> None:
        chosen, rank = rank_pairs(self.ranks)[self.order[self.position - 1]]
        for place, layer in enumerate(self.layers):
            layer.cut = rank if place == chosen else None

    def state_dict(self) -> dict[str, Any]:
        """Return the pass, the place in it, and the generator's state."""
        state = {"ranks": self.ranks, "order": self.order, "position": self.position}
        return {**state, "generator": None if self.generator is None else self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to another sampler or another number of layers.
        """
        self._check(state)
        self.ranks, self.order, self.position = list(state["ranks"]), list(state["order"]), state["position"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
        self._apply()

    def _check(self, state: dict[str, Any]) -> None:
        wanted = self.state_dict()
        if state.keys() != wanted.keys():
            raise ValueError(f"state: got {sorted(state)}, wanted {sorted(wanted)}")
        first = next(iter(wanted))
        if len(state[first]) != len(self.layers):
            raise ValueError(f"state: got {len(state[first])} layers, wanted {len(self.layers)}")


class JointRankSampler(RankSampler):
    """Cut every layer in every step, each at its own b, uniform on 1 to its rank: trains for cuts of all layers."""

    def step(self) -> None:
        """Draw a cut for each layer."""
        for layer in self.layers:
            layer.cut = int(torch.randint(1, layer.rank + 1, (), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        """Return the cuts and the generator's state."""
        cuts = [layer.cut for layer in self.layers]
        return {"cuts": cuts, "generator": None if self.generator is None else self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state; raises like `RankSampler`."""
        self._check(state)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
        for layer, cut in zip(self.layers, state["cuts"]):
            layer.cut = cut


class RankShrinker:
    """Progressive shrinking: every so many steps, each layer keeps the components with I_b >= ε, at least one.

    The tensors keep their size, so optimizer state stays valid; `deployed` slices at the end.

    Args:
        model: holds at least one Maestro layer.
        threshold: ε >= 0.
        every: steps between two looks, the length of an epoch in the paper.

    Raises:
        TypeError, ValueError: an option out of range, or no Maestro layer.
    """

    def __init__(self, model: nn.Module, *, threshold: float = 1e-5, every: int) -> None:
        check_number("threshold", threshold, low=0)
        check_integer("every", every, low=1)
        self.layers = [layer for _, layer in maestro_layers(model)]
        if not self.layers:
            raise ValueError(f"model: got {type(model).__name__} without Maestro layer, wanted at least one")
        self.threshold, self.every, self.steps = threshold, every, 0

    @torch.no_grad()
    def step(self) -> None:
        """Count a step, and shrink if it is time."""
        self.steps += 1
        if self.steps % self.every == 0:
            for layer in self.layers:
                kept: Tensor = importance(*layer.kept()) >= self.threshold
                layer.rank = max(1, int(kept.sum()))

    def state_dict(self) -> dict[str, Any]:
        """Return the count of steps; the ranks are in the model's state dict."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved count."""
        self.steps = state["steps"]
