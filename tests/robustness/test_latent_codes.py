"""Codes of images: inversion of a batch, shifted codes, and several codes an image."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.robustness import compose_codes, expand_codes, inversion_loss, invert, move_codes, shift_codes

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
seeds = st.integers(0, 1000)
D, C, PIXELS = 3, 5, 8


def randoms(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, C), nn.Tanh()).double(), nn.Sequential(nn.Linear(C, PIXELS), nn.Tanh()).double()


def network(*sizes, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(m, n) for m, n in zip(sizes, sizes[1:]))).double()


@given(st.integers(1, 5), st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([0.0, 0.7]), seeds)
def test_loss_equals_a_loop(n, code_weight, feature_weight, seed):
    G, E, Phi = nn.Sequential(*halves(seed)), network(PIXELS, D), network(PIXELS, 4, seed=2)
    x, z = randoms(n, PIXELS, seed=seed), randoms(n, D, seed=seed + 1)
    options = {"code_weight": code_weight, "feature_weight": feature_weight}
    found = inversion_loss(G, z, x, encoder=E, features=Phi, **options)
    for i in range(n):
        made = G(z[i])
        wanted = sum((a - b) ** 2 for a, b in zip(made, x[i]))
        wanted = wanted + feature_weight * sum((a - b) ** 2 for a, b in zip(Phi(made), Phi(x[i])))
        wanted = wanted + code_weight * sum((a - b) ** 2 for a, b in zip(z[i], E(made)))
        close(found[i], wanted)
    close(inversion_loss(G, z, x), (G(z) - x).square().sum(1))


@given(st.integers(1, 4), st.integers(0, 12), seeds)
def test_the_loss_never_rises_and_the_batch_is_its_images(n, steps, seed):
    G, E = nn.Sequential(*halves(seed)), network(PIXELS, D)
    x, start = randoms(n, PIXELS, seed=seed), randoms(n, D, seed=seed + 1)
    whole = invert(G, x, start, steps=steps, lr=0.3, encoder=E)
    assert (whole.loss <= whole.first_loss).all() and whole.weights is None
    close(whole.loss, inversion_loss(G, whole.z, x, encoder=E).detach())
    for i in range(n):
        alone = invert(G, x[i : i + 1], start[i : i + 1], steps=steps, lr=0.3, encoder=E)
        torch.testing.assert_close(alone.z[0], whole.z[i], rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in (*G.parameters(), *E.parameters()))
    if steps == 0:
        assert torch.equal(whole.z, start)


def test_longer_is_never_worse():
    G, x, start = nn.Sequential(*halves()), randoms(6, PIXELS), randoms(6, D, seed=1)
    found = [invert(G, x, start, steps=steps, lr=0.1).loss for steps in (0, 3, 30, 100)]
    assert all((b <= a).all() for a, b in zip(found, found[1:])) and found[-1].sum() < 0.9 * found[0].sum()


def test_the_code_of_a_made_image_stays():
    G, z = nn.Sequential(*halves()), randoms(4, D)
    found = invert(G, G(z).detach(), z, steps=20)
    assert torch.equal(found.z, z) and found.loss.max() < 1e-20


def test_a_linear_generator_is_inverted_as_least_squares_does():
    G = nn.Linear(D, PIXELS).double()
    x = randoms(5, PIXELS)
    found = invert(G, x, torch.zeros(5, D, dtype=torch.float64), steps=2000, lr=0.05).z
    wanted = torch.linalg.lstsq(G.weight.detach(), (x - G.bias.detach()).T).solution.T
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_inside_no_grad_and_inference_mode():
    G, x, start = nn.Sequential(*halves()), randoms(2, PIXELS), randoms(2, D)
    wanted = invert(G, x, start, steps=5).z
    with torch.no_grad():
        assert torch.equal(invert(G, x, start, steps=5).z, wanted)


@given(st.integers(1, 4), seeds, st.sampled_from([0.0, 0.4, 1.0]))
def test_shifting(n, seed, psi):
    z, mean = randoms(n, D, seed=seed), randoms(D, seed=seed + 1)
    shifted = shift_codes(z, mean, psi)
    close(shifted, torch.stack([torch.stack([m + psi * (v - m) for v, m in zip(row, mean)]) for row in z]))
    close(shift_codes(z[:, None], mean, psi)[:, 0], shifted)


@given(st.integers(1, 3), st.integers(1, 4), seeds)
def test_composition_equals_a_loop(batch, N, seed):
    first, _ = halves(seed)
    z, weights = randoms(batch, N, D, seed=seed), randoms(batch, N, C, seed=seed + 1)
    found = compose_codes(first, z, weights)
    for i in range(batch):
        total = torch.zeros(C, dtype=torch.float64)
        for n in range(N):
            h = first(z[i, n])
            for c in range(C):
                total[c] += weights[i, n, c] * h[c]
        close(found[i], total)


def test_composition_of_feature_maps():
    first = nn.Sequential(nn.Linear(D, C * 6), nn.Unflatten(1, (C, 2, 3))).double()
    z, weights = randoms(2, 4, D), randoms(2, 4, C, seed=1)
    wanted = sum(weights[:, n, :, None, None] * first(z[:, n]) for n in range(4))
    close(compose_codes(first, z, weights), wanted)


def test_one_code_of_weight_one_is_the_plain_generator():
    first, second = halves()
    z = randoms(4, D)
    close(second(compose_codes(first, z[:, None], torch.ones(4, 1, C).double())), second(first(z)))


def test_expansion_starts_from_the_mean_and_fits_better_with_more_codes():
    first, second = halves()
    x, start = 0.5 * randoms(6, PIXELS).tanh(), randoms(6, 4, D, seed=1)
    at_start = expand_codes(first, second, x, start, steps=0)
    close(at_start.weights, torch.full((6, 4, C), 0.25, dtype=torch.float64))
    made = second(torch.stack([first(start[:, n]) for n in range(4)]).mean(0))
    close(at_start.loss, (made - x).square().sum(1).detach())
    found = expand_codes(first, second, x, start, steps=200, lr=0.05)
    assert (found.loss <= at_start.loss).all() and found.loss.sum() < 0.5 * at_start.loss.sum()
    close(found.loss, (second(compose_codes(first, found.z, found.weights)) - x).square().sum(1).detach())
    one = invert(lambda z: second(first(z)), x, start[:, 0], steps=200, lr=0.05)
    assert found.loss.sum() < one.loss.sum()  # free weights reach features that no single code has


def test_codes_move_together():
    z, V, alpha = randoms(3, D), randoms(D, 2, seed=1), randoms(3, 2, seed=2)
    moved = move_codes(z, V, alpha)
    for i in range(3):
        close(moved[i], z[i] + sum(alpha[i, k] * V[:, k] for k in range(2)))
    close(move_codes(z[:, None].expand(-1, 4, -1), V, alpha), moved[:, None].expand(-1, 4, -1))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda G, x, z: invert(G, x, z, steps=-1), ValueError, "steps"),
        (lambda G, x, z: invert(G, x, z, lr=0.0), ValueError, "lr"),
        (lambda G, x, z: invert(G, x, z[:1]), ValueError, "start: got shape"),
        (lambda G, x, z: invert(G, x, z[:, None]), ValueError, "start: got shape"),
        (lambda G, x, z: invert(G, x * torch.nan, z), ValueError, "x: got"),
        (lambda G, x, z: invert(G, x[:, :2], z), ValueError, "x: got shape"),
        (lambda G, x, z: invert(G, x.long(), z), TypeError, "x"),
        (lambda G, x, z: invert(lambda t: G(t) * 1e200, x, z), ValueError, "loss: got"),
        (lambda G, x, z: inversion_loss(G, z, x, code_weight=-1.0), ValueError, "code_weight"),
        (lambda G, x, z: inversion_loss(G, z, x, feature_weight=-1.0), ValueError, "feature_weight"),
        (lambda G, x, z: shift_codes(z, z[0], 1.5), ValueError, "truncation"),
        (lambda G, x, z: shift_codes(z, z[0, :2], 0.5), ValueError, "mean"),
        (lambda G, x, z: compose_codes(G[0], z, torch.ones(2, 1, C)), ValueError, "z, weights"),
        (lambda G, x, z: compose_codes(G[0], z[:, None], torch.ones(2, 1, 2)), ValueError, "weights: got 2 channels"),
        (lambda G, x, z: expand_codes(*G, x, z), ValueError, "start: got shape"),
        (lambda G, x, z: expand_codes(*G, x[:, :2], z[:, None]), ValueError, "x: got shape"),
        (
            lambda G, x, z: move_codes(z, torch.ones(D, 1).double(), torch.ones(2, 2).double()),
            ValueError,
            "z, V, amplitudes",
        ),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(nn.Sequential(*halves()), randoms(2, PIXELS), randoms(2, D))
