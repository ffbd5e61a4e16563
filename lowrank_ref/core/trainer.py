"""Actions inside transformers' `Trainer`. This module needs transformers; nothing else in the package does.

A Trainer's checkpoints hold model, optimizer and learning rate, and know nothing of schedules, samplers and proximal
steps: a resumed run would begin these again. accelerate asks nothing of us: `accelerator.register_for_checkpointing(
action)` saves and loads an action with the rest.
"""

import base64
import io
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lowrank_ref.core.actions import Action, innermost
from lowrank_ref.core.io import load_all


class TrainerActions(TrainerCallback, ExportableState):
    """Let actions act in a `Trainer`, and let its checkpoints keep their state: `Trainer(..., callbacks=[this])`.

    When training begins, actions that are not attached yet are attached to the Trainer's optimizer, in their order, and
    come off at the end. The state stands in the checkpoint's `trainer_state.json`, so that
    `train(resume_from_checkpoint=...)` goes on in the same bits, once the same actions are built again.

    Args:
        *actions: at least one; a Trainer takes one `TrainerActions`, with all of them.

    Raises:
        TypeError: something else than actions.
        ValueError: no action. When training begins: an action is attached to an optimizer that the Trainer does not
            use; the checkpoint holds no actions, or others.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.core.trainer import TrainerActions
        >>> from lowrank_ref.lowbit import GateSchedule, HGFLinear
        >>> model = nn.Sequential(HGFLinear(nn.Linear(8, 8), rank=2))
        >>> callbacks = [TrainerActions(GateSchedule(model, warmup=10, freeze=60))]
    """

    def __init__(self, *actions: Action) -> None:
        for action in actions:
            if not isinstance(action, Action):
                raise TypeError(f"actions: got {type(action).__name__}, wanted actions such as GateSchedule")
        self.actions, self._mine = actions, list[Action]()
        self.saved = ""  # what `restore_callback_states_from_checkpoint` would write into a new, empty callback

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into its JSON file: the state of all actions, as text."""
        file = io.BytesIO()
        torch.save([(type(action).__name__, action.state_dict()) for action in self.actions], file)
        return {"args": {}, "attributes": {"saved": base64.b64encode(file.getvalue()).decode()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Attach, and load if the Trainer resumes. ValueError: as the class says."""
        if not self.actions:
            hint = "; restore_callback_states_from_checkpoint=True builds callbacks without them" if self.saved else ""
            raise ValueError(f"actions: got none, wanted at least one{hint}")
        if state.global_step > 0:
            self._load(state.stateful_callbacks.get(type(self).__name__))
        optimizer = innermost(options["optimizer"])
        self._detach()
        for action in self.actions:
            own = innermost(getattr(action, "optimizer", optimizer))
            if not action.attached and own is optimizer:
                self._mine.append(action.attach(optimizer))
            elif own is not optimizer or action._handle.id not in optimizer._optimizer_step_post_hooks:  # type: ignore[union-attr]
                which = "is attached to" if action.attached else "was made for"
                got = f"a {type(action).__name__} that {which} another optimizer than the Trainer's"
                raise ValueError(f"actions: got {got}; hand it over as Trainer(optimizers=(optimizer, None))")

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Take off what was attached here."""
        self._detach()

    def _detach(self) -> None:
        while self._mine:
            self._mine.pop().detach()

    def _load(self, entry: Any) -> None:
        names = [type(action).__name__ for action in self.actions]
        if not isinstance(entry, dict):
            got = "several TrainerActions" if entry else "no state of actions, which would begin again"
            raise ValueError(f"checkpoint: got {got}; wanted one made with TrainerActions({', '.join(names)})")
        data = base64.b64decode(entry["attributes"]["saved"])
        saved = torch.load(io.BytesIO(data), weights_only=True)
        if [name for name, _ in saved] != names:
            raise ValueError(f"checkpoint: got the state of {[name for name, _ in saved]}, wanted {names}")
        parts = [(action.load_state_dict, new, action.state_dict()) for action, (_, new) in zip(self.actions, saved)]
        load_all("checkpoint", parts)
