"""Union accuracy from its definition, and the hull of two balls against random directions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.robustness.attacks import apgd, pgd
from lowrank_ref.robustness.threats import accuracies, hull_radius, is_free, right, survivors, union_accuracy


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 1000))
def test_union_accuracy_counts_samples_that_survive_everything(attacks, samples, seed):
    correct = torch.rand(attacks, samples, generator=seeded(seed)) < 0.7
    count = sum(all(correct[a, i] for a in range(attacks)) for i in range(samples))
    union = union_accuracy(correct)
    assert union == pytest.approx(count / samples)
    assert union <= correct.double().mean(1).min() + 1e-12
    assert union_accuracy(correct.flip(0)) == union
    assert union_accuracy(correct[:1]) == pytest.approx(correct[0].double().mean().item())


def test_union_may_fall_while_each_accuracy_rises():
    def correct(*groups):
        return torch.tensor([[i in group for i in range(6)] for group in groups])

    before, after = correct({0, 1}, {0, 1}), correct({0, 2, 3}, {1, 4, 5})
    assert bool((after.sum(1) > before.sum(1)).all())
    assert union_accuracy(after) == 0 < union_accuracy(before)


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="correct: got shape"):
        union_accuracy(torch.ones(2, 0, dtype=torch.bool))


def test_one_list_of_truth_values_is_no_table(no_shape_checks):
    """The union of one model with two of three samples right was 0."""
    with pytest.raises(ValueError, match=r"correct: got shape \(3,\), wanted \(attacks, samples\)"):
        union_accuracy(torch.tensor([True, True, False]))
    with pytest.raises(TypeError, match="correct: got dtype"):
        union_accuracy(torch.ones(2, 3))


def network():
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(3), dtype=torch.float64))
    return model


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_survivors_are_those_whom_no_attack_fools(attack):
    model = network()
    x = torch.rand(80, 10, generator=seeded(), dtype=torch.float64)
    y = model.eval()(x).argmax(1)
    y[:5] = (y[:5] + 1) % 4  # wrong from the start
    model.train()
    alive = survivors(model, x, y, {math.inf: 0.03, 2: 0.1, 1: 0.2}, steps=10, attack=attack)
    assert model.training and set(alive) == {"clean", math.inf, 2, 1}
    assert alive["clean"].tolist() == [False] * 5 + [True] * 75
    for norm in (math.inf, 2, 1):
        assert not (alive[norm] & ~alive["clean"]).any() and 5 < alive[norm].sum() < 75
    shares = accuracies(alive)
    assert list(shares) == ["clean", "linf", "l2", "l1", "union"]
    assert shares["union"] <= min(shares.values()) and shares["linf"] == alive[math.inf].double().mean().item()
    more = survivors(model, x, y, {math.inf: 0.06}, steps=10, attack=attack)[math.inf]
    assert more.sum() < alive[math.inf].sum()
    assert torch.equal(right(model, x, y), alive["clean"]) and model.training


def test_nobody_survives_by_nan_or_a_label_that_is_no_class():
    x, y, broken = torch.rand(3, 10).double(), torch.tensor([0, 1, 2]), network()
    with torch.no_grad():
        broken[3].bias[1] = torch.nan  # argmax takes it for the largest
    for call in (lambda: right(broken, x, y), lambda: survivors(broken, x, y, {2: 0.1})):
        with pytest.raises(ValueError, match="logits: got NaN"):
            call()
    for label in (-100, 4):
        bad = y.clone()
        bad[1] = label
        for call in (lambda: right(network(), x, bad), lambda: survivors(network(), x, bad, {2: 0.1})):  # noqa: B023
            with pytest.raises(ValueError, match="y: got labels"):
                call()


def test_survivors_check_their_threat():
    x, y = torch.rand(3, 10).double(), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="epsilon: got -1"):
        survivors(network(), x, y, {2: -1.0})
    with pytest.raises(ValueError, match="x: got values"):
        survivors(network(), x + 1, y, {2: 0.1})


# --- hulls ------------------------------------------------------------------------------------------------------------


def support(w, norm, epsilon):
    """Largest <w, δ> over the ball: ε times the dual norm."""
    return epsilon * w.norm(p={math.inf: 1, 2: 2, 1: math.inf}[norm], dim=-1)


def directions(d):
    """Random directions of every sparsity, and the flat ones, which are the extreme ones."""
    w = torch.randn(400, d, generator=seeded(), dtype=torch.float64)
    w = w * (torch.rand(400, d, generator=seeded(1)) < torch.rand(400, 1, generator=seeded(2)))
    flat = torch.ones(d, d, dtype=torch.float64).tril()
    return torch.cat([w[w.norm(dim=1) > 0], flat])


@given(st.integers(1, 12), st.floats(0.05, 3), st.floats(0.05, 3))
def test_hull_radius_touches_the_hull_and_does_not_leave_it(d, epsilon_1, epsilon_inf):
    """The ball of radius ρ is inside iff its support is below the hull's everywhere; it touches at the worst w."""
    rho = hull_radius(epsilon_1, epsilon_inf, d)
    w = directions(d)
    ratio = min(max(epsilon_1 / epsilon_inf, 1), d)
    k = int(ratio)
    worst = torch.zeros(1, d, dtype=torch.float64)
    worst[0, :k] = 1
    if k < d:
        worst[0, k] = ratio - k
    w = torch.cat([w, worst])
    hull = torch.maximum(support(w, 1, epsilon_1), support(w, math.inf, epsilon_inf))
    slack = hull - support(w, 2, rho)
    assert slack.min() >= -1e-9 and abs(slack[-1]) < 1e-9


def test_hull_radius_of_the_papers_threats():
    assert hull_radius(12, 8 / 255, 3072) == pytest.approx(0.614, abs=5e-4)
    assert hull_radius(255, 4 / 255, 150528) == pytest.approx(2.0, abs=1e-4)
    assert hull_radius(12, 2 / 255, 3072) == pytest.approx(0.307, abs=5e-4)


@given(st.integers(1, 8), st.floats(0.1, 2), st.floats(0.1, 2), st.floats(0.1, 2), st.sampled_from([math.inf, 2, 1]))
def test_a_ball_is_free_iff_its_support_is_below_that_of_the_others(d, e_inf, e_2, e_1, norm):
    threat = {math.inf: e_inf, 2: e_2, 1: e_1}
    w = directions(d)
    ratio = min(max(e_1 / e_inf, 1), d)
    k = int(ratio)
    worst = torch.zeros(1, d, dtype=torch.float64)
    worst[0, :k] = 1
    if k < d:
        worst[0, k] = ratio - k
    w = torch.cat([w, worst])
    hull = torch.stack([support(w, p, e) for p, e in threat.items() if p != norm]).amax(0)
    slack = (hull - support(w, norm, threat[norm])).min().item()
    if abs(slack) > 1e-9:
        assert is_free(norm, threat, d) == (slack > 0)


def test_which_norm_is_free_in_the_paper():
    cifar = {math.inf: 8 / 255, 2: 0.5, 1: 12}
    assert [p for p in cifar if is_free(p, cifar, 3072)] == [2]
    assert [p for p in cifar if is_free(p, {**cifar, math.inf: 2 / 255}, 3072)] == [math.inf]
    assert [p for p in cifar if is_free(p, {**cifar, 2: 1.5}, 3072)] == []


def test_hulls_check_their_input():
    for bad in ((0, 1, 2), (1, -1, 2), (1, 1, 0)):
        with pytest.raises(ValueError, match="epsilon_1|epsilon_inf|d: got"):
            hull_radius(*bad)
    with pytest.raises(ValueError, match="norm, threat"):
        is_free(3, {math.inf: 1, 2: 1, 1: 1}, 3)
    with pytest.raises(ValueError, match="norm, threat"):
        is_free(2, {2: 1, 1: 1}, 3)
