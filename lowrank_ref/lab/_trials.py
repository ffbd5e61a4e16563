"""What a submission is tried on: jobs for `_submission`, each with what the reference makes of it.

Groups: "square" (float64, every size 4 but r = 2 and k = 5: a transposed or square-only solution still runs),
"gradient", "dtype" (float32), "edge", "depends" (one input replaced), "same" and "draws" (random functions), and last
"general", with sizes as `check` draws them.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_ref.lab._draws import accepted, check_given, kinds_of
from lowrank_ref.lab._submission import CALLS_OF, Job, arguments, leaves, mapped, plain

SQUARE = 4
_SMALL = {"r": 2, "k": 5}


@dataclass(frozen=True)
class Trial:
    """One job and the reference's outcome; a reference that must raise has "raised" in it."""

    group: str
    job: Job
    wanted: Job
    label: str = ""


class Trials:
    """Makes the trials of a function; subclasses of a module and an optimizer."""

    kind = "function"

    def __init__(
        self,
        reference: Callable,
        given: Mapping[str, Any],
        seed: int,
        *,
        edges: Sequence[Mapping[str, Any]] = (),
        draws: int = 0,
        random: bool = False,
    ) -> None:
        self.reference, self.given, self.edges = reference, dict(given), edges
        self.rng = np.random.default_rng(seed)
        self.draws, self.random = draws, random
        self.parameters = self.signature()
        check_given(self.given, self.parameters)
        kinds, self.words = kinds_of(self.parameters)
        self.texts = [k.dim_str for n, k in kinds.items() if hasattr(k, "dim_str") and n not in self.given]
        for values in self.given.values():
            self.texts += [*inspect.signature(values).parameters] if callable(values) else []

    def signature(self) -> Mapping[str, inspect.Parameter]:
        """Return the arguments that are drawn."""
        return inspect.signature(self.reference).parameters

    def sizes(self, size: int, small: Mapping[str, int] = {}) -> dict[str, Any]:
        """Give every letter one size; a batch is one axis beside one other, else none."""
        sizes: dict[str, Any] = {}
        for text in self.texts:
            axes = [axis.split("=")[-1].lstrip("#") for axis in text.split()]
            for axis in axes:
                if axis.startswith("*"):
                    sizes.setdefault(axis, [size] if len(axes) == 2 else [])
                elif axis.isidentifier() and not axis.startswith("_"):
                    sizes[axis] = small.get(axis, size)
        return sizes

    def job(self, inputs: dict[str, Any]) -> Job:
        """Turn drawn inputs into a job that another process can read."""
        return {"kind": self.kind, "seed": int(self.rng.integers(2**31)), **packed(self.parameters, inputs)}

    def outcome(self, job: Job) -> Job:
        """Run the reference."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job["seed"])
            return CALLS_OF[self.kind](self.reference, job)

    def trial(self, group: str, sizes: Mapping[str, Any] | None = None, **more: Any) -> Trial:
        """Draw inputs that the reference takes."""
        change = more.pop("change", lambda inputs: inputs)
        pairs = accepted(
            self.parameters,
            self.given,
            self.rng,
            lambda job: self.outcome(job),
            sizes=lambda: sizes or {},
            ready=lambda inputs: self.job(change(inputs)) | more,
        )
        return Trial(group, *pairs)

    def all(self) -> list[Trial]:
        """Return all trials; what a reference does not allow is left out."""
        square = self.sizes(SQUARE, _SMALL)
        trials = [self.trial("square", square) for _ in range(4)]
        if not self.random:
            trials += self.differentiable(square)
        trials += self.in_float32(square) + self.at_edges(square) + (self.same() if self.random else self.depending())
        if self.texts:
            trials += [self.trial("general") for _ in range(8)]
        return trials

    def differentiable(self, square: Mapping[str, Any]) -> list[Trial]:
        """Return trials with gradients, if there are any."""
        try:
            found = [self.trial("gradient", square, gradient=7) for _ in range(2)]
        except ValueError:
            return []
        return found if any(bool(g.any()) for t in found for g in t.wanted["gradients"].values()) else []

    def in_float32(self, square: Mapping[str, Any]) -> list[Trial]:
        """Return trials in float32, if something can be turned into it."""
        if not any(True for _ in leaves(plain(self.job(self.first(square))))):
            return []
        narrow = ("in float32", square, lambda inputs: {n: as_float(v) for n, v in inputs.items()})
        return self.if_taken("dtype", [narrow])

    def first(self, square: Mapping[str, Any]) -> dict[str, Any]:
        """Return one draw of inputs."""
        return accepted(self.parameters, self.given, self.rng, lambda _: None, sizes=lambda: square)[0]

    def if_taken(self, group: str, cases: Sequence[tuple[str, Mapping[str, Any], Callable]]) -> list[Trial]:
        """Return those trials that the reference takes."""
        found = []
        for label, sizes, change in cases:
            try:
                trial = self.trial(group, sizes, change=change)
            except ValueError:
                continue
            found.append(Trial(group, trial.job, trial.wanted, label))
        return found

    def at_edges(self, square: Mapping[str, Any]) -> list[Trial]:
        """Return sizes of one, zeros, another layout in memory, and what the teacher asks for."""

        def zeros(inputs: dict[str, Any]) -> dict[str, Any]:
            free = {n: v for n, v in inputs.items() if not self.words.get(n) and n not in self.given}
            return inputs | {n: mapped(v, torch.zeros_like) for n, v in free.items()}

        def strided(inputs: dict[str, Any]) -> dict[str, Any]:
            return {n: mapped(v, lambda t: t.mT.contiguous().mT if t.ndim > 1 else t) for n, v in inputs.items()}

        cases: list[tuple[str, Mapping[str, Any], Callable]] = []
        if self.texts:
            cases += [("with sizes of 1", self.sizes(1), lambda inputs: inputs), ("for zeros", square, zeros)]
            cases += [("for transposed memory", square, strided)]
        found = self.if_taken("edge", cases)
        for edge in self.edges:
            check_given({name: [value] for name, value in edge.items()}, self.parameters)
            job = self.job(self.first(square) | dict(edge))
            label = "with " + ", ".join(f"{name} = {value!r}" for name, value in edge.items())
            try:
                wanted = self.outcome(job)
            except Exception as error:
                wanted = {"raised": type(error).__name__}
            found.append(Trial("edge", job, wanted, label))
        return found

    def depending(self) -> list[Trial]:
        """Return twice the same inputs but for one, for every tensor."""
        first = self.trial("depends", self.sizes(SQUARE, _SMALL))
        trials = [first]
        for name in [n for n, v in first.job["inputs"].items() if any(True for _ in leaves({n: v}))]:
            other = mapped(first.job["inputs"][name], lambda t: 1.5 * t.flip(0) if t.ndim else 1.5 * t)
            job = first.job | {"inputs": first.job["inputs"] | {name: other}}
            try:
                trials.append(Trial("depends", job, self.outcome(job), name))
            except Exception:
                continue
        return trials

    def same(self) -> list[Trial]:
        """Return one draw twice, with other global seeds, then with another generator; and many draws."""
        first = self.trial("same", self.sizes(SQUARE, _SMALL))

        def again(group: str, seed: int | None, other: int) -> Trial:
            job = first.job | {"seed": other}
            if seed is not None:
                state = torch.Generator().manual_seed(seed).get_state()
                job["generators"] = {name: state for name in first.job["generators"]}
            return Trial(group, job, self.outcome(job))

        many = [again("draws", 1000 + i, 5000 + i) for i in range(self.draws)]
        return ([first, again("same", None, 1), again("same", 2, 2)] if first.job["generators"] else []) + many


class ModuleTrials(Trials):
    """The trials of a layer: built from `given`, given a random state, called on what `forward` is annotated with."""

    kind = "module"

    def signature(self) -> Mapping[str, inspect.Parameter]:
        """Return the arguments of the constructor that are given or needed, and those of `forward`."""
        build = inspect.signature(self.reference).parameters
        self.build = {n: p for n, p in build.items() if n in self.given or needed(p)}
        forward = inspect.signature(self.reference.forward).parameters  # type: ignore[attr-defined]
        self.forward = {n: p for n, p in list(forward.items())[1:]}
        return {**self.build, **self.forward}

    def job(self, inputs: dict[str, Any]) -> Job:
        """Return a job with a random state, the same dtypes, and one to move to."""
        build = packed(self.build, {n: v for n, v in inputs.items() if n in self.build})
        call = packed(self.forward, {n: v for n, v in inputs.items() if n in self.forward})
        job = {"kind": self.kind, "seed": int(self.rng.integers(2**31)), "build": build, "state": None, **call}
        initial = self.outcome(job)["initial"]
        draw = torch.Generator().manual_seed(job["seed"])

        def other(tensor: Tensor) -> Tensor:
            return torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(tensor.dtype)

        return job | {"state": mapped(initial, other), "moved": mapped(initial, other)}


class OptimizerTrials(Trials):
    """The trials of an optimizer: two matrices, five steps on given gradients; `given` are its options."""

    kind = "optimizer"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.texts = [*self.texts, "m n"]

    def signature(self) -> Mapping[str, inspect.Parameter]:
        """Return the options that are given."""
        parameters = inspect.signature(self.reference).parameters
        more = [
            n for n in self.given if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and n not in parameters
        ]
        named = {n: inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in more}
        return {n: p for n, p in parameters.items() if n in self.given} | named

    def trial(self, group: str, sizes: Mapping[str, Any] | None = None, **more: Any) -> Trial:
        """Hand the sizes to the job."""
        return super().trial(group, {}, shape=sizes, **more)

    def job(self, inputs: dict[str, Any]) -> Job:
        """Return a job; its matrices come with the shape."""
        return {"kind": self.kind, "seed": int(self.rng.integers(2**31)), "options": inputs}

    def outcome(self, job: Job) -> Job:
        """Fill in weights and gradients, then run."""
        if "weights" not in job:
            shape = job.pop("shape", None) or {letter: int(self.rng.choice([2, 3, 5, 8])) for letter in "mn"}
            draw = torch.Generator().manual_seed(job["seed"])
            make = lambda: torch.randn(shape["m"], shape["n"], generator=draw, dtype=torch.float64)  # noqa: E731
            job["weights"] = [make(), make()]
            job["steps"] = [[make(), make()] for _ in range(5)]
            job.pop("spoil", lambda job: None)(job)
        return super().outcome(job)

    def differentiable(self, square: Mapping[str, Any]) -> list[Trial]:
        """Return none."""
        return []

    def in_float32(self, square: Mapping[str, Any]) -> list[Trial]:
        """Return one run in float32."""

        def spoil(job: Job) -> None:
            job |= {"weights": as_float(job["weights"]), "steps": as_float(job["steps"])}

        return [self.trial("dtype", square, spoil=spoil)]

    def at_edges(self, square: Mapping[str, Any]) -> list[Trial]:
        """Return a weight without a gradient, and gradients of zeros."""

        def without(job: Job) -> None:
            job["steps"] = [[g[0], None] for g in job["steps"]]

        def zeros(job: Job) -> None:
            job["steps"] = mapped(job["steps"], torch.zeros_like)

        found = []
        for label, spoil in (("for a weight without a gradient", without), ("for gradients of zeros", zeros)):
            trial = self.trial("edge", square, spoil=spoil)
            found.append(Trial("edge", trial.job, trial.wanted, label))
        return found

    def depending(self) -> list[Trial]:
        """Return the same weights with other gradients."""
        first = self.trial("depends", self.sizes(SQUARE))
        job = first.job | {"steps": mapped(first.job["steps"], lambda g: 1.5 * g.flip(0))}
        return [first, Trial("depends", job, self.outcome(job), "the gradients")]


def needed(parameter: inspect.Parameter) -> bool:
    """Tell whether an argument has to be given."""
    kinds = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in kinds


def as_float(value: Any) -> Any:
    """Turn float64 tensors into float32, those of modules too."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).float()
    return mapped(value, lambda t: t.float() if t.dtype == torch.float64 else t)


def packed(parameters: Mapping[str, inspect.Parameter], inputs: Mapping[str, Any]) -> Job:
    """Return inputs with the order in which they are passed; a generator as its state."""
    positional, named = arguments(parameters, {name: name for name in inputs})
    generators = {n: v.get_state() for n, v in inputs.items() if isinstance(v, torch.Generator)}
    rest = {n: v for n, v in inputs.items() if n not in generators}
    return {"by position": positional, "by name": [*named], "inputs": rest, "generators": generators}
