"""Bayesian-LoRA: the quantiser, gates and penalties against loops, the invariants in float64, and what they cost."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
from lowrank_ref.core.groups import optimizer_groups
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.ranks import prune_by_svd
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
    bit_cost,
    bit_operations,
    chain_divergence,
    gated_layers,
    logit_groups,
    operations,
    prune_to_lora,
    stored_bits,
)
from lowrank_ref.ranks.residual_bits import INSIDE, codes_of, residual_quantize, step_sizes

ONE = torch.tensor(1.0, dtype=torch.float64)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def layer_of(m=6, n=5, rank=4, *, dtype=torch.float64, moved=True, **options):
    layer = BayesianLoRALinear(nn.Linear(n, m, dtype=dtype), rank, generator=seeded(), **options)
    if moved:
        with torch.no_grad():
            layer.E.copy_(gaussian(rank, seed=1))
    return layer


def net(rank=3, **options):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return replace_linears(model, "", partial(BayesianLoRALinear, rank=rank, generator=seeded(), **options))


def set_logits(layer, ranks=None, bits=None):
    with torch.no_grad():
        if ranks is not None:
            layer.rank_logits.copy_(float64(*ranks))
        if bits is not None:
            layer.bit_logits.copy_(torch.as_tensor(bits))
    return layer


# The quantiser.


def test_step_sizes_are_those_of_each_grid():
    got = step_sizes(torch.tensor(1.7, dtype=torch.float64), 4)
    assert_close(got, float64(*(2 * 1.7 / (2.0**b - 1) for b in (2, 4, 8, 16, 32))), 1e-16)
    for b, (coarse, fine) in zip((2, 4, 8, 16), itertools.pairwise(got)):
        assert coarse / fine == pytest.approx(2**b + 1, rel=1e-14)
    assert torch.equal(step_sizes(0 * ONE, 2), step_sizes(ONE, 2))  # a tensor of zeros divides by something


def by_hand(x, beta, gates):
    """One number, gate after gate."""
    x = min(max(x, -beta * INSIDE), beta * INSIDE)
    steps = [2 * beta / (2.0**2 ** (k + 1) - 1) for k in range(len(gates) + 1)]
    parts, rest = [], x
    for step in steps:
        parts.append(step * round(rest / step))
        rest -= parts[-1]
    inner = 0.0
    for z, part in list(zip(gates, parts[1:]))[::-1]:
        inner = z * (part + inner)
    return parts[0] + inner


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.floats(0.1, 3), st.lists(st.floats(0, 1), max_size=4))
def test_residual_quantize_by_a_loop(values, beta, gates):
    got = residual_quantize(float64(*values), float64(beta)[0], torch.tensor(gates, dtype=torch.float64))
    assert_close(got, float64(*(by_hand(v, beta, gates) for v in values)), 1e-12)


@pytest.mark.parametrize("opened", [0, 1, 2, 3])
def test_open_gates_round_directly(opened):
    x = gaussian(1000)
    limit, bits = x.abs().max(), 2 ** (opened + 1)
    gates = float64(*([1.0] * opened + [0.0] * (3 - opened)))
    step = step_sizes(limit, 3)[opened]
    got, codes = residual_quantize(x, limit, gates), codes_of(x, limit, step)
    assert_close(got, codes * step, 1e-15 * float(limit) * 4)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    assert ((x - got).abs() <= step / 2 + 1e-7 * limit + 1e-15).all()
    assert_close(residual_quantize(-x, limit, gates), -got, 0)


def test_two_bits_are_three_levels():
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    got = residual_quantize(x, ONE, torch.zeros(3, dtype=torch.float64))
    assert_close(got.unique(), float64(-2 / 3, 0, 2 / 3), 1e-15)


def test_golden_values_of_the_quantiser():
    x, wanted = (
        float64(0.9, -0.37),
        ((0.666667, -0.666667), (0.933333, -0.4), (0.901961, -0.368627), (0.900008, -0.370001)),
    )
    for opened, values in enumerate(wanted):
        assert_close(codes_of(x, ONE, step := step_sizes(ONE, 3)[opened]) * step, float64(*values), 5e-7)


def test_gradients_pass_rounding_and_reach_gates():
    x, z = gaussian(7).requires_grad_(), float64(0.3, 0.8, 0.5).requires_grad_()
    limit = x.detach().abs().max()
    g = gaussian(7, seed=2)
    residual_quantize(x, limit, z).backward(g)
    assert torch.equal(x.grad, g)
    for k in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[k] = 1e-6
        up, down = (residual_quantize(x.detach(), limit, z.detach() + sign * shift) for sign in (1, -1))
        assert_close(z.grad[k], ((up - down) / 2e-6 * g).sum(), 1e-8)


def test_a_tensor_of_zeros_stays_one():
    x = torch.zeros(4, dtype=torch.float64)
    assert torch.equal(residual_quantize(x, x.abs().max(), torch.ones(3, dtype=torch.float64)), x)


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


def test_cost_of_a_model_by_a_loop():
    model = net(rank=3, gate=0.4)
    set_logits(model[0], (1.0, -0.3))
    q = lambda phi: 1 / (1 + math.exp(-(phi + 2 / 3 * math.log(11))))  # noqa: E731
    for weighting, cumulative in itertools.product(("const", "bop"), (True, False)):
        total = 0.0
        for layer, ranks in ((model[0], (1.0, -0.3)), (model[2], (0.4, 0.4))):
            n, m = layer.in_features, layer.out_features
            first, second = q(ranks[0]), q(ranks[1]) * (q(ranks[0]) if cumulative else 1.0)
            for size, share in ((3 * n, 1.0), (3 * m, 1.0), (3, (first + second) / 2)):
                weights = [b * size / 18 if weighting == "bop" else 1.0 for b in (2, 4, 8, 16)]
                total += share * sum(w * q(0.4) ** k for k, w in enumerate(weights))
        assert float(bit_cost(model, weighting=weighting, cumulative=cumulative)) == pytest.approx(total, abs=1e-9)
    two = net(rank=2, gate=-0.7)
    assert torch.equal(bit_cost(two), bit_cost(two, cumulative=False))
    wanted = 2 * sum(
        float(chain_kl(open_probability(torch.full((k,), -0.7, dtype=torch.float64)), 0.5)) for k in (1, 3, 3, 3)
    )
    assert float(chain_divergence(two, 0.5).detach()) == pytest.approx(wanted, abs=1e-9)
    assert math.isfinite(float(bit_cost(net(rank=1))))


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


def test_draws_come_from_the_generator_in_a_stated_order():
    model, twin, other = net(), net(), net()
    for m, seed in ((model, 1), (twin, 1), (other, 2)):
        GateSampler(m, generator=seeded(seed))
    assert torch.equal(model[2].bit_noise, twin[2].bit_noise) and not torch.equal(
        model[2].bit_noise, other[2].bit_noise
    )
    g = seeded(1)
    for layer in (model[0], model[2]):
        for noise in (layer.rank_noise, layer.bit_noise):
            u = torch.rand(noise.shape, generator=g, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
            assert_close(noise, u.log() - (1 - u).log(), 1e-9)
    GateSampler(model, stochastic=False)
    assert not model[0].bit_noise.any() and model[0].sampled
    assert_close(model[0].quantized()[0], residual_quantize(model[0].A, model[0].A.abs().max(), float64(1, 1, 1)), 0)


def test_a_fixed_range_stays():
    layer = layer_of(bits=4).eval()
    layer.limits.copy_(float64(2.0, 0.0, 0.0))
    A, _, _ = layer.quantized()
    step = 4 / 15
    assert_close(A, (layer.A / step).round() * step)
    assert_close(layer.ranges(), torch.stack([2 * ONE, layer.B.abs().max(), layer.E.abs().max()]), 0)


def trained(model, sampler, penalty, steps=150, rate=0.05):
    optimizer = torch.optim.Adam(logit_groups(model, 0.01, ratio=rate / 0.01))
    sampler.attach(optimizer)
    teacher = gaussian(4, 5, seed=50)[:, :1] @ gaussian(1, 5, seed=51)
    for step in range(steps):
        x = gaussian(16, 5, seed=100 + step)
        optimizer.zero_grad()
        ((model(x) - x @ teacher.T).square().mean() + penalty * bit_cost(model)).backward()
        optimizer.step()
    return model.eval()


def test_a_penalty_shuts_gates_and_none_keeps_them():
    free, paid = net(gate=2.0), net(gate=2.0)
    for model, penalty in ((free, 0.0), (paid, 3.0)):
        trained(model, GateSampler(model, generator=seeded()), penalty)
    sizes = [stored_bits(model) for model in (free, paid)]
    assert sizes[1] < 0.5 * sizes[0]
    ranks = [sum(layer.learned_rank for layer in gated_layers(model).values()) for model in (free, paid)]
    assert ranks[1] < ranks[0], (ranks, sizes)


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


def test_an_empty_batch_and_a_wrong_width():
    layer = layer_of()
    assert layer(torch.zeros(0, 5, dtype=torch.float64)).shape == (0, 6)
    with pytest.raises((RuntimeError, ValueError)):
        layer(gaussian(3, 4))


def test_models_without_such_layers_are_refused():
    plain = nn.Sequential(nn.Linear(4, 4))
    grouped, divergence = partial(logit_groups, lr=0.1), partial(chain_divergence, penalty=1.0)
    for use in (bit_cost, operations, stored_bits, GateSampler, grouped, divergence):
        with pytest.raises(ValueError, match="without a BayesianLoRALinear"):
            use(plain)
    with pytest.raises(ValueError, match="matches nothing"):
        prune_to_lora(plain)
    model = net()
    with pytest.raises(ValueError, match="weighting: got 'bits', wanted 'const' or 'bop'"):
        bit_cost(model, weighting="bits")
    for bad in (0, -1):
        with pytest.raises(ValueError, match="ratio"):
            logit_groups(model, 0.1, ratio=bad)
        with pytest.raises(ValueError, match="base"):
            operations(model, base=bad)
        with pytest.raises(ValueError, match="activations"):
            operations(model, activations=bad)


def test_a_damaged_state_of_the_sampler_is_refused_and_changes_nothing():
    model = net()
    sampler, other = GateSampler(model, generator=seeded()), GateSampler(net(rank=2), generator=seeded())
    before = copy.deepcopy(sampler.state_dict())
    for state in (other.state_dict(), {"noise": before["noise"][:1], "generator": None}, {"noise": []}):
        with pytest.raises(ValueError, match="state: got"):
            sampler.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before["noise"], sampler.state_dict()["noise"]))


# What it costs, and what it becomes.


def test_bit_operations_by_hand():
    layer = set_logits(layer_of(8, 5, 4), (3.0, -3.0, 3.0))
    set_logits(layer, bits=[[3.0, -3, 3], [3.0, 3, -3], [-3.0, 3, 3]])
    assert layer.learned_rank == 2 and layer.learned_bits == {"A": 4, "B": 8, "E": 2}
    model = nn.Sequential(layer)
    got = operations(model, base=16, activations=8)
    assert got["base"] == 40 * 16 * 8
    assert got["adapter"] == 8 * (2 * 5 * 4 + 2 * 2 + 2 * 8 * 8)
    assert got["full"] == 32 * 32 * (40 + 4 * (5 + 8) + 4)
    assert operations(model, base=8, activations=8)["base"] * 2 == got["base"]  # half the bits of one, half the term
    assert stored_bits(model) == 2 * (5 * 4 + 8 * 8 + 2) + 96
    whole = nn.Sequential(layer_of(8, 5, 4, bits=32, gate=20.0))
    parts = operations(whole)
    assert parts["base"] + parts["adapter"] == parts["full"]
    assert bit_operations([]) == 0


def test_groups_of_the_optimizer():
    model = net()
    matrices, vectors, logits = logit_groups(model, 0.1, ratio=3.0, weight_decay=0.5)
    assert (matrices["weight_decay"], vectors["weight_decay"], logits["weight_decay"]) == (0.5, 0.0, 0.0)
    assert (matrices["lr"], vectors["lr"], logits["lr"]) == (0.1, 0.1, pytest.approx(0.3))
    everything = [id(p) for g in (matrices, vectors, logits) for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in vectors["params"]} == {id(layer.E) for layer in gated_layers(model).values()}
    decayed = {id(p) for p in optimizer_groups(model, 0.1, 0.5)[0]["params"]}
    assert decayed == {id(p) for p in matrices["params"]}


def test_pruned_to_lora_computes_the_same():
    model, x = net(bits=8), gaussian(4, 5)
    for layer in gated_layers(model).values():
        with torch.no_grad():
            layer.E.copy_(gaussian(3, seed=2))
    set_logits(model[0], (3.0, -3.0))
    GateSampler(model, generator=seeded())
    y = model.eval()(x)
    less = prune_to_lora(copy.deepcopy(model).train())
    assert [type(layer) for _, layer in adapters(less)] == [LoRALinear] * 2 and [less[0].rank, less[2].rank] == [2, 3]
    assert_close(less(x), y, 1e-11)
    with pytest.raises(ValueError, match="matches nothing"):
        prune_to_lora(less)
    assert prune_by_svd(copy.deepcopy(model), 11)  # the baseline takes the layer too


def test_it_opens_in_pefts_format(bert, tokens, tmp_path):
    def logits(model):
        with torch.no_grad():
            return model.eval()(tokens).logits

    make = partial(BayesianLoRALinear, rank=4, bits=8, alpha=32, generator=seeded())
    model = replace_linears(bert(), r"attention\.self\.(query|value)$", make)
    with torch.no_grad():
        for k, (_, layer) in enumerate(adapters(model)):
            layer.E.copy_(gaussian(4, seed=k))
            layer.rank_logits[min(k, 2)] = -3.0
    wanted = logits(model)
    assert (wanted - logits(bert())).abs().max() > 1e-2
    save_peft(model, tmp_path / "direct")
    save_peft(prune_to_lora(model), tmp_path / "lora")
    for folder in ("direct", "lora"):
        ours = load_peft(bert(), tmp_path / folder)
        assert_close(logits(ours), wanted, 1e-5)
        assert [layer.rank for _, layer in adapters(ours)] == [1, 2, 3, 3]
    peft = pytest.importorskip("peft")
    assert_close(logits(peft.PeftModel.from_pretrained(bert(), str(tmp_path / "lora"))), wanted, 1e-5)
