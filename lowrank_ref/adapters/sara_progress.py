"""SaRA's progressive step: half-way, what has grown beyond the threshold stays where it is, and the rest trains on."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ref.adapters.sara import SaRALinear, sara_layers
from lowrank_ref.core.actions import Action, innermost
from lowrank_ref.core.checks import check_integer


class ProgressiveSelection(Action):
    """At one step, lets of the trained weights only those train on that are still below θ: M' = M ∘ 1[abs P < θ].

    The others keep the value that they have then: they get no gradient, and after each step, which decay or momentum
    may have moved them by, they are put back. The optimizer's state keeps its size. Attach it, or call `.step()` right
    after `optimizer.step()`. Under DDP it is the same everywhere; under FSDP shard no layer of it.

    Args:
        model: holds at least one SaRA layer.
        optimizer: trains the values of all of them.
        at: after how many steps, >= 1; the paper takes half of all.
        moments: "keep" leaves Adam's state to those that train on, as the official mask variant does, "reset" forgets
            it, as the official default does.
        rule: "below" is the method, with each layer's own θ; "random" is the control: as many, drawn.
        generator: draws them.

    Attributes:
        kept: path -> (trained before the switch, trained after it).

    Raises:
        TypeError, ValueError: no SaRA layer, values that the optimizer does not train, an argument out of range.

    Example:
        >>> import torch
        >>> from torch import nn, optim
        >>> from lowrank_ref.adapters import ProgressiveSelection, SaRALinear
        >>> base = nn.Linear(3, 1)
        >>> base.weight.data = torch.tensor([[-0.1, 0.1, 0.9]])
        >>> layer = SaRALinear(base, threshold=0.15)
        >>> optimizer = optim.Adam(layer.adapter_parameters().values(), lr=0.1)
        >>> selection = ProgressiveSelection(layer, optimizer, at=1).attach(optimizer)
        >>> layer(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()  # both selected weights fall by 0.1: the first has grown beyond θ
        >>> layer.active.tolist()
        [False, True]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        at: int,
        moments: str = "keep",
        rule: str = "below",
        generator: torch.Generator | None = None,
    ) -> None:
        self.layers, self.optimizer = sara_layers(model), innermost(optimizer)
        check_integer("at", at, low=1)
        if moments not in ("keep", "reset"):
            raise ValueError(f"moments: got {moments!r}, wanted 'keep' or 'reset'")
        if rule not in ("below", "random"):
            raise ValueError(f"rule: got {rule!r}, wanted 'below' or 'random'")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if strangers := [path for path, layer in self.layers.items() if id(layer.values) not in held]:
            raise ValueError(f"optimizer: got no values of {strangers}, wanted those of all SaRA layers")
        self.at, self.moments, self.rule, self.generator = at, moments, rule, generator
        self.steps, self.kept = 0, dict[str, list[int]]()
        self._fixed: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def act(self) -> None:
        """Count a step; select anew if it is time, afterwards put back what is fixed."""
        self.steps += 1
        if self.steps == self.at:
            for path, layer in self.layers.items():
                before = int(layer.active.sum())
                layer.active.copy_(self._selected(layer))
                self.kept[path] = [before, int(layer.active.sum())]
                if self.moments == "reset":
                    self.optimizer.state.pop(layer.values, None)
            self._note()
        elif self.steps > self.at:
            for path, (places, values) in self._fixed.items():
                self.layers[path].values[places] = values

    def _selected(self, layer: SaRALinear) -> Tensor:
        still = layer.active & (layer.values.abs() < layer.threshold)
        if self.rule == "below":
            return still
        own = layer.active.nonzero()[:, 0]
        device = self.generator.device if self.generator is not None else own.device
        order = torch.randperm(len(own), generator=self.generator, device=device).to(own.device)
        drawn = own[order[: int(still.sum())]]
        return torch.zeros_like(still).index_fill(0, drawn, True)

    @torch.no_grad()
    def _note(self) -> None:
        fixed = {path: (~layer.active).nonzero()[:, 0] for path, layer in self.layers.items()}
        self._fixed = {path: (places, self.layers[path].values[places].clone()) for path, places in fixed.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the count of steps, and what was kept; the masks belong to the layers."""
        return {"steps": self.steps, "kept": {path: [*counts] for path, counts in self.kept.items()}}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state, after the model has loaded its own; the state of something else: a ValueError."""
        self._check_keys(state)
        check_integer("steps", state["steps"], low=0)
        self.steps, self.kept = state["steps"], {path: [*counts] for path, counts in state["kept"].items()}
        if self.steps >= self.at:
            self._note()
