import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRAConv2d, LoRAEmbedding, rslora_scaling
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import merge_adapters, replace_modules


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(layer):
    """Shift every trained number, as training would."""
    with torch.no_grad():
        for p in layer.adapter_parameters().values():
            p.add_(torch.randn(p.shape, generator=seeded(1), dtype=p.dtype), alpha=0.3)
    return layer


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def embedding(rank=2, dtype=torch.float64, **options):
    return LoRAEmbedding(nn.Embedding(7, 5, padding_idx=1, dtype=dtype), rank, generator=seeded(), **options)


def conv(rank=2, dtype=torch.float64, alpha=16.0, **options):
    return LoRAConv2d(nn.Conv2d(3, 4, 3, dtype=dtype, **options), rank, alpha=alpha, generator=seeded())


CASES = {
    "embedding": (embedding, torch.arange(6).reshape(2, 3), 2 * (7 + 5)),
    "convolution": (conv, torch.randn(2, 3, 6, 7, generator=seeded(2), dtype=torch.float64), 2 * (4 + 3 * 3 * 3)),
}
each = pytest.mark.parametrize("name", CASES)


def make(name, **options):
    build, x, _ = CASES[name]
    layer = build(**options)
    return layer, x if name == "embedding" else x.to(layer.base.weight.dtype)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_starts_at_the_base(name, dtype):
    layer, x = make(name, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == dtype
    assert layer.A.dtype == torch.promote_types(dtype, torch.float32)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == CASES[name][2]


@each
def test_merged_equals_unmerged_and_the_base_is_not_written(name):
    layer, x = make(name)
    W = layer.base.weight.detach().clone()
    merged = moved(layer).merged()
    assert type(merged) is type(layer.base) and not merged.weight.requires_grad
    assert_close(merged(x), layer(x))
    assert (merged(x) - layer.base(x)).abs().max() > 1e-2
    assert_close(merged.weight, W + layer.delta_weight())
    assert torch.equal(layer.base.weight, W) and torch.equal(merged.weight, layer.merged().weight)


@each
def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(name):
    layer, x = make(name, dtype=torch.bfloat16)
    exact = layer.base.weight.float() + moved(layer).delta_weight()
    assert torch.equal(layer.merged().weight, exact.bfloat16())
    assert torch.isfinite(layer(x)).all()


@each
def test_only_the_factors_train(name):
    layer, x = make(name)
    moved(layer)(x).square().sum().backward()
    assert layer.A.grad.any() and layer.B.grad.any() and all(p.grad is None for p in layer.base.parameters())


@each
def test_randomness_comes_from_the_generator_only(name):
    base = make(name)[0].base
    kind, state = type(make(name)[0]), torch.get_rng_state()
    first, same, other = (kind(base, 2, generator=seeded(s)) for s in (1, 1, 2))
    random = "B" if name == "embedding" else "A"
    assert torch.equal(getattr(first, random), getattr(same, random))
    assert not torch.equal(getattr(first, random), getattr(other, random))
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_scale_and_factors(name):
    layer, _ = make(name, alpha=3)
    assert layer.scale == 1.5
    A, B, s = layer.lora_factors()
    assert A is layer.A and B is layer.B and s == 1.5
    assert type(layer)(layer.base, 2, alpha=3, scaling=rslora_scaling).scale == pytest.approx(3 / 2**0.5)


def test_embedding_starts_with_a_zero_and_b_normal():
    layer = LoRAEmbedding(nn.Embedding(300, 200), 20, generator=seeded())
    assert layer.A.shape == (20, 300) and not layer.A.any()
    assert layer.B.shape == (200, 20)
    assert layer.B.std().item() == pytest.approx(1, rel=0.05) and abs(layer.B.mean().item()) < 0.05


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_embedding_delta_by_loops(num, dim, data):
    rank = data.draw(st.integers(1, min(num, dim)))
    layer = moved(LoRAEmbedding(nn.Embedding(num, dim, dtype=torch.float64), rank, alpha=3, generator=seeded()))
    D = layer.delta_weight()
    for i in range(num):
        for j in range(dim):
            wanted = layer.scale * sum(layer.B[j, k].item() * layer.A[k, i].item() for k in range(rank))
            assert D[i, j].item() == pytest.approx(wanted)


def test_padding_gets_no_gradient_and_is_kept_by_the_merge():
    layer = moved(embedding())
    layer(torch.tensor([1, 1, 2])).sum().backward()
    assert not layer.A.grad[:, 1].any() and layer.A.grad[:, 2].all()
    assert layer.merged().padding_idx == 1


def test_convolution_delta_by_loops():
    layer = moved(conv(rank=3))
    D = layer.delta_weight()
    assert D.shape == (4, 3, 3, 3) and layer.A.shape == (3, 3, 3, 3) and layer.B.shape == (4, 3, 1, 1)
    for o in range(4):
        wanted = layer.scale * sum(layer.B[o, k, 0, 0] * layer.A[k] for k in range(3))
        assert_close(D[o], wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": (1, 2)},
        {"padding": "same"},
        {"dilation": 2},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "stride": (1, 2)},
        {"bias": False},
    ],
)
def test_convolution_options_reach_the_update(options):
    layer, x = moved(conv(**options)), CASES["convolution"][1]
    assert_close(layer(x), layer.merged()(x))
    assert_close(layer(x[0]), layer(x)[0])  # without a batch


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv = nn.Embedding(7, 4), nn.Conv2d(1, 2, 2)

    def forward(self, x):
        return self.conv(self.emb(x)[:, None])


def picture(seed):
    model = Picture()
    for kind, adapter in ((nn.Embedding, LoRAEmbedding), (nn.Conv2d, LoRAConv2d)):
        accepts = partial(lambda kind, module: isinstance(module, kind), kind)
        replace_modules(model, "", partial(adapter, rank=2, generator=seeded(seed)), accepts=accepts)
    return model


def test_in_a_model_they_save_load_and_merge(tmp_path):
    old, new, x = picture(0), picture(1), CASES["embedding"][1]
    moved(old.emb), moved(old.conv)
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert all(torch.equal(old.get_parameter(n), new.get_parameter(n)) for n in ("emb.A", "emb.B", "conv.A", "conv.B"))
    wanted = old(x)
    assert_close(merge_adapters(old)(x), wanted, 1e-5)
    assert [type(m) for m in old.modules()] == [type(m) for m in Picture().modules()]


@each
def test_a_forward_that_was_set_on_the_base_and_its_hooks_run_and_are_not_merged_away(name):
    layer, x = make(name)
    wanted = moved(layer)(x)
    layer.base.forward = lambda x, forward=layer.base.forward: forward(x) - 1
    assert_close(layer(x), wanted - 1)
    with pytest.raises(TypeError, match="forward of its own"):
        layer.merged()
    del layer.base.forward
    handle = layer.base.register_forward_hook(lambda module, inputs, y: y + 1)
    assert_close(layer(x), wanted + 1)
    with pytest.raises(TypeError, match="1 hooks"):
        layer.merged()
    handle.remove()
    assert_close(layer.merged()(x), wanted)


@each
def test_an_update_that_is_not_finite_or_too_large_is_not_merged(name):
    layer, _ = make(name, dtype=torch.float16)
    with torch.no_grad():
        layer.base.weight.fill_(6e4)
        moved(layer).B.mul_(1e5)
    with pytest.raises(ValueError, match="float16 can hold"):
        layer.merged()
    with torch.no_grad():
        layer.B[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merged()


@each
@pytest.mark.parametrize("autocast", [False, True])
def test_what_lies_between_the_factors_does_not_overflow_float16(name, autocast):
    layer, x = make(name, dtype=torch.float16)
    with torch.no_grad():
        moved(layer).A.mul_(1e5)
        layer.B.mul_(1e-5)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = layer(x)
    wanted = layer.merged()(x).float()
    torch.testing.assert_close(y.float(), wanted, rtol=0.01, atol=0.01 * wanted.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_normed_convolution_is_merged_right_also_after_loading(norm):
    old, new = (moved(LoRAConv2d(norm(nn.Conv2d(3, 4, 3)), 2, generator=seeded(s))) for s in (1, 2))
    new.load_state_dict(old.state_dict())
    x = CASES["convolution"][1].float()
    assert_close(new.merged()(x), old(x), 1e-5)  # before a forward has refreshed the weight
    assert_close(new(x), old(x), 1e-5)
    assert type(old.merged()) is nn.Conv2d


@each
def test_a_cast_of_the_model_leaves_the_factors_in_float32(name):
    layer, x = make(name, dtype=torch.float32)
    before = copy.deepcopy(moved(layer).state_dict())
    layer.bfloat16()
    assert layer.base.weight.dtype == torch.bfloat16
    assert torch.equal(layer.A, before["A"]) and torch.equal(layer.B, before["B"])
    assert layer(x if name == "embedding" else x.bfloat16()).dtype == torch.bfloat16


@each
def test_weight_and_what_else_models_read(name):
    layer, x = make(name)
    assert torch.equal(moved(layer).weight, layer.merged().weight) and layer.weight.requires_grad
    for attribute in type(layer.base).__constants__:
        if hasattr(type(layer), attribute):
            assert getattr(layer, attribute) == getattr(layer.base, attribute)
    assert "rank 2" in repr(layer)
    read = {"embedding": ("num_embeddings", "embedding_dim", "padding_idx"), "convolution": ("stride", "padding")}
    assert all(hasattr(layer, attribute) for attribute in read[name])


def test_a_sparse_embedding_is_adapted_and_merged_as_one():
    layer = moved(LoRAEmbedding(nn.Embedding(7, 5, sparse=True), 2, generator=seeded()))
    layer(CASES["embedding"][1]).sum().backward()
    assert layer.A.grad.any() and not layer.A.grad.is_sparse
    assert layer.merged().sparse and torch.equal(layer.merged().weight, layer.weight)


class SamePadding(nn.Conv2d):
    """As in timm: pads in its own forward, which the update would not."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Scaled(nn.Embedding):
    """As in some transformers models: rows are multiplied on the way out, which a merge would not know."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: LoRAEmbedding(nn.Linear(3, 3), 1), TypeError, None),
        (lambda: LoRAEmbedding(nn.Embedding(3, 3, max_norm=1.0), 1), TypeError, "max_norm"),
        (lambda: LoRAEmbedding(Scaled(3, 3), 1), TypeError, "base: got Scaled"),
        (lambda: LoRAEmbedding(nn.Embedding(3, 2), 3), ValueError, "rank: got 3"),
        (lambda: LoRAEmbedding(nn.Embedding(3, 2), 1, alpha=0), ValueError, "alpha: got 0"),
        (lambda: LoRAConv2d(nn.Linear(3, 3), 1), TypeError, None),
        (lambda: LoRAConv2d(nn.Conv2d(4, 4, 1, groups=2), 1), TypeError, "groups=1"),
        (lambda: LoRAConv2d(SamePadding(2, 5, 3), 1), TypeError, "base: got SamePadding.* no forward of its own"),
        (lambda: LoRAConv2d(nn.Conv2d(2, 5, 1), 3), ValueError, "rank: got 3"),
        (lambda: LoRAConv2d(nn.Conv2d(2, 5, 1), True), TypeError, None),
        (lambda: LoRAConv2d(nn.Conv2d(2, 5, 1), 1, alpha=float("inf")), ValueError, "alpha: got inf"),
    ],
)
def test_bad_input_raises(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_quantised_weight_raises():
    for base, adapter in ((nn.Embedding(3, 3), LoRAEmbedding), (nn.Conv2d(3, 3, 1), LoRAConv2d)):
        base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"base\.weight: got dtype torch\.int8"):
            adapter(base, 1)


def test_dropout_of_a_convolution_acts_on_the_update_in_training_only():
    x = CASES["convolution"][1]
    layer = moved(LoRAConv2d(nn.Conv2d(3, 4, 3, dtype=torch.float64), 2, dropout=0.5, generator=seeded()))
    base, update = layer.base(x), layer.eval()(x) - layer.base(x)
    layer.train()
    assert_close(sum(layer(x) for _ in range(400)) / 400, base + update, atol=0.5 * update.abs().max().item())
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.B.zero_()
    assert_close(layer(x), base)
    with pytest.raises(ValueError, match="dropout: got 1.0"):
        LoRAConv2d(nn.Conv2d(3, 4, 3), 2, dropout=1.0)
