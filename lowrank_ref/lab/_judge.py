"""Which properties an outcome lost, and why: outcomes of a submission beside those of the reference."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lowrank_ref.lab._differences import difference, differences, effects
from lowrank_ref.lab._submission import Job, plain
from lowrank_ref.lab._trials import Trial

Accept = Callable[..., Any]


def told(judgement: Callable[[], str]) -> str:
    """Return the reason of a judgement; a process may send back anything, and a teacher's `accept` may trip over it."""
    try:
        return judgement()
    except Exception as error:
        return f"the result cannot be judged: {type(error).__name__}: {error}"


class Judge:
    """One method a property, each returning why it is lost, or ""."""

    def __init__(self, trials: Sequence[Trial], outcomes: Sequence[Job], accept: Accept | None) -> None:
        last = outcomes[-1].get("failed", "") if outcomes else ""
        rest: list[Job] = [{"failed": f"not tried, since {last}"}] * (len(trials) - len(outcomes))
        self.tried = list(zip(trials, [*outcomes, *rest]))
        self.accept = accept
        self.random = accept is not None or any(trial.group in ("same", "draws") for trial in trials)
        self.squares = list(self.of("square"))
        self.wrong = told(self.value)
        self.strict = not self.wrong and not self.random

    def of(self, group: str) -> Iterable[tuple[Trial, Job]]:
        return ((trial, got) for trial, got in self.tried if trial.group == group)

    def found(self, trial: Trial, got: Job, *, strict: bool = True) -> list[tuple[str, str]]:
        """Return all differences of a result; ("failed", text) if there is none."""
        if "failed" in got or "result" not in got:
            return [("failed", str(got.get("failed", "it returned nothing that can be read")))]
        tolerance = 1e-4 if trial.group == "dtype" else 1e-8
        try:
            found = list(differences(got["result"], trial.wanted["result"], "the result", tolerance=tolerance))
        except RecursionError:
            return [("kind", "the result is nested too deeply")]
        return [pair for pair in found if strict or pair[0] != "value"]

    def everything(self) -> str:
        """Say why no point at all is given."""
        for _, got in self.tried:
            if called := got.get("called"):
                return f"it calls {called}, which is not allowed here"
        firsts = [self.found(trial, got)[:1] for trial, got in self.squares]
        if all(first and first[0][0] in ("failed", "kind") for first in firsts):
            return firsts[0][0][1]
        never = all(self.found(trial, got) for trial, got in self.squares)
        if self.wrong and never and (ignored := self.ignored()):
            return f"{self.wrong}; nothing else counts, as the result does not depend on {' and '.join(ignored)}"
        return ""

    def ignored(self) -> list[str]:
        """Return the inputs on which the reference's result depends, but not this one."""
        group = list(self.of("depends"))
        ignored = []
        for trial, got in group[1:]:
            first, second = group[0][1].get("result"), got.get("result")
            matters = difference(trial.wanted["result"], group[0][0].wanted["result"], "")
            if matters and not difference(first, second, ""):
                ignored.append(trial.label)
        return ignored

    def value(self) -> str:
        for i, (trial, got) in enumerate(self.squares):
            for kind, text in self.found(trial, got, strict=not self.random):
                if kind == "dtype":
                    continue
                earlier = [g for _, g in self.squares[:i] if kind == "value" and "result" in g]
                stale = any(not difference(got["result"], other["result"], "") for other in earlier)
                return text + "; it is the result of an earlier call" * stale
        return self.unlikely() if self.random else ""

    def unlikely(self) -> str:
        """Say why results of a random function are no draws, or return ""."""
        for trial, got in [*self.squares, *self.of("general")] if self.accept else ():
            kinds = {kind for kind, _ in self.found(trial, got, strict=False)}
            if self.accept and kinds <= {"dtype"}:
                result = _in_dtypes_of(trial.wanted["result"], got["result"])
                answer = self.accept(result, **trial.job["inputs"])
                if isinstance(answer, str) and answer or answer is False:
                    return answer or "the result is no valid draw"
        many = list(self.of("draws"))
        if not many:
            return ""
        if failed := next((self.found(t, g, strict=False) for t, g in many if self.found(t, g, strict=False)), None):
            return failed[0][1]
        values = [_stacked([t.wanted["result"] for t, _ in many]), _stacked([g["result"] for _, g in many])]
        for what, power in (("mean", 1), ("mean square", 2)):
            wanted, mine = (value**power for value in values)
            error = ((wanted.var(0) + mine.var(0)) / len(many)).sqrt() + 1e-9
            off = (mine.mean(0) - wanted.mean(0)) / error
            worst = int(off.abs().argmax())
            if off.abs()[worst] > 6:
                has, want = mine.mean(0)[worst].item(), wanted.mean(0)[worst].item()
                return f"the {what} of entry {worst} over {len(many)} draws is {has:.4g}, of the reference's {want:.4g}"
        return ""

    def gradient(self) -> str:
        narrow = any(kind == "dtype" for trial, got in self.squares for kind, _ in self.found(trial, got))
        tolerance = 1e-4 if narrow else 1e-8  # rounding was paid for
        for trial, got in self.of("gradient"):
            if "failed" in got:
                return f"with gradients, {got['failed']}"
            if loose := [path for path in got["loose"] if path not in trial.wanted["loose"]]:
                where = f" ({', '.join(loose)})" if any(loose) else ""
                return f"the result is detached{where}: it has no gradient"
            if got.get("trained") != trial.wanted.get("trained"):
                return f"it trains {got.get('trained')}, wanted {trial.wanted.get('trained')}"
            for name, wanted in trial.wanted["gradients"].items():
                found = differences(got["gradients"].get(name), wanted, f"the gradient of {name}", tolerance=tolerance)
                if reason := next(found, ("", ""))[1]:
                    return reason
        return ""

    def state(self) -> str:
        for trial, got in self.squares:
            if "failed" in got:
                return got["failed"]
            if got.get("loaded"):
                return got["loaded"]
            for (name, wanted), mine in zip(trial.wanted.get("initial", {}).items(), got.get("initial", {}).values()):
                if isinstance(wanted, torch.Tensor) and wanted.numel() and not wanted.any() and mine.any():
                    return f"{name} does not start at zero"
            steps = "resumed" in trial.wanted
            later = "in later steps, the result" if steps else "after its parameters changed, the result"
            if self.strict:
                if reason := difference(got["later"], trial.wanted["later"], later):
                    return reason
            elif not difference(got["later"], got["result"], ""):
                return f"{later} is the same as before"
            if steps and (
                reason := difference(got["resumed"], got["went on"], "resumed from its state dict, the result")
            ):
                return reason
        return ""

    def generator(self) -> str:
        group = list(self.of("same"))
        for trial, got in group:
            if found := self.found(trial, got, strict=False):
                return found[0][1]
        first, again, other = (got["result"] for _, got in group)
        if difference(again, first, ""):
            return "two calls with generators of the same state differ: something else is drawn from too"
        wanted = [trial.wanted["result"] for trial, _ in group]
        if not difference(other, first, "") and difference(wanted[2], wanted[0], ""):
            return "another generator gives the same result: it is not drawn from"
        return ""

    def shapes(self) -> str:
        for trial, got in [*self.squares, *self.of("general")]:
            strict = self.strict and trial.group == "general"
            for kind, text in self.found(trial, got, strict=strict):
                if kind != "dtype":
                    return text
        return ""

    def dtype(self) -> str:
        for trial, got in [*self.squares, *self.of("dtype")]:
            for kind, text in self.found(trial, got, strict=self.strict):
                if kind == "dtype" or trial.group == "dtype" and kind != "shape":
                    return f"{trial.label}, {text}" if trial.label else text
        return ""

    def inputs(self) -> str:
        for trial, got in self.squares:
            if "failed" in got or "after" not in got:
                continue
            if isinstance(trial.wanted["after"], bool):
                if got["after"] is not True:
                    return "it changed a gradient in place"
            elif reason := effects(got["after"], trial.wanted["after"], plain(trial.job["inputs"])):
                return reason
        return ""

    def edge_cases(self) -> str:
        for trial, got in self.of("edge"):
            if error := trial.wanted.get("raised"):
                if error not in got.get("raised", ()):
                    return f"{trial.label}, {got.get('failed', 'it raised nothing')}, wanted a {error}"
                continue
            for kind, text in self.found(trial, got, strict=self.strict):
                if kind == "failed" or self.strict and kind != "dtype":
                    return f"{trial.label}, {text}"
        return ""


def _in_dtypes_of(wanted: Any, got: Any) -> Any:
    """Turn tensors into the dtypes that are wanted: a teacher's `accept` need not think of others."""
    if isinstance(wanted, torch.Tensor):
        return got.to(wanted.dtype)
    if isinstance(wanted, list):
        return [_in_dtypes_of(w, g) for w, g in zip(wanted, got)]
    if isinstance(wanted, dict):
        return {key: _in_dtypes_of(w, got[key]) for key, w in wanted.items()}
    return got


def _stacked(results: Sequence[Any]) -> torch.Tensor:
    """Return one row a result, all of its numbers beside each other."""

    def numbers(value: Any) -> Iterable[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value.double().flatten()
        elif isinstance(value, bool | int | float):
            yield torch.tensor([float(value)], dtype=torch.float64)
        elif isinstance(value, list | dict):
            for part in value.values() if isinstance(value, dict) else value:
                yield from numbers(part)

    return torch.stack([torch.cat(list(numbers(result))) for result in results])
