"""The fast products against their definitions: values, gradients, dtypes, and what they keep for backward."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import DoRALinear, LoRALinear, PiSSALinear, RandLoRALinear
from lowrank_ref.adapters.dora_pissa import dora_weight
from lowrank_ref.adapters.lora import lora_update
from lowrank_ref.adapters.randlora import delta_weight as randlora_delta
from lowrank_ref.adapters.randlora import mixed_rows
from lowrank_ref.adapters.randlora_bases import stacked
from lowrank_ref.core import products
from lowrank_ref.core.layers import AdaptedLinear
from lowrank_ref.core.products import (
    computing_dtype,
    dora_linear,
    is_plain,
    lora_linear,
    randlora_linear,
    row_norms,
    through_delta,
    through_weight,
)
from lowrank_ref.ranks import SoRALinear


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def lora_case(m, n, r, few=0):
    """Function, definition and arguments."""

    def function(*parts):
        with mock.patch.object(products, "FEW", few):  # 0: by the backward of its own
            return lora_linear(*parts, 0.7)

    def definition(x, W, bias, A, B):
        return F.linear(x, W, bias) + lora_update(x, A, B, 0.7)

    parts = gaussian(m, n), gaussian(m, seed=1), gaussian(r, n, seed=2), gaussian(m, r, seed=3)
    return function, definition, parts


def dora_case(m, n, r):
    def definition(x, W, bias, A, B, magnitude):
        return F.linear(x, dora_weight(W + 0.7 * B @ A, magnitude), bias)

    parts = gaussian(m, n), gaussian(m, seed=1), gaussian(r, n, seed=2), gaussian(m, r, seed=3), gaussian(m, seed=4)
    return lambda *p: dora_linear(*p, 0.7), definition, parts


def randlora_case(m, n, r, fused=False):
    D, d = max(m, n), min(m, n)
    blocks = -(-d // r)
    A, B = gaussian(r, d, seed=2), gaussian(blocks, D, r, seed=3)

    def definition(x, W, bias, lam, gamma):
        delta = randlora_delta(A, B, lam, gamma, 0.7)
        return F.linear(x, W + (delta if m >= n else delta.T), bias)

    def function(x, W, bias, lam, gamma):
        return randlora_linear(x, W, bias, A, stacked(B), lam, gamma, 0.7, fused=fused)

    return function, definition, (gaussian(m, n), gaussian(m, seed=1), gaussian(blocks, r), gaussian(blocks, d, seed=5))


CASES = {
    "lora": lora_case,
    "lora, few": partial(lora_case, few=products.FEW),
    "dora": dora_case,
    "randlora": randlora_case,
    "randlora, fused": lambda m, n, r: randlora_case(m, n, r, fused=True),
}
each_case = pytest.mark.parametrize("name", CASES)


# Equal to the definition.


@each_case
@given(shapes(), st.sampled_from([(), (5,), (2, 3), (0,)]), st.booleans())
def test_value_and_all_gradients_are_those_of_the_definition(name, shape, rows, with_bias):
    m, n, r = shape
    function, definition, (W, bias, *rest) = CASES[name](m, n, r)
    tensors = [t.requires_grad_() for t in (gaussian(*rows, n, seed=7), W, bias, *rest)]
    wanted_by = [tensors[0], *([W, bias] if with_bias else [W]), *rest]
    results = []
    for one in (function, definition):
        y = one(*tensors[:2], bias if with_bias else None, *rest)
        results.append((y, *torch.autograd.grad(y.pow(3).sum(), wanted_by)))
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    assert_close(results[0][0], results[1][0], 1e-11)


@pytest.mark.parametrize("shape", [(5, 4, 2), (4, 5, 3), (3, 3, 1)])
@pytest.mark.parametrize("name", ["lora", "lora, few", "randlora", "randlora, fused"])
def test_gradcheck(name, shape):
    """DoRA holds its norm constant in backward, which no difference quotient does."""
    function, _, parts = CASES[name](*shape)
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (gaussian(3, shape[1], seed=7), *parts)])


@each_case
def test_frozen_arguments_get_no_gradient_and_leave_those_of_the_others_alone(name):
    function, _, parts = CASES[name](5, 4, 2)
    x = gaussian(3, 4, seed=7)
    everything = [t.clone().requires_grad_() for t in (x, *parts)]
    all_gradients = torch.autograd.grad(function(*everything).pow(2).sum(), everything)
    for free in range(len(everything)):
        some = [t.detach().clone().requires_grad_(i == free) for i, t in enumerate(everything)]
        function(*some).pow(2).sum().backward()
        assert [t.grad is not None for t in some] == [i == free for i in range(len(some))]
        assert_close(some[free].grad, all_gradients[free])


@each_case
def test_strides_do_not_matter(name):
    function, _, (W, *parts) = CASES[name](5, 4, 2)
    x, G = gaussian(4, 6, 3, seed=7).transpose(0, 2), gaussian(5, 6, 3, seed=8).transpose(0, 2)
    results = []
    for one, weight, grad in ((x, W.T.contiguous().T, G), (x.contiguous(), W, G.contiguous())):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (one, weight, *parts)]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for got, wanted in zip(*results):
        assert_close(got, wanted)
    x = gaussian(4, seed=7).requires_grad_()
    assert_close(
        torch.autograd.grad(function(x, W, *parts).sum(), x)[0],  # a gradient of stride 0
        torch.autograd.grad(function(x, W, *parts) @ torch.ones(5, dtype=torch.float64), x)[0],
    )


def test_row_norms_do_not_depend_on_the_blocks(monkeypatch):
    W, A, B = gaussian(7, 4), gaussian(2, 4, seed=1), gaussian(7, 2, seed=2)
    wanted = (W + 0.7 * B @ A).norm(dim=1)
    assert_close(row_norms(W, A, B, 0.7), wanted)
    for block in (1, 4, 12, 27):
        monkeypatch.setattr(products, "BLOCK", block)
        assert_close(row_norms(W, A, B, 0.7), wanted)
    assert torch.equal(row_norms(W, A, 0 * B, 0.7), W.norm(dim=1))
    half = [t.bfloat16() for t in (W, A, B)]
    exact = (half[0].double() + 0.7 * half[2].double() @ half[1].double()).norm(dim=1)
    assert torch.equal(row_norms(*half, 0.7), exact.bfloat16())
    nearly = row_norms(W, W[:1], torch.tensor([[-1 + 1e-9]] * 7, dtype=torch.float64), 1.0)
    assert nearly[0].item() == pytest.approx(1e-9 * W[0].norm().item(), rel=1e-5)  # a row that the update takes away


def test_through_delta_is_the_smaller_count_of_flops():
    """Forward and backward, of which the base's own products are the same in both."""
    for tokens in (1, 4000, 4200, 8192):
        for D, d, rows in ((4096, 4096, 4096), (11008, 4096, 4096), (64, 8, 8)):
            factors = 2 * tokens * rows * (D + d) * 2 + 2 * tokens * rows * d  # y, dx; the gradient of the rows
            delta = (
                2 * D * d * rows * 2 + 2 * tokens * D * d * 3
            )  # ΔW and the gradient of the rows; y, dx, ΔW's gradient
            assert through_delta(tokens, D, d, rows) == (delta < factors)
    assert not through_delta(4096, 4096, 4096, 4096) and through_delta(4097, 4096, 4096, 4096)


# Half precision and autocast.


def in_precision(name, dtype, autocast, weight_dtype=torch.float32):
    """Output and gradients on a (48, 40) layer; factors stay float32, as a layer keeps them."""
    _, _, (W, bias, *rest) = CASES[name](48, 40, 3)
    x = gaussian(64, 40, seed=7).to(dtype).requires_grad_()
    W, bias = (W / 6).to(weight_dtype), bias.to(weight_dtype)
    rest = [(t / 6).float().requires_grad_() for t in rest]
    if name.startswith("randlora"):
        A, C = (t.to(torch.bfloat16) for t in (gaussian(3, 40, seed=2), gaussian(42, 48, seed=3) / 4))
        lam, gamma = rest

        def function(x, W, bias, lam, gamma):
            A_, C_ = (t.to(computing_dtype(x)) for t in (A, C))
            return randlora_linear(x, W, bias, A_, C_, lam, gamma, 0.7, fused=name.endswith("fused"))
    else:
        function = CASES[name](48, 40, 3)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(x, W, bias, *rest)
    y.float().square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, W, bias, *rest)]
    if name.startswith("randlora"):
        delta = C.double().T @ mixed_rows(A.double(), 0.7 * exact[3], exact[4])
        z = F.linear(exact[0], exact[1] + delta, exact[2])
    else:
        z = CASES[name](48, 40, 3)[1](*exact)
    z.square().sum().backward()
    return [(y, z), *((got.grad, wanted.grad) for got, wanted in zip((x, *rest), (exact[0], *exact[3:])))]


@each_case
@pytest.mark.parametrize(
    "dtype, autocast, weight",
    [
        (torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.float32, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
    ],
)
def test_half_precision_is_close_and_dtypes_are_those_of_a_linear_layer(name, dtype, autocast, weight):
    (y, wanted), *gradients = in_precision(name, dtype, autocast, weight)
    half = autocast or dtype == torch.bfloat16
    assert y.dtype == (torch.bfloat16 if half else torch.float32)
    assert [got.dtype for got, _ in gradients] == [dtype] + [torch.float32] * (len(gradients) - 1)
    for got, exact in ((y, wanted), *gradients):
        assert (got.double() - exact).norm() <= (0.02 if half else 1e-5) * exact.norm()


# LoRA under autocast through W + s·BA, where the rank is large.


def thick(rank, weight_dtype=torch.float32):
    """x, W, bias, A and B of a (48, 40) layer and 64 tokens; through the weight with rank 8."""
    parts = gaussian(64, 40, seed=7), gaussian(48, 40) / 6, gaussian(48, seed=1), gaussian(rank, 40, seed=2) / 6
    x, W, bias, A, B = (t.float() for t in (*parts, gaussian(48, rank, seed=3) / 6))
    return [t.requires_grad_() for t in (x, W.to(weight_dtype), bias, A, B)]


@pytest.mark.parametrize("rank, through", [(7, False), (8, True), (9, False)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_both_ways_are_close_to_the_definition(rank, through, x_dtype):
    assert through_weight(64, rank, 48, 40) == through
    tensors = thick(rank)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    z = F.linear(*exact[:3]) + lora_update(exact[0], *exact[3:], 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(tensors[0].to(x_dtype), *tensors[1:], 0.7)
        y.float().square().sum().backward()  # also inside the context, as many training loops do
    z.square().sum().backward()
    assert y.dtype == torch.bfloat16
    for t, e in zip([y, *(t.grad for t in tensors)], [z, *(e.grad for e in exact)]):
        assert (t.double() - e).norm() <= 0.02 * e.norm()
    assert all(t.grad.dtype == t.dtype for t in tensors)


def test_through_the_weight_the_sum_is_rounded_once_and_only_where_the_weight_is_rounded_anyway():
    x, W, _, A, B = (t.detach() for t in thick(8))
    with torch.autocast("cpu", torch.bfloat16):
        V = lora_linear(torch.eye(64, 40), W, None, A, B, 0.7)[:40].T
        assert torch.equal(lora_linear(x, W, None, A, 0 * B, 0.7), F.linear(x, W))  # starts at the base
        half = lora_linear(x, W.bfloat16(), None, A, B, 0.7)
    assert torch.equal(V, (W + 0.7 * (B.bfloat16() @ A.bfloat16()).float()).bfloat16())
    exact = F.linear(x.double(), W.bfloat16().double()) + 0.7 * (x.double() @ A.double().T @ B.double().T)
    assert (half - exact).norm() < 0.005 * exact.norm()  # a bfloat16 weight keeps a product of its own for the update


def test_through_weight_counts_flops():
    for m, n, r in [(512, 512, 85), (512, 512, 86), (1376, 512, 124), (1376, 512, 125), (8, 8, 1), (8, 8, 2)]:
        assert through_weight(10**9, r, m, n) == (6 * m * n < 4 * m * n + 6 * r * (m + n))
    assert through_weight(1024, 128, 512, 512) and not through_weight(1023, 128, 512, 512)  # few tokens: the factors


@pytest.mark.parametrize("rank, forward, backward", [(8, 7, 10), (4, 8, 11)])
def test_a_step_takes_few_operators(rank, forward, backward):
    """Under autocast, with a float32 base and a scale that is not 1. A dense layer takes 3 and 4, on more numbers."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        names: list = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            free = function.is_view or any(name in str(function) for name in ("empty", "detach", "_unsafe_view"))
            self.names += [] if free else [str(function)]
            return function(*args, **(kwargs or {}))

    layer, x = LoRALinear(nn.Linear(40, 48, bias=False), rank), gaussian(64, 40).float().requires_grad_()
    with Count() as count:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        ahead, dy = len(count.names), torch.ones_like(y)
        y.backward(dy)
    assert (ahead, len(count.names) - ahead - 1) == (forward, backward), count.names


def test_few_numbers_have_second_derivatives():
    function, _, parts = CASES["lora, few"](5, 4, 2)
    tensors = [t.requires_grad_() for t in (gaussian(3, 4, seed=7), *parts)]
    assert torch.autograd.gradgradcheck(function, tensors)


def test_through_the_weight_all_of_autograd_works():
    """Second derivatives and the transforms of `torch.func`, which the backward of its own refuses."""
    x, W, bias, A, B = thick(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, W, bias, A, B, 0.7)
        gradient = torch.func.grad(lambda A: lora_linear(x, W, bias, A, B, 0.7).float().sum())(A)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    dx.sum().backward()
    assert A.grad.norm() > 0 and gradient.norm() > 0


@pytest.mark.parametrize("rank", [4, 8])
def test_bfloat16_inputs_under_autocast_take_the_fast_way_too(rank):
    layer, x = LoRALinear(nn.Linear(40, 48), rank), gaussian(64, 40).bfloat16()
    assert not is_plain(layer.base, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_plain(layer.base, x) and layer.as_one(x)
        assert torch.equal(layer(x), layer.base(x))
        whole = torch.ones(5, 40, dtype=torch.int64)
        assert not is_plain(layer.base, whole)


def test_computing_dtype():
    x = torch.ones(2)
    assert computing_dtype(x) == torch.float32 and computing_dtype(x.bfloat16()) == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert computing_dtype(x) == torch.float16
        assert computing_dtype(x.double()) == torch.float64  # autocast leaves it alone
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(2, 2)(x).dtype == computing_dtype(x)


# What backward keeps.


def kept_numbers(function, *known):
    """Count the numbers that backward keeps in memory other than that of the known tensors."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        y = function()
    own = {t.untyped_storage().data_ptr() for t in known}
    return sum(t.untyped_storage().nbytes() // t.element_size() for p, t in kept.items() if p not in own), y


TOKENS, WIDE, R = 300, 64, 4


@pytest.mark.parametrize("few", [0, products.FEW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [LoRALinear, DoRALinear, SoRALinear])
def test_a_layer_keeps_x_its_parameters_and_a_rank_r_product(make, dtype, few, monkeypatch):
    monkeypatch.setattr(products, "FEW", few)
    layer = make(nn.Linear(WIDE, WIDE, dtype=dtype), R, generator=seeded())
    x = gaussian(TOKENS, WIDE).to(dtype).requires_grad_()
    count, _ = kept_numbers(lambda: layer(x), x, *layer.parameters())
    hidden = 2 * WIDE if make is DoRALinear else TOKENS * R  # gain and norm
    copies = 2 * WIDE * R if dtype == torch.bfloat16 else WIDE * R * (make is SoRALinear)  # of A and B; diag(g)·A
    assert count == hidden + copies
    count, _ = kept_numbers(lambda: AdaptedLinear.forward(layer, x), x, *layer.parameters())
    if dtype == torch.bfloat16 or make is DoRALinear:
        assert count > TOKENS * WIDE  # the definition keeps more: a copy of x, or its product with W


def test_autocast_keeps_no_copy_of_x_and_none_of_the_weight():
    layer, x = LoRALinear(nn.Linear(WIDE, WIDE), R), gaussian(TOKENS, WIDE).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        count, _ = kept_numbers(lambda: layer(x), x, *layer.parameters())
        plain, _ = kept_numbers(lambda: layer.base(x), x, *layer.parameters())
    assert count == TOKENS * R + 2 * WIDE * R
    assert plain >= WIDE * WIDE  # the base layer alone keeps its weight in bfloat16


@pytest.mark.parametrize("fused", [False, True])
def test_randlora_keeps_one_matrix_of_the_weights_size(fused):
    layer = RandLoRALinear(nn.Linear(WIDE, WIDE), R, fused=fused, generator=seeded())
    x = gaussian(TOKENS, WIDE).float().requires_grad_()
    bases = layer.bases.slices(16, WIDE, WIDE)
    count, _ = kept_numbers(lambda: layer(x), x, *bases, *layer.parameters())
    assert count == WIDE * WIDE + layer.lam.numel()  # s·Λ


def test_nothing_is_kept_without_gradients():
    layer, x = LoRALinear(nn.Linear(WIDE, WIDE), R), torch.ones(3, WIDE)
    with torch.no_grad():
        count, y = kept_numbers(lambda: layer(x))
    assert count == 0 and not y.requires_grad


# Layers take the fast path where they may, and say no where it cannot go.


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("make", [LoRALinear, DoRALinear, PiSSALinear, SoRALinear])
def test_a_layer_equals_its_definition_in_train_and_eval(make):
    layer, x = make(nn.Linear(6, 5, dtype=torch.float64), 2, dropout=0.5, generator=seeded()), gaussian(4, 6)
    nn.init.normal_(layer.B, generator=seeded(1))
    torch.manual_seed(0)
    got = layer(x)
    torch.manual_seed(0)
    assert torch.equal(got, AdaptedLinear.forward(layer, x))  # with dropout the definition runs
    layer.eval()
    assert_close(layer(x), AdaptedLinear.forward(layer, x))


@pytest.mark.parametrize("make", [LoRALinear, RandLoRALinear])
def test_a_base_that_does_more_than_multiply_is_called(make):
    x, seen = gaussian(4, 3), []
    layer = make(Doubled(3, 3, dtype=torch.float64), 2, generator=seeded())
    assert_close(layer(x), 2 * F.linear(x, layer.base.weight, layer.base.bias))
    layer = make(nn.Linear(3, 3, dtype=torch.float64), 2, generator=seeded())
    handle = layer.base.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer(x)
    handle.remove()
    layer.base.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    layer(x)
    layer = make(nn.Linear(3, 3, dtype=torch.float64), 2, generator=seeded())
    layer.base.register_full_backward_hook(lambda module, into, out: seen.append(out[0].shape))
    layer(x.requires_grad_()).sum().backward()
    assert seen == [(4, 3)] * 3


def test_is_plain():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    x = torch.ones(2, 3)
    assert is_plain(nn.Linear(3, 3), x) and is_plain(Conv1D(3, 3), x)
    assert not is_plain(Doubled(3, 3), x) and not is_plain(nn.Linear(3, 3).double(), x)
    parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    assert not is_plain(parametrized, x) and not is_plain(nn.Linear(3, 3).half(), x.half())
    assert not is_plain(nn.Linear(3, 3), x.long()) and not is_plain(nn.Linear(3, 3), x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_plain(nn.Linear(3, 3).bfloat16(), x)


@pytest.mark.parametrize("make", [LoRALinear, DoRALinear, RandLoRALinear])
def test_wrong_inputs_fail_as_those_of_a_linear_layer(make):
    layer = make(nn.Linear(6, 6), 2, generator=seeded())
    for x in (torch.ones(4, 3), torch.ones(6).double(), torch.ones(4, 12)):
        with pytest.raises((RuntimeError, TypeError)):
            layer.base(x)
        with pytest.raises((RuntimeError, TypeError)):
            layer(x)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_randlora_is_the_same_through_delta_and_through_the_factors(shape, fused):
    m, n = shape
    layer = RandLoRALinear(nn.Linear(n, m, dtype=torch.float64), 2, fused=fused, generator=seeded())
    nn.init.normal_(layer.lam, generator=seeded(1))
    few, many = gaussian(2, n), gaussian(80, n, seed=1)
    assert through_delta(80, max(shape), min(shape), len(layer.lam) * 2)
    assert not through_delta(2, max(shape), min(shape), len(layer.lam) * 2)
    for x in (few, many):
        got, wanted = layer(x), layer.base(x) + layer.update(x)
        assert_close(got, wanted, 1e-11)
        G = gaussian(*got.shape, seed=2)
        for mine, its in zip(*(torch.autograd.grad(y, [layer.lam, layer.gamma], G) for y in (got, wanted))):
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lora", "dora", "randlora", "randlora, fused"])
def test_a_second_derivative_raises(name):
    function, _, parts = CASES[name](5, 4, 2)
    x = gaussian(3, 4, seed=7).requires_grad_()
    (dx,) = torch.autograd.grad(function(x, *parts).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: function(x, *parts).sum())(x)


def test_a_trained_base_trains_beside_its_adapter():
    layer = LoRALinear(nn.Linear(4, 3, dtype=torch.float64), 2, generator=seeded())
    nn.init.normal_(layer.B, generator=seeded(1))
    layer.base.requires_grad_(True)
    other = copy.deepcopy(layer)
    layer(gaussian(5, 4)).pow(3).sum().backward()
    AdaptedLinear.forward(other, gaussian(5, 4)).pow(3).sum().backward()
    for got, wanted in zip(layer.parameters(), other.parameters()):
        assert_close(got.grad, wanted.grad, 1e-9)


@pytest.mark.parametrize("make", [LoRALinear, DoRALinear, RandLoRALinear])
def test_checkpointing_and_inference_mode(make):
    layer, x = make(nn.Linear(6, 5, dtype=torch.float64), 2, generator=seeded()), gaussian(80, 6).requires_grad_()
    for p in layer.adapter_parameters().values():
        nn.init.normal_(p, generator=seeded(1))
    inputs = [x, *layer.adapter_parameters().values()]
    y = layer(x)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for got, wanted in zip(*(torch.autograd.grad(out.pow(3).sum(), inputs) for out in (again, y))):
        assert torch.equal(got, wanted)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
