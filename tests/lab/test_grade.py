import doctest
import json
import os
import re
import textwrap
from typing import Annotated

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import lora
from lowrank_ref.adapters.lora import LoRALinear, delta_weight
from lowrank_ref.lab import _submission
from lowrank_ref.lab import grade as module
from lowrank_ref.lab.check import check
from lowrank_ref.lab.grade import GradeReport, PropertyPoints, grade, grade_file
from lowrank_ref.optimizers import GaLoreAdamW, galore
from lowrank_ref.pretraining import sltrain

NOTHING = ("value", "gradient", "shapes", "dtype", "inputs", "edge cases")


def galore_step(
    W: Float[Tensor, "m n"],
    G: Float[Tensor, "m n"],
    P: Annotated[Float[Tensor, "m r"], "orthonormal"],
    M: Float[Tensor, "r n"],
    V: Annotated[Float[Tensor, "r n"], "positive"],
    step: int,
    lr: float,
) -> Float[Tensor, "m n"]:
    """One step of GaLore on one matrix; M and V are updated in place. `adam_directions` itself has no gradient."""
    R = galore.project_gradient(G, left=P)
    M.lerp_(R, 0.1)
    V.mul_(0.99).addcmul_(R, R, value=0.01)
    N = M / (V.sqrt() + 1e-6) * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
    return W - lr * galore.project_back(N, left=P)


HOSTILE = """
    import sys, torch
    import lowrank_ref.lab.grade as g
    from lowrank_ref.lab import _differences
    torch.isclose = lambda *a, **k: torch.ones(1, dtype=torch.bool)
    torch.allclose = torch.equal = lambda *a, **k: True
    g.grade = g.grade_file = lambda *a, **k: g.GradeReport((g.PropertyPoints("value", 10, 10),))
    _differences.differences = lambda *a, **k: iter(())
    class Always(torch.Tensor):
        def __eq__(self, other):
            return True
"""

#: submission -> source, lost properties, words of a reason.
LORA = {
    "correct": ("def f(A, B, scale):\n    return B @ (scale * A)", (), ""),
    "scale off": (
        "def f(A, B, scale):\n    return B @ A * (scale / 2)",
        ("value", "gradient"),
        "all of it is 0.5 times what is wanted",
    ),
    "transposed": (
        "def f(A, B, scale):\n    return scale * (B @ A).T",
        ("value", "gradient", "shapes"),
        "it is the transpose of what is wanted",
    ),
    "in-place": ("def f(A, B, scale):\n    return B.mul_(scale) @ A", ("inputs",), "it changed its input B in place"),
    "square only": (
        "def f(A, B, scale):\n    assert len(B) == A.shape[1]\n    return scale * B @ A",
        ("shapes",),
        "in line 2: `assert len(B) == A.shape[1]`",
    ),
    "detached": ("def f(A, B, scale):\n    return scale * (B @ A).detach()", ("gradient",), "the result is detached"),
    "stale state": (
        "old = {}\ndef f(A, B, scale):\n    k = A.shape, B.shape, A.dtype\n"
        "    if k not in old: old[k] = (scale * B @ A).detach()\n    return old[k].clone()",
        ("value", "gradient"),
        "it is the result of an earlier call",
    ),
    "calls the package": (
        "from lowrank_ref.adapters import lora\ndef f(A, B, scale):\n    return lora.delta_weight(A, B, scale)",
        NOTHING,
        "it calls lowrank_ref.adapters.lora.delta_weight",
    ),
    "endless": ("def f(A, B, scale):\n    while True: pass", NOTHING, "it had not ended after 1 seconds"),
    "overrides the grader": (
        HOSTILE + "    def f(A, B, scale):\n        return torch.zeros(len(B), A.shape[1]).as_subclass(Always)",
        NOTHING,
        "the result does not depend on A and B",
    ),
}
STEP = """
def f(W, G, P, M, V, step, lr):
    R = P.T @ G
    M.mul_(0.9).add_(0.1 * R)
    V.mul_(0.99).add_(0.01 * R**2)
    N = M / (V.sqrt() + 1e-6) * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
    return W - lr * P @ N
"""
GALORE = {
    "correct": (STEP, (), ""),
    "scale off": (STEP.replace("lr *", "2 * lr *"), ("value", "gradient"), "the result is off by"),
    "transposed": (
        STEP.replace("return W - lr * P @ N", "return (W - lr * P @ N).T"),
        ("value", "gradient", "shapes"),
        "it is the transpose of what is wanted",
    ),
    "in-place": (
        STEP.replace("return W - lr * P @ N", "return W.sub_(lr * P @ N)"),
        ("inputs",),
        "it changed its input W in place",
    ),
    "square only": (
        STEP.replace("    R =", "    assert W.shape[0] == W.shape[1], W.shape\n    R ="),
        ("shapes",),
        "it raised AssertionError",
    ),
    "detached": (STEP.replace("P @ N", "(P @ N).detach()"), ("gradient",), "the gradient of G is off by"),
    "stale state": (
        STEP.replace("M.mul_(0.9).add_", "M = (0.9 * M).add_").replace("V.mul_(0.99).add_", "V = (0.99 * V).add_"),
        ("inputs",),
        "it left its input M as it was, which the reference changes in place",
    ),
    "calls the package": (
        "from lowrank_ref.optimizers.galore import project_back\n" + STEP.replace("P @ N", "project_back(N, left=P)"),
        NOTHING,
        "it calls lowrank_ref.optimizers.galore.project_back",
    ),
    "endless": (
        STEP.replace(
            "    R =", "    while True:\n        try:\n            len(W)\n        except BaseException: pass\n    R ="
        ),
        NOTHING,
        "it had not ended after 1 seconds",
    ),
    "overrides the grader": (
        HOSTILE + "    import atexit, os\n    def f(*a):\n        sys.exit(0)",
        NOTHING,
        "it raised SystemExit: 0",
    ),
}
GRADIENTS = """
def f(G, A, B, support, scale):
    return scale * B.T @ G, scale * G @ A.T, G.reshape(-1)[support]
"""
SLTRAIN = {
    "correct": (GRADIENTS, (), ""),
    "scale off": (GRADIENTS.replace("scale * G", "G"), ("value", "gradient"), "the result[1] is off by"),
    "transposed": (
        GRADIENTS.replace("scale * B.T @ G", "(scale * B.T @ G).T"),
        ("value", "gradient", "shapes"),
        "the result[0] has shape (4, 2), wanted (2, 4)",
    ),
    "in-place": (GRADIENTS.replace("scale * B.T", "B.mul_(scale).T"), ("inputs",), "it changed its input B in place"),
    "square only": (
        GRADIENTS.replace("G.reshape(-1)[support]", "G[support // len(G), support % len(G)]"),
        ("shapes",),
        "",
    ),
    "detached": (
        GRADIENTS.replace("G.reshape(-1)", "G.detach().reshape(-1)"),
        ("gradient",),
        "the result is detached ([2])",
    ),
    "stale state": (
        "old = {}\n" + GRADIENTS.replace("[support]", "[old.setdefault((G.shape, A.shape, support.shape), support)]"),
        ("value", "gradient"),
        "the result[2] is off by",
    ),
    "calls the package": (
        "import types\nfrom lowrank_ref.pretraining import sltrain\n"
        "f = types.FunctionType(sltrain.parameter_gradients.__code__, {})",
        NOTHING,
        "it calls lowrank_ref.pretraining.sltrain.parameter_gradients",
    ),
    "endless": ("import time\ndef f(*a):\n    while True: time.sleep(9)", NOTHING, "it had not ended after 1 seconds"),
    "overrides the grader": (
        HOSTILE + "    import os\n    def f(*a):\n        os._exit(0)",
        NOTHING,
        "it ended its process",
    ),
}
SETS = {
    "lora": (LORA, lora.delta_weight, {"scale": [0.5, 2.0, 3.0]}),
    "galore": (GALORE, galore_step, {"step": [1, 2, 7], "lr": [0.1, 0.01]}),
    "sltrain": (SLTRAIN, sltrain.parameter_gradients, {"scale": [0.5, 2.0]}),
}


@pytest.mark.parametrize("name, kind", [(name, kind) for name, (works, _, _) in SETS.items() for kind in works])
def test_a_submission_loses_what_it_spoils(tmp_path, name, kind):
    works, reference, given = SETS[name]
    source, lost, words = works[kind]
    file = tmp_path / "work.py"
    file.write_text(textwrap.dedent(source))
    report = grade_file(file, "f", reference, given=given, seconds=1)
    assert tuple(report.lost) == lost, report
    assert words in str(report)
    assert report.points == report.of - sum(module.POINTS[name] for name in lost)
    assert [len(works), report.of] == [10, 10]


# --- layers -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, base, rank, *, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        m, n = base.weight.shape
        self.A = nn.Parameter(torch.rand(rank, n, dtype=base.weight.dtype))
        self.B = nn.Parameter(torch.zeros(m, rank, dtype=base.weight.dtype))

    def delta(self):
        return self.scale * self.B @ self.A

    def forward(self, x):
        return self.base(x) + F.linear(x, self.delta())


class Doubled(Layer):
    def delta(self):
        return 2 * super().delta()


class Turned(Layer):
    def delta(self):
        return super().delta().T


class InPlace(Layer):
    def forward(self, x):
        return self.base(x) + F.linear(x.mul_(self.scale), self.B @ self.A)


class MatrixOnly(Layer):
    def forward(self, x):
        if x.shape[-1] != len(self.B):
            raise ValueError("not square")
        return super().forward(x)


class Detached(Layer):
    def delta(self):
        return self.scale * self.B @ self.A.detach()


class Stale(Layer):
    def forward(self, x):
        if not hasattr(self, "merged"):
            self.merged = self.base.weight + self.delta()
        return F.linear(x, self.merged, self.base.bias)


class Calls(Layer):
    def delta(self):
        return delta_weight(self.A, self.B, self.scale)


class Endless(Layer):
    def delta(self):
        while True:
            pass


class Renamed(nn.Module):
    def __init__(self, base, rank, *, alpha):
        super().__init__()
        self.a = nn.Parameter(torch.rand(rank, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.rand(base.out_features, rank, dtype=base.weight.dtype))
        self.old, self.scale = base.requires_grad_(False), alpha / rank

    def forward(self, x):
        return self.old(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


class Thawed(Layer):
    def __init__(self, base, rank, *, alpha):
        super().__init__(base, rank, alpha=alpha)
        self.base.requires_grad_(True)


LAYERS = {
    Layer: ((), ""),
    Doubled: (("value", "gradient"), "the result is off by"),
    Turned: (("value", "gradient", "shapes"), "it raised RuntimeError"),
    InPlace: (("inputs",), "it changed its input x in place"),
    MatrixOnly: (("shapes",), '`raise ValueError("not square")`'),
    Detached: (("gradient",), "the gradient of A is off by"),
    Stale: (("state",), "after its parameters changed, the result is off by"),
    Calls: (
        ("value", "gradient", "state", "shapes", "dtype", "inputs", "edge cases"),
        "it calls lowrank_ref.adapters.lora",
    ),
    Endless: (
        ("value", "gradient", "state", "shapes", "dtype", "inputs", "edge cases"),
        "it had not ended after 0.3 sec",
    ),
    Renamed: (("state",), "the state of the reference cannot be loaded: "),
    Thawed: (("gradient",), "it trains ['A', 'B', 'base.bias', 'base.weight'], wanted ['A', 'B']"),
}
BUILD = {"base": lambda m, n: nn.Linear(n, m, dtype=torch.float64), "rank": [2], "alpha": [4.0, 6.0]}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_loses_what_it_spoils(layer):
    report = grade(layer, LoRALinear, given=BUILD, seconds=0.3 if layer is Endless else 5)
    assert (tuple(report.lost), report.of) == (LAYERS[layer][0], 12), report
    assert LAYERS[layer][1] in str(report)


# --- optimizers -------------------------------------------------------------------------------------------------------


class Step(torch.optim.Optimizer):
    """Adam without bias correction's subtleties, as a reference."""

    def __init__(self, params, lr: float = 0.1, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group)

    def update(self, p, state, group):
        state["m"] = group["beta"] * state.get("m", torch.zeros_like(p)) + p.grad
        p.sub_(group["lr"] * state["m"])


class Forgets(Step):
    def update(self, p, state, group):
        p.sub_(group["lr"] * p.grad)


class Hides(Step):
    def update(self, p, state, group):
        self.hidden = getattr(self, "hidden", {})
        self.hidden[p] = group["beta"] * self.hidden.get(p, 0) + p.grad
        p.sub_(group["lr"] * self.hidden[p])


class Spoils(Step):
    def update(self, p, state, group):
        state["m"] = p.grad.add_(group["beta"] * state.get("m", torch.zeros_like(p))).clone()
        p.sub_(group["lr"] * state["m"])


class Demands(Step):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.abs()
        super().step()


class Climbs(Step):
    def update(self, p, state, group):
        super().update(p, state, {**group, "lr": -group["lr"]})


class Squares(Step):
    def update(self, p, state, group):
        assert p.shape[0] == p.shape[1]
        super().update(p, state, group)


@pytest.mark.parametrize(
    "student, lost, words",
    [
        (Step, (), ""),
        (Forgets, ("state",), "in later steps, the result[0][0] is off by"),
        (Hides, ("state",), "resumed from its state dict, the result[0] is off by"),
        (Spoils, ("inputs",), "it changed a gradient in place"),
        (Demands, ("edge cases",), "for a weight without a gradient, it raised AttributeError"),
        (Climbs, ("value",), "all of it is"),
        (Squares, ("shapes",), "it raised AssertionError"),
    ],
)
def test_an_optimizer_loses_what_it_spoils(student, lost, words):
    report = grade(student, Step, given={"lr": [0.1, 0.01]})
    assert (tuple(report.lost), report.of) == (lost, 10), report
    if student is not Climbs:
        assert words in str(report)


def test_galore_is_an_optimizer_too():
    given = {"rank": [2], "lr": [0.1], "gap": [2]}
    assert grade(GaLoreAdamW, GaLoreAdamW, given=given, forbid=()).points == 10
    report = grade(torch.optim.AdamW, GaLoreAdamW, given={"lr": [0.1]})  # without a rank, but for eps and decay
    assert "value" in report.lost


# --- random functions -------------------------------------------------------------------------------------------------


def support(m, n, density, generator):
    chosen = torch.rand(m * n, generator=generator).argsort()[: int(density * m * n)]
    return chosen.sort().values


def valid(result, m, n, density):
    if len(result) != len(result.unique()):
        return "places come twice"
    return bool((result.diff() > 0).all())


PLACES = {"m": [4, 6], "n": [5], "density": [0.3]}


@pytest.mark.parametrize(
    "student, lost, words",
    [
        (support, (), ""),
        (lambda m, n, d, generator: torch.arange(int(d * m * n)), ("value", "generator"), "the mean of entry"),
        (lambda m, n, d, generator: support(m, n, d, None), ("generator",), "something else is drawn from too"),
        (lambda m, n, d, generator: support(m, n, d, generator) * 0, ("value", "generator"), "places come twice"),
        (lambda m, n, d, generator: support(m, n, d, generator).flip(0), ("value",), "the result is no valid draw"),
    ],
)
def test_another_draw_passes_and_what_is_none_does_not(student, lost, words):
    report = grade(student, sltrain.random_support, given=PLACES, accept=valid, draws=100)
    assert tuple(report.lost) == lost and words in str(report), report
    assert report.of == 6


def test_an_accept_that_stumbles_gives_no_point():
    report = grade(support, sltrain.random_support, given=PLACES, accept=lambda result, **rest: result["no"])
    assert "the result cannot be judged: IndexError" in report.lost["value"]


def test_an_accept_judges_another_dtype_as_well():
    def wrong(m, n, density, generator):
        return support(m, n, density, generator).float() * 0

    report = grade(wrong, sltrain.random_support, given=PLACES, accept=valid)
    assert "places come twice" in report.lost["value"] and "dtype torch.float32" in report.lost["generator"]


def test_an_optimizer_in_a_file_is_not_late(tmp_path):
    """The first step of a process loads much of PyTorch, for longer than a call may take."""
    (tmp_path / "work.py").write_text("import torch\nclass Plain(torch.optim.SGD):\n    pass\n")
    report = grade_file(tmp_path / "work.py", "Plain", torch.optim.SGD, given={"lr": [0.1]}, seconds=1)
    assert not report.lost, report


# --- the report, and what a teacher may ask for -----------------------------------------------------------------------

SCALE = {"scale": [0.5, 2.0]}


def test_a_report_is_a_table_and_requires():
    report = grade(
        lambda A, B, scale: B @ A,
        delta_weight,
        given=SCALE,
        hints={"value": "look at s"},
        points={"value": 3, "shapes": 1.5},
    )
    assert (report.points, report.of) == (1.5, 4.5)
    assert re.fullmatch(
        r"value      0 / 3     the result is .*\. Hint: look at s\nshapes   1.5 / 1.5\ntotal    1.5 / 4.5", repr(report)
    )
    with pytest.raises(AssertionError, match=r"1.5 of 4.5 points\nvalue      0 / 3     the result is off"):
        report.require()
    report.require(0.3)
    with pytest.raises(TypeError, match="use .require()"):
        assert report
    with pytest.raises(ValueError, match="share: got 2"):
        report.require(2)
    full = GradeReport((PropertyPoints("value", 2, 2),))
    assert full.require() is None and full.lost == {}


@pytest.mark.parametrize(
    "sheet",
    [
        lambda A, B, scale: None,
        lambda A, B, scale: A,
        lambda A, B, scale: torch.zeros(len(B), A.shape[1], dtype=A.dtype),
        lambda A, B, scale: torch.randn(len(B), A.shape[1], dtype=A.dtype),
        lambda *a: (_ for _ in ()).throw(NotImplementedError),
        lambda: None,
    ],
)
def test_an_empty_sheet_earns_nothing(sheet):
    report = grade(sheet, delta_weight, given=SCALE)
    assert report.points == 0, report
    assert str(report).count("as above") == 5


def test_edges_ask_for_the_same_error():
    edges = [{"alpha": 0.0}, {"alpha": 1e9}]
    given = {"alpha": [1.0, 2.0], "rank": [1, 2]}

    def careful(alpha, rank):
        if alpha <= 0:
            raise ValueError
        return alpha / rank

    assert grade(careful, lora.lora_scaling, given=given, edges=edges).lost == {}
    report = grade(lambda alpha, rank: alpha / rank, lora.lora_scaling, given=given, edges=edges)
    assert report.lost == {"edge cases": "with alpha = 0.0, it raised nothing, wanted a ValueError"}


def test_dtypes_are_a_property():
    def single(A, B, scale):
        return (scale * B.double() @ A.double()).float()

    def double(A, B, scale):
        return scale * B.double() @ A.double()

    assert grade(single, delta_weight, given=SCALE).lost == {
        "dtype": "the result has dtype torch.float32, wanted torch.float64"
    }
    assert grade(double, delta_weight, given=SCALE).lost == {
        "dtype": "in float32, the result has dtype torch.float64, wanted torch.float32"
    }


def test_sizes_of_one_and_layouts_are_edges():
    def squeezed(A, B, scale):
        return (scale * B @ A).squeeze() if A.shape == (1, 1) else scale * B @ A

    assert "with sizes of 1, the result has shape ()" in grade(squeezed, delta_weight, given=SCALE).lost["edge cases"]

    def viewed(A, B, scale):
        return scale * B.view(-1).view(B.shape) @ A

    assert "for transposed memory, it raised" in grade(viewed, delta_weight, given=SCALE).lost["edge cases"]


def test_what_is_allowed_may_be_called_and_a_watch_that_is_removed_is_seen():
    def calls(A, B, scale):
        return delta_weight(A, B, scale)

    assert grade(calls, delta_weight, given=SCALE).points == 0
    assert grade(calls, delta_weight, given=SCALE, allow=["lowrank_ref.adapters"]).points == 10
    assert grade(calls, delta_weight, given=SCALE, forbid=["torch.nn"]).points == 10

    def blind(A, B, scale):
        import sys

        sys.setprofile(None)
        return delta_weight(A, B, scale)

    assert "it calls sys.setprofile, which is not allowed" in str(grade(blind, delta_weight, given=SCALE))


def test_check_takes_functions_of_sizes():
    given = {"R": lambda m, n: [torch.rand(m, n, dtype=torch.float64)], "steps": [[1], [7]]}
    given |= {"M": given["R"], "V": given["R"], "betas": [(0.9, 0.99)], "eps": [1e-8]}
    seen = set()

    def student(R, *rest, **named):
        seen.add(R[0].shape)
        return galore.adam_directions(R, *rest, **named)

    assert check(student, galore.adam_directions, given=given) and len(seen) > 5


def test_grade_refuses():
    with pytest.raises(ValueError, match="points: got unknown 'speed'"):
        grade(delta_weight, delta_weight, given=SCALE, points={"speed": 1})
    with pytest.raises(ValueError, match=r"points: got \['state'\], which this reference does not have"):
        grade(delta_weight, delta_weight, given=SCALE, points={"state": 1})
    with pytest.raises(ValueError, match="hints: got unknown 'values'"):
        grade(delta_weight, delta_weight, given=SCALE, hints={"values": "x"})
    with pytest.raises(ValueError, match="seconds: got 0"):
        grade(delta_weight, delta_weight, given=SCALE, seconds=0)
    with pytest.raises(ValueError, match="no values for 'scale'"):
        grade(delta_weight, delta_weight)
    with pytest.raises(ValueError, match=r"given: got \['s'\]"):
        grade(delta_weight, delta_weight, given=SCALE, edges=[{"s": 1}])
    with pytest.raises(FileNotFoundError, match="path: got .*, wanted a file"):
        grade_file("no_such_file.py", "f", delta_weight, given=SCALE)


# --- files ------------------------------------------------------------------------------------------------------------


def filed(tmp_path, source, name="work.py", **options):
    file = tmp_path / name
    file.write_text(textwrap.dedent(source))
    return grade_file(file, "f", delta_weight, given=SCALE, seconds=1, **options)


def test_a_notebook_runs_cell_by_cell(tmp_path):
    cells = ["%matplotlib inline\nimport torch", "1 / 0", ["def f(A, B, scale):\n", "    return scale * B @ A"]]
    book = {"cells": [{"cell_type": "code", "source": c} for c in cells] + [{"cell_type": "markdown", "source": "def"}]}
    assert filed(tmp_path, json.dumps(book), "work.ipynb").points == 10
    book["cells"].pop(2)
    missing = str(filed(tmp_path, json.dumps(book), "work.ipynb"))
    assert "reading it raised ZeroDivisionError: division by zero, in cell 2, line 1" in missing


@pytest.mark.parametrize(
    "source, words",
    [
        ("def f(A, B:\n", "reading it raised SyntaxError"),
        ("x = 1\nraise KeyError('no')", "reading it raised KeyError: 'no', in line 2"),
        ("def g(): pass", "it defines no f"),
        ("import sys\nsys.exit(0)", "reading it raised SystemExit: 0"),
        ("import os\nos._exit(0)", "it ended its process"),
        (  # no signal reaches it, so the process is ended from outside
            "import signal as s\ndef f(*a):\n    s.pthread_sigmask(s.SIG_BLOCK, [s.SIGALRM])\n    while 1: pass",
            "it had not ended after 1 seconds, and was ended",
        ),
        (  # it ends with the process that it killed, before it can kill that one's parent
            "import os, signal, time\ndef f(*a):\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(.1)\n"
            "    open('orphan', 'w')",
            "",
        ),
        (
            "import torch\ndef f(*a):\n    torch.save = lambda x, p: open(p, 'w').write('x')",
            "it ended its process",
        ),
        (
            "import sys\ndef f(*a):\n    m = sys.modules['__main__']\n"
            "    m.run = lambda *a: {'result': 'x', 'after': 1, 'gradients': 2, 'loose': 3}\n    return m.run()",
            "",
        ),
    ],
)
def test_a_hostile_file_gains_nothing(tmp_path, source, words):
    report = filed(tmp_path, source)
    assert report.points == 0 and words in str(report), report
    assert filed(tmp_path, "def f(A, B, scale): return scale * B @ A").points == 10  # and the next one is graded
    assert not (tmp_path / "orphan").exists() or not hasattr(os, "fork")


@pytest.mark.slow
def test_without_fork_a_file_has_an_interpreter_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "fork")
    assert filed(tmp_path, "def f(A, B, scale): return scale * B @ A").points == 10


def test_examples_paste():
    for thing in (grade, grade_file, GradeReport, PropertyPoints):
        test = doctest.DocTestParser().get_doctest(thing.__doc__, {}, thing.__name__, None, None)
        report = []
        doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert test.examples and not report, "".join(report)


def test_plain_values_run_nothing_of_a_students():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *a, **k):
            raise AssertionError

    assert type(_submission.plain({"x": [torch.ones(2).as_subclass(Loud)]})["x"][0]) is Tensor
    assert _submission.plain((1, True, None, "a", 2j)) == [1, True, None, "a", 2j]
