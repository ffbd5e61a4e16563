"""Entropy profiles: closed forms, bounds and symmetries. All entropies in nats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.analysis import (
    attention_matrix,
    entropy,
    entropy_profile,
    factor_sites,
    marchenko_pastur_density,
    pad_to_binary,
    page_entropy,
    rank_ceiling,
    schmidt_probabilities,
    valley_depth,
)

LOG2 = math.log(2)
sizes = st.integers(2, 24)
powers = st.integers(1, 5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(gaussian(n, n, seed=seed)).Q


def at_boundary(W):
    profile = entropy_profile(W)
    return profile.entropy[profile.boundary].item()


def assert_profile(W, wanted, atol=1e-10):
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(entropy_profile(W).entropy, wanted, rtol=0, atol=atol)


# The equations, against slow loops.


@given(st.integers(1, 500))
def test_sites_are_the_rising_primes(size):
    sites = factor_sites(size)
    assert math.prod(sites) == size and list(sites) == sorted(sites)
    assert all(all(p % d for d in range(2, p)) for p in sites)


def slow_entropy(W, left):
    """Entropy of the reduced density matrix of the first digits, one entry at a time, without the Gram matrix."""
    psi = [x / W.norm().item() for row in W.tolist() for x in row]
    right = len(psi) // left
    rho = np.zeros((left, left))
    for a in range(left):
        for b in range(left):
            rho[a, b] = sum(psi[a * right + c] * psi[b * right + c] for c in range(right))
    return -sum(p * math.log(p) for p in np.linalg.eigvals(rho).real if p > 1e-15)


@given(sizes, sizes)
def test_profile_is_that_of_the_reduced_density_matrices(m, n):
    W = gaussian(m, n)
    profile = entropy_profile(W)
    sites = factor_sites(m) + factor_sites(n)
    assert profile.left == tuple(math.prod(sites[:k]) for k in range(1, len(sites)))
    assert profile.left[profile.boundary] == m
    for left, got in zip(profile.left, profile.entropy.tolist()):
        if left <= 24:
            assert got == pytest.approx(slow_entropy(W, left), abs=1e-9)
    assert torch.equal(profile.bits, profile.entropy / LOG2)


@given(sizes, sizes)
def test_schmidt_probabilities_are_squared_singular_values(m, n):
    W = gaussian(m, n)
    for left in entropy_profile(W).left:
        p = schmidt_probabilities(W, left)
        S = torch.linalg.svdvals((W / W.norm()).reshape(left, -1))
        torch.testing.assert_close(p, S.square(), rtol=0, atol=1e-13)
        assert p.sum().item() == pytest.approx(1, abs=1e-14) and bool((p >= 0).all())
        wanted = -sum(x * math.log(x) for x in (S * S).tolist() if x > 0)
        assert entropy(p) == pytest.approx(wanted, abs=1e-10)


def test_entropy_normalises_and_knows_zero():
    assert entropy(torch.tensor([3.0, 0.0, 0.0])) == 0
    assert entropy(torch.full((8,), 0.3)) == pytest.approx(3 * LOG2)


def test_padding_keeps_the_singular_values_and_binary_shapes():
    W = gaussian(5, 7)
    padded = pad_to_binary(W)
    assert padded.shape == (8, 8) and torch.equal(padded[:5, :7], W) and padded.count_nonzero() == 35
    assert at_boundary(padded) == pytest.approx(at_boundary(W), abs=1e-12)
    assert len(entropy_profile(padded).left) == 5
    assert torch.equal(pad_to_binary(padded), padded)


# Closed forms.


@given(powers, powers)
def test_ones_and_single_entries_have_none(a, b):
    m, n = 2**a, 2**b
    single = torch.zeros(m, n)
    single[m // 2, n - 1] = -3.0
    zeros = [0.0] * (a + b - 1)
    assert_profile(torch.ones(m, n), zeros)
    assert_profile(single, zeros)


@given(sizes, sizes)
def test_rank_one_has_none_at_the_row_column_cut_only(m, n):
    u, v = gaussian(m), gaussian(n, seed=1)
    W = torch.outer(u, v)
    profile = entropy_profile(W)
    assert profile.entropy[profile.boundary] < 1e-10
    for k, left in enumerate(profile.left):  # elsewhere it is the entropy of one factor as a chain of its own
        if left < m:
            wanted = entropy(schmidt_probabilities(u, left))
        elif left > m:
            wanted = entropy(schmidt_probabilities(v, left // m))
        else:
            continue
        assert profile.entropy[k].item() == pytest.approx(wanted, abs=1e-10)
        assert wanted > 1e-3


@given(sizes)
def test_orthogonal_matrices_are_maximal_at_the_row_column_cut(n):
    permutation = torch.eye(n)[torch.randperm(n, generator=seeded())]
    for W in (torch.eye(n), permutation, orthogonal(n)):
        assert at_boundary(W) == pytest.approx(math.log(n), abs=1e-10)


@given(powers)
def test_identity_and_hadamard_are_tents(L):
    tent = [min(k, 2 * L - k) * LOG2 for k in range(1, 2 * L)]
    hadamard = torch.ones(1, 1)
    for _ in range(L):
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert_profile(torch.eye(2**L), tent)
    assert_profile(hadamard, tent)


@pytest.mark.parametrize("L", [1, 2, 4])
def test_identity_in_interleaved_order_alternates(L):
    order = [axis for k in range(L) for axis in (k, L + k)]
    W = torch.eye(2**L).reshape([2] * (2 * L)).permute(order).reshape(2**L, 2**L)
    assert_profile(W, [LOG2 * (k % 2) for k in range(1, 2 * L)])


@given(powers, st.integers(0, 5))
def test_kronecker_products_add_up(L, seed):
    blocks = [gaussian(2, 2, seed=10 * seed + k) for k in range(L)]
    W = torch.ones(1, 1, dtype=torch.float64)
    for block in blocks:
        W = torch.kron(W, block)
    s = [entropy(torch.linalg.svdvals(block).square()) for block in blocks]
    assert_profile(W, [sum(s[:k]) for k in range(1, L + 1)] + [sum(s[k:]) for k in range(1, L)])


@given(powers, powers)
def test_two_opposite_corners_have_one_bit_everywhere(a, b):
    W = torch.zeros(2**a, 2**b)
    W[0, 0] = W[-1, -1] = 0.3
    assert_profile(W, [LOG2] * (a + b - 1))


@given(sizes, sizes)
def test_orthonormal_factors_have_log_rank(m, n):
    for r in {1, min(m, n) // 2 or 1, min(m, n)}:
        W = orthogonal(m)[:, :r] @ orthogonal(n, seed=1)[:r]
        assert at_boundary(W) == pytest.approx(math.log(r), abs=1e-10)


@given(sizes)
def test_diagonal_has_the_entropy_of_its_squares(n):
    d = gaussian(n)
    assert at_boundary(torch.diag(d)) == pytest.approx(entropy(d.square()), abs=1e-10)


def test_page_is_the_mean_of_complex_states_and_real_ones_lie_below():
    m, n, rng = 4, 6, np.random.default_rng(0)
    means = []
    for parts in (1, 2):
        S = []
        for _ in range(4000):
            M = rng.standard_normal((m, n)) + (parts - 1) * 1j * rng.standard_normal((m, n))
            p = np.linalg.svd(M, compute_uv=False) ** 2
            S.append(entropy(torch.tensor(p)))
        means.append((np.mean(S), np.std(S) / math.sqrt(len(S))))
    (real, _), (cplx, error) = means
    assert page_entropy(m, n) == page_entropy(n, m) == pytest.approx(cplx, abs=4 * error)
    assert page_entropy(m, n) - real > 10 * error


@given(st.integers(1, 30), st.integers(1, 30))
def test_page_is_its_sum_and_tends_to_log_m_minus_m_over_2n(m, n):
    m, n = sorted((m, n))
    wanted = sum(1 / k for k in range(n + 1, m * n + 1)) - (m - 1) / (2 * n)
    assert page_entropy(m, n) == pytest.approx(wanted, abs=1e-12)
    assert abs(page_entropy(m, n) - (math.log(m) - m / (2 * n))) <= 1 / (m * n)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_marchenko_pastur_has_mass_one_mean_one_and_the_entropy_of_page(ratio):
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    angle = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * math.pi / 2
    x = low + (high - low) * angle.sin().square()  # tames the square roots at both ends
    step = (high - low) * (2 * angle).sin() * math.pi / 2 / 20_000
    density = marchenko_pastur_density(x, ratio)
    for value, wanted in ((1.0, 1.0), (x, 1.0), (torch.special.xlogy(x, x), ratio / 2)):
        assert (density * value * step).sum().item() == pytest.approx(wanted, abs=1e-6)
    outside = torch.tensor([-1.0, 0.0 if ratio < 1 else -0.1, high + 0.1])
    assert not marchenko_pastur_density(outside, ratio).any()


@pytest.mark.parametrize("m, n", [(256, 256), (128, 512)])
def test_gaussian_spectrum_follows_marchenko_pastur(m, n):
    x = m * schmidt_probabilities(gaussian(m, n), m)
    ratio = m / n
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    assert x.max() < high + 0.1 and x.min() > low - 0.1
    edges = torch.linspace(low, high, 1001, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    cumulative = marchenko_pastur_density(middles, ratio).cumsum(0) * (edges[1] - edges[0])
    empirical = torch.tensor([(x <= edge).double().mean() for edge in edges[1:]])
    assert (cumulative - empirical).abs().max() < 0.03
    assert entropy(x / m) == pytest.approx(math.log(m) - ratio / 2, abs=0.01)


def test_gaussian_purity_is_exact():
    m, n, draws = 8, 24, 4000
    purity = [(schmidt_probabilities(gaussian(m, n, seed=s), m) ** 2).sum().item() for s in range(draws)]
    error = np.std(purity) / math.sqrt(draws)
    assert np.mean(purity) == pytest.approx((m + n + 1) / (m * n + 2), abs=4 * error)


def test_products_of_gaussians():
    n = 512
    assert at_boundary(gaussian(n, n)) == pytest.approx(math.log(n) - 1 / 2, abs=0.01)
    assert at_boundary(gaussian(n, n) @ gaussian(n, n, seed=1)) == pytest.approx(math.log(n) - 5 / 6, abs=0.01)
    for r in (8, 64, 128):
        W = gaussian(n, r) @ gaussian(r, n, seed=1)
        assert at_boundary(W) == pytest.approx(math.log(r) - r / n, abs=0.02)


# Invariants.


def factors(m, n, r):
    return gaussian(m, r) @ gaussian(r, n, seed=1)


@given(sizes, sizes, st.integers(1, 24))
def test_the_ceiling_holds_and_generic_factors_have_its_rank(m, n, r):
    r = min(r, m, n)
    W = factors(m, n, r)
    profile, ceiling = entropy_profile(W), rank_ceiling(m, n, r)
    assert bool((profile.entropy >= 0).all()) and bool((profile.entropy <= ceiling + 1e-10).all())
    assert ceiling[profile.boundary].item() == pytest.approx(math.log(r))
    for left, most in zip(profile.left, ceiling.exp().round().int().tolist()):
        assert torch.linalg.matrix_rank(W.reshape(left, -1)).item() == most
    whole = [math.log(min(left, m * n // left)) for left in profile.left]
    torch.testing.assert_close(rank_ceiling(m, n), torch.tensor(whole, dtype=torch.float64))


@given(sizes, sizes, st.floats(1e-30, 1e30), st.sampled_from([-1, 1]))
def test_scale_and_sign_do_not_matter(m, n, scale, sign):
    W = gaussian(m, n)
    assert_profile(sign * scale * W, entropy_profile(W).entropy)


def test_scales_whose_squares_leave_float64_do_not_matter():
    W = gaussian(4, 4)
    for scale in (1e-200, 1e200):
        assert_profile(scale * W, entropy_profile(W).entropy)


@given(powers, powers)
def test_reversing_the_chain_reverses_the_profile(a, b):
    W = gaussian(2**a, 2**b)
    chain = W.reshape([2] * (a + b)).permute(*reversed(range(a + b)))
    assert_profile(chain.reshape(2**b, 2**a), entropy_profile(W).entropy.flip(0))


@given(sizes, sizes)
def test_the_transpose_agrees_at_the_row_column_cut(m, n):
    W = gaussian(m, n)
    assert at_boundary(W.T) == pytest.approx(at_boundary(W), abs=1e-10)


def test_the_transpose_differs_elsewhere():
    W = factors(16, 16, 2)
    assert (entropy_profile(W).entropy - entropy_profile(W.T).entropy).abs().max() > 0.05


@given(sizes, sizes)
def test_rotations_keep_the_row_column_cut(m, n):
    W = factors(m, n, min(m, n, 3))
    turned = orthogonal(m, seed=2) @ W @ orthogonal(n, seed=3)
    assert at_boundary(turned) == pytest.approx(at_boundary(W), abs=1e-10)


def test_a_permutation_of_neurons_changes_the_other_cuts():
    W = torch.kron(gaussian(2, 2), torch.kron(gaussian(4, 4, seed=1), gaussian(2, 2, seed=2)))
    before = entropy_profile(W)
    after = entropy_profile(W[torch.randperm(16, generator=seeded())])
    same = (before.entropy - after.entropy).abs() < 1e-10
    assert same[before.boundary] and not same[: before.boundary].any()


@given(powers, powers)
def test_local_rotations_leave_the_whole_profile(a, b):
    W = factors(2**a, 2**b, 2)

    def local(L, seed):
        out = torch.ones(1, 1, dtype=torch.float64)
        for k in range(L):
            out = torch.kron(out, orthogonal(2, seed=seed + k))
        return out

    assert_profile(local(a, 20) @ W @ local(b, 40), entropy_profile(W).entropy)


@given(sizes, sizes, st.integers(1, 24))
def test_neighbouring_cuts_differ_by_at_most_the_site_between(m, n, r):
    profile = entropy_profile(factors(m, n, min(r, m, n)))
    S = [0.0, *profile.entropy.tolist(), 0.0]
    for k, site in enumerate(factor_sites(m) + factor_sites(n)):
        assert abs(S[k + 1] - S[k]) <= math.log(site) + 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float64(dtype):
    W = gaussian(12, 10).to(dtype)
    assert torch.equal(entropy_profile(W).entropy, entropy_profile(W.double()).entropy)


def test_a_profile_leaves_its_input_and_the_graph_alone():
    W = gaussian(4, 6).requires_grad_()
    before = W.detach().clone()
    assert not entropy_profile(W).entropy.requires_grad
    assert torch.equal(W, before) and W.grad is None


def test_valley_depth_is_positive_for_low_rank_and_negative_for_noise():
    depths = [valley_depth(entropy_profile(W)) for W in (factors(64, 64, 2), factors(64, 64, 8), gaussian(64, 64))]
    assert depths[0] > depths[1] > 0 > depths[2]
    profile = entropy_profile(torch.eye(4))  # log 2, log 4, log 2
    assert valley_depth(profile) == pytest.approx(-LOG2)


# Attention.


@given(st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_attention_matrix_against_a_loop(T, d, causal):
    Q, K = gaussian(T, d), gaussian(T, d, seed=1)
    P = attention_matrix(Q, K, causal=causal)
    for t in range(T):
        last = t + 1 if causal else T
        weights = [math.exp(sum(Q[t, i] * K[s, i] for i in range(d)) / math.sqrt(d)) for s in range(last)]
        for s in range(T):
            wanted = weights[s] / sum(weights) if s < last else 0.0
            assert P[t, s].item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_matrix_is_that_of_pytorch(causal):
    Q, K, V = (gaussian(2, 3, 8, 4, seed=s) for s in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=causal)
    torch.testing.assert_close(attention_matrix(Q, K, causal=causal) @ V, wanted, rtol=0, atol=1e-12)


def test_attention_matrix_is_that_of_a_bert(bert, tokens):
    model = bert().bert
    model.set_attn_implementation("eager")
    got = {}
    block = model.encoder.layer[0].attention.self
    for name in ("query", "key"):
        getattr(block, name).register_forward_hook(lambda *args, name=name: got.update({name: args[-1]}))
    with torch.no_grad():
        wanted = model(tokens, output_attentions=True).attentions[0]
    Q, K = (got[name].unflatten(-1, (2, 8)).transpose(1, 2) for name in ("query", "key"))
    torch.testing.assert_close(attention_matrix(Q, K), wanted, rtol=0, atol=1e-6)


def test_limits_of_attention():
    T = 64
    uniform = torch.full((T, T), 1 / T)
    causal = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    assert at_boundary(uniform) < 1e-10
    assert at_boundary(causal) == pytest.approx(1.53, abs=0.01)
    assert torch.allclose(attention_matrix(torch.zeros(T, 4), torch.zeros(T, 4), causal=True), causal)
    sharp = attention_matrix(1e4 * torch.eye(T), torch.eye(T))
    assert at_boundary(sharp) == pytest.approx(math.log(T), abs=1e-6)


# Bad input.


@pytest.mark.parametrize(
    "W, error, message",
    [
        ([[1.0]], TypeError, None),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, None),
        (torch.ones(4), (TypeError, ValueError), None),
        (torch.ones(0, 4), ValueError, r"W: got shape \(0, 4\)"),
        (torch.ones(1, 4), ValueError, "m: got 1"),
        (torch.ones(4, 1), ValueError, "n: got 1"),
        (torch.zeros(2, 2), ValueError, "W: got all zeros"),
        (torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), ValueError, "W: got 1 NaN"),
    ],
)
def test_bad_matrices_raise(W, error, message):
    with pytest.raises(error, match=message):
        entropy_profile(W)


def test_other_bad_input_raises():
    W = torch.ones(4, 4)
    for call, error, message in (
        (lambda: schmidt_probabilities(W, 3), ValueError, "left: got 3, wanted a divisor of the 16"),
        (lambda: schmidt_probabilities(W, 0), ValueError, "left: got 0"),
        (lambda: schmidt_probabilities(torch.ones(0), 1), ValueError, "left: got 1"),
        (lambda: factor_sites(0), ValueError, "size: got 0"),
        (lambda: factor_sites(4.0), TypeError, None),
        (lambda: rank_ceiling(4, 4, 0), ValueError, "rank: got 0"),
        (lambda: rank_ceiling(1, 4), ValueError, "m: got 1"),
        (lambda: page_entropy(0, 4), ValueError, "m: got 0"),
        (lambda: marchenko_pastur_density(torch.ones(1), 1.5), ValueError, "ratio: got 1.5"),
        (lambda: valley_depth(entropy_profile(torch.ones(7, 4))), ValueError, "profile: got cuts"),
        (lambda: entropy(torch.tensor([-0.1, 1.1])), ValueError, "negative"),
    ):
        with pytest.raises(error, match=message):
            call()
