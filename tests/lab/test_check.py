import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowrank_ref.lab.check import _shape, check


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
            r"case 1 of 20 differs \(B 8x5, A 5x2\): the result is off by [\d.]+ at \[\d, \d\]: [\d.]+, wanted",
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
    import re

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
    shape = _shape("m 3 n m*n #m _ k=4", sizes, rng)
    m, n = sizes["m"], sizes["n"]
    assert shape[:5] == [m, 3, n, m * n, m] and shape[6] == 4 and len(shape) == 7
    assert _shape("", {}, rng) == []
    batch = _shape("*b", sizes, rng)
    assert _shape("*b m", sizes, rng) == [*batch, m]


def test_nan_agrees_with_nan():
    assert check(lambda: float("nan"), lambda: float("nan"), cases=1)
    assert not check(lambda: 1.0, lambda: float("nan"), cases=1)


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
