"""The CPU and the GPU compute the same: outputs and gradients of every layer, steps of every optimizer, all bases.

Tolerances. A sum of K products in a precision with machine epsilon ε is wrong by at most K·ε times the sum of their
absolute values. A layer's output or gradient comes from up to three such sums in a row, and both devices err. So the
bound is 6·K·ε times the largest value of the same tensor, where K = 64 is the longest sum here: 9e-14 in float64 for
values of size 1, 5e-5 in float32. Layers that round activations to int8 may land on the other side of a tie in float32:
one of 127 codes more.
"""

import copy
import math
from functools import partial

import battery
import pytest
import ternary_cases
import torch
from battery import seeded
from torch import nn

from lowrank_ref.adapters import LoRAConv2d, LoRAEmbedding
from lowrank_ref.compression import (
    MaestroConv2d,
    MaestroLinear,
    WeLoreLinear,
    by_gram,
    from_matrix,
    split_layer,
    to_matrix,
    truncation,
)
from lowrank_ref.core.linalg import (
    captured_energy,
    gram_basis,
    power_basis,
    randomized_svd,
    subspace_basis,
    svd,
    svd_basis,
)
from lowrank_ref.lowbit import RECIPES, BitLinear, DifferentialAttention, HGFLinear, PackedLinear, QuantLinear, pack
from lowrank_ref.lowbit.ternary import absmax_scale, int8_codes, ternary_codes
from lowrank_ref.optimizers import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, per_layer_updates
from lowrank_ref.pretraining import SLTrainLinear
from lowrank_ref.robustness import (
    CORRUPTIONS,
    ConceptClassifier,
    LRTokens,
    ThreeHeads,
    certainty,
    chained,
    choose_head,
    corrupt,
    greedy_dpp,
    random_start,
    sample_k_dpp,
    student_loss,
)
from lowrank_ref.robustness.augmentation_chains import OPERATIONS

pytestmark = pytest.mark.gpu

LONGEST = 64
PRECISIONS = [torch.float64, torch.float32]


def bound(value, dtype):
    """6·K·ε times the largest entry (1 at least)."""
    return 6 * LONGEST * torch.finfo(dtype).eps * max(1.0, float(value.abs().max()))


def gaussian(*shape, seed=0, dtype=torch.float64):
    return battery.gaussian(*shape, seed=seed).to(dtype)


def filled(module, dtype):
    """The module in this dtype, with fixed parameters of the size that training gives them."""
    module = module.to(dtype)
    for i, p in enumerate(module.parameters()):
        p.data.copy_(gaussian(*p.shape, seed=i) / 4)
    return module


def wide(dtype, m=48, n=64):
    return filled(nn.Linear(n, m), dtype)


def adapter(name, dtype):
    """An adapter whose trained numbers have moved. PiSSA and DoRA start from what they found in the base."""
    layer = battery.LAYERS[name](wide(dtype), generator=seeded(1))
    for i, p in enumerate(layer.adapter_parameters().values()):
        p.data.add_(gaussian(*p.shape, seed=10 + i, dtype=dtype), alpha=0.1)
    return layer


def embedding(dtype):
    layer = LoRAEmbedding(filled(nn.Embedding(40, 64), dtype), rank=4, generator=seeded(1))
    layer.A.data.add_(gaussian(*layer.A.shape, seed=2, dtype=dtype), alpha=0.1)
    return layer


def convolution(dtype):
    layer = LoRAConv2d(filled(nn.Conv2d(6, 8, 3, padding=1), dtype), rank=4, generator=seeded(1))
    layer.B.data.add_(gaussian(*layer.B.shape, seed=2, dtype=dtype), alpha=0.1)
    return layer


def sltrain(dtype):
    layer = SLTrainLinear.from_linear(wide(dtype), rank=8, density=0.1, generator=seeded(1))
    layer.B.data.add_(gaussian(*layer.B.shape, seed=2, dtype=dtype), alpha=0.1)
    return layer


ROWS, PICTURES = partial(gaussian, 10, 64, seed=5), partial(gaussian, 3, 6, 7, 7, seed=5)
#: Name -> (layer(dtype) on the CPU, its input(dtype=...)).
CASES = {name: (partial(adapter, name), ROWS) for name in battery.LAYERS}
CASES |= {
    "LoRAEmbedding": (embedding, lambda dtype: torch.arange(20).reshape(2, 10)),
    "LoRAConv2d": (convolution, PICTURES),
    "LRTokens": (lambda dtype: LRTokens(wide(dtype), 10, 64, std=0.3, generator=seeded(1)).to(dtype), ROWS),
    "SLTrainLinear": (sltrain, ROWS),
    "MaestroLinear": (lambda dtype: MaestroLinear.from_linear(wide(dtype)), ROWS),
    "WeLoreLinear": (lambda dtype: WeLoreLinear.from_linear(wide(dtype), rank=8), ROWS),
    "MaestroConv2d": (lambda dtype: MaestroConv2d.from_conv2d(filled(nn.Conv2d(6, 8, 3), dtype)), PICTURES),
    "BitLinear": (lambda dtype: BitLinear(wide(dtype)), ROWS),
    "BitLinear without norm": (lambda dtype: BitLinear(wide(dtype), sub_norm=False), ROWS),
    "HGFLinear": (lambda dtype: HGFLinear(wide(dtype), 4, gate=0.3, generator=seeded(1)), ROWS),
    "PackedLinear": (lambda dtype: PackedLinear(BitLinear(wide(dtype))), ROWS),
    "QuantLinear": (lambda dtype: QuantLinear(wide(dtype), RECIPES["int8"]), ROWS),
    "DifferentialAttention": (
        lambda dtype: ternary_cases.attention(generator=seeded(1), dtype=dtype),
        partial(gaussian, 2, 4, battery.N, seed=5),
    ),
}
ROUNDING = {"BitLinear", "BitLinear without norm", "HGFLinear", "PackedLinear", "QuantLinear"}


def results(layer, x):
    """Name -> output, gradient of the input, gradient of each parameter that has one; on the CPU."""
    layer.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    if y.requires_grad:
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    found = {"output": y.detach(), "input's gradient": x.grad}
    found |= {f"{name}'s gradient": p.grad for name, p in layer.named_parameters()}
    return {name: value.cpu() for name, value in found.items() if value is not None}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_layers_agree(name, dtype, device):
    make, inputs = CASES[name]
    layer, x = make(dtype), inputs(dtype=dtype)
    wanted = results(layer, x)
    moved = copy.deepcopy(layer).to(device)
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {device}
    got = results(moved, x.to(device))
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        tie = float(value.abs().max()) / 127 if name in ROUNDING and dtype == torch.float32 else 0.0
        atol = bound(value, dtype) + tie
        torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{name}, {key}: {m}")


@pytest.mark.parametrize(
    "name", ["MPSLinear", "LoRALinear", "RandLoRALinear", "SoRALinear", "IncreLoRALinear", "DoRALinear", "ALLoRALinear"]
)
def test_generators_of_both_devices_are_accepted(name, device, generators):
    base = wide(torch.float32)
    on_device = copy.deepcopy(base).to(device)
    plain = battery.LAYERS[name](base, generator=seeded(3)).state_dict()
    for generator in generators(3):
        layer = battery.LAYERS[name](on_device, generator=generator)
        again = battery.LAYERS[name](on_device, generator=torch.Generator(generator.device).manual_seed(3))
        for key, value in layer.state_dict().items():
            assert value.device.type == device or key.endswith("_extra_state"), key  # numbers of the host
            assert torch.equal(value, again.state_dict()[key]), key
            if generator.device.type == "cpu":
                torch.testing.assert_close(value.cpu(), plain[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [
    lambda base, g: SLTrainLinear.from_linear(base, rank=4, density=0.1, generator=g),
    lambda base, g: HGFLinear(base, 4, generator=g),
    lambda base, g: LoRAEmbedding(nn.Embedding(20, 16, device=base.weight.device), rank=2, generator=g),
    lambda base, g: LoRAConv2d(nn.Conv2d(3, 4, 3, device=base.weight.device), rank=2, generator=g),
    lambda base, g: LRTokens(base, 2, base.in_features, generator=g),
], ids=["SLTrainLinear", "HGFLinear", "LoRAEmbedding", "LoRAConv2d", "LRTokens"])  # fmt: skip
def test_other_layers_accept_generators_of_both_devices(make, device, generators):
    base = wide(torch.float32).to(device)
    for generator in generators(3):
        layer = make(base, generator)
        assert {t.device.type for t in layer.state_dict().values()} == {device}


def test_differential_attention_accepts_generators_of_both_devices(device, generators):
    base = ternary_cases.SimpleNamespace(
        **{name: nn.Linear(12, 12, bias=False, device=device) for name in "qkvo"}, heads=4, causal=True, training=True
    )
    for generator in generators(3):
        layer = DifferentialAttention(base, depth=0, generator=generator)
        assert {t.device.type for t in layer.state_dict().values()} == {device}
        assert layer(torch.randn(2, 4, 12, device=device)).isfinite().all()


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
def test_attacks_start_from_generators_of_both_devices(norm, device, generators):
    x = battery.gaussian(4, 6).sigmoid()
    wanted = random_start(x, norm=norm, epsilon=0.3, generator=seeded(3))
    for generator in generators(3):
        got = random_start(x.to(device), norm=norm, epsilon=0.3, generator=generator)
        assert got.device.type == device
        if generator.device.type == "cpu":
            torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=1e-12)


# Corruptions, and a student of three heads.


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_agree(name, device, generators):
    x = gaussian(4, 1, 14, 14).sigmoid()
    wanted = corrupt(x, name, 3, generator=seeded(3))
    for generator in generators(3):
        got = corrupt(x.to(device), name, 3, generator=generator)
        assert got.device.type == device and got.shape == x.shape
        if generator.device.type == "cpu":
            torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=1e-9)


def seeded_on(device, seed):
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_operations_of_chains_agree(operation, device):
    x, u = gaussian(6, 1, 9, 9).sigmoid(), torch.linspace(-1, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(operation(x.to(device), u.to(device)).cpu(), operation(x, u), rtol=0, atol=1e-9)
    assert chained(x.to(device), generator=seeded_on(device, 0)).device.type == device


def test_students_agree(device):
    layers = [filled(nn.Linear(16, 16), torch.float64) for _ in range(3)]
    model = nn.Sequential(*layers, filled(nn.Linear(16, 5), torch.float64))
    x, y, teacher = gaussian(8, 16), torch.arange(8) % 5, gaussian(8, 5, seed=2)
    found = []
    for place in ("cpu", device):
        student = ThreeHeads(*(part.to(place) for part in copy.deepcopy((model[:2], model[2:3], model[3]))))
        u, m = student.new_heads(torch.cat([x + 0.1, x]).to(place))
        omega = certainty(teacher.softmax(1)).to(place)
        loss = student_loss(u[:8], m[:8], m[8:], y.to(place), teacher.to(place), omega)
        loss.backward()
        grads = [p.grad.cpu() for p in student.parameters() if p.grad is not None]
        found.append([loss.detach().cpu(), choose_head(student(x.to(place))).cpu(), *grads])
    for wanted, got in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


# Bases.


def low_rank(m, n, rank=4, seed=0):
    """A matrix like a gradient: `rank` directions that halve, over a tail of 1 % of the largest."""
    U, V = (torch.linalg.qr(gaussian(k, rank, seed=seed + i)).Q for i, k in enumerate((m, n)))
    tail = gaussian(m, n, seed=seed + 2) * 0.01 / (m**0.5 + n**0.5)
    return U @ torch.diag(0.5 ** torch.arange(rank, dtype=torch.float64)) @ V.T + tail


def distance(P, Q):
    """Spectral norm of the difference of two projectors: the sine of the largest angle."""
    P, Q = P.cpu().double(), Q.cpu().double()
    return float(torch.linalg.matrix_norm(P @ P.T - Q @ Q.T, ord=2))


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (50, 50)])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_bases_span_the_same_subspace(shape, dtype, device, generators):
    """Davis and Kahan: an error E turns a subspace by ‖E‖/gap. The Gram matrix has gap 1/64, products err by K·ε."""
    G = low_rank(*shape).to(dtype)
    exact = svd_basis(G.double(), 4)
    limit = 64 * LONGEST * torch.finfo(dtype).eps
    for basis in (svd_basis, gram_basis):
        P = basis(G.to(device), 4)
        assert P.device.type == device and P.dtype == dtype
        assert distance(P, basis(G, 4)) < limit and distance(P, exact) < limit
        torch.testing.assert_close(P.cpu(), basis(G, 4), rtol=0, atol=4 * limit)  # with the same signs
    for matrices in (G, torch.stack([G, -2 * G])):
        P = subspace_basis(matrices.to(device), 4, iterations=8)
        assert P.device.type == device and all(distance(Q, exact) < limit for Q in P.reshape(-1, *P.shape[-2:]))
    for generator in generators():
        P = power_basis(G.to(device), 4, iterations=6, generator=generator)
        assert P.device.type == device and distance(P, exact) < limit
        assert distance(power_basis(G.to(device), 4, start=P, generator=generator), exact) < limit
    assert abs(captured_energy(G.to(device), P) - captured_energy(G, P.cpu())) < LONGEST * torch.finfo(dtype).eps


def test_decompositions_agree(device, generators):
    W = gaussian(30, 20)
    for got, wanted in zip(svd(W.to(device), 5), svd(W, 5)):
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=1e-10)
    for generator in generators():
        U, S, Vh = randomized_svd(low_rank(30, 20).to(device), 4, iterations=6, generator=generator)
        torch.testing.assert_close(S.cpu(), svd(low_rank(30, 20), 4)[1], rtol=1e-10, atol=0)
        assert U.device.type == S.device.type == Vh.device.type == device


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_truncations_agree(scheme, dtype, device):
    """Rank and weight; the spectrum has a gap where it is cut, so that the subspaces are stable."""
    layer = filled(nn.Conv2d(8, 16, 3, padding=1), dtype)
    U, S, Vh = torch.linalg.svd(to_matrix(layer.weight.detach(), scheme), full_matrices=False)
    S[..., 3:] *= 0.05
    layer.weight.data.copy_(from_matrix((U * S[..., None, :]) @ Vh, (16, 8, 3, 3), scheme))
    moved = copy.deepcopy(layer).to(device)
    limit = 16 * bound(layer.weight, dtype)
    for cut in (truncation, by_gram):
        wanted, got = cut(layer.weight, 0.98, scheme), cut(moved.weight, 0.98, scheme)
        assert got.rank == wanted.rank == 3 and got.weight.device.type == device
        torch.testing.assert_close(got.weight.cpu(), wanted.weight, rtol=0, atol=limit)
        torch.testing.assert_close(got.subgradient.cpu(), wanted.subgradient, rtol=0, atol=16 * limit)
    x = gaussian(2, 8, 6, 6, dtype=dtype)
    got, wanted = split_layer(moved, 3, scheme)(x.to(device)).cpu(), split_layer(layer, 3, scheme)(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=16 * bound(wanted, dtype))


# Optimizers.

OPTIMIZERS = {
    "GaLoreAdamW": GaLoreAdamW,
    "GaLoreAdamW, exact basis": partial(GaLoreAdamW, basis=svd_basis),
    "GaLoreAdamW, both sides": partial(GaLoreAdamW, side="both"),
    "GaLoreAdamW8bit": GaLoreAdamW8bit,
    "GaLoreAdafactor": GaLoreAdafactor,
    "GaLoreSGD": GaLoreSGD,
}
assert set(battery.OPTIMIZERS) <= set(OPTIMIZERS)
SHAPES = [(1056, 96), (96, 160), (80, 80), (96,)]  # the first keeps 8-bit moments: 1056·4 >= 4096


def run(name, device, dtype, steps=3):
    """Take steps from fixed weights along fixed gradients; two of three share a basis. Returns weights, optimizer."""
    weights = [nn.Parameter((gaussian(*s, seed=i) / 4).to(device, dtype)) for i, s in enumerate(SHAPES)]
    groups = [{"params": weights[:3], "rank": 4, "gap": 2}, {"params": weights[3:]}]
    optimizer = OPTIMIZERS[name](groups, lr={"GaLoreSGD": 30.0, "GaLoreAdamW, both sides": 30.0}.get(name, 0.3))
    for t in range(steps):
        for i, W in enumerate(weights):
            G = low_rank(*W.shape, seed=10 * i + t) if W.ndim == 2 else gaussian(*W.shape, seed=t)
            W.grad = G.to(device, dtype)
        optimizer.step()
    return weights, optimizer


def tensors(state):
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.ndim}


#: How far the two devices may end apart, as a share of the way that a weight has gone. A step M/√V turns over where a
#: projected gradient is nearly zero, so the share is far above ε; in bfloat16 some of 500 entries may do so.
SHARES = {torch.float64: 1e-7, torch.float32: 0.05, torch.bfloat16: 0.3}


def share(name, dtype):
    """The share of this optimizer. Eight-bit moments are computed in float32, whatever the weights are."""
    return max(SHARES[dtype], SHARES[torch.float32] if "8bit" in name else 0.0)


@pytest.mark.parametrize("dtype", SHARES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_agree(name, dtype, device):
    wanted, reference = run(name, "cpu", dtype)
    got, optimizer = run(name, device, dtype)
    for i, (W, V) in enumerate(zip(got, wanted)):
        start = gaussian(*SHAPES[i], seed=i).div(4).to(dtype).double()
        way = (V.detach().double() - start).norm()
        assert W.dtype == dtype and W.device.type == device and way > 0.01 * start.norm()
        assert (W.detach().cpu().double() - V.detach().double()).norm() < share(name, dtype) * way, (
            f"{name}, {SHAPES[i]}"
        )
        state, other = tensors(optimizer.state[W]), tensors(reference.state[V])
        assert {key: (v.shape, v.dtype) for key, v in state.items()} == {
            key: (v.shape, v.dtype) for key, v in other.items()
        }
        assert {v.device.type for v in state.values()} <= {device}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_on_the_other_device(name, device, tmp_path):
    """Two steps on one device, saved, loaded on the other, one more step there: as three steps on the first."""
    for here, there in ((device, "cpu"), ("cpu", device)):
        straight, _ = run(name, here, torch.float64)
        weights, optimizer = run(name, here, torch.float64, steps=2)
        torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, tmp_path / "x")
        saved = torch.load(tmp_path / "x", weights_only=True, map_location=there)
        resumed, again = run(name, there, torch.float64, steps=0)
        for W, V in zip(resumed, saved["weights"]):
            W.data.copy_(V)
        again.load_state_dict(saved["optimizer"])
        for i, W in enumerate(resumed):
            G = low_rank(*W.shape, seed=10 * i + 2) if W.ndim == 2 else gaussian(*W.shape, seed=2)
            W.grad = G.to(there)
        again.step()
        for i, (W, V) in enumerate(zip(resumed, straight)):
            assert {v.device.type for v in tensors(again.state[W]).values()} <= {there}
            way = (V.detach().cpu() - gaussian(*SHAPES[i], seed=i) / 4).norm()
            assert (W.detach().cpu() - V.detach().cpu()).norm() < share(name, torch.float64) * way


def test_per_layer_updates_on_the_device(device):
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Tanh(), nn.Linear(48, 64, bias=False)).double()
    ends = []
    for place in ("cpu", device):
        moved = filled(copy.deepcopy(model), torch.float64).to(place)
        optimizer = GaLoreAdamW([{"params": list(moved.parameters()), "rank": 4, "gap": 2}], lr=0.1)
        per_layer_updates(optimizer)
        for t in range(3):
            moved(gaussian(10, 64, seed=t).to(place)).square().mean().backward()
            optimizer.step()
        assert all(p.grad is None for p in moved.parameters())
        ends.append(torch.cat([p.detach().cpu().flatten() for p in moved.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)


# Concepts.


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("side", ["lower", "both"])
def test_concept_classifiers_agree(side, dtype, device):
    model = ConceptClassifier(gaussian(5, 20, 64, dtype=dtype), scale=20.0, side=side)
    x = gaussian(9, 64, seed=1, dtype=dtype)
    wanted = model(x)
    got = model.to(device)(x.to(device))
    assert got.device.type == device
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=20 * bound(wanted, dtype))


def test_determinantal_picks_agree(device):
    E = gaussian(40, 12)
    for pick in (greedy_dpp(E, 10)[0], greedy_dpp(E.to(device), 10)[0].cpu()):
        assert torch.equal(pick, greedy_dpp(E, 10)[0])
    drawn = [sample_k_dpp(features, 6, generator=seeded(3)).cpu() for features in (E, E.to(device))]
    assert all(len(set(d.tolist())) == 6 for d in drawn)


# Packed ternary weights.


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 64), (70, 129), (256, 512)])
def test_packed_layers_equal_the_definition(shape, dtype, rows, device):
    """y = (x_q Tᵀ)·β/s, in float64 on the CPU. The inputs lie on codes, so no implementation can round another way."""
    m, n = shape
    codes = torch.randint(-127, 128, (rows, n), generator=seeded(2)).double()
    codes[:, 0] = 127
    x = (codes / 32).to(dtype)  # seven bits: exact in bfloat16
    layer = BitLinear(filled(nn.Linear(n, m), dtype), sub_norm=False)
    packed = PackedLinear(layer).to(device)
    T = ternary_codes(layer.weight.detach(), packed.beta.cpu())
    assert torch.equal(packed.codes.cpu(), pack(T)) and packed.codes.device.type == device
    assert torch.equal(int8_codes(x.float(), absmax_scale(x.float())).double(), codes)
    wanted = codes @ T.double().T * float(packed.beta) / 32 + layer.bias.detach().double()
    got = packed(x.to(device))
    assert got.dtype == dtype and got.device.type == device
    limit = 4 * torch.finfo(dtype).eps * wanted.abs().max()
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=0, atol=float(limit))


@pytest.mark.parametrize("places", [("device", "cpu"), ("cpu", "device")])
def test_packing_on_either_device_gives_the_same_bytes(places, device):
    layer = BitLinear(wide(torch.float32))
    first, second = (PackedLinear(copy.deepcopy(layer).to(device if p == "device" else p)) for p in places)
    assert torch.equal(first.codes.cpu(), second.codes.cpu())
    torch.testing.assert_close(
        first.beta.cpu(), second.beta.cpu(), rtol=LONGEST * torch.finfo(torch.float32).eps, atol=0
    )
