import numpy as np
import pytest
import torch

from lowrank_ref.core import checks


def test_good_values_pass():
    checks.check_matrix("W", torch.ones(2, 3))
    checks.check_floating("W", torch.ones(2, dtype=torch.bfloat16))
    checks.check_finite("W", torch.tensor([], dtype=torch.float32))
    checks.check_finite("counts", torch.tensor([1, 2]))
    checks.check_rank(1, (2, 3))
    checks.check_rank(2, (2, 3))
    checks.check_number("lr", 0, low=0)
    checks.check_number("lr", np.float64(0.5), low=0, high=0.5)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (torch.ones(2, 3, 4), ValueError, r"W: got shape \(2, 3, 4\), wanted a matrix"),
        (torch.ones(2), ValueError, r"W: got shape \(2,\)"),
        (torch.ones(2, 0), ValueError, r"W: got shape \(2, 0\)"),
        (torch.ones(2, 3, dtype=torch.int32), TypeError, r"W: got dtype torch\.int32, wanted a floating"),
        (torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]]), ValueError, "W: got 2 NaN or infinite entries of 4"),
        (torch.ones(2, 3).to(torch.float8_e5m2), TypeError, r"W: got dtype torch.float8_e5m2, wanted .* 16 bits"),
        (torch.ones(2, 3, device="meta"), ValueError, r"W: got a tensor without numbers \(meta device\)"),
    ],
)
def test_check_matrix_names_argument_got_and_wanted(value, error, message):
    with pytest.raises(error, match=message):
        checks.check_matrix("W", value)


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError):
        checks.check_floating("W", [[1.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, -1, 3])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"r: got {rank}, wanted 1 <= r <= 2 for a \(2, 5\) matrix"):
        checks.check_rank(rank, (2, 5), name="r")


@pytest.mark.parametrize("rank", [True, 1.0, "1", None])
def test_rank_of_another_type(rank):
    with pytest.raises(TypeError):
        checks.check_rank(rank, (2, 5))


def test_check_integer():
    checks.check_integer("gap", 1, low=1)
    with pytest.raises(ValueError, match="gap: got 0, wanted an integer >= 1"):
        checks.check_integer("gap", 0, low=1)
    for value in (True, 1.0, None):
        with pytest.raises(TypeError):
            checks.check_integer("gap", value, low=1)


@pytest.mark.parametrize("value", [0, 1.5, -1, torch.nan, torch.inf])
def test_number_out_of_a_half_open_range(value):
    with pytest.raises(ValueError, match=r"p: got .*, wanted a finite number in \(0, 1\]"):
        checks.check_number("p", value, low=0, high=1, open_low=True)


def test_infinity_is_never_a_number():
    with pytest.raises(ValueError, match="finite"):
        checks.check_number("p", torch.inf)


@pytest.mark.parametrize("value", [True, "1", None, 1j])
def test_number_of_another_type(value):
    with pytest.raises(TypeError):
        checks.check_number("p", value)
