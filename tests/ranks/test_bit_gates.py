"""Draws of gates, penalties of a model by loops, what bits cost, and what a model becomes."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from bit_cases import assert_close, float64, layer_of, net, set_logits
from torch import nn

from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
from lowrank_ref.core.groups import optimizer_groups
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.ranks import prune_by_svd
from lowrank_ref.ranks.bayesian_lora import (
    BayesianLoRALinear,
    chain_kl,
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
from lowrank_ref.ranks.residual_bits import residual_quantize


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
