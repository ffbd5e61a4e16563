"""The search of DiffoRA: after each step of A and B on one part of the data, a step of θ on the other part.

min over θ of L₂(A*(θ), B*(θ), θ) subject to A*, B* = argmin L₁(A, B, θ), by first-order alternation: A* and B* are
taken for the present A and B, and how they depend on θ is left out. That DiffoRA searches on two levels is told by a
summary of it; the alternation is that of differentiable architecture search, and our reading. Solved exactly, the inner
problem reaches every γB for every θ, so L₂(A*, B*, θ) does not depend on θ: it is the path that chooses, and so the
rates, the few steps, and the start at B = 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_finite, check_integer, check_number
from lowrank_ref.core.modes import eval_mode
from lowrank_ref.ranks.diffora import search_layers

__all__ = ["ModuleSearch"]


class ModuleSearch(Action):
    """Moves θ of every `DiffoRALinear` by one step of Adam after each step of the optimizer, on batches of its own.

    θ stops requiring gradients here, so the optimizer leaves it alone; A and B are not touched by the steps of θ, nor
    are their gradients. The forward for θ runs in eval mode: no dropout, no running statistics. Under DDP build it
    before wrapping, with the plain model, and give each process its own share of `batch`: gradients of θ are averaged.
    Its state is the count of steps, Adam's state and the history; θ belongs to the model.

    Args:
        model: holds at least one `DiffoRALinear`.
        loss_fn: called as `loss_fn(model, *batch(i))`, returns a scalar.
        batch: i = 0, 1, ... -> arguments of the loss, from data that A and B are not trained on.
        lr: learning rate of θ, >= 0. It should be well above that of A and B: gates that move later than these keep
            wrong modules.
        warmup: steps of the optimizer before θ first moves, >= 0. While B = 0 the gradient of θ is 0, and just after
            it is tiny: Adam would divide by that.

    Attributes:
        paths: of the modules, in the order of the history's columns.
        history: θ after each step of the optimizer, one tensor (modules,) a step.

    Raises:
        TypeError, ValueError: no `DiffoRALinear`, or an option out of range. On `step`: a gradient of θ that is NaN or
            infinite; nothing is then moved or counted.

    Example:
        >>> import torch
        >>> from lowrank_ref.ranks import DiffoRALinear, ModuleSearch
        >>> model = torch.nn.Sequential(DiffoRALinear(torch.nn.Linear(6, 4), rank=2))
        >>> loss_fn, batch = (lambda model, x: model(x).square().mean()), (lambda i: (torch.ones(3, 6),))
        >>> search = ModuleSearch(model, loss_fn, batch, warmup=20)
        >>> optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        >>> search.attach(optimizer).paths, model[0].logit.requires_grad
        (('0',), False)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: Callable[[int], tuple[Any, ...]],
        *,
        lr: float = 0.1,
        warmup: int = 20,
    ) -> None:
        check_number("lr", lr, low=0)
        check_integer("warmup", warmup, low=0)
        layers = search_layers(model)
        self.model, self.loss_fn, self.batch, self.warmup = model, loss_fn, batch, warmup
        self.paths, self.logits = tuple(layers), [layer.logit for layer in layers.values()]
        self.adam = torch.optim.Adam([logit.requires_grad_(False) for logit in self.logits], lr=lr)
        self.steps, self.history = 0, list[Tensor]()

    def act(self) -> None:
        """Count a step of the optimizer, and move θ once the warm-up is over. ValueError: as the class says."""
        if self.steps >= self.warmup:
            for logit, grad in zip(self.logits, self._gradients()):
                logit.grad = grad
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
        self.steps += 1
        self.history.append(torch.cat([logit.detach() for logit in self.logits]))

    def _gradients(self) -> tuple[Tensor, ...]:
        for logit in self.logits:
            logit.requires_grad_(True)
        try:
            with eval_mode(self.model), torch.enable_grad():
                loss = self.loss_fn(self.model, *self.batch(self.steps - self.warmup))
                found = torch.autograd.grad(loss, self.logits)
        finally:
            for logit in self.logits:
                logit.requires_grad_(False)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for grad in found:
                torch.distributed.all_reduce(grad)
                grad /= torch.distributed.get_world_size()
        for path, grad in zip(self.paths, found):
            check_finite(f"grad of θ at {path!r}", grad)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the count of steps, Adam's state and the history (steps, modules)."""
        history = torch.stack(self.history) if self.history else torch.zeros(0, len(self.logits))
        return {"steps": self.steps, "adam": self.adam.state_dict(), "history": history}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take back what `state_dict` returned; the state of something else, or of other modules, is a ValueError."""
        self._check_keys(state)
        check_integer("state['steps']", state["steps"], low=0)
        wanted = (state["steps"], len(self.logits))
        if tuple(state["history"].shape) != wanted:
            raise ValueError(f"state: got a history of shape {tuple(state['history'].shape)}, wanted {wanted}")
        self.adam.load_state_dict(state["adam"])
        self.steps, self.history = state["steps"], list(state["history"].unbind())
