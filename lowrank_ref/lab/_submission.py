"""Run a student's work, and say what came of it in plain values: tensors, numbers, text, lists, dictionaries.

What runs here judges nothing: `grade` compares in its own process. This file needs torch only and is also run as a
script, `python -P _submission.py`: a clean process that forks one child a submission (where there is `fork`) and ends
it, whatever it does. A folder carries one submission: `job.pt` in, `read` once the student's file was read, and
`0.pt`, `1.pt`, ... out.
"""

import contextlib
import copy
import ctypes
import inspect
import json
import linecache
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Job = dict[str, Any]


class TooLong(BaseException):
    """Not an Exception: a student's `except Exception` lets it pass."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block after so many seconds, and again until it ends; where signals allow it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(_: int, frame: types.FrameType | None) -> None:
        if not _watching(frame):  # the next signal comes soon
            raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _watching(frame: types.FrameType | None) -> bool:
    """Tell whether what runs ends a block of this file, or watches one: an error there would leave clock or watch on.

    A block ends in `contextlib`, which then goes on with the function that was written with `yield`.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__exit__":
            maker = getattr(frame.f_locals.get("self"), "gen", None)
            code = getattr(maker, "gi_code", code)
        if code.co_filename == __file__ and code.co_name in ("limited", "banned", "watch"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def banned(forbid: Sequence[str], allow: Sequence[str], found: list[str]) -> Iterator[None]:
    """Note the first function of a forbidden module that is called in the block, or that the watch was removed."""
    if not forbid:
        yield
        return
    loaded = [(name, getattr(sys.modules.get(name), "__file__", None)) for name in forbid]
    folders = [(name, file.removesuffix("__init__.py")) for name, file in loaded if file]
    known = [root for root, _ in folders]

    def module_of(frame: types.FrameType) -> str:
        """Tell where a function is from: by its file, and by its name only for a module that was not loaded before."""
        file = frame.f_code.co_filename
        name = frame.f_globals.get("__name__") or ""
        for root, folder in folders:
            if file.startswith(folder):
                parts = file.removeprefix(folder).removesuffix(".py").replace(os.sep, ".")
                return f"{root}.{parts}".removesuffix(".").removesuffix(".__init__")
        return name if isinstance(name, str) and not inside(name, known) else ""

    def inside(name: str, roots: Sequence[str]) -> bool:
        return any(name == root or name.startswith(root + ".") for root in roots)

    def watch(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and not found and frame.f_code.co_filename != __file__:
            name = module_of(frame)
            if inside(name, forbid) and not inside(name, allow):
                found.append(f"{name}.{frame.f_code.co_qualname}")

    before = sys.getprofile()
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield
    finally:
        if sys.getprofile() is not watch and not found:
            found.append("sys.setprofile")
        sys.setprofile(before)
        threading.setprofile(None)


# --- values -----------------------------------------------------------------------------------------------------------


def copied(value: Any) -> Any:
    """Return a copy of an input; a generator's goes on from the same state."""
    if isinstance(value, torch.Generator):
        return torch.Generator().set_state(value.get_state())
    return copy.deepcopy(value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) for the floating tensors of a nested value."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, f"{path}[{key!r}]" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}[{i}]")


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the floating tensors of a nested value."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: mapped(part, function) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(part, function) for part in value)
    return value


def plain(value: Any) -> Any:
    """Turn any value into tensors, numbers, text, lists and dictionaries: no method of a student's runs later."""
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.as_subclass(Tensor.clone(Tensor.detach(value)), Tensor)
    kinds: tuple[Any, ...] = (bool, int, float, complex, str)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    name = f"a {type(value).__name__}"
    if isinstance(value, torch.nn.Module):
        return {name: plain(value.state_dict())}
    if hasattr(value, "__dataclass_fields__"):
        return {name: {field: plain(getattr(value, field)) for field in value.__dataclass_fields__}}
    if type(value).__module__ == "numpy":
        return {name: plain(torch.as_tensor(value)) if value.dtype.kind in "fiubc" else str(value)}
    text = repr(value)
    return name if " at 0x" in text else f"{name}, {text}"


# --- what is called ---------------------------------------------------------------------------------------------------


def arguments(
    parameters: Mapping[str, inspect.Parameter], inputs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Split inputs into those given by position, so that a student may choose other names, and those given by name."""
    positional: list[Any] = []
    by_position = True
    named = {}
    for name, parameter in parameters.items():
        by_position &= name in inputs and parameter.kind is not parameter.KEYWORD_ONLY
        if by_position:
            positional.append(inputs[name])
        elif name in inputs:
            named[name] = inputs[name]
    return positional, named


def _ready(job: Job) -> dict[str, Any]:
    """Return fresh inputs of a job."""
    inputs = {name: copied(value) for name, value in job["inputs"].items()}
    return inputs | {name: torch.Generator().set_state(state) for name, state in job.get("generators", {}).items()}


def _call(function: Callable, job: Job, inputs: dict[str, Any]) -> Any:
    return function(*(inputs[name] for name in job["by position"]), **{name: inputs[name] for name in job["by name"]})


def _differentiated(call: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], more: Any, seed: int) -> Job:
    """Return gradients of a random combination of all results, by the inputs and by `more()`, named tensors."""
    ends = {path: tensor.detach().requires_grad_() for path, tensor in leaves(inputs)}
    found = iter(ends.values())
    result = call(mapped(inputs, lambda _: next(found).clone()))  # copies may be changed in place, leaves may not
    ends |= more()
    draw = torch.Generator().manual_seed(seed)
    loss, loose = torch.zeros((), dtype=torch.float64), []
    for path, tensor in leaves(result):
        weight = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        if tensor.requires_grad:
            loss = loss + (tensor.double() * weight).sum()
        else:
            loose.append(path)
    if not loss.requires_grad:
        return {"gradients": {}, "loose": loose}
    gradients = torch.autograd.grad(loss, list(ends.values()), allow_unused=True)
    named = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(ends.items(), gradients)}
    return {"gradients": plain(named), "loose": loose}


def call_function(function: Callable, job: Job) -> Job:
    """Call once: the result and the inputs afterwards, or gradients where the job has a seed for them."""
    inputs = _ready(job)
    if job.get("gradient") is not None:
        return _differentiated(lambda ready: _call(function, job, ready), inputs, dict, job["gradient"])
    result = _call(function, job, inputs)
    return {"result": plain(result), "after": plain({n: v for n, v in inputs.items() if n in job["inputs"]})}


def call_module(cls: Callable, job: Job) -> Job:
    """Build, load a state, call; then move the state and call again."""
    build, forward = job["build"], job["inputs"]
    layer = _call(cls, build, _ready(build))
    out: Job = {"initial": plain(layer.state_dict()), "loaded": ""}
    own = list(layer.state_dict())
    names = dict(zip(own, own))

    def load(state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in layer.state_dict().items():
                tensor.copy_(state[names[name]])

    if job["state"] is not None:
        state = job["state"]
        try:
            layer.load_state_dict(state)
        except (RuntimeError, KeyError) as error:
            out["loaded"] = f"the state of the reference cannot be loaded: {' '.join(str(error).split())}"
            if [t.shape for t in layer.state_dict().values()] != [t.shape for t in state.values()]:
                raise ValueError(out["loaded"]) from error
            names = dict(zip(own, state))  # other names, the same tensors in the same order
            load(state)

    def trained() -> dict[str, Tensor]:
        return {names[n]: p for n, p in layer.named_parameters() if p.requires_grad and n in names}

    inputs = _ready({"inputs": forward})
    if job.get("gradient") is not None:
        call = lambda ready: _call(layer, job, ready)  # noqa: E731
        return out | {"trained": sorted(trained())} | _differentiated(call, inputs, trained, job["gradient"])
    out |= {"result": plain(_call(layer, job, inputs)), "after": plain(inputs)}
    if job.get("moved") is not None:
        load(job["moved"])
        out["later"] = plain(_call(layer, job, _ready({"inputs": forward})))
    return out


def step_optimizer(cls: Callable, job: Job) -> Job:
    """Take a step a list of gradients; then go on from the saved state in a new optimizer, and in the old one."""

    def built(values: Sequence[Tensor]) -> tuple[list[torch.nn.Parameter], Any]:
        weights = [torch.nn.Parameter(value.clone()) for value in values]
        return weights, cls(weights, **copied(job["options"]))

    def step(weights: Sequence[torch.nn.Parameter], optimizer: Any, gradients: Sequence[Tensor | None]) -> bool:
        for weight, gradient in zip(weights, gradients):
            weight.grad = None if gradient is None else gradient.clone()
        given = [weight.grad for weight in weights]
        optimizer.step()
        pairs = zip(given, gradients)
        return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)

    weights, optimizer = built(job["weights"])
    kept, path = True, []
    for gradients in job["steps"][:-1] or job["steps"]:
        kept &= step(weights, optimizer, gradients)
        path.append(plain(weights))
    out: Job = {"result": path[0], "later": path[1:], "after": kept}
    if len(job["steps"]) > 1:
        state = copy.deepcopy(optimizer.state_dict())
        others, fresh = built(path[-1])
        fresh.load_state_dict(state)
        step(others, fresh, job["steps"][-1])
        step(weights, optimizer, job["steps"][-1])
        out |= {"resumed": plain(others), "went on": plain(weights)}
    return out


CALLS_OF: dict[str, Callable[[Callable, Job], Job]] = {
    "function": call_function,
    "module": call_module,
    "optimizer": step_optimizer,
}


def run(student: Callable, job: Job) -> Job:
    """Run one job: what `CALLS_OF` returns, or "failed" with a text. "called" names a forbidden function that ran."""
    found: list[str] = []
    out: Job = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.get("seed", 0))
        try:
            with limited(job["seconds"]), banned(job["forbid"], job["allow"], found):
                out = CALLS_OF[job["kind"]](student, job)
        except TooLong:
            out = {"failed": f"it had not ended after {job['seconds']:g} seconds", "late": True}
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a first attempt may raise, sys.exit() too
            out = {"failed": raised(student, error), "raised": [kind.__name__ for kind in type(error).__mro__]}
    if found == ["sys.setprofile"] and out.get("late"):
        found = []  # TooLong switched the watch off
    return out | ({"called": found[0]} if found else {})


def raised(student: Any, error: BaseException) -> str:
    """Say what was raised, and in which line of the student's."""
    return f"it raised {type(error).__name__}: {error}{_line(student, error)}"


def _line(student: Any, error: BaseException) -> str:
    """Return where the student's code raised, as ", in line 3: `B @ C`", or ""."""
    parts = [*vars(student).values()] if isinstance(student, type) else [inspect.unwrap(student)]
    files = {code.co_filename for part in parts if (code := getattr(part, "__code__", None))} - {__file__}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    if not frames:
        return ""
    number = frames[-1].lineno or 0
    text = linecache.getline(frames[-1].filename, number).strip()
    return f", in line {number}" + f": `{text}`" * bool(text)


# --- a file, in a process of its own ----------------------------------------------------------------------------------


def definitions(path: str) -> tuple[dict[str, Any], str]:
    """Run a .py file, or the code cells of an .ipynb, and return its names and the first error in words.

    A cell that raises does not stop the next one: what a student tried out is not what is graded.
    """
    text = Path(path).read_text(encoding="utf-8")
    cells = [text]
    if path.endswith(".ipynb"):
        code = (cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        cells = [cell if isinstance(cell, str) else "".join(cell) for cell in code]
    module = types.ModuleType("submission")
    module.__file__ = path
    sys.modules["submission"] = module
    problem = ""
    for number, cell in enumerate(cells, 1):
        name = path if len(cells) == 1 else f"{path}, cell {number}"
        lines = cell.splitlines(keepends=True)
        if path.endswith(".ipynb"):
            lines = ["\n" if line.lstrip().startswith(("%", "!")) else line for line in lines]
        linecache.cache[name] = (len(cell), None, lines, name)
        try:
            exec(compile("".join(lines), name, "exec"), module.__dict__)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | TooLong):
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
            line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
            line = line or (frames[-1].lineno if frames else None)
            place = f"cell {number}, line {line}" if len(cells) > 1 else f"line {line}"
            problem = problem or f"reading it raised {type(error).__name__}: {error}, in {place}"
    return module.__dict__, problem


def work(folder: str) -> None:
    """Run the submission of a folder: read the student's file, then one job after another, each result a file."""
    order = torch.load(Path(folder) / "job.pt", weights_only=False)
    (Path(folder) / "job.pt").unlink()  # the student's file has no business with the inputs
    for name in order["forbid"]:  # so that the watch knows its folder
        with contextlib.suppress(ImportError):
            __import__(name)
    os.chdir(Path(order["path"]).parent)

    def tell(number: int, outcome: Job) -> None:
        torch.save(outcome, Path(folder) / f"{number}.part")
        os.replace(Path(folder) / f"{number}.part", Path(folder) / f"{number}.pt")

    reading = 20 * order["seconds"]  # imports take their time
    try:
        with limited(reading):
            names, problem = definitions(order["path"])
    except TooLong:
        return tell(0, {"failed": f"reading it had not ended after {reading:g} seconds", "late": True})
    if not callable(student := names.get(order["name"])):
        problem = problem or f"it defines no {order['name']}"
        return tell(0, {"failed": problem, "late": True})
    (Path(folder) / "read").touch()
    for number, job in enumerate(order["jobs"]):
        outcome = run(student, job)
        tell(number, outcome)
        if outcome.get("late"):
            return None
    return None


def guarded(folder: str, seconds: float, ended: Callable[[], bool], kill: Callable[[], None]) -> bool:
    """Wait for a submission's end, or end it when nothing new came for longer than a call may take: False."""
    news, since = -1, time.monotonic()
    while not ended():
        time.sleep(0.01)
        now = sum(1 for _ in Path(folder).glob("[0-9]*.pt")) + (Path(folder) / "read").exists()
        if now != news:
            news, since = now, time.monotonic()
        if time.monotonic() - since > (seconds + 2 if news else 120 + 20 * seconds):
            break
    by_itself = ended()
    with contextlib.suppress(OSError):
        kill()
    return by_itself


def serve() -> None:
    """Fork a child for every folder that a line of stdin names, and answer when it has ended."""
    for line in sys.stdin:
        seconds, first, folder = line.strip().split(" ", 2)
        __import__(first)
        child = os.fork()
        if child == 0:
            os.setsid()
            if sys.platform == "linux":  # whoever kills this server does not outlive it
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(quiet, stream)
            try:
                work(folder)
            finally:
                os._exit(0)

        def ended(child: int = child) -> bool:
            return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

        def kill(child: int = child) -> None:
            os.killpg(child, signal.SIGKILL)  # and what it has started

        by_itself = guarded(folder, float(seconds), ended, kill)
        os.waitpid(child, 0)
        sys.stdout.write("ended\n" if by_itself else "killed\n")
        sys.stdout.flush()


_server: list[subprocess.Popen] = []


def run_file(folder: str, seconds: float, calls: int, first: str = "torch") -> bool:
    """Have the submission of a folder run in a new process; return False if it had to be ended.

    The module `first` is imported before, so that no call waits for it.
    """
    command = [sys.executable, "-P", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if not hasattr(os, "fork"):
        process = subprocess.Popen([*command, first, folder], env=environment, stdin=subprocess.DEVNULL)
        by_itself = guarded(folder, seconds, lambda: process.poll() is not None, process.kill)
        process.wait()
        return by_itself
    if not _server or _server[0].poll() is not None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _server[:] = [subprocess.Popen(command, env=environment, **pipes)]
    server = _server[0]
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{seconds:g} {first} {folder}\n")
    server.stdin.flush()
    waits = (
        240 + 20 * seconds + (seconds + 2) * (calls + 1)
    )  # longer than `guarded` may take: what it ran has stopped the server
    answer = server.stdout.readline() if select.select([server.stdout], [], [], waits)[0] else ""
    if answer not in ("ended\n", "killed\n"):  # what it ran has ended the server too
        server.kill()
        server.wait()
        _server.clear()
    return answer != "killed\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        __import__(sys.argv[1])
        work(sys.argv[2])
    else:
        serve()
