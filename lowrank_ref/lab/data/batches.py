"""Tokenizers, and batches that are a pure function of their index, so a resumed run sees what it would have seen."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from lowrank_ref.lab._tools import need

__all__ = ["BPETokenizer", "CharTokenizer", "array_batches", "bpe_tokenizer", "token_batches"]


class CharTokenizer:
    """One token per character that occurs in `text`, numbered in Unicode order."""

    def __init__(self, text: str):
        self._points = np.unique(_code_points(text))
        self.vocab_size = len(self._points)

    def encode(self, text: str) -> Int64[Tensor, " n"]:
        """Return the token numbers of `text`.

        Raises:
            ValueError: a character that the tokenizer was not built with.
        """
        points = _code_points(text)
        ids = np.searchsorted(self._points, points).clip(max=self.vocab_size - 1)
        unknown = points[self._points[ids] != points] if len(points) else points
        if len(unknown):
            raise ValueError(
                f"text: got the unknown character {chr(unknown[0])!r}, wanted only characters of the text "
                "that the tokenizer was built from (build it from train + valid)"
            )
        return torch.from_numpy(ids.astype(np.int64))

    def decode(self, ids: Int64[Tensor, " n"] | Sequence[int]) -> str:
        """Return the text of token numbers."""
        return "".join(chr(self._points[i]) for i in torch.as_tensor(ids).tolist())


class BPETokenizer:
    """Byte-pair encoding over bytes: every text can be encoded, and decoding gives it back exactly."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()

    def encode(self, text: str) -> Int64[Tensor, " n"]:
        """Return the token numbers of `text`."""
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, ids: Int64[Tensor, " n"] | Sequence[int]) -> str:
        """Return the text of token numbers."""
        return self._tokenizer.decode(torch.as_tensor(ids).tolist())


def bpe_tokenizer(text: str, vocab_size: int) -> BPETokenizer:
    """Learn a byte-pair encoding; the same text gives the same tokens.

    Args:
        text: what to learn the merges from. Two megabytes are enough and take about two seconds.
        vocab_size: number of tokens, at least 256, the single bytes.

    Raises:
        ValueError: vocab_size below 256.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size: got {vocab_size}, wanted at least 256, one token per byte")
    tokenizers = need("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return BPETokenizer(tokenizer)


def token_batches(
    tokens: Int64[Tensor, " n"], *, batch: int, length: int, seed: int
) -> Callable[[int], tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]]:
    """Random windows of a token stream for next-token prediction.

    Args:
        tokens: the stream, at least length + 1 long.
        batch: windows per batch.
        length: tokens per window.
        seed: with the index, decides which windows.

    Returns:
        A function `batch(i) -> (x, y)`, both (batch, length), y one token ahead of x; a pure function of i.

    Raises:
        ValueError: the stream is too short, or batch or length below 1.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch, length: got {batch}, {length}, wanted both at least 1")
    if len(tokens) < length + 1:
        raise ValueError(f"tokens: got {len(tokens)}, wanted at least length + 1 = {length + 1}")
    window = torch.arange(length + 1)

    def get(i: int) -> tuple[Tensor, Tensor]:
        starts = np.random.default_rng([seed, i]).integers(len(tokens) - length, size=(batch, 1))
        rows = tokens[torch.from_numpy(starts) + window]  # (batch, length + 1)
        return rows[:, :-1], rows[:, 1:]

    return get


def array_batches(
    x: Shaped[Tensor, "n ..."], y: Shaped[Tensor, "_ ..."], *, batch: int, seed: int
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of rows, every epoch in a new order; a last, incomplete batch is left out.

    Args:
        x: inputs, rows first.
        y: targets, as many rows.
        batch: rows per batch, at most n.
        seed: with the number of the epoch, decides the order.

    Returns:
        A function `batch(i) -> (x, y)`; a pure function of i.

    Raises:
        ValueError: x and y differ in length, or batch is not between 1 and n.
    """
    if len(x) != len(y):
        raise ValueError(f"y: got {len(y)} rows, wanted {len(x)}, as many as x")
    if not 1 <= batch <= len(x):
        raise ValueError(f"batch: got {batch}, wanted 1 to {len(x)}, the number of rows")
    per_epoch = len(x) // batch

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))

    def get(i: int) -> tuple[Tensor, Tensor]:
        epoch, k = divmod(i, per_epoch)
        rows = order(epoch)[k * batch : (k + 1) * batch]
        return x[rows], y[rows]

    return get


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
