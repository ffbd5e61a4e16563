"""The quantisers of BitNet b1.58, the packed layout and the packed layers, against slow loops and transformers."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.io import save_tensors
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lowbit import BitLinear, PackedLinear, load_packed, pack, pack_model, unpack
from lowrank_ref.lowbit import ternary as t

sizes = st.integers(1, 9)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def codes(m, n, seed=0):
    return torch.randint(-1, 2, (m, n), generator=seeded(seed), dtype=torch.int8)


def bit_linear(m=6, n=10, *, dtype=torch.float64, bias=True, **options):
    base = nn.Linear(n, m, bias=bias, dtype=dtype)
    base.weight.data.copy_(randn(m, n, dtype=dtype))
    layer = BitLinear(base, **options)
    if layer.gain is not None:
        layer.gain.data.copy_(1 + 0.1 * randn(n, seed=3, dtype=dtype))
    return layer


# Quantisers.


@given(m=sizes, n=sizes, seed=st.integers(0, 99))
def test_weights_by_a_loop(m, n, seed):
    W = randn(m, n, seed=seed)
    beta = sum(abs(w) for row in W.tolist() for w in row) / (m * n)
    assert math.isclose(t.absmean(W).item(), beta, rel_tol=1e-12)
    wanted = [[max(-1, min(1, round(w / beta))) for w in row] for row in W.tolist()]  # round: half to even
    assert t.ternary_codes(W, torch.tensor(beta, dtype=torch.float64)).tolist() == wanted


@given(rows=sizes, n=sizes, seed=st.integers(0, 99))
def test_activations_by_a_loop(rows, n, seed):
    x = randn(rows, n, seed=seed)
    s = t.absmax_scale(x)
    q = t.int8_codes(x, s)
    for i, row in enumerate(x.tolist()):
        scale = 127 / max(map(abs, row))
        assert math.isclose(s[i, 0].item(), scale, rel_tol=1e-14)
        assert q[i].tolist() == [round(v * s[i, 0].item()) for v in row]
    assert q.abs().amax() == 127  # the largest entry of a token fills the range; -128 is never used
    assert (q / s - x).abs().max() <= 0.5 / s.min() * (1 + 1e-12)


def test_halves_round_to_even():
    W = torch.tensor([[0.5, -0.5, 1.5, 0.51]])
    assert t.ternary_codes(W, torch.tensor(1.0)).tolist() == [[0, 0, 1, 1]]


@given(m=sizes, n=sizes, seed=st.integers(0, 99))
def test_quantising_again_keeps_the_codes_and_shrinks_the_scale(m, n, seed):
    W = randn(m, n, seed=seed)
    beta = t.absmean(W)
    T = t.ternary_codes(W, beta)
    again = t.absmean(beta * T)
    share = T.abs().mean()
    torch.testing.assert_close(again, beta * share, rtol=1e-12, atol=0)
    assert torch.equal(t.ternary_codes(beta * T, again), T)
    assert share == 1 or not torch.isclose(again, beta)  # the quantiser as a whole is not idempotent


@given(m=sizes, n=sizes, c=st.floats(1e-2, 1e2))
def test_scaling_a_weight_scales_beta_only(m, n, c):
    W = randn(m, n)
    assert torch.equal(t.ternary_codes(c * W, t.absmean(c * W)), t.ternary_codes(W, t.absmean(W)))
    torch.testing.assert_close(t.absmean(c * W), c * t.absmean(W), rtol=1e-12, atol=0)


def test_scaling_an_input_keeps_its_codes_and_behind_a_norm_the_output():
    x = randn(5, 10)
    for c in (0.25, 8.0):  # powers of two: no rounding
        assert torch.equal(t.int8_codes(c * x, t.absmax_scale(c * x)), t.int8_codes(x, t.absmax_scale(x)))
    layer = bit_linear()
    torch.testing.assert_close(layer(1e3 * x), layer(x), rtol=0, atol=1e-4)  # up to the norm's eps of 1e-5
    bare = bit_linear(sub_norm=False, bias=False)
    torch.testing.assert_close(bare(4 * x), 4 * bare(x))


def test_gaussian_weights_have_the_zero_share_and_error_of_theory():
    W = randn(1000, 1000)
    beta = t.absmean(W)
    T = t.ternary_codes(W, beta)
    zero = math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))
    assert abs((T == 0).double().mean().item() - zero) < 0.002 and abs(zero - 0.310) < 0.001
    assert abs(((beta * T - W).norm() / W.norm()).item() - 0.513) < 0.002


@given(m=sizes, n=sizes, rows=sizes)
def test_forward_and_gradients_are_those_of_the_quantised_operands(m, n, rows):
    x, W, dY = randn(rows, n).requires_grad_(), randn(m, n, seed=1).requires_grad_(), randn(rows, m, seed=2)
    s, beta = t.absmax_scale(x), t.absmean(W)
    xq, Wq = (t.int8_codes(x, s) / s).detach(), (beta * t.ternary_codes(W, beta)).detach()
    y = t.ternary_linear(x, W)
    torch.testing.assert_close(y, xq @ Wq.T, rtol=0, atol=1e-12)
    y.backward(dY)
    torch.testing.assert_close(W.grad, dY.T @ xq, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, dY @ Wq, rtol=0, atol=1e-12)


def test_straight_through_has_the_exact_value_and_gradient_one():
    x = randn(50, dtype=torch.float32).requires_grad_()
    y = t.straight_through(x, x.round())
    y.sum().backward()
    assert torch.equal(y, x.round()) and torch.equal(x.grad, torch.ones(50))


def test_beta_is_a_constant_in_the_gradient():
    """As a function of W it would add mean(∂W̃ ∘ T)·sign(W), without any gradient through the rounding."""
    W, dW = randn(5, 6).requires_grad_(), randn(5, 6, seed=1)
    T = t.ternary_codes(W, t.absmean(W)).detach()
    (through_beta,) = torch.autograd.grad((W.abs().mean() * T * dW).sum(), W)
    torch.testing.assert_close(through_beta, (dW * T).mean() * W.detach().sign())
    assert not t.absmean(W).requires_grad and through_beta.abs().min() > 0.01


def test_zero_weights_and_zero_tokens_are_no_division_by_zero():
    layer = bit_linear(bias=False)
    assert not layer(torch.zeros(2, 10, dtype=torch.float64)).any()
    layer.weight.data.zero_()
    y = layer(randn(2, 10))
    assert not y.any() and not PackedLinear(layer)(randn(2, 10)).any()


def test_each_token_has_its_own_scale():
    layer, x = bit_linear(), randn(2, 7, 10)
    x[0, 3] *= 1000
    whole = layer(x)
    alone = torch.stack([layer(x[:, i]) for i in range(7)], dim=1)  # as in decoding, one token at a time
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_transformers(packed):
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    x, W = randn(5, 12, dtype=torch.float32), randn(6, 12, seed=1, dtype=torch.float32)
    theirs = bitnet.AutoBitLinear(12, 6, bias=False, online_quant=True)
    theirs.weight.data.copy_(W)
    base = nn.Linear(12, 6, bias=False)
    base.weight.data.copy_(W)
    ours = BitLinear(base, sub_norm=False)
    with torch.compiler.set_stance("force_eager"):  # their quantisers are compiled
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        wanted = theirs(a)
        torch.testing.assert_close((PackedLinear(ours) if packed else ours)(b), wanted, rtol=1e-5, atol=1e-5)
        if not packed:
            wanted.square().sum().backward(), ours(b).square().sum().backward()
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


# Packing.


@given(m=sizes, n=sizes, seed=st.integers(0, 99))
def test_packing_by_a_loop_and_back(m, n, seed):
    T = codes(m, n, seed)
    packed = pack(T)
    assert packed.dtype == torch.uint8 and packed.shape == (m, math.ceil(n / 4))
    assert packed.numel() == t.packed_bytes(m, n)
    for i in range(m):
        for j in range(packed.shape[1]):
            planes = [j + k * packed.shape[1] for k in range(4)]
            four = [int(T[i, c]) if c < n else 0 for c in planes]
            assert packed[i, j] == sum((w + 1) * 4**k for k, w in enumerate(four))
    assert torch.equal(unpack(packed, n), T)
    assert torch.equal(pack(T.double()), packed)


def test_packing_is_that_of_transformers_transposed():
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    T = codes(5, 12)
    assert torch.equal(bitnet.pack_weights(T.T.clone()).T, pack(T))


def test_a_product_with_packed_weights_and_whole_activations():
    T, x, beta = codes(7, 10), randn(3, 10), torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(t.packed_matmul(x, pack(T), beta), x @ (beta * T).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [2, -2, 0.5, math.nan])
def test_other_values_are_refused(bad):
    T = codes(3, 5).double()
    T[1, 2] = bad
    with pytest.raises(ValueError, match="T: got 1 entries of 15 outside"):
        pack(T)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0), (2, 2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises((ValueError, TypeError)):  # the checker of shapes may see it first
        pack(torch.zeros(shape))


@pytest.mark.usefixtures("no_shape_checks")
def test_unpacking_to_another_width_is_refused():
    packed = pack(torch.ones(2, 8))
    assert all(unpack(packed, n).shape == (2, n) for n in (5, 6, 7, 8))
    for n in (100, 9, 4, 0, -3):
        with pytest.raises(ValueError, match=rf"packed, n: got torch.uint8 of shape \(2, 2\) for n = {n}"):
            unpack(packed, n)
    for wrong in (packed.int(), packed.float(), packed[0], packed[None]):
        with pytest.raises(ValueError, match="packed, n: got torch"):
            unpack(wrong, 8)
    for n in (7.5, True, None):
        with pytest.raises(TypeError, match="n: got"):
            unpack(packed, n)
    with pytest.raises(ValueError, match="packed, n"):
        t.packed_linear(torch.ones(3, 5), pack(torch.ones(2, 9)), torch.tensor(1.0))
    with pytest.raises(TypeError, match="x: got dtype torch.int64"):
        t.packed_matmul(torch.ones(3, 8, dtype=torch.int64), packed, torch.tensor(0.5))
    with pytest.raises(ValueError, match="T: got a tensor without numbers"):
        pack(torch.ones(2, 8, device="meta"))


# Layers.


@given(m=sizes, n=sizes, rows=sizes, bias=st.booleans(), norm=st.booleans())
def test_packed_inference_gives_the_bits_of_training(m, n, rows, bias, norm):
    layer = bit_linear(m, n, dtype=torch.float32, bias=bias, sub_norm=norm)
    x = randn(rows, n, seed=5, dtype=torch.float32)
    assert torch.equal(PackedLinear(layer)(x), layer(x))


def test_packed_product_equals_an_integer_product():
    layer, x = bit_linear(33, 1000, dtype=torch.float32, bias=False, sub_norm=False), randn(4, 1000).float()
    packed, s = PackedLinear(layer), t.absmax_scale(x)
    whole = t.int8_codes(x, s).to(torch.int32) @ unpack(packed.codes, 1000).to(torch.int32).T
    torch.testing.assert_close(packed(x), whole * packed.beta / s, rtol=1e-6, atol=0)


def test_packed_layer_is_small_frozen_and_dense_weights_agree():
    layer = bit_linear(16, 64)
    packed = PackedLinear(layer)
    assert packed.codes.nbytes == t.packed_bytes(16, 64) == 16 * 64 // 4 and packed.codes.dtype == torch.uint8
    assert not any(p.requires_grad for p in packed.parameters())
    assert torch.equal(packed.dense_weight(), layer.dense_weight())
    assert set(layer.dense_weight().unique().tolist()) == {-packed.beta.item(), 0, packed.beta.item()}
    assert packed.gain.data_ptr() != layer.gain.data_ptr() and "64 -> 16" in repr(packed)


def test_packed_layer_under_autocast_keeps_whole_numbers():
    layer = bit_linear(8, 64, dtype=torch.float32)
    x = randn(3, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PackedLinear(layer)(x), PackedLinear(layer)(x).float())
        y = PackedLinear(layer)(x)
        rough = layer(x)
    assert torch.equal(y, layer(x))
    torch.testing.assert_close(rough, layer(x), rtol=0.02, atol=0.05)


def test_beta_stays_wide_in_bfloat16():
    layer = bit_linear(8, 64, dtype=torch.bfloat16)
    assert t.absmean(layer.weight).dtype == PackedLinear(layer).beta.dtype == torch.float32
    y = layer(randn(3, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and torch.equal(PackedLinear(layer)(randn(3, 64, dtype=torch.bfloat16)), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_beta_in_float32(dtype):
    layer = bit_linear(8, 64, dtype=torch.float32, bias=False, sub_norm=False)
    x, packed = randn(3, 64).float(), PackedLinear(layer)
    beta = packed.beta.clone()
    assert beta != beta.to(dtype)
    for cast in (lambda model: model.to(dtype), lambda model: model.to(x.to(dtype))):
        model = nn.Sequential(copy.deepcopy(packed))
        assert cast(model) is model
        assert model[0].beta.dtype == torch.float32 and torch.equal(model[0].beta, beta)
        assert torch.equal(model(x), layer(x))
        assert torch.equal(model.float()(x), layer(x))
    double = PackedLinear(bit_linear())
    assert double.beta.dtype == torch.float64 and double.to(dtype).beta.dtype == torch.float32
    norm = PackedLinear(bit_linear(8, 64, dtype=torch.float32)).to(dtype)
    assert norm.gain.dtype == norm.bias.dtype == dtype  # the rest is cast as ever


def test_a_packed_layer_can_be_moved_without_numbers():
    packed = PackedLinear(bit_linear(8, 64, dtype=torch.float32)).half().to("meta")
    assert packed.beta.is_meta and packed.beta.dtype == torch.float32
    again = packed.to_empty(device="cpu")
    again.load_state_dict(PackedLinear(bit_linear(8, 64, dtype=torch.float32)).half().state_dict())
    assert again(randn(3, 64).half()).isfinite().all()


def test_packed_compiles_to_one_graph(no_shape_checks):
    packed = PackedLinear(bit_linear())
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(randn(3, 10)), packed(randn(3, 10)), rtol=0, atol=1e-12)


def test_conv1d_is_taken_transposed():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    base = nn.Linear(10, 6).double()
    conv = Conv1D(6, 10).double()
    conv.weight.data.copy_(base.weight.T)
    conv.bias.data.copy_(base.bias)
    assert torch.equal(BitLinear(conv)(randn(3, 10)), BitLinear(base)(randn(3, 10)))


def model(seed=0):
    made = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 3))
    for p in made.parameters():
        p.data.copy_(randn(*p.shape, seed=seed))
    return replace_linears(made, "^[02]$", BitLinear, trainable=".")


def test_surgery_trains_all_and_packing_freezes_all():
    made, x = model(), randn(4, 10, dtype=torch.float32)
    assert [type(m) for m in made] == [BitLinear, nn.Tanh, BitLinear, nn.Linear]
    assert all(p.requires_grad for p in made.parameters())
    y = made(x)
    assert pack_model(made) is made
    assert [type(m) for m in made] == [PackedLinear, nn.Tanh, PackedLinear, nn.Linear]
    assert torch.equal(made(x), y) and not any(p.requires_grad for p in made.parameters())
    with pytest.raises(ValueError, match="pattern"):
        pack_model(made)


def test_packing_freezes_adapters_as_well():
    made = replace_linears(model(), "3", lambda layer: LoRALinear(layer, 2))
    assert made[3].A.requires_grad
    assert not any(p.requires_grad for p in pack_model(made).parameters())


def test_file_round_trip(tmp_path):
    old, new, x = pack_model(model(0)), pack_model(model(1)), randn(4, 10, dtype=torch.float32)
    assert not torch.equal(old(x), new(x))
    save_tensors(old.state_dict(), tmp_path / "x", kind="packed")
    load_packed(new, tmp_path / "x")
    assert torch.equal(old(x), new(x))
    one = PackedLinear(bit_linear())
    save_tensors(one.state_dict(), tmp_path / "one", kind="packed")
    load_packed(one, tmp_path / "one")


def packed(n, m=6, sub_norm=False):
    return PackedLinear(bit_linear(m, n, dtype=torch.float32, sub_norm=sub_norm))


@pytest.mark.parametrize(("here", "there"), [(7, 8), (8, 7), (5, 8), (8, 5)])
def test_rows_of_another_width_that_take_as_many_bytes_are_refused(here, there, tmp_path):
    old, new = packed(here), packed(there)
    assert old.codes.shape == new.codes.shape and old.width.nbytes == 0
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    save_tensors(old.state_dict(), tmp_path / "x", kind="packed")
    with pytest.raises(ValueError, match=rf"shape: width is \({here}, 0\) in the file"):
        load_packed(new, tmp_path / "x")
    with pytest.raises(ValueError, match=rf"shape: 0.width is \({here}, 0\) in the file"):
        save_tensors(nn.Sequential(old).state_dict(), tmp_path / "x", kind="packed")
        load_packed(nn.Sequential(new), tmp_path / "x")
    with pytest.raises(RuntimeError, match="size mismatch for width"):
        copy.deepcopy(new).load_state_dict(old.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


def test_damaged_and_foreign_files_are_refused(tmp_path):
    made, x = pack_model(model()), randn(4, 10, dtype=torch.float32)
    y, state = made(x), dict(pack_model(model(1)).state_dict())

    def refused(change, match):
        save_tensors({**state, **change}, tmp_path / "x", kind="packed")
        with pytest.raises(ValueError, match=match):
            load_packed(made, tmp_path / "x")
        assert torch.equal(made(x), y)

    for place in range(4):  # the code 3 in each of the four places of a byte
        broken = state["2.codes"].clone()
        broken[1, 1] |= 3 << 2 * place
        refused({"2.codes": broken}, "not codes 0, 1, 2: 2.codes")
    refused({"2.codes": state["2.codes"][:, :1]}, "shape: 2.codes")
    refused({"2.codes": state["2.codes"].float()}, "dtype: 2.codes")
    refused({"2.codes": state["2.codes"].long()}, "not codes 0, 1, 2: 2.codes")
    refused({"more": torch.zeros(1)}, "extra: more")
    refused({"0.beta": torch.tensor(math.nan)}, "not finite: 0.beta")
    save_tensors(state, tmp_path / "x", kind="packed")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_packed(made, tmp_path / "x")
    save_tensors(state, tmp_path / "x", kind="adapters")
    with pytest.raises(ValueError, match="kind"):
        load_packed(made, tmp_path / "x")


@pytest.mark.usefixtures("no_shape_checks")
def test_bad_bases_are_refused():
    W = torch.ones(4, 3)
    for base in (nn.ReLU(), nn.Conv1d(3, 4, 1), bit_linear()):
        with pytest.raises(TypeError, match="base"):
            BitLinear(base)
    base = nn.Linear(3, 4)
    base.weight.data[1, 1] = math.inf
    with pytest.raises(ValueError, match=r"base.weight: got 1 NaN or infinite"):
        BitLinear(base)
    for weight, error in ((torch.ones(4, 3, device="meta"), ValueError), (W.to(torch.float8_e4m3fn), TypeError)):
        base = nn.Linear(3, 4)
        base.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(error, match="base.weight: got"):
            BitLinear(base)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="base: got Doubled with a forward of its own"):
        BitLinear(Doubled(3, 4))
    with pytest.raises(TypeError, match="layer: got Linear, wanted BitLinear"):
        PackedLinear(nn.Linear(3, 4))
    layer = bit_linear()
    layer.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer.weight"):
        PackedLinear(layer)
