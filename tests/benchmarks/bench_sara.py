"""SaRA on a small diffusion model, and its cost, on a GPU.

    python tests/benchmarks/bench_sara.py --out book/results/sara_scale.json

zero: a denoiser of 26 million weights is trained on filled shapes; what its loss becomes with weights set to zero.
style: it learns 256 outlined shapes; loss on new outlined ones and on filled ones, each arm at four rates, three seeds.
cost: peak memory and milliseconds of a training step, for SaRA and for what it can be compared with.
"""

import copy
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from common import MIB, Runs, arguments, milliseconds, peak_mib, reset_peak
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_ref.adapters import LoRALinear, SaRALinear
from lowrank_ref.adapters.placed_values import placed
from lowrank_ref.adapters.sara import sara_layers
from lowrank_ref.adapters.weight_selection import RULES, pick_entries, threshold_for_density
from lowrank_ref.core.accounting import nbytes, state_bytes
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds.shapes import Denoiser, denoising_loss, shapes

SEEDS, DENSITY, BLOCKS = (0, 1, 2), 0.1, r"^blocks\."
SPARSE = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
RATES = {
    **{f"{rule} 10 %": SPARSE for rule in RULES},
    "all weights": (5e-5, 1e-4, 2e-4, 4e-4),
    "LoRA, equal count": (1e-4, 2e-4, 4e-4, 8e-4),
}


def seeded(seed: int, device: str) -> torch.Generator:
    """Return a generator on the device."""
    return torch.Generator(device).manual_seed(seed)


def denoiser(tiny: bool, device: str, dim: int = 512, layers: int = 8) -> Denoiser:
    """Return a new denoiser of 32x32 pictures."""
    size = {"dim": 32, "layers": 2, "heads": 2} if tiny else {"dim": dim, "layers": layers, "heads": dim // 64}
    return Denoiser(32, 4, **size, generator=torch.Generator().manual_seed(0)).to(device)


def steps_of(
    model: nn.Module, optimizer: Any, x_of: Callable[[int], Tensor], steps: int, seed: int, device: str
) -> None:
    """Train under bf16 autocast, the rate falling linearly to 0."""
    draw = seeded(1000 + seed, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    for i in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = denoising_loss(model, x_of(i), generator=draw)
        loss.backward()
        optimizer.step()
        schedule.step()


def pretrained(tiny: bool, device: str) -> Denoiser:
    """Train on filled shapes: AdamW, decay 0.1."""
    model, draw = denoiser(tiny, device), seeded(1, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, fused=device == "cuda")
    steps, batch = (5, 8) if tiny else (2000, 256)
    steps_of(model, optimizer, lambda i: shapes(batch, generator=draw), steps, 0, device)
    return model


@torch.no_grad()
def losses(model: nn.Module, device: str, tiny: bool) -> dict[str, float]:
    """Return the losses on filled ("old") and outlined ("new") shapes; "valid" on others, to choose rates by."""
    found, count = {}, 16 if tiny else 4096
    for name, outlined, seed in (("old", False, 7), ("new", True, 8), ("old valid", False, 9), ("new valid", True, 10)):
        x = shapes(count, outlined=outlined, generator=seeded(seed, device))
        with torch.autocast(device, torch.bfloat16):
            parts = [denoising_loss(model, part, generator=seeded(seed, device)) for part in x.split(1024)]
        found[name] = round(float(torch.stack(parts).mean()), 5)
    return found


def in_blocks(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> weight of the linear layers of all blocks."""
    return {n: p for n, p in model.named_parameters() if re.search(BLOCKS, n) and p.ndim == 2}


def zeroed(base: nn.Module, rule: str, share: float, one: bool, device: str, tiny: bool) -> dict[str, Any]:
    """Set a share of the blocks' weights to zero, of each matrix, or by one threshold for all."""
    model = copy.deepcopy(base)
    weights = in_blocks(model)
    theta = threshold_for_density(weights.values(), share) if one else 0.0
    for W in weights.values():
        count = int((W.abs() < theta).sum()) if one else round(share * W.numel())
        W.data.view(-1)[pick_entries(W.detach(), count, rule, seeded(3, device)).long()] = 0.0
    return losses(model, device, tiny)


def adapt(model: nn.Module, method: str, seed: int, density: float = DENSITY) -> list[Tensor]:
    """Change the blocks of a model, freeze the rest, and return what trains."""
    generator = torch.Generator().manual_seed(seed)

    def make(base: nn.Linear) -> nn.Module:
        m, n = base.weight.shape
        if method.startswith("LoRA"):
            rank = max(1, round(density * m * n / (m + n))) if "equal" in method else 4
            return LoRALinear(base, rank, generator=generator)
        return SaRALinear(base, density, rule=method.split()[0], generator=generator)

    if method == "all weights":
        kept = {id(W) for W in in_blocks(model).values()}
        for p in model.parameters():
            p.requires_grad_(id(p) in kept)
    else:
        replace_linears(model, BLOCKS, make)
    return [p for p in model.parameters() if p.requires_grad]


def styled(base: nn.Module, method: str, lr: float, seed: int, device: str, tiny: bool) -> dict[str, Any]:
    """Learn outlined shapes from 256 pictures."""
    model, x = copy.deepcopy(base), shapes(256, outlined=True, generator=seeded(20, device))
    params, draw = adapt(model, method, seed), seeded(30 + seed, device)
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=device == "cuda")
    steps, batch = (3, 8) if tiny else (200, 64)
    rows = torch.randint(len(x), (steps, batch), generator=draw, device=device)
    steps_of(model, optimizer, lambda i: x[rows[i]], steps, seed, device)
    return {**losses(model, device, tiny), "trainable": sum(p.numel() for p in params)}


class Naive(nn.Module):
    """SaRA as autograd alone would do it: every weight is a new tensor with the trained values at their places."""

    def __init__(self, model: nn.Module, density: float) -> None:
        super().__init__()
        self.model, self.supports = model.requires_grad_(False), {}
        self.values = nn.ParameterList()
        for name, W in in_blocks(model).items():
            self.supports[name] = pick_entries(W, round(density * W.numel()))
            self.values.append(nn.Parameter(W.detach().flatten()[self.supports[name]].clone()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Compute with the placed weights."""
        weights = in_blocks(self.model)
        new = {name: placed(weights[name], p, self.supports[name]) for p, name in zip(self.values, self.supports)}
        return functional_call(self.model, new, (x, t))


def masked_step(masks: dict[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Take a dense Adam step on masked gradients."""
    for W, mask in masks.items():
        assert W.grad is not None
        W.grad *= mask
    optimizer.step()


def cost(method: str, batch: int, density: float, device: str, tiny: bool) -> dict[str, Any]:
    """Measure a training step: its peak, what is kept between steps, its time."""
    model: nn.Module = denoiser(tiny, device, dim=1024, layers=16)
    masks: dict[Tensor, Tensor] = {}
    if method == "SaRA, autograd's graph":
        model = Naive(model, density)
        params = [*model.values]
    elif method == "dense gradients, masked":
        params = adapt(model, "all weights", 0)
        for W in params:
            mask = torch.zeros_like(W, dtype=torch.bool)
            mask.view(-1)[pick_entries(W.detach(), round(density * W.numel())).long()] = True
            masks[W] = mask
    elif method == "PEFT's LoRA r=4":
        peft: Any = import_module("peft")
        names = ["q", "k", "v", "o", "gate", "up", "down"]
        model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=names), model)
        params = [p for p in model.parameters() if p.requires_grad]
    else:
        params = adapt(model, {"SaRA": "smallest"}.get(method, method), 0, density)
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=device == "cuda")
    x, draw = shapes(batch, generator=seeded(0, device)), seeded(1, device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = denoising_loss(model, x, generator=draw)
        loss.backward()
        masked_step(masks, optimizer) if masks else optimizer.step()

    step()
    optimizer.zero_grad()
    resting = torch.cuda.memory_allocated() / MIB if device == "cuda" else 0.0
    reset_peak()
    step()
    peak = peak_mib()
    found = {"trainable": sum(p.numel() for p in params), "state MiB": state_bytes(optimizer) / MIB}
    if method == "SaRA":
        layers = sara_layers(model).values()
        found["places MiB"] = nbytes(t for a in layers for t in (a.support, a.active)) / MIB
    if masks:
        found["trainable"] = sum(int(mask.sum()) for mask in masks.values())
        found["places MiB"] = nbytes(masks.values()) / MIB
    times = milliseconds(step, repeats=2 if tiny else 10)
    return {**found, "peak MiB": round(peak, 1), "resting MiB": round(resting, 1), **times}


def main() -> None:
    """Run the parts asked for; `--only` is matched with the method or rule."""
    args = arguments(__doc__ or "", ("zero", "style", "cost"))
    tiny, device, seconds = args.tiny, args.device, args.seconds
    if {"zero", "style"} & set(args.part):
        base = pretrained(tiny, device)
        setting = (
            "a transformer of 26 million weights that takes noise off filled shapes of 32x32 pixels, 2,000 AdamW "
            "steps of 256 pictures, decay 0.1, bf16 autocast; mean squared error of the noise, 4,096 pictures"
        )
        if "zero" in args.part:
            runs = Runs(args.out, "zero", setting=setting, seconds=seconds)
            for rule, one in (*((rule, False) for rule in RULES), ("smallest", True)):
                for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
                    if re.search(args.only, rule):
                        key = {"rule": rule, "share": share, "one": one}
                        runs.row(key, partial(zeroed, base, rule, share, one, device, tiny))
        if "style" in args.part:
            more = "; it learns 256 outlined shapes by 200 AdamW steps of 64, the rate falling linearly to 0"
            runs = Runs(args.out, "style", setting=setting + more, seconds=seconds)
            for seed in SEEDS[:1] if tiny else SEEDS:
                for method, rates in RATES.items():
                    for lr in rates[:1] if tiny else rates:
                        if re.search(args.only, method):
                            key = {"method": method, "lr": lr, "seed": seed}
                            runs.row(key, partial(styled, base, method, lr, seed, device, tiny))
        del base
    if "cost" in args.part:
        setting = "the same transformer at width 1024 with 16 blocks, 200 million weights, float32 under bf16 autocast"
        runs = Runs(args.out, "cost", setting=setting, packages=("peft",), seconds=seconds)
        methods = (
            "SaRA",
            "SaRA, autograd's graph",
            "dense gradients, masked",
            "LoRA, equal count",
            "LoRA r=4",
            "PEFT's LoRA r=4",
        )
        for density, batch in ((0.05, 8), (0.05, 64), (0.05, 256), (0.2, 64)):
            for method in (*methods, "all weights"):
                if re.search(args.only, method):
                    key = {"method": method, "batch": batch, "density": density}
                    runs.row(key, partial(cost, method, batch, density, device, tiny))


if __name__ == "__main__":
    main()
