"""FSDP2 (`fully_shard`) in two gloo processes on the CPU: the step of one process, and a sharded save and load."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from battery import linear, seeded, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears

pytestmark = pytest.mark.slow


def lora():
    """A network with a LoRA layer that has moved, and an ordinary layer that trains too."""
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(10, 6).double())
    with torch.no_grad():
        for p in model[2].parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(3)) / 3)
    replace_linears(model, "0", lambda base: LoRALinear(base, 4, generator=seeded(1)), trainable="2")
    nn.init.normal_(model[0].B, generator=seeded(2))
    return model


CASES = {"LoRA": lora}


def whole(model):
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}


def work(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    results = {}
    for name, make in CASES.items():
        model = make()
        for module in (model[0], model):
            fully_shard(module, mesh=mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        train(model, torch.optim.Adam(trained, lr=0.01), range(3), rows=slice(rank, None, world))
        results[name] = whole(model)
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/{name}")
        again = make()
        for module in (again[0], again):
            fully_shard(module, mesh=mesh)
        state = {"model": get_model_state_dict(again)}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(again, state["model"])
        results[f"{name}, loaded"] = whole(again)
        results[f"{name}, sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    if rank == 0:
        torch.save(results, f"{folder}/results")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    torch.multiprocessing.spawn(work, args=(2, str(folder)), nprocs=2)
    return torch.load(folder / "results", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_three_sharded_steps_equal_those_of_one_process(name, sharded):
    model = CASES[name]()
    start = copy.deepcopy(model.state_dict())
    train(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01), range(3))
    assert sharded[f"{name}, sharded"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(sharded[name][key], value, rtol=0, atol=1e-9)
    assert any(not torch.equal(value, start[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_save_loads(name, sharded):
    for key, value in sharded[name].items():
        assert torch.equal(sharded[f"{name}, loaded"][key], value)
