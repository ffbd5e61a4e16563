"""Projections on ball ∩ box against bisection, a quadratic program and their optimality conditions; step directions."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from lowrank_ref.robustness.projections import NORMS, ascent, check_threat, project

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
each_norm = pytest.mark.parametrize("norm", NORMS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n, d, seed, saturated=False):
    """Centres in the box, some at its corners, and points around them, inside and far outside."""
    g = seeded(seed)
    x = torch.rand(n, d, generator=g, dtype=torch.float64)
    x = x.round() if saturated else x
    spread = torch.rand(n, 1, generator=g, dtype=torch.float64) * 3
    return x + spread * torch.randn(n, d, generator=g, dtype=torch.float64), x


def size(delta, norm):
    return delta.flatten(1).norm(p=norm, dim=1)


size_of = size


def bisection(z, x, norm, epsilon):
    """One sample: shrink z - x by a threshold (l1) or a factor (l2), clip, and search the amount."""

    def at(t):
        d = z - x
        moved = d.sign() * (d.abs() - t).clamp_min(0) if norm == 1 else d * (1 - t)
        return (x + moved).clamp(0, 1)

    if (at(0.0) - x).norm(p=norm) <= epsilon:
        return at(0.0)
    low, high = 0.0, 1.0 if norm == 2 else (z - x).abs().max().item()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (at(middle) - x).norm(p=norm) > epsilon else (low, middle)
    return at(high)


@given(st.integers(1, 12), st.integers(0, 10_000), st.booleans(), st.sampled_from([0.0, 1e-3, 0.2, 0.7, 2.0, 50.0]))
@pytest.mark.parametrize("norm", [2, 1])
def test_projection_equals_bisection(norm, d, seed, saturated, epsilon):
    z, x = problem(4, d, seed, saturated)
    wanted = torch.stack([bisection(*pair, norm, epsilon) for pair in zip(z, x)])
    close(project(z, x, norm=norm, epsilon=epsilon), wanted, atol=1e-8)


@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(0, 2))
def test_projection_in_the_max_norm_is_two_clips(d, seed, epsilon):
    z, x = problem(3, d, seed)
    u = project(z, x, norm=math.inf, epsilon=epsilon)
    for got, point, centre in zip(u.flatten().tolist(), z.flatten().tolist(), x.flatten().tolist()):
        low, high = max(centre - epsilon, 0), min(centre + epsilon, 1)
        assert got == pytest.approx(min(max(point, low), high), abs=1e-12)


@pytest.mark.parametrize("norm, epsilon", [(1, 0.8), (1, 0.1), (2, 0.5), (2, 0.05)])
@pytest.mark.parametrize("seed", range(3))
def test_projection_equals_a_quadratic_program(norm, epsilon, seed):
    """δ = a - b with a, b >= 0 makes ‖δ‖₁ <= ε linear; SLSQP knows nothing of thresholds."""
    z, x = (t[0].numpy() for t in problem(1, 5, seed))
    if norm == 1:
        limit = {"type": "ineq", "fun": lambda v: epsilon - v.sum()}
        bounds = [(0, 1 - c) for c in x] + [(0, c) for c in x]
        solved = minimize(
            lambda v: np.square(x + v[:5] - v[5:] - z).sum(),
            np.zeros(10),
            bounds=bounds,
            constraints=[limit],
            options={"ftol": 1e-14, "maxiter": 500},
        )
        wanted = x + solved.x[:5] - solved.x[5:]
    else:
        limit = {"type": "ineq", "fun": lambda u: epsilon**2 - np.square(u - x).sum()}
        options = {"ftol": 1e-14, "maxiter": 500}
        solved = minimize(
            lambda u: np.square(u - z).sum(), x, bounds=[(0, 1)] * 5, constraints=[limit], options=options
        )
        wanted = solved.x
    got = project(torch.tensor(z)[None], torch.tensor(x)[None], norm=norm, epsilon=epsilon)[0]
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-5)


@given(st.integers(1, 10), st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.6, 3.0]), st.booleans())
@each_norm
def test_no_random_point_of_the_set_is_nearer(norm, d, seed, epsilon, saturated):
    """u is the projection iff <z - u, v - u> <= 0 for all v in the convex set."""
    z, x = problem(2, d, seed, saturated)
    u = project(z, x, norm=norm, epsilon=epsilon)
    assert bool((u >= 0).all() and (u <= 1).all()) and bool((size(u - x, norm) <= epsilon * (1 + 1e-9) + 1e-12).all())
    for trial in range(20):
        v = problem(2, d, 7 * seed + trial + 1)[0]
        v = torch.where(torch.rand(2, d, generator=seeded(trial)) < 0.5, v, x).clamp(0, 1)
        shrink = (epsilon / size(v - x, norm).clamp_min(1e-12)).clamp_max(1)
        v = x + shrink[:, None] * (v - x)  # in the box, which is convex, and in the ball
        assert bool((((z - u) * (v - u)).sum(1) <= 1e-9).all())


@given(st.integers(1, 10), st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.6, 3.0]))
@each_norm
def test_projection_is_idempotent_and_leaves_what_is_inside(norm, d, seed, epsilon):
    z, x = problem(3, d, seed)
    u = project(z, x, norm=norm, epsilon=epsilon)
    close(project(u, x, norm=norm, epsilon=epsilon), u)
    assert torch.equal(project(x, x, norm=norm, epsilon=epsilon), x)


@each_norm
def test_projection_does_not_depend_on_the_shape_of_the_image_or_the_other_rows(norm):
    z, x = problem(3, 12, 0)
    u = project(z, x, norm=norm, epsilon=0.3)
    shape = (3, 1, 3, 4)
    close(project(z.view(shape), x.view(shape), norm=norm, epsilon=0.3).flatten(1), u)
    close(project(z[1:2], x[1:2], norm=norm, epsilon=0.3), u[1:2])


@each_norm
def test_float32_stays_float32_within_the_tolerance(norm):
    x = torch.rand(50, 784, generator=seeded())
    z = x + torch.randn(50, 784, generator=seeded(1))
    u = project(z, x, norm=norm, epsilon=0.7)
    assert u.dtype == torch.float32 and bool((u >= 0).all() and (u <= 1).all())
    assert bool((size(u.double() - x.double(), norm) <= 0.7 * (1 + 1e-5)).all())


def test_clipping_after_scaling_misses_most_of_the_l1_budget():
    """The reason for all this: half the steps point out of the box."""
    z, x = problem(200, 30, 0, saturated=True)
    u = project(z, x, norm=1, epsilon=2.0)
    ball = z + 0.0
    for i in range(200):
        ball[i] = x[i] + (z[i] - x[i]) * min(1.0, 2.0 / float((z[i] - x[i]).abs().sum()))
    clipped = ball.clamp(0, 1)
    exact, late = ((v - z).square().sum(1).mean() for v in (u, clipped))
    assert size(clipped - x, 1).mean() < 1.3 < 1.9 < size(u - x, 1).mean() and exact < late


@each_norm
def test_directions_have_length_one_and_rise_fastest(norm):
    G = torch.randn(6, 40, generator=seeded(), dtype=torch.float64)
    u = ascent(G, torch.full_like(G, 0.5), norm=norm, sparsity=0.025)
    close(size(u, norm), torch.ones(6, dtype=torch.float64))
    dual = {math.inf: 1, 2: 2, 1: math.inf}[norm]
    close((u * G).sum(1), size(G, dual))  # the dual norm: no unit step gains more


def test_the_sparse_direction_moves_the_k_largest_entries():
    G = torch.tensor([[0.1, -3.0, 2.0, 0.0, 1.0], [5.0, 4.0, -3.0, 2.0, 1.0]])
    u = torch.full_like(G, 0.5)
    assert ascent(G, u, norm=1, sparsity=0.4).tolist() == [[0, -0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0, 0]]
    shares = torch.tensor([0.01, 0.6])
    assert (ascent(G, u, norm=1, sparsity=shares) != 0).sum(1).tolist() == [1, 3]


def test_the_sparse_direction_passes_over_pixels_that_cannot_move():
    G = torch.tensor([[-4.0, 3.0, 2.0, 1.0]])
    u = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert ascent(G, u, norm=1, sparsity=0.5).tolist() == [[0, 0, 1, 0]]
    assert ascent(-G, u, norm=1, sparsity=0.5).tolist() == [[0.5, -0.5, 0, 0]]


@each_norm
@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-23, 1e20, 1e38])
def test_directions_have_length_one_whatever_the_size_of_the_gradient(norm, size):
    """Squares of such numbers are 0 or infinite in float32."""
    G = torch.zeros(3, 8)
    G[0, 2], G[1, :2], G[2] = size, -size, torch.linspace(-1, 1, 8) * size
    u = ascent(G, torch.full_like(G, 0.5), norm=norm, sparsity=0.25)
    rows = slice(0, 2) if size < 1e-40 else slice(None)  # there the third row rounds to others
    torch.testing.assert_close(size_of(u, norm)[rows], torch.ones(3)[rows], rtol=1e-5, atol=0)


@each_norm
def test_bad_directions_are_named(norm, no_shape_checks):
    G = torch.ones(2, 3)
    with pytest.raises(ValueError, match="norm: got 3"):
        ascent(G, G, norm=3)
    with pytest.raises(ValueError, match="u: got shape"):
        ascent(G, G[:, :2], norm=norm)
    with pytest.raises(ValueError, match="G: got 1 NaN"):
        ascent(torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2), norm=norm)
    with pytest.raises(TypeError, match="G: got dtype"):
        ascent(G.long(), G, norm=norm)


@each_norm
def test_integers_are_no_points(norm, no_shape_checks):
    """They came back as integers: the projection of 2 on a ball around 0.5 was 0."""
    x = torch.full((1, 2), 0.5)
    with pytest.raises(TypeError, match="z: got dtype torch.int64"):
        project(torch.tensor([[2, 0]]), x, norm=norm, epsilon=0.75)
    with pytest.raises(ValueError, match=r"z: got shape \(2, 2\), wanted that of x, \(1, 2\)"):
        project(torch.ones(2, 2), x, norm=norm, epsilon=0.75)


def test_an_image_hardly_above_one_is_shown_so():
    for x in (torch.tensor([[0.5, 1 + 1e-7]]), torch.tensor([[0.5, 1 + 1e-15]]).double()):
        x = torch.nextafter(torch.ones_like(x), 2 * torch.ones_like(x))
        with pytest.raises(ValueError, match=r"x: got values from 1\.0+[1-9]"):
            check_threat(x, 2, 0.1)


@each_norm
def test_no_gradient_no_direction(norm):
    assert not ascent(torch.zeros(2, 5), torch.zeros(2, 5), norm=norm).any()


@each_norm
def test_bad_input_is_named(norm):
    x = torch.rand(2, 3)
    check_threat(x, norm, 0)
    for bad in (x + 1, x - 1, x[:0], x[:, :0], x[0], x * torch.nan):
        with pytest.raises(ValueError, match="x: got"):
            project(bad, bad, norm=norm, epsilon=0.1)
    with pytest.raises(ValueError, match="z: got"):
        project(x * torch.inf, x, norm=norm, epsilon=0.1)
    for epsilon in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon: got"):
            project(x, x, norm=norm, epsilon=epsilon)
    with pytest.raises(TypeError, match="x: got dtype"):
        check_threat(x.long(), norm, 0.1)
    with pytest.raises(ValueError, match="norm: got 3"):
        project(x, x, norm=3, epsilon=0.1)
