"""NaTra: the loss and the edits against loops, and what an edit and the search of the worst one may and may not do."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.robustness import (
    NaturalEdits,
    first_layer_directions,
    inverse_codes,
    invert,
    natra_loss,
    plain_edit,
    random_amplitudes,
    residual_edit,
    worst_amplitudes,
)

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
seeds = st.integers(0, 1000)
D, PIXELS, CLASSES = 4, 9, 3


def randoms(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*sizes, seed=0, last=nn.Sigmoid):
    torch.manual_seed(seed)
    layers = [layer for m, n in zip(sizes, sizes[1:]) for layer in (nn.Linear(m, n), nn.Tanh())]
    return nn.Sequential(*layers[:-1], last()).double()


def generator(seed=0):
    return network(D, 12, PIXELS, seed=seed)


def classifier(seed=1):
    return network(PIXELS, 8, CLASSES, seed=seed, last=nn.Identity)


def images(n, seed=0):
    return randoms(n, PIXELS, seed=seed).sigmoid(), randoms(n, D, seed=seed + 1), torch.arange(n) % CLASSES


def directions(q, seed=0):
    return torch.linalg.qr(randoms(D, q, seed=seed)).Q


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


# --- edits ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, D), seeds)
def test_edits_equal_a_loop_over_images(n, q, seed):
    G, V, alpha = generator(seed), directions(q, seed), 3 * randoms(n, q, seed=seed + 2)
    x, z, _ = images(n, seed)
    plain, residual = plain_edit(G, z, V, alpha), residual_edit(G, x, z, V, alpha)
    for i in range(n):
        moved = z[i].clone()
        for k in range(q):
            moved = moved + alpha[i, k] * V[:, k]
        close(plain[i], G(moved))
        close(
            residual[i], torch.stack([min(max(v, x.new_zeros(())), x.new_ones(())) for v in x[i] + G(moved) - G(z[i])])
        )


def test_no_amplitude_changes_no_bit():
    G, V = generator(), directions(2)
    x, z, _ = images(6)
    zeros = torch.zeros(6, 2, dtype=torch.float64)
    assert torch.equal(residual_edit(G, x, z, V, zeros), x)
    assert torch.equal(plain_edit(G, z, V, zeros), G(z))


def test_of_a_linear_generator_the_residual_edit_does_not_know_the_code():
    G = nn.Linear(D, PIXELS).double()
    V, alpha = directions(2), 0.01 * randoms(6, 2)
    x = 0.4 + 0.2 * torch.rand(6, PIXELS, dtype=torch.float64)  # far from the ends that clip
    one, two = (residual_edit(G, x, randoms(6, D, seed=s), V, alpha) for s in (1, 2))
    close(one, two)
    close(one, x + alpha @ (G.weight @ V).T)


def test_several_codes_of_an_image_move_alike():
    V, alpha = directions(2), randoms(3, 2)
    z = randoms(3, 5, D, seed=4)
    moved = plain_edit(nn.Identity(), z, V, alpha)
    for n in range(5):
        close(moved[:, n], plain_edit(nn.Identity(), z[:, n], V, alpha))


def test_small_edits_are_the_jacobian_times_the_direction():
    G, V = generator(), directions(1)
    x, z, _ = images(4)
    x = 0.4 + 0.2 * x
    step = 1e-6
    gap = (residual_edit(G, x, z, V, torch.full((4, 1), step, dtype=torch.float64)) - x) / step
    J = torch.func.vmap(torch.func.jacrev(G))(z)
    torch.testing.assert_close(gap, (J @ V).squeeze(2), rtol=1e-4, atol=1e-5)


def test_directions_beyond_the_rank_of_the_first_layer_change_nothing():
    G = generator()
    with torch.no_grad():
        G[0].weight[:] = randoms(12, 2) @ randoms(2, D, seed=1)
    V = first_layer_directions(G[0].weight.detach()).V
    x, z, _ = images(5)
    alpha = 3 * randoms(5, 2, seed=3)
    close(residual_edit(G, x, z, V[:, 2:], alpha), x, atol=1e-9)
    assert (residual_edit(G, x, z, V[:, :2], alpha) - x).abs().max() > 1e-3


# --- the worst of them ------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, D), st.integers(1, 5), st.sampled_from([0.0, 0.5, 3.0]), seeds)
def test_the_worst_amplitude_is_in_the_ball_and_not_below_its_start(n, q, steps, epsilon, seed):
    G, V, f = generator(seed), directions(q, seed), classifier(seed + 1)
    x, z, y = images(n, seed)
    edit = partial(residual_edit, G, x, z, V)
    before = copy.deepcopy(f.state_dict()), copy.deepcopy(G.state_dict())
    zeros = torch.zeros(n, q, dtype=torch.float64)
    for start in (zeros, random_amplitudes(n, q, epsilon=epsilon, generator=torch.Generator()).double()):
        alpha = worst_amplitudes(f, edit, y, start, epsilon=epsilon, steps=steps)
        assert (alpha.norm(dim=1) <= epsilon * (1 + 1e-12)).all()
        assert (losses(f, edit(alpha), y) >= losses(f, edit(start), y) - 1e-9).all()
    assert all(p.grad is None for p in (*f.parameters(), *G.parameters()))
    for state, model in zip(before, (f, G)):
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_one_direction_against_a_fine_grid():
    G, V, f = generator(3), directions(1, 3), classifier(4)
    x, z, y = images(40, 5)
    edit = partial(residual_edit, G, x, z, V)
    grid = torch.stack(
        [losses(f, edit(torch.full((40, 1), a, dtype=torch.float64)), y) for a in torch.linspace(-3, 3, 241).tolist()]
    )
    found = losses(f, edit(worst_amplitudes(f, edit, y, torch.zeros(40, 1).double(), epsilon=3.0, steps=20)), y)
    assert (found <= grid.amax(0) + 1e-4).all()
    gain = found - losses(f, edit(torch.zeros(40, 1).double()), y)
    wanted = grid.amax(0) - grid[120]
    assert gain.sum() > 0.7 * wanted.sum()


def test_a_step_equals_the_formula():
    """One step from 0: α = ε·g/‖g‖ with g the gradient, if the loss rises there."""
    G, V, f = generator(), directions(2), classifier()
    x, z, y = images(8)
    edit = partial(residual_edit, G, x, z, V)
    zeros = torch.zeros(8, 2, dtype=torch.float64)
    alpha = zeros.clone().requires_grad_()
    (g,) = torch.autograd.grad(losses(f, edit(alpha), y).sum(), alpha)
    step = 0.3 * g / g.norm(dim=1, keepdim=True)
    rose = losses(f, edit(step), y) > losses(f, edit(zeros), y)
    assert rose.any()
    close(worst_amplitudes(f, edit, y, zeros, epsilon=0.3, steps=1), torch.where(rose[:, None], step, zeros))


def test_turning_the_basis_does_not_change_the_images():
    G, V, f = generator(), directions(3), classifier()
    R = torch.linalg.qr(randoms(3, 3, seed=7)).Q
    x, z, y = images(6)
    one, two = (NaturalEdits(G, basis, epsilon=2.0).worst(f, x, z, y, steps=4) for basis in (V, V @ R))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_dropout_is_off_during_the_search_and_on_after_it():
    f = nn.Sequential(nn.Linear(PIXELS, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    x, z, y = images(6)
    edits = NaturalEdits(generator(), directions(1), epsilon=2.0)
    assert torch.equal(edits.worst(f, x, z, y), edits.worst(f, x, z, y)) and f[1].training


# --- loss and training ------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(2, 5), seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_loss_equals_a_loop(n, classes, seed, weight):
    a, b, y = randoms(n, classes, seed=seed), randoms(n, classes, seed=seed + 1), torch.arange(n) % classes
    wanted = 0.0
    for z, factor in ((a, 1.0), (b, weight)):
        for row, label in zip(z, y.tolist()):
            wanted += factor * (row.exp().sum().log() - row[label]).item() / n
    assert natra_loss(a, b, y, weight=weight).item() == pytest.approx(wanted, abs=1e-11)


def trained(epsilon, weight, steps=3):
    """Three steps of Adam; ε = 0 is plain training."""
    f, edits = classifier(), NaturalEdits(generator(), directions(1), epsilon=epsilon)
    before = copy.deepcopy(edits.state_dict())
    x, z, y = images(8)
    adam = torch.optim.Adam(f.parameters(), lr=0.01, eps=0.0)
    for _ in range(steps):
        adam.zero_grad()
        natra_loss(f(x), f(edits.worst(f, x, z, y)), y, weight=weight).backward()
        adam.step()
    assert all(torch.equal(t, before[name]) for name, t in edits.state_dict().items())
    assert not any(p.requires_grad for p in edits.parameters())
    return torch.cat([p.detach().flatten() for p in f.parameters()])


def test_without_a_radius_it_is_plain_training_and_the_generator_stays():
    torch.testing.assert_close(trained(0.0, 1.0), trained(0.0, 0.0), rtol=1e-6, atol=1e-8)  # Adam knows no factor
    assert (trained(3.0, 1.0) - trained(0.0, 1.0)).abs().max() > 1e-3


def test_a_classifier_that_ignores_the_direction_gets_the_clean_gradient():
    """Exercise 3: the inner maximum is attained everywhere."""
    G = nn.Linear(D, PIXELS).double()
    V = torch.eye(D, dtype=torch.float64)[:, :1]
    moved = G.weight.detach()[:, 0]
    f = nn.Linear(PIXELS, CLASSES).double()
    with torch.no_grad():
        f.weight -= torch.outer(f.weight @ moved, moved) / moved.square().sum()
    x, z, y = images(5)
    x = 0.4 + 0.2 * x
    edited = NaturalEdits(G, V, epsilon=0.01).worst(f, x, z, y)
    close(f(edited), f(x), atol=1e-9)


def test_inverse_codes_are_the_encoders_refined_and_shifted():
    G, E = generator(), network(PIXELS, 8, D, seed=5, last=nn.Identity)
    x = images(6)[0]
    close(inverse_codes(G, E, x, steps=0), E(x).detach())
    found = invert(G, x, E(x).detach(), steps=10, encoder=E).z
    close(inverse_codes(G, E, x, steps=10), found)
    half = inverse_codes(G, E, x, steps=10, truncation=0.5)
    close(half, found.mean(0) + 0.5 * (found - found.mean(0)))


# --- use --------------------------------------------------------------------------------------------------------------


def test_draws_decide_and_repeat():
    edits = NaturalEdits(generator(), directions(2), epsilon=2.0)
    x, z, y = images(6)
    f = classifier()
    for make in (partial(edits.random, x, z), partial(edits.worst, f, x, z, y)):
        one, two = (make(draws=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(one, two) and not one.requires_grad
        assert not torch.equal(one, make(draws=torch.Generator().manual_seed(4)))


def test_the_plain_edit_shows_the_generators_picture():
    x, z, _ = images(4)
    edits = NaturalEdits(generator(), directions(1), epsilon=0.0, residual=False)
    close(edits.random(x, z), edits.generator(z))


def test_state_dict_copies_and_stays_in_eval_mode():
    edits = NaturalEdits(nn.Sequential(generator(), nn.Dropout(0.5)), directions(2), epsilon=1.0).train()
    assert not any(module.training for module in edits.modules())
    other = NaturalEdits(nn.Sequential(generator(9), nn.Dropout(0.5)), directions(2, 5), epsilon=1.0)
    other.load_state_dict(edits.state_dict())
    x, z, _ = images(3)
    alpha = randoms(3, 2)
    assert torch.equal(other(x, z, alpha), edits(x, z, alpha))
    assert torch.equal(copy.deepcopy(edits)(x, z, alpha), edits(x, z, alpha))


def test_inside_inference_mode_and_without_gradients():
    edits, f = NaturalEdits(generator(), directions(1), epsilon=1.0), classifier()
    x, z, y = images(3)
    wanted = edits.worst(f, x, z, y)
    with torch.no_grad():
        assert torch.equal(edits.worst(f, x, z, y), wanted)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda e, f, x, z, y: e(x, z, torch.zeros(3, 2).double()), ValueError, "z, V, amplitudes: got shapes"),
        (lambda e, f, x, z, y: e(x[:, :5], z, torch.zeros(3, 1).double()), ValueError, "x: got shape"),
        (lambda e, f, x, z, y: e.worst(f, x, z, y + 5), ValueError, "y: got labels"),
        (lambda e, f, x, z, y: e.worst(f, x, z, y[:2]), ValueError, "y: got shape"),
        (lambda e, f, x, z, y: e.worst(f, x, z, y, steps=0), ValueError, "steps"),
        (lambda e, f, x, z, y: e.worst(f, x * torch.nan, z, y), ValueError, "logits: got NaN"),
        (lambda e, f, x, z, y: worst_amplitudes(f, e, y, z[0], epsilon=1.0), ValueError, "start"),
        (lambda e, f, x, z, y: NaturalEdits(e.generator, e.V, epsilon=-1.0), ValueError, "epsilon"),
        (lambda e, f, x, z, y: NaturalEdits(e.generator, e.V[0], epsilon=1.0), ValueError, "V"),
        (lambda e, f, x, z, y: NaturalEdits(None, e.V, epsilon=1.0), TypeError, "generator: got NoneType"),
        (lambda e, f, x, z, y: natra_loss(f(x), f(x)[:2], y), ValueError, "clean, edited, y"),
        (lambda e, f, x, z, y: natra_loss(f(x), f(x), y, weight=-1.0), ValueError, "weight"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(NaturalEdits(generator(), directions(1), epsilon=1.0), classifier(), *images(3))
