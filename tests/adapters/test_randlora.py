"""RandLoRA: equations against loops, the exact invariants in float64, PEFT, and whole models."""

import copy
import math
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from battery import assert_dropout_on_the_update, gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.adapters.randlora import (
    RandLoRALinear,
    block_count,
    delta_weight,
    fused_linear,
    init_diagonals,
    mixed_rows,
    randlora_scaling,
    randlora_update,
)
from lowrank_ref.adapters.randlora_bases import from_peft, to_peft
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import adapters, replace_linears


def factors(D, d, r):
    """A, B, Λ, Γ of a (D, d) update, all random."""
    blocks = math.ceil(d / r)
    return gaussian(r, d), gaussian(blocks, D, r, seed=1), gaussian(blocks, r, seed=2), gaussian(blocks, d, seed=3)


def randlora(m, n, rank, *, moved=True, seed=0, dtype=torch.float64, **options):
    """A layer; `moved` gives Λ and Γ random values, as training would."""
    layer = RandLoRALinear(nn.Linear(n, m, dtype=dtype), rank, generator=seeded(seed), **options)
    if moved:
        with torch.no_grad():
            layer.lam.copy_(gaussian(*layer.lam.shape, seed=1))
            layer.gamma.copy_(gaussian(*layer.gamma.shape, seed=2))
    return layer


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def sum_of_blocks(A, B, lam, gamma, scale):
    """The definition, one block after the other."""
    return scale * sum(b @ torch.diag(one) @ A @ torch.diag(other) for b, one, other in zip(B, lam, gamma))


# Each equation against a loop.


@given(shapes())
def test_delta_weight_is_the_sum_over_blocks(shape):
    D, d, r = max(shape[:2]), min(shape[:2]), shape[2]
    assert_close(delta_weight(*factors(D, d, r), 0.7), sum_of_blocks(*factors(D, d, r), 0.7))


def test_delta_weight_by_loops():
    A, B, lam, gamma = factors(5, 3, 2)
    W = delta_weight(A, B, lam, gamma, 0.7)
    for i in range(5):
        for c in range(3):
            terms = (B[j, i, k] * lam[j, k] * A[k, c] * gamma[j, c] for j in range(2) for k in range(2))
            assert W[i, c].item() == pytest.approx(0.7 * sum(terms).item())


@given(shapes())
def test_mixed_rows_by_loops(shape):
    r, d = shape[2], min(shape[:2])
    A, _, lam, gamma = factors(d, d, r)
    M = mixed_rows(A, lam, gamma)
    for j in range(len(lam)):
        for k in range(r):
            wanted = [(lam[j, k] * A[k, c] * gamma[j, c]).item() for c in range(d)]
            assert M[j * r + k].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("wide", [False, True])
def test_update_takes_any_batch(wide):
    parts = factors(5, 3, 2)
    W = sum_of_blocks(*parts, 0.5)
    W = W.T if wide else W
    for batch in [(), (4,), (2, 3), (0,)]:
        x = gaussian(*batch, W.shape[1], seed=9)
        assert_close(randlora_update(x, *parts, 0.5, wide=wide), x @ W.T)


def test_fused_linear_is_a_merge():
    x, W, b, D = gaussian(4, 3), gaussian(5, 3, seed=1), gaussian(5, seed=2), gaussian(5, 3, seed=3)
    assert_close(fused_linear(x, W, b, D), x @ (W + D).T + b)
    assert_close(fused_linear(x, W, None, D), x @ (W + D).T)
    half = torch.bfloat16
    assert torch.equal(
        fused_linear(x.to(half), W.to(half), None, D), x.to(half) @ (W.to(half) + D).to(half).T
    )  # added first, rounded once


def test_scales_and_counts_of_the_conventions():
    assert randlora_scaling(640, 32) == 20  # PEFT's default
    assert randlora_scaling(640, 4) == 160  # its trap: the rank changed, alpha not
    assert randlora_scaling(12, 6, 149) == pytest.approx(2 / math.sqrt(149))  # paper, language models
    assert [block_count(896, r) for r in (6, 896, 1)] == [150, 1, 896]
    assert [block_count(10, r) for r in (3, 5, 9)] == [4, 2, 2]


def test_diagonals_start_at_zero_and_one_over_d():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        lam, gamma = init_diagonals(torch.ones(7, 5, dtype=dtype), 2)
        assert (lam.shape, gamma.shape) == ((3, 2), (3, 5)) and lam.dtype == gamma.dtype == wide
        assert not lam.any() and torch.equal(gamma, torch.full_like(gamma, 0.2))


# Exact invariants, numbered as in the chapter.


@given(shapes())
def test_1_starts_at_the_base_bit_for_bit_and_only_lambda_moves(shape):
    m, n, r = shape
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for fused in (False, True):
            layer, x = randlora(m, n, r, moved=False, dtype=dtype, fused=fused), gaussian(4, n).to(dtype)
            assert torch.equal(layer(x), layer.base(x))
    layer = randlora(m, n, r, moved=False)
    layer(gaussian(5, n)).sum().backward()
    assert layer.lam.grad.any() and not layer.gamma.grad.any()


@given(shapes())
def test_2_the_layer_is_the_formula_tall_square_and_wide(shape):
    m, n, r = shape
    layer, x = randlora(m, n, r, scale=1.5), gaussian(4, n)
    W = sum_of_blocks(*layer.factors(), 1.5)
    W = W if m >= n else W.T
    assert layer.factors()[1].shape == (math.ceil(min(m, n) / r), max(m, n), r)  # the last block is whole
    assert_close(layer.delta_weight(), W)
    assert_close(layer.update(x), x @ W.T)


@given(shapes())
def test_3_count(shape):
    m, n, r = shape
    wanted = math.ceil(min(m, n) / r) * (r + min(m, n))
    assert sum(p.numel() for p in randlora(m, n, r).parameters() if p.requires_grad) == wanted


def test_3_layers_of_one_generator_share_their_bases_and_those_get_no_gradient():
    g = seeded()
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 4)).double()
    replace_linears(model, ".", partial(RandLoRALinear, rank=2, generator=g))
    model(gaussian(5, 6)).sum().backward()
    places = {t.untyped_storage().data_ptr() for layer in model for t in layer.factors()[:2]}
    assert len(places) == 2 and model[0].bases is model[2].bases
    assert model[0].bases.A.shape == (2, 6) and model[0].bases.B.shape == (3, 2, 9)  # as large as needed, no larger
    assert not any(t.requires_grad for layer in model for t in layer.factors()[:2])
    assert all(p.grad is not None for layer in model for p in (layer.lam, layer.gamma))


@given(shapes(), st.sampled_from(["uniform", "gaussian"]))
def test_4_dense_bases_give_full_rank_at_every_basis_rank(shape, distribution):
    m, n, r = shape
    layer = randlora(m, n, r, distribution=distribution)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == min(m, n)


@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "ternary"])
@pytest.mark.parametrize("rank", [6, 10, 64])
def test_4_full_rank_at_64(distribution, rank):
    options = {"distribution": distribution, "sparsity": 3.0}
    for seed in range(3):
        assert torch.linalg.matrix_rank(randlora(64, 64, rank, seed=seed, **options).delta_weight()) == 64
    assert torch.linalg.matrix_rank(LoRALinear(nn.Linear(64, 64), 8).delta_weight()) <= 8


def test_4_fewer_blocks_are_not_enough():
    """Full rank comes from the count of blocks: without one of them the rank is at most (blocks - 1)·r."""
    A, B, lam, gamma = randlora(12, 10, 3).factors()
    assert torch.linalg.matrix_rank(delta_weight(A, B[1:], lam[1:], gamma[1:], 1.0)) == 9


@given(st.integers(1, 8), st.integers(1, 8))
def test_5_one_block_is_vera(D, d):
    A, B, lam, gamma = factors(D, d, d)
    vera = B[0] * lam @ (A * gamma)
    assert_close(delta_weight(A, B, lam, gamma, 2.0), 2 * vera)


@given(st.integers(1, 8))
def test_6_rank_one_blocks_reach_every_square_matrix(d):
    target = gaussian(d, d, seed=5)
    A, B, lam, _ = factors(d, d, 1)
    columns = B[:, :, 0].T + 3 * torch.eye(d, dtype=torch.float64)  # invertible
    gamma = torch.linalg.solve(columns * lam[:, 0], target) / A
    assert_close(delta_weight(A, columns.T[:, :, None], lam, gamma, 1.0), target, 1e-6)


def test_7_the_backward_of_its_own_is_that_of_autograd():
    A, B, lam, gamma = factors(5, 4, 3)
    inputs = [t.requires_grad_() for t in (lam, gamma)]
    assert torch.autograd.gradcheck(lambda lam, gamma: mixed_rows(A, lam, gamma), inputs)
    x = gaussian(3, 4, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda *p: randlora_update(p[0], A, B, *p[1:], 0.7), [x, *inputs])
    G = gaussian(6, 4, seed=6)
    got = torch.autograd.grad(mixed_rows(A, lam, gamma), inputs, G)
    wanted = torch.autograd.grad((lam[:, :, None] * A * gamma[:, None]).flatten(0, 1), inputs, G)
    for one, other in zip(got, wanted):
        assert_close(one, other)


def test_7_no_product_of_a_block_is_kept_for_the_backward():
    layer, x, kept = randlora(40, 40, 4), gaussian(2, 40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixed_rows(*(layer.factors()[i] for i in (0, 2, 3)))
    assert max(t.numel() for t in kept) == 10 * 40  # Γ; the mixed rows have 40·40
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.update(x)
    own = {t.untyped_storage().data_ptr() for t in (*layer.factors(), x)}
    assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) <= 40 * 40 + 2 * 40 + 40


@given(shapes(), st.floats(0.1, 10))
def test_8_scale_symmetry(shape, c):
    D, d, r = max(shape[:2]), min(shape[:2]), shape[2]
    A, B, lam, gamma = factors(D, d, r)
    c = c * (1 + torch.arange(len(lam), dtype=torch.float64)[:, None])  # another one for each block
    assert_close(delta_weight(A, B, lam * c, gamma / c, 1.0), delta_weight(A, B, lam, gamma, 1.0))


@given(shapes())
def test_9_merged_unmerged_and_fused_agree_with_their_gradients(shape):
    m, n, r = shape
    layer, x = randlora(m, n, r), gaussian(4, n)
    fused = copy.deepcopy(layer)
    fused.fused = True
    assert_close(layer.merged()(x), layer(x), 1e-10)
    assert_close(fused(x), layer(x), 1e-10)
    grads = []
    for one in (layer, fused):
        z = x.clone().requires_grad_()
        one(z).square().sum().backward()
        grads.append((one.lam.grad, one.gamma.grad, z.grad))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_dropout_acts_on_the_update_only():
    layer, x = randlora(5, 5, 2, dropout=0.5), gaussian(200, 5)
    assert_dropout_on_the_update(layer, x, 1e-11)
    layer.eval()
    assert_close(layer(x), layer.base(x) + x @ layer.delta_weight().T)


def test_the_fused_layer_compiles_to_one_graph():
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    layer, x = randlora(6, 4, 2, fused=True), gaussian(3, 4)
    try:
        assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# Bases: shared, never stored, always the same.


def two_layers(seed, **options):
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 20)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(gaussian(*p.shape, seed=4))
    replace_linears(model, ".", partial(RandLoRALinear, rank=3, generator=seeded(seed), **options))
    for _, layer in adapters(model):
        nn.init.normal_(layer.lam, generator=seeded(seed + 10))
    return model


def test_a_state_dict_holds_seed_and_diagonals_not_bases():
    layer = randlora(64, 64, 4)
    state = {k: v for k, v in layer.state_dict().items() if not k.startswith("base.")}
    assert {k: tuple(v.shape) for k, v in state.items()} == {"lam": (16, 4), "gamma": (16, 64), "recipe": (5,)}
    assert state["recipe"][0] == 0
    assert [name for name, _ in layer.named_buffers()] == ["recipe"]  # nothing for DDP to broadcast


def test_the_bases_depend_on_the_seed_not_on_the_state():
    g = seeded(3)
    first = RandLoRALinear(nn.Linear(6, 6), 2, generator=g)
    torch.rand(5, generator=g)
    second = RandLoRALinear(nn.Linear(6, 6), 2, generator=g)
    assert first.bases is second.bases and first.bases.seed == 3
    assert randlora(6, 6, 2, seed=4).bases is not randlora(6, 6, 2, seed=3).bases
    torch.manual_seed(11)
    assert RandLoRALinear(nn.Linear(6, 6), 2).bases.seed == 11


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, 0])
def test_every_seed_fits_a_checkpoint(seed):
    layer = randlora(6, 6, 2, seed=seed)
    other = randlora(6, 6, 2, seed=1, moved=False)
    other.load_state_dict(layer.state_dict())
    assert_close(other.delta_weight(), layer.delta_weight(), 0)


def test_a_file_brings_its_bases_along(tmp_path):
    old, new, x = two_layers(1), two_layers(2), gaussian(5, 12)
    assert not torch.allclose(old(x), new(x))
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(old(x), new(x)) and new[0].bases is old[0].bases is new[2].bases
    assert sum(t.numel() for t in load_file(tmp_path / "x").values()) == 2 * (4 * (3 + 12) + 4)


@pytest.mark.parametrize("options", [{"distribution": "gaussian"}, {"distribution": "ternary"}, {"rank": 4}])
def test_a_file_of_other_bases_is_refused(options, tmp_path):
    model = two_layers(1)
    save_adapters(model, tmp_path / "x")
    other = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 20)).double()
    replace_linears(other, ".", partial(RandLoRALinear, generator=seeded(1), **{"rank": 3, **options}))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="layer 0"):
        load_adapters(other, tmp_path / "x")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_a_recipe_that_draws_something_else_is_refused():
    layer, other = randlora(6, 6, 2, seed=1), randlora(6, 6, 2, seed=2, distribution="gaussian")
    before = copy.deepcopy(other.state_dict())
    delta = other.delta_weight().clone()
    with pytest.raises(ValueError, match="recipe: got bases that their seed 1 does not draw here"):
        other.load_state_dict(layer.state_dict())
    assert torch.equal(other.delta_weight(), delta) and torch.equal(other.recipe, before["recipe"])


def test_copies_and_moves_keep_the_bases_shared():
    model = two_layers(5)
    twin = copy.deepcopy(model)
    assert twin[0].bases is model[0].bases
    assert pickle.loads(pickle.dumps(model))[0].bases is model[0].bases
    single = copy.deepcopy(model).float()
    assert single[0].bases is single[2].bases is not model[0].bases
    assert {t.dtype for t in single[0].factors()} == {torch.float32}
    assert_close(single[2].delta_weight().double(), model[2].delta_weight(), 1e-3)
    empty = copy.deepcopy(model).to("meta")
    assert all(t.is_meta for t in empty[0].factors())
    assert {t.device.type for t in empty.to_empty(device="cpu")[0].factors()} == {"cpu"}
    assert torch.equal(model.double()[0].delta_weight(), twin[0].delta_weight())


def test_the_bases_of_a_model_that_is_gone_are_gone():
    from lowrank_ref.adapters import randlora_bases

    layer = randlora(6, 6, 2, seed=12345)
    key = [k for k in randlora_bases._shared if k[0] == 12345]
    assert len(key) == 1
    del layer
    assert key[0] not in randlora_bases._shared


# PEFT.


def peft_model(*shapes, r=3, **options):
    """Linear layers of these shapes (m, n) with PEFT's RandLoRA, in float64, with random trained numbers."""
    peft = pytest.importorskip("peft")
    names = [str(i) for i in range(len(shapes))]
    config = peft.RandLoraConfig(r=r, randlora_alpha=7, target_modules=names, **options)
    model = peft.get_peft_model(nn.Sequential(*(nn.Linear(n, m) for m, n in shapes)), config).double()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "randlora" in name:
                p.copy_(gaussian(*p.shape, seed=i))
    return model


def tensors_of(layer):
    names = ("randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma")
    return {name: getattr(layer, name)["default"].detach() for name in names}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"very_sparse": True}])
@pytest.mark.parametrize("shapes", [[(6, 6)], [(8, 6)], [(6, 8)], [(7, 5)], [(8, 8), (8, 5), (4, 10), (3, 3)]])
def test_peft_computes_the_same_on_the_same_bases(shapes, options):
    model = peft_model(*shapes, **options)
    for (m, n), theirs in zip(shapes, model.base_model.model):
        A, B, lam, gamma = from_peft(tensors_of(theirs), m, n)
        ours = RandLoRALinear(copy.deepcopy(theirs.base_layer), 3, scale=randlora_scaling(7, 3))
        ours.bases = SimpleNamespace(slices=lambda *size, A=A, B=B: (A, B))
        with torch.no_grad():
            ours.lam.copy_(lam)
            ours.gamma.copy_(gamma)
        assert_close(ours.delta_weight(), theirs.get_delta_weight("default"))
        x = gaussian(5, n, seed=9)
        y, z = ours(x), theirs(x)
        assert_close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(ours.lam.grad, theirs.randlora_lambda["default"].grad.T, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.gamma.grad, theirs.randlora_gamma["default"].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_peft_starts_as_we_start():
    peft = pytest.importorskip("peft")
    config = peft.RandLoraConfig(r=3, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(10, 8)), config).base_model.model[0]
    lam, gamma = init_diagonals(theirs.base_layer.weight, 3)
    assert torch.equal(lam, theirs.randlora_lambda["default"].T)
    torch.testing.assert_close(gamma, theirs.randlora_gamma["default"].data)
    assert theirs.scaling["default"] == randlora_scaling(640, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(6, 6), (8, 5), (5, 8)])
def test_peft_runs_our_layer(shape):
    ours, model = randlora(*shape, 2, scale=7 / 2), peft_model(shape, r=2)
    theirs = model.base_model.model[0]
    theirs.base_layer.load_state_dict(ours.base.state_dict())
    for name, value in to_peft(*ours.factors()).items():
        assert getattr(theirs, name)["default"].shape == value.shape
        getattr(theirs, name)["default"].data = value.detach()
    x = gaussian(4, shape[1])
    assert_close(theirs(x), ours(x))


@given(shapes())
def test_to_peft_and_back(shape):
    D, d, r = max(shape[:2]), min(shape[:2]), shape[2]
    for got, wanted in zip(from_peft(to_peft(*factors(D, d, r)), D, d), factors(D, d, r)):
        assert torch.equal(got, wanted)


# Bad input.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0, wanted 1 <= rank <= 4"),
        ({"rank": 5}, ValueError, "rank: got 5, wanted 1 <= rank <= 4"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0"),
        ({"scale": math.nan}, ValueError, "scale: got nan"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
        ({"distribution": "normal"}, ValueError, "distribution: got 'normal', wanted one of"),
        ({"sparsity": 0.5}, ValueError, "sparsity: got 0.5"),
        ({"fused": True, "dropout": 0.1}, ValueError, "fused: got True with dropout 0.1"),
    ],
)
def test_bad_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        RandLoRALinear(nn.Linear(4, 6), **{"rank": 2, **options})
