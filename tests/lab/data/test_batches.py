import pytest
import torch

from lowrank_ref.lab import data


def test_char_tokenizer():
    t = data.CharTokenizer("banana é😀")
    assert t.vocab_size == 6
    assert t.encode("ban").tolist() == [2, 1, 3]  # ' ', 'a', 'b', 'n', 'é', '😀'
    assert t.decode(t.encode("é😀 nab")) == "é😀 nab"
    assert t.encode("").shape == (0,) and t.encode("").dtype == torch.int64
    for unknown in ("c", "\U0010ffff", "\0"):
        with pytest.raises(ValueError, match="unknown character"):
            t.encode("ba" + unknown)


def test_bpe_tokenizer_is_exact_and_deterministic():
    text = "the cat sat on the mat. the cat ate the rat. " * 20
    one, two = data.bpe_tokenizer(text, 270), data.bpe_tokenizer(text, 270)
    assert one.vocab_size == 270
    assert torch.equal(one.encode(text), two.encode(text))
    assert len(one.encode(text)) < len(text) / 2
    odd = "naïve 😀\n\n  tabs\tand zeros\0"
    assert one.decode(one.encode(odd)) == odd  # bytes know no unknown text
    assert one.encode(text).max() < 270


def test_bpe_tokenizer_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match="vocab_size: got 255"):
        data.bpe_tokenizer("x", 255)


def test_token_batches_are_windows_and_a_pure_function_of_the_index():
    tokens = torch.arange(1000)
    batch = data.token_batches(tokens, batch=4, length=8, seed=3)
    x, y = batch(7)
    assert x.shape == y.shape == (4, 8)
    assert torch.equal(y, x + 1) and torch.equal(x[:, 1:], x[:, :-1] + 1)
    batch(8)
    assert torch.equal(batch(7)[0], x)
    assert torch.equal(data.token_batches(tokens, batch=4, length=8, seed=3)(7)[0], x)
    assert not torch.equal(batch(8)[0], x)
    assert not torch.equal(data.token_batches(tokens, batch=4, length=8, seed=4)(7)[0], x)


def test_token_batches_reach_both_ends():
    tokens = torch.arange(6)
    batch = data.token_batches(tokens, batch=64, length=4, seed=0)
    starts = batch(0)[0][:, 0]
    assert set(starts.tolist()) == {0, 1}  # 6 tokens hold two windows of 4 + 1
    assert batch(0)[1].max() == 5


def test_array_batches_see_every_row_once_an_epoch():
    x, y = torch.arange(10).float(), torch.arange(10)
    batch = data.array_batches(x, y, batch=5, seed=0)
    for epoch in range(3):
        rows = torch.cat([batch(2 * epoch)[1], batch(2 * epoch + 1)[1]])
        assert sorted(rows.tolist()) == list(range(10))
    assert not torch.equal(batch(0)[1], batch(2)[1])  # a new order in the next epoch
    assert torch.equal(*(t.float() for t in batch(1)))  # inputs and targets stay together


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.token_batches(torch.arange(8), batch=1, length=8, seed=0), "tokens: got 8"),
        (lambda: data.token_batches(torch.arange(8), batch=0, length=2, seed=0), "batch, length: got 0, 2"),
        (lambda: data.array_batches(torch.zeros(3), torch.zeros(4), batch=1, seed=0), "y: got 4 rows"),
        (lambda: data.array_batches(torch.zeros(3), torch.zeros(3), batch=4, seed=0), "batch: got 4"),
    ],
)
def test_batches_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
