"""What the chapter on LoRA-SB is too short for, on digits turned by 90 degrees (CPU, about 20 minutes on one core).

    python tests/benchmarks/bench_lora_sb_small.py --out book/results/lora_sb_small.json

digits: LoRA-SB, LoRA-XS and what lies between them (frames x start), random frames, other samples for the gradient
pass, LoRA at three scales, and all weights; five rates and ten seeds an arm, in a grid of its own.
scale: one rate, three scales, with theorem 3's correction and without, for SGD and for Adam.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear, LoRASBLinear, LoRAXSLinear
from lowrank_ref.adapters.gradient_start import gradient_sums
from lowrank_ref.adapters.lora_sb import first_step, optimal_gradient, update_approximation
from lowrank_ref.adapters.svd_frames import random_frames, singular_frames, xs_frames
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.lab.beds import classification_loss, digits_shift, pretrained_on_digits
from lowrank_ref.lab.data import array_batches, digits
from lowrank_ref.lab.train import linear_decay, train

SEEDS = tuple(range(10))
HIGH, MIDDLE, LOW = (0.03, 0.1, 0.3, 1.0, 3.0), (0.01, 0.03, 0.1, 0.3, 1.0), (0.003, 0.01, 0.03, 0.1, 0.3)
FRAMES = {"LoRA-XS": xs_frames, "LoRA-XS, no Σ": singular_frames, "random frames": random_frames}
#: Arm without its rank -> number of images of the gradient pass, η, what becomes of the core's start.
SB = {
    "LoRA-SB": (64, 1e-3, "S"),
    "LoRA-SB, R = 0": (64, 1e-3, "zero"),
    "LoRA-SB, signs drawn": (64, 1e-3, "signs"),
    "LoRA-SB, raw gradient": (64, 1e-3, "raw"),
    "LoRA-SB, η = 0.01": (64, 1e-2, "S"),
    "LoRA-SB, η = 0.01, signs drawn": (64, 1e-2, "signs"),
    "LoRA-XS, no Σ, step projected": (64, 1e-3, "projected"),
    "LoRA-SB, 1 image": (1, 1e-3, "S"),
    "LoRA-SB, 8 images": (8, 1e-3, "S"),
    "LoRA-SB, 1,000 images": (1000, 1e-3, "S"),
    "LoRA-SB, 64 upright images": (-64, 1e-3, "S"),
}
RANKS = (4, 8, 16)
#: Arm -> its grid of rates.
ARMS = {
    **{f"{name} r={r}": MIDDLE if r == 16 else HIGH for name in SB if "image" not in name for r in RANKS},
    **{f"{name} r={r}": MIDDLE if r == 16 else HIGH for name in SB if "image" in name for r in (8, 16)},
    **{f"{name} r={r}": HIGH if name[0] == "r" and r < 16 else MIDDLE for name in FRAMES for r in RANKS},
    **{f"LoRA, s = {s} r={r}": LOW for s in (0.5, 2, 8) for r in (1, 8)},
    "full, no biases": (0.001, 0.003, 0.01, 0.03, 0.1),
}


def sums(model: nn.Module, images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Gradient sums of all layers over some training images; a negative number takes upright ones."""
    data = digits(rotate=90 if images > 0 else 0)
    i = torch.randperm(len(data.x_train), generator=generator)[: abs(images)]
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return gradient_sums(model, layers, classification_loss, [(data.x_train[i], data.y_train[i])])


def start(
    base: nn.Linear, G: Tensor, rank: int, eta: float, kind: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A, R and B of one layer."""
    r, step = min(rank, *G.shape), first_step(G, eta)
    if kind == "raw":  # the gradient itself, scaled to the norm of its sign
        step = -G * (step.norm() / G.norm())
    if kind == "projected":
        A, B = singular_frames(base.weight.detach(), r)
        return A, B.T @ step @ A.T, B
    A, R, B = update_approximation(step, r)
    if kind == "zero":
        R = torch.zeros(r, r)
    if kind == "signs":
        R = R * (2 * torch.randint(2, (r, 1), generator=generator) - 1)
    return A, R, B


def adapt(model: nn.Module, generator: torch.Generator, name: str) -> None:
    """Adapt the network in place as the arm's name says."""
    kind, _, rank = name.partition(" r=")
    if kind in SB:
        images, eta, what = SB[kind]
        found = sums(model, images, generator)
        G = {id(model.get_submodule(path)): value for path, value in found.items()}

        def factory(base: nn.Linear) -> nn.Module:
            return LoRASBLinear(base, *start(base, G[id(base)], int(rank), eta, what, generator))

    elif kind in FRAMES:

        def factory(base: nn.Linear) -> nn.Module:
            r = min(int(rank), *base.weight.shape)
            return LoRAXSLinear(base, r, frames=FRAMES[kind], generator=generator)

    elif kind.startswith("LoRA"):

        def factory(base: nn.Linear) -> nn.Module:
            r = min(int(rank), *base.weight.shape)
            return LoRALinear(base, r, alpha=float(kind.partition("= ")[2]) * r, generator=generator)

    else:
        for path, p in model.named_parameters():
            p.requires_grad_("weight" in path)
        return
    replace_linears(model, "", factory)


def turned(name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm; its numbers, or that it diverged."""
    try:
        found = digits_shift(partial(adapt, name=name), lr, seed, steps=steps)
    except FloatingPointError:
        return {"error": "diverged"}
    return {k: round(v, 5) for k, v in found.items() if k != "state bytes"}


def scaled(optimizer: str, scale: float, corrected: bool, seed: int, steps: int) -> dict[str, Any]:
    """Train LoRA-SB of rank 8 at one rate and one scale, with theorem 3's gradient or R's own."""
    data, model = digits(rotate=90), pretrained_on_digits()
    generator = torch.Generator().manual_seed(seed)
    found = sums(model, 64, generator)
    G = {id(model.get_submodule(path)): value for path, value in found.items()}

    def factory(base: nn.Linear) -> nn.Module:
        A, R, B = update_approximation(first_step(G[id(base)], 1e-3), 8)
        return LoRASBLinear(base, A, R / scale, B, scale=scale)

    replace_linears(model, "", factory)
    for _, layer in adapters(model):
        if corrected:
            layer.R.register_hook(partial(optimal_gradient, A=layer.A, B=layer.B, scale=scale))
    make: Callable[..., torch.optim.Optimizer] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[optimizer]
    steps_of = make([layer.R for _, layer in adapters(model)], lr={"SGD": 0.3, "Adam": 0.1}[optimizer])
    batches = array_batches(data.x_train, data.y_train, batch=64, seed=seed)
    try:
        schedule = linear_decay(steps)
        train(model, batches, classification_loss, steps_of, steps=steps, schedule=schedule, progress=False)
    except FloatingPointError:
        return {"error": "diverged"}
    with torch.no_grad():
        return {"loss": round(F.cross_entropy(model(data.x_test), data.y_test).item(), 5)}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("digits", "scale"))
    torch.set_num_threads(1)
    steps = 5 if args.tiny else 200
    network = "MLP 64-128-128-10, pretrained on 1,000 upright digits, learns the same turned by 90 degrees"
    if "digits" in args.part:
        runs = Runs(args.out, "digits", setting=f"{network}; Adam, {steps} steps of 64 images", seconds=args.seconds)
        for name, grid in ARMS.items():
            for lr in grid[:1] if args.tiny else grid:
                for seed in SEEDS[:1] if args.tiny else SEEDS:
                    if re.search(args.only, name):
                        key = {"method": name, "lr": lr, "seed": seed}
                        runs.row(key, partial(turned, name, lr, seed, steps))
    if "scale" in args.part:
        setting = f"{network}; LoRA-SB r = 8, {steps} steps of 64 images, SGD at 0.3 or Adam at 0.1"
        runs = Runs(args.out, "scale", setting=setting, seconds=args.seconds)
        for optimizer in ("SGD", "Adam"):
            for corrected in (True, False):
                for scale in (0.25, 1.0, 4.0):
                    for seed in SEEDS[:1] if args.tiny else SEEDS[:5]:
                        name = f"{optimizer}, {'corrected' if corrected else 'plain'}, s = {scale:g}"
                        if re.search(args.only, name):
                            measure = partial(scaled, optimizer, scale, corrected, seed, steps)
                            runs.row({"method": name, "seed": seed}, measure)


if __name__ == "__main__":
    main()
