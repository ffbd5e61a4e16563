"""TRP: equations against loops, the exact invariants in float64, and what the energy rule does by itself."""

import copy
import io
import math

import pytest
import torch
from battery import gaussian
from conv_cases import assert_close, conv, shapes
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowrank_ref.compression import (
    TrainedRankPruning,
    by_gram,
    matrix_nuclear_norm,
    rank_at_energy,
    rank_at_threshold,
    rank_limit,
    split_model,
    to_matrix,
    truncation,
)
from lowrank_ref.compression.conv_matrices import SCHEMES

energies = st.sampled_from([0.3, 0.8, 0.9, 0.99])
schemes = st.sampled_from(SCHEMES)


def net():
    """Three convolutions with batch norm, and a head."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1)]
    layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)]
    return nn.Sequential(*layers).double()


X, Y = gaussian(12, 1, 8, 8, seed=9), torch.arange(12) % 3


def train(model, steps, *, optimizer=None, pruning=None):
    """Steps of SGD with momentum; a pruning adds its nuclear term to the loss and acts by hand."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        (loss if pruning is None else loss + pruning.nuclear_term()).backward()
        optimizer.step()
        if pruning is not None:
            pruning.step()
    return model


def by_hand(W, energy, scheme):
    """T(W), its sub-gradient and ranks, one matrix and one singular value at a time."""
    M = to_matrix(W, scheme)
    parts, subs, ranks = [], [], []
    for matrix in M if M.ndim == 3 else [M]:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        total, held, T, sub, k = float((S**2).sum()), 0.0, torch.zeros_like(matrix), torch.zeros_like(matrix), 0
        while held < energy * total:
            T += S[k] * torch.outer(U[:, k], Vh[k])
            sub += torch.outer(U[:, k], Vh[k])
            held += float(S[k]) ** 2
            k += 1
        parts, subs, ranks = [*parts, T], [*subs, sub], [*ranks, k]
    return torch.stack(parts).reshape(M.shape), torch.stack(subs).reshape(M.shape), max(ranks)


# Equations against loops.


@given(st.lists(st.floats(0.01, 3), min_size=1, max_size=8), energies)
def test_energy_rank_by_a_loop(values, energy):
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    k = int(rank_at_energy(S, energy))
    held = [float((S[:j] ** 2).sum() / (S**2).sum()) for j in range(len(S) + 1)]
    assert held[k] >= energy - 1e-12 and held[k - 1] < energy + 1e-12
    assert int(rank_at_energy(S, 1)) == len(S)
    assert int(rank_at_threshold(S, 0.5)) == max(1, sum(s >= 0.5 for s in S.tolist()))


@given(shapes(), energies, schemes)
def test_truncation_by_a_loop(shape, energy, scheme):
    W = gaussian(*shape)
    T, sub, rank = truncation(W, energy, scheme)
    wanted = by_hand(W, energy, scheme)
    assert_close(to_matrix(T, scheme), wanted[0])
    assert_close(to_matrix(sub, scheme), wanted[1])
    assert rank == wanted[2] and T.shape == sub.shape == W.shape
    fast = by_gram(W, energy, scheme)
    assert_close(fast.weight, T, 1e-9)
    assert_close(fast.subgradient, sub, 1e-6)
    assert fast.rank == rank


def test_truncation_of_a_linear_layer_of_zeros_and_of_half_precision():
    W = gaussian(5, 7)
    assert_close(truncation(W, 0.8, "spatial").weight, by_hand(W, 0.8, "channel")[0])
    for cut in (truncation, by_gram):
        T, sub, rank = cut(torch.zeros(4, 3), 0.9)
        assert not T.any() and not sub.any() and rank == 1
        T, _, rank = cut(gaussian(8, 4, 3, 3).bfloat16(), 0.9)
        assert T.dtype == torch.bfloat16 and bool(torch.isfinite(T).all()) and rank < 8


def test_truncation_agrees_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.decomposition")
    W = gaussian(9, 6)
    T, _, rank = truncation(W, 0.8)
    model = sklearn.TruncatedSVD(rank, algorithm="arpack").fit(W.numpy())
    assert_close(T, torch.from_numpy(model.inverse_transform(model.transform(W.numpy()))), 1e-10)


# The exact invariants of the method.


@given(shapes(), energies, schemes)
def test_1_a_second_truncation_changes_nothing_just_where_the_last_value_holds_more_than_1_minus_e(
    shape, energy, scheme
):
    T, _, rank = truncation(gaussian(*shape), energy, scheme)
    S = torch.linalg.svdvals(to_matrix(T, scheme))
    S = S if S.ndim == 2 else S[None]
    share = [float(s[s > 1e-9].min() ** 2 / (s**2).sum()) for s in S]
    again = truncation(T, energy, scheme)
    if min(share) > 1 - energy + 1e-9:
        assert_close(again.weight, T)
        assert again.rank == rank <= rank_limit(energy)
    else:
        assert float((again.weight - T).norm()) > 1e-6 * float(T.norm())


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9, 0.95])
def test_repeated_truncation_without_training_ends_below_the_limit(energy):
    W, ranks = gaussian(40, 60), []
    for _ in range(40):
        W, _, rank = truncation(W, energy)
        ranks.append(rank)
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > rank_limit(energy) >= ranks[-1] == ranks[-2]


def test_the_limit_is_met_by_equal_values_and_by_no_more():
    for energy, limit in ((0.5, 1), (0.75, 3), (0.8, 4), (0.9, 9), (0.99, 99)):
        assert rank_limit(energy) == limit
        assert int(rank_at_energy(torch.ones(limit), energy - 1e-9)) == limit
        assert int(rank_at_energy(torch.ones(limit + 2), energy - 1e-9)) < limit + 2


@given(shapes(), energies)
def test_2_what_is_lost_is_the_energy_that_was_left_out(shape, energy):
    W = gaussian(*shape)
    T, _, rank = truncation(W, energy)
    S = torch.linalg.svdvals(to_matrix(W))
    assert (W - T).square().sum().item() == pytest.approx((S[rank:] ** 2).sum().item(), abs=1e-9)
    assert (W - T).square().sum() <= (1 - energy) * W.square().sum() + 1e-9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_4_with_all_energy_and_no_nuclear_term_it_is_plain_training_to_the_bit(scheme):
    model = net()
    pruning = TrainedRankPruning(model, energy=1, every=2, scheme=scheme)
    pruning.truncate()
    train(model, 6, pruning=pruning)
    for p, q in zip(model.parameters(), train(net(), 6).parameters()):
        assert torch.equal(p, q)


@given(shapes(), energies, schemes)
def test_5_the_subgradient(shape, energy, scheme):
    W = gaussian(*shape)
    T, sub, _ = truncation(W, energy, scheme)
    nuclear = matrix_nuclear_norm(T, scheme)
    assert (sub * T).sum().item() == pytest.approx(nuclear.item(), rel=1e-9)
    norms = torch.linalg.matrix_norm(to_matrix(sub, scheme), 2)
    assert_close(norms, torch.ones_like(norms), 1e-9)
    other = gaussian(*shape, seed=5)  # what makes it a sub-gradient
    assert matrix_nuclear_norm(other, scheme) >= nuclear + (sub * (other - T)).sum() - 1e-9


def test_5_the_gradient_at_full_rank_by_differences():
    W, step = gaussian(4, 2, 2, 2), gaussian(4, 2, 2, 2, seed=1)
    V = W.clone().requires_grad_()
    matrix_nuclear_norm(V).backward()
    assert_close(V.grad, truncation(W, 1).subgradient, 1e-9)
    slope = (matrix_nuclear_norm(W + 1e-6 * step) - matrix_nuclear_norm(W - 1e-6 * step)) / 2e-6
    assert slope.item() == pytest.approx((V.grad * step).sum().item(), rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_6_a_step_by_hand(momentum):
    """W ← T(W), then W ← W - η·v with v ← momentum·v + G(T(W)) + λUVᵀ in the step after a truncation."""
    model, reference = net(), net()
    steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    pruning = TrainedRankPruning(model, energy=0.8, every=2, penalty=0.01)
    pruning.truncate()
    velocity = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for t in range(5):
        sub = {}
        if t % 2 == 0:
            for name in ("3.weight", "6.weight"):
                p = reference.get_parameter(name)
                T, U, k = by_hand(p.data, 0.8, "channel")
                p.data, sub[name] = T.view_as(p), U.view_as(p)
                assert k == pruning.ranks[name[0]]
        reference.zero_grad()
        F.cross_entropy(reference(X), Y).backward()
        for name, p in reference.named_parameters():
            velocity[name] = momentum * velocity[name] + p.grad + 0.01 * sub.get(name, 0)
            p.data = p.data - 0.1 * velocity[name]
        train(model, 1, optimizer=steps, pruning=pruning)
        if t % 2 == 0:  # the last operation was a step of the optimizer: no low rank
            assert torch.linalg.matrix_rank(model[6].weight.flatten(1)) == 8 > pruning.ranks["6"]
        assert bool(pruning.subgradients) == (t % 2 == 1)
        if t % 2 == 1:
            for name in ("3.weight", "6.weight"):
                p = reference.get_parameter(name)
                assert_close(model.get_parameter(name), by_hand(p.data, 0.8, "channel")[0].view_as(p), 1e-9)
        else:
            for name, p in reference.named_parameters():
                assert_close(model.get_parameter(name), p, 1e-9)


def test_7_between_truncations_the_distance_from_low_rank_is_at_most_the_way():
    model = net()
    pruning = TrainedRankPruning(model, energy=0.8, every=100)
    pruning.truncate()
    for layer, rank in ((model[3], pruning.ranks["3"]), (model[6], pruning.ranks["6"])):
        state, way = copy.deepcopy(model), 0.0
        optimizer = torch.optim.SGD(state.parameters(), lr=0.05, momentum=0.9)
        mine = state[3] if layer is model[3] else state[6]
        for _ in range(4):
            before = mine.weight.detach().clone()
            train(state, 1, optimizer=optimizer)
            way += float((mine.weight.detach() - before).norm())
            S = torch.linalg.svdvals(mine.weight.flatten(1))
            assert 0 < float(S[rank:].norm()) <= way + 1e-12


def test_a_trained_network_is_split_without_loss_after_a_last_truncation():
    model = net()
    pruning = TrainedRankPruning(model, energy=0.9, every=2)
    pruning.truncate()
    train(model, 8, pruning=pruning).eval()  # 8 is a multiple of 2: just truncated
    assert_close(split_model(model, pruning.ranks)(X), model(X), 1e-9)
    train(model.train(), 1).eval()
    assert (split_model(model, pruning.ranks)(X) - model(X)).abs().max() > 1e-4


# The action.


def test_only_the_listed_layers_are_cut_and_in_the_same_parameters():
    model = net()
    before, ids = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    TrainedRankPruning(model, energy=0.7).truncate()
    assert ids == [id(p) for p in model.parameters()]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"3.weight", "6.weight"}


def test_the_nuclear_term_is_the_nuclear_norm_and_only_once():
    model = net()
    pruning = TrainedRankPruning(model, every=3, penalty=0.5)
    assert pruning.nuclear_term().item() == 0
    pruning.truncate()
    wanted = 0.5 * sum(matrix_nuclear_norm(model[i].weight) for i in (3, 6))
    assert pruning.nuclear_term().item() == pytest.approx(wanted.item())
    pruning.step()
    assert pruning.nuclear_term().item() == 0 and pruning.steps == 1
    silent = TrainedRankPruning(model, every=3)
    silent.truncate()
    assert silent.nuclear_term().item() == 0 and not silent.subgradients


def test_a_run_resumes_to_the_bit_right_after_a_truncation():
    def start():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, TrainedRankPruning(model, every=2, penalty=0.01)

    one = start()
    train(one[0], 4, optimizer=one[1], pruning=one[2])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in one], file)
    file.seek(0)
    two = start()
    for part, state in zip(two, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    for model, optimizer, pruning in (one, two):
        train(model, 3, optimizer=optimizer, pruning=pruning)
    assert all(torch.equal(p, q) for p, q in zip(one[0].parameters(), two[0].parameters()))
    blind = start()
    with pytest.raises(ValueError, match="state"):
        blind[2].load_state_dict({**one[2].state_dict(), "ranks": {"other": 3}})


def test_a_weight_that_is_not_finite_stops_the_truncation_and_nothing_changes():
    model = net()
    model[6].weight.data[0, 0, 0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="W: got 1 NaN"):
        TrainedRankPruning(model).truncate()
    assert all(torch.equal(v, before[k]) or k == "6.weight" for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "option, error",
    [
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.1}, "energy"),
        ({"energy": math.nan}, "energy"),
        ({"every": 0}, "every"),
        ({"scheme": "NC"}, "scheme: got 'NC'"),
        ({"pattern": "nothing"}, "matches nothing"),
    ],
)
def test_bad_options_raise(option, error):
    with pytest.raises(ValueError, match=error):
        TrainedRankPruning(net(), **option)


def test_what_cannot_be_cut_is_refused():
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    computed = nn.Sequential(nn.Conv2d(2, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    for model, message in ((grouped, "groups = 2"), (computed, "computed"), (nn.Linear(2, 2), "second convolution")):
        with pytest.raises(ValueError, match=message):
            TrainedRankPruning(model)


def test_bad_arguments_of_the_functions(no_shape_checks):
    for call in (truncation, by_gram):
        with pytest.raises(TypeError, match="W: got dtype torch.int64"):
            call(torch.ones(3, 3, dtype=torch.int64), 0.9)
        with pytest.raises(ValueError, match="W: got shape"):
            call(torch.ones(3, 3, 3), 0.9)
        with pytest.raises(ValueError, match="energy"):
            call(torch.ones(3, 3), 0.0)
    for value in (0.0, 1.0, "a"):
        with pytest.raises((TypeError, ValueError), match="energy"):
            rank_limit(value)


def test_a_convolution_of_a_scheme_with_its_own_ranks():
    """Each output channel keeps its own rank: one of them is full, the other of rank 1."""
    W = torch.zeros(2, 3, 3, 3, dtype=torch.float64)
    W[0] = torch.eye(3).repeat(1, 3).view(3, 3, 3)
    W[1] = torch.outer(torch.arange(1.0, 4), torch.arange(1.0, 10)).view(3, 3, 3)
    T, sub, rank = truncation(W, 0.9, "decoupled")
    ranks = torch.linalg.matrix_rank(to_matrix(T, "decoupled"))
    assert ranks.tolist() == [3, 1] and rank == 3
    assert torch.linalg.matrix_rank(to_matrix(sub, "decoupled")).tolist() == [3, 1]


def test_attached_it_acts_inside_the_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruning = TrainedRankPruning(model, every=2).attach(optimizer)
    train(model, 4, optimizer=optimizer)
    assert pruning.steps == 4 and set(pruning.ranks) == {"3", "6"}
    assert torch.linalg.matrix_rank(model[6].weight.flatten(1)) == pruning.ranks["6"] < 8


def distributed(rank, world, folder):
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # statistics of half a batch are others
    pruning = TrainedRankPruning(model, every=2, penalty=0.01)
    pruning.truncate()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(X[rank::world]), Y[rank::world]) + pruning.nuclear_term()
        loss.backward()
        optimizer.step()
        pruning.step()
    torch.save(model.state_dict(), f"{folder}/rank {rank}")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        in_processes(distributed, folder, world=world)
        found += [torch.load(folder / f"rank {rank}", weights_only=True) for rank in range(world)]
    assert all(torch.equal(found[1][key], found[2][key]) for key in found[1])
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=0, atol=1e-9)


def test_the_split_halves_the_multiplications_of_a_known_network():
    """Of the released ranks' order: what rank 7 costs, counted by PyTorch."""
    model, x = nn.Sequential(conv(24, 24, 3, padding=1)), gaussian(1, 24, 4, 4)
    for scheme, wanted in (("channel", 7 * (216 + 24)), ("spatial", 7 * (72 + 72))):
        with FlopCounterMode(display=False) as counter:
            split_model(model, {"0": 7}, scheme)(x)
        assert counter.get_total_flops() == 2 * 16 * wanted
