"""The faster equal forms of GaLore's step against the plain ones; the Triton kernels are stood in for where needed."""

import pytest
import torch
from torch import nn

from lowrank_ref.core.linalg import gram_basis, subspace_basis
from lowrank_ref.optimizers import GaLoreAdamW, GaLoreAdamW8bit, fast, galore

SHAPES = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4)]


def draw(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("side", ["smaller", "both"])
@pytest.mark.parametrize("warm", [False, True])
def test_batches_find_the_bases_of_one_matrix_at_a_time(side, warm, monkeypatch):
    grads, states = draw(), [{} for _ in SHAPES]
    if warm:
        for state, old in zip(states, draw(1)):
            state.update(galore.projectors(old, 2, side=side))
    options = {"side": side, "basis": subspace_basis}
    single = [galore.projectors(G, 2, old=state, **options) for G, state in zip(grads, states)]
    for most in (1, 48, 10**6):  # one, two, all of a shape together
        monkeypatch.setattr(fast, "MOST_NUMBERS", most)
        found = fast.in_batches(galore.projectors, grads, states, 2, **options)
        for a, b in zip(found, single):
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-9)
                assert a[key].untyped_storage().nbytes() == a[key].nbytes  # no view of the batch


def test_matrices_of_two_dtypes_share_no_batch():
    """They did: the float32 bases of the first came back as float64."""
    grads = [*draw(), *draw(1, torch.float32)]
    found = fast.in_batches(galore.projectors, grads, [{} for _ in grads], 2, side="smaller", basis=subspace_basis)
    for G, bases in zip(grads, found):
        [(key, P)] = bases.items()
        single = galore.projectors(G, 2, basis=subspace_basis)
        assert P.dtype == G.dtype
        torch.testing.assert_close(P, single[key], rtol=0, atol=1e-9 if G.dtype == torch.float64 else 1e-4)


def test_norms_of_several_dtypes_and_devices():
    tensors = [torch.ones(2, 8), torch.full((4,), 3.0, dtype=torch.float64), torch.full((9,), 6e4).half()]
    got = fast.norms(tensors)
    torch.testing.assert_close(got.double(), torch.tensor([4.0, 6.0, 1.8e5]).double(), rtol=1e-3, atol=0)
    away = torch.empty(3, device="meta")
    assert fast.norms([away, *tensors]).shape == (4,)  # one list on two devices
    assert not fast.norms([torch.tensor([6e4, torch.inf]).half()]).isfinite()


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("change", [lambda T: T[:1], lambda T: T.float(), lambda T: None])
def test_lists_that_do_not_fit_are_refused_before_pytorch_writes_outside_them(wrong, change):
    lists = [draw(1), draw(2), [v.abs() for v in draw(3)]]
    lists[wrong][-1] = change(lists[wrong][-1])
    lists[wrong] = [T for T in lists[wrong] if T is not None]
    with pytest.raises(ValueError, match="W, R, M, V: got"):
        fast.fused_directions(*lists, 1, {"betas": (0.9, 0.99), "eps": 0.1})


def test_other_bases_see_one_matrix_at_a_time():
    seen = []

    def basis(G, rank, *, start=None):
        seen.append(G.ndim)
        return gram_basis(G, rank)

    fast.in_batches(galore.projectors, draw(), [{} for _ in SHAPES], 2, side="smaller", basis=basis)
    assert seen == [2] * len(SHAPES)


@pytest.mark.parametrize("step", [1, 7])
def test_adam_in_one_pass_adds_the_directions(step):
    W, R, M, V = draw(), draw(1), draw(2), [v.abs() for v in draw(3)]
    start, M2, V2 = ([t.clone() for t in tensors] for tensors in (W, M, V))
    group = {"betas": (0.9, 0.99), "eps": 0.1}
    fast.add_adam(W, R, M, V, step, -0.3, group)
    N = galore.adam_directions(R, M2, V2, [step] * len(R), **group)
    for w, w0, n, m, m2, v, v2 in zip(W, start, N, M, M2, V, V2):
        torch.testing.assert_close(w, w0 - 0.3 * n, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(m, m2, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(v, v2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("which", ["weight", "gradient", "both"])
def test_transposed_memory_takes_the_steps_of_contiguous_memory(which, rank):
    """One pass over the memory would pair numbers of different places."""

    def run(turned):
        W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        p = nn.Parameter(W.T.contiguous().T if turned and which != "gradient" else W)
        optimizer = GaLoreAdamW([p], rank=rank, lr=0.1, weight_decay=0.3, gap=2)
        for t in range(3):
            G = torch.randn(6, 4, generator=torch.Generator().manual_seed(9 + t), dtype=torch.float64)
            p.grad = G.T.contiguous().T if turned and which != "weight" else G
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=1e-12)


def test_plain_steps_take_one_pass_and_make_no_direction(monkeypatch):
    ps = [nn.Parameter(W) for W in draw()]
    for p in ps:
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(fast, "fused_directions", lambda *arguments: pytest.fail("made directions"))
    GaLoreAdamW(ps).step()


def test_on_a_cpu_the_kernels_take_nothing():
    ps = [nn.Parameter(W) for W in draw()]
    assert fast.kernel_steps(ps, [{} for _ in ps], [{} for _ in ps], {}, -0.1, 1.0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_a_spread_refresh_visits_every_matrix_once_a_gap(cls):
    count, gap = 4, 8
    ps = [nn.Parameter(torch.randn(6, 4)) for _ in range(count)]
    optimizer = cls([{"params": ps, "rank": 2}], lr=1e-3, gap=gap, spread=True)
    changed = []
    for _ in range(2 * gap + 1):
        before = [optimizer.state[p].get("right") for p in ps]
        for p in ps:
            p.grad = torch.randn(6, 4)
        optimizer.step()
        changed.append([b is None or not torch.equal(b, optimizer.state[p]["right"]) for p, b in zip(ps, before)])
    assert changed[0] == [True] * count
    later = [[step for step in range(1, 2 * gap + 1) if changed[step][i]] for i in range(count)]
    assert later == [[8, 16], [2, 10], [4, 12], [6, 14]]


def test_without_spread_all_change_in_the_same_step():
    ps = [nn.Parameter(torch.randn(6, 4)) for _ in range(3)]
    optimizer = GaLoreAdamW([{"params": ps, "rank": 2}], gap=5)
    assert [[optimizer.due(p, step, optimizer.param_groups[0]) for p in ps] for step in (1, 2, 5, 6, 11)] == [
        [True] * 3,
        [False] * 3,
        [False] * 3,
        [True] * 3,
        [True] * 3,
    ]
