"""A frozen weight with trained numbers at some places."""

import pytest
import torch
from battery import gaussian, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lowrank_ref.adapters.placed_values import masked_product, placed, values_gradient
from lowrank_ref.adapters.weight_selection import smallest


def case(m, n, count, tokens=5):
    W, x, dY = gaussian(m, n, seed=1), gaussian(tokens, n, seed=2), gaussian(tokens, m, seed=3)
    support = smallest(W, count)
    return W, x, dY, support, gaussian(count, seed=4), torch.ones(count, dtype=torch.bool)


@given(shapes(), st.floats(0, 1))
def test_placing_is_what_a_loop_does(shape, density):
    m, n, _ = shape
    W, _, _, support, values, _ = case(m, n, round(density * m * n))
    wanted = W.clone()
    for place, value in zip(support.tolist(), values):
        wanted[place // n, place % n] = value
    before = W.clone()
    assert torch.equal(placed(W, values, support), wanted) and torch.equal(W, before)


@given(shapes(), st.floats(0, 1), st.integers(1, 70))
def test_the_gradient_in_blocks_is_the_masked_dense_one(shape, density, block):
    m, n, _ = shape
    W, x, dY, support, _, _ = case(m, n, round(density * m * n))
    wanted = torch.stack([(dY[:, p // n] * x[:, p % n]).sum() for p in support.tolist()] or [W.new_zeros(())])
    got = values_gradient(dY, x, support, block)
    torch.testing.assert_close(got, wanted[: len(support)], rtol=0, atol=1e-12)
    torch.testing.assert_close(values_gradient(dY.view(1, *dY.shape), x.view(1, *x.shape), support), got)


@given(shapes(), st.floats(0, 1))
def test_product_and_gradients_are_those_of_autograd(shape, density):
    m, n, _ = shape
    W, x, dY, support, values, active = case(m, n, round(density * m * n))
    active[::2] = False
    results = []
    for product in (
        lambda x, W, p: masked_product(x, W, p, support, active),
        lambda x, W, p: F.linear(x, placed(W, torch.where(active, p, p.detach()), support)),
    ):
        parts = [t.clone().requires_grad_() for t in (x, W, values)]
        y = product(*parts)
        y.backward(dY)
        results.append([y.detach(), *(t.grad for t in parts)])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_backward_keeps_no_matrix_but_the_weight_itself():
    """The graph of the definition keeps P; this one keeps what is alive anyway."""
    W, x, _, support, values, active = case(30, 40, 100)
    x, values = x.requires_grad_(), values.requires_grad_()

    def kept(product):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            product()
        return {t.untyped_storage().data_ptr(): t.numel() for t in seen}

    own = {t.untyped_storage().data_ptr() for t in (x, W, values, support, active)}
    assert kept(lambda: masked_product(x, W, values, support, active)).keys() == own
    theirs = kept(lambda: F.linear(x, placed(W, values, support)))
    assert 1200 in [size for place, size in theirs.items() if place not in own]


def test_the_dense_gradient_is_never_alive_with_small_blocks(monkeypatch):
    sizes, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append((y := matmul(a, b)).numel()) or y)
    W, x, dY, support, _, _ = case(30, 40, 300)
    values_gradient(dY, x, support, 120)
    assert sizes == [120] * 10


def test_half_precision_rounds_once():
    W, x, _, support, values, active = case(6, 5, 9)
    y = masked_product(x.bfloat16(), W.bfloat16(), values.float(), support, active)
    wanted = F.linear(x.bfloat16(), placed(W.bfloat16(), values.float(), support))
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted)


def test_a_second_backward_is_refused():
    W, x, _, support, values, active = case(6, 5, 9)
    values.requires_grad_()
    (gradient,) = torch.autograd.grad(
        masked_product(x, W, values, support, active).square().sum(), values, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
