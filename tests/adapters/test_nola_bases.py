"""NOLA's random matrices: the words of SplitMix64, the same in every block and dtype, and nobody else's state."""

import math

import pytest
import torch
from battery import gaussian, seeded
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.adapters.nola import combine
from lowrank_ref.adapters.nola_bases import (
    _word,
    check_recipe,
    draw_bases,
    make_recipe,
    mixture,
    uniform,
    words,
)

SEED = torch.tensor(1234567)
MASK = 2**64 - 1


def splitmix(seed, count):
    """The published generator in Python's whole numbers."""
    found = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def test_the_loop_gives_the_published_words():
    assert splitmix(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 3), st.integers(0, 30), st.integers(0, 20))
def test_words_are_those_of_splitmix(seed, stream, start, count):
    own = splitmix(seed & MASK, stream + 1)[stream]
    wanted = splitmix(own, start + count)[start:]
    assert [int(w) & MASK for w in words(torch.tensor(seed), stream, start, count)] == wanted


def test_the_mask_shifts_in_zeros():
    for seed in (-1, -(2**63), 5):
        got = _word(torch.tensor(seed), torch.arange(1, 4))
        assert [int(w) & MASK for w in got] == splitmix(seed & MASK, 3)


def test_numbers_are_uniform_and_independent():
    u = uniform(SEED, 0, 0, 200_000, torch.float64)
    assert -1 < u.min() < -0.9999 and 0.9999 < u.max() < 1 and not (u == 0).any()
    assert abs(u.mean()) < 4 / math.sqrt(3 * len(u))
    counts = torch.histc(u, 50, -1, 1)
    assert ((counts - 4000) / 4000**0.5).abs().max() < 4.5
    others = [u[1:], u[64:], uniform(SEED, 1, 0, len(u), torch.float64), uniform(SEED + 1, 0, 0, len(u), torch.float64)]
    for v in others:  # neighbours, rows, streams, seeds
        assert abs((u[: len(v)] * v).mean() * 3) < 4.5 / math.sqrt(len(v))


def test_bases_are_the_same_in_every_dtype_and_begin_alike():
    one = draw_bases(SEED, 0, 0, 6, (2, 3), 6, torch.float64)
    assert torch.equal(uniform(SEED, 0, 0, 50).double(), uniform(SEED, 0, 0, 50, torch.float64))
    torch.testing.assert_close(draw_bases(SEED, 0, 2, 5, (2, 3), 6, torch.float64), one[2:5], rtol=0, atol=0)
    more = draw_bases(SEED, 0, 0, 6, (2, 3), 24, torch.float64)
    torch.testing.assert_close(more * 2, one, rtol=1e-15, atol=0)  # 1/√k
    loop = torch.tensor([(w & MASK) >> 40 for w in words(SEED, 0, 0, 36).tolist()], dtype=torch.float64)
    loop = (torch.where(loop < 2**23, loop, loop - 2**24) + 0.5) / 2**23 / 6**0.5
    torch.testing.assert_close(one, loop.view(6, 2, 3), rtol=1e-15, atol=0)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 7, 20, 10**6]))
def test_a_mixture_is_the_sum_and_its_gradient_that_of_autograd(k, rows, columns, block):
    c = gaussian(k).requires_grad_()
    bases = draw_bases(SEED, 1, 0, k, (rows, columns), k, torch.float64)
    got, wanted = mixture(c, SEED, 1, (rows, columns), block), combine(c, bases)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    loop = sum(c[i].item() * bases[i] for i in range(k))
    torch.testing.assert_close(wanted.detach(), loop, rtol=0, atol=1e-13)
    G = gaussian(rows, columns, seed=1)
    for one, other in zip(torch.autograd.grad(got, c, G), torch.autograd.grad(wanted, c, G)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_gradcheck():
    c = gaussian(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: mixture(c, SEED, 0, (2, 3), 12), [c])


def test_a_block_changes_float32_by_rounding_only():
    c = gaussian(64).float()
    whole = mixture(c, SEED, 0, (8, 16), 10**9)
    for block in (1, 1000, 3000):
        torch.testing.assert_close(mixture(c, SEED, 0, (8, 16), block), whole, rtol=0, atol=1e-6)


def test_no_basis_is_kept_and_no_more_than_a_block_is_drawn(monkeypatch):
    """What backward keeps does not grow with k, nor does the largest tensor on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    for k in (8, 80):
        c, kept = torch.zeros(k, requires_grad=True), []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),  # noqa: B023
            Largest() as largest,
        ):
            out = mixture(c, SEED, 0, (10, 10), 400)
            out.sum().backward()
        assert sum(t.numel() for t in kept) == 1  # the seed
        assert largest.size == 400


def test_autocast_leaves_bases_and_sums_in_float32():
    c = gaussian(30).float().requires_grad_()
    wanted = mixture(c, SEED, 0, (4, 5))
    (grad,) = torch.autograd.grad(wanted.sum(), c)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixture(c, SEED, 0, (4, 5))
        got.sum().backward()
    assert torch.equal(got, wanted) and torch.equal(c.grad, grad)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    c = torch.zeros(4, requires_grad=True)
    recipe = make_recipe(seeded())
    mixture(c, recipe[0], 0, (2, 3)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recipe_that_draws_something_else_is_refused():
    recipe = make_recipe(seeded(3))
    check_recipe(recipe)
    assert recipe[0] >= 0 and not torch.equal(recipe, make_recipe(seeded(4)))
    for wrong in (recipe + torch.tensor([1, 0]), recipe + torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="layer.recipe: got seed .* with the check of other bases"):
            check_recipe(wrong, "layer.")
    for wrong in (recipe.double(), recipe[:1]):
        with pytest.raises(ValueError, match="recipe: got torch.* of shape .*, wanted a seed and its check"):
            check_recipe(wrong)
