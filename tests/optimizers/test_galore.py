"""GaLore: the identities of the method in float64, every equation against a loop, and the official package."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from battery import assert_resumes
from hypothesis import example, given
from hypothesis import strategies as st
from processes import in_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lowrank_ref.core.accounting import state_numel
from lowrank_ref.core.linalg import captured_energy, gram_basis, power_basis, subspace_basis, svd_basis
from lowrank_ref.optimizers.galore import (
    GaLoreAdamW,
    GaLoreSGD,
    adam_directions,
    add_back,
    project_back,
    project_gradient,
    projectors,
)
from lowrank_ref.optimizers.galore_variants import GaLoreAdafactor, GaLoreAdamW8bit

SIDES = ["smaller", "larger", "left", "right", "both"]
SHAPES = [(7, 4), (4, 7), (5, 5)]
NEVER = 10**9  # a gap that no test reaches: one basis for ever
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


@st.composite
def problems(draw):
    """Draw (shape, rank, side): tall, wide and square matrices, rank 1 and full rank among them."""
    m, n = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    if draw(st.booleans()):
        n = m
    rank = draw(st.sampled_from(sorted({1, (1 + min(m, n)) // 2, min(m, n)})))
    return (m, n), rank, draw(st.sampled_from(SIDES))


def randoms(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def follow(cls, W0, gradients, **options):
    """Take one step for each gradient; return the weights W_0, W_1, ... and the optimizer."""
    W = nn.Parameter(W0.clone())
    optimizer = cls([W], **options)
    path = [W0]
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        path.append(W.detach().clone())
    return path, optimizer


# --- Projectors -------------------------------------------------------------------------------------------------------


@given(problems(), st.integers(0, 1000))
@example(((6, 4), 4, "left"), 0)
@example(((4, 6), 4, "right"), 0)
@example(((1, 1), 1, "both"), 0)
@pytest.mark.parametrize("basis", [gram_basis, svd_basis])
def test_projection_is_orthogonal_and_loses_the_small_singular_values_only(basis, problem, seed):
    shape, rank, side = problem
    G, other = randoms(*shape, seed=seed), randoms(*shape, seed=seed + 1)
    bases = projectors(G, rank, side=side, basis=basis)
    for P in bases.values():
        close(P.T @ P, torch.eye(rank, dtype=P.dtype))
    once = project_back(project_gradient(G, **bases), **bases)
    close(project_back(project_gradient(once, **bases), **bases), once)  # idempotent
    close((once * other).sum(), (G * project_back(project_gradient(other, **bases), **bases)).sum())  # symmetric
    lost = torch.linalg.svdvals(G)[rank:].square().sum()
    close((G - once).square().sum(), lost, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("basis", [gram_basis, svd_basis])
def test_the_bases_are_the_top_singular_vectors_in_order_largest_entry_positive(basis, shape):
    G = randoms(*shape)
    U, _, Vh = torch.linalg.svd(G)
    bases = projectors(G, 3, side="both", basis=basis)
    for P, vectors in ((bases["left"], U[:, :3]), (bases["right"], Vh[:3].T)):
        for j in range(3):
            peak = max(vectors[:, j].tolist(), key=abs)
            close(P[:, j], vectors[:, j] * math.copysign(1.0, peak))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("decay, least", [(0.0, 0.85), (0.2, 0.97)])
def test_the_fast_bases_keep_the_energy_of_the_exact_one(shape, decay, least):
    """Gaussian matrices, and such with columns falling as exp(-0.2 i). Worst power_basis of 90 seeds: 0.883, 0.982."""
    k = min(shape)
    for seed in range(5):
        Q = torch.linalg.qr(randoms(shape[0], k, seed=seed, dtype=torch.float32)).Q
        G = Q * torch.exp(-decay * torch.arange(k)) @ randoms(k, shape[1], seed=1000 + seed, dtype=torch.float32)
        for rank in (1, 8, k):
            exact, noise = svd_basis(G, rank), torch.Generator().manual_seed(seed)
            best = captured_energy(G, exact)
            assert abs(captured_energy(G, gram_basis(G, rank)) / best - 1) < 1e-5
            assert abs(captured_energy(G, power_basis(G, rank, start=exact)) / best - 1) < 1e-5
            if rank == 8:
                assert least < captured_energy(G, power_basis(G, rank, generator=noise)) / best < 1 + 1e-5


@pytest.mark.parametrize("basis", [gram_basis, svd_basis, power_basis])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_gradient_still_gives_an_orthonormal_basis(basis, shape):
    P = projectors(torch.zeros(shape), 3, side="left", basis=basis)["left"]
    torch.testing.assert_close(P.T @ P, torch.eye(3))


def test_half_precision_is_decomposed_in_float32_and_rounded_back():
    G = randoms(6, 4, dtype=torch.float32).bfloat16()
    P = projectors(G, 2)["right"]
    assert P.dtype == torch.bfloat16
    assert torch.equal(P, projectors(G.float(), 2)["right"].bfloat16())


def test_the_last_bases_are_handed_to_the_next_search():
    seen = []

    def basis(G, rank, *, start):
        seen.append(start)
        return svd_basis(G, rank)

    _, optimizer = follow(
        GaLoreAdamW, randoms(5, 4), [randoms(5, 4, seed=s) for s in (1, 2)], rank=2, gap=1, basis=basis
    )
    assert seen[0] is None
    close(seen[1], svd_basis(randoms(5, 4, seed=1).T, 2))
    wanted = svd_basis(randoms(5, 4, seed=2).T, 2, start=seen[1])
    close(optimizer.state[optimizer.param_groups[0]["params"][0]]["right"], wanted)


# --- Equations against loops ------------------------------------------------------------------------------------------


@given(problems())
def test_project_and_project_back_are_these_sums(problem):
    (m, n), r, side = problem
    G = randoms(m, n)
    bases = projectors(randoms(m, n, seed=1), r, side=side)
    left, right = bases.get("left", torch.eye(m).double()), bases.get("right", torch.eye(n).double())
    R = project_gradient(G, **bases)
    assert R.shape == (left.shape[1], right.shape[1])
    for i in range(R.shape[0]):
        for j in range(R.shape[1]):
            close(R[i, j], sum(left[k, i] * G[k, l] * right[l, j] for k in range(m) for l in range(n)))
    D = project_back(R, **bases)
    for k in range(m):
        for l in range(n):
            terms = (left[k, i] * R[i, j] * right[l, j] for i in range(R.shape[0]) for j in range(R.shape[1]))
            close(D[k, l], sum(terms))


@given(problems(), st.floats(-2, 2))
def test_add_back_adds_the_direction(problem, factor):
    shape, rank, side = problem
    G = randoms(*shape)
    bases = projectors(G, rank, side=side)
    W, N = randoms(*shape, seed=1), randoms(*project_gradient(G, **bases).shape, seed=2)
    wanted = W + factor * project_back(N, **bases)
    add_back(W, N, factor, **bases)
    close(W, wanted)


def test_without_a_basis_nothing_is_projected():
    G = randoms(3, 4)
    assert project_gradient(G) is G and project_back(G) is G


def test_adam_direction_number_by_number():
    M, V = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    m, v = [[0.0] * 3 for _ in range(2)], [[0.0] * 3 for _ in range(2)]
    for t in range(1, 5):
        R = randoms(2, 3, seed=t)
        [N] = adam_directions([R], [M], [V], [t], betas=(0.8, 0.95), eps=1e-2)
        for i in range(2):
            for j in range(3):
                g = R[i, j].item()
                m[i][j] = 0.8 * m[i][j] + 0.2 * g
                v[i][j] = 0.95 * v[i][j] + 0.05 * g * g
                bias = math.sqrt(1 - 0.95**t) / (1 - 0.8**t)
                assert N[i, j].item() == pytest.approx(bias * m[i][j] / (math.sqrt(v[i][j]) + 1e-2), rel=1e-12)
    close(M, torch.tensor(m, dtype=torch.float64))
    close(V, torch.tensor(v, dtype=torch.float64))


def oriented(vectors: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """Make the largest entry of every column positive, or turn it along the old column."""
    along = [v[np.abs(v).argmax()] for v in vectors.T] if old is None else (vectors * old).sum(axis=0)
    return vectors * np.where(np.array(along) > 0, 1.0, -1.0)


def slow_galore(W, gradients, *, adam, rank, side, gap, lr, scale, weight_decay, betas=(0.9, 0.999), eps=1e-6):
    """GaLore written once more from the paper's algorithm, in NumPy."""
    W, (m, n) = W.numpy(), W.shape
    left = side in ("left", "both") or (side == "smaller" and m < n) or (side == "larger" and m >= n)
    right = side in ("right", "both") or (side == "smaller" and m >= n) or (side == "larger" and m < n)
    M = V = 0.0
    P = Q = None
    for t, G in enumerate(gradients, start=1):
        G = G.numpy()
        if (t - 1) % gap == 0:
            U, _, Vh = np.linalg.svd(G)
            P = oriented(U[:, :rank], P) if left else np.eye(m)
            Q = oriented(Vh[:rank].T, Q) if right else np.eye(n)
        N = R = P.T @ G @ Q
        if adam:
            M = betas[0] * M + (1 - betas[0]) * R
            V = betas[1] * V + (1 - betas[1]) * R**2
            N = M / (np.sqrt(V) + eps) * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        W = W - lr * scale * (P @ N @ Q.T)
        W = W - lr * weight_decay * W
    return torch.from_numpy(W)


@given(problems(), st.sampled_from([1, 2, 3, NEVER]), st.sampled_from([0.0, 0.3]), st.integers(0, 1000))
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreSGD])
def test_seven_steps_equal_the_algorithm_written_in_numpy(cls, problem, gap, weight_decay, seed):
    shape, rank, side = problem
    W, gradients = randoms(*shape, seed=seed), [randoms(*shape, seed=seed + t) for t in range(1, 8)]
    options = {"rank": rank, "side": side, "gap": gap, "lr": 0.05, "scale": 0.5, "weight_decay": weight_decay}
    path, _ = follow(cls, W, gradients, **options, basis=svd_basis)
    close(path[-1], slow_galore(W, gradients, adam=cls is GaLoreAdamW, **options), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4)])
def test_without_a_rank_it_is_plain_adam_with_the_unscaled_rate(shape, weight_decay):
    W = randoms(*shape)
    gradients = [randoms(*shape, seed=t) for t in range(1, 6)]
    options = {"lr": 0.05, "betas": (0.8, 0.95)}
    path, _ = follow(GaLoreAdamW, W, gradients, eps=0.0, scale=0.1, weight_decay=weight_decay, **options)
    reference = nn.Parameter(W.clone())
    adam = torch.optim.Adam([reference], eps=0.0, **options)  # with eps = 0, its other place for eps does not matter
    for G in gradients:
        reference.grad = G
        adam.step()
        reference.data *= 1 - 0.05 * weight_decay
    close(path[-1], reference.detach())


# --- Exact identities of the method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_one_basis_for_ever_it_is_adam_on_the_factor(shape, side):
    """W = W₀ + P X Qᵀ with frozen P and Q: LoRA with one trained factor, or LoRA-XS with two frozen ones.

    With both bases the first R is diagonal, and rounding beside the diagonal: at ε = 0 its sign alone would decide.
    PyTorch adds its ε after bias correction.
    """
    eps = 1e-6
    W0, A, B = randoms(*shape), randoms(shape[1], 9, seed=1), randoms(shape[0], 9, seed=2)

    def loss(W):
        return (torch.tanh(W @ A) - B).square().sum()

    W = nn.Parameter(W0.clone())
    galore = GaLoreAdamW([W], lr=0.04, rank=2, gap=NEVER, scale=0.5, side=side, eps=eps)
    factor = None
    for t in range(1, 9):
        galore.zero_grad()
        loss(W).backward()
        if factor is None:
            bases = projectors(W.grad, 2, side=side)
            factor = nn.Parameter(torch.zeros_like(project_gradient(W0, **bases)))
            adam = torch.optim.Adam([factor], lr=0.04 * 0.5)
        adam.param_groups[0]["eps"] = eps / math.sqrt(1 - 0.999**t)
        adam.zero_grad()
        loss(W0 + project_back(factor, **bases)).backward()
        galore.step()
        adam.step()
        close(W.detach(), W0 + project_back(factor, **bases).detach(), rtol=1e-8, atol=1e-8)


@given(problems(), st.sampled_from([1, 2, NEVER]))
def test_sgd_of_full_rank_is_sgd_whatever_the_gap(problem, gap):
    shape, _, _ = problem
    W, gradients = randoms(*shape), [randoms(*shape, seed=t) for t in range(1, 6)]
    path, _ = follow(GaLoreSGD, W, gradients, lr=0.1, rank=min(shape), gap=gap, scale=1.0)
    close(path[-1], W - 0.1 * sum(gradients))


def test_adam_of_full_rank_is_adam_only_in_adams_own_axes():
    W, gradients = randoms(6, 4), [randoms(6, 4, seed=t) for t in range(1, 6)]

    def signed_permutation(G, rank, *, start=None):
        return torch.tensor([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, -1, 0]]).to(G.dtype)

    plain = follow(GaLoreAdamW, W, gradients)[0][-1]
    full = {"rank": 4, "scale": 1.0, "gap": 2}
    close(follow(GaLoreAdamW, W, gradients, basis=signed_permutation, **full)[0][-1], plain)
    turned = follow(GaLoreAdamW, W, gradients, **full)[0][-1]
    assert (turned - plain).abs().max() > 1e-3  # lr is 0.01


@given(problems(), st.sampled_from([GaLoreAdamW, GaLoreSGD]))
def test_a_transposed_problem_takes_transposed_steps(problem, cls):
    (m, n), rank, side = problem
    mirrored = {"left": "right", "right": "left"}.get(side, side)
    if m == n and side in ("smaller", "larger"):
        side, mirrored = "left", "right"  # a square has no smaller side
    W, gradients = randoms(m, n), [randoms(m, n, seed=t) for t in range(1, 6)]
    here = follow(cls, W, gradients, rank=rank, gap=2, side=side)[0]
    there = follow(cls, W.T, [G.T for G in gradients], rank=rank, gap=2, side=mirrored)[0]
    close(here[-1], there[-1].T, atol=1e-8)


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreSGD])
@pytest.mark.parametrize("side", SIDES)
def test_a_step_has_rank_r_and_the_sum_of_k_gaps_has_rank_k_r(side, cls):
    path, _ = follow(cls, randoms(9, 8), [randoms(9, 8, seed=t) for t in range(1, 10)], rank=2, gap=3, side=side)
    rank = partial(torch.linalg.matrix_rank, atol=1e-9)
    for t in range(9):
        assert rank(path[t + 1] - path[t]) <= 2
        assert rank(path[t + 1] - path[t - t % 3]) <= 2  # all updates of one gap share a space
    assert [int(rank(path[3 * k] - path[0])) for k in (1, 2, 3)] == [2, 4, 6]


def test_the_steps_of_one_gap_stay_in_the_space_of_its_basis():
    gradients = [randoms(5, 8, seed=t) for t in range(1, 7)]
    path, _ = follow(GaLoreAdamW, randoms(5, 8), gradients, rank=2, gap=3)
    for t in range(6):
        P = svd_basis(gradients[t - t % 3], 2)
        update = path[t + 1] - path[t]
        close(P @ (P.T @ update), update)


def test_a_sign_fixed_for_ever_changes_nothing_and_one_flipped_at_a_refresh_does():
    W, gradients = randoms(6, 4), [randoms(6, 4, seed=t) for t in range(1, 7)]

    def run(flipped_calls):
        calls = []

        def basis(G, rank, *, start=None):
            calls.append(len(calls))
            return svd_basis(G, rank) * torch.tensor([1.0, -1.0 if calls[-1] in flipped_calls else 1.0])

        return follow(GaLoreAdamW, W, gradients, rank=2, gap=3, basis=basis)[0][-1]

    close(run({0, 1}), run({}))
    assert (run({1}) - run({})).abs().max() > 1e-4  # M still has the old sign


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis", [gram_basis, svd_basis, subspace_basis])
def test_no_column_flips_its_sign_while_columns_keep_their_order(basis, side):
    """A drifting gradient. By the rule of the largest entry alone, one column in about twenty flips at a change."""
    rule = flips = 0
    W, drift = nn.Parameter(randoms(12, 10)), randoms(12, 10)
    optimizer = GaLoreAdamW([W], rank=4, gap=1, side=side, basis=basis)
    for t in range(60):
        drift = drift + 0.15 * randoms(12, 10, seed=t)
        U, _, V = torch.linalg.svd(drift, full_matrices=False)
        W.grad = U * 2.0 ** -torch.arange(10) @ V  # columns that turn, and singular values that keep their order
        before = {key: optimizer.state[W].get(key) for key in ("left", "right")}
        optimizer.step()
        for key, old in before.items():
            if old is not None:
                new = optimizer.state[W][key]
                kept = (new * old).sum(0).abs() > 0.7  # the same column, turned a little
                flips += int((kept & ((new * old).sum(0) < 0)).sum())
                by_rule = [P * P.gather(0, P.abs().argmax(0, keepdim=True)).sign() for P in (new, old)]
                rule += int((kept & ((by_rule[0] * by_rule[1]).sum(0) < 0)).sum())
    assert flips == 0 and rule > 3


ALL = [GaLoreAdamW, GaLoreSGD, GaLoreAdafactor, GaLoreAdamW8bit]
WIDE = (64, 80)  # with rank 60, large enough for 8-bit moments


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("side", ["smaller", "both"])
@pytest.mark.parametrize("basis", [gram_basis, subspace_basis])
def test_gradients_of_zeros_at_the_start_count_for_nothing(basis, side, cls):
    """As of a layer behind a zero-initialised head: its basis was an arbitrary one for the whole first gap."""
    W, gradients = randoms(*WIDE), [randoms(*WIDE, seed=t) for t in range(1, 6)]
    options = {"rank": 60, "gap": 3, "side": side, "basis": basis}
    wanted, _ = follow(cls, W, gradients, **options)
    for count in (1, 4):  # within the first gap, and beyond it
        path, optimizer = follow(cls, W, [torch.zeros_like(W)] * count + gradients, **options)
        assert torch.equal(path[count], W) and torch.equal(path[-1], wanted[-1])
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 5


@pytest.mark.parametrize("cls", ALL)
def test_a_matrix_that_waits_decays_and_has_a_state_to_load_into(cls):
    W = randoms(*WIDE)
    path, waiting = follow(cls, W, [torch.zeros_like(W)] * 2, rank=60, lr=0.1, weight_decay=0.5)
    close(path[-1], W * (1 - 0.1 * 0.5) ** 2)
    _, trained = follow(cls, W, [randoms(*WIDE, seed=1)], rank=60)
    kinds = [
        {key: (v.shape, v.dtype) for key, v in o.state[o.param_groups[0]["params"][0]].items() if key != "step"}
        for o in (waiting, trained)
    ]
    assert kinds[0] == kinds[1] and kinds[0]


@pytest.mark.parametrize("cls", ALL)
def test_a_change_that_meets_zeros_comes_with_the_next_gradient(cls):
    gradients = [randoms(6, 4, seed=t) for t in range(1, 7)]
    gradients[2] = gradients[3] = torch.zeros(6, 4).double()  # steps 3 and 4; changes are due in steps 1, 3 and 5
    seen = []

    def basis(G, rank, *, start=None):
        seen.append(G.mT.clone())
        return svd_basis(G, rank, start=start)

    _, optimizer = follow(cls, randoms(6, 4), gradients, rank=2, gap=2, basis=basis)
    assert [next(t for t, G in enumerate(gradients, 1) if torch.equal(G, X)) for X in seen] == [1, 5]
    seen.clear()
    gradients[3] = randoms(6, 4, seed=9)
    path, _ = follow(cls, randoms(6, 4), gradients[:4], rank=2, gap=2, basis=basis)
    assert [next(t for t, G in enumerate(gradients, 1) if torch.equal(G, X)) for X in seen] == [1, 4]
    if cls is GaLoreSGD:
        P = svd_basis(gradients[3].T, 2)
        close(path[4], path[3] - 0.01 * 0.25 * gradients[3] @ P @ P.T)


@pytest.mark.parametrize("cls", ALL)
def test_a_late_change_is_not_lost_by_a_checkpoint(cls):
    gradients = [randoms(6, 4, seed=t) for t in range(1, 9)]
    gradients[2] = torch.zeros(6, 4).double()
    straight, _ = follow(cls, randoms(6, 4), gradients, rank=2, gap=2)
    path, stopped = follow(cls, randoms(6, 4), gradients[:3], rank=2, gap=2)
    W = nn.Parameter(path[-1].clone())
    resumed = cls([W], rank=2, gap=2)
    resumed.load_state_dict(stopped.state_dict())
    for G in gradients[3:]:
        W.grad = G
        resumed.step()
    assert torch.equal(W, straight[-1])


@pytest.mark.parametrize("cls", ALL)
def test_asking_for_a_state_dict_before_the_first_step_changes_no_basis(cls):
    """PyTorch's distributed checkpoints make a state by a step of zeros with learning rate 0."""

    def run(ask, times=range(5), state=None):
        model = nn.Linear(*WIDE, bias=False).double()
        model.weight.data.copy_(randoms(*WIDE).T)
        optimizer = cls(model.parameters(), rank=60, gap=3, lr=0.05, weight_decay=0.1)
        if state is not None:
            model.weight.data.copy_(state[0])
            set_optimizer_state_dict(model, optimizer, state[1])
        if ask:
            keys = get_optimizer_state_dict(model, optimizer)["state"]["weight"].keys()
        for t in times:
            model.weight.grad = randoms(WIDE[1], WIDE[0], seed=t + 1)
            optimizer.step()
        assert not ask or keys == optimizer.state[model.weight].keys()
        return model.weight.detach().clone(), get_optimizer_state_dict(model, optimizer)

    assert torch.equal(run(True)[0], run(False)[0])
    assert torch.equal(run(False, range(2, 5), copy.deepcopy(run(True, range(2))))[0], run(False)[0])


@given(problems(), st.sampled_from([GaLoreAdamW, GaLoreSGD]))
def test_state_is_as_large_as_the_formula_and_no_parameter_is_added(problem, cls):
    (m, n), r, side = problem
    W, b = nn.Parameter(randoms(m, n)), nn.Parameter(randoms(5))
    optimizer = cls([{"params": [W], "rank": r, "side": side}, {"params": [b]}])
    W.grad, b.grad = randoms(m, n, seed=1), randoms(5, seed=1)
    optimizer.step()
    k, K = min(m, n), max(m, n)
    projector, moment = {
        "smaller": (r * k, r * K),
        "larger": (r * K, r * k),
        "left": (r * m, r * n),
        "right": (r * n, r * m),
        "both": (r * (m + n), r * r),
    }[side]
    moments = 2 if cls is GaLoreAdamW else 0
    assert state_numel(optimizer) == projector + moments * (moment + 5)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [W, b]


@pytest.mark.parametrize("basis", [gram_basis, svd_basis, power_basis])
@pytest.mark.parametrize("side", SIDES)
def test_no_state_is_a_view_that_keeps_a_larger_matrix_alive(side, basis):
    _, optimizer = follow(GaLoreAdamW, randoms(9, 8), [randoms(9, 8, seed=1)], rank=2, side=side, basis=basis)
    for value in optimizer.state[optimizer.param_groups[0]["params"][0]].values():
        if isinstance(value, torch.Tensor):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreSGD])
def test_scale_is_a_learning_rate_of_the_projected_group(cls):
    W, gradients = randoms(6, 4), [randoms(6, 4, seed=t) for t in range(1, 6)]
    one = follow(cls, W, gradients, lr=0.02, scale=0.3, rank=2, gap=2)[0][-1]
    close(follow(cls, W, gradients, lr=0.06, scale=0.1, rank=2, gap=2)[0][-1], one)
    assert not torch.allclose(follow(cls, W, gradients, lr=0.02, scale=0.1, rank=2, gap=2)[0][-1], one)


def test_a_rank_above_the_smaller_side_is_refused_and_equal_to_it_works():
    W = nn.Parameter(randoms(6, 4))
    with pytest.raises(ValueError, match=r"rank: got 5, wanted 1 <= rank <= 4 for a \(6, 4\) matrix"):
        GaLoreAdamW([W], rank=5)
    follow(GaLoreAdamW, randoms(6, 4), [randoms(6, 4, seed=1)], rank=4)


def test_a_first_step_with_rate_zero_makes_the_state_and_leaves_the_weight():
    (before, after), optimizer = follow(GaLoreAdamW, randoms(6, 4), [randoms(6, 4, seed=1)], rank=2, lr=0.0)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert torch.equal(before, after)
    assert state.keys() == {"step", "right", "M", "V"} and state["step"] == 1 and bool((state["V"] > 0).all())


# --- The official package ---------------------------------------------------------------------------------------------


def official_basis(G, rank, *, start=None):
    """The official projector's singular vectors, with LAPACK's signs. A right basis comes as a transposed view."""
    if G.is_contiguous():
        return torch.linalg.svd(G, full_matrices=False).U[:, :rank]
    return torch.linalg.svd(G.T, full_matrices=False).Vh[:rank].T


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "side, proj_type",
    [("smaller", "std"), ("larger", "reverse_std"), ("left", "left"), ("right", "right"), ("both", "full")],
)
def test_fourteen_steps_equal_galore_torch(side, proj_type, weight_decay):
    official = pytest.importorskip("galore_torch")
    shapes = [(8, 5), (5, 8), (6, 6), (4, 3), (7,)]  # the last two are not projected

    def run(build):
        weights = [nn.Parameter(randoms(*shape, dtype=torch.float32)) for shape in shapes]
        optimizer = build(weights[:3], weights[3:])
        for t in range(14):
            for i, W in enumerate(weights):
                W.grad = randoms(*W.shape, seed=100 * t + i, dtype=torch.float32)
            optimizer.step()
        return weights

    def ours(projected, rest, gap=5):
        groups = [{"params": projected, "rank": 3, "gap": gap, "scale": 0.25, "side": side}, {"params": rest}]
        return GaLoreAdamW(groups, lr=0.05, weight_decay=weight_decay, basis=official_basis)

    def theirs(projected, rest):
        group = {"params": projected, "rank": 3, "update_proj_gap": 5, "scale": 0.25, "proj_type": proj_type}
        return official.GaLoreAdamW(
            [group, {"params": rest}], lr=0.05, weight_decay=weight_decay, no_deprecation_warning=True
        )

    wanted = run(theirs)
    for W, V in zip(run(ours), wanted):
        torch.testing.assert_close(W, V, rtol=1e-5, atol=1e-5)
    others = run(partial(ours, gap=7))
    assert all((W - V).abs().max() > 1e-2 for W, V in zip(others[:3], wanted[:3]))
    assert all(torch.allclose(W, V, atol=1e-5) for W, V in zip(others[3:], wanted[3:]))


# --- As an optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\]: got 1.0, wanted a finite number in \[0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]: got -0.1"),
        ({"eps": -1e-6}, "eps: got -1e-06"),
        ({"eps": float("nan")}, "eps: got nan"),
        ({"betas": (0.9,)}, r"betas: got \(0.9,\), wanted two numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas: got"),
        ({"betas": 0.9}, "betas: got 0.9"),
    ],
)
def test_adams_options_are_checked_in_every_group(options, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([nn.Parameter(torch.ones(3, 2))], **options)
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(3, 2))], **options}])
    with pytest.raises(TypeError, match=next(iter(options))):
        GaLoreSGD([nn.Parameter(torch.ones(3, 2))], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreSGD])
def test_a_saved_run_resumes_to_the_bit(cls, dtype):
    def build():
        weights = [nn.Parameter(randoms(6, 4).to(dtype)), nn.Parameter(randoms(5).to(dtype))]
        return weights, cls([{"params": weights[:1], "rank": 2}, {"params": weights[1:]}], lr=0.1, gap=3)

    assert_resumes(build, lambda W, t: randoms(*W.shape, seed=t).to(dtype))


def test_a_basis_that_is_no_function_is_refused_at_once(no_shape_checks):
    with pytest.raises(TypeError, match="basis: got 'svd', wanted a function"):
        GaLoreAdamW([nn.Parameter(torch.ones(3, 2))], rank=1, basis="svd")


def test_a_deep_copy_keeps_its_basis_and_goes_its_own_way():
    W = nn.Parameter(randoms(6, 4))
    optimizer = GaLoreAdamW([W], rank=2, gap=1, basis=svd_basis)
    V, twin = copy.deepcopy((W, optimizer))
    assert twin.basis is svd_basis
    W.grad = V.grad = randoms(6, 4, seed=1)
    start = W.detach().clone()
    twin.step()
    assert torch.equal(W, start) and not optimizer.state
    optimizer.step()
    assert torch.equal(W, V)


def test_bfloat16_stays_finite_and_keeps_its_dtype():
    gradients = [randoms(16, 12, seed=t).bfloat16() for t in range(20)]
    path, optimizer = follow(GaLoreAdamW, randoms(16, 12).bfloat16(), gradients, rank=4, gap=5, lr=0.1)
    assert bool(path[-1].isfinite().all()) and path[-1].dtype == torch.bfloat16
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert {state[key].dtype for key in ("right", "M", "V")} == {torch.bfloat16}


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreSGD])
@pytest.mark.parametrize("rank", [2, None])
def test_zero_gradients_move_nothing(cls, rank):
    path, _ = follow(cls, randoms(6, 4), [torch.zeros(6, 4).double()] * 3, rank=rank, gap=2)
    assert torch.equal(path[-1], path[0])


def test_a_step_that_kernels_took_wholly_does_nothing_more(monkeypatch):
    monkeypatch.setattr(GaLoreAdamW, "quick_steps", lambda *arguments: [])
    W = nn.Parameter(randoms(6, 5))
    W.grad, before = randoms(6, 5), W.detach().clone()
    GaLoreAdamW([W], rank=2).step()
    assert torch.equal(W, before)


@pytest.mark.parametrize("cls, lr", [(GaLoreAdamW, 0.2), (GaLoreSGD, 1.0)])
@pytest.mark.parametrize("side", SIDES)
def test_changing_bases_reach_a_target_of_full_rank_and_one_basis_does_not(side, cls, lr):
    """Minimise ‖W - target‖², the rate falling by a scheduler of PyTorch; measured with gap 20: at most 0.0016."""
    target = randoms(10, 8)

    def distance(gap):
        W = nn.Parameter(torch.zeros(10, 8).double())
        optimizer = cls([W], lr=lr, rank=3, gap=gap, scale=0.5, side=side)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        for _ in range(400):
            W.grad = W.detach() - target
            optimizer.step()
            schedule.step()
        return float((W.detach() - target).square().sum() / target.square().sum())

    assert distance(20) < 0.005
    assert distance(NEVER) == pytest.approx(1 - captured_energy(target, svd_basis(target, 3)), abs=1e-4)


def test_a_scheduler_of_pytorch_sets_the_rate_of_every_step():
    W = nn.Parameter(torch.zeros(4, 3).double())
    optimizer = GaLoreSGD([W], lr=1.0, rank=3, scale=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    moves = []
    for _ in range(5):
        before, W.grad = W.detach().clone(), torch.ones(4, 3).double()
        optimizer.step()
        schedule.step()
        moves.append((before - W.detach()).mean().item())
    assert moves == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def train_on_a_share(rank, world, folder):
    """Train on every `world`-th sample of each batch and save the weights: one process of data-parallel training."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 8, 6).double(), torch.randn(5, 8, 3).double()
    model = net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if world > 1:
        net = nn.parallel.DistributedDataParallel(model)
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = GaLoreAdamW([{"params": weights, "rank": 2, "gap": 2}, {"params": biases}], lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        (net(x[step, rank::world]) - y[step, rank::world]).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}of{world}.pt")


@pytest.mark.slow
def test_two_processes_under_ddp_equal_one_on_the_whole_batch(tmp_path):
    in_processes(train_on_a_share, tmp_path)
    train_on_a_share(0, 1, tmp_path)
    names = ("0of2", "1of2", "0of1")
    first, second, single = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names)
    for key, value in single.items():
        assert torch.equal(first[key], second[key])
        close(first[key], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1.0])
@pytest.mark.parametrize("rank", [None, 2])
def test_float16_weights_take_the_steps_of_float32_ones(rank, size):
    """Moments in float16 would vanish below 6e-8, and the step would be divided by eps alone."""
    ends, options = [], {} if rank is None else {"rank": rank, "scale": 1.0}
    for dtype in (torch.float16, torch.float32):
        gradients = [(size * randoms(8, 6, seed=t).float()).half().to(dtype) for t in range(20)]
        path, optimizer = follow(GaLoreAdamW, randoms(8, 6).half().to(dtype), gradients, lr=0.01, eps=1e-12, **options)
        (state,) = optimizer.state.values()
        assert path[-1].dtype == dtype and state["M"].dtype == state["V"].dtype == torch.float32
        ends.append(path[-1].float())
    assert (ends[0] - ends[1]).abs().max() < 0.02 < (ends[1] - randoms(8, 6).float()).abs().max()
