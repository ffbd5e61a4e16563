"""Recipes and quantised layers against three written products, and what they keep in memory."""

import copy
from dataclasses import replace

import battery
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lowbit import QUANTIZERS, RECIPES, BitLinear, QuantLinear, Recipe, quantized_linear
from lowrank_ref.lowbit.low_precision import PRODUCTS
from lowrank_ref.lowbit.rotations import rotate_blocks

sizes = st.integers(1, 9)
INT4, INT8, E5M2 = QUANTIZERS["int4 row"], QUANTIZERS["int8 row"], QUANTIZERS["E5M2 tensor"]
MIXED = Recipe(activation=INT8, weight=INT4, gradient=E5M2)
each = pytest.mark.parametrize("name", RECIPES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def results(x, W, recipe, G, generator=None):
    """Y, dX, dW."""
    x, W = x.clone().requires_grad_(), W.clone().requires_grad_()
    y = quantized_linear(x, W, recipe, generator=generator)
    return y.detach(), *torch.autograd.grad((y * G).sum(), (x, W))


@given(t=sizes, m=sizes, n=sizes)
def test_without_quantisers_it_is_a_linear_layer(t, m, n):
    x, W, G = randn(t, n), randn(m, n, seed=1), randn(t, m, seed=2)
    for recipe in (Recipe(), Recipe(reduced=True), Recipe(reduced=True, rotation=4, random_signs=True)):
        for found, wanted in zip(results(x, W, recipe, G, seeded()), (x @ W.T, G @ W, G.T @ x)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@given(t=sizes, m=sizes, n=sizes)
def test_three_products_of_operands_rounded_once(t, m, n):
    x, W, G = randn(t, n), randn(m, n, seed=1), randn(t, m, seed=2)
    X_hat, W_hat, G_hat = INT8(x), INT4(W), E5M2(G)
    wanted = X_hat @ W_hat.T, G_hat @ W_hat, G_hat.T @ X_hat
    for found, product in zip(results(x, W, MIXED, G), wanted):
        torch.testing.assert_close(found, product, rtol=0, atol=1e-12)


@given(t=sizes, m=sizes, n=sizes, rotation=st.sampled_from([0, 4]))
def test_three_products_of_operands_rounded_along_the_sum(t, m, n, rotation):
    x, W, G = randn(t, n), randn(m, n, seed=1), randn(t, m, seed=2)
    recipe = replace(MIXED, reduced=True, rotation=rotation)

    def turned(A):
        return rotate_blocks(A, rotation) if rotation else A

    wanted = (
        INT8(x) @ INT4(W).T,
        E5M2(turned(G)) @ INT4(turned(W.T.contiguous())).T,
        E5M2(turned(G.T.contiguous())) @ INT8(turned(x.T.contiguous())).T,
    )
    for found, product in zip(results(x, W, recipe, G), wanted):
        torch.testing.assert_close(found, product, rtol=0, atol=1e-12)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("reduced", [False, True])
def test_one_product_alone(product, reduced):
    x, W, G = randn(20, 8), randn(6, 8, seed=1), randn(20, 6, seed=2)
    recipe = Recipe(activation=INT4, weight=INT4, gradient=INT4, products=(product,), reduced=reduced)
    exact = x @ W.T, G @ W, G.T @ x
    for name, found, plain in zip(PRODUCTS, results(x, W, recipe, G), exact):
        close = torch.allclose(found, plain, rtol=0, atol=1e-12)
        assert close == (name != product)


def test_random_signs_come_from_the_generator():
    x, W, G = randn(64, 32), randn(32, 32, seed=1), randn(64, 32, seed=2)
    q = QUANTIZERS["MXFP4"]
    recipe = Recipe(activation=q, weight=q, gradient=q, reduced=True, rotation=16, random_signs=True)
    first, again, other = (results(x, W, recipe, G, seeded(s))[2] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    assert torch.equal(first, results(x, W, recipe, G)[2])


def test_random_gradients_are_right_on_average():
    """Rounded at random, dX and dW have the exact products as their means; to nearest they do not."""
    x, W, G = randn(6, 8), randn(5, 8, seed=1), randn(6, 5, seed=2)
    G[:, 0] *= 30  # the other columns lie below half a step
    random, g = Recipe(gradient=INT4.at_random()), seeded()
    draws = [results(x, W, random, G, g) for _ in range(4000)]
    for place, wanted in ((1, G @ W), (2, G.T @ x)):
        stack = torch.stack([draw[place] for draw in draws])
        error = stack.std(0) / 4000**0.5
        assert bool(((stack.mean(0) - wanted).abs() <= 5 * error + 1e-12).all())
        nearest = results(x, W, Recipe(gradient=INT4), G)[place]
        assert bool(((nearest - wanted).abs() > 5 * error).any())


def test_many_layers_at_once():
    x, W, G = randn(3, 7, 8), randn(3, 5, 8, seed=1), randn(3, 7, 5, seed=2)
    for recipe in (MIXED, replace(RECIPES["NVFP4"], gradient=QUANTIZERS["NVFP4"])):
        together = results(x, W, recipe, G)
        one = replace(recipe, gradient=INT8)  # a scale of a whole tensor spans the layers of a call
        for i in range(3):
            alone = results(x[i], W[i], recipe, G[i])
            torch.testing.assert_close(together[0][i], alone[0], rtol=0, atol=1e-12)
        together, alone = results(x, W, one, G), results(x[1], W[1], one, G[1])
        for found, wanted in zip(together, alone):
            torch.testing.assert_close(found[1], wanted, rtol=0, atol=1e-12)


# The layer.


@each
def test_the_layer_is_the_product_and_a_bias(name):
    base = nn.Linear(64, 32)
    layer = QuantLinear(base, RECIPES[name], generator=seeded())
    x = randn(4, 5, 64, dtype=torch.float32)
    y = quantized_linear(x.view(20, 64), base.weight, RECIPES[name], generator=seeded())
    torch.testing.assert_close(layer(x), (y + base.bias).view(4, 5, 32), rtol=0, atol=0)
    assert layer.bias is not base.bias and torch.equal(layer.weight, base.weight)
    y.sum().backward()
    assert bool(base.weight.grad.isfinite().all())


@each
def test_errors_of_the_recipes_rank_as_their_formats_do(name):
    x, W = randn(128, 64), randn(64, 64, seed=1)
    off = results(x, W, RECIPES[name], randn(128, 64, seed=2), seeded())[0] - x @ W.T
    bounds = {"exact": 1e-14, "bf16": 0.004, "int8": 0.015, "SwitchBack": 0.02, "Jetfire": 0.02, "FP8 hybrid": 0.05}
    bounds |= {"MXFP8": 0.06, "NVFP4": 0.16, "MXFP4": 0.2, "W ternary, X int8": 0.6}
    assert float(off.norm() / (x @ W.T).norm()) <= bounds[name]


def test_the_first_three_results_of_switchback():
    """SwitchBack leaves dW alone."""
    x, W, G = randn(20, 8), randn(6, 8, seed=1), randn(20, 6, seed=2)
    _, dX, dW = results(x, W, RECIPES["SwitchBack"], G)
    torch.testing.assert_close(dW, G.T @ x, rtol=0, atol=1e-12)
    assert not torch.allclose(dX, G @ W, rtol=0, atol=1e-6)


def test_ternary_is_bitlinear_without_its_norm():
    base = nn.Linear(12, 10)
    ours, theirs = QuantLinear(base, RECIPES["W ternary, X int8"]), BitLinear(base, sub_norm=False)
    x = randn(6, 12, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.dense_weight(), theirs.dense_weight())
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-4)


def test_what_is_kept_for_the_backward_pass_is_rounded():
    layer, kept = QuantLinear(nn.Linear(64, 32), RECIPES["FP8 hybrid"]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(randn(6, 64, dtype=torch.float32).requires_grad_())
    rounded = [t for t in kept if torch.equal(QUANTIZERS["E4M3 tensor"](t), t)]
    assert {tuple(t.shape) for t in rounded} >= {(6, 64), (32, 64)}


def test_dense_weight_follows_the_products():
    base, recipe = nn.Linear(8, 4), replace(MIXED, products=("dX", "dW"))
    assert torch.equal(QuantLinear(base, recipe).dense_weight(), base.weight)
    assert torch.equal(QuantLinear(base, MIXED).dense_weight(), INT4(base.weight))
    assert torch.equal(QuantLinear(base, Recipe()).dense_weight(), base.weight)


def test_bfloat16_and_autocast():
    base = nn.Linear(64, 32)
    layer = QuantLinear(base, RECIPES["int8"])
    x = randn(4, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x)) and layer(x).dtype == torch.float32
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.05)


def test_a_model_trains_and_learns():
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 6))
    replace_linears(model, "", lambda base: QuantLinear(base, RECIPES["MXFP8"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = battery.batch(0, torch.float32, 64), battery.batch(1, torch.float32, 64)[:, :6].tanh()
    first = F.mse_loss(model(x), y).item()
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert F.mse_loss(model(x), y).item() < 0.3 * first


@pytest.mark.usefixtures("no_shape_checks")
def test_refuses():
    with pytest.raises(ValueError, match="products: got unknown 'dV'"):
        Recipe(products=("dV",))
    for bad in ({"rotation": 3, "reduced": True}, {"rotation": 16}):
        with pytest.raises(ValueError, match="rotation: got"):
            Recipe(**bad)
    with pytest.raises(ValueError, match="W: got shape"):
        quantized_linear(randn(2, 3), randn(4, 5), Recipe())
    with pytest.raises(ValueError, match="W: got shape"):
        quantized_linear(randn(2, 2, 3), randn(4, 3), Recipe())
    with pytest.raises(TypeError, match="base: got Odd with a forward"):
        QuantLinear(type("Odd", (nn.Linear,), {"forward": lambda self, x: x})(3, 3), Recipe())
    bad = nn.Linear(3, 3)
    bad.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="base.weight: got 3 NaN"):
        QuantLinear(bad, Recipe())
    layer = QuantLinear(nn.Linear(3, 2), Recipe())
    assert repr(layer) == "QuantLinear(3 -> 2)"
    with pytest.raises(ValueError, match="x: got shape"):
        layer(torch.ones(2, 4))
    with pytest.raises(TypeError, match="x: got dtype"):
        layer(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        x = randn(2, 3, dtype=torch.float32).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        dx.sum().backward()
