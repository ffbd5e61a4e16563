"""PGD and APGD: results in ball and box, worse than clean, equal to slow loops, as strong as foolbox."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.core.io import load_tensors, save_tensors
from lowrank_ref.core.modes import eval_mode
from lowrank_ref.robustness.attack_losses import cross_entropy, dlr, targeted_dlr
from lowrank_ref.robustness.attacks import apgd, halving_checkpoints, pgd, random_start
from lowrank_ref.robustness.projections import NORMS, ascent, project

RADIUS = {math.inf: 0.1, 2: 0.5, 1: 1.5}
each_norm = pytest.mark.parametrize("norm", NORMS)
each_attack = pytest.mark.parametrize("attack", [pgd, apgd])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(dtype=torch.float64, inputs=12):
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(3), dtype=torch.float64))
    return model


def images(n=20, shape=(12,), dtype=torch.float64, seed=0):
    x = torch.rand(n, *shape, generator=seeded(seed), dtype=torch.float64).to(dtype)
    x[: n // 4] = x[: n // 4].round()  # some saturated
    return x, torch.randint(5, (n,), generator=seeded(seed + 1))


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
@each_norm
@each_attack
def test_results_lie_in_ball_and_box_and_are_worse_than_clean(attack, norm, n, d, steps, seed):
    x, y = images(n, (d,), seed=seed)
    model = network(inputs=d)
    found = attack(model, x, y, norm=norm, epsilon=RADIUS[norm], steps=steps)
    for u in (found.x_best, found.x_adv):
        assert bool((u >= 0).all() and (u <= 1).all())
        assert bool(((u - x).norm(p=norm, dim=1) <= RADIUS[norm] * (1 + 1e-5)).all())
    with torch.no_grad():
        torch.testing.assert_close(found.loss, cross_entropy(model(found.x_best), y))
        assert bool((found.loss >= cross_entropy(model(x), y)).all())


@pytest.mark.parametrize("loss", [cross_entropy, dlr, targeted_dlr])
@each_norm
@each_attack
def test_an_attack_works_in_every_norm_with_every_loss(attack, norm, loss):
    """Samples that are right become wrong, and x_adv is wrong where any point seen was."""
    x, _ = images(60)
    model = network()
    y = model(x).argmax(1)
    found = attack(model, x, y, norm=norm, epsilon=RADIUS[norm], steps=20, loss=loss)
    wrong = (model(found.x_adv).argmax(1) != y).double().mean()
    assert wrong > 0.5
    assert wrong >= (model(found.x_best).argmax(1) != y).double().mean()


@each_attack
@each_norm
def test_radius_zero_returns_the_images(attack, norm):
    x, y = images()
    assert torch.equal(attack(network(), x, y, norm=norm, epsilon=0.0, steps=3).x_best, x)


@pytest.mark.parametrize("norm, longest", [(math.inf, 9), (2, 9), (1, 49)])
def test_more_steps_are_never_worse_while_the_plan_is_the_same(norm, longest):
    """Up to here both plans look after every step, so that a longer run begins with the shorter one."""
    x, y = images()
    counts = [n for n in (1, 2, 3, 5, 9, 20, 49) if n <= longest]
    losses = [apgd(network(), x, y, norm=norm, epsilon=RADIUS[norm], steps=n).loss for n in counts]
    assert all(bool((b >= a).all()) for a, b in zip(losses, losses[1:]))
    assert bool((losses[-1] > losses[0]).any())


@each_norm
@each_attack
def test_samples_do_not_see_each_other(attack, norm):
    x, y = images()
    kwargs = {"norm": norm, "epsilon": RADIUS[norm], "steps": 12}
    whole = attack(network(), x, y, **kwargs)
    for rows in (slice(3, 4), slice(0, 7)):
        torch.testing.assert_close(attack(network(), x[rows], y[rows], **kwargs).x_best, whole.x_best[rows])
    order = torch.randperm(len(x), generator=seeded())
    torch.testing.assert_close(attack(network(), x[order], y[order], **kwargs).x_best, whole.x_best[order])


@each_norm
@each_attack
def test_pictures_of_any_shape(attack, norm):
    x, y = images(shape=(3, 2, 2))
    kwargs = {"norm": norm, "epsilon": RADIUS[norm], "steps": 6}
    flat = attack(network(), x.flatten(1), y, **kwargs).x_best
    torch.testing.assert_close(attack(network(), x, y, **kwargs).x_best.flatten(1), flat)


def test_on_a_linear_classifier_of_two_classes_the_optimum_is_reached():
    """There the worst point is known: maximise <g, δ> over ball ∩ box, one sorted fill per norm."""
    model = nn.Linear(8, 2).double()
    x = torch.rand(30, 8, generator=seeded(), dtype=torch.float64)
    y = torch.randint(2, (30,), generator=seeded(1))
    w = model.weight.detach()[1 - y] - model.weight.detach()[y]
    room = torch.where(w > 0, 1 - x, x)
    order = w.abs().argsort(1, descending=True)
    for norm, epsilon, gap in (
        (math.inf, 0.1, 1e-9),
        (1, 0.7, 5e-3),
    ):  # l1 steps never fall below a tenth of the radius
        best = torch.zeros(30, dtype=torch.float64)
        for i in range(30):
            left = epsilon
            for j in order[i].tolist():
                take = min(epsilon, float(room[i, j])) if norm == math.inf else min(left, float(room[i, j]))
                left -= take
                best[i] += w[i, j].abs() * take
        found = apgd(model, x, y, norm=norm, epsilon=epsilon, steps=100).x_best
        torch.testing.assert_close((w * (found - x)).sum(1), best, rtol=0, atol=gap)


# --- against slow loops -----------------------------------------------------------------------------------------------


def gradient(model, u, y):
    u = u.clone().requires_grad_()
    value = cross_entropy(model(u), y)
    return value.detach(), torch.autograd.grad(value.sum(), u)[0], model(u).argmax(1) != y


@each_norm
def test_pgd_equals_a_loop(norm):
    x, y = images(6)
    model, N, epsilon = network(), 7, RADIUS[norm]
    found = pgd(model, x, y, norm=norm, epsilon=epsilon, steps=N, sparsity=0.2)
    for i in range(6):
        u, label = x[i : i + 1], y[i : i + 1]
        points = [u]
        for k in range(N):
            u = u + epsilon * (N - k) / N * ascent(gradient(model, u, label)[1], u, norm=norm, sparsity=0.2)
            u = project(u, x[i : i + 1], norm=norm, epsilon=epsilon)
            points.append(u)
        looks = [gradient(model, u, label) for u in points]
        losses = [value.item() for value, _, _ in looks]
        torch.testing.assert_close(found.x_best[i], points[losses.index(max(losses))][0])
        fooled = [p for p, (_, _, wrong) in zip(points, looks) if wrong]
        torch.testing.assert_close(found.x_adv[i], (fooled or [found.x_best[i : i + 1]])[-1][0])


def slow_apgd(model, x, y, norm, epsilon, N):
    """One sample, one iteration after the other, as the two papers write it."""
    d = x.numel()
    value, G, _ = gradient(model, x, y)
    u = old = best = x
    losses, top, G_best = [value.item()], value.item(), G
    eta, k, since, halved, top_before = 2.0, max(int(0.22 * N), 1), 0, False, top
    share, length, support = 0.05, 1.0, d
    for i in range(1, N + 1):
        if norm == 1:
            step, moved = length * epsilon, ascent(G, u, norm=1, sparsity=share)
        else:
            step, moved = eta * epsilon, ascent(G, u, norm=norm)
        z = project(u + step * moved, x, norm=norm, epsilon=epsilon)
        if norm != 1 and i > 1:
            z = project(u + 0.75 * (z - u) + 0.25 * (u - old), x, norm=norm, epsilon=epsilon)
        old, u = u, z
        value, G, _ = gradient(model, u, y)
        losses.append(value.item())
        if value.item() > top:
            top, best, G_best = value.item(), u, G
        since += 1
        if norm == 1 and i % max(int(0.04 * N), 1) == 0:
            now = int((best != x).sum())
            if now < 0.95 * support:
                length, u, G = 1.0, best, G_best
            else:
                length = max(length / 1.5, 0.1)
            support, share = now, now / d / 1.5
        elif norm != 1 and since == k:
            rises = sum(b > a for a, b in zip(losses[-k - 1 : -1], losses[-k:]))
            halved = rises < 0.75 * k or (not halved and top == top_before)
            if halved:
                eta, u, G = eta / 2, best, G_best
            top_before, since, k = top, 0, max(k - max(int(0.03 * N), 1), max(int(0.06 * N), 1))
    return best


@each_norm
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_apgd_equals_a_loop_over_samples(norm, steps):
    x, y = images(8)
    model = network()
    found = apgd(model, x, y, norm=norm, epsilon=RADIUS[norm], steps=steps).x_best
    slow = [slow_apgd(model, x[i : i + 1], y[i : i + 1], norm, RADIUS[norm], steps) for i in range(8)]
    torch.testing.assert_close(found, torch.cat(slow))


def test_checkpoints_come_ever_closer():
    assert halving_checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert halving_checkpoints(5) == [1, 2, 3, 4, 5]


# --- against foolbox --------------------------------------------------------------------------------------------------


def test_one_step_equals_foolbox():
    """One fast gradient step in l∞ and l2; ours keeps the better of x and the step, so the model is linear."""
    foolbox = pytest.importorskip("foolbox")
    model = nn.Linear(12, 2)
    x, y = images(dtype=torch.float32)
    y = y % 2
    theirs = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    for norm, make in ((math.inf, foolbox.attacks.LinfFastGradientAttack), (2, foolbox.attacks.L2FastGradientAttack)):
        wanted, _, _ = make()(theirs, x, y, epsilons=RADIUS[norm])
        found = pgd(model, x, y, norm=norm, epsilon=RADIUS[norm], steps=1)
        torch.testing.assert_close(found.x_best, wanted, rtol=0, atol=1e-6)


def test_as_strong_as_foolbox():
    """Both attack the same network; ours may lose at most one sample of 100 more than it wins."""
    foolbox = pytest.importorskip("foolbox")
    model = network(torch.float32)
    x = images(100, dtype=torch.float32)[0]
    y = model(x).argmax(1)
    theirs = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    attacks = {
        math.inf: foolbox.attacks.LinfProjectedGradientDescentAttack(steps=50, random_start=False),
        2: foolbox.attacks.L2ProjectedGradientDescentAttack(steps=50, random_start=False),
        1: foolbox.attacks.SparseL1DescentAttack(steps=50),
    }
    for norm, attack in attacks.items():
        epsilon = RADIUS[norm] / 3
        _, _, fooled = attack(theirs, x, y, epsilons=epsilon)
        ours = apgd(model, x, y, norm=norm, epsilon=epsilon, steps=50, sparsity=0.2).x_adv
        count = (model(ours).argmax(1) != y).sum()
        assert 0 < fooled.sum() < 100 and count >= fooled.sum() - 1, (norm, count, fooled.sum())


# --- the model and the random numbers are left alone ------------------------------------------------------------------


@each_attack
def test_modes_gradients_and_weights_are_as_before(attack):
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5)).double()
    model[1].eval()  # a frozen batch norm in a training model
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    x, y = images()
    state = torch.get_rng_state()
    with torch.no_grad():  # as inside an evaluation
        attack(model, x, y, norm=2, epsilon=0.3, steps=3)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not x.requires_grad


@each_norm
@each_attack
def test_images_that_require_gradients_stay_out_of_the_graph(attack, norm):
    x, y = images()
    kwargs = {"norm": norm, "epsilon": RADIUS[norm], "steps": 3}
    wanted = attack(network(), x, y, **kwargs)
    tracked = x.clone().requires_grad_()
    start = random_start(tracked, norm=norm, epsilon=0.1, generator=seeded())
    found = [attack(network(), tracked, y, **kwargs, start=s) for s in (None, (start + 0 * tracked))]
    assert not start.requires_grad and tracked.grad is None
    assert all(not t.requires_grad for each in found for t in each)
    assert torch.equal(found[0].x_best, wanted.x_best)
    for target in (found[0].loss, found[0].x_adv):
        with pytest.raises(RuntimeError, match="does not require grad"):
            target.sum().backward()


@each_norm
@each_attack
def test_inside_inference_mode(attack, norm):
    x, y = images()
    kwargs = {"norm": norm, "epsilon": RADIUS[norm], "steps": 3}
    wanted, model = attack(network(), x, y, **kwargs), network()
    with torch.inference_mode():
        start = random_start(x + 0, norm=norm, epsilon=0.0)
        found = attack(model, x + 0, y + 0, **kwargs, start=start)
    assert torch.equal(found.x_best, wanted.x_best) and not found.x_best.is_inference()
    assert all(p.grad is None for p in model.parameters())


class Root(nn.Module):
    """Logits from the root of the mean square: its gradient at a black image is no number."""

    def forward(self, x):
        r = x.square().mean(1, keepdim=True).sqrt()
        return torch.cat([r - 0.3, 0.3 - r, 0 * r, 0 * r], 1)


@each_norm
@each_attack
def test_an_image_whose_gradient_is_no_number_does_not_pass_for_robust(attack, norm):
    x = torch.rand(4, 6, generator=seeded(), dtype=torch.float64) / 4
    x[2] = 0
    y = torch.ones(4, dtype=torch.int64)
    kwargs = {"norm": norm, "epsilon": 3.0, "steps": 8}
    with pytest.raises(ValueError, match=r"gradient: got NaN or infinity for 1 of 4 images.*start="):
        attack(Root(), x, y, **kwargs)
    start = random_start(x, norm=norm, epsilon=0.5, generator=seeded())
    found = attack(Root(), x, y, **kwargs, start=start)
    assert bool((Root()(found.x_adv).argmax(1) != y).all())


@each_norm
@each_attack
def test_what_a_model_or_loss_does_not_know_is_named(attack, norm):
    x, y = images()
    kwargs = {"norm": norm, "epsilon": 0.1, "steps": 2}
    broken = network()
    with torch.no_grad():
        broken[3].bias[0] = torch.nan
    with pytest.raises(ValueError, match="logits: got NaN or infinity for 20 of 20 images"):
        attack(broken, x, y, **kwargs)
    with pytest.raises(ValueError, match="loss: got NaN"):
        attack(network(), x, y, **kwargs, loss=lambda z, y: cross_entropy(z, y) * torch.nan)
    with pytest.raises(ValueError, match=r"model: got output of shape \(20,\), wanted \(20, classes\)"):
        attack(nn.Sequential(network(), nn.Linear(5, 1).double(), nn.Flatten(0)), x, y, **kwargs)


@each_attack
@pytest.mark.parametrize("label", [-100, -1, 5, 9])
def test_labels_that_are_no_classes_are_named(attack, label):
    """A label of -100 had the loss 0, and nothing was attacked."""
    x, y = images()
    y[3] = label
    with pytest.raises(ValueError, match="y: got labels from .* wanted 0 to 4"):
        attack(network(), x, y, norm=2, epsilon=0.1, steps=2)
    with pytest.raises(ValueError, match="y: got labels from"):  # also with a loss that does not look
        attack(network(), x, y, norm=2, epsilon=0.1, steps=2, loss=lambda z, y: z.square().sum(1))
    for dtype in (torch.float32, torch.int32, torch.bool):
        with pytest.raises(TypeError):
            attack(network(), x, y.to(dtype), norm=2, epsilon=0.1, steps=2)


def test_eval_mode_is_left_also_by_an_error():
    model = nn.Dropout()
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not model.training
        raise RuntimeError
    assert model.training


@each_norm
def test_random_starts_lie_inside_and_come_from_the_generator(norm):
    x, y = images()
    state = torch.get_rng_state()
    first, same, other = (random_start(x, norm=norm, epsilon=0.3, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other) and torch.equal(torch.get_rng_state(), state)
    assert bool(((first - x).norm(p=norm, dim=1) <= 0.3 * (1 + 1e-9)).all())
    assert bool((first >= 0).all() and (first <= 1).all())
    assert (first - x).abs().max() > 0.01
    found = apgd(network(), x, y, norm=norm, epsilon=0.3, steps=3, start=first)
    at_start = cross_entropy(network()(first), y)
    assert bool((found.loss >= at_start.detach()).all())
    outside = apgd(network(), x, y, norm=norm, epsilon=0.3, steps=3, start=x + 5).x_best  # projected first
    assert bool(((outside - x).norm(p=norm, dim=1) <= 0.3 * (1 + 1e-9)).all())


@each_attack
@each_norm
def test_half_precision_models_under_autocast_stay_finite(attack, norm):
    x, y = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attack(network(torch.float32), x, y, norm=norm, epsilon=RADIUS[norm], steps=5)
    assert found.x_best.dtype == found.loss.dtype == torch.float32
    assert bool(torch.isfinite(found.loss).all())
    assert bool(((found.x_best - x).norm(p=norm, dim=1) <= RADIUS[norm] * (1 + 1e-5)).all())


def test_what_was_found_can_be_saved(tmp_path):
    x, y = images()
    found = apgd(network(), x, y, norm=1, epsilon=1.0, steps=3)
    save_tensors(found._asdict(), tmp_path / "x", kind="attacked")
    again = load_tensors(tmp_path / "x", kind="attacked")
    assert all(torch.equal(again[key], value) for key, value in found._asdict().items())


@each_attack
def test_bad_input_is_named(attack):
    x, y = images()
    good = {"norm": 2, "epsilon": 0.1, "steps": 2}
    cases = [
        (x, y, {"epsilon": -0.1}, "epsilon: got -0.1"),
        (x, y, {"norm": 3}, "norm: got 3"),
        (x, y, {"steps": 0}, "steps: got 0"),
        (x, y, {"norm": 1, "sparsity": 0.0}, "sparsity: got 0.0"),
        (x, y, {"sparsity": 1.5}, "sparsity: got 1.5"),
        (x + 0.5, y, {}, "x: got values from"),
        (x - 0.5, y, {}, "x: got values from"),
        (x * torch.nan, y, {}, "x: got"),
        (x[:0], y[:0], {}, "x: got shape"),
        (x, y[1:], {}, "y: got shape"),
    ]
    for images_, labels, change, message in cases:
        with pytest.raises(ValueError, match=message):
            attack(network(), images_, labels, **{**good, **change})
    with pytest.raises(TypeError):
        attack(network(), x.long(), y, **good)
    with pytest.raises(TypeError):
        attack(network(), x, y, **{**good, "steps": 2.5})
