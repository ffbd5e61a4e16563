"""Maestro's actions: every pair once a pass, shrinking to prefixes, resuming in the same bits, two processes."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from torch import nn
from torch.nn import functional as F

from lowrank_ref.compression.maestro import importance
from lowrank_ref.compression.maestro_layers import decompose, deployed, maestro_layers, penalty
from lowrank_ref.compression.maestro_training import JointRankSampler, RankSampler, RankShrinker
from lowrank_ref.lab.train import Steppable
from lowrank_ref.lab.train import train as lab_train

SAMPLERS = (RankSampler, JointRankSampler)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(sizes=(6, 5, 4, 3), dtype=torch.float64):
    layers = []
    for i, (n, m) in enumerate(zip(sizes, sizes[1:])):
        linear = nn.Linear(n, m, dtype=dtype)
        with torch.no_grad():
            for p in linear.parameters():
                p.copy_(torch.randn(p.shape, generator=seeded(i), dtype=dtype) / 2)
        layers += [linear, nn.Tanh()]
    return decompose(nn.Sequential(*layers[:-1]))


def batch(i):
    x = torch.randn(8, 6, generator=seeded(100 + i), dtype=torch.float64)
    return x, x[:, :3].abs()


def loss(model, x, y):
    return F.mse_loss(model(x), y) + 0.01 * penalty(model)


def cuts(model):
    return [layer.cut for _, layer in maestro_layers(model)]


def set_ranks(model, ranks):
    for (_, layer), rank in zip(maestro_layers(model), ranks):
        layer.rank = rank


# Sampling.


@given(st.lists(st.integers(1, 3), min_size=3, max_size=3), st.integers(0, 5))
def test_4_every_pair_comes_once_a_pass_one_layer_at_a_time(ranks, seed):
    model = net()
    set_ranks(model, ranks)
    sampler = RankSampler(model, generator=seeded(seed))
    for _ in range(2):  # two passes
        seen = Counter()
        for _ in range(sum(ranks)):
            (chosen,) = [(place, cut) for place, cut in enumerate(cuts(model)) if cut is not None]
            seen[chosen] += 1
            sampler.step()
        assert seen == Counter((place, b) for place, r in enumerate(ranks) for b in range(1, r + 1))


def test_4_the_mean_loss_of_a_pass_is_the_mean_over_all_pairs():
    model, (x, y) = net(), batch(0)
    sampler = RankSampler(model, generator=seeded())
    ranks = [layer.rank for _, layer in maestro_layers(model)]
    on_pass = []
    for _ in range(sum(ranks)):
        on_pass.append(F.mse_loss(model(x), y).item())
        sampler.step()
    wanted = []
    for place, rank in enumerate(ranks):
        for b in range(1, rank + 1):
            wanted.append(F.mse_loss(deployed(model, [b if i == place else r for i, r in enumerate(ranks)])(x), y))
    assert sum(on_pass) / len(on_pass) == pytest.approx(torch.stack(wanted).mean().item())


def test_passes_are_mixed_anew_and_each_seed_has_its_own():
    def order(seed):
        sampler = RankSampler(net(), generator=seeded(seed))
        first = list(sampler.order)
        for _ in range(len(first)):
            sampler.step()
        return first, list(sampler.order)

    assert order(0) == order(0) != order(1)
    assert order(0)[0] != order(0)[1] and sorted(order(0)[0]) == sorted(order(0)[1])


def test_a_shrunk_layer_starts_a_new_pass_within_its_rank():
    model = net()
    sampler = RankSampler(model, generator=seeded())
    sampler.step()
    set_ranks(model, [2, 1, 1])
    seen = set()
    for _ in range(4):
        sampler.step()
        seen.add(next((place, cut) for place, cut in enumerate(cuts(model)) if cut is not None))
    assert seen == {(0, 1), (0, 2), (1, 1), (2, 1)}


def test_joint_cuts_are_uniform_and_independent():
    model = net()
    set_ranks(model, [3, 2, 1])
    sampler = JointRankSampler(model, generator=seeded())
    seen = Counter()
    for _ in range(3000):
        seen[tuple(cuts(model))] += 1
        sampler.step()
    assert set(seen) == {(a, b, 1) for a in (1, 2, 3) for b in (1, 2)}
    assert all(400 < count < 600 for count in seen.values())  # 500 expected, standard deviation 20


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers_leave_the_global_generator_alone_and_evaluation_sees_all(kind):
    model, (x, _) = net(), batch(0)
    full, state = model.eval()(x), torch.get_rng_state()
    sampler = kind(model.train(), generator=seeded())
    for _ in range(5):
        sampler.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.eval()(x), full)


@pytest.mark.parametrize("kind", [*SAMPLERS, RankShrinker])
def test_a_model_without_maestro_layers_is_refused(kind):
    options = {"every": 1} if kind is RankShrinker else {}
    with pytest.raises(ValueError, match="without Maestro layer"):
        kind(nn.Linear(2, 2), **options)


# Shrinking.


def test_shrinking_keeps_the_prefix_above_the_threshold_and_at_least_one():
    model = net()
    layers = [layer for _, layer in maestro_layers(model)]
    with torch.no_grad():
        layers[0].A[3:] *= 1e-4
        layers[0].B[:, 3:] *= 1e-4
        layers[2].A *= 1e-5
        layers[2].B *= 1e-5
    shrinker = RankShrinker(model, threshold=1e-5, every=2)
    shrinker.step()
    assert [layer.rank for layer in layers] == [5, 4, 3]  # not yet
    wanted = [sum(i >= 1e-5 for i in importance(layer.A, layer.B).tolist()) for layer in layers]
    shrinker.step()
    assert [layer.rank for layer in layers] == [3, 4, 1] == [max(1, w) for w in wanted]


def test_weights_that_have_not_changed_are_not_cut_again():
    """I_b sums over all rows from b on: over the kept ones alone the same weights would lose 8, 6, 4, 2, 1."""
    model = decompose(nn.Sequential(nn.Linear(8, 8, bias=False)))
    with torch.no_grad():
        model[0].A.copy_(0.3 * torch.eye(8))
        model[0].B.copy_(0.3 * torch.eye(8))
    shrinker, ranks = RankShrinker(model, threshold=0.25, every=1), []
    for _ in range(4):
        shrinker.step()
        ranks.append(model[0].rank)
    assert ranks == [6, 6, 6, 6]
    with torch.no_grad():
        model[0].A[4:] *= 0.1  # what changes is cut; what grows again stays out
    shrinker.step()
    assert model[0].rank < 6
    with torch.no_grad():
        model[0].A.fill_(9.0)
    rank = model[0].rank
    shrinker.step()
    assert model[0].rank == rank


def test_what_is_gone_stays_gone():
    model = net()
    layer = next(maestro_layers(model))[1]
    layer.rank = 2
    dropped = layer.A[2:].norm().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shrinker = RankShrinker(model, threshold=0.0, every=1)
    for i in range(3):
        optimizer.zero_grad()
        loss(model, *batch(i)).backward()
        optimizer.step()
        shrinker.step()
    assert layer.rank == 2 and layer.A[2:].norm() < dropped  # out of the network, and falling with the penalty


@pytest.mark.parametrize("option, error", [({"threshold": -1.0}, ValueError), ({"every": 0}, ValueError)])
def test_bad_options_raise(option, error):
    with pytest.raises(error, match=f"{next(iter(option))}: got"):
        RankShrinker(net(), **{"every": 1, **option})


def test_the_lasso_empties_what_a_low_rank_task_does_not_need():
    def run(strength):
        C = torch.randn(4, 2, generator=seeded(1)) @ torch.randn(2, 6, generator=seeded(2))
        model = decompose(nn.Sequential(nn.Linear(6, 4, bias=False)))
        with torch.no_grad():
            model[0].A.copy_(torch.randn(4, 6, generator=seeded(3)) / 2)
            model[0].B.copy_(torch.randn(4, 4, generator=seeded(4)) / 2)

        def nested(model, x):
            return F.mse_loss(model(x), x @ C.T) + strength * penalty(model)

        def inputs(i):
            return (torch.randn(32, 6, generator=seeded(i)),)

        actions = [RankShrinker(model, threshold=0.05, every=200), RankSampler(model, generator=seeded())]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        lab_train(model, inputs, nested, optimizer, steps=1600, actions=actions, progress=False)
        gap = (model[0].dense_weight() - C).norm() / C.norm()
        return model[0].rank, gap.item()

    rank, gap = run(1e-2)
    assert rank == 2 and gap < 0.1


# Training.


def test_5_without_cuts_and_penalty_it_is_ordinary_training_of_the_factors():
    model = net()
    reference = [M.detach().clone().requires_grad_() for _, layer in maestro_layers(model) for M in layer.parameters()]

    def by_hand(x):
        for i in range(3):
            A, B, bias = reference[3 * i : 3 * i + 3]
            x = F.linear(F.linear(x, A), B, bias)
            x = torch.tanh(x) if i < 2 else x
        return x

    one, other = (torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in (model.parameters(), reference))
    for i in range(4):
        x, y = batch(i)
        for optimizer, predict in ((one, model), (other, by_hand)):
            optimizer.zero_grad()
            F.mse_loss(predict(x), y).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference))


def run(kind, steps, checkpoint=None, seed=0):
    model = net()
    shrinker = RankShrinker(model, threshold=0.9, every=3)
    sampler = kind(model, generator=seeded(seed))
    assert isinstance(sampler, Steppable) and isinstance(shrinker, Steppable)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    actions = [shrinker, sampler]
    options = {"actions": actions, "checkpoint": checkpoint, "progress": False}
    history = lab_train(model, batch, loss, optimizer, steps=steps, **options)
    return model, history


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_run_resumes_in_the_same_bits(kind, tmp_path):
    straight, history = run(kind, 14)
    run(kind, 8, tmp_path / "x")
    resumed, again = run(kind, 14, tmp_path / "x")
    assert again.loss == history.loss and cuts(resumed) == cuts(straight)
    ranks = [layer.rank for _, layer in maestro_layers(straight)]
    assert ranks == [layer.rank for _, layer in maestro_layers(resumed)] and ranks != [5, 4, 3]
    for p, q in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(p, q)
    assert run(kind, 14, seed=1)[1].loss != history.loss


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_foreign_state_is_refused(kind):
    sampler = kind(net(), generator=seeded())
    state = copy.deepcopy(sampler.state_dict())
    other = next(k for k in SAMPLERS if k is not kind)(net(), generator=seeded()).state_dict()
    damaged = {**state, "position": 0, "cuts": [0, 1, 1]}
    damaged = {key: damaged[key] for key in state}
    for wrong in (other, {}, kind(net((6, 5, 3)), generator=seeded()).state_dict(), damaged):
        with pytest.raises(ValueError, match="got"):
            sampler.load_state_dict(wrong)
    assert str(sampler.state_dict()) == str(state)


def distributed(rank, world, folder):
    """One process of a DDP run: its share of the rows of each batch. Rank 0 saves what came out."""
    results = {}
    for kind in SAMPLERS:
        model = net()
        sampler, shrinker = kind(model, generator=seeded()), RankShrinker(model, threshold=0.9, every=2)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(5):
            x, y = (t[rank::world] for t in batch(i))
            optimizer.zero_grad()
            (F.mse_loss(wrapped(x), y) + 0.01 * penalty(model)).backward()
            optimizer.step()
            shrinker.step()
            sampler.step()
        results[kind.__name__] = model.state_dict()
    if rank == 0:
        torch.save(results, f"{folder}/results")


def test_two_processes_give_what_one_gives(tmp_path):
    results = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        in_processes(distributed, folder, world=world)
        results.append(torch.load(folder / "results", weights_only=True))
    for name, single in results[0].items():
        for key, value in single.items():
            torch.testing.assert_close(results[1][name][key], value, rtol=0, atol=1e-12)
