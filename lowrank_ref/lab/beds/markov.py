"""A small GPT learns, from scratch, a language whose entropy is known."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from lowrank_ref.core.accounting import numel, state_bytes
from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.models import GPT
from lowrank_ref.lab.train import train, warmup_cosine

__all__ = ["markov_language", "markov_pretraining"]


LETTERS, PLACES = 16, 24

Prepare = Callable[[nn.Module, torch.Generator, float], torch.optim.Optimizer]


@functools.cache
def markov_language() -> tuple[torch.Tensor, torch.Tensor, float]:
    """Draw sentences of 25 letters; the two letters before decide the odds of the next.

    The odds are softmax(2.2 z) of standard normal z, drawn once. Sentences begin in the middle of a long chain.

    Returns:
        (16,000 sentences to train on, 1,000 held out, entropy of a letter in nats when two before it are known).
    """
    g = torch.Generator().manual_seed(0)
    odds = (2.2 * torch.randn(LETTERS, LETTERS, LETTERS, generator=g, dtype=torch.float64)).softmax(dim=-1)
    edges = odds.cumsum(dim=-1)[..., :-1]
    chain = list(torch.randint(LETTERS, (2, 17_000), generator=g))
    for u in torch.rand(20 + PLACES + 1, 17_000, generator=g, dtype=torch.float64):
        chain.append((u[:, None] > edges[chain[-2], chain[-1]]).sum(dim=-1))
    rows = torch.stack(chain[-PLACES - 1 :], dim=1)
    entropy = -(odds * odds.log()).sum(dim=-1)[rows[:, :-2], rows[:, 1:-1]].mean()
    return rows[:16_000], rows[16_000:], entropy.item()


def markov_pretraining(
    prepare: Prepare,
    lr: float,
    seed: int,
    *,
    steps: int = 300,
    measure: Callable[[GPT], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Pretrain a GPT of two blocks of width 48 on the Markov language.

    Args:
        prepare: (model, generator, lr) -> optimizer; may change the model in place.
        lr: peak learning rate, handed to `prepare`; warm-up over a tenth of the steps, then a cosine down to a tenth.
        seed: of the batches and of the generator that draws the model and is handed to `prepare`.
        steps: optimizer steps of 32 sentences, gradients clipped to norm 1.
        measure: further numbers of the trained model.

    Returns:
        "valid loss", to choose a rate by, and "loss", each on 500 sentences of their own, in nats; "trainable", all
        trained numbers; "state bytes", the bytes of the optimizer's state; "block numbers", the trained numbers in
        the matrices of the blocks; and what `measure` returns.
    """
    rows, held_out, _ = markov_language()
    g = torch.Generator().manual_seed(seed)
    model = GPT(LETTERS, dim=48, layers=2, heads=2, length=PLACES, generator=g)
    optimizer = prepare(model, g, lr)
    batch = array_batches(rows[:, :-1], rows[:, 1:], batch=32, seed=seed)
    schedule = warmup_cosine(steps, warmup=steps // 10)
    train(model, batch, GPT.loss, optimizer, steps=steps, schedule=schedule, clip=1.0, progress=False)
    with torch.no_grad():
        valid, loss = (model.loss(rows[:, :-1], rows[:, 1:]).item() for rows in (held_out[:500], held_out[500:]))
    trained = ((name, p) for name, p in model.named_parameters() if name.startswith("blocks") and "norm" not in name)
    count = sum(p.numel() for _, p in trained if p.requires_grad)
    losses = {"valid loss": valid, "loss": loss}
    counts = {
        "trainable": float(numel(p for p in model.parameters() if p.requires_grad)),
        "state bytes": float(state_bytes(optimizer)),
        "block numbers": float(count),
    }
    return {**losses, **counts, **(measure(model) if measure is not None else {})}
