"""One plain training loop, with checkpoints that resume bit for bit.

    history = train(model, batch, loss_fn, optimizer, steps=200, schedule=linear_decay(200))

`batch(i)` must be a pure function of i (as those of `lab.data` are): that is why a checkpoint needs no data state.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lowrank_ref.lab._tools import numbers, progress_bar

__all__ = ["Action", "History", "linear_decay", "train", "warmup_cosine"]

FORMAT = "lowrank_ref.lab.train, version 1"


@runtime_checkable
class Action(Protocol):
    """Anything that acts after the optimizer: a rank allocator, a gate schedule, a resampler."""

    def step(self) -> object: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any], /) -> object: ...  # noqa: D102


@dataclass
class History:
    """What a run left behind: the loss of every step, and `{"step": ..., **evaluate(model)}` at every evaluation."""

    loss: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


def train(
    model: nn.Module,
    batch: Callable[[int], Iterable[Any]],
    loss_fn: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    actions: Sequence[Action] = (),
    accumulate: int = 1,
    clip: float | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    every: int = 0,
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 0,
    progress: bool | None = None,
) -> History:
    """Train for `steps` optimizer steps.

    Args:
        model: left in the train or eval mode it comes in; `evaluate` sees it in eval mode and without gradients.
        batch: index -> arguments of the loss.
        loss_fn: called as `loss_fn(model, *batch(i))`, returns a scalar to minimise.
        optimizer: over the parameters to train.
        steps: optimizer steps, counted from the beginning also after a resume.
        schedule: step (from 0) -> factor on every group's first learning rate, which is kept in its "initial_lr";
            None leaves the rates alone.
        actions: their `.step()` is called, in order, after `optimizer.step()`; those that are attached act themselves.
        accumulate: batches averaged into one step.
        clip: longest allowed gradient, as the 2-norm over all parameters.
        evaluate: model -> named numbers, at the end and every `every` steps.
        every: steps between evaluations; 0 evaluates only at the end.
        checkpoint: file to resume from if it exists, and to write. It holds model, optimizer, actions, history and
            PyTorch's random state, so a resumed run ends in the same bits as an uninterrupted one.
        save_every: steps between writes; 0 writes only at the end.
        progress: True or False; None shows a bar unless LOWRANK_PROGRESS=0.

    Returns:
        The history of the whole run, including the part before a resume.

    Raises:
        FloatingPointError: the loss is NaN or infinite; the message names the step.
        ValueError: steps or accumulate below 1, or a checkpoint that is damaged, from another model or optimizer, or
            already past `steps`; model, optimizer and actions are then as they were.
    """
    if steps < 1 or accumulate < 1:
        raise ValueError(f"steps, accumulate: got {steps}, {accumulate}, wanted both at least 1")
    history, start = History(), 0
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        history, start = _load(path, model, optimizer, actions, steps)

    for step in progress_bar(range(start, steps), total=steps - start, label="training", show=progress):
        if schedule is not None:
            factor = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

        optimizer.zero_grad(set_to_none=True)
        mean = 0.0
        for k in range(accumulate):
            loss = loss_fn(model, *batch(step * accumulate + k)) / accumulate
            loss.backward()
            mean += loss.item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"loss: got {mean} at step {step}, wanted a finite number (a smaller lr?)")
        if clip is not None:
            if all(p.grad is None for p in model.parameters()):  # nothing would be clipped, silently
                raise ValueError(f"clip: got {clip} and no gradient, as with per-layer updates; wanted clip=None there")
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        for action in actions:
            if not getattr(action, "attached", False):  # that one acted inside optimizer.step()
                action.step()
        history.loss.append(mean)

        last = step + 1 == steps
        if evaluate is not None and (last or (every and (step + 1) % every == 0)):
            history.evaluations.append({"step": step + 1, **_evaluate(evaluate, model)})
        if path is not None and (last or (save_every and (step + 1) % save_every == 0)):
            _save(path, model, optimizer, actions, history)
    return history


# --- schedules: step -> factor on the learning rate -------------------------------------------------------------------


def linear_decay(steps: int) -> Callable[[int], float]:
    """Fall from 1 at step 0 to 0 at step `steps`, in a straight line."""
    return lambda step: max(0.0, 1 - step / steps)


def warmup_cosine(steps: int, *, warmup: int, final: float = 0.1) -> Callable[[int], float]:
    """Rise in a line over `warmup` steps (the last of them at 1), then fall along half a cosine to `final` at `steps`.

    Raises:
        ValueError: warmup is not below steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup: got {warmup}, wanted 0 <= warmup < steps = {steps}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min(1.0, (step - warmup) / (steps - warmup))
        return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2

    return factor


# --- inside -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _evaluate(evaluate: Callable[[nn.Module], dict[str, float]], model: nn.Module) -> dict[str, float]:
    training = model.training
    model.eval()
    try:
        return numbers(evaluate(model))
    finally:
        model.train(training)


def _save(path: Path, model, optimizer, actions: Sequence[Action], history: History) -> None:
    """Write to a second file and rename it: whoever is killed on the way leaves the old checkpoint whole."""
    state = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "actions": [action.state_dict() for action in actions],
        "history": asdict(history),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    half = path.with_name(path.name + ".part")
    with open(half, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def _load(path: Path, model, optimizer, actions: Sequence[Action], steps: int) -> tuple[History, int]:
    """Restore everything, or raise and restore nothing."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file can fail anywhere inside zip, pickle or torch
        raise ValueError(f"checkpoint: {path} cannot be read; wanted a file written by train()") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} is no {FORMAT!r} file")
    history = History(**state["history"])
    done = len(history.loss)
    if done > steps:
        raise ValueError(f"checkpoint: got {done} steps in {path}, wanted at most steps = {steps}")
    if len(state["actions"]) != len(actions):
        raise ValueError(f"checkpoint: got {len(state['actions'])} actions in {path}, wanted {len(actions)}")

    parts = [(model, state["model"]), (optimizer, state["optimizer"]), *zip(actions, state["actions"])]
    before = [copy.deepcopy(part.state_dict()) for part, _ in parts]
    try:
        for part, saved in parts:
            part.load_state_dict(saved)
    except Exception as error:
        for (part, _), old in zip(parts, before):
            part.load_state_dict(old)
        raise ValueError(f"checkpoint: {path} belongs to another model, optimizer or action: {error}") from error
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return history, done
