"""SLTrain: equations against loops, the exact invariants in float64, what is kept for backward, and whole models."""

import copy
import math
from functools import partial

import pytest
import torch
from battery import batch, distributed_layer, linear, loss, seeded, train
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from torch import nn
from torch.nn import functional as F

from lowrank_ref.core.accounting import nbytes, numel, state_bytes, state_numel
from lowrank_ref.core.io import load_tensors, save_tensors
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.models import GPT, llama_shape
from lowrank_ref.optimizers import GaLoreAdamW, GaLoreAdamW8bit, per_layer_updates
from lowrank_ref.pretraining.sltrain import (
    SLTrainLinear,
    _product,
    dense_weight,
    init_parameters,
    parameter_count,
    parameter_gradients,
    random_support,
    sparse_matrix,
    training_bytes,
)

INSIDE = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@st.composite
def shapes(draw):
    """(m, n, r, δ): tall, wide, square; r and δ with both ends."""
    m, n = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rank = draw(st.sampled_from([0, 1, min(m, n)]) | st.integers(0, min(m, n)))
    return m, n, rank, draw(st.sampled_from([0.0, 1.0, 0.03]) | st.floats(0, 1))


def parts(m, n, rank, density):
    """A, B, values, support and scale of a trained layer."""
    support = random_support(m, n, density, seeded())
    return gaussian(rank, n), gaussian(m, rank, seed=1), gaussian(len(support), seed=2), support, 0.7


def layer(m=10, n=12, *, rank=3, density=0.2, moved=True, dtype=torch.float64, seed=0, **options):
    """An SLTrain layer; `moved` gives B random values, as training would."""
    built = SLTrainLinear(n, m, rank=rank, density=density, generator=seeded(seed), **options).to(dtype)
    if moved:
        with torch.no_grad():
            built.B.copy_(gaussian(m, rank, seed=1))
    return built


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# Each equation against a loop.


@given(shapes())
def test_support_has_the_exact_count_of_different_sorted_places(shape):
    m, n, _, density = shape
    support = random_support(m, n, density, seeded())
    places = support.tolist()
    assert support.dtype == torch.int64 and len(places) == int(density * (m * n)) == parameter_count(m, n, 0, density)
    assert places == sorted(set(places)) and all(0 <= p < m * n for p in places)


def test_every_place_is_as_likely_as_any_other():
    """4,000 draws of 6 from 24 places: each comes 1,000 times, with a standard deviation of 27."""
    g, counts = seeded(), torch.zeros(24)
    for _ in range(4000):
        counts[random_support(4, 6, 0.25, g)] += 1
    assert counts.sum() == 24_000 and (counts - 1000).abs().max() < 110


@given(shapes())
def test_dense_weight_by_loops(shape):
    m, n, _, _ = shape
    A, B, values, support, scale = parts(*shape)
    W, S = dense_weight(A, B, values, support, scale), sparse_matrix(values, support, (m, n))
    wanted = [[scale * sum((B[i, k] * A[k, j]).item() for k in range(len(A))) for j in range(n)] for i in range(m)]
    sparse = [[0.0] * n for _ in range(m)]
    for place, value in zip(support.tolist(), values.tolist()):
        wanted[place // n][place % n] += value
        sparse[place // n][place % n] = value
    assert_close(W, torch.tensor(wanted, dtype=torch.float64).reshape(m, n))
    assert S.tolist() == sparse


@given(shapes())
def test_parameter_gradients_by_loops(shape):
    m, n, rank, _ = shape
    A, B, values, support, s = parts(*shape)
    G = gaussian(m, n, seed=3)
    dA, dB, dv = parameter_gradients(G, A, B, support, s)
    for k in range(rank):
        for j in range(n):
            assert dA[k, j].item() == pytest.approx(s * sum((B[i, k] * G[i, j]).item() for i in range(m)))
        for i in range(m):
            assert dB[i, k].item() == pytest.approx(s * sum((G[i, j] * A[k, j]).item() for j in range(n)))
    assert dv.tolist() == [G[p // n, p % n].item() for p in support.tolist()]


def test_init_is_uniform_within_one_over_root_n_and_b_is_zero():
    A, B, values = init_parameters(50, 100, 400, 40_000, seeded())
    for drawn in (A, values):
        assert drawn.abs().max() <= 0.1 and drawn.abs().max() > 0.0999
        assert drawn.var().item() == pytest.approx(1 / 300, rel=0.03)
        assert abs(drawn.mean().item()) < 4 * math.sqrt(1 / 300 / 40_000)
    assert A.shape == (400, 100) and B.shape == (50, 400) and not B.any()


# The exact invariants.


@given(shapes())
def test_1_starts_at_s(shape):
    m, n, rank, density = shape
    start = layer(m, n, rank=rank, density=density, moved=False)
    S = sparse_matrix(start.values, start.support, (m, n))
    assert torch.equal(start.dense_weight(), S)
    assert int((S != 0).sum()) == int(density * (m * n))


def test_1_the_norm_at_the_start_is_root_density_of_a_dense_layer():
    start, dense = layer(200, 300, density=0.04, moved=False), nn.Linear(300, 200)
    assert (start.dense_weight().norm() / dense.weight.norm()).item() == pytest.approx(0.2, rel=0.03)


@given(shapes(), st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_2_output_and_gradients_are_those_of_the_dense_construction(shape, rows):
    m, n, rank, density = shape
    ours = layer(m, n, rank=rank, density=density)
    x, dY = gaussian(*rows, n, seed=4).requires_grad_(), gaussian(*rows, m, seed=5)
    y = ours(x)
    got = torch.autograd.grad(y, [x, *ours.parameters()], dY)
    W = ours.scale * ours.B @ ours.A + sparse_matrix(ours.values, ours.support, (m, n))
    wanted = F.linear(x, W, ours.bias)
    assert_close(y, wanted)
    for g, w in zip(got, torch.autograd.grad(wanted, [x, *ours.parameters()], dY)):
        assert_close(g, w, 1e-11)


def test_2_gradcheck():
    ours, x = layer(5, 7), gaussian(4, 7, seed=4).requires_grad_()
    product = lambda *tensors: _product(*tensors, ours.support, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(product, (x, ours.A, ours.B, ours.values))


def test_2_operator_passes_pytorchs_own_checks():
    ours, x = layer(5, 7), gaussian(4, 7, seed=4).requires_grad_()
    torch.library.opcheck(_product, (x, ours.A, ours.B, ours.values, ours.support, 0.7))


def test_2_output_and_gradients_equal_torch_sparse():
    """PyTorch's own sparse product as independent implementation."""
    ours, x = layer(10, 12), gaussian(4, 12, seed=4)
    values = ours.values.detach().clone().requires_grad_()
    places = torch.stack([ours.support // 12, ours.support % 12])
    S = torch.sparse_coo_tensor(places, values, (10, 12), check_invariants=True)
    y = torch.sparse.mm(S, x.T).T + ours.scale * (x @ ours.A.T @ ours.B.T) + ours.bias
    assert_close(ours(x), y)
    dY = gaussian(4, 10, seed=5)
    assert_close(torch.autograd.grad(ours(x), ours.values, dY)[0], torch.autograd.grad(y, values, dY)[0])


def test_3_gradient_of_the_values_is_the_dense_one_at_their_places():
    ours = layer()
    W = ours.dense_weight().detach().requires_grad_()
    x = batch(0)
    F.linear(x, W, ours.bias).square().sum().backward()
    ours(x).square().sum().backward()
    assert_close(ours.values.grad, W.grad.flatten()[ours.support], 1e-10)


def test_3_entries_off_the_support_never_change_while_b_is_zero():
    ours = layer(moved=False)
    ours.B.requires_grad_(False)
    before = ours.dense_weight().detach().clone()
    train(ours, torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=0.01), range(5))
    moved = (ours.dense_weight() != before).flatten()
    assert torch.equal(moved.nonzero().flatten(), ours.support)


@pytest.mark.parametrize("rank", [0, 3])
def test_4_all_places_trained_is_a_dense_layer(rank):
    """B = 0 stays where A and B are frozen; then density 1 is nn.Linear, step by step."""
    ours, dense = layer(rank=rank, density=1.0, moved=False), linear()
    with torch.no_grad():
        ours.values.copy_(dense.weight.flatten())
        ours.bias.copy_(dense.bias)
    ours.A.requires_grad_(False), ours.B.requires_grad_(False)
    for model in (ours, dense):
        trained = [p for p in model.parameters() if p.requires_grad]
        train(model, torch.optim.SGD(trained, lr=0.1, momentum=0.9), range(10))
    assert_close(ours.dense_weight(), dense.weight)
    assert_close(ours.bias, dense.bias)


def test_5_rank_zero_is_random_sparse_training_and_density_zero_a_low_rank_layer():
    sparse, low = layer(rank=0, bias=False), layer(density=0.0, bias=False)
    assert {name for name, p in sparse.named_parameters() if p.numel()} == {"values"}
    assert {name for name, p in low.named_parameters() if p.numel()} == {"A", "B"}
    assert_close(sparse.dense_weight(), sparse_matrix(sparse.values, sparse.support, (10, 12)))
    x = batch(0)
    assert_close(low(x), low.scale * x @ low.A.T @ low.B.T)
    assert torch.linalg.matrix_rank(low.dense_weight()) == 3

    both = layer(bias=False)  # frozen values of zero: the same low-rank layer, with the same gradients
    with torch.no_grad():
        both.values.zero_(), both.A.copy_(low.A), both.B.copy_(low.B)
    both.values.requires_grad_(False)
    assert_close(both(x), low(x))
    for model in (both, low):
        loss(model, x).backward()
    assert_close(both.A.grad, low.A.grad)
    assert_close(both.B.grad, low.B.grad)


LLAMA = {  # rank, density, million numbers: full, low-rank, SLTrain; million places in all supports
    "60M": (128, 0.03, 58.07, 42.77, 43.53, 0.759),
    "130M": (256, 0.03, 134.11, 94.00, 96.55, 2.548),
    "350M": (256, 0.03, 367.97, 185.22, 194.29, 9.071),
    "1B": (512, 0.03, 1339.08, 609.31, 645.55, 36.24),
    "7B": (1024, 0.05, 6738.42, 2820.94, 3144.74, 323.8),
}


def llama_counts(size, rank, density):
    dim, ffn, layers, _, vocab = size.values()
    inner = [(dim, dim)] * 4 + [(ffn, dim)] * 2 + [(dim, ffn)]
    rest = 2 * vocab * dim + (2 * layers + 1) * dim
    return rest + layers * sum(parameter_count(m, n, rank, density) for m, n in inner)


@pytest.mark.parametrize("name", LLAMA)
def test_6_counts_of_the_llama_models(name):
    rank, density, full, low, both, places = LLAMA[name]
    sizes = {"7B": {"dim": 4096, "ffn": 11008, "layers": 32, "heads": 32, "vocab_size": 32_000}}
    size = sizes.get(name) or llama_shape(name)
    counted = [llama_counts(size, *options) for options in ((0, 1.0), (rank, 0.0), (rank, density))]
    assert [round(c / 1e6, 2) for c in counted] == [full, low, both]
    assert (counted[2] - counted[1]) / 1e6 == pytest.approx(places, rel=1e-3)
    if name == "60M":
        assert counted == [58_073_600, 42_770_944, 43_529_832]


def test_6_a_model_holds_what_the_formula_says():
    size = {"dim": 32, "ffn": 88, "layers": 2, "heads": 2, "vocab_size": 50}
    model = GPT(**size, length=8)
    assert numel(model.parameters()) == llama_counts(size, 0, 1.0)
    replace_linears(model, INSIDE, partial(SLTrainLinear.from_linear, rank=4, density=0.1)).requires_grad_(True)
    assert numel(model.parameters()) == llama_counts(size, 4, 0.1)
    one = layer(7, 9, rank=2, density=0.3)
    assert numel(one.parameters()) == parameter_count(7, 9, 2, 0.3) + 7 == 2 * 16 + 18 + 7


def test_6_bytes_of_weights_moments_and_places():
    """In bfloat16 6 bytes a number and 8 a place; the paper's figure 1 shows 8.0, 3.7 and 4.1 to 4.2 GB for 1B."""
    full, low, both = (llama_counts(llama_shape("1B"), *o) for o in ((0, 1.0), (512, 0.0), (512, 0.03)))
    assert [
        round(b / 1e9, 2) for b in (training_bytes(full), training_bytes(low), training_bytes(both, both - low))
    ] == [
        8.03,
        3.66,
        4.16,
    ]
    model = layer(64, 64, rank=8, density=0.1, bias=False, dtype=torch.bfloat16)
    steps = torch.optim.Adam(model.parameters())
    model(gaussian(4, 64).bfloat16()).sum().backward()
    steps.step()
    measured = nbytes(model.parameters()) + nbytes(model.buffers()) + state_bytes(steps)
    assert measured == training_bytes(parameter_count(64, 64, 8, 0.1), 409)


def test_7_supports_follow_the_generator_and_differ_between_layers():
    state = torch.get_rng_state()
    g = seeded(1)
    first, second = (SLTrainLinear(12, 10, rank=2, density=0.3, generator=g) for _ in range(2))
    again = SLTrainLinear(12, 10, rank=2, density=0.3, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in first.state_dict().items())
    assert not torch.equal(first.support, second.support)


def test_7_places_stay_int64_in_half_precision_and_come_back_from_a_file(tmp_path):
    old, new = layer(seed=1).to(torch.bfloat16), layer(seed=2).to(torch.bfloat16)
    assert old.support.dtype == torch.int64 and old.values.dtype == torch.bfloat16
    assert not torch.equal(old.support, new.support)
    torch.save(old.state_dict(), tmp_path / "x")
    new.load_state_dict(torch.load(tmp_path / "x", weights_only=True))
    assert new.support.dtype == torch.int64 and torch.equal(new.dense_weight(), old.dense_weight())


@pytest.mark.parametrize("n, low, high", [(512, 512, 512), (64, 44, 56)])
def test_8_a_random_support_is_full_rank_once_it_hits_every_row_and_column(n, low, high):
    for seed in range(3):
        start = layer(n, n, rank=2, density=0.03, moved=False, seed=seed)
        assert low <= torch.linalg.matrix_rank(start.dense_weight()) <= high


def test_9_low_rank_with_b_zero_cannot_start_and_s_wakes_it():
    tokens = torch.arange(48).reshape(4, 12) % 50

    def gradients(density):
        model = GPT(50, dim=16, layers=2, heads=2, length=12, generator=seeded()).double()
        build = partial(SLTrainLinear.from_linear, rank=4, density=density, generator=seeded())
        replace_linears(model, INSIDE, build).requires_grad_(True)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        return {name: p.grad for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim != 1}, {
            name: p.grad for name, p in model.named_parameters() if name.endswith("values")
        }

    matrices, _ = gradients(0.0)
    assert len(matrices) == 28 and not any(g.any() for g in matrices.values())
    matrices, values = gradients(0.2)
    assert all(g.any() for g in values.values())
    assert all(bool(g.any()) == name.endswith("B") for name, g in matrices.items())


# What is kept for backward.


def kept(function, x):
    """Output of a function, and the shapes of all tensors that it keeps for its backward."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(x), shapes


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "aot_eager_decomp_partition"])
def test_nothing_of_the_size_of_w_is_kept(backend, no_shape_checks):
    """The plain construction keeps W. Compiled, an autograd.Function kept it as well: hence the operator."""
    torch._dynamo.reset()
    ours, x = layer(20, 30, bias=False), gaussian(5, 30, seed=4).requires_grad_()
    _, dense = kept(
        lambda x: F.linear(x, ours.scale * ours.B @ ours.A + sparse_matrix(ours.values, ours.support, (20, 30))), x
    )
    assert (30, 20) in dense  # Wᵀ, a view of it
    y, shapes = kept(ours if backend is None else torch.compile(ours, fullgraph=True, backend=backend), x)
    assert sorted(shapes) == sorted([(5, 30), (3, 30), (20, 3), (120,), (120,)])
    y.square().sum().backward()
    got = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours(x).square().sum().backward()
    for name, p in ours.named_parameters():
        assert_close(got[name], p.grad, 1e-10)


def test_a_layer_with_bias_compiles_to_one_graph_under_autocast(no_shape_checks):
    torch._dynamo.reset()
    ours, x = layer(dtype=torch.float32), batch(0, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = compiled(x), ours(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted)


# 8-bit moments and per-layer updates: the optimizers are those of GaLore's file, without a rank.


def small_gpt(dim=16):
    model = GPT(50, dim=dim, layers=2, heads=2, length=12, generator=seeded())
    build = partial(SLTrainLinear.from_linear, rank=4, density=0.2, generator=seeded())
    return replace_linears(model, INSIDE, build).requires_grad_(True)


def pretrain(model, optimizer, steps=4):
    for step in range(steps):
        tokens = torch.randint(50, (4, 13), generator=seeded(step))
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("build", [GaLoreAdamW, GaLoreAdamW8bit])
def test_per_layer_updates_give_the_same_bits_and_leave_no_gradient(build):
    plain, layered = small_gpt(), small_gpt()
    pretrain(plain, build(plain.parameters(), lr=0.01))
    optimizer = build(layered.parameters(), lr=0.01)
    per_layer_updates(optimizer)
    pretrain(layered, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), layered.parameters()))
    assert all(p.grad is None for p in layered.parameters()) and all(p.grad is not None for p in plain.parameters())


def test_8bit_moments_take_a_quarter_of_the_bytes_and_follow_the_32bit_ones():
    """Measured after 10 steps of 0.001: the two runs end 0.007 apart, relative to the way from the start."""

    def build():
        return SLTrainLinear(256, 128, rank=40, density=0.25, bias=False, generator=seeded())

    start, exact, rough = build(), build(), build()
    optimizers = GaLoreAdamW(exact.parameters(), lr=0.001), GaLoreAdamW8bit(rough.parameters(), lr=0.001)
    x, target = (torch.randn(64, n, generator=seeded(n)) for n in (256, 128))
    for model, optimizer in zip((exact, rough), optimizers):
        for _ in range(10):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    numbers = parameter_count(128, 256, 40, 0.25)
    assert state_numel(optimizers[0]) == 2 * numbers and state_bytes(optimizers[0]) == 8 * numbers
    assert state_bytes(optimizers[1]) == 2 * (numbers + 4 * numbers // 256)  # A, B and values are whole blocks of 256
    end, way = rough.dense_weight() - exact.dense_weight(), exact.dense_weight() - start.dense_weight()
    assert 0 < end.norm() / way.norm() < 0.05


# What every layer must do.


def test_all_parameters_get_gradients_and_nothing_else_does():
    ours = layer()
    ours(batch(0)).square().sum().backward()
    assert {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()} == {
        "A",
        "B",
        "values",
        "bias",
    }
    assert [name for name, _ in ours.named_buffers()] == ["support"]


def test_training_is_deterministic_and_the_support_stays():
    first, second = layer(), layer()
    support = first.support.clone()
    for model in (first, second):
        train(model, torch.optim.Adam(model.parameters(), lr=0.01), range(3))
    assert torch.equal(first.support, support)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))


def test_bfloat16_stays_bfloat16_and_finite():
    ours = layer(dtype=torch.bfloat16)
    train(ours, torch.optim.Adam(ours.parameters(), lr=0.01), range(3), dtype=torch.bfloat16)
    y = ours(batch(0, torch.bfloat16))
    assert y.dtype == torch.bfloat16 and bool(torch.isfinite(y).all())
    assert all(p.dtype == torch.bfloat16 for p in ours.parameters())


def test_autocast():
    ours, x = layer(dtype=torch.float32), batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(y.float(), ours(x), rtol=0.05, atol=0.2)


def test_deepcopy_is_equal_and_independent():
    ours = layer()
    other = copy.deepcopy(ours)
    assert torch.equal(other(batch(0)), ours(batch(0)))
    with torch.no_grad():
        other.values.zero_(), other.support.zero_()
    assert ours.values.all() and ours.support.any()


def test_file_round_trip_truncation_and_foreign_state(tmp_path):
    old, new = layer(seed=1), layer(seed=2)
    save_tensors(old.state_dict(), tmp_path / "x", kind="sltrain")
    new.load_state_dict(load_tensors(tmp_path / "x", kind="sltrain"))
    assert torch.equal(old(batch(0)), new(batch(0)))
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_tensors(tmp_path / "x", kind="sltrain")
    for foreign in (layer(density=0.3), layer(rank=2), nn.Linear(12, 10)):
        with pytest.raises(RuntimeError, match="state_dict"):
            new.load_state_dict(foreign.state_dict())


def test_from_linear_takes_shape_bias_and_dtype_but_no_weight():
    base = linear(torch.bfloat16).eval()
    ours = SLTrainLinear.from_linear(base, rank=2, density=0.1, generator=seeded())
    assert torch.equal(ours.bias, base.bias) and ours.bias is not base.bias
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16} and not ours.training
    with torch.no_grad():
        base.weight.zero_()
    assert ours.values.any() and ours.A.any()
    assert SLTrainLinear.from_linear(nn.Linear(12, 10, bias=False), rank=2).bias is None


def test_from_conv1d_maps_the_same_sides():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    ours = SLTrainLinear.from_linear(Conv1D(10, 12), rank=2, density=0.1)
    assert (ours.in_features, ours.out_features) == (12, 10) and ours(torch.ones(3, 12)).shape == (3, 10)


def test_to_linear_is_plain_and_computes_the_same():
    for bias in (True, False):
        ours = layer(bias=bias).eval()
        plain = ours.to_linear()
        assert type(plain) is nn.Linear and not plain.training and (plain.bias is None) != bias
        assert_close(plain(batch(0)), ours(batch(0)))
        with torch.no_grad():
            [p.zero_() for p in plain.parameters()]
        assert ours.values.all() and ours.dense_weight().any()


def test_a_frozen_part_gets_no_gradient():
    ours = layer()
    ours.A.requires_grad_(False)
    ours(batch(0)).sum().backward()
    assert ours.A.grad is None and ours.B.grad.any() and ours.values.grad.any()


@pytest.mark.slow
def test_two_processes_equal_one_and_share_the_support(tmp_path):
    make = partial(SLTrainLinear.from_linear, rank=3, density=0.2)
    in_processes(distributed_layer, tmp_path, make)
    first, second = (torch.load(tmp_path / f"rank {rank}", weights_only=True) for rank in range(2))
    alone = make(linear(), generator=seeded(0))
    start = copy.deepcopy(alone.state_dict())
    train(alone, torch.optim.Adam(alone.parameters(), lr=0.01), range(3))
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key])
        assert_close(first[key], value, 1e-9)
        assert torch.equal(value, start[key]) == (key == "support")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 11}, ValueError, "rank: got 11, wanted 1 <= rank <= 10"),
        ({"rank": -1}, ValueError, "rank"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"density": -0.1}, ValueError, "density"),
        ({"density": 1.1}, ValueError, "density"),
        ({"density": math.nan}, ValueError, "density"),
        ({"density": "3 %"}, TypeError, "density"),
        ({"alpha": 0}, ValueError, "alpha"),
        ({"in_features": 0}, ValueError, "n: got 0"),
        ({"out_features": 1.5}, TypeError, "1.5"),
    ],
)
def test_bad_arguments_raise(options, error, message):
    with pytest.raises(error, match=message):
        SLTrainLinear(**{"in_features": 12, "out_features": 10, "rank": 3, **options})


def test_bad_bases_raise():
    whole = linear()
    whole.weight = nn.Parameter(whole.weight.to(torch.int8), requires_grad=False)
    for base in (nn.ReLU(), nn.Conv1d(12, 10, 1), layer(), whole):
        with pytest.raises(TypeError, match="base"):
            SLTrainLinear.from_linear(base, rank=2)


def test_surgery_names_near_candidates():
    model = GPT(50, dim=16, layers=1, heads=2, length=12)
    with pytest.raises(ValueError, match="blocks.0.attn.q"):
        replace_linears(model, r"attention\.q$", partial(SLTrainLinear.from_linear, rank=2))
