import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lowrank_ref.core.linalg import (
    captured_energy,
    effective_rank,
    factored_svd,
    fixed_signs,
    gram_basis,
    orthonormal,
    power_basis,
    randomized_factored_svd,
    randomized_svd,
    stable_rank,
    subspace_basis,
    svd,
    svd_basis,
)

sides = st.integers(1, 9)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(m, n, base=0.5):
    """A matrix with singular values 1, base, base² and so on."""
    k = min(m, n)
    U, V = (torch.linalg.qr(gaussian(s, k, seed)).Q for seed, s in enumerate((m, n)))
    return U @ torch.diag(base ** torch.arange(k, dtype=torch.float64)) @ V.T


def projector(P):
    return P @ P.T


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def test_fixed_signs_make_the_largest_entry_positive():
    U = torch.tensor([[1.0, -3.0, 0.0], [-2.0, 1.0, 0.0]])
    assert fixed_signs(U).tolist() == [-1.0, -1.0, 1.0]


@given(sides, sides, st.data())
def test_svd_reconstructs_and_is_orthonormal(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    W = gaussian(m, n)
    U, S, Vh = svd(W)
    assert_close(U @ S.diag() @ Vh, W)
    assert_close(U.T @ U, torch.eye(min(m, n), dtype=W.dtype))
    assert bool((S[:-1] >= S[1:]).all())
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())
    U_r, S_r, Vh_r = svd(W, rank)
    assert torch.equal(U_r, U[:, :rank]) and torch.equal(S_r, S[:rank]) and torch.equal(Vh_r, Vh[:rank])


def test_svd_does_not_depend_on_the_sign_the_backend_chose():
    W = gaussian(5, 3)
    U, S, Vh = svd(W)
    V2, S2, Uh2 = svd(W.T)  # other signs inside; U is oriented, so here V is
    signs = fixed_signs(Uh2.T)
    assert_close(S, S2)
    assert_close(U, Uh2.T * signs)
    assert_close(Vh, (V2 * signs).T)


def test_svd_of_half_precision_is_float32():
    assert {t.dtype for t in svd(gaussian(4, 3).bfloat16())} == {torch.float32}


@pytest.mark.parametrize("basis", [svd_basis, gram_basis, power_basis])
@given(sides, sides, st.data())
def test_bases_are_orthonormal_and_capture_the_top_directions(basis, m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    W = decaying(m, n)
    options = {"iterations": 8, "generator": torch.Generator().manual_seed(0)} if basis is power_basis else {}
    P = basis(W, rank, **options)
    assert P.shape == (m, rank)
    assert_close(P.T @ P, torch.eye(rank, dtype=P.dtype), 1e-10)
    best = captured_energy(W, svd_basis(W, rank))
    assert captured_energy(W, P) >= best - (1e-4 if basis is power_basis else 1e-10)
    assert bool((P.gather(0, P.abs().argmax(0, keepdim=True)) > 0).all())


@given(sides, sides)
def test_gram_basis_is_the_svd_basis(m, n):
    W = decaying(m, n)
    for rank in range(1, min(m, n) + 1):
        assert_close(gram_basis(W, rank), svd_basis(W, rank), 1e-8)  # signs included


def test_gram_basis_survives_tiny_gradients():
    W = decaying(6, 4).float()
    assert_close(gram_basis(W * 1e-30, 2), gram_basis(W, 2), 1e-5)
    assert torch.isfinite(gram_basis(torch.zeros(4, 3), 2)).all()


def test_power_basis_sharpens_with_iterations_and_with_a_good_start():
    W = decaying(40, 30, 0.9)
    error = [
        1 - captured_energy(W, power_basis(W, 5, iterations=k, generator=torch.Generator().manual_seed(0)))
        for k in (0, 1, 4)
    ]
    assert error[0] > error[1] > error[2] >= 1 - captured_energy(W, svd_basis(W, 5)) - 1e-12
    assert_close(projector(power_basis(W, 5, start=svd_basis(W, 5), iterations=0)), projector(svd_basis(W, 5)))


@pytest.mark.parametrize("basis", [svd_basis, gram_basis, power_basis, subspace_basis])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_a_basis_is_turned_along_the_last_one(basis, shape, no_shape_checks):
    """Signs follow `start` column by column, whatever the rule says; the space does not depend on them."""
    W = decaying(*shape)
    options = {"generator": torch.Generator().manual_seed(0)} if basis is power_basis else {}
    for signs in ([1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]):
        old = svd_basis(W, 3) * torch.tensor(signs)
        drifted = basis(W + 0.02 * gaussian(*shape, seed=7), 3, start=old, **options)
        assert bool(((drifted * old).sum(0) > 0.9).all())
        assert drifted.dtype == torch.float64 and basis(W.float(), 3, start=old.bfloat16()).dtype == torch.float32
    other = basis(W, 3, start=torch.eye(*shape)[:, :2].double(), **({"generator": seeded()} if options else {}))
    assert bool((other.gather(0, other.abs().argmax(0, keepdim=True)) > 0).all())  # a start of another shape: no start


def test_a_batch_is_turned_matrix_by_matrix():
    G = torch.stack([decaying(9, 6), decaying(9, 6).flip(0)])
    old = subspace_basis(G, 3) * torch.tensor([[[1.0, -1.0, 1.0]], [[-1.0, 1.0, 1.0]]])
    torch.testing.assert_close(
        subspace_basis(G, 3, start=old, iterations=30),
        subspace_basis(G, 3, iterations=30) * (torch.tensor([[[1.0, -1.0, 1.0]], [[-1.0, 1.0, 1.0]]])),
        rtol=0,
        atol=1e-9,
    )


def test_the_flops_of_products_are_those_of_the_docstrings():
    """A thin QR takes 4mr²; the solves of `orthonormal`, 2mr², are no products."""
    k, r, steps = 40, 10, 3

    def products(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    assert products(lambda: orthonormal(gaussian(k, r))) == 4 * k * r**2
    G = gaussian(k, 60)
    wanted = 2 * k * k * 60 + steps * (2 * k**2 * r + 4 * k * r**2)
    assert products(lambda: subspace_basis(G, r, iterations=steps)) == wanted


def test_randomness_comes_from_the_generator_only():
    W, state = gaussian(9, 8), torch.get_rng_state()
    a, b, c = (power_basis(W, 2, iterations=0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


@given(sides, sides, st.data())
def test_randomized_svd_is_the_svd_for_a_low_rank_matrix(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    W = gaussian(m, rank) @ gaussian(rank, n, 1)
    U, S, Vh = randomized_svd(W, rank, generator=torch.Generator().manual_seed(0))
    assert_close(U @ S.diag() @ Vh, W, 1e-9)
    assert_close(S, svd(W, rank)[1], 1e-9)
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
def test_factored_svd_is_the_svd_of_the_product(m, n, r):
    A, B = gaussian(r, n), gaussian(m, r, seed=1)
    k, eye = min(m, n, r), torch.eye(min(m, n, r), dtype=torch.float64)
    for U, S, Vh in (factored_svd(A, B), randomized_factored_svd(A, B, k, oversample=0, generator=seeded())):
        assert U.shape == (m, k) and S.shape == (k,) and Vh.shape == (k, n)
        for got, wanted in (
            (U * S @ Vh, B @ A),
            (S, torch.linalg.svdvals(B @ A)[:k]),
            (U.T @ U, eye),
            (Vh @ Vh.T, eye),
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
        assert bool((fixed_signs(U) == 1).all())


def test_a_product_of_zeros_and_dependent_factors_have_an_svd():
    A, B = gaussian(3, 6), torch.zeros(5, 3, dtype=torch.float64)
    pairs = [(A, B), (B.T, A.T), (torch.cat([A, A]), gaussian(5, 6, seed=2))]
    for A, B in pairs:
        for U, S, Vh in (factored_svd(A, B), randomized_factored_svd(A, B, 3, generator=seeded())):
            torch.testing.assert_close(U * S @ Vh, B @ A, rtol=0, atol=1e-12)
            torch.testing.assert_close(Vh @ Vh.T, torch.eye(len(S), dtype=torch.float64), rtol=0, atol=1e-12)


def test_factors_in_half_precision_are_decomposed_in_float32():
    A, B = gaussian(2, 5).bfloat16(), gaussian(4, 2, seed=1).bfloat16()
    for triple in (factored_svd(A, B), randomized_factored_svd(A, B, 1, generator=seeded())):
        assert all(part.dtype == torch.float32 for part in triple)


def test_a_narrow_sketch_nears_the_svd_and_sharpens_with_iterations():
    A, B = decaying(24, 40, 0.8), torch.linalg.qr(gaussian(30, 24, 3)).Q
    exact, errors = factored_svd(A, B)[1][:4], []
    for iterations in (0, 1, 2, 4):
        S = randomized_factored_svd(A, B, 4, oversample=4, iterations=iterations, generator=seeded())[1]
        errors.append(float((S - exact).abs().max()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2 and errors[-1] < 1e-4


@pytest.mark.parametrize(
    "A, B, options, error, message",
    [
        (torch.ones(2, 3), torch.ones(4, 3), {}, ValueError, r"A, B: got shapes \(2, 3\) and \(4, 3\)"),
        (torch.ones(2, 3).long(), torch.ones(4, 2), {}, TypeError, "A: got dtype"),
        (torch.ones(2, 3), torch.ones(4, 2) / 0, {}, ValueError, "B: got 8 NaN or infinite"),
        (torch.ones(2, 3), torch.ones(4), {}, ValueError, "B: got shape"),
        (torch.ones(2, 3), torch.ones(4, 2), {"rank": 3}, ValueError, "rank: got 3"),
        (torch.ones(2, 3), torch.ones(4, 2), {"oversample": -1}, ValueError, "oversample: got -1"),
        (torch.ones(2, 3), torch.ones(4, 2), {"iterations": 0.5}, TypeError, "iterations: got 0.5"),
    ],
)
def test_bad_factors_are_named(A, B, options, error, message, no_shape_checks):
    with pytest.raises(error, match=message):
        randomized_factored_svd(A, B, **{"rank": 1, **options})
    if not options:
        with pytest.raises(error, match=message):
            factored_svd(A, B)


def test_captured_energy_is_the_share_of_squared_singular_values():
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    P = torch.eye(3)
    assert [captured_energy(W, P[:, :r]) for r in (1, 2, 3)] == pytest.approx([9 / 14, 13 / 14, 1.0])
    assert captured_energy(torch.zeros(3, 3), P) == 1.0


@given(st.integers(1, 12))
def test_measures_of_rank_count_equal_directions(k):
    S = torch.full((k,), 0.7)
    assert effective_rank(S) == pytest.approx(k)
    assert stable_rank(S) == pytest.approx(k)


def test_measures_of_rank_by_hand():
    S = torch.tensor([3.0, 1.0])
    assert effective_rank(S) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert stable_rank(S) == pytest.approx(10 / 9)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1.0)


BAD = {
    "integers": (torch.ones(3, 3, dtype=torch.int64), 1, TypeError),
    "vector": (torch.ones(3), 1, (TypeError, ValueError)),
    "empty": (torch.ones(0, 3), 1, ValueError),
    "NaN": (torch.full((3, 3), torch.nan), 1, ValueError),
    "rank 0": (torch.ones(3, 2), 0, ValueError),
    "rank 3": (torch.ones(3, 2), 3, ValueError),
    "bool": (torch.ones(3, 2), True, TypeError),
    "float": (torch.ones(3, 2), 1.0, TypeError),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", [svd, svd_basis, gram_basis, power_basis, randomized_svd])
def test_bad_input_raises(function, case):
    W, rank, error = BAD[case]
    with pytest.raises(error):
        function(W, rank)


def test_bad_options_raise(no_shape_checks):
    with pytest.raises(ValueError, match="iterations: got -1"):
        power_basis(torch.ones(2, 2), 1, iterations=-1)
    for S in ([0.0, 0.0], [1.0, torch.nan]):
        with pytest.raises(ValueError, match="S: got"):
            effective_rank(torch.tensor(S))
        with pytest.raises(ValueError, match="S: got"):
            stable_rank(torch.tensor(S))
    for measure in (effective_rank, stable_rank):
        with pytest.raises(ValueError, match="negative"):
            measure(torch.tensor([1.0, -1.0]))
    for G, P, error, message in (
        (torch.full((2, 2), torch.nan), torch.eye(2), ValueError, "G: got"),
        (torch.eye(2), torch.full((2, 2), torch.nan), ValueError, "P: got"),
        (torch.ones(2, 2, dtype=torch.int64), torch.eye(2), TypeError, "G: got dtype"),
        (torch.eye(2), torch.ones(2, 1, dtype=torch.int64), TypeError, "P: got dtype"),
        (torch.ones(3, 2), torch.eye(2), ValueError, "P: got 2 rows, wanted 3"),
    ):
        with pytest.raises(error, match=message):
            captured_energy(G, P)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_measures_do_not_depend_on_the_size_of_the_numbers(size):
    """Squares of these are no float32 numbers, and those of 1e-200 and 1e200 no float64 numbers."""
    W = decaying(5, 4).float()
    P = svd_basis(W, 2)
    assert captured_energy(W * size, P) == pytest.approx(captured_energy(W, P), rel=1e-5)
    S = torch.linalg.svdvals(decaying(5, 4))
    for measure in (effective_rank, stable_rank):
        assert measure(S * (1e-200 if size < 1 else 1e200)) == pytest.approx(measure(S), rel=1e-12)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e20, 1e30, 3e37])
def test_float32_numbers_of_any_size_keep_their_energy(size):
    """Unscaled, `power_basis` keeps 1 % in place of 94 % at 1e-30, and from 1e20 on eigh fails on infinite squares."""
    W = (decaying(40, 30, 0.75) / decaying(40, 30, 0.75).abs().max() * size).float()
    exact = (W.double() / size).float()  # what is left of a subnormal number
    best = captured_energy(exact, svd_basis(exact, 5))
    for basis in (svd_basis, gram_basis, power_basis, subspace_basis):
        P = basis(W, 5, **({"generator": seeded()} if basis is power_basis else {}))
        assert captured_energy(exact, P) == pytest.approx(best, abs=0.01), basis
        assert captured_energy(W, P) == pytest.approx(captured_energy(exact, P), abs=1e-6), basis
    U, S, Vh = randomized_svd(W, 5, generator=seeded())
    assert captured_energy(exact, U) == pytest.approx(best, abs=0.01)
    wanted = torch.linalg.svdvals(exact.double())[:5] * size
    torch.testing.assert_close(S.double(), wanted, rtol=0.02, atol=2e-45)


@pytest.mark.parametrize("power", [-100, -3, 0, 5, 100])
def test_a_power_of_two_changes_no_digit(power):
    W = decaying(12, 9).float()
    assert torch.equal(power_basis(W * 2.0**power, 3, generator=seeded()), power_basis(W, 3, generator=seeded()))
    (U, S, Vh), (U1, S1, Vh1) = (randomized_svd(X, 3, generator=seeded()) for X in (W * 2.0**power, W))
    assert torch.equal(U, U1) and torch.equal(S, S1 * 2.0**power) and torch.equal(Vh, Vh1)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (3, 20, 9)])
def test_subspace_basis_is_orthonormal_and_nears_the_exact_energy(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for matrix, P in zip(G.reshape(-1, *shape[-2:]), subspace_basis(G, 5, iterations=30).reshape(-1, shape[-2], 5)):
        torch.testing.assert_close(P.T @ P, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
        assert captured_energy(matrix, P) >= (1 - 1e-3) * captured_energy(matrix, svd_basis(matrix, 5))


def test_subspace_basis_sharpens_starts_warm_and_needs_no_luck():
    G = torch.randn(60, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    energies = [captured_energy(G, subspace_basis(G, 6, iterations=i)) for i in (1, 2, 4, 8)]
    assert energies == sorted(energies) and energies[-1] > energies[0] + 0.02
    assert torch.equal(subspace_basis(G, 6), subspace_basis(G, 6))
    warm = subspace_basis(G, 6, start=svd_basis(G, 6), iterations=1)
    assert captured_energy(G, warm) >= captured_energy(G, svd_basis(G, 6)) - 1e-12


@pytest.mark.parametrize("Y", [torch.zeros(6, 3), torch.ones(6, 3), torch.randn(2, 6, 3)])
def test_orthonormal_columns_span_the_same_space_even_of_dependent_ones(Y):
    Q = orthonormal(Y)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(3).expand(*Y.shape[:-2], 3, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(Q @ (Q.mT @ Y), Y, rtol=0, atol=1e-5)
