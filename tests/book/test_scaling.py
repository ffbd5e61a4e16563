"""The page on several devices: its script runs, and its tables count what PyTorch sends."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from links import ROOT
from processes import in_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ref.adapters import DoRALinear, LoRALinear, PiSSALinear, RandLoRALinear
from lowrank_ref.lowbit import BitLinear
from lowrank_ref.optimizers import GaLoreAdamW
from lowrank_ref.optimizers.sharded import whole_matrices
from lowrank_ref.pretraining import SLTrainLinear
from lowrank_ref.ranks import SoRALinear

PAGE = (ROOT / "book/scaling.md").read_text()
M, N, R = 24, 16, 4

pytestmark = pytest.mark.slow


def started(script, processes, **more):
    """Run the script under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"STEPS": "3", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=300)


def losses(script, processes, **more):
    """Return what the script printed."""
    done = started(script, processes, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_the_script_gives_the_same_losses_however_it_is_started(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(code)
    one = losses(script, 1)
    assert [line.split()[0] for line in one] == ["0", "1", "2"]
    assert float(one[0].split()[1]) > float(one[2].split()[1])
    assert losses(script, 2) == one
    assert losses(script, 4) == one
    assert losses(script, 2, SHARD="1") == one
    assert losses(script, 4, SHARD="1") == one
    three = started(script, 3)
    assert three.returncode != 0 and three.stdout == "" and "shared by 3 processes" in three.stderr


LAYERS = {
    "full training": lambda base: base,
    "LoRA": partial(LoRALinear, rank=R),
    "PiSSA": partial(PiSSALinear, rank=R),
    "DoRA": partial(DoRALinear, rank=R),
    "SoRA": partial(SoRALinear, rank=R),
    "RandLoRA": partial(RandLoRALinear, rank=R),
    "SLTrain": partial(SLTrainLinear.from_linear, rank=R, density=0.1),
    "GaLore": lambda base: base,
    "BitLinear": BitLinear,
}


def layer(name):
    return LAYERS[name](nn.Linear(N, M, bias=False))


def sent_by_ddp(m, n, r, density):
    """The first table of the page."""
    d = min(m, n)
    return {
        "full training": m * n,
        "LoRA": r * (m + n),
        "PiSSA": r * (m + n),
        "DoRA": r * (m + n) + m,
        "SoRA": r * (m + n + 1),
        "RandLoRA": -(-d // r) * (r + d),
        "SLTrain": r * (m + n) + int(density * m * n),
        "GaLore": m * n,
        "BitLinear": m * n + n,
    }


def sent_by_fsdp(name):
    """The second table of the page: numbers gathered and scattered."""
    factors, values = R * (M + N), int(0.1 * M * N)
    return {
        "full training": (2 * M * N, M * N),
        "LoRA": (2 * M * N + 2 * factors, factors),
        "SLTrain": (2 * factors + 2 * values, factors + values),
        "GaLore": (2 * M * N + 2 * M * N, M * N),
        "BitLinear": (2 * (M * N + N), M * N + N),
    }[name]


class Counter(TorchDispatchMode):
    """Counts the numbers of whole tensors that collectives put together or reduce."""

    def __init__(self):
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "allgather_base" in str(function):
            self.gathered += args[0].numel()
        elif "reduce_scatter_base" in str(function):
            self.scattered += args[1].numel()
        elif "all_gather_into_tensor" in str(function):
            self.gathered += result.numel()
        return result


def work(rank, world, folder):
    mesh = dist.init_device_mesh("cpu", (world,))
    found = {}
    for name in LAYERS:
        torch.manual_seed(0)
        numbers = []

        def count(state, bucket):
            state.append(bucket.buffer().numel())
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

        net = nn.parallel.DistributedDataParallel(layer(name))
        net.register_comm_hook(numbers, count)
        net(torch.ones(3, N)).sum().backward()
        found[name] = [sum(numbers)]
    for name in ("full training", "LoRA", "SLTrain", "GaLore", "BitLinear"):
        torch.manual_seed(0)
        model = nn.Sequential(layer(name), nn.Identity())
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        with Counter() as counter:
            model(torch.ones(3, N)).sum().backward()
            if name == "GaLore":
                optimizer = GaLoreAdamW([{"params": [model[0].weight], "rank": R}])
                with torch.no_grad(), whole_matrices([model[0].weight], optimizer.state) as lent:
                    optimizer.update(lent, optimizer.param_groups[0])
        found[name] += [counter.gathered, counter.scattered]
    if rank == 0:
        torch.save(found, f"{folder}/found")


def test_the_tables_count_what_is_sent(tmp_path):
    in_processes(work, tmp_path)
    found = torch.load(tmp_path / "found", weights_only=True)
    for name, (reduced, *sharded) in found.items():
        assert reduced == sent_by_ddp(M, N, R, 0.1)[name], name
        if sharded:
            assert tuple(sharded) == sent_by_fsdp(name), name


def test_the_printed_sizes_are_those_of_the_formulas():
    table = PAGE.split("## What has to be sent")[1].split("FSDP2 gathers")[0]
    ranks = {"RandLoRA": 32, "SLTrain": 128}
    checked = set()
    for cells in (line.split("|") for line in table.split("\n") if line.startswith("| ") and "MiB" not in line):
        name = re.match(r"[A-Za-z]+( training)?", cells[1].strip())[0]
        numbers = sent_by_ddp(4096, 4096, ranks.get(name, 8), 0.03)[name]
        assert float(cells[3]) == pytest.approx(4 * numbers / 2**20, abs=0.0051), name
        checked.add(name)
    assert checked | {"PiSSA"} == set(LAYERS)
