"""The costs that the docstrings state, against what CUDA's allocator hands out: within 5 %."""

import gc

import pytest
import torch
from torch import nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.accounting import state_bytes
from lowrank_ref.lowbit import BitLinear, PackedLinear
from lowrank_ref.lowbit.ternary import packed_bytes
from lowrank_ref.optimizers import GaLoreAdamW
from lowrank_ref.pretraining import SLTrainLinear
from lowrank_ref.pretraining.sltrain import parameter_count, training_bytes

pytestmark = pytest.mark.gpu


class Meter:
    """Bytes allocated since it was made. Products before the start let cuBLAS take its workspaces, one a thread."""

    def __init__(self):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(64, 64, device="cuda", dtype=dtype, requires_grad=True)
            torch.nn.functional.linear(x, x, x[0]).sum().backward()
        del x
        gc.collect()
        torch.cuda.synchronize()
        self.start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def now(self):
        gc.collect()
        return torch.cuda.memory_allocated() - self.start

    def peak(self):
        return torch.cuda.max_memory_allocated() - self.start


def assert_near(got, wanted):
    assert wanted > 0 and abs(got - wanted) <= 0.05 * wanted, f"got {got:,} bytes, the formula says {wanted:,.0f}"


def linear(m, n, dtype):
    return nn.Linear(n, m, bias=False, device="cuda", dtype=dtype)


def test_lora_takes_its_numbers_their_gradients_and_two_moments(cuda):
    """r(m+n) numbers in float32, four times: parameter, gradient, M, V. The frozen layer lies outside the meter."""
    m = n = 8192
    r = 512
    base, x = linear(m, n, torch.bfloat16), torch.randn(8, n, device="cuda", dtype=torch.bfloat16)
    meter = Meter()
    layer = LoRALinear(base, rank=r, generator=torch.Generator("cuda"))
    assert_near(meter.now(), 4 * r * (m + n))
    optimizer = torch.optim.Adam([layer.A, layer.B], fused=True)
    layer(x).float().square().sum().backward()
    optimizer.step()
    assert_near(meter.now(), 16 * r * (m + n))
    assert_near(meter.peak(), 16 * r * (m + n))  # tokens are few: activations add next to nothing
    assert state_bytes(optimizer) == 8 * r * (m + n)


def test_galore_keeps_its_basis_and_two_small_moments(cuda):
    """2rK + rk numbers a matrix instead of Adam's 2mn, in the dtype of the weight."""
    shapes, r = [(2048, 5461), (5461, 2048), (2048, 2048)], 512
    weights = [nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16)) for s in shapes]
    for W in weights:
        W.grad = torch.randn_like(W)
    wanted = sum(2 * (2 * r * max(s) + r * min(s)) for s in shapes)
    warm = GaLoreAdamW([{"params": [nn.Parameter(weights[0][:256, :256].clone())], "rank": 16}])
    warm.param_groups[0]["params"][0].grad = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    warm.step()  # the solver's workspace belongs to no state
    del warm
    meter = Meter()
    optimizer = GaLoreAdamW([{"params": weights, "rank": r}], lr=1e-3)
    for _ in range(2):
        optimizer.step()
    assert_near(state_bytes(optimizer), wanted)
    assert_near(meter.now(), wanted)


def test_sltrain_keeps_what_it_states_and_one_temporary(cuda):
    """`training_bytes` at rest; in a step one (m, n) temporary at a time, and the gradients, on top of the weights."""
    m, n, r, density = 8192, 8192, 64, 0.03
    numbers, nonzeros = parameter_count(m, n, r, density), int(density * m * n)
    x = torch.randn(8, n, device="cuda", dtype=torch.bfloat16)
    base = nn.Linear(n, m, bias=False, device="meta", dtype=torch.bfloat16)
    base.weight = nn.Parameter(torch.empty(1, 1, device="cuda", dtype=torch.bfloat16).expand(m, n), requires_grad=False)
    meter = Meter()
    layer = SLTrainLinear.from_linear(base, rank=r, density=density, generator=torch.Generator("cuda"))
    torch.cuda.synchronize()
    assert_near(meter.now(), training_bytes(numbers, nonzeros, moment=0))
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    rest = Meter()
    layer(x).float().square().sum().backward()
    assert_near(rest.peak(), 2 * m * n + 2 * numbers)
    optimizer.step()
    optimizer.zero_grad()
    assert_near(meter.now(), training_bytes(numbers, nonzeros))


@pytest.mark.parametrize("shape", [(8192, 8192), (14336, 4097)])
def test_packed_weights_take_two_bits_a_weight(shape, cuda):
    """m⌈n/4⌉ + 4 bytes a matrix."""
    layer = BitLinear(linear(*shape, torch.bfloat16), sub_norm=False)
    meter = Meter()
    packed = PackedLinear(layer)
    torch.cuda.synchronize()
    assert_near(meter.now(), packed_bytes(*shape) + 4)
    assert sum(t.nbytes for t in packed.state_dict().values()) == packed_bytes(*shape) + 4
