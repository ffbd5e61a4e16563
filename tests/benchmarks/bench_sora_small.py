"""What the chapter on SoRA is too short for: planted ranks, and the time of a step (CPU, five minutes on one core).

    python tests/benchmarks/bench_sora_small.py --out book/results/sora_small.json --device cpu

planted: four layers whose updates have the ranks 0, 1, 1, 8. SoRA, fixed ranks, cuts by singular values after or during
the training, L1 in the loss, and what the official code does differently. Rates are chosen on validation rows.
steps: processor time of a training step of LoRA, SoRA and PEFT's AdaLoRA, in turns.
"""

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from common import Runs, arguments, save
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.actions import Action
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.lab.beds import TanhResidual, measure_planted, planted_rank, train_planted
from lowrank_ref.ranks import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, prune_by_svd
from lowrank_ref.ranks.sora import l1_penalty, rank_gates, released_threshold, soft_threshold

SEEDS = (0, 1, 2)
STEPS, LARGEST, TRUTH = 400, 12, (0, 1, 1, 8)
#: A and B in the arms whose gates have plain gradient descent: their rate; what is swept is that of the gates.
ADAM_LR = 0.01
#: Cuts of the gates after L1 in the loss; taken is the largest that raises the validation error by at most 5 %.
CUTS = (0.005, 0.01, 0.015, 0.02, 0.05)
SLOW, FAST, GATES, L1 = (0.005, 0.01, 0.02), (0.01, 0.02, 0.04), (3.0, 10.0, 30.0), (0.04, 0.08, 0.16)


@dataclass(frozen=True)
class Setting:
    """One arm.

    Attributes:
        rates: that are tried.
        rank: of every layer at the start; 0 stands for the planted ranks.
        gate: None for LoRA, else how g starts: "normal" or "ones".
        pull: λ of the proximal step, 0 for none.
        loss: strength of L1 in the loss, 0 for none.
        sgd: plain gradient descent on the gates.
        decays: whether its rate follows that of A and B; else it stays.
        coupled: thresholds in proportion to the rate, else all the same, with the same sum.
        released: the operator of the official code.
        best: the checkpoint of the least validation error, looked at every 40 steps, in place of the last one.
        kept: total rank that a cut by singular values leaves, 0 for none.
        at: step of that cut; training goes on.
    """

    rates: tuple[float, ...]
    rank: int = LARGEST
    gate: str | None = None
    pull: float = 0.0
    loss: float = 0.0
    sgd: bool = False
    decays: bool = True
    coupled: bool = True
    released: bool = False
    best: bool = False
    kept: int = 0
    at: int = STEPS


LORA, MILD, FIRM = Setting(SLOW), Setting(FAST, gate="normal", pull=0.4), Setting(SLOW, gate="normal", pull=0.8)
CONSTANT = replace(FIRM, coupled=False)
DESCENT = Setting(GATES, gate="normal", pull=1e-3, sgd=True)
DESCENT_L1 = replace(DESCENT, pull=0.0, loss=1e-3)
ARMS = {
    "oracle": replace(LORA, rates=FAST, rank=0),
    "LoRA r=8": replace(LORA, rank=8),
    "LoRA r=12": LORA,
    "LoRA r=12, SVD to 10": replace(LORA, kept=10),
    "LoRA r=12, SVD to 18": replace(LORA, kept=18),
    "SoRA λ=0.4": MILD,
    "SoRA λ=0.8": FIRM,
    "L1 in the loss, Adam": replace(MILD, rates=L1, pull=0.0, loss=1e-3),
    "SoRA λ=0.8, ξ constant": CONSTANT,
    "SoRA λ=0.8, ξ constant, best checkpoint": replace(CONSTANT, best=True),
    "SoRA λ=0.8, best checkpoint": replace(FIRM, best=True),
    "SVD to 18 at step 100, then trained": replace(LORA, rates=FAST, kept=18, at=100),
    "SVD to 18 at step 300, then trained": replace(LORA, rates=FAST, kept=18, at=300),
    "SVD to 10 at step 100, then trained": replace(LORA, rates=FAST, kept=10, at=100),
    "SoRA, SGD on g": DESCENT,
    "L1 in the loss, SGD on g": DESCENT_L1,
    "L1 in the loss, SGD on g, rate constant": replace(DESCENT_L1, decays=False),
    "SoRA, SGD on g, rate constant": replace(DESCENT, decays=False),
    "SoRA λ=0.4, g = 1": replace(MILD, gate="ones"),
    "SoRA λ=0.8, g = 1": replace(FIRM, gate="ones"),
    "SoRA λ=0.8, released operator": replace(FIRM, released=True),
    "SoRA λ=1.2": replace(FIRM, pull=1.2),
    "LoRA r=5": replace(LORA, rates=(0.02, 0.04, 0.08), rank=5),
}


def clock(step: int) -> float:
    """The bed's schedule of rates: 6 % of warm-up, then linear to 0."""
    warm = round(0.06 * STEPS)
    return min((step + 1) / warm, (STEPS - step) / (STEPS - warm))


class Descent(Action):
    """Plain gradient descent on the gates, then the proximal step; its rate follows Adam's, or stays."""

    def __init__(self, model: nn.Module, lr: float, s: Setting) -> None:
        self.sgd = torch.optim.SGD(list(rank_gates(model).values()), lr=lr)
        self.shrink = ProximalGates(model, self.sgd, penalty=s.pull)
        self.lr, self.decays, self.done = lr, s.decays, 0

    def act(self) -> None:
        """Take a step."""
        self.sgd.param_groups[0]["lr"] = self.lr * (clock(self.done) if self.decays else 1.0)
        self.done += 1
        self.sgd.step()
        self.shrink.step()


class CutAt(Action):
    """Cuts a LoRA by its singular values after so many steps; a fresh Adam state for what is left."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, s: Setting) -> None:
        self.model, self.optimizer, self.s, self.done = model, optimizer, s, 0

    def act(self) -> None:
        """Count a step, and cut if it is time."""
        self.done += 1
        if self.done == self.s.at:
            prune_by_svd(self.model, 64 * self.s.kept)
            self.optimizer.state.clear()
            self.optimizer.param_groups[0]["params"] = [p for p in self.model.parameters() if p.requires_grad]


def put_in(model: nn.Module, generator: torch.Generator, s: Setting) -> list[dict[str, Any]] | None:
    """Adapt the layers; optimizer groups."""
    for i, planted in enumerate(TRUTH):
        rank = s.rank or planted
        options: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank, "generator": generator}
        layer = partial(SoRALinear, gate=s.gate, **options) if s.gate else partial(LoRALinear, **options)
        if rank:
            replace_linears(model, f"^layers.{i}$", layer)
    if s.gate is None:
        return None
    rest, gates = gate_groups(model)
    return [rest, gates | ({"lr": 0.0} if s.sgd else {})]


def actions_of(model: nn.Module, optimizer: torch.optim.Optimizer, s: Setting, lr: float) -> list[Action]:
    """What acts after a step."""
    if s.sgd:
        return [Descent(model, lr, s)]
    if s.pull:
        mean = sum(map(clock, range(STEPS))) / STEPS
        operator = released_threshold if s.released else soft_threshold
        penalty = s.pull if s.coupled else s.pull * lr * mean
        return [ProximalGates(model, optimizer, penalty=penalty, coupled=s.coupled, operator=operator)]
    return [CutAt(model, optimizer, s)] if s.kept and s.at < STEPS else []


def gates_of(model: nn.Module) -> Tensor:
    """All gates, a row a layer."""
    return torch.stack([g.detach().clone() for g in rank_gates(model).values()])


@lru_cache(maxsize=4)
def trained(s: Setting, lr: float, seed: int, steps: int) -> tuple[nn.Module, nn.Module, Tensor | None]:
    """The model at the end, the one of the least validation error, and the gates at the start."""
    task, start, best = planted_rank(seed), [], {}

    def adapt(model: nn.Module, generator: torch.Generator) -> list[dict[str, Any]] | None:
        groups = put_in(model, generator, s)
        start.append(gates_of(model) if s.gate else None)
        return groups

    def look(model: nn.Module) -> dict[str, float]:
        error = F.mse_loss(model(task.x_valid), task.y_valid).item()
        if error < best.get("error", float("inf")):
            best.update(error=error, model=copy.deepcopy(model))
        return {"error": error}

    penalty = (lambda model: l1_penalty(rank_gates(model).values(), s.loss)) if s.loss else None
    model = train_planted(
        task,
        adapt,
        ADAM_LR if s.sgd else lr,
        seed=seed,
        steps=steps,
        actions=partial(actions_of, s=s, lr=lr),
        penalty=penalty,
        evaluate=look if s.pull == FIRM.pull else None,
        every=40 if s.pull == FIRM.pull else 0,
    )
    return model, best.get("model", model), start[0]


@torch.no_grad()
def without(model: nn.Module, size: float) -> nn.Module:
    """A copy whose gates below a size are 0."""
    model = copy.deepcopy(model)
    for g in rank_gates(model).values():
        g[g.abs() < size] = 0.0
    return model


@torch.no_grad()
def deleted(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Largest change of the output, in double precision, by pruning; and by deleting one more gate of a layer."""
    model, x = copy.deepcopy(model).double(), x.double()
    y, more = model(x), copy.deepcopy(model)
    for g in rank_gates(more).values():
        if g.count_nonzero():
            g[g.abs() == g[g != 0].abs().min()] = 0.0
    layers = sum(not rank for rank in kept_ranks(model).values())
    return {
        "pruned gap": (prune(model)(x) - y).abs().max().item(),
        "one more gap": (prune(more)(x) - y).abs().max().item(),
        "empty layers": float(layers),
    }


def luck(start: Tensor, end: Tensor) -> float | None:
    """Correlation of survival with |g| at the start, over the layers that need one rank or none."""
    found = torch.corrcoef(torch.stack([start[:3].abs().flatten(), (end[:3] != 0).float().flatten()]))[0, 1].item()
    return found if found == found else None


def run(name: str, lr: float, seed: int, *, steps: int) -> dict[str, Any]:
    """One arm at one rate."""
    s, task = ARMS[name], planted_rank(seed)
    alike = replace(s, rates=(), best=False, kept=0 if s.at == STEPS else s.kept)
    last, best, start = trained(alike, lr, seed, steps)
    model, more = copy.deepcopy(best if s.best else last), {}
    if s.kept and s.at == STEPS:
        prune_by_svd(model, 64 * s.kept)
    if s.loss:
        whole = measure_planted(task, model)
        more["exact zeros"] = 48.0 - sum(kept_ranks(model).values())
        tried = {cut: without(model, cut) for cut in CUTS}
        results = {cut: measure_planted(task, less) for cut, less in tried.items()}
        for cut, found in results.items():
            more |= {f"mse {cut}": found["mse"], f"rank {cut}": found["rank"]}
        good = [cut for cut, found in results.items() if found["valid mse"] <= 1.05 * whole["valid mse"]]
        more["cut"] = max(good, default=0.0)
        model = tried[max(good)] if good else model
    elif s.gate:
        more = {"exact zeros": 48.0 - sum(kept_ranks(model).values())} | deleted(model, task.x_test)
    if s.gate and start is not None and (found := luck(start, gates_of(model))) is not None:
        more["luck"] = found
    numbers = measure_planted(task, model) | more
    return {k: float(f"{v:.4g}") for k, v in numbers.items() if not k.startswith("error")}


# Time of a step.


def stepper(kind: str, width: int, depth: int) -> Callable[[], None]:
    """One training step of a stack of layers with an adapter of rank 8 on each."""
    generator = torch.Generator().manual_seed(0)
    model: nn.Module = TanhResidual(width, depth, generator=generator)
    x, y = torch.randn(2, 256, width, generator=generator)
    actions: list[Any] = []
    if kind == "AdaLoRA":
        import peft

        config = peft.AdaLoraConfig(
            init_r=8, target_r=6, tinit=0, tfinal=0, deltaT=1, total_step=10**6, lora_alpha=16, lora_dropout=0.0,
            target_modules=[f"layers.{i}" for i in range(depth)],
        )  # fmt: skip
        wrapped: Any = peft.get_peft_model(model, config)
        optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
        count = iter(range(1, 10**6))

        def adalora() -> None:
            optimizer.zero_grad()
            loss = F.mse_loss(wrapped.base_model.model(x), y)
            norms = [
                (P @ P.T if "lora_A" in name else P.T @ P) - torch.eye(8)
                for name, P in wrapped.named_parameters()
                if "lora_A" in name or "lora_B" in name
            ]
            (loss + 0.5 * sum(n.norm() for n in norms) / len(norms)).backward()
            optimizer.step()
            wrapped.base_model.update_and_allocate(next(count))

        return adalora
    layer = SoRALinear if kind == "SoRA" else LoRALinear
    replace_linears(model, "", partial(layer, rank=8, alpha=16.0, generator=generator))
    optimizer = torch.optim.Adam([p for _, a in adapters(model) for p in a.adapter_parameters().values()], lr=1e-4)
    if kind == "SoRA":
        actions.append(ProximalGates(model, optimizer, penalty=0.0))

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        for action in actions:
            action.step()

    return step


def time_steps(tiny: bool) -> dict[str, Any]:
    """Processor milliseconds of single steps, in turns."""
    kinds = ("LoRA", "SoRA", "AdaLoRA")
    width, depth, rounds = (16, 2, 3) if tiny else (512, 8, 25)
    steps = {kind: stepper(kind, width, depth) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i in range(rounds + 3):
        for kind, step in steps.items():
            begin = time.process_time()
            step()
            if i >= 3:
                times[kind].append(round(1000 * (time.process_time() - begin), 3))
    return {
        "setting": f"{depth} layers of width {width}, 256 rows, r = 8, Adam, one thread; processor time; "
        "PEFT's AdaLoRA with its orthogonality and an allocation in every step",
        "milliseconds": times,
    }


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("planted", "steps"))
    torch.set_num_threads(1)
    steps = 20 if args.tiny else STEPS
    if "planted" in args.part:
        setting = f"planted ranks 0, 1, 1, 8 of width 32, 1,024 noisy rows, {steps} steps of 128, s = 2, first r = 12"
        runs = Runs(args.out, "planted", setting=setting, seconds=args.seconds)
        for seed in SEEDS[:1] if args.tiny else SEEDS:
            # Arms that share a training stand side by side at each rate, so that it runs once.
            for lr in sorted({lr for s in ARMS.values() for lr in s.rates}):
                for name, s in ARMS.items():
                    if lr in s.rates and re.search(args.only, name):
                        runs.row({"method": name, "lr": lr, "seed": seed}, partial(run, name, lr, seed, steps=steps))
    if "steps" in args.part:
        save(args.out, "steps", time_steps(args.tiny), ("peft",))


if __name__ == "__main__":
    main()
