"""The GPU path of packed layers, with Triton's interpreter in the place of the GPU."""

import pytest
import torch
from torch import nn

from lowrank_ref.lowbit import BitLinear, HGFLinear, PackedLinear, fast, pack_model
from lowrank_ref.lowbit import ternary as definition

kernels = pytest.importorskip("lowrank_ref.kernels.ternary", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="a GPU is there: tests/gpu tests the real path")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def base(m=9, n=21):
    layer = nn.Linear(n, m)
    layer.weight.data.copy_(torch.randn(m, n, generator=seeded(0)))
    return layer


def batch(*shape):
    return torch.randn(*shape, generator=seeded(1))


@pytest.fixture
def kernel_path(monkeypatch):
    """Let CPU tensors take the path of CUDA tensors."""
    monkeypatch.setattr(fast, "takes", lambda x: True)


@pytest.mark.parametrize("shape", [(21,), (3, 21), (2, 3, 21)])
def test_a_packed_layer_computes_the_same_bits(shape, kernel_path):
    layer = BitLinear(base())
    with torch.no_grad():
        assert torch.equal(PackedLinear(layer)(batch(*shape)), layer(batch(*shape)))


def test_a_corrected_layer_computes_the_same(kernel_path):
    layer = HGFLinear(base(), 4, gate=0.3, generator=seeded(2))
    layer.B.data.copy_(torch.randn(9, 4, generator=seeded(3)))
    wanted = layer(batch(5, 21))
    with torch.no_grad():
        packed = pack_model(nn.Sequential(layer))
        torch.testing.assert_close(packed(batch(5, 21)), wanted, rtol=1e-5, atol=1e-5)
        layer.fold_gate()
        torch.testing.assert_close(packed(batch(5, 21)), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double], ids=["bf16", "fp16", "fp64"])
def test_a_cast_model_takes_the_kernel_and_loses_no_bit_of_beta(cast, kernel_path):
    layer = base()
    layer.bias = None
    packed = PackedLinear(BitLinear(layer, sub_norm=False))
    with torch.no_grad():
        wanted = packed(batch(3, 21))
        assert torch.equal(cast(packed)(batch(3, 21)), wanted)


def test_whole_activations():
    packed, beta = definition.pack(torch.randint(-1, 2, (9, 21), generator=seeded(0))), torch.tensor(0.3)
    x = batch(2, 3, 21)
    y = fast.packed_matmul(x.half(), packed, beta)
    assert y.shape == (2, 3, 9) and y.dtype == torch.float16
    torch.testing.assert_close(y.float(), definition.packed_matmul(x, packed, beta), rtol=2e-2, atol=2e-2)
    with pytest.raises(TypeError, match="x: got dtype torch.float32"):
        fast.packed_matmul(x, packed, beta)


def test_what_the_kernels_take(monkeypatch):
    assert not fast.takes(batch(3, 21))  # a CPU tensor
    meta = torch.empty(3, 21, device="meta")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert fast.takes(meta) and fast.takes(meta.half())
    assert not fast.takes(meta.double()) and not fast.takes(meta[:0])
    assert not fast.takes(meta.requires_grad_())
    with torch.no_grad():
        assert fast.takes(meta)


def test_without_triton_it_warns_once(monkeypatch):
    import lowrank_ref.kernels as package

    monkeypatch.setattr(package, "find_spec", lambda name: None)
    package.have_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed") as seen:
            assert [package.have_triton() for _ in range(3)] == [False] * 3
        assert len(seen) == 1
    finally:
        package.have_triton.cache_clear()


@pytest.mark.usefixtures("no_shape_checks")
def test_torch_compile_sees_one_operator(kernel_path):
    packed = PackedLinear(BitLinear(base())).eval()
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(batch(3, 21)), packed(batch(3, 21)))


def test_the_operators_describe_themselves_rightly():
    packed, beta = definition.pack(torch.randint(-1, 2, (9, 21), generator=seeded(0))), torch.tensor(0.3)
    x, B, t = batch(2, 3, 21), batch(9, 2), batch(2, 3, 2)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lowrank_ref.packed_linear, (x, packed, beta, B, t), test_utils=tests)
    torch.library.opcheck(torch.ops.lowrank_ref.packed_matmul, (x.half(), packed, beta), test_utils=tests)
