"""FSDP2 (`fully_shard`) in two gloo processes on the CPU: the step of one process, and a sharded save and load.

DDP of the same methods is in the battery and in the tests of their files.
"""

import copy
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from battery import linear, lora_sb, network, seeded, train
from processes import in_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowrank_ref.adapters import (
    ALLoRALinear,
    DoRALinear,
    LoLDULinear,
    LoRALinear,
    LoRAXSLinear,
    NOLALinear,
    PiSSALinear,
    RandLoRALinear,
    SaRALinear,
    SVFitLinear,
)
from lowrank_ref.analysis import MPSLinear
from lowrank_ref.compression import MaestroLinear, WeLoreLinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lowbit import BitLinear, HGFLinear
from lowrank_ref.lowbit.ternary import absmean
from lowrank_ref.optimizers import GaLoreAdamW
from lowrank_ref.optimizers.sharded import is_sharded, shard_like, whole, whole_matrices
from lowrank_ref.pretraining import SLTrainLinear
from lowrank_ref.ranks import BayesianLoRALinear, CoDyRALinear, DiffoRALinear, IncreLoRALinear, SoRALinear

pytestmark = pytest.mark.slow


def with_layer(make):
    """A network with a layer of the method that has moved, and an ordinary layer that trains too."""
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(10, 6).double())
    replace_linears(model, "0", make, trainable="2")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name not in ("0.weight", "0.magnitude"):
                p.copy_(torch.randn(p.shape, generator=seeded(p.numel())) / 3)
    for p in model[0].parameters():
        p.requires_grad_(p.requires_grad or not hasattr(model[0], "base"))  # a layer that replaces the weight trains
    return model


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


class Sharded(GaLoreAdamW):
    """GaLore that steps on whole matrices where they are sharded."""

    def update(self, ps, group):
        with whole_matrices(ps, self.state) as matrices:
            super().update(matrices, group)


def galore(model):
    """Two steps share a basis; both sides occur, and weights decay."""
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == flat] for flat in (True, False))
    return Sharded([{"params": matrices, "rank": 2, "gap": 2}, {"params": rest}], lr=0.05, weight_decay=0.1)


#: Name -> (model, its optimizer). The last one has bases that are no buffers, and a base that is sharded by itself.
CASES = {
    "LoRA": (lambda: with_layer(partial(LoRALinear, rank=4, generator=seeded(1))), adam),
    "DoRA": (lambda: with_layer(partial(DoRALinear, rank=4, generator=seeded(1))), adam),
    "PiSSA": (lambda: with_layer(partial(PiSSALinear, rank=4)), adam),
    "SVFit": (lambda: with_layer(SVFitLinear), adam),
    "LoLDU": (lambda: with_layer(partial(LoLDULinear, trains="both")), adam),
    "SaRA": (lambda: with_layer(partial(SaRALinear, density=0.4)), adam),
    "ALLoRA": (lambda: with_layer(partial(ALLoRALinear, rank=4, boost=3.0, generator=seeded(1))), adam),
    "LoRA-XS": (lambda: with_layer(partial(LoRAXSLinear, rank=4, generator=seeded(1))), adam),
    "LoRA-SB": (lambda: with_layer(partial(lora_sb, rank=4, generator=seeded(1))), adam),
    "SoRA": (lambda: with_layer(partial(SoRALinear, rank=4, generator=seeded(1))), adam),
    "DiffoRA": (lambda: with_layer(partial(DiffoRALinear, rank=4, generator=seeded(1))), adam),
    "CoDyRA": (lambda: with_layer(partial(CoDyRALinear, rank=4, generator=seeded(1))), adam),
    "IncreLoRA": (lambda: with_layer(partial(IncreLoRALinear, rank=4, capacity=6, generator=seeded(1))), adam),
    "Bayesian-LoRA": (lambda: with_layer(partial(BayesianLoRALinear, rank=4, gate=0.0, generator=seeded(1))), adam),
    "MPS": (lambda: with_layer(partial(MPSLinear, generator=seeded(1))), adam),
    "Maestro": (lambda: with_layer(MaestroLinear.from_linear), adam),
    "WeLore": (lambda: with_layer(partial(WeLoreLinear.from_linear, rank=4)), adam),
    "NOLA": (lambda: with_layer(partial(NOLALinear, rank=4, generator=seeded(1))), adam),
    "RandLoRA": (lambda: with_layer(partial(RandLoRALinear, rank=4, generator=seeded(1))), adam),
    "RandLoRA, fused": (lambda: with_layer(partial(RandLoRALinear, rank=4, fused=True, generator=seeded(1))), adam),
    "SLTrain": (
        lambda: with_layer(partial(SLTrainLinear.from_linear, rank=4, density=0.2, generator=seeded(1))),
        adam,
    ),
    "BitLinear": (lambda: with_layer(BitLinear), adam),
    "GaLore": (network, galore),
    "LoRA, base sharded alone": (lambda: with_layer(partial(LoRALinear, rank=4, generator=seeded(1))), adam),
}


def shard(model, name, mesh):
    inner = model[0].base if name.endswith("alone") else model[0]
    for module in (inner, model):
        fully_shard(module, mesh=mesh)
    return model


def gathered(model):
    return {key: whole(value) for key, value in model.state_dict().items()}


def parts_of_tensors(mesh):
    """Check `shard_like` against the shard that PyTorch makes, also of rows that do not divide and of a vector."""
    for shape in ((5, 3), (4, 2), (1, 6), (7,)):
        W = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        p = torch.distributed.tensor.distribute_tensor(W, mesh)
        part = shard_like(W, p)
        assert is_sharded(part) and part.placements == p.placements
        assert torch.equal(part.to_local(), p.to_local()) and torch.equal(whole(part), W)


def optimizer_resumes(folder, mesh, rank):
    """GaLore's state is the same in every process: saved by the first, it goes on in all as if never stopped."""
    model = shard(network(), "GaLore", mesh)
    optimizer = galore(model)
    train(model, optimizer, range(3), rows=slice(rank, None, 2))
    weights = get_model_state_dict(model)
    dcp.save({"model": weights}, checkpoint_id=f"{folder}/galore weights")
    if rank == 0:
        torch.save(optimizer.state_dict(), f"{folder}/galore state")
    torch.distributed.barrier()
    train(model, optimizer, range(3, 6), rows=slice(rank, None, 2))
    again = shard(network(), "GaLore", mesh)
    weights = get_model_state_dict(again)
    dcp.load({"model": weights}, checkpoint_id=f"{folder}/galore weights")
    set_model_state_dict(again, weights)
    resumed = galore(again)
    resumed.load_state_dict(torch.load(f"{folder}/galore state", weights_only=True))
    train(again, resumed, range(3, 6), rows=slice(rank, None, 2))
    assert all(torch.equal(p.to_local(), q.to_local()) for p, q in zip(model.parameters(), again.parameters()))
    assert not any(is_sharded(t) for state in resumed.state.values() for t in state.values() if torch.is_tensor(t))


def refusals(mesh, rank):
    """What does not work says so in every process, whichever of them holds the reason."""
    with pytest.raises(ValueError, match="scalar parameters"):  # HGF's gate
        fully_shard(nn.Sequential(HGFLinear(linear(), 3, generator=seeded())), mesh=mesh)
    model = shard(network(), "GaLore", mesh)
    optimizer = galore(model)
    train(model, optimizer, range(2), rows=slice(rank, None, 2))
    before = copy.deepcopy(gathered(model))
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    if rank == 1:
        model[0].weight.grad.to_local()[0, 0] = torch.nan
    with pytest.raises(ValueError, match="grad: got NaN"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in gathered(model).items())


def work(rank, world, folder):
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    results = {}
    for name, (make, optimizer) in CASES.items():
        model = shard(make(), name, mesh)
        train(model, optimizer(model), range(3), rows=slice(rank, None, world))
        results[name] = gathered(model)
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/{name}")
        again = shard(make(), name, mesh)
        state = {"model": get_model_state_dict(again)}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(again, state["model"])
        results[f"{name}, loaded"] = gathered(again)
        state = {"model": make().state_dict()}  # of a model that is not sharded
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        results[f"{name}, loaded whole"] = state["model"]
        results[f"{name}, sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    parts_of_tensors(mesh)
    optimizer_resumes(folder, mesh, rank)
    refusals(mesh, rank)
    if rank == 0:
        torch.save(results, f"{folder}/results")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    in_processes(work, folder)
    return torch.load(folder / "results", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_three_sharded_steps_equal_those_of_one_process(name, sharded):
    make, optimizer = CASES[name]
    model = make()
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer(model), range(3))
    assert sharded[f"{name}, sharded"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(sharded[name][key], value, rtol=0, atol=1e-9)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert moved == {key for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_save_loads(name, sharded):
    for key, value in sharded[name].items():
        assert torch.equal(sharded[f"{name}, loaded"][key], value)
        assert torch.equal(sharded[f"{name}, loaded whole"][key], value)


def test_the_scale_of_a_ternary_weight_is_that_of_the_whole(sharded):
    """The case above can fail: the scale of half the rows is another one, and with it the ternary weight."""
    W = sharded["BitLinear"]["0.weight"]
    assert all((absmean(half) - absmean(W)).abs() > 1e-3 for half in W.chunk(2))
