"""What acts while a Maestro network trains: which layer is cut where in the next step, and which components go.

All are actions: attach them to the optimizer, the shrinker first, or call `.step()` after `optimizer.step()`; their
`state_dict()` lets a run resume in the same bits.
"""

from typing import Any

import torch
from torch import nn

from lowrank_ref.compression.maestro import importance, rank_pairs
from lowrank_ref.compression.maestro_layers import maestro_layers
from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_integer, check_number

__all__ = ["JointRankSampler", "RankSampler", "RankShrinker"]


class RankSampler(Action):
    """Ordered dropout on ranks: cut one layer in each step, so that all (layer, b) come once a pass, mixed.

    The first cut is set here, the next after every step of the optimizer. Cuts act in training mode only. A new pass
    begins when one is over and when a layer has shrunk; the official one, if it shrinks, with every epoch.

    Args:
        model: holds at least one Maestro layer.
        generator: decides the order, on the CPU; None is PyTorch's global one. Seed it alike on all processes. A run
            resumes in the same bits if it is given here: the state of the global one is not saved with this action.

    Raises:
        ValueError: no Maestro layer.

    Example:
        >>> import torch
        >>> from lowrank_ref.compression import MaestroLinear, RankSampler
        >>> model = torch.nn.Sequential(MaestroLinear.from_linear(torch.nn.Linear(4, 3)))
        >>> sampler = RankSampler(model, generator=torch.Generator())
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> sampler.attach(optimizer).attached, 1 <= model[0].width <= 3
        (True, True)
    """

    def __init__(self, model: nn.Module, *, generator: torch.Generator | None = None) -> None:
        self.layers = [layer for _, layer in maestro_layers(model)]
        if not self.layers:
            raise ValueError(f"model: got {type(model).__name__} without Maestro layer, wanted at least one")
        self.generator = generator
        self.ranks: list[int] = []
        self.order: list[int] = []
        self.position = 0
        self.act()

    def act(self) -> None:
        """Choose the next pair."""
        ranks = [layer.rank for layer in self.layers]
        if ranks != self.ranks or self.position == len(self.order):
            self.ranks, self.position = ranks, 0
            self.order = torch.randperm(sum(ranks), generator=self.generator).tolist()
        self.position += 1
        self._cut()

    def _cut(self) -> None:
        chosen, rank = rank_pairs(self.ranks)[self.order[self.position - 1]]
        for place, layer in enumerate(self.layers):
            layer.cut = rank if place == chosen else None

    def state_dict(self) -> dict[str, Any]:
        """Return the pass, the place in it, and the generator's state."""
        state = {"ranks": list(self.ranks), "order": list(self.order), "position": self.position}
        return {**state, "generator": None if self.generator is None else self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to another sampler or another number of layers, or is no place in a pass.
        """
        self._check_layers(state, "ranks")
        ranks, order, position = list(state["ranks"]), list(state["order"]), state["position"]
        if sorted(order) != list(range(sum(ranks))) or not 1 <= position <= len(order):
            raise ValueError(f"state: got place {position} of {len(order)}, wanted one in a pass over ranks {ranks}")
        self._load_generator(state)
        self.ranks, self.order, self.position = ranks, order, position
        self._cut()

    def _check_layers(self, state: dict[str, Any], key: str) -> None:
        self._check_keys(state)
        if len(state[key]) != len(self.layers):
            raise ValueError(f"state: got {len(state[key])} layers, wanted {len(self.layers)}")

    def _load_generator(self, state: dict[str, Any]) -> None:
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])


class JointRankSampler(RankSampler):
    """Cut every layer in every step, each at its own b, uniform on 1 to its rank: trains for cuts of all layers.

    The official repository has it too, as `IndependentSampler`.

    Example:
        >>> import torch
        >>> from lowrank_ref.compression import JointRankSampler, MaestroLinear
        >>> model = torch.nn.Sequential(*(MaestroLinear.from_linear(torch.nn.Linear(4, 4)) for _ in range(3)))
        >>> sampler = JointRankSampler(model, generator=torch.Generator())
        >>> all(1 <= layer.width <= 4 for layer in model)
        True
    """

    def act(self) -> None:
        """Draw a cut for each layer."""
        for layer in self.layers:
            layer.cut = int(torch.randint(1, layer.rank + 1, (), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        """Return the cuts and the generator's state."""
        cuts = [layer.cut for layer in self.layers]
        return {"cuts": cuts, "generator": None if self.generator is None else self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state; raises like `RankSampler`."""
        self._check_layers(state, "cuts")
        for cut in state["cuts"]:
            check_integer("cuts", cut, low=1)
        self._load_generator(state)
        for layer, cut in zip(self.layers, state["cuts"]):
            layer.cut = cut


class RankShrinker(Action):
    """Progressive shrinking: every so many steps, each layer keeps the components with I_b >= ε, at least one.

    The tensors keep their size, so optimizer state stays valid; `deployed` slices at the end. I_b sums over *all* rows
    from b on, dropped ones among them, as the paper writes it and the official code computes it: a second look at
    weights that have not changed drops nothing more. Dropped components do not come back.

    Args:
        model: holds at least one Maestro layer.
        threshold: ε >= 0.
        every: steps between two looks, the length of an epoch in the paper.

    Raises:
        TypeError, ValueError: an option out of range, or no Maestro layer.

    Example:
        >>> import torch
        >>> from lowrank_ref.compression import MaestroLinear, RankShrinker
        >>> model = torch.nn.Sequential(MaestroLinear(torch.eye(3)[:2], torch.eye(3)[:, :2] * torch.tensor([1.0, 0.0])))
        >>> RankShrinker(model, threshold=0.1, every=1).step()
        >>> model[0].rank
        1
    """

    def __init__(self, model: nn.Module, *, threshold: float = 1e-5, every: int) -> None:
        check_number("threshold", threshold, low=0)
        check_integer("every", every, low=1)
        self.layers = [layer for _, layer in maestro_layers(model)]
        if not self.layers:
            raise ValueError(f"model: got {type(model).__name__} without Maestro layer, wanted at least one")
        self.threshold, self.every, self.steps = threshold, every, 0

    state_names = ("steps",)  # the ranks are in the model's state dict

    @torch.no_grad()
    def act(self) -> None:
        """Count a step, and shrink if it is time."""
        self.steps += 1
        if self.steps % self.every == 0:
            for layer in self.layers:
                kept = int((importance(layer.A, layer.B) >= self.threshold).sum())
                layer.rank = min(layer.rank, max(1, kept))
