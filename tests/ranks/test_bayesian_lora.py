"""Bayesian-LoRA: gates and penalties against loops, the layer and its invariants in float64, bad input."""

import itertools
import math

import pytest
import torch
from battery import gaussian, seeded, shapes
from bit_cases import ONE, assert_close, by_hand, float64, layer_of, set_logits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.ranks.bayesian_lora import (
    BayesianLoRALinear,
    bernoulli_kl,
    chain_kl,
    chain_penalty,
    deterministic_gates,
    hard_concrete,
    nested_gates,
    open_probability,
)
from lowrank_ref.ranks.bit_gates import (
    GateSampler,
)
from lowrank_ref.ranks.residual_bits import residual_quantize

# Gates.


def test_probabilities_are_met_by_drawn_gates():
    for phi, shut, whole in ((0.0, 0.1682, 0.1682), (2.0, 0.02663, 0.59902)):
        u = torch.rand(400_000, generator=seeded(), dtype=torch.float64)
        z = hard_concrete(torch.full_like(u, phi), torch.logit(u))
        assert (z == 0).double().mean() == pytest.approx(shut, abs=0.002)
        assert (z == 1).double().mean() == pytest.approx(whole, abs=0.003)
        assert float(open_probability(float64(phi))) == pytest.approx(1 - shut, abs=5e-5)
    got = open_probability(float64(6, 2, 0, -2))
    assert_close(got, float64(0.99950, 0.97337, 0.83182, 0.40098), 5e-6)


def test_hard_concrete_by_hand():
    for phi, u in itertools.product((-3.0, -0.4, 0.0, 1.2, 5.0), (1e-6, 0.2, 0.5, 0.9)):
        h = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + phi) * 1.5))
        wanted = min(1.0, max(0.0, h * 1.2 - 0.1))
        assert float(hard_concrete(float64(phi), torch.logit(float64(u)))) == pytest.approx(wanted, abs=1e-12)
    u = torch.rand(2000, generator=seeded(), dtype=torch.float64)
    means = [hard_concrete(torch.full_like(u, phi), torch.logit(u)).mean() for phi in (-4, -2, 0, 1, 3)]
    assert means == sorted(means)


def test_deterministic_gates_have_their_threshold():
    edge = -2 / 3 * math.log(11) - math.log(0.34 / 0.66)
    assert edge == pytest.approx(-0.9353, abs=5e-5)
    assert deterministic_gates(float64(edge - 1e-9, edge + 1e-9, -50, 50)).tolist() == [0, 1, 0, 1]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_nested_gates_never_rise(values):
    c = nested_gates(torch.tensor(values, dtype=torch.float64))
    product, wanted = 1.0, [1.0]
    for v in values:
        product *= v
        wanted.append(float(round(product)))
    assert c.tolist() == wanted and all(a >= b for a, b in itertools.pairwise(wanted))


def test_nested_gates_have_the_gradient_of_the_product():
    z, g = float64(0.9, 0.7, 0.4).requires_grad_(), float64(1.0, 2.0, -1.0, 0.5)
    nested_gates(z).backward(g)
    product = float64(0.9, 0.7, 0.4).requires_grad_()
    (torch.cat([torch.ones(1).double(), product.cumprod(0)]) * g).sum().backward()
    assert_close(z.grad, product.grad)


# Penalties.


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4), st.floats(0.01, 4))
def test_the_divergence_of_a_chain_is_that_of_all_its_states(values, penalty):
    """A chain of k gates has k + 1 states; behind a shut gate both are shut."""
    p, total = math.exp(-penalty), 0.0
    for length in range(len(values) + 1):
        q_state = p_state = 1.0
        for v in values[:length]:
            q_state, p_state = q_state * v, p_state * p
        if length < len(values):
            q_state, p_state = q_state * (1 - values[length]), p_state * (1 - p)
        total += q_state * math.log(q_state / p_state)
    assert float(chain_kl(float64(*values), penalty)) == pytest.approx(total, abs=1e-9)


@given(st.floats(0, 1), st.floats(0.01, 5))
def test_the_divergence_of_a_gate(q, penalty):
    p = math.exp(-penalty)
    wanted = sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)
    got = float(bernoulli_kl(float64(q), penalty)[0])
    assert got == pytest.approx(wanted, abs=1e-9) and got >= -1e-12


def test_dropping_entropy_and_last_term_leaves_the_penalty():
    """For large λ what is dropped stays below log 2 a gate; for λ < 1 it is as large as what is kept."""
    q = open_probability(float64(0.0, -1.0, -2.0, -1.5))
    kept = lambda penalty: penalty * float(chain_penalty(q, torch.ones(5).double()) - 1)  # noqa: E731
    assert abs(float(chain_kl(q, 20.0)) - kept(20.0)) < 4 * math.log(2)
    assert abs(float(chain_kl(q, 0.1)) - kept(0.1)) > 3 * kept(0.1)


def test_penalties_of_open_gates_and_of_logits_at_zero():
    ones, levels = torch.ones(5).double(), float64(2, 4, 8, 16, 32)
    assert chain_penalty(torch.ones(4).double(), ones) == 5 and chain_penalty(torch.ones(4).double(), levels) == 62
    assert float(chain_penalty(open_probability(torch.zeros(4).double()), ones)) == pytest.approx(3.578, abs=5e-4)


def test_the_derivative_of_the_penalty():
    phi, weights = float64(1.0, -0.5, 0.3, 2.0).requires_grad_(), float64(2, 4, 8, 16, 32)
    q = open_probability(phi)
    chain_penalty(q, weights).backward()
    products = q.detach().cumprod(0)
    for b in range(4):
        wanted = (weights[1:] * products)[b:].sum() * (1 - q[b])
        assert_close(phi.grad[b], wanted.detach())


# The layer.


@given(shapes(), st.integers(0, 255), st.sampled_from([4, 8, 16]))
def test_delta_weight_by_a_loop(shape, mask, bits):
    m, n, r = shape
    layer = layer_of(m, n, r, bits=bits, alpha=3).eval()
    opened = [bool(mask >> k & 1) for k in range(r - 1)]
    set_logits(layer, [3.0 if o else -3.0 for o in opened])
    rank = next((k for k, o in enumerate(opened, 1) if not o), r)
    assert layer.learned_rank == rank
    beta = [float(t.detach().abs().max()) for t in (layer.A, layer.B, layer.E)]
    gates = [1.0] * (bits.bit_length() - 2)
    A, B, E = (
        [by_hand(v, b, gates) for v in t.detach().flatten().tolist()] for t, b in zip((layer.A, layer.B, layer.E), beta)
    )
    wanted = torch.zeros(m, n, dtype=torch.float64)
    for i, j, k in itertools.product(range(m), range(n), range(rank)):
        wanted[i, j] += 3 / r * B[i * r + k] * E[k] * A[k * n + j]
    assert_close(layer.delta_weight(), wanted, 1e-10)
    x = gaussian(3, n, seed=3)
    assert_close(layer(x), layer.base(x) + x @ wanted.T, 1e-9)


def test_starts():
    layer = layer_of(200, 300, 100, moved=False)
    assert not layer.delta_weight().any()
    for p, std in ((layer.A, 300**-0.5), (layer.B, 200**-0.5)):
        assert float(p.detach().std()) == pytest.approx(std, rel=0.05)
    layer = layer_of(200, 300, 100, moved=False, start="released")
    assert layer.delta_weight().any()
    for p, std in ((layer.A, 0.02), (layer.B, 0.02), (layer.E, 1.0)):
        assert float(p.detach().std()) == pytest.approx(std, rel=0.2) and abs(float(p.detach().mean())) < 0.3 * std
    assert (layer.rank_logits == 6).all() and layer.bit_logits.shape == (3, 3)


def test_all_gates_open_is_svd_form_lora_up_to_rounding():
    layer, x = layer_of(bits=32, gate=20.0).eval(), gaussian(4, 5)
    wanted = layer.base(x) + x @ (layer.scale * layer.B * layer.E @ layer.A).T
    assert_close(layer(x), wanted, 1e-6)
    GateSampler(layer, generator=seeded())
    assert_close(layer.train()(x), wanted, 1e-6)  # at φ = 20 nothing is random
    single = BayesianLoRALinear(nn.Linear(5, 6), 4, bits=32, gate=20.0, start="released", generator=seeded())
    x, wanted = x.float(), single.scale * single.B * single.E @ single.A
    assert_close(single(x), single.base(x) + x @ wanted.T, 1e-6)


def test_a_shut_component_gives_no_gradient_to_its_entry():
    layer = set_logits(layer_of(), (3.0, -3.0, 3.0))
    layer(gaussian(7, 5)).square().sum().backward()
    assert layer.E.grad[:2].all() and not layer.E.grad[2:].any()
    assert not layer.A.grad[2:].any() and not layer.B.grad[:, 2:].any() and layer.A.grad[:2].any()


def test_drawn_gates_act_in_training_mode_only():
    layer, x = layer_of(gate=0.0), gaussian(4, 5)
    before = layer(x)
    assert torch.equal(layer.eval()(x), before)
    sampler = GateSampler(layer.train(), generator=seeded(3))
    drawn = layer(x)
    assert not torch.equal(drawn, before) and torch.equal(layer(x), drawn)
    assert torch.equal(layer.eval()(x), before)
    sampler.step()
    assert not torch.equal(layer.train()(x), drawn)
    z = hard_concrete(layer.bit_logits, layer.bit_noise)[0]
    assert_close(layer.quantized()[0], residual_quantize(layer.A, layer.A.detach().abs().max(), z), 0)


def test_a_fixed_range_stays():
    layer = layer_of(bits=4).eval()
    layer.limits.copy_(float64(2.0, 0.0, 0.0))
    A, _, _ = layer.quantized()
    step = 4 / 15
    assert_close(A, (layer.A / step).round() * step)
    assert_close(layer.ranges(), torch.stack([2 * ONE, layer.B.abs().max(), layer.E.abs().max()]), 0)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"rank": 6}, ValueError, "rank: got 6, wanted 1 <= rank <= 5"),
        ({"rank": 2.0}, TypeError, "rank|Float"),
        ({"bits": 3}, ValueError, "bits: got 3, wanted 4, 8, 16 or 32"),
        ({"bits": 2}, ValueError, "bits: got 2"),
        ({"bits": 8.0}, TypeError, "bits"),
        ({"bits": True}, TypeError, "bits"),
        ({"gate": math.nan}, ValueError, "gate: got nan"),
        ({"gate": "6"}, TypeError, "gate"),
        ({"start": "zero"}, ValueError, "start: got 'zero', wanted 'base' or 'released'"),
        ({"alpha": 0}, ValueError, "alpha: got 0"),
        ({"dropout": 1.0}, ValueError, "dropout"),
    ],
)
def test_bad_options_raise_and_leave_the_base_trainable(options, error, message):
    base = nn.Linear(5, 6)
    with pytest.raises(error, match=message):
        BayesianLoRALinear(base, **{"rank": 2, **options})
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "base", [nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Linear(4, 4, dtype=torch.complex64), nn.Embedding(3, 3)]
)
def test_bad_bases_raise(base):
    with pytest.raises(TypeError, match="base"):
        BayesianLoRALinear(base, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_merged(value):
    layer = layer_of()
    with torch.no_grad():
        layer.B[0, 0] = value
    with pytest.raises(ValueError, match="NaN|finite|infin"):
        layer.merged()


def test_an_empty_batch_and_a_wrong_width(no_shape_checks):
    layer = layer_of()
    assert layer(torch.zeros(0, 5, dtype=torch.float64)).shape == (0, 6)
    with pytest.raises((RuntimeError, ValueError)):
        layer(gaussian(3, 4))
