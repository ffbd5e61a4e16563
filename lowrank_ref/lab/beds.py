"""Test beds that several chapters share, so that their tables can be compared line by line.

**digits-shift**: a small network learns upright digits; the task is the same digits turned by 90°. Every method gets
the same 200 Adam steps of 64 images, a learning rate that falls linearly to 0, and a grid of rates for `lab.compare`.

**Markov pretraining**: a small GPT learns, from scratch, a language of 16 letters in which two letters decide the odds
of the next. Attention has to fetch the letter before the last. The entropy of the language is known.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowrank_ref.lab.data import Arrays, array_batches, digits
from lowrank_ref.lab.models import GPT, MLP
from lowrank_ref.lab.train import linear_decay, train, warmup_cosine

__all__ = ["classification_loss", "digits_shift", "markov_language", "markov_pretraining", "pretrained_on_digits"]

SIZES = (64, 128, 128, 10)

Adapt = Callable[[nn.Module, torch.Generator], Iterable[Any] | None]


def classification_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy, in nats."""
    return F.cross_entropy(model(x), y)


_turned_digits = functools.cache(functools.partial(digits, rotate=90))


@functools.cache
def _upright_weights() -> dict[str, torch.Tensor]:
    data, model = digits(), MLP(SIZES, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    batch = array_batches(data.x_train, data.y_train, batch=128, seed=0)
    train(model, batch, classification_loss, optimizer, steps=300, progress=False)
    return model.state_dict()


def pretrained_on_digits() -> MLP:
    """Return an MLP 64-128-128-10 trained for 300 AdamW steps on 1,000 upright digits (about 0.5 s, once)."""
    model = MLP(SIZES)
    model.load_state_dict(_upright_weights())
    return model


@torch.no_grad()
def _measure(model: nn.Module, data: Arrays) -> dict[str, float]:
    logits = model(data.x_test)
    return {
        "train loss": F.cross_entropy(model(data.x_train), data.y_train).item(),
        "loss": F.cross_entropy(logits, data.y_test).item(),
        "accuracy": (logits.argmax(dim=1) == data.y_test).double().mean().item(),
    }


def digits_shift(adapt: Adapt, lr: float, seed: int, *, steps: int = 200) -> dict[str, float]:
    """Adapt the upright network to digits turned by 90° and measure it.

    Args:
        adapt: (model, generator) -> changes the model in place, and may return optimizer groups whose "lr" is a factor
            on `lr`; None trains whatever still requires gradients.
        lr: first learning rate of Adam; it falls linearly to 0.
        seed: of the batches and of the generator handed to `adapt`.
        steps: optimizer steps of 64 images.

    Returns:
        "train loss" and "loss" (on 797 held-out images) in nats, "accuracy" (share of them), and "trainable", the count
        of trained numbers.
    """
    data, model = _turned_digits(), pretrained_on_digits()
    groups = adapt(model, torch.Generator().manual_seed(seed))
    trained = [p for p in model.parameters() if p.requires_grad]
    if groups is None:
        optimizer = torch.optim.Adam(trained, lr=lr)
    else:
        optimizer = torch.optim.Adam([{**group, "lr": lr * group.get("lr", 1.0)} for group in groups])
    batch = array_batches(data.x_train, data.y_train, batch=64, seed=seed)
    train(model, batch, classification_loss, optimizer, steps=steps, schedule=linear_decay(steps), progress=False)
    return {**_measure(model, data), "trainable": float(sum(p.numel() for p in trained))}


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
        "loss", held out, in nats a letter; "block numbers", the trained numbers in the matrices of the blocks; and what
        `measure` returns.
    """
    rows, held_out, _ = markov_language()
    g = torch.Generator().manual_seed(seed)
    model = GPT(LETTERS, dim=48, layers=2, heads=2, length=PLACES, generator=g)
    optimizer = prepare(model, g, lr)
    batch = array_batches(rows[:, :-1], rows[:, 1:], batch=32, seed=seed)
    schedule = warmup_cosine(steps, warmup=steps // 10)
    train(model, batch, GPT.loss, optimizer, steps=steps, schedule=schedule, clip=1.0, progress=False)
    with torch.no_grad():
        loss = model.loss(held_out[:, :-1], held_out[:, 1:]).item()
    trained = ((name, p) for name, p in model.named_parameters() if name.startswith("blocks") and "norm" not in name)
    count = sum(p.numel() for _, p in trained if p.requires_grad)
    return {"loss": loss, "block numbers": float(count), **(measure(model) if measure is not None else {})}
