"""A GPT on several devices, by weak and strong scaling: tokens a second, numbers sent, and the loss.

    torchrun --standalone --nproc_per_node 1 tests/benchmarks/bench_scaling.py --out scaling.json
    torchrun --standalone --nproc_per_node 2 tests/benchmarks/bench_scaling.py --out scaling.json

Full training, LoRA, GaLore, RandLoRA and HGF under DDP; full training, LoRA, SLTrain and BitLinear under FSDP2. A
LLaMA-350M-shaped GPT under bf16 autocast on random tokens. Part "strong": 32 windows of 512 tokens in all, of which
each process takes its share; the loss is the same but for the roundings of bf16, which parts of a batch meet in other
orders. Part "weak": 32 windows for each process. With one process the two are the same and measured once. Rows are
stored one by one.
"""

import gc
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from common import MIB, Runs, arguments, block_groups, peak_mib, reset_peak, synchronize
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ref.adapters import LoRALinear, RandLoRALinear
from lowrank_ref.core.layers import is_linear, replace_linears, replace_modules
from lowrank_ref.lab.models import GPT, llama_shape
from lowrank_ref.lowbit import BitLinear, HGFLinear
from lowrank_ref.optimizers import GaLoreAdamW
from lowrank_ref.pretraining import SLTrainLinear

INSIDE = r"(attn\.[qkvo]|mlp\.(gate|up|down))$"


class Traffic(TorchDispatchMode):
    """Counts the bytes of whole tensors that FSDP2 gathers and scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and call."""
        if "allgather_base" in str(function):
            self.bytes += args[0].nbytes
        elif "reduce_scatter_base" in str(function):
            self.bytes += args[1].nbytes
        return function(*args, **(kwargs or {}))


def methods(rank: int) -> dict[str, tuple[Callable[[GPT], Any], str, Callable[[Any], torch.optim.Optimizer]]]:
    """Name -> (what is done to the model, DDP or FSDP2, its optimizer)."""
    draw = torch.Generator().manual_seed(1)

    def adam(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def galore(model: Any) -> torch.optim.Optimizer:
        return GaLoreAdamW(block_groups(model, rank=rank), lr=1e-3)

    def whole(layer: Callable[..., nn.Module]) -> Callable[[GPT], Any]:
        return lambda model: replace_modules(model, INSIDE, layer, accepts=is_linear).requires_grad_(True)

    lora = partial(replace_linears, pattern=INSIDE, factory=partial(LoRALinear, rank=8, generator=draw))
    randlora = partial(replace_linears, pattern=INSIDE, factory=partial(RandLoRALinear, rank=min(32, rank)))
    hgf_rank = max(2, rank // 8)
    sltrain = partial(SLTrainLinear.from_linear, rank=rank, density=0.03, generator=draw)
    return {
        "full training, DDP": (lambda model: model, "DDP", adam),
        "LoRA r 8, DDP": (lora, "DDP", adam),
        f"GaLore r {rank}, DDP": (lambda model: model, "DDP", galore),
        f"RandLoRA r {min(32, rank)}, DDP": (randlora, "DDP", adam),
        f"HGF r {hgf_rank}, DDP": (whole(partial(HGFLinear, rank=hgf_rank, generator=draw)), "DDP", adam),
        "full training, FSDP2": (lambda model: model, "FSDP2", adam),
        "LoRA r 8, FSDP2": (lora, "FSDP2", adam),
        f"SLTrain r {rank}, FSDP2": (whole(sltrain), "FSDP2", adam),
        "BitLinear, FSDP2": (whole(BitLinear), "FSDP2", adam),
    }


def measure(name: str, tiny: bool, device: str, rank: int, *, weak: bool) -> dict[str, Any]:
    """Train with one method; every process returns the same row, but for its own memory."""
    shape = {"dim": 32, "ffn": 64, "layers": 2, "heads": 2, "vocab_size": 64} if tiny else llama_shape("350M")
    batch, length, steps = (4, 16, 2) if tiny else (32, 512, 8)
    batch *= dist.get_world_size() if weak else 1
    change, wrap, make_optimizer = methods(rank)[name]
    with torch.device(device):  # draws 350M numbers sooner than the host
        model = GPT(**shape, length=length, generator=torch.Generator(device).manual_seed(0))
    model = change(model).to(device)
    sent = [0]

    def count(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        state[0] += bucket.buffer().nbytes
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    net: Any = model
    if wrap == "DDP":
        net = DistributedDataParallel(model)
        net.register_comm_hook(sent, count)
    else:
        for module in (*model.blocks, model):
            fully_shard(module)
    optimizer = make_optimizer(model)
    tokens = torch.randint(shape["vocab_size"], (batch, length + 1), generator=torch.Generator().manual_seed(2))
    mine = tokens[dist.get_rank() :: dist.get_world_size()].to(device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            logits = net(mine[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1).float(), mine[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    if wrap == "DDP":
        step()
    else:
        with Traffic() as traffic:
            step()
        sent[0] += traffic.bytes
    first = sent[0]
    step()
    reset_peak()
    synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        loss = step()
    synchronize()
    seconds = (time.perf_counter() - begin) / steps
    mean = loss / dist.get_world_size()
    dist.all_reduce(mean)
    return {
        "ms_per_step": round(1000 * seconds, 2),
        "tokens_per_second": round(batch * length / seconds),
        "whole_tensors_sent_mib": round(first / MIB, 1),
        "peak_mib": round(peak_mib()),
        "loss": round(float(mean), 4),
    }


def main() -> None:
    """Run all methods with as many processes as torchrun has started."""
    args = arguments(__doc__ or "", ("strong", "weak"))
    cuda = args.device == "cuda"
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    world, rank = dist.get_world_size(), 4 if args.tiny else 256
    shape = "a tiny GPT" if args.tiny else "GPT of LLaMA-350M's shape"
    share = {"strong": "32 windows of 512 tokens in all", "weak": "32 windows of 512 tokens a process"}
    for part in args.part:
        setting = f"{shape}, {share[part]}, bf16 autocast, weights float32, AdamW"
        runs = Runs(args.out, part, setting=setting, seconds=float("inf"))
        for name in methods(rank):
            if not re.search(args.only, name) or (world == 1 and part == "weak"):
                continue
            key = {"method": name, "processes": world}
            known = [any(key.items() <= row.items() for row in runs.rows)]
            dist.broadcast_object_list(known)  # what process 0 sees counts: it is the one that writes
            if known[0]:
                continue
            run = partial(measure, name, args.tiny, device, rank, weak=part == "weak")
            if dist.get_rank() == 0:
                runs.row(key, run)
            else:
                run()
            gc.collect()
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
