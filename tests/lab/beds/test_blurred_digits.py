"""The bed of blurred digits: a frozen model, steps that leave it alone, scores by hand."""

import copy

import pytest
import torch

from lowrank_ref.lab.beds.blurred_digits import (
    SIDES,
    agreement,
    block_errors,
    distil,
    resolution_accuracies,
    sharp_vit,
)
from lowrank_ref.lab.data import mnist5k
from lowrank_ref.robustness import add_lr_tokens, low_resolution


@pytest.fixture(scope="module")
def base():
    return sharp_vit(0, steps=80)


def tokens(base, std=0.02):
    g = torch.Generator().manual_seed(0)
    model = copy.deepcopy(base.model)
    return add_lr_tokens(model, r"^blocks\.\d$", places=16, dim=32, embed="^embed$", std=std, generator=g)


def test_the_model_is_frozen_and_knows_something(base):
    assert not any(p.requires_grad for p in base.model.parameters())
    torch.testing.assert_close(base.classes.norm(dim=1), torch.ones(10))
    assert base.features.shape == (4000, 32)
    found = resolution_accuracies(base, base.model, (28, 7))
    assert found[28] > 0.2


def test_scores_equal_loops(base):
    data = mnist5k()
    x = low_resolution(data.x_test, 7)
    right = [int((base.classes @ f).argmax()) == int(y) for f, y in zip(base.model(x), data.y_test)]
    assert resolution_accuracies(base, base.model, (7,))[7] == pytest.approx(sum(right) / 600, abs=2 / 600)
    assert agreement(base, base.model, (28,)) == 1.0 and 0 < agreement(base, base.model, (5,)) < 1


def test_errors_of_the_blocks(base):
    assert block_errors(base.model, 28) == [0.0] * 5
    errors = block_errors(tokens(base, std=0.0), 7)
    assert errors == block_errors(base.model, 7) and len(errors) == 5 and min(errors) > 0
    x = mnist5k().x_test[:200]
    patches = [torch.nn.functional.unfold(p, 7, stride=7).transpose(1, 2) for p in (x, low_resolution(x, 7))]
    sharp, small = (base.model.embed(p) + base.model.places for p in patches)
    assert base.model.places.norm() > 0  # they belong to the stream
    assert errors[0] == pytest.approx(float((small - sharp).norm() / sharp.norm()), rel=1e-4)
    pooled = block_errors(base.model, 7, pooled=True)[0]
    assert pooled == pytest.approx(float((small - sharp).mean(1).norm() / sharp.mean(1).norm()), rel=1e-4)


def test_tokens_that_see_no_picture_are_no_error_of_their_own(base):
    shifted = tokens(base, std=0.3)
    assert block_errors(shifted, 28) == [0.0] * 5
    assert min(block_errors(shifted, 28, reference=base.model)) > 0.1


def test_distillation_moves_tokens_only_and_repeats(base):
    one, same = (distil(base, tokens(base), lr=3e-3, seed=0, steps=3) for _ in range(2))
    other = distil(base, tokens(base), lr=3e-3, seed=1, steps=3)
    assert torch.equal(one.blocks[0].T, same.blocks[0].T) and not torch.equal(one.blocks[0].T, other.blocks[0].T)
    assert torch.equal(one.blocks[0].base.mlp.up.weight, base.model.blocks[0].mlp.up.weight)
    shapes = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(distil(base, tokens(base), lr=3e-3, seed=0, steps=3, pictures=shapes).embed.T, one.embed.T)
    assert SIDES[0] == 28
