import importlib
import inspect
import pkgutil
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import pytest
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.linalg import captured_energy
from lowrank_ref.core.registry import PARTS
from lowrank_ref.lab._draws import is_random_generator, shape_of
from lowrank_ref.lab.check import check
from lowrank_ref.optimizers.galore import adam_directions
from lowrank_ref.pretraining.sltrain import parameter_gradients


def low_rank(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"], *, alpha: float = 2.0) -> Float[Tensor, "m n"]:
    return alpha * B @ A


def truncate(W: Float[Tensor, "m n"], rank: int) -> tuple[Tensor, float]:
    if rank > min(W.shape):
        raise ValueError("rank: too large")
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank], float(S[rank:].norm())


def test_agreement():
    result = check(lambda b, a, *, alpha=2.0: 2 * (b @ a), low_rank)
    assert result and repr(result) == "all 20 cases agree"


def test_same_letters_are_same_sizes_and_sizes_vary():
    seen = set()

    def student(B, A, *, alpha=2.0):
        assert B.dtype == torch.float64 and B.shape[1] == A.shape[0]
        seen.add((*B.shape, A.shape[1]))
        return low_rank(B, A)

    assert check(student, low_rank)
    assert len(seen) > 10 and any(1 in sizes for sizes in seen)


def test_given_values_reach_both():
    assert check(lambda b, a, *, alpha: alpha * (b @ a), low_rank, given={"alpha": [1.0, 16.0]})
    assert not check(lambda b, a, *, alpha: 16 * (b @ a), low_rank, given={"alpha": [1.0, 16.0]})


def test_inputs_that_the_reference_rejects_are_drawn_anew():
    def student(M, k):
        error = torch.linalg.svdvals(M)[k:].norm().item()
        U, S, V = torch.linalg.svd(M)
        return U[:, :k] @ torch.diag(S[:k]) @ V[:k], error

    assert check(student, truncate, given={"rank": [1, 2, 3]})


@pytest.mark.parametrize(
    "student, message",
    [
        (
            lambda b, a: b @ a,
            r"case 1 of 20 differs \(B 8x5, A 5x2\): the result is off by [\d.]+ at \[\d, \d\]: -[\d.]+, wanted",
        ),
        (lambda b, a: (b @ a).T, "the result has shape"),
        (lambda b, a: (2 * b @ a).float(), "the result has dtype torch.float32, wanted torch.float64"),
        (lambda b, a: None, "the result is a NoneType, wanted a tensor"),
        (lambda b: b, "it raised TypeError"),
        (lambda b, a: b.mul_(2) @ a, "it changed its input B in place"),
        (lambda b, a: 2 * b @ a * float("nan"), "off by inf"),
    ],
)
def test_differences_are_named(student, message):
    result = check(student, low_rank)
    assert not result and re.search(message, repr(result)), repr(result)


def test_a_small_error_is_seen_and_rounding_is_not():
    assert not check(lambda b, a: 2 * (b @ a) + 1e-6, low_rank)
    assert check(lambda b, a: 2 * (b @ a) + 1e-12, low_rank)


def test_structures_are_compared_inside():
    def stats(x: Float[Tensor, " n"]) -> dict:
        return {"mean": x.mean().item(), "ends": [x[0], x[-1]]}

    assert check(lambda x: {"mean": float(x.sum()) / len(x), "ends": (x[0], x[-1])}, stats)
    wrong = check(lambda x: {"mean": float(x.mean()), "ends": [x[0], x[0]]}, stats)
    assert "the result['ends'][1] is off by" in repr(wrong)
    assert "wanted a mapping with keys ['mean', 'ends']" in repr(check(lambda x: {"mean": 0.0}, stats))
    assert "wanted 2 values" in repr(check(lambda x: {"mean": x.mean().item(), "ends": []}, stats))


def test_generators_start_alike():
    def noise(x: Float[Tensor, " n"], *, generator: torch.Generator) -> Tensor:
        return x + torch.rand(len(x), generator=generator)

    assert check(lambda x, *, generator: torch.rand(len(x), generator=generator) + x, noise)
    assert not check(lambda x, *, generator: torch.randn(len(x), generator=generator) + x, noise)


def test_whole_numbers_truth_values_and_batches():
    def pick(x: Float[Tensor, "*batch n"], keep: Bool[Tensor, " n"], times: Int[Tensor, ""]) -> Tensor:
        assert keep.dtype == torch.bool and times.dtype == torch.int64 and 0 <= times < 10
        return x[..., keep] * times

    assert check(lambda x, keep, times: (x * times)[..., keep], pick)


def test_shapes_of_annotations():
    import numpy as np

    rng, sizes = np.random.default_rng(0), {}
    shape = shape_of("m 3 n m*n #m _ k=4", sizes, rng)
    m, n = sizes["m"], sizes["n"]
    assert shape[:5] == [m, 3, n, m * n, m] and shape[6] == 4 and len(shape) == 7
    assert shape_of("", {}, rng) == []
    batch = shape_of("*b", sizes, rng)
    assert shape_of("*b m", sizes, rng) == [*batch, m]


def test_nan_agrees_with_nan():
    assert check(lambda: float("nan"), lambda: float("nan"), cases=1)
    assert not check(lambda: 1.0, lambda: float("nan"), cases=1)


def add_to(W: Float[Tensor, "m n"], D: Float[Tensor, "m n"], *, scale: float = 0.5) -> None:
    W += scale * D


def test_effects_on_arguments_are_compared_as_the_reference_has_them():
    def right(w, d):
        w.copy_(w + d / 2)

    def wrong(w, d):
        w.copy_(w + d)

    assert check(right, add_to)
    assert "the input W, changed in place, is off by" in repr(check(wrong, add_to))
    left = check(lambda *a, **k: None, add_to)
    assert not left and "it left its input W as it was, which the reference changes in place" in repr(left)
    assert "it changed its input D in place" in repr(check(lambda w, d: (right(w, d), d.zero_())[0], add_to))


def test_lists_of_tensors_are_inputs_too():
    def moments():
        return [torch.rand(2, 3, dtype=torch.float64)]

    given = {"R": [moments()], "M": [moments()], "V": [moments()], "steps": [[1], [7]]}
    given |= {"betas": [(0.9, 0.99)], "eps": [1e-8]}

    def stale(R, M, V, steps, *, betas, eps):
        return adam_directions(R, [m.clone() for m in M], [v.clone() for v in V], steps, betas=betas, eps=eps)

    assert check(adam_directions, adam_directions, given=given)
    assert "it left its input M as it was" in repr(check(stale, adam_directions, given=given))


def test_draws_keep_what_the_reference_needs():
    def share(G, P):
        return float((P.T @ G).square().sum() / G.square().sum())

    assert check(share, captured_energy)
    assert check(parameter_gradients, parameter_gradients, given={"scale": [0.5]})

    def shifted(G, A, B, support, scale):
        a, b, v = parameter_gradients(G, A, B, support, scale)
        return a, b, v.flip(0)

    assert "the result[2] is off by" in repr(check(shifted, parameter_gradients, given={"scale": [0.5]}))

    def all_words(
        P: Annotated[Float[Tensor, "n r"], "orthonormal"],
        Q: Annotated[Float[Tensor, "r n"], "orthonormal rows"],
        s: Annotated[Float[Tensor, " n"], "positive"],
        i: Annotated[Int64[Tensor, " k"], "below n*r", "distinct", "sorted"],
    ) -> Tensor:
        eye = torch.eye(P.shape[1], dtype=torch.float64)
        assert torch.allclose(P.T @ P, eye) and torch.allclose(Q @ Q.T, eye) and (s > 0).all()
        assert (i.diff() > 0).all() and i.max() < P.numel() and i.min() >= 0
        return i

    assert check(all_words, all_words)

    def unknown(x: Annotated[Float[Tensor, " n"], "even"]) -> Tensor:
        return x

    with pytest.raises(ValueError, match="given: got the word 'even' beside an annotation"):
        check(unknown, unknown)


def test_a_solution_that_leaves_or_never_ends_is_told():
    assert "it raised SystemExit: 3" in repr(check(lambda b, a: sys.exit(3), low_rank))

    def endless(b, a):
        while True:
            with suppress(Exception):
                time.sleep(0.01)

    assert "it had not ended after 0.2 seconds" in repr(check(endless, low_rank, seconds=0.2))
    assert check(lambda b, a: 2 * (b @ a), low_rank)  # the clock is off again
    with pytest.raises(ValueError, match="seconds: got 0"):
        check(low_rank, low_rank, seconds=0)


def test_a_busy_machine_does_not_leave_the_clock_running(monkeypatch):
    """The clock fires again while the block is left: that must not stop what switches it off."""
    ticks, setitimer = [], signal.setitimer

    def slow(which, seconds, interval=0.0):
        if not seconds:
            for _ in range(40):  # bytecodes between which signals arrive
                time.sleep(0.01)
                ticks.append(signal.getsignal(signal.SIGALRM))
        return setitimer(which, seconds, interval)

    def endless(b, a):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(signal, "setitimer", slow)
    before = signal.getsignal(signal.SIGALRM)
    assert "it had not ended after 0.2 seconds" in repr(check(endless, low_rank, seconds=0.2))
    assert len(ticks) == 40 and all(tick is not before for tick in ticks)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_exception_has_its_line():
    def mine(b, a):
        c = b @ a
        return c @ c @ b[:, :0] @ a

    assert re.search(
        r"it raised RuntimeError: .*, in line \d+: `return c @ c @ b\[:, :0\] @ a`", repr(check(mine, low_rank))
    )


def test_one_factor_and_a_transpose_are_recognised():
    assert repr(check(lambda b, a: b @ a, low_rank)).endswith("; all of it is 0.5 times what is wanted")

    def gram(x: Float[Tensor, "n n"]) -> Tensor:
        return x @ x @ x.T

    assert repr(check(lambda x: x @ x.T @ x.T, gram, seed=1)).endswith("; it is the transpose of what is wanted")
    assert "times" not in repr(check(lambda b, a: b @ a + 1, low_rank))


def test_modules_are_compared_by_state_and_settings():
    def make(rank: int, alpha: float) -> nn.Module:
        return LoRALinear(nn.Linear(4, 3), rank, alpha=alpha, generator=torch.Generator().manual_seed(0))

    given = {"rank": [2], "alpha": [4.0]}

    def seeded(function):
        def call(rank, alpha):
            torch.manual_seed(0)
            return function(rank, alpha)

        return call

    reference = seeded(make)
    reference.__signature__ = inspect.signature(make)
    assert check(seeded(make), reference, given=given)
    assert "the result's settings['scale'] is 4.0, wanted 2.0" in repr(
        check(seeded(lambda rank, alpha: make(rank, 2 * alpha)), reference, given=given)
    )
    assert "the result is a Linear, wanted a LoRALinear" in repr(
        check(lambda rank, alpha: nn.Linear(4, 3), reference, given=given)
    )


# Functions that need more than a shape tells: a reader gives their inputs.
NEEDS_MORE = {
    "normalised_spectrum": "falling values",
    "to_float8": "a dtype that numbers can be drawn in",
    "scaled_product": "float8 matrices",
    "pack": "entries -1, 0 and 1",
    "nearest_rivals": "more rows than its default count",
    "relative_robustness": "shares",
}


def functions_of_tensors():
    """Public functions whose inputs `check` can draw: tensors, a generator, and what has a default."""
    for part in ("core", *PARTS):
        package = importlib.import_module(f"lowrank_ref.{part}")
        for found in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"lowrank_ref.{part}.{found.name}")
            for name, function in list(vars(module).items()):
                if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
                    continue
                parameters = inspect.signature(function).parameters
                kinds = {n: getattr(p.annotation, "__origin__", p.annotation) for n, p in parameters.items()}
                tensors = {n for n, kind in kinds.items() if hasattr(kind, "dim_str")}
                free = {n for n, p in parameters.items() if p.default is not p.empty or is_random_generator(p)}
                if tensors and set(parameters) <= tensors | free:
                    yield name, function


@pytest.mark.usefixtures("no_shape_checks")
def test_every_function_agrees_with_itself():
    seen = dict(functions_of_tensors())
    assert len(seen) > 150 and set(NEEDS_MORE) <= set(seen)
    for name, function in seen.items():
        if name not in NEEDS_MORE:
            result = check(function, function, cases=3)
            assert result, f"{name}: {result}"


def test_a_network_named_generator_is_no_source_of_random_numbers():
    def picture(generator: Callable[[Tensor], Tensor], z: Float[Tensor, " d"]) -> Tensor:
        return generator(z)

    with pytest.raises(ValueError, match="given: got no values for 'generator'"):
        check(picture, picture)
    assert check(picture, picture, given={"generator": [torch.sin]})
    assert not check(lambda generator, z: z, picture, given={"generator": [torch.sin]})


def test_check_refuses():
    with pytest.raises(ValueError, match="no values for 'rank'"):
        check(truncate, truncate)
    with pytest.raises(ValueError, match="cases: got 0"):
        check(low_rank, low_rank, cases=0)
    with pytest.raises(ValueError, match=r"given: got no values for \['rank'\]"):
        check(truncate, truncate, given={"rank": []})
    with pytest.raises(ValueError, match=r"given: got \['ranks'\]"):
        check(truncate, truncate, given={"ranks": [1]})
    with pytest.raises(ValueError, match="rejects nearly all inputs, the last with: rank"):
        check(truncate, truncate, given={"rank": [9]})
