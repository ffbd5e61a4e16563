"""What acts while a model trains: proximal steps, schedules, samplers and allocators of ranks."""

import copy
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

Self = TypeVar("Self", bound="Action")


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that takes the steps, out of wrappers such as accelerate's.

    Raises:
        TypeError: no optimizer of PyTorch.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


class Action:
    """Base class of what acts after every step of an optimizer.

    Attached, `action.attach(optimizer)`, it acts inside `optimizer.step()`: before a schedule changes the learning
    rate, also in transformers' `Trainer` and in accelerate, and not in a step that a `GradScaler` skips. Several act in
    the order in which they were attached. By hand: `action.step()` right after `optimizer.step()`.

    A subclass defines `act`. Its state is made of the attributes in `state_names`, or of what its own `state_dict` and
    `load_state_dict` say. Attachment is no state: a copy or a pickle is not attached. An action that has an attribute
    `optimizer` attaches to that one only.

    Example:
        >>> import torch
        >>> from lowrank_ref.core.actions import Action
        >>> class Counter(Action):
        ...     steps, state_names = 0, ("steps",)
        ...     def act(self):
        ...         self.steps += 1
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        >>> counter = Counter().attach(optimizer)
        >>> optimizer.step()
        >>> counter.state_dict()
        {'steps': 1}
    """

    state_names: tuple[str, ...] = ()
    _handle: RemovableHandle | None = None

    def act(self) -> None:
        """Do once what follows a step of the optimizer."""
        raise NotImplementedError

    def step(self) -> None:
        """Act, by hand.

        Raises:
            RuntimeError: the action is attached; it would act twice.
        """
        if self.attached:
            raise RuntimeError(
                f"step: got a call by hand, but this {type(self).__name__} is attached and acts in optimizer.step();"
                " wanted one of the two (detach() ends the attachment)"
            )
        self.act()

    @property
    def attached(self) -> bool:
        """Tell whether it acts by itself."""
        return self._handle is not None

    def attach(self: Self, optimizer: torch.optim.Optimizer) -> Self:
        """Act from now on after every step of this optimizer, until `detach()`. Returns the action.

        Raises:
            TypeError: no optimizer of PyTorch.
            ValueError: the action was made for another optimizer.
            RuntimeError: it is attached already.
        """
        optimizer = innermost(optimizer)
        if innermost(getattr(self, "optimizer", optimizer)) is not optimizer:
            raise ValueError(f"optimizer: got another {type(optimizer).__name__}, wanted the one that this acts on")
        if self.attached:
            raise RuntimeError(f"attach: got a {type(self).__name__} that is attached already, wanted detach() first")
        self._handle = optimizer.register_step_post_hook(lambda *_: self.act())
        return self

    def detach(self) -> None:
        """Stop acting by itself. Without attachment nothing happens."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {name: copy.copy(getattr(self, name)) for name in self.state_names}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take back what `state_dict` returned; the state of something else raises a ValueError."""
        self._check_keys(state)
        for name in self.state_names:
            setattr(self, name, copy.copy(state[name]))

    def _check_keys(self, state: dict[str, Any]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state: got keys {sorted(state)}, wanted {sorted(self.state_dict())}")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_handle"}
