"""torch.compile without graph breaks, forward and backward, where the battery and a paper's own tests do not look.

Linear adapters with their default options are in `test_battery.py`; SLTrain, Maestro, and the low-bit layers in the
tests of their files. Here: the other layers and options, autocast, changing batch sizes, a whole model, inductor.
"""

from functools import partial

import pytest
import torch
from battery import adapter, batch, gaussian, linear, lora_sb, seeded
from torch import nn

from lowrank_ref.adapters import (
    ALLoRALinear,
    DoRALinear,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    NOLALinear,
    PiSSALinear,
    RandLoRALinear,
    rslora_scaling,
)
from lowrank_ref.adapters.allora_family import ALLoRAVariant
from lowrank_ref.compression import MaestroConv2d, MaestroLinear, WeLoreLinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.models import GPT
from lowrank_ref.lowbit import BitLinear, HGFLinear, PackedLinear
from lowrank_ref.pretraining import SLTrainLinear
from lowrank_ref.ranks import BayesianLoRALinear, CoDyRALinear, DiffoRALinear, IncreLoRALinear, SoRALinear
from lowrank_ref.robustness import LRTokens

pytestmark = pytest.mark.usefixtures("no_shape_checks")


def moved(layer):
    """Shift every trained number, as training would."""
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=seeded(8), dtype=torch.float64).to(p), alpha=0.2)
    return layer


def conv1d():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return Conv1D(10, 12).double()


CONV = partial(nn.Conv2d, 2, 5, 3, dtype=torch.float64)
#: Name -> (layer, input).
CASES = {
    "rsLoRA": lambda: (LoRALinear(linear(), 4, scaling=rslora_scaling, generator=seeded()), batch(0)),
    "LoRA on Conv1D": lambda: (LoRALinear(conv1d(), 4, generator=seeded()), batch(0)),
    "LoRA in bfloat16": lambda: (LoRALinear(linear(torch.bfloat16), 4, generator=seeded()), batch(0, torch.bfloat16)),
    "embedding": lambda: (LoRAEmbedding(nn.Embedding(9, 6).double(), 2, generator=seeded()), torch.tensor([[1, 8]])),
    "convolution": lambda: (LoRAConv2d(CONV(), 2, generator=seeded()), gaussian(2, 2, 6, 6)),
    "tokens": lambda: (LRTokens(nn.Linear(6, 6).double(), 3, 6, generator=seeded()).double(), gaussian(2, 3, 6)),
    "NOLA, rounded": lambda: (NOLALinear(linear(), 4, bits=4, start="random", generator=seeded()), batch(0)),
    "NOLA, kept": lambda: (NOLALinear(linear(), 4, keep=True, generator=seeded()), batch(0)),
    "RandLoRA through ΔW": lambda: (RandLoRALinear(linear(), 4, generator=seeded()), batch(0, rows=100)),
    "RandLoRA, fused": lambda: (RandLoRALinear(linear(), 4, fused=True, generator=seeded()), batch(0)),
    "Maestro convolution": lambda: (MaestroConv2d.from_conv2d(CONV()), gaussian(2, 2, 6, 6)),
}
LINEAR = {
    "LoRA": partial(LoRALinear, rank=4),
    "DoRA": partial(DoRALinear, rank=4),
    "PiSSA": partial(PiSSALinear, rank=4),
    "ALLoRA": partial(ALLoRALinear, rank=4, boost=3.0),
    "ALLoRA-OD": partial(ALLoRAVariant, rank=4, boost=3.0, factors="outputs"),
    "SoRA": partial(SoRALinear, rank=4),
    "DiffoRA": partial(DiffoRALinear, rank=4),
    "CoDyRA": partial(CoDyRALinear, rank=4),
    "IncreLoRA": partial(IncreLoRALinear, rank=4),
    "Bayesian-LoRA": partial(BayesianLoRALinear, rank=4, gate=0.0),
    "LoRA-SB": partial(lora_sb, rank=4),
    "NOLA": partial(NOLALinear, rank=4),
    "RandLoRA": partial(RandLoRALinear, rank=4),
    "RandLoRA, fused": partial(RandLoRALinear, rank=4, fused=True),
}


def run(function, layer, x, autocast=False):
    """Return the output and all gradients, by name."""
    layer.zero_grad()
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(x)
    y.float().square().sum().backward()
    found = {"output": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    return {name: t.clone() for name, t in found.items() if t is not None}


def assert_equal_runs(layer, x, *, backend="aot_eager", autocast=False, tolerance=1e-10):
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    got, wanted = (run(function, layer, x, autocast) for function in (compiled, layer))
    assert got.keys() == wanted.keys() and len(got) >= 3
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * max(1.0, float(value.abs().max())))


@pytest.mark.parametrize("name", CASES)
def test_one_graph_gives_output_and_gradients_of_eager(name):
    layer, x = CASES[name]()
    assert_equal_runs(moved(layer), x)


@pytest.mark.parametrize("name", LINEAR)
def test_under_autocast(name):
    layer = moved(LINEAR[name](linear(torch.float32), generator=seeded()))
    assert_equal_runs(layer, batch(0, torch.float32, rows=100), autocast=True)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "ALLoRA", "NOLA", "RandLoRA, fused"])
def test_one_graph_for_every_batch_size(name):
    layer = moved(LINEAR[name](linear(), generator=seeded()))
    layer(batch(0, rows=3))  # the first eager call of a DoRA layer looks at its start, once
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(batch(0, rows=7)).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 30, 11):
            torch.testing.assert_close(compiled(batch(0, rows=rows)), layer(batch(0, rows=rows)), rtol=0, atol=1e-12)


TERNARY = {
    "BitLinear": lambda: BitLinear(linear(), sub_norm=False),
    "HGFLinear": lambda: HGFLinear(linear(), 3, generator=seeded()),
    "PackedLinear": lambda: PackedLinear(BitLinear(linear(), sub_norm=False)),
}


@pytest.mark.parametrize("name", TERNARY)
def test_one_graph_of_a_low_bit_layer_for_every_batch_size_and_no_other_width(name):
    layer = TERNARY[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(batch(0, rows=7))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 30, 11):
            torch.testing.assert_close(compiled(batch(0, rows=rows)), layer(batch(0, rows=rows)), rtol=0, atol=1e-12)
    for wrong in (batch(0)[:, 1:], batch(0).long()):
        with pytest.raises(Exception, match="x: got"):
            compiled(wrong)


@pytest.mark.parametrize("name, weights", [("LoRA", 1), ("DoRA", 2)])
def test_a_compiled_layer_keeps_the_weight_and_x_and_nothing_else_of_their_size(name, weights):
    """For DoRA also the rescaled weight."""
    layer, x, kept = moved(LINEAR[name](linear(), generator=seeded())), batch(0, rows=40).requires_grad_(), []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(x)
    places = {t.untyped_storage().data_ptr(): tuple(t.shape) for t in kept}
    full = [tuple(sorted(shape)) for shape in places.values() if len(shape) == 2 and min(shape) >= 10]
    assert sorted(full) == [(10, 12)] * weights + [(12, 40)]


def test_a_whole_language_model():
    model = GPT(50, dim=16, ffn=24, layers=2, heads=2, length=12, generator=seeded()).double()
    replace_linears(model, r"attn\.[qv]$", partial(LoRALinear, rank=2, generator=seeded()))
    moved(model)
    tokens = torch.arange(26).reshape(2, 13)
    results = []
    for loss in (torch.compile(model.loss, fullgraph=True, backend="aot_eager"), model.loss):
        model.zero_grad()
        value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 1 + 2 * 2 * 2
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


INDUCTOR = {
    "LoRA": lambda: adapter("LoRALinear", base=linear(torch.float32)),
    "DoRA": lambda: adapter("DoRALinear", base=linear(torch.float32)),
    "NOLA": lambda: adapter("NOLALinear", base=linear(torch.float32)),
    "RandLoRA, fused": lambda: RandLoRALinear(linear(torch.float32), 4, fused=True, generator=seeded()),
    "SLTrain": lambda: SLTrainLinear.from_linear(linear(torch.float32), rank=4, density=0.2, generator=seeded()),
    "BitLinear": lambda: BitLinear(linear(torch.float32)),
    "HGFLinear": lambda: HGFLinear(linear(torch.float32), 3, generator=seeded()),
    "Maestro": lambda: MaestroLinear.from_linear(linear(torch.float32)),
    "WeLore": lambda: WeLoreLinear.from_linear(linear(torch.float32), rank=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor(name):
    """The default compiler, which makes code of its own: equal up to rounding."""
    assert_equal_runs(moved(INDUCTOR[name]()), batch(0, torch.float32), backend="inductor", tolerance=1e-5)


@pytest.mark.slow
def test_inductor_under_autocast_with_a_large_rank():
    layer, x = moved(LoRALinear(nn.Linear(40, 48), 8, alpha=20, generator=seeded())), gaussian(100, 40).float()
    assert_equal_runs(layer, x, backend="inductor", autocast=True, tolerance=0.01)
