"""The compiled kernels against their definitions in float64, on large and ragged shapes.

Tolerances. Whole numbers are exact. A float32 sum of K products errs by at most K·2⁻²⁴ times the sum of their absolute
values, and a result is rounded to 16 bits once, by half of its machine epsilon.
"""

import math

import pytest
import torch
from torch import nn

from lowrank_ref import kernels as package
from lowrank_ref.core.linalg import gram_basis, power_basis, subspace_basis, svd_basis
from lowrank_ref.lowbit import BitLinear, HGFLinear, PackedLinear, pack, pack_model
from lowrank_ref.lowbit import fast as lowbit_fast
from lowrank_ref.lowbit import ternary as definition
from lowrank_ref.optimizers import GaLoreAdamW, fast, galore

pytest.importorskip("triton", reason="Triton is not installed")
from lowrank_ref.kernels import galore as galore_kernels
from lowrank_ref.kernels import ternary as kernels

pytestmark = pytest.mark.gpu

HALVES = [torch.bfloat16, torch.float16]
#: Rows of activations for each of the kernels and block sizes, with edges that no block fits.
ROWS = [1, 3, 16, 100, 129, 777]
SHAPES = [(4097, 4099), (8192, 2732), (1000, 16384)]


@pytest.fixture(autouse=True)
def everything_on_the_gpu(cuda):
    """Draw on the device; the kernels have no other."""
    with torch.device(cuda):
        yield


def seeded(seed):
    return torch.Generator("cuda").manual_seed(seed)


def problem(rows, m, n, dtype=torch.float32):
    g = seeded(m + n + rows)
    T = torch.randint(-1, 2, (m, n), generator=g, dtype=torch.int8)
    return T, torch.randn(rows, n, generator=g).to(dtype), torch.rand((), generator=g) + 0.1


def counting(monkeypatch):
    """Count the rows that the kernels quantise, a number for each call."""
    calls = []
    monkeypatch.setattr(kernels, "quantise", lambda x, real=kernels.quantise: calls.append(len(x)) or real(x))
    return calls


def assert_within(got, exact, slack):
    """Require the exact value to a rounding of the result's dtype and to `slack`, entry by entry."""
    bound = torch.finfo(got.dtype).eps / 2 * exact.abs() + slack
    assert bool(((got.double() - exact).abs() <= bound).all()), float(((got.double() - exact).abs() - bound).max())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_product_and_codes_are_the_definition_to_the_bit(shape, rows):
    T, x, beta = problem(rows, *shape)
    x = x * 10.0 ** torch.arange(rows).remainder(7)[:, None] / 1000  # tokens of very different size
    codes, scale, x_sum = kernels.quantise(x)
    wanted = definition.int8_codes(x, definition.absmax_scale(x))
    assert torch.equal(codes.float(), wanted) and torch.equal(x_sum, codes.sum(1, dtype=torch.int32))
    y = kernels.ternary_matmul(codes, pack(T), beta, scale=scale, x_sum=x_sum)
    product = codes.double() @ T.double().T  # whole numbers below 2⁵³
    assert torch.equal(y, product.float() * (beta / scale[:, None]))


@pytest.mark.parametrize("rows", [5, 200])
def test_nan_and_infinity_spoil_their_own_token_as_in_the_definition(rows):
    T, x, beta = problem(rows, 100, 3000)
    x[1, 7], x[2, 2999], x[3, 0] = math.nan, math.inf, -math.inf
    codes, scale, x_sum = kernels.quantise(x)
    y = kernels.ternary_matmul(codes, pack(T), beta, scale=scale, x_sum=x_sum)
    assert y[1:4].isnan().all() and y[4:].isfinite().all() and y[0].isfinite().all()
    torch.testing.assert_close(y, definition.packed_linear(x, pack(T), beta), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_product_is_the_exact_one_rounded_once(dtype, shape, rows):
    T, x, beta = problem(rows, *shape, dtype)
    for scale in (beta, torch.rand(shape[0], generator=seeded(1)) + 0.1):
        y = kernels.ternary_matmul(x, pack(T), scale)
        exact = x.double() @ T.double().T * scale.double()
        size = x.double().abs() @ T.double().abs().T * scale.double()
        assert y.dtype == dtype
        assert_within(y, exact, shape[1] * 2**-24 * size)


@pytest.mark.parametrize("dtype", HALVES)
def test_many_rows_are_multiplied_by_the_unpacked_weight(dtype):
    T, x, beta = problem(kernels.UNPACK_FROM + 3, 1003, 2049, dtype)
    assert torch.equal(kernels.unpacked(pack(T), 2049, beta, dtype), (beta * T).to(dtype))
    y = kernels.ternary_matmul(x, pack(T), beta)
    assert torch.equal(y, x @ (beta * T).to(dtype).T)


@pytest.mark.parametrize("dtype", HALVES)
def test_strided_activations(dtype):
    T, x, beta = problem(9, 515, 2050, dtype)
    wanted = kernels.ternary_matmul(x, pack(T), beta)
    for other in (torch.stack([x, x], dim=1)[:, 0], x.T.contiguous().T):
        assert torch.equal(kernels.ternary_matmul(other, pack(T), beta), wanted)


@pytest.mark.parametrize("rank", [20, 700])
@pytest.mark.parametrize("rows", [1, 16, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_hgf_in_one_pass_is_the_product_and_the_gated_correction(dtype, rows, rank):
    layer = HGFLinear(nn.Linear(2051, 1027), rank=rank, gate=0.3, generator=seeded(2)).eval()
    layer.B.data.normal_(generator=seeded(3))
    pack_model(layer)
    x = torch.randn(rows, 2051, generator=seeded(4)).to(dtype)
    with torch.no_grad():
        y, inner = layer(x), layer.ternary.normalised(x)
        scale = definition.absmax_scale(inner)
        codes = definition.int8_codes(inner, scale).double()
        ternary = codes @ definition.unpack(layer.ternary.codes, 2051).double().T * (layer.ternary.beta / scale)
        A, B, gate = layer.A.double(), layer.B.double(), layer.gate().double()
        exact = ternary + gate * inner.double() @ A.T @ B.T + layer.ternary.bias.double()
        size = ternary.abs() + gate * inner.double().abs() @ A.abs().T @ B.abs().T + 1
        # Float32 throughout: three sums in a row, of at most 2051 terms.
        assert_within(y, exact, 3 * 2051 * 2**-24 * size)


@pytest.mark.parametrize("dtype", HALVES)
def test_packed_layers_take_the_kernel(dtype, monkeypatch):
    layer = PackedLinear(BitLinear(nn.Linear(300, 200)))
    x, calls = torch.randn(5, 300).to(dtype), counting(monkeypatch)
    layer(x)
    assert calls == [5]


def test_the_card_decides_and_both_ways_give_the_same_bits(monkeypatch):
    x = torch.randn(5, 300, generator=seeded(4))
    capability = torch.cuda.get_device_capability(x.device)
    assert package.runs_on(x.device) == package.takes_card(capability, amd=torch.version.hip is not None)
    assert lowbit_fast.takes(x) == package.runs_on(x.device) and not package.runs_on(torch.device("cpu"))
    layer, calls = PackedLinear(BitLinear(nn.Linear(300, 200))), counting(monkeypatch)
    wanted = layer(x)
    assert calls == [5] * package.runs_on(x.device)
    monkeypatch.setattr(package, "_capability", lambda device: (7, 5))
    assert torch.equal(layer(x), wanted) and len(calls) <= 1
    matrix = torch.ones(8, 16, dtype=torch.float16)
    assert not galore_kernels.usable([matrix])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cast_model_takes_the_kernel(dtype, monkeypatch):
    layer = pack_model(nn.Sequential(BitLinear(nn.Linear(300, 200)))).to(dtype)
    x, calls = torch.randn(5, 300, generator=seeded(4)).to(dtype), counting(monkeypatch)
    assert layer[0].beta.dtype == torch.float32
    y = layer(x)
    assert calls == [5]
    monkeypatch.setattr(lowbit_fast, "takes", lambda x: False)
    assert torch.equal(layer(x), y)


def test_weights_on_another_device_are_refused_by_name():
    x, packed, beta = torch.ones(2, 8), pack(torch.ones(4, 8)), torch.tensor(0.5)
    with pytest.raises(ValueError, match="packed: got a tensor on cpu, wanted cuda"):
        lowbit_fast.packed_linear(x, packed.cpu(), beta)
    with pytest.raises(ValueError, match="beta: got a tensor on cpu, wanted cuda"):
        lowbit_fast.packed_linear(x, packed, beta.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: there is no other one than the current")
def test_the_launch_goes_to_where_the_layer_is():
    layer = PackedLinear(BitLinear(nn.Linear(300, 200)))
    x = torch.randn(5, 300, generator=seeded(4))
    wanted = layer(x)
    assert torch.cuda.current_device() == 0
    assert torch.equal(layer.to("cuda:1")(x.to("cuda:1")).cpu(), wanted.cpu())


GALORE = [(2048, 5461, 512), (5461, 2048, 512), (2048, 2048, 512), (1000, 777, 100), (777, 1000, 128), (130, 128, 3)]


@pytest.mark.parametrize("shape", GALORE)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_galore_step_of_all_matrices_is_the_definitions(dtype, side, shape):
    m, n, r = shape
    g, count = seeded(m + n), 3
    small, k = ((r, n), m) if side == "left" else ((m, r), n)

    def draw(*size):
        return [torch.randn(size, generator=g).to(dtype) for _ in range(count)]

    W, G, M = draw(m, n), draw(m, n), draw(*small)
    V = [v.abs() + 0.1 for v in draw(*small)]
    P = [torch.linalg.qr(torch.randn(k, r, generator=g)).Q.to(dtype).contiguous() for _ in range(count)]
    old = [[T.double() for T in tensors] for tensors in (W, M, V)]
    options = {"betas": (0.9, 0.99), "eps": 1e-6}
    N = galore_kernels.project_adam(G, M, V, P, side, 3, **options)
    galore_kernels.add_back(W, N, P, side, -0.1, 0.9)
    for i in range(count):
        w, first, second = (tensors[i].clone() for tensors in old)
        basis = {side: P[i].double()}
        R = galore.project_gradient(G[i].double(), **basis)
        error = k * 2**-24 * galore.project_gradient(G[i].double().abs(), **{side: P[i].double().abs()})
        (direction,) = galore.adam_directions([R], [first], [second], [3], **options)
        assert_within(M[i], first, 0.1 * error + 1e-6 * first.abs())
        assert_within(V[i], second, 0.01 * (2 * R.abs() + error) * error + 1e-6 * second)
        assert_within(N[i], direction, 10 * error + 1e-5 * direction.abs())
        sums = galore.project_back(N[i].double().abs(), **{side: P[i].double().abs()})
        fast.add_back(w, N[i].double(), -0.1, keep=0.9, **basis)
        assert_within(W[i], w, r * 2**-24 * sums + 1e-6 * (old[0][i].abs() + sums))


def parameters(dtype, seed=0):
    shapes = [(96, 64), (64, 96), (64, 64), (96, 64), (64, 37)]
    found = [nn.Parameter(torch.randn(s, generator=seeded(seed + i)).to(dtype)) for i, s in enumerate(shapes)]
    for i, p in enumerate(found):
        p.grad = torch.randn(p.shape, generator=seeded(100 + i)).to(dtype)
    return found


@pytest.mark.parametrize("basis", [svd_basis, gram_basis, power_basis, subspace_basis])
def test_galore_takes_all_matrices_by_the_kernels(basis, monkeypatch):
    """The plain step rounds R before it enters the moments."""
    ps, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    starts = [p.detach().double() for p in ps]
    taken = []
    real = galore_kernels.project_adam
    monkeypatch.setattr(galore_kernels, "project_adam", lambda G, *more: taken.append(len(G)) or real(G, *more))
    optimizers = [GaLoreAdamW(each, lr=0.3, rank=8, basis=basis, weight_decay=0.1) for each in (ps, plain)]
    torch.manual_seed(0)  # `power_basis` starts from noise
    for _ in range(3):
        optimizers[0].step()
    assert sum(taken) == 3 * len(ps)
    monkeypatch.setattr(galore_kernels, "usable", lambda tensors: False)
    torch.manual_seed(0)
    for _ in range(3):
        optimizers[1].step()
    for p, q, start in zip(ps, plain, starts):
        way = (q.double() - start).norm()
        assert way > 0.1 * start.norm()
        assert (p.double() - q.double()).norm() < 0.05 * way


def test_galore_keeps_float16_away_from_the_kernels(monkeypatch):
    """Its moments are float32, which the kernels do not know."""
    ps, wide = parameters(torch.float16), parameters(torch.float16)
    monkeypatch.setattr(galore_kernels, "project_adam", lambda *arguments: pytest.fail("taken by the kernels"))
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    for p, q in zip(ps, wide):
        q.grad = p.grad.float()
    for each in (ps, wide):
        optimizer = GaLoreAdamW(each, lr=0.3, rank=8)
        for _ in range(3):
            optimizer.step()
        assert {optimizer.state[p]["M"].dtype for p in each} == {torch.float32}
    for p, q in zip(ps, wide):
        assert (p.double() - q.double()).norm() < 0.01 * q.double().norm()


def test_matrices_that_no_kernel_takes_step_beside_the_others():
    ps = [*parameters(torch.bfloat16), *parameters(torch.float32)]
    alone = parameters(torch.float32)
    for each in (ps, alone):
        GaLoreAdamW(each, lr=0.01, rank=8).step()
    for p, q in zip(ps[-len(alone) :], alone):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_of_many_tensors(dtype):
    tensors = [torch.randn(s, generator=seeded(i)).to(dtype) for i, s in enumerate([(1, 1), (2048, 5461), (33, 1000)])]
    wanted = torch.stack([T.double().norm() for T in tensors])
    torch.testing.assert_close(fast.norms(tensors).double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_one_bad_number_in_the_last_place_stops_the_step(bad):
    ps = parameters(torch.bfloat16)
    optimizer = GaLoreAdamW(ps, lr=0.01, rank=8)
    optimizer.step()
    before = [p.detach().clone() for p in ps]
    moments = [optimizer.state[p]["M"].clone() for p in ps]
    ps[-1].grad[-1, -1] = bad
    with pytest.raises(ValueError, match="in 1 of 5 gradients"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before))
    assert all(torch.equal(optimizer.state[p]["M"], M) for p, M in zip(ps, moments))
