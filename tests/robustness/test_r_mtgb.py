"""R-MTGB's equations and its three blocks, with scikit-learn's stump as the tree."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.tree import DecisionTreeRegressor

from lowrank_ref.core.registry import papers
from lowrank_ref.robustness import r_mtgb
from lowrank_ref.robustness.r_mtgb import (
    CROSS_ENTROPY,
    SQUARED,
    Forest,
    boost,
    final_scores,
    gate,
    gate_gradient,
    gated_targets,
    outlier_score,
    raw_score,
    softmax,
    staged_scores,
    task_functions,
    tree_values,
)

each_loss = pytest.mark.parametrize("loss", [SQUARED, CROSS_ENTROPY], ids=["squared", "cross-entropy"])


def stump(X, targets):
    return DecisionTreeRegressor(max_leaf_nodes=2, random_state=0).fit(X, targets)


def problem(seed=0, n=90, tasks=3, outputs=1, loss=SQUARED):
    """Inputs, targets, tasks and θ₀; in the last task the sign of the rule is turned."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, (n, 4)).astype(np.float32)
    task = rng.permutation(np.arange(n) % tasks)
    sign = np.where(task == tasks - 1, -1.0, 1.0)[:, None]
    Y = sign * np.sin(3 * X @ rng.normal(size=(4, outputs))) + 0.1 * rng.normal(size=(n, outputs))
    if loss is CROSS_ENTROPY:
        Y = np.eye(outputs)[Y.argmax(axis=1)]
    return X, Y.astype(np.float64), task, 0.1 * rng.normal(size=tasks)


def pieces(seed=0, n=20, tasks=3, outputs=2):
    rng = np.random.default_rng(seed)
    return [*rng.normal(size=(4, n, outputs)), rng.normal(size=tasks), rng.integers(0, tasks, n)]


def fitted(rounds, *, fit=stump, **options):
    X, Y, task, theta = problem()
    forest = boost(X, Y, task, theta, fit=fit, rounds=rounds, **options)
    return forest, X, Y, task


# --- equations against slow loops


@given(n=st.integers(1, 9), tasks=st.integers(1, 4), outputs=st.integers(1, 3), seed=st.integers(0, 99))
def test_raw_score_is_the_loop(n, tasks, outputs, seed):
    A, N, O, S, theta, task = pieces(seed, n, tasks, outputs)
    F = raw_score(A, N, O, S, theta, task)
    for i in range(n):
        s = 1 / (1 + np.exp(-theta[task[i]]))
        for k in range(outputs):
            want = A[i, k] + (1 - s) * N[i, k] + s * O[i, k] + S[i, k]
            assert abs(F[i, k] - want) < 1e-12


@given(n=st.integers(1, 9), tasks=st.integers(1, 4), outputs=st.integers(1, 3), seed=st.integers(0, 99))
def test_gated_targets_and_gate_gradient_are_the_loops(n, tasks, outputs, seed):
    u, N, O, _, theta, task = pieces(seed, n, tasks, outputs)
    for_outlier, for_other = gated_targets(u, theta, task)
    slope = np.zeros(tasks)
    for i in range(n):
        s = 1 / (1 + np.exp(-theta[task[i]]))
        for k in range(outputs):
            assert abs(for_outlier[i, k] - s * u[i, k]) < 1e-12
            assert abs(for_other[i, k] - (1 - s) * u[i, k]) < 1e-12
            slope[task[i]] += -u[i, k] * (O[i, k] - N[i, k]) * s * (1 - s)
    np.testing.assert_allclose(gate_gradient(u, O, N, theta, task), slope, atol=1e-12)


def torch_loss(loss, Y, F):
    if loss is SQUARED:
        return 0.5 * (Y - F).square().sum()
    return torch.nn.functional.cross_entropy(F, Y, reduction="sum")


@each_loss
@given(seed=st.integers(0, 99), outputs=st.integers(1, 4))
def test_residuals_targets_and_gate_gradient_are_autograd(loss, seed, outputs):
    A, N, O, S, theta, task = pieces(seed, outputs=outputs)
    Y = np.eye(outputs)[np.random.default_rng(seed).integers(0, outputs, len(A))]
    tensors = [torch.tensor(value, requires_grad=True) for value in (N, O, theta)]
    s = torch.sigmoid(tensors[2])[task][:, None]
    F = torch.tensor(A) + (1 - s) * tensors[0] + s * tensors[1] + torch.tensor(S)
    F.retain_grad()
    value = torch_loss(loss, torch.tensor(Y), F)
    value.backward()

    score = raw_score(A, N, O, S, theta, task)
    assert abs(loss.value(Y, score) - value.item()) < 1e-9
    u = loss.residual(Y, score)
    for_outlier, for_other = gated_targets(u, theta, task)
    slope = gate_gradient(u, O, N, theta, task)
    for got, want in ((u, -F.grad), (for_other, -tensors[0].grad), (for_outlier, -tensors[1].grad)):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-9)
    np.testing.assert_allclose(slope, tensors[2].grad.numpy(), atol=1e-9)


@each_loss
def test_gate_gradient_is_the_finite_difference(loss):
    A, N, O, S, theta, task = pieces()
    Y = np.eye(2)[task % 2]
    slope = gate_gradient(loss.residual(Y, raw_score(A, N, O, S, theta, task)), O, N, theta, task)
    for r, step in enumerate(1e-5 * np.eye(3)):
        high, low = (loss.value(Y, raw_score(A, N, O, S, theta + d, task)) for d in (step, -step))
        assert abs((high - low) / 2e-5 - slope[r]) < 1e-6


def test_gate_is_finite_far_out():
    theta = np.array([-1e4, -701.0, -40.0, 0.0, 40.0, 701.0, 1e4])
    with np.errstate(all="raise", under="ignore"):
        g = gate(theta)
    assert np.isfinite(g).all() and (g >= 0).all() and (g <= 1).all() and (np.diff(g) >= 0).all()
    assert g[1] > 0 and g[3] == 0.5
    np.testing.assert_allclose(g + gate(-theta), 1, atol=1e-15)


def test_softmax_is_finite_and_sums_to_one():
    p = softmax(np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(p, [[1, 0, 0], [1 / 3] * 3], atol=1e-15)
    assert CROSS_ENTROPY.value(np.array([[0.0, 1.0]]), np.array([[1e4, 0.0]])) == 1e4


# --- the algorithm against a slow copy of its definition


@each_loss
def test_boost_is_the_slow_definition(loss):
    """Trees are kept and evaluated anew in every round, row by row; nothing is accumulated."""
    X, Y, task, theta = problem(n=40, outputs=2, loss=loss)
    lr, gate_lr = 0.3, 0.2
    forest = boost(X, Y, task, theta, fit=stump, rounds=(2, 3, 2), loss=loss, lr=lr, gate_lr=gate_lr)
    shared, pairs, own, th = [], [], [[], [], []], theta.copy()

    def total(trees, i):
        return lr * sum((tree.predict(X[i : i + 1])[0] for tree in trees), np.zeros(2))

    def u():
        rows = []
        for i, r in enumerate(task):
            s = 1 / (1 + np.exp(-th[r]))
            F = total(shared, i) + total(own[r], i)
            F = F + s * total([o for o, _ in pairs], i) + (1 - s) * total([n for _, n in pairs], i)
            rows.append(Y[i] - F if loss is SQUARED else Y[i] - np.exp(F) / np.exp(F).sum())
        return np.array(rows)

    for _ in range(2):
        shared.append(stump(X, u()))
    for _ in range(3):
        r, s = u(), 1 / (1 + np.exp(-th))
        slope = [
            -sum(
                r[i] @ (total([o for o, _ in pairs], i) - total([n for _, n in pairs], i))
                for i in np.where(task == t)[0]
            )
            for t in range(3)
        ]
        pairs.append((stump(X, s[task, None] * r), stump(X, (1 - s)[task, None] * r)))
        th = th - gate_lr * np.array(slope) * s * (1 - s)
    for _ in range(2):
        r = u()
        for t in range(3):
            own[t].append(stump(X[task == t], r[task == t]))

    np.testing.assert_allclose(forest.theta_path[-1], th, atol=1e-12)
    residual = loss.residual(Y, final_scores(forest, X, task, outputs=2, lr=lr))
    np.testing.assert_allclose(residual, u(), atol=1e-12)


def test_only_block_1_is_gradient_boosting():
    forest, X, Y, task = fitted((30, 0, 0))
    peer = GradientBoostingRegressor(init="zero", max_depth=1, n_estimators=30)
    want = peer.fit(X, Y[:, 0]).predict(X)
    np.testing.assert_allclose(final_scores(forest, X, task, outputs=1)[:, 0], want, atol=1e-10)


def test_only_block_3_is_one_booster_per_task():
    forest, X, Y, task = fitted((0, 0, 30))
    F = final_scores(forest, X, task, outputs=1)[:, 0]
    for r in range(3):
        peer = GradientBoostingRegressor(init="zero", max_depth=1, n_estimators=30)
        want = peer.fit(X[task == r], Y[task == r, 0]).predict(X[task == r])
        np.testing.assert_allclose(F[task == r], want, atol=1e-10)


def test_one_task_with_theta_zero_is_boosting_at_half_the_rate():
    X, Y, _, _ = problem()
    task, theta = np.zeros(len(X), dtype=int), np.zeros(1)
    gated = boost(X, Y, task, theta, fit=stump, rounds=(0, 20, 0), lr=0.2)
    plain = boost(X, Y, task, theta, fit=stump, rounds=(20, 0, 0), lr=0.1)
    assert all((th == 0).all() for th in gated.theta_path)
    for outlier, other in zip(gated.outlier, gated.other):
        assert np.array_equal(outlier.predict(X), other.predict(X))
    got, want = (final_scores(f, X, task, outputs=1, lr=lr) for f, lr in ((gated, 0.2), (plain, 0.1)))
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_equal_gates_at_zero_never_part():
    X, Y, task, theta = problem()
    forest = boost(X, Y, task, 0 * theta, fit=stump, rounds=(0, 20, 0))
    assert not np.any(forest.theta_path)


def test_the_first_gated_round_leaves_theta():
    path = fitted((3, 2, 0))[0].theta_path
    assert np.array_equal(path[0], path[1]) and not np.array_equal(path[1], path[2])


@each_loss
def test_turning_theta_swaps_the_groups_and_nothing_else(loss):
    X, Y, task, theta = problem(outputs=2, loss=loss)
    one, two = (boost(X, Y, task, th, fit=stump, rounds=(5, 20, 5), loss=loss) for th in (theta, -theta))
    assert np.array_equal(np.stack(one.theta_path), -np.stack(two.theta_path))
    assert all(np.array_equal(a.predict(X), b.predict(X)) for a, b in zip(one.outlier, two.other))
    assert all(np.array_equal(a.predict(X), b.predict(X)) for a, b in zip(one.other, two.outlier))
    F, G = (final_scores(f, X, task, outputs=2) for f in (one, two))
    assert np.array_equal(F, G)
    assert np.array_equal(outlier_score(one.theta_path[-1]), outlier_score(two.theta_path[-1]))


def test_renumbering_tasks_renumbers_theta():
    X, Y, task, theta = problem()
    new = np.array([2, 0, 1])  # old number -> new number
    moved = np.empty(3)
    moved[new] = theta
    one = boost(X, Y, task, theta, fit=stump, rounds=(2, 20, 5))
    two = boost(X, Y, new[task], moved, fit=stump, rounds=(2, 20, 5))
    np.testing.assert_allclose(two.theta_path[-1][new], one.theta_path[-1], atol=1e-12)
    F, G = (final_scores(f, X, t, outputs=1) for f, t in ((one, task), (two, new[task])))
    np.testing.assert_allclose(F, G, atol=1e-12)


def test_the_order_of_rows_does_not_matter():
    X, Y, task, theta = problem()
    order = np.random.default_rng(1).permutation(len(X))
    one = boost(X, Y, task, theta, fit=stump, rounds=(2, 20, 5))
    two = boost(X[order], Y[order], task[order], theta, fit=stump, rounds=(2, 20, 5))
    F, G = (final_scores(f, X, task, outputs=1) for f in (one, two))
    np.testing.assert_allclose(F, G, atol=1e-10)


@each_loss
def test_the_loss_falls(loss):
    """Guaranteed for squared error in blocks 1 and 3; in block 2 and for cross-entropy it holds at this small rate."""
    X, Y, task, theta = problem(outputs=2, loss=loss)
    path = boost(X, Y, task, theta, fit=stump, rounds=(15, 30, 15), loss=loss).loss_path
    assert len(path) == 60 and (np.diff(path) <= 1e-12).all() and path[-1] < 0.9 * path[0]


def test_squared_error_falls_in_blocks_1_and_3_at_rate_1():
    for rounds in ((30, 0, 0), (0, 0, 30)):
        path = fitted(rounds, lr=1.0)[0].loss_path
        assert (np.diff(path) <= 1e-12).all()


@given(m1=st.integers(0, 3), m2=st.integers(0, 3), m3=st.integers(0, 3), tasks=st.integers(1, 4))
def test_number_of_trees_and_stages(m1, m2, m3, tasks):
    if m1 + m2 + m3 == 0:
        return
    X, Y, task, theta = problem(n=20, tasks=tasks)
    forest = boost(X, Y, task, theta, fit=stump, rounds=(m1, m2, m3))
    trees = [*forest.shared, *forest.outlier, *forest.other, *(tree for own in forest.specific for tree in own)]
    assert len(trees) == m1 + 2 * m2 + tasks * m3
    assert np.shape(forest.theta_path) == (m2 + 1, tasks)
    assert len(list(staged_scores(forest, X, task, outputs=1))) == m1 + m2 + m3 == len(forest.loss_path)


def test_stages_reproduce_the_losses():
    forest, X, Y, task = fitted((4, 6, 3))
    losses = [SQUARED.value(Y, F) for F in staged_scores(forest, X, task, outputs=1)]
    np.testing.assert_allclose(losses, forest.loss_path, rtol=1e-12)


def test_prediction_of_a_row_does_not_depend_on_the_rows_beside_it():
    """The official code numbers the tasks of the test set anew."""
    forest, X, _, task = fitted((4, 20, 3))
    F = final_scores(forest, X, task, outputs=1)
    last = task == 2
    np.testing.assert_array_equal(final_scores(forest, X[last], task[last], outputs=1), F[last])


def test_no_tree_scores_zero():
    assert not final_scores(Forest(theta_path=[np.zeros(2)]), np.ones((3, 2)), np.zeros(3, int), outputs=2).any()


def test_the_gate_finds_the_turned_task():
    for seed in range(5):
        X, _, task, theta = problem(seed, n=300, tasks=5)
        Y = np.where(task == 4, -1.0, 1.0)[:, None] * X[:, :1].astype(np.float64)
        forest = boost(X, Y, task, theta, fit=stump, rounds=(0, 60, 0))
        score = outlier_score(forest.theta_path[-1])
        assert score[4] > 0.8 and score[:4].max() < 0.2


def test_outlier_score_follows_the_smaller_group():
    theta = np.array([3.0, 2.0, 4.0, -3.0])
    assert np.array_equal(outlier_score(theta), outlier_score(-theta))
    assert outlier_score(theta).argmax() == 3


def test_options_of_the_gate():
    X, Y, task, theta = problem()
    last = {}
    for name, options in {
        "sum": {},
        "mean": {"gate_mean": True},
        "l2": {"gate_l2": 5.0},
        "slow": {"gate_lr": 1e-9},
    }.items():
        last[name] = np.abs(boost(X, Y, task, theta, fit=stump, rounds=(0, 40, 0), **options).theta_path[-1]).max()
    assert last["mean"] < last["sum"] and last["l2"] < last["sum"]
    assert abs(last["slow"] - np.abs(theta).max()) < 1e-6
    counts = np.bincount(task)
    one = boost(X, Y, task, theta, fit=stump, rounds=(0, 2, 0)).theta_path
    two = boost(X, Y, task, theta, fit=stump, rounds=(0, 2, 0), gate_mean=True).theta_path
    np.testing.assert_allclose((two[2] - two[1]) * counts, one[2] - one[1], atol=1e-12)


# --- rank


@given(n=st.integers(3, 20), tasks=st.integers(3, 9), outputs=st.integers(1, 2), seed=st.integers(0, 99))
def test_the_table_of_task_functions_has_rank_2(n, tasks, outputs, seed):
    A, N, O, _, theta, _ = pieces(seed, n, tasks, outputs)
    table = task_functions(A, N, O, theta)
    for k in range(outputs):
        S = np.linalg.svd(table[:, :, k], compute_uv=False)
        assert S[2] < 1e-12 * S[0]
        S = np.linalg.svd(table[:, :, k] - table[:, :, k].mean(axis=0), compute_uv=False)
        assert S[1] < 1e-12 * max(S[0], 1.0)


def test_rank_of_a_fitted_model_before_and_after_block_3():
    forest, X, _, _ = fitted((5, 20, 5))
    A = 0.1 * sum(tree_values(tree, X) for tree in forest.shared)
    O = 0.1 * sum(tree_values(tree, X) for tree in forest.outlier)
    N = 0.1 * sum(tree_values(tree, X) for tree in forest.other)
    table = task_functions(A, N, O, forest.theta_path[-1])[:, :, 0]
    assert np.linalg.matrix_rank(table) == 2
    whole = [final_scores(forest, X, np.full(len(X), r), outputs=1)[:, 0] for r in range(3)]
    assert np.linalg.matrix_rank(np.stack(whole)) == 3


# --- bad input


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rounds": (0, 0, 0)}, ValueError, r"rounds: got \(0, 0, 0\), wanted at least one round"),
        ({"rounds": (1, -1, 0)}, ValueError, r"rounds\[1\]: got -1, wanted an integer >= 0"),
        ({"rounds": (1.0, 1, 1)}, TypeError, "rounds"),
        ({"lr": 0.0}, ValueError, "lr: got 0.0, wanted"),
        ({"gate_lr": float("nan")}, ValueError, "gate_lr: got nan, wanted"),
        ({"gate_l2": -1.0}, ValueError, "gate_l2: got -1.0, wanted"),
        (
            {"theta": np.zeros(4)},
            ValueError,
            r"task: got \[30, 30, 30, 0\] rows per task, wanted at least one in each of 4",
        ),
        (
            {"theta": np.zeros(2)},
            ValueError,
            r"task: got \[30, 30, 30\] rows per task, wanted at least one in each of 2",
        ),
    ],
)
def test_bad_settings_raise(change, error, message):
    X, Y, task, theta = problem()
    settings = {"theta": theta, "fit": stump, "rounds": (1, 1, 1), **change}
    with pytest.raises(error, match=message):
        boost(X, Y, task, **settings)


# --- without scikit-learn


def test_equations_and_registry_work_without_scikit_learn():
    code = """
import sys
sys.modules["sklearn"] = None  # importing it now raises ModuleNotFoundError
from lowrank_ref.core.registry import papers
import lowrank_ref.robustness
import lowrank_ref.robustness.r_mtgb
assert "r_mtgb" in papers()
for line in ("from lowrank_ref.robustness import RMTGBRegressor", "import lowrank_ref.robustness.r_mtgb_sklearn"):
    try:
        exec(line)
    except ImportError as error:
        assert 'pip install "scikit-learn>=1.6"' in str(error), error
    else:
        raise AssertionError(line)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_card():
    assert papers()["r_mtgb"] is r_mtgb.PAPER
