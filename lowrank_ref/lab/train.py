"""One plain training loop, with checkpoints that resume bit for bit, are checked whole, and never replaced by bad ones.

    history = train(model, batch, loss_fn, optimizer, steps=200, schedule=linear_decay(200))

`batch(i)` must be a pure function of i (as those of `lab.data` are): that is why a checkpoint needs no data state.
"""

import copy
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lowrank_ref.core.checks import check_integer, check_number, finite
from lowrank_ref.core.io import (
    card_mismatches,
    check_place,
    layer_cards,
    load_all,
    load_plain,
    mismatches,
    plain_path,
    plain_state,
    read_file,
    refuse,
    write_file,
)
from lowrank_ref.lab._tools import numbers, progress_bar

__all__ = ["History", "Steppable", "linear_decay", "train", "warmup_cosine"]

_FORMAT = "lowrank_ref.lab.train, version 2"
#: Bytes of the SHA-256 at the end of a checkpoint. PyTorch, which reads the rest, does not mind them.
SEAL = 32


@runtime_checkable
class Steppable(Protocol):
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
    actions: Sequence[Steppable] = (),
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
        model: what trains in it (a module whose parameters all train, or that owns one that does) is in training mode
            while this runs, so that its dropout acts; frozen parts stay in the mode they come in, and so does all of it
            in the end. `evaluate` sees it in eval mode and without gradients.
        batch: index -> arguments of the loss.
        loss_fn: called as `loss_fn(model, *batch(i))`, returns a scalar to minimise.
        optimizer: over the parameters to train.
        steps: optimizer steps, >= 1, counted from the beginning also after a resume.
        schedule: step (from 0) -> factor >= 0 on every group's first learning rate, which is kept in its "initial_lr";
            None leaves the rates alone.
        actions: their `.step()` is called, in order, after `optimizer.step()`; those that are attached act themselves.
        accumulate: batches averaged into one step, >= 1.
        clip: longest allowed gradient, > 0, as the 2-norm over all parameters; None does not clip.
        evaluate: model -> named numbers, at the end and every `every` steps.
        every: steps between evaluations; 0 evaluates only at the end.
        checkpoint: file to resume from if it exists, and to write. It holds model, optimizer, actions, history and
            PyTorch's random state, so a resumed run ends in the same bits as an uninterrupted one. A compiled or
            wrapped model and a plain one share checkpoints.
        save_every: steps between writes; 0 writes only at the end.
        progress: True or False; None shows a bar unless LOWRANK_PROGRESS=0.

    Returns:
        The history of the whole run, including the part before a resume.

    Raises:
        FloatingPointError: the loss is not finite, or after the last step or before a write a trained parameter is not;
            the message names the step. A checkpoint that was good stays.
        TypeError, ValueError: an argument of a wrong type or out of range; an optimizer that holds none of the trained
            parameters; clipping or accumulation with per-layer updates; an action whose state cannot be saved; a
            checkpoint that is damaged, from another model, optimizer (or options of it) or action, or already past
            `steps`; model, optimizer and actions are then as they were.
        OSError: the folder of the checkpoint is missing or read-only, noticed before the first step.
    """
    _check_arguments(steps=steps, accumulate=accumulate, every=every, save_every=save_every, clip=clip)
    _check_optimizer(model, optimizer, one_pass=clip is None and accumulate == 1)
    path = Path(checkpoint) if checkpoint is not None else None
    if save_every and path is None:
        raise ValueError(f"save_every: got {save_every} without a checkpoint, wanted a file to write to")
    for action in actions:
        if not isinstance(action, Steppable) and (path is not None or not hasattr(action, "step")):
            raise TypeError(f"actions: got {type(action).__name__}, wanted step(), state_dict() and load_state_dict()")
    history, start = History(), 0
    cards = {
        "layers": layer_cards(model),
        "optimizer": _optimizer_card(model, optimizer),
        "actions": [type(action).__name__ for action in actions],
    }
    if path is not None:
        check_place(path)
        _check_saving(optimizer, actions)
        if path.exists():
            history, start = _load(path, model, optimizer, actions, cards, steps)

    with _training(model):
        for step in progress_bar(range(start, steps), total=steps - start, label="training", show=progress):
            if schedule is not None:
                factor = float(schedule(step))
                check_number(f"schedule({step})", factor, low=0)
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
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            for action in actions:
                if not getattr(action, "attached", False):  # that one acted inside optimizer.step()
                    action.step()
            history.loss.append(mean)

            last = step + 1 == steps
            due = path is not None and (last or (save_every and (step + 1) % save_every == 0))
            if last or due:
                _check_weights(model, optimizer, step)
            if evaluate is not None and (last or (every and (step + 1) % every == 0)):
                history.evaluations.append({"step": step + 1, **_evaluate(evaluate, model)})
            if path is not None and due:
                _save(path, model, optimizer, actions, history, cards)
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


def _check_arguments(*, clip: float | None, **counts: int) -> None:
    for name, value in counts.items():
        check_integer(name, value)
    if counts["steps"] < 1 or counts["accumulate"] < 1:
        raise ValueError(f"steps, accumulate: got {counts['steps']}, {counts['accumulate']}, wanted both at least 1")
    for name in ("every", "save_every"):
        check_integer(name, counts[name], low=0)
    if clip is not None:
        check_number("clip", clip, low=0, open_low=True)


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, one_pass: bool) -> None:
    """Refuse an optimizer that would train nothing, or that steps before gradients are complete or clipped."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if trained and trained.isdisjoint(map(id, held)):
        got = f"none of the {len(trained)} trained parameters of the model"
        raise ValueError(f"optimizer: got {got}, wanted them: build it after the last change of the model's layers")
    if not one_pass and any(getattr(p, "_post_accumulate_grad_hooks", None) for p in held):
        raise ValueError("optimizer: got per-layer updates, which step inside backward, wanted no clip, accumulate=1")


def _check_saving(optimizer: torch.optim.Optimizer, actions: Sequence[Steppable]) -> None:
    """Refuse, before the work is done, options and actions that could not be read back."""
    try:
        _read(_bytes([optimizer.state_dict()["param_groups"], *(action.state_dict() for action in actions)]))
    except Exception as error:
        raise ValueError(f"checkpoint: got optimizer or actions that cannot be saved and read back: {error}") from error


def _check_weights(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Refuse trained parameters and moments that are not finite, and buffers with NaN (infinity is right in a mask)."""
    bad = [name for name, p in model.named_parameters() if p.requires_grad and not bool(finite(p).all())]
    buffers = ((name, b) for name, b in model.named_buffers() if b.is_floating_point())
    bad += [name for name, b in buffers if bool(torch.isnan(b.float()).any())]
    for state in optimizer.state.values():
        bad += [f"the optimizer's {k}" for k, t in state.items() if isinstance(t, Tensor) and not bool(finite(t).all())]
    if bad:
        raise FloatingPointError(f"model: got NaN or infinity in {bad[:4]} after step {step}, wanted finite numbers")


def _optimizer_card(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class, and of each group the names of its parameters and its plain options as they were at the start."""
    names = {id(p): plain_path(model, name) for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        options = {**group, "lr": group.get("initial_lr", group["lr"])}
        options = {k: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in options.items()}
        plain = {k: v for k, v in options.items() if k != "initial_lr" and _is_plain(v)}
        groups.append({"params": [names.get(id(p), tuple(p.shape)) for p in group["params"]], **plain})
    return {"class": type(optimizer).__name__, "groups": groups}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) is tuple else type(value) in (bool, int, float, str)


def _card_lines(got: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Yield a line for everything in which two runs differ."""
    yield from card_mismatches(got["layers"], wanted["layers"])
    for what in ("actions", "optimizer"):
        one, two = got[what], wanted[what]
        if what == "optimizer" and one["class"] == two["class"] and len(one["groups"]) == len(two["groups"]):
            for i, (old, new) in enumerate(zip(one["groups"], two["groups"])):
                for key in sorted(old.keys() | new.keys()):
                    if old.get(key) != new.get(key):
                        yield f"optimizer, group {i}, {key}: {old.get(key)} in the file, {new.get(key)} here"
        elif one != two:
            yield f"{what}: {one} in the file, {two} here"


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Give every module its mode back in the end; setting the model's alone would wake frozen parts."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.train(before[0][1])
        for module, training in before:
            module.training = training


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Put what trains into training mode."""
    with _modes(model):
        for module in model.modules():
            own = any(p.requires_grad for p in module.parameters(recurse=False))
            flags = [p.requires_grad for p in module.parameters()]
            if flags and all(flags):
                module.train()
            elif own:  # an adapter, say: its base stays as it is, its dropout acts
                module.training = True
                for child in module.children():
                    if not any(True for _ in child.parameters()):
                        child.train()
        yield


@torch.no_grad()
def _evaluate(evaluate: Callable[[nn.Module], dict[str, float]], model: nn.Module) -> dict[str, float]:
    with _modes(model):
        model.eval()
        return numbers(evaluate(model))


def _bytes(state: Any) -> bytes:
    """Return a state as PyTorch writes it, and its SHA-256."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue() + hashlib.sha256(file.getvalue()).digest()


def _read(data: bytes) -> Any:
    body, seal = data[:-SEAL], data[-SEAL:]
    if hashlib.sha256(body).digest() != seal:
        raise ValueError("its SHA-256 is another")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def _save(path: Path, model, optimizer, actions: Sequence[Steppable], history: History, cards: dict[str, Any]) -> None:
    """Write in one step: whoever is killed on the way leaves the old checkpoint whole."""
    state = {
        "format": _FORMAT,
        "cards": cards,
        "model": plain_state(model),
        "optimizer": optimizer.state_dict(),
        "actions": [action.state_dict() for action in actions],
        "history": asdict(history),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    write_file(path, _bytes(state))


def _load(path: Path, model, optimizer, actions, cards: dict[str, Any], steps: int) -> tuple[History, int]:
    """Restore everything, or raise and restore nothing. All is checked before anything is loaded."""
    try:
        state = _read(read_file(path))
    except Exception as error:  # a torn file can fail anywhere inside zip, pickle or torch
        raise ValueError(f"checkpoint: {path} cannot be read ({error}); wanted a file written by train()") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"checkpoint: {path} is no {_FORMAT!r} file")
    history = History(**state["history"])
    done = len(history.loss)
    if done > steps:
        raise ValueError(f"checkpoint: got {done} steps in {path}, wanted at most steps = {steps}")
    where, model_state = f"checkpoint {path}", plain_state(model)
    got, wanted = ({n: t for n, t in s.items() if isinstance(t, Tensor)} for s in (state["model"], model_state))
    refuse(where, [*_card_lines(state["cards"], cards), *mismatches(got, wanted, infinite=True)])
    parts = [(optimizer.load_state_dict, state["optimizer"], copy.deepcopy(optimizer.state_dict()))]
    parts += [(a.load_state_dict, new, copy.deepcopy(a.state_dict())) for a, new in zip(actions, state["actions"])]
    parts += [(torch.set_rng_state, state["rng"], torch.get_rng_state())]
    load_all(where, [(partial(load_plain, model), state["model"], copy.deepcopy(model_state)), *parts])
    for i, device_state in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, i)
    return history, done
