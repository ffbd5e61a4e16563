"""What a user does with a layer on a GPU: compile it, capture it in a CUDA graph, move its files between devices."""

import copy
from functools import partial

import battery
import pytest
import torch
from battery import seeded
from torch import nn

from lowrank_ref.adapters import LoRALinear, RandLoRALinear
from lowrank_ref.core.io import load_adapters, save_adapters, save_tensors
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lowbit import BitLinear, HGFLinear, PackedLinear, load_packed, pack_model
from lowrank_ref.pretraining import SLTrainLinear

pytestmark = pytest.mark.gpu

M, N = 96, 128


def linear(device, dtype=torch.float32, seed=0):
    base = nn.Linear(N, M, dtype=dtype)
    for i, p in enumerate(base.parameters()):
        p.data.copy_(battery.gaussian(*p.shape, seed=seed + i) / 8)
    return base.to(device)


def moved(layer):
    """The layer, its trained numbers away from the start, where B = 0 would hide half of it."""
    for i, p in enumerate(p for p in layer.parameters() if p.requires_grad):
        p.data.add_(battery.gaussian(*p.shape, seed=20 + i).to(p), alpha=0.05)
    return layer


def codes():
    """Activations that int8 holds exactly, so that no rounding decides on a tie."""
    x = torch.randint(-127, 128, (16, N), generator=seeded(2)).float()
    x[:, 0] = 127
    return x / 64


#: Name -> layer from nn.Linear.
LAYERS = {
    "LoRALinear": lambda base: LoRALinear(base, generator=seeded(1)),
    "RandLoRALinear": lambda base: RandLoRALinear(base, rank=16, generator=seeded(1)),
    "SLTrainLinear": lambda base: SLTrainLinear.from_linear(base, rank=8, density=0.1, generator=seeded(1)),
    "BitLinear": partial(BitLinear, sub_norm=False),
}


def pass_both_ways(run, layer, x):
    """Output, gradient of the input and of each trained parameter."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return {"output": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LAYERS)
def test_inductor_equals_eager(name, device, no_shape_checks):
    """Forward and backward. Both err by at most K·ε of a sum over K = 128, three in a row; inputs lie on int8 codes."""
    layer = moved(LAYERS[name](linear(device)))
    x = codes().to(device)
    wanted = pass_both_ways(layer, layer, x)
    got = pass_both_ways(torch.compile(layer, fullgraph=True), layer, x)
    assert got.keys() == wanted.keys() and len(wanted) > 3
    for key, value in wanted.items():
        atol = 6 * N * torch.finfo(torch.float32).eps * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{name}, {key}: {m}")


@pytest.mark.parametrize("name", ["BitLinear", "HGFLinear"])
def test_packed_layers_compile_to_one_graph(name, device, no_shape_checks):
    """The kernel is one operator for the compiler; where no kernel runs, it compiles the definition."""
    layer = BitLinear(linear(device), sub_norm=False)
    if name == "HGFLinear":
        layer = HGFLinear(linear(device), 8, gate=0.3, sub_norm=False, generator=seeded(1))
        layer.B.data.copy_(battery.gaussian(M, 8, seed=3) / 8)
    packed, x = pack_model(nn.Sequential(layer)).eval(), codes().to(device)
    with torch.no_grad():
        got, wanted = torch.compile(packed, fullgraph=True)(x), packed(x)
    limit = 6 * N * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LoRALinear", "PackedLinear"])
def test_a_cuda_graph_captures_the_forward(name, dtype, cuda):
    base = linear(cuda, dtype)
    layer = moved(LoRALinear(base, generator=seeded(1))) if name == "LoRALinear" else PackedLinear(BitLinear(base))
    x, other = (battery.gaussian(16, N, seed=s).to(cuda, dtype) for s in (1, 2))
    still = x.clone()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuBLAS and kernels set themselves up outside the capture
            for _ in range(3):
                layer(still)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(still)
        for inputs in (x, other):
            still.copy_(inputs)
            graph.replay()
            torch.cuda.synchronize()
            limit = 4 * torch.finfo(dtype).eps * float(y.abs().max())
            torch.testing.assert_close(y, layer(inputs), rtol=0, atol=limit)


@pytest.mark.parametrize("name", battery.LAYERS)
@pytest.mark.parametrize("back", [False, True], ids=["GPU to CPU", "CPU to GPU"])
def test_adapter_files_move_between_devices(name, back, device, tmp_path):
    here, there = ("cpu", device) if back else (device, "cpu")

    def model(place, seed):
        return replace_linears(
            nn.Sequential(linear("cpu", torch.float64).to(place)),
            "0",
            lambda base: battery.LAYERS[name](base, generator=seeded(seed)),
        ).eval()

    old, new = moved(model(here, 1)), model(there, 2)
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    places = {t.device.type for name, t in new.state_dict().items() if not name.endswith("_extra_state")}
    assert places == {there}
    x = battery.gaussian(5, N)
    start = model(there, 2)(x.to(there)).cpu()
    assert (start - old(x.to(here)).cpu()).abs().max() > 1e-3
    torch.testing.assert_close(new(x.to(there)).cpu(), old(x.to(here)).cpu(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in battery.LAYERS])
@pytest.mark.parametrize("back", [False, True], ids=["GPU to CPU", "CPU to GPU"])
def test_states_move_between_devices(name, back, device, tmp_path):
    here, there = ("cpu", device) if back else (device, "cpu")
    old, new = moved(LAYERS[name](linear(here))), LAYERS[name](linear(there, seed=5))
    torch.save(old.state_dict(), tmp_path / "x")
    new.load_state_dict(torch.load(tmp_path / "x", weights_only=True, map_location=there))
    for key, value in new.state_dict().items():
        assert value.device.type == there and torch.equal(value.cpu(), old.state_dict()[key].cpu()), key


@pytest.mark.parametrize("back", [False, True], ids=["GPU to CPU", "CPU to GPU"])
def test_packed_files_move_between_devices(back, device, tmp_path):
    here, there = ("cpu", device) if back else (device, "cpu")
    old, new = (pack_model(nn.Sequential(BitLinear(linear(place, seed=s)))) for place, s in ((here, 0), (there, 5)))
    save_tensors(old.state_dict(), tmp_path / "x", kind="packed")
    load_packed(new, tmp_path / "x")
    for key, value in new.state_dict().items():
        assert value.device.type == there and torch.equal(value.cpu(), old.state_dict()[key].cpu()), key


def test_a_copy_on_the_device_leaves_the_original_where_it_was(device):
    layer = moved(LoRALinear(linear("cpu"), generator=seeded(1)))
    twin = copy.deepcopy(layer).to(device)
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    assert {p.device.type for p in twin.parameters()} == {device}
