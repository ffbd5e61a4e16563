"""WeLore: equations against loops, the exact invariants in float64, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.preprocessing import minmax_scale
from spectral_cases import gaussian, spectrum, steep
from torch import nn

from lowrank_ref.compression.welore import (
    NORMALISATIONS,
    WeLoreLinear,
    find_threshold,
    gradient_cosine,
    is_low_rank,
    normalised_spectrum,
    pruned_counts,
    rank_reduction,
    spectral_factors,
    subspace_overlap,
    uniform_pruning,
)

sizes = st.tuples(st.integers(1, 8), st.integers(1, 8))
normalisations = st.sampled_from(NORMALISATIONS)


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# Each equation against a loop.


@given(st.integers(1, 9), normalisations, st.integers(0, 3))
def test_normalised_spectrum_by_loops(q, by, seed):
    S = spectrum(q, seed)
    values = S.tolist()
    for i, got in enumerate(normalised_spectrum(S, by).tolist()):
        if by == "minmax":
            wanted = (values[i] - values[-1]) / (values[0] - values[-1]) if q > 1 else 1.0
        elif by == "max":
            wanted = values[i] / values[0]
        else:
            wanted = sum(v * v for v in values[i:]) / sum(v * v for v in values)
        assert got == pytest.approx(wanted, abs=1e-12)


@given(st.integers(2, 9))
def test_minmax_is_that_of_scikit_learn(q):
    S = spectrum(q)
    assert np.allclose(normalised_spectrum(S).numpy(), minmax_scale(S.numpy()), rtol=0, atol=1e-12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), normalisations, st.floats(0, 1.2))
def test_counts_and_reduction_by_loops(qs, by, k):
    spectra = [spectrum(q, i) for i, q in enumerate(qs)]
    wanted = []
    for S in spectra:
        count = 0
        for value in normalised_spectrum(S, by).tolist():
            if value < k:
                count += 1
        wanted.append(count)
    assert pruned_counts(spectra, k, by) == wanted
    assert rank_reduction(wanted, qs) == pytest.approx(sum(wanted) / sum(qs))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), normalisations, st.floats(0, 1))
@example([3], "minmax", 0.5)  # 1/3 and 2/3 are equally far; rounding prefers the larger
def test_the_line_search_by_a_loop(qs, by, target):
    spectra = [spectrum(q, i) for i, q in enumerate(qs)]
    best, found = 2.0, 0.0
    for i in range(101):
        gap = abs(rank_reduction(pruned_counts(spectra, i * 0.01, by), qs) - target)
        if gap < best - 1e-15:
            best, found = gap, i * 0.01
    k = find_threshold(spectra, target, by, step=0.01)
    assert abs(rank_reduction(pruned_counts(spectra, k, by), qs) - target) == pytest.approx(best, abs=1e-12)
    assert k == pytest.approx(found)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), normalisations, st.floats(0, 1))
def test_no_threshold_is_nearer_than_one_of_the_values(qs, by, target):
    spectra = [spectrum(q, i) for i, q in enumerate(qs)]
    values = torch.cat([normalised_spectrum(S, by) for S in spectra]).tolist()
    gaps = [abs(rank_reduction(pruned_counts(spectra, k, by), qs) - target) for k in values]
    k = find_threshold(spectra, target, by, step=None)
    assert abs(rank_reduction(pruned_counts(spectra, k, by), qs) - target) == pytest.approx(min(gaps), abs=1e-12)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.floats(0, 1))
def test_uniform_pruning_and_low_rank_components(qs, target):
    counts = uniform_pruning(qs, target)
    assert counts == [int(np.floor(target * q)) for q in qs]
    for p, q in zip(counts, qs):
        assert is_low_rank(p, q, 0.5) == (q - p < q / 2)  # the paper's words: r below half of the rank
        assert is_low_rank(p, q, 0.0) == (p > 0)


def test_half_the_rank_exactly_is_a_component_by_default_only():
    assert is_low_rank(5, 10) and not is_low_rank(5, 10, 0.5)


@given(sizes, st.data())
def test_gradient_cosine_and_overlap_by_loops(shape, data):
    m, n = shape
    r = data.draw(st.integers(1, min(m, n)))
    G, H = gaussian(m, n), gaussian(m, n, seed=1)
    dot = sum(G[i, j].item() * H[i, j].item() for i in range(m) for j in range(n))
    assert gradient_cosine(G, H) == pytest.approx(dot / (G.norm() * H.norm()).item(), abs=1e-12)
    P, Q = (torch.linalg.svd(M)[0][:, :r] for M in (G, H))
    total = sum(float(P[:, i] @ Q[:, j]) ** 2 for i in range(r) for j in range(r))
    assert subspace_overlap(G, H, r) == pytest.approx(total / r, abs=1e-9)
    assert subspace_overlap(G, -3 * G, r) == pytest.approx(1, abs=1e-9)


def test_overlap_of_strangers_is_chance():
    found = [subspace_overlap(gaussian(40, 60, seed=2 * i), gaussian(40, 60, seed=2 * i + 1), 8) for i in range(30)]
    assert sum(found) / 30 == pytest.approx(8 / 40, abs=0.02)


# Exact invariants, numbered as on the card.


@given(sizes, normalisations, st.floats(0.01, 1), st.floats(1e-3, 1e3))
def test_1_scale_and_rotations_change_nothing(shape, by, k, c):
    m, n = shape
    W = gaussian(m, n)
    S = torch.linalg.svdvals(W)
    Q, R = torch.linalg.qr(gaussian(m, m, seed=1)).Q, torch.linalg.qr(gaussian(n, n, seed=2)).Q
    near = (normalised_spectrum(S, by) - k).abs().min()
    if near > 1e-9:  # rounding decides a tie
        for other in (c * W, Q @ W @ R):
            assert pruned_counts([torch.linalg.svdvals(other)], k, by) == pruned_counts([S], k, by)


@given(st.integers(2, 9), normalisations)
def test_2_counts_rise_with_the_threshold(q, by):
    S = spectrum(q)
    counts = [pruned_counts([S], i / 50, by)[0] for i in range(52)]
    assert counts == sorted(counts) and counts[0] == 0
    assert counts[50] == q - 1 and counts[51] == q  # k = 1 keeps what is tied with the first, k > 1 nothing
    if by == "minmax":
        assert pruned_counts([S], 1e-12)[0] >= 1  # the last one is exactly 0


def test_2_what_is_tied_with_the_first_stays_at_1():
    assert pruned_counts([torch.tensor([3.0, 3.0, 1.0])], 1.0) == [1]
    assert pruned_counts([torch.tensor([3.0, 3.0])], 1.0) == [0]  # flat: 0/0 in the official code


@given(sizes, st.data())
def test_3_factors_are_the_best_approximation(shape, data):
    r = data.draw(st.integers(1, min(shape)))
    W = gaussian(*shape)
    A, B = spectral_factors(W, r)
    S = torch.linalg.svdvals(W)
    assert float((W - B @ A).square().sum()) == pytest.approx(float(S[r:].square().sum()), abs=1e-10)


@given(sizes)
def test_4_full_rank_is_the_layer_and_factors_are_balanced(shape):
    m, n = shape
    base = nn.Linear(n, m).double()
    layer, x = WeLoreLinear.from_linear(base, min(m, n)), gaussian(3, n)
    assert_close(layer(x), base(x))
    root = torch.linalg.svdvals(base.weight.detach()).sqrt()
    for M in (layer.A, layer.B):
        assert_close(torch.linalg.svdvals(M.detach()), root)


@given(sizes, st.data())
def test_with_a_covariance_the_outputs_are_approximated_best(shape, data):
    (m, n), r = shape, data.draw(st.integers(1, min(shape)))
    W, X = gaussian(m, n), gaussian(50, n, seed=1) @ steep(n, n, seed=2)
    C = X.T @ X / 50 + 1e-6 * torch.eye(n, dtype=torch.float64)
    A, B = spectral_factors(W, r, C)
    D = W - B @ A
    S = torch.linalg.svdvals(W @ torch.linalg.cholesky(C))
    lost = torch.trace(D @ C @ D.T)
    assert float(lost) == pytest.approx(float(S[r:].square().sum()), abs=1e-9)
    blind = W - torch.linalg.multi_dot([M for M in spectral_factors(W, r)[::-1]])
    assert float(lost) <= float(torch.trace(blind @ C @ blind.T)) + 1e-9


@given(normalisations)
def test_5_reduction_is_a_rising_step_function(by):
    spectra = [spectrum(q, q) for q in (3, 7, 5)]
    steps = [rank_reduction(pruned_counts(spectra, i / 200, by), (3, 7, 5)) for i in range(201)]
    assert steps == sorted(steps)


# Plans, surgery, covariances.


# Bad input.


@pytest.mark.parametrize(
    "S, message",
    [
        (torch.tensor([1.0, 2.0]), "S: got shape .2,., wanted singular values"),
        (torch.tensor([1.0, -0.1]), "S: got shape"),
        (torch.tensor([0.0, 0.0]), "S: got shape"),
        (torch.tensor([]), "S: got shape"),
        (torch.tensor([1.0, float("nan")]), "S: got 1 NaN"),
    ],
)
def test_no_spectrum(S, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        normalised_spectrum(S)


def test_numbers_out_of_range():
    S = [torch.tensor([2.0, 1.0])]
    for call, message in [
        (lambda: normalised_spectrum(S[0], "mean"), "by: got 'mean'"),
        (lambda: pruned_counts(S, float("nan")), "threshold: got nan"),
        (lambda: find_threshold(S, 1.5), "target: got 1.5"),
        (lambda: find_threshold(S, 0.5, step=0), "step: got 0"),
        (lambda: find_threshold([], 0.5), "spectra: got none"),
        (lambda: uniform_pruning([3], -0.1), "target: got -0.1"),
        (lambda: is_low_rank(1, 0), "size: got 0"),
        (lambda: rank_reduction([1], [2, 3]), "pruned: got 1 counts, wanted one for each of 2"),
        (lambda: spectral_factors(gaussian(3, 4), 4), "rank: got 4"),
        (lambda: spectral_factors(gaussian(3, 4), 2, torch.zeros(4, 4).double()), "covariance: got a matrix without"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_matrices_that_do_not_fit(no_shape_checks):
    for call, message in [
        (lambda: gradient_cosine(gaussian(2, 3), gaussian(3, 2)), "H: got shape .3, 2., wanted .2, 3."),
        (lambda: WeLoreLinear(gaussian(2, 5), gaussian(4, 3)), "B: got 3 columns, wanted 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="base: got Tanh"):
        WeLoreLinear.from_linear(nn.Tanh(), 2)
