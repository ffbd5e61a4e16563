"""Maestro: equations against loops, the exact invariants in float64, and what training linear maps finds."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.compression.maestro import (
    MaestroLinear,
    group_lasso,
    importance,
    nested_optimum,
    prefix_product,
    rank_pairs,
    ranks_within,
    strengths,
    tail_norms,
)
from lowrank_ref.core.io import load_tensors, save_tensors

sizes = st.tuples(st.integers(1, 8), st.integers(1, 8))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def factors(m, n, r=None):
    r = min(m, n) if r is None else r
    return gaussian(r, n), gaussian(m, r, seed=1)


def linear(m=5, n=7, *, dtype=torch.float64, bias=True):
    base = nn.Linear(n, m, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(7), dtype=torch.float64))
    return base


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# Each equation against a loop.


@given(sizes, st.data())
def test_prefix_product_by_loops(shape, data):
    (m, n), r = shape, 5
    A, B = factors(m, n, r)
    b = data.draw(st.integers(1, r))
    W = prefix_product(A, B, b)
    for i in range(m):
        for j in range(n):
            assert W[i, j].item() == pytest.approx(sum(B[i, k].item() * A[k, j].item() for k in range(b)))


@given(sizes)
def test_group_lasso_and_importance_by_loops(shape):
    m, n = shape
    A, B = factors(m, n)
    lasso, wanted = 0.0, []
    for b in range(len(A)):
        a = math.sqrt(sum(A[k, j].item() ** 2 for k in range(b, len(A)) for j in range(n)))
        c = math.sqrt(sum(B[i, k].item() ** 2 for k in range(b, len(A)) for i in range(m)))
        lasso += a + c
        wanted.append(a * c)
    assert group_lasso(A, B).item() == pytest.approx(lasso, abs=1e-9)
    assert importance(A, B).tolist() == pytest.approx(wanted, abs=1e-9)


def test_the_lasso_weighs_a_late_component_by_its_place():
    for b in range(1, 6):  # component b alone lies in the groups 1 to b
        A, B = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
        A[b - 1, 0], B[0, b - 1] = 3.0, 2.0
        assert group_lasso(A, B).item() == pytest.approx(5 * b, abs=2e-5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_rank_pairs_by_loops(ranks):
    pairs = []
    for layer in range(len(ranks)):
        for b in range(ranks[layer]):
            pairs.append((layer, b + 1))
    assert rank_pairs(ranks) == pairs and len(pairs) == sum(ranks)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 40))
def test_ranks_within_is_the_best_common_threshold(ranks, extra):
    importances = [gaussian(r, seed=i).abs().sort(descending=True).values for i, r in enumerate(ranks)]
    costs = [float(i + 1) for i in range(len(ranks))]
    budget = sum(costs) + extra
    found = ranks_within(importances, costs, budget)

    def at(threshold):
        return [max(1, sum(v >= threshold for v in i.tolist())) for i in importances]

    def price(ranks):
        return sum(r * c for r, c in zip(ranks, costs))

    family = [[1] * len(ranks)] + [at(t) for i in importances for t in i.tolist()]
    assert found in family and price(found) <= budget
    assert price(found) == max(price(f) for f in family if price(f) <= budget)


def test_ranks_within_takes_all_when_it_can_and_one_at_least():
    importances = [torch.tensor([3.0, 2.0]), torch.tensor([0.1])]
    assert ranks_within(importances, [1, 1], 3) == [2, 1]
    assert ranks_within(importances, [1, 1], 2) == [1, 1]
    for costs, budget, message in [([1, 1], 1.5, "budget"), ([1], 9, "costs: got 1"), ([1, 0], 9, "costs: got 0.0")]:
        with pytest.raises(ValueError, match=message):
            ranks_within(importances, costs, budget)


@given(sizes)
def test_strengths_by_loops_and_singular_values_after_an_svd(shape):
    A, B = factors(*shape)
    parts = [torch.outer(B[:, b], A[b]).square().sum().sqrt().item() for b in range(len(A))]
    assert strengths(A, B).tolist() == pytest.approx(parts)
    assert_close(strengths(*nested_optimum(B @ A)), torch.linalg.svdvals(B @ A))


def test_ranks_within_counts_strengths_in_any_order():
    assert ranks_within([torch.tensor([0.2, 3.0, 2.0]), torch.tensor([1.0, 2.5])], [1, 1], 4) == [2, 2]
    assert ranks_within([torch.tensor([0.2, 3.0, 2.0]), torch.tensor([1.0, 2.5])], [1, 1], 3) == [2, 1]


def test_a_long_tail_of_small_components_outbids_strong_ones_by_importance_only():
    few, many = torch.tensor([1.0, 0.8, 0.6, 0.4]), torch.tensor([1.0] + [0.05] * 60)

    def relative(values):
        return values / values.norm()

    pairs = [(s.sqrt()[:, None], s.sqrt()[None]) for s in (few, many)]  # both factors carry half of each strength
    assert ranks_within([relative(strengths(A, B)) for A, B in pairs], [1, 1], 6) == [4, 1]
    by_tails = ranks_within([importance(A, B) / importance(A, B)[0] for A, B in pairs], [1, 1], 6)
    assert by_tails[1] > 1 and by_tails[0] < 4  # together, the small ones are worth 3


# Exact invariants, numbered as in the chapter.


@given(sizes)
def test_1_starts_as_the_dense_layer_and_prefixes_are_best(shape):
    base = linear(*shape)
    layer, x = MaestroLinear.from_linear(base), gaussian(4, shape[1])
    assert_close(layer(x), base(x))
    assert_close(layer.dense_weight(), base.weight)
    S = torch.linalg.svdvals(base.weight)
    for b in range(1, min(shape) + 1):
        gap = prefix_product(layer.A, layer.B, b) - base.weight
        assert gap.square().sum().item() == pytest.approx(S[b:].square().sum().item(), abs=1e-10)
    assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0))  # the two factors share each singular value evenly


@given(sizes, st.data())
def test_2_a_cut_is_a_mask_in_outputs_and_gradients(shape, data):
    layer, x = MaestroLinear.from_linear(linear(*shape)), gaussian(4, shape[1])
    r = min(shape)
    layer.cut = b = data.draw(st.integers(1, r))
    y = layer(x)
    y.pow(3).sum().backward()
    mask = (torch.arange(r) < b).double()
    A, B = (M.detach().clone().requires_grad_() for M in (layer.A, layer.B))
    masked = F.linear(F.linear(x, A) * mask, B, layer.bias.detach())
    masked.pow(3).sum().backward()
    assert_close(y, masked, 1e-10)
    torch.testing.assert_close(layer.A.grad, A.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.B.grad, B.grad, rtol=1e-9, atol=1e-9)
    assert not layer.A.grad[b:].any() and not layer.B.grad[:, b:].any()


@given(sizes)
def test_3_the_lasso_of_ones_and_importance_that_never_rises(shape):
    m, n = shape
    r = min(shape)
    A, B = torch.ones(r, n, dtype=torch.float64), torch.ones(m, r, dtype=torch.float64)
    wanted = sum(math.sqrt((r - b + 1) * n) + math.sqrt((r - b + 1) * m) for b in range(1, r + 1))
    assert group_lasso(A, B).item() == pytest.approx(wanted)
    values = importance(*factors(m, n)).tolist()
    assert values == sorted(values, reverse=True)


def nested_loss(A, B, C, root):
    """Mean over b of E‖Cx - B[:, :b]A[:b]x‖² for inputs with E[xxᵀ] = root rootᵀ."""
    return torch.stack([((C - B[:, :b] @ A[:b]) @ root).square().sum() for b in range(1, len(A) + 1)]).mean()


@given(sizes, st.booleans())
def test_6_the_nested_optimum_is_stationary_and_each_prefix_is_the_best(shape, white):
    C, n = gaussian(*shape, seed=3), shape[1]
    X = gaussian(n + 3, n, seed=4)
    covariance = None if white else X.T @ X / len(X)
    root = torch.eye(n, dtype=torch.float64) if white else torch.linalg.cholesky(covariance)
    A, B = (M.clone().requires_grad_() for M in nested_optimum(C, covariance))
    nested_loss(A, B, C, root).backward()
    assert A.grad.abs().max() < 1e-9 and B.grad.abs().max() < 1e-9
    S = torch.linalg.svdvals(C @ root)
    for b in range(1, len(A) + 1):  # Eckart and Young: no matrix of rank b does better
        gap = ((C - prefix_product(A, B, b).detach()) @ root).square().sum()
        assert gap.item() == pytest.approx(S[b:].square().sum().item(), abs=1e-9)


def descend(C, root, *, nested, steps=3000, seed=1):
    """Minimise the nested loss, or only its last term, from random factors with Adam; return A and B."""
    r = min(C.shape)
    A, B = (M.mul_(0.3).requires_grad_() for M in (gaussian(r, C.shape[1], seed=seed), gaussian(len(C), r, seed=9)))
    optimizer = torch.optim.Adam([A, B], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nested_loss(A, B, C, root) if nested else ((C - B @ A) @ root).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    return A.detach(), B.detach()


def orthogonal(n, seed):
    return torch.linalg.qr(gaussian(n, n, seed=seed)).Q


def target():
    """A (5, 4) map with singular values 4, 2, 1, 0.5."""
    return orthogonal(5, 1)[:, :4] * torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64) @ orthogonal(4, 2).T


def worst_prefix(A, B, C, root):
    """Largest excess over the Eckart-Young error of any prefix, as a share of the whole energy."""
    S2 = torch.linalg.svdvals(C @ root).square()
    gaps = [((C - B[:, :b] @ A[:b]) @ root).square().sum() - S2[b:].sum() for b in range(1, len(A) + 1)]
    return max(g.item() for g in gaps) / S2.sum().item()


def test_ordered_training_of_a_linear_map_finds_its_svd_and_plain_training_does_not():
    C, root = target(), torch.eye(4, dtype=torch.float64)
    A, B = descend(C, root, nested=True)
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    assert (A.norm(dim=1) * B.norm(dim=0)).tolist() == pytest.approx(S.tolist(), rel=1e-6)
    for b in range(4):  # component by component: the singular vectors, up to a sign
        assert_close(B[:, b : b + 1] @ A[b : b + 1], S[b] * U[:, b : b + 1] @ Vh[b : b + 1], 1e-6)
    assert worst_prefix(A, B, C, root) < 1e-10
    A, B = descend(C, root, nested=False)
    assert (C - B @ A).square().sum() < 1e-10  # as exact as a whole
    assert worst_prefix(A, B, C, root) > 0.05


def test_ordered_training_of_a_linear_autoencoder_finds_pca():
    decomposition = pytest.importorskip("sklearn.decomposition")
    X = gaussian(60, 4, seed=5) * torch.tensor([2.0, 1.4, 0.9, 0.5], dtype=torch.float64) @ orthogonal(4, 6).T
    X = X - X.mean(dim=0)
    root = X.T / math.sqrt(len(X))  # root rootᵀ is the covariance
    A, B = descend(torch.eye(4, dtype=torch.float64), root, nested=True, steps=4000)
    axes = torch.from_numpy(decomposition.PCA(4).fit(X.numpy()).components_)
    for b in range(1, 5):
        assert_close(B[:, :b] @ A[:b], axes[:b].T @ axes[:b], 1e-5)


def test_ordered_training_counts_directions_by_their_use():
    C = target()
    V = orthogonal(4, 2)
    use = torch.tensor([0.25, 0.75, 2.0, 6.0], dtype=torch.float64)  # the weakest direction of C is used most
    root = V * use
    A, B = descend(C, root, nested=True, steps=4000)
    assert worst_prefix(A, B, C, root) < 1e-6
    wanted = nested_optimum(C, root @ root.T)
    for b in range(1, 5):
        assert_close(B[:, :b] @ A[:b], prefix_product(*wanted, b), 1e-3)
    first = A[0] / A[0].norm()
    assert abs(first @ V[:, 3]) > 0.999 and abs(first @ V[:, 0]) < 0.01
    svd_A, svd_B = nested_optimum(C)
    assert worst_prefix(svd_A, svd_B, C, root) > 0.3  # the SVD of C, which does not see the data, keeps the wrong one


@given(sizes)
def test_8_plain_layers_compute_what_the_cut_layer_does_with_fewer_numbers(shape):
    layer, x = MaestroLinear.from_linear(linear(*shape)), gaussian(4, shape[1])
    m, n = shape
    for b in range(1, min(shape) + 1):
        plain = layer.plain(b)
        layer.cut = b
        assert_close(plain(x), layer(x))
        numbers = sum(p.numel() for p in plain.parameters())
        assert numbers == min(b * (m + n), m * n) + m
        assert type(plain) is (nn.Linear if b * (m + n) > m * n else nn.Sequential)
        assert all(type(p) is nn.Linear for p in plain.modules() if not isinstance(p, nn.Sequential))
    assert plain.training
    assert not layer.eval().plain().training


def test_9_the_gradient_at_exact_zero_is_finite():
    A, B = torch.zeros(3, 4, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    group_lasso(A, B).backward()
    importance(A, B).sum().backward()
    assert bool(torch.isfinite(A.grad).all()) and bool(torch.isfinite(B.grad).all())
    assert not A.grad.any()  # and zero: what is gone stays


def test_small_tails_survive_half_precision():
    M = torch.ones(300, 1, dtype=torch.bfloat16)
    assert tail_norms(M).dtype == torch.float32
    assert_close(tail_norms(M), torch.arange(300, 0, -1).float().sqrt(), 1e-4)


# The layer.


def test_by_hand():
    A, B = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0], [0.0, 1.0]])
    layer = MaestroLinear(A, B, torch.tensor([0.5, 0.0]))
    x = torch.tensor([[1.0, 1.0]])
    assert layer(x).tolist() == [[10.5, 1.0]]
    layer.cut = 1
    assert layer(x).tolist() == [[9.5, 0.0]]


def test_cuts_act_in_training_only_and_never_exceed_the_rank():
    layer = MaestroLinear.from_linear(linear())
    assert layer.width == layer.rank == 5
    layer.cut = 2
    assert layer.width == 2 and layer.eval().width == 5
    layer.train()
    layer.rank = 1
    assert layer.width == 1
    assert layer.dense_weight().shape == (5, 7) and torch.linalg.matrix_rank(layer.dense_weight()) == 1


def test_all_parameters_train_and_count_as_stated():
    for bias in (True, False):
        layer = MaestroLinear.from_linear(linear(bias=bias))
        layer(gaussian(4, 7)).square().sum().backward()
        assert all(p.grad.any() for p in layer.parameters())
        assert sum(p.numel() for p in layer.parameters()) == 5 * (5 + 7) + 5 * bias


def test_the_base_is_neither_shared_nor_written():
    base = linear()
    before = copy.deepcopy(base.state_dict())
    layer = MaestroLinear.from_linear(base)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert all(p.requires_grad for p in base.parameters())


def test_conv1d_gives_what_the_transposed_linear_layer_gives():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv, base, x = Conv1D(5, 7).double(), linear(), gaussian(4, 7)
    conv.weight, conv.bias = nn.Parameter(base.weight.T.detach().clone()), nn.Parameter(base.bias.detach().clone())
    layer = MaestroLinear.from_linear(conv)
    assert_close(layer(x), base(x))
    assert_close(layer.plain(2)(x), MaestroLinear.from_linear(base).plain(2)(x))


def test_state_dict_and_file_round_trip_carry_the_rank(tmp_path):
    old, new = MaestroLinear.from_linear(linear()), MaestroLinear(*factors(5, 7), gaussian(5))
    old.rank = 3
    x = gaussian(4, 7)
    torch.save(old.state_dict(), tmp_path / "x")
    new.load_state_dict(torch.load(tmp_path / "x", weights_only=True))
    assert new.rank == 3 and torch.equal(new(x), old(x))
    save_tensors(old.state_dict(), tmp_path / "y", kind="maestro")
    again = MaestroLinear(*factors(5, 7), gaussian(5))
    again.load_state_dict(load_tensors(tmp_path / "y", kind="maestro"))
    assert again.rank == 3 and torch.equal(again(x), old(x))
    (tmp_path / "y").write_bytes((tmp_path / "y").read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_tensors(tmp_path / "y", kind="maestro")


def test_a_foreign_state_raises():
    layer = MaestroLinear.from_linear(linear())
    state = layer.state_dict()
    for wrong in ({**state, "A": gaussian(2, 7)}, {k: v for k, v in state.items() if k != "B"}, linear().state_dict()):
        with pytest.raises(RuntimeError):
            layer.load_state_dict(wrong)
    with pytest.raises(ValueError, match="rank: got 6"):
        layer.load_state_dict({**state, "_extra_state": torch.tensor(6)})


def test_deepcopy_is_equal_and_independent():
    layer, x = MaestroLinear.from_linear(linear()), gaussian(4, 7)
    layer.rank, layer.cut = 4, 2
    other = copy.deepcopy(layer)
    assert (other.rank, other.cut) == (4, 2) and torch.equal(other(x), layer(x))
    other.rank = 1
    with torch.no_grad():
        other.A.zero_()
    assert layer.rank == 4 and layer.A.any()


def test_half_precision_and_autocast_stay_finite():
    layer = MaestroLinear.from_linear(linear(dtype=torch.bfloat16))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    y = layer(gaussian(4, 7).bfloat16())
    (y.float().square().sum() + group_lasso(layer.A, layer.B)).backward()
    assert y.dtype == torch.bfloat16 and all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    layer, x = MaestroLinear.from_linear(linear(dtype=torch.float32)), gaussian(4, 7).float()
    layer.cut = 3
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)


def test_compiles_to_one_graph(no_shape_checks):
    torch._dynamo.reset()
    layer, x = MaestroLinear.from_linear(linear()), gaussian(4, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for cut in (None, 2):
        layer.cut = cut
        y = compiled(x)
        assert_close(y, layer(x))
        layer.zero_grad()
        y.square().sum().backward()
        got = {n: p.grad.clone() for n, p in layer.named_parameters()}
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert all(torch.allclose(p.grad, got[n]) for n, p in layer.named_parameters())


@pytest.mark.parametrize("rank", [0, 4, True, 1.0])
def test_bad_ranks_raise(rank, no_shape_checks):
    layer = MaestroLinear.from_linear(linear())
    layer.rank = 3
    with pytest.raises((TypeError, ValueError), match=f"rank: got {rank}"):
        layer.plain(rank)
    if rank != 4:
        with pytest.raises((TypeError, ValueError), match=f"rank: got {rank}"):
            prefix_product(layer.A, layer.B, rank)


def test_bad_input_raises(no_shape_checks):
    A, B = factors(5, 7)
    for a, b, message in [
        (A[:3], B, "B: got 5 columns, wanted 3"),
        (A[0], B, "A: got shape"),
        (A, B * torch.nan, "B: got 25 NaN"),
        (A.long(), B, "A: got dtype torch.int64"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            MaestroLinear(a, b)
    for other in (nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Embedding(2, 2)):
        with pytest.raises(TypeError, match="base"):
            MaestroLinear.from_linear(other)
    for covariance, message in [
        (torch.eye(3, dtype=torch.float64), r"covariance: got shape \(3, 3\), wanted \(7, 7\)"),
        (-torch.eye(7, dtype=torch.float64), "covariance: got a matrix without"),
        (torch.full((7, 7), torch.inf, dtype=torch.float64), "covariance: got 49 NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            nested_optimum(gaussian(5, 7), covariance)
