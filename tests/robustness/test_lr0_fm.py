"""Tokens: their place in the stream, what trains, what can be merged; the loss against loops; a few steps of it."""

import copy
import io
import math

import pytest
import torch
from battery import gaussian, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref import disabled, load_adapters, save_adapters
from lowrank_ref.core.layers import merge_adapters
from lowrank_ref.lab.models import ViT
from lowrank_ref.robustness import (
    LRTokens,
    MultiScaleDistillation,
    add_lr_tokens,
    contrastive_distance,
    cosine_distance,
    draw_sides,
    low_resolution,
    teacher_features,
)

BLOCKS, PLACES, DIM = r"^blocks\.\d$", 4, 8


def vit(seed=0, layers=2):
    model = ViT(8, 4, dim=DIM, layers=layers, heads=2, classes=3, generator=seeded(seed)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    model.head = nn.Identity()
    return model


def tuned(seed=1, **options):
    options = {"embed": "^embed$", "std": 0.3} | options
    return add_lr_tokens(vit(), BLOCKS, places=PLACES, dim=DIM, generator=seeded(seed), **options)


PICTURES = gaussian(5, 1, 8, 8, seed=3)


# --- where the tokens go


def test_the_forward_pass_equals_a_loop():
    model, plain = tuned(), vit()
    x = plain.embed(F.unfold(PICTURES, 4, stride=4).transpose(1, 2)) + model.embed.T + plain.places
    for new, block in zip(model.blocks, plain.blocks):
        x = block(x + new.T)
    torch.testing.assert_close(model(PICTURES), plain.norm(x).mean(1), rtol=0, atol=1e-12)


def test_tokens_switched_off_are_the_frozen_model_to_the_bit_and_zeros_to_rounding():
    wanted = vit().requires_grad_(False)(PICTURES)
    torch.testing.assert_close(tuned(std=0.0)(PICTURES), wanted, rtol=0, atol=1e-13)
    model = tuned()
    moved = model(PICTURES)
    assert not torch.equal(moved, wanted)
    with disabled(model):
        assert torch.equal(model(PICTURES), wanted)
    assert torch.equal(model(PICTURES), moved)


def test_the_first_token_is_a_positional_embedding():
    model, merged = tuned(), vit()
    with torch.no_grad():
        merged.places += model.embed.T
        rest = add_lr_tokens(merged, BLOCKS, places=PLACES, dim=DIM)
        for new, old in zip(rest.blocks, model.blocks):
            new.T.copy_(old.T)
    torch.testing.assert_close(rest(PICTURES), model(PICTURES), rtol=0, atol=1e-12)


def test_in_front_of_blocks_that_do_nothing_tokens_add_up():
    chain = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    add_lr_tokens(chain, r"^[12]$", embed="^0$", places=3, dim=2, generator=seeded())
    x = gaussian(2, 3, 2).float()
    torch.testing.assert_close(chain(x), x + sum(part.T for part in chain))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_a_prefix_stays_and_one_row_serves_all(places, dim, prefix, after):
    x = gaussian(2, prefix + places, dim)
    for rows in {1, places}:
        block = LRTokens(nn.Identity(), rows, dim, prefix=prefix, after=after, std=1.0, generator=seeded()).double()
        y = block(x)
        assert torch.equal(y[:, :prefix], x[:, :prefix])
        for j in range(places):
            torch.testing.assert_close(y[:, prefix + j], x[:, prefix + j] + block.T[j % rows], rtol=0, atol=0)


def test_before_and_after_a_block():
    base = nn.Linear(3, 3).double()
    x = gaussian(2, 4, 3)
    before, after = (LRTokens(base, 4, 3, after=late, std=1.0, generator=seeded()).double() for late in (False, True))
    torch.testing.assert_close(before(x), base(x + before.T))
    torch.testing.assert_close(after(x), base(x) + after.T)
    assert before.in_features == 3 and "after" in repr(after) and "after" not in repr(before)
    with pytest.raises(AttributeError):
        _ = before.nothing_of_this_name


def test_a_block_may_take_more_than_tokens():
    class Block(nn.Module):
        def forward(self, x, mask, *, scale):
            return scale * x * mask

    x = torch.ones(1, 2, 3)
    block = LRTokens(Block(), 2, 3, std=0.0)
    assert torch.equal(block(x, torch.tensor(2.0), scale=3.0), 6 * x)


def test_half_precision_stays_and_tokens_are_wide():
    block = LRTokens(nn.Linear(3, 3).bfloat16(), 2, 3, generator=seeded())
    assert block.T.dtype == torch.float32
    assert block(torch.ones(1, 2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- what trains


def test_only_tokens_train_and_the_count_is_that_of_the_formula():
    model = tuned()
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == ["embed.T", "blocks.0.T", "blocks.1.T"]
    assert sum(trained.values()) == (2 + 1) * PLACES * DIM
    assert sum(p.numel() for p in tuned(embed=None).parameters() if p.requires_grad) == 2 * PLACES * DIM


def test_the_frozen_model_is_unchanged_by_steps_and_the_loss_falls():
    model = tuned(std=0.02)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss = MultiScaleDistillation(((2, 4), (4, 6))).double()
    adam = torch.optim.Adam([*(p for p in model.parameters() if p.requires_grad), loss.log_scale], lr=0.05)
    seen = []
    for _ in range(25):
        adam.zero_grad()
        value = loss(model, PICTURES, generator=seeded(2))
        value.backward()
        adam.step()
        seen.append(value.item())
    assert seen[-1] < seen[0] - 0.05 and loss.log_scale.grad is not None
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.endswith(".T")
        assert torch.equal(p, before[name]) == (not name.endswith(".T"))


def test_the_teacher_sees_no_tokens_and_has_no_gradient():
    model = tuned()
    t = teacher_features(model, PICTURES)
    torch.testing.assert_close(t, F.normalize(vit()(PICTURES), dim=1))
    assert not t.requires_grad and isinstance(model.blocks[0], LRTokens)


def test_starts_repeat_and_have_the_deviation_asked_for():
    one, same, other = (add_lr_tokens(vit(), BLOCKS, places=PLACES, dim=DIM, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one.blocks[0].T, same.blocks[0].T) and not torch.equal(one.blocks[0].T, other.blocks[0].T)
    assert LRTokens(nn.Identity(), 200, 100, generator=seeded()).T.std().item() == pytest.approx(0.02, rel=0.05)


def test_saved_tokens_come_back(tmp_path):
    model, fresh = tuned(), tuned(seed=9)
    save_adapters(model, tmp_path / "tokens")
    load_adapters(fresh, tmp_path / "tokens")
    assert torch.equal(fresh(PICTURES), model(PICTURES))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = tuned(seed=9)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(PICTURES), model(PICTURES))
    assert torch.equal(copy.deepcopy(model)(PICTURES), model(PICTURES))


def test_tokens_cannot_be_merged():
    model = tuned()
    with pytest.raises(TypeError, match="depends on the place"):
        merge_adapters(model)
    assert isinstance(model.blocks[0], LRTokens)


def test_a_transformer_with_a_class_token():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)
    torch.manual_seed(0)
    model = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
    wanted = model(pixel_values=PICTURES).last_hidden_state
    paths = [path for path, m in model.named_modules() if type(m).__name__ == "ViTLayer"]
    add_lr_tokens(model, paths, embed=["patch_embeddings"], places=4, dim=8, prefix=1, std=0.3, generator=seeded())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 4 * 8
    moved = model(pixel_values=PICTURES).last_hidden_state
    assert moved.shape == wanted.shape and not torch.equal(moved, wanted)
    with disabled(model):
        assert torch.equal(model(pixel_values=PICTURES).last_hidden_state, wanted)


# --- the loss


def unit(n=6, d=4, seed=0):
    return F.normalize(gaussian(n, d, seed=seed), dim=1)


@given(st.integers(1, 7), st.integers(1, 5), st.floats(0.0, 3.0))
def test_the_contrastive_distance_equals_a_loop(n, d, log_scale):
    t, s, kappa = unit(n, d), unit(n, d, 1), math.exp(log_scale)
    total = 0.0
    for i in range(n):
        row = [kappa * float(t[i] @ s[j]) for j in range(n)]
        column = [kappa * float(t[j] @ s[i]) for j in range(n)]
        for z in (row, column):
            total += math.log(sum(map(math.exp, z))) - z[i]
    found = contrastive_distance(t, s, torch.tensor(log_scale, dtype=torch.float64))
    assert found.item() == pytest.approx(total / (2 * n), abs=1e-9)


def test_the_contrastive_distance_is_symmetric_and_sees_pairs_only():
    t, s, scale = unit(), unit(seed=1), torch.tensor(2.0).double()
    torch.testing.assert_close(contrastive_distance(t, s, scale), contrastive_distance(s, t, scale))
    order = torch.randperm(6, generator=seeded())
    torch.testing.assert_close(contrastive_distance(t[order], s[order], scale), contrastive_distance(t, s, scale))
    own = contrastive_distance(t, t, scale)
    for seed in range(10):
        order = torch.randperm(6, generator=seeded(seed))
        assert contrastive_distance(t, t[order], scale) >= own - 1e-12


def test_the_cosine_distance():
    t, s = unit(), unit(seed=1)
    assert cosine_distance(t, t).item() == pytest.approx(0, abs=1e-12)
    wanted = sum(1 - float(a @ b) for a, b in zip(t, s)) / 6
    assert cosine_distance(t, s).item() == pytest.approx(wanted, abs=1e-12)
    torch.testing.assert_close(2 * cosine_distance(t, s), (t - s).square().sum(1).mean())


@pytest.mark.parametrize("distance", [contrastive_distance, cosine_distance])
def test_the_loss_is_the_sum_over_views(distance):
    model, buckets = tuned(), ((2, 4), (4, 6))
    loss = MultiScaleDistillation(buckets, distance=distance).double()
    t, g, total = teacher_features(model, PICTURES), seeded(4), 0
    for view in [PICTURES, *(low_resolution(PICTURES, draw_sides(b, 5, g)) for b in buckets)]:
        total = total + distance(t, F.normalize(model(view), dim=1), loss.log_scale)
    torch.testing.assert_close(loss(model, PICTURES, generator=seeded(4)), total, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss(model, PICTURES, t, seeded(4)), total, rtol=0, atol=1e-12)
    assert loss.log_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_without_buckets_it_sees_sharp_pictures_only():
    model = tuned()
    loss = MultiScaleDistillation(()).double()
    t = teacher_features(model, PICTURES)
    wanted = contrastive_distance(t, F.normalize(model(PICTURES), dim=1), loss.log_scale)
    torch.testing.assert_close(loss(model, PICTURES), wanted)


# --- bad input


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: LRTokens(nn.Identity(), 0, 3), ValueError, "places: got 0"),
        (lambda: LRTokens(nn.Identity(), 2, 3.0), TypeError, "dim: got 3.0"),
        (lambda: LRTokens(nn.Identity(), 2, 3, prefix=-1), ValueError, "prefix: got -1"),
        (lambda: LRTokens(nn.Identity(), 2, 3, std=-1.0), ValueError, "std: got -1.0"),
        (lambda: LRTokens(nn.Identity(), 2, 3)(torch.ones(1, 3, 3)), ValueError, "x: got .*0 . 2, 3"),
        (lambda: LRTokens(nn.Identity(), 2, 3)(torch.ones(1, 2, 4)), ValueError, "x: got"),
        (lambda: LRTokens(nn.Identity(), 1, 3, prefix=1)(torch.ones(1, 1, 3)), ValueError, "x: got"),
        (lambda: LRTokens(nn.Identity(), 2, 3)([1.0]), ValueError, "x: got list"),
        (lambda: LRTokens(LRTokens(nn.Identity(), 2, 3), 2, 3), TypeError, "adapter already"),
        (lambda: add_lr_tokens(vit(), "nothing", places=4, dim=8), ValueError, "pattern: got 'nothing'"),
        (lambda: add_lr_tokens(vit(), BLOCKS, embed="nothing", places=4, dim=8), ValueError, "pattern: got 'nothing'"),
        (lambda: add_lr_tokens(vit(), BLOCKS, places=0, dim=8), ValueError, "places: got 0"),
        (lambda: MultiScaleDistillation(scale=0.0), ValueError, "scale: got 0"),
        (lambda: MultiScaleDistillation(((4, 4),)), ValueError, "bucket"),
        (lambda: teacher_features(vit(), PICTURES), ValueError, "no adapter"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_pattern_without_match_leaves_the_model_as_it_was():
    model = vit()
    for options in ({"embed": "nothing"}, {"embed": "^embed$", "std": -1.0}):
        with pytest.raises(ValueError):
            add_lr_tokens(model, BLOCKS, places=4, dim=8, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, LRTokens) for m in model.modules())
