"""LoRA: equations against loops, the exact invariants in float64, and whole models."""

import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters.lora import (
    LoRALinear,
    delta_weight,
    init_factors,
    lora_plus_groups,
    lora_scaling,
    lora_update,
    rslora_scaling,
)
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import adapters, merge_adapters, replace_linears


def lora(m, n, rank, *, moved=True, dtype=torch.float64, **options):
    """A float64 LoRA layer; `moved` gives B random values, as training would."""
    layer = LoRALinear(nn.Linear(n, m, dtype=dtype), rank, generator=seeded(), **options)
    if moved:
        with torch.no_grad():
            layer.B.copy_(gaussian(m, rank, seed=1))
    return layer


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# Each equation against a loop.


@given(shapes())
def test_delta_weight_by_loops(shape):
    m, n, r = shape
    A, B, s = gaussian(r, n), gaussian(m, r, seed=1), 0.7
    W = delta_weight(A, B, s)
    for i in range(m):
        for j in range(n):
            assert W[i, j].item() == pytest.approx(s * sum(B[i, k].item() * A[k, j].item() for k in range(r)))


@given(shapes())
def test_lora_update_by_loops(shape):
    m, n, r = shape
    A, B, x, s = gaussian(r, n), gaussian(m, r, seed=1), gaussian(n, seed=2), 1.3
    hidden = [sum(A[k, j].item() * x[j].item() for j in range(n)) for k in range(r)]
    wanted = [s * sum(B[i, k].item() * hidden[k] for k in range(r)) for i in range(m)]
    assert lora_update(x, A, B, s).tolist() == pytest.approx(wanted)


def test_lora_update_takes_any_batch():
    A, B = gaussian(2, 5), gaussian(3, 2, seed=1)
    for batch in [(), (4,), (2, 3), (0,)]:
        x = gaussian(*batch, 5)
        assert_close(lora_update(x, A, B, 0.5), x @ delta_weight(A, B, 0.5).T)


def test_scalings():
    assert lora_scaling(16, 8) == 2.0
    assert rslora_scaling(16, 4) == 8.0
    assert rslora_scaling(6, 2) == pytest.approx(4.242640687)
    # rsLoRA with α/√r is LoRA with α
    assert all(rslora_scaling(3 / math.sqrt(r), r) == pytest.approx(lora_scaling(3, r)) for r in range(1, 9))


def test_init_is_uniform_with_variance_one_third_over_n_and_b_is_zero():
    A, B = init_factors(torch.empty(400, 100, dtype=torch.float64), 100, seeded())
    assert A.abs().max() <= 0.1 and A.abs().max() > 0.0999
    assert A.var().item() == pytest.approx(1 / 300, rel=0.03)  # 10,000 draws: sd of the estimate is 0.9 %
    assert abs(A.mean().item()) < 3 * math.sqrt(1 / 300) / 100
    assert B.shape == (400, 100) and not B.any()


def test_factors_are_float32_beside_a_half_precision_weight():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert {t.dtype for t in init_factors(torch.ones(3, 3, dtype=dtype), 1)} == {torch.float32}


# Exact invariants, numbered as in the chapter.


@given(shapes())
def test_1_starts_at_the_base_bit_for_bit(shape):
    m, n, r = shape
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer, x = lora(m, n, r, moved=False, dtype=dtype), gaussian(4, n).to(dtype)
        assert torch.equal(layer(x), layer.base(x))


@given(shapes(), st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]))
def test_2_merged_equals_unmerged_and_the_base_is_not_written(shape, precision):
    m, n, r = shape
    dtype, atol = precision
    layer, x = lora(m, n, r, dtype=dtype), gaussian(4, n).to(dtype)
    W = layer.base.weight.detach().clone()
    merged = layer.merged()
    assert_close(merged(x), layer(x), atol)
    assert (merged(x) - layer.base(x)).abs().max() > 1e-3
    assert torch.equal(merged.weight, layer.merged().weight)  # merging again adds nothing
    layer.eval().train()
    assert torch.equal(layer.base.weight, W)


@given(shapes())
def test_3_rank_and_count(shape):
    m, n, r = shape
    layer = lora(m, n, r)
    S = torch.linalg.svdvals(layer.delta_weight())
    assert bool((S[r:] < 1e-12 * S[0]).all())
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == r * (m + n)


def test_3_frozen_tensors_have_no_gradient_and_stay():
    layer = lora(4, 3, 2)
    before = {k: v.clone() for k, v in layer.base.state_dict().items()}
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)  # given all, it still moves A and B only
    for _ in range(3):
        layer(gaussian(5, 3)).square().sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in layer.base.parameters())
    assert all(torch.equal(v, before[k]) for k, v in layer.base.state_dict().items())
    assert not torch.equal(layer.B, lora(4, 3, 2).B)


@given(shapes(), st.floats(0.1, 10))
def test_4_gradients_come_from_that_of_the_merged_weight(shape, alpha):
    m, n, r = shape
    layer, x = lora(m, n, r, alpha=alpha), gaussian(5, n)
    layer(x).pow(3).sum().backward()
    merged = layer.merged()
    merged.weight.requires_grad_(True)
    merged(x).pow(3).sum().backward()
    G, s, A, B = merged.weight.grad, layer.scale, layer.A.detach(), layer.B.detach()
    torch.testing.assert_close(layer.B.grad, s * G @ A.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.A.grad, s * B.T @ G, rtol=1e-9, atol=1e-9)


def test_4_at_the_start_only_b_moves():
    layer = lora(4, 3, 2, moved=False)
    layer(gaussian(5, 3)).sum().backward()
    assert not layer.A.grad.any() and layer.B.grad.any()


@given(shapes())
def test_5_gauge(shape):
    m, n, r = shape
    A, B, M = gaussian(r, n), gaussian(m, r, seed=1), gaussian(r, r, seed=2) + 3 * torch.eye(r, dtype=torch.float64)
    assert_close(delta_weight(torch.linalg.solve(M, A), B @ M, 1.0), delta_weight(A, B, 1.0), 1e-9)


@given(st.integers(1, 8), st.integers(1, 8))
def test_6_full_rank_represents_any_update(m, n):
    D, layer = gaussian(m, n, seed=3), lora(m, n, min(m, n))
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    with torch.no_grad():
        layer.A.copy_(Vh / layer.scale)
        layer.B.copy_(U * S)
    assert_close(layer.delta_weight(), D)


def fit(layer, D, steps=1500, lr=0.02):
    """Minimise ‖ΔW - D‖², the population loss on isotropic inputs; return the lowest loss on the way and the last."""
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer.delta_weight() - D).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return min(losses), losses[-1]


def test_6_a_linear_teacher_is_fitted_at_full_rank():
    assert fit(lora(4, 3, 3, moved=False), gaussian(4, 3, seed=5), steps=800)[1] < 1e-8


@pytest.mark.parametrize("rank", [1, 3])
def test_8_the_loss_reaches_the_eckart_young_floor_and_no_lower(rank):
    D = gaussian(10, 8, seed=4)
    floor = torch.linalg.svdvals(D)[rank:].square().sum().item()
    lowest, last = fit(lora(10, 8, rank, moved=False, alpha=2 * rank), D)
    assert lowest >= floor * (1 - 1e-12)
    assert last <= floor * (1 + 1e-9)


@given(shapes())
def test_7_doubling_alpha_doubles_the_update(shape):
    m, n, r = shape
    once, twice = lora(m, n, r, alpha=1.5), lora(m, n, r, alpha=3)
    assert torch.equal(2 * once.delta_weight(), twice.delta_weight())


@given(shapes(), st.floats(0.1, 10))
def test_7_one_sgd_step(shape, alpha):
    m, n, r = shape
    layer, x, lr = lora(m, n, r, moved=False, alpha=alpha), gaussian(5, n), 0.01
    G = 2 * layer.base(x).T @ x  # gradient of Σ y² by W
    A = layer.A.detach().clone()
    layer(x).square().sum().backward()
    torch.optim.SGD([layer.A, layer.B], lr=lr).step()
    torch.testing.assert_close(layer.delta_weight(), -lr * layer.scale**2 * G @ A.T @ A, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling, slope", [(lora_scaling, -1.0), (rslora_scaling, 0.0)])
def test_9_first_step_grows_with_s_squared_times_r(scaling, slope):
    n, ranks, x = 64, [1, 2, 4, 8, 16, 32, 64], gaussian(64)
    speed = []
    for r in ranks:
        sizes = []
        for seed in range(40):
            layer = LoRALinear(nn.Linear(n, n, dtype=torch.float64), r, scaling=scaling, generator=seeded(seed))
            y = layer(x)
            y.sum().backward()
            torch.optim.SGD([layer.A, layer.B], lr=1.0).step()
            change = (y - layer(x)).mean().item()
            assert change == pytest.approx(layer.scale**2 * (layer.A @ x).square().sum().item())
            sizes.append(change)
        speed.append(math.log(sum(sizes) / len(sizes)))
    steps = torch.tensor(ranks, dtype=torch.float64).log()
    fitted = ((steps - steps.mean()) * torch.tensor(speed)).sum() / (steps - steps.mean()).square().sum()
    assert fitted.item() == pytest.approx(slope, abs=0.1)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_10_files_go_back_into_a_fresh_model_and_a_truncated_one_raises(tmp_path):
    old, new = (replace_linears(net(), "", partial(LoRALinear, rank=2, generator=seeded(s))) for s in (0, 1))
    with torch.no_grad():
        old[0].B.normal_()
    save_adapters(old, tmp_path / "lora")
    load_adapters(new, tmp_path / "lora")
    assert all(torch.equal(a, b) for a, b in zip((old[0].A, old[0].B), (new[0].A, new[0].B)))
    state = old.state_dict()
    assert set(net().state_dict()) == {k.replace("base.", "") for k in state if "base." in k}
    del state["0.A"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.A"):
        new.load_state_dict(state)
    data = (tmp_path / "lora").read_bytes()
    (tmp_path / "lora").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_adapters(new, tmp_path / "lora")


# Dropout, options, groups.


def test_dropout_acts_on_the_input_of_the_update_only():
    layer = lora(3, 400, 2, dropout=0.25)
    x = torch.ones(400, dtype=torch.float64)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.25)
    assert set(dropped.tolist()) == {0.0, 1 / 0.75}
    assert_close(got, layer.base(x) + lora_update(dropped, layer.A, layer.B, layer.scale))
    assert_close(layer.eval()(x), layer.merged()(x))


def test_dropout_is_off_in_a_model_that_was_in_eval_mode_when_adapted():
    model = replace_linears(net().eval(), "0", partial(LoRALinear, rank=2, dropout=0.9))
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, r"rank: got 0, wanted 1 <= rank <= 3 for a \(4, 3\) matrix"),
        ({"rank": 4}, ValueError, "rank: got 4"),
        ({"rank": True}, TypeError, None),
        ({"rank": 2.0}, TypeError, None),
        ({"alpha": 0}, ValueError, r"alpha: got 0, wanted a finite number in \(0, inf\]"),
        ({"alpha": -1.0}, ValueError, "alpha: got -1.0"),
        ({"alpha": math.nan}, ValueError, "alpha: got nan"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: got -0.1"),
    ],
)
def test_bad_options_raise_and_leave_the_base_trainable(options, error, message):
    base = nn.Linear(3, 4)
    with pytest.raises(error, match=message):
        LoRALinear(base, **{"rank": 2, **options})
    assert all(p.requires_grad for p in base.parameters())


def test_bad_bases_raise():
    whole = nn.Linear(3, 4)
    whole.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"base\.weight: got dtype torch\.int8"):
        LoRALinear(whole, 2)
    deep = nn.Linear(3, 4)
    deep.weight = nn.Parameter(torch.ones(4, 3, 1))
    with pytest.raises((TypeError, ValueError), match="weight"):
        LoRALinear(deep, 2)
    for other in (nn.ReLU(), nn.Embedding(3, 4), LoRALinear(nn.Linear(3, 4), 2)):
        with pytest.raises(TypeError, match=f"base: got {type(other).__name__}"):
            LoRALinear(other, 2)


def test_a_rank_that_fits_one_layer_only_leaves_the_model_as_it_was():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="rank: got 3"):
        replace_linears(model, "", partial(LoRALinear, rank=3))
    assert not list(adapters(model)) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_lora_plus_gives_b_its_own_rate_and_every_parameter_one_group():
    model = replace_linears(net(), "0", partial(LoRALinear, rank=2), trainable="^2")
    rest, fast = lora_plus_groups(model, 0.1, ratio=8)
    assert (rest["lr"], fast["lr"]) == (0.1, 0.8)
    assert [id(p) for p in fast["params"]] == [id(model[0].B)]
    assert {id(p) for p in rest["params"]} == {id(model[0].A), id(model[2].weight), id(model[2].bias)}


def test_lora_plus_of_ratio_one_is_lora():
    def train(groups_of):
        model = replace_linears(nn.Sequential(nn.Linear(3, 3)), "0", partial(LoRALinear, rank=2, generator=seeded()))
        with torch.no_grad():
            model[0].base.weight.copy_(gaussian(3, 3))
            model[0].base.bias.zero_()
        optimizer = torch.optim.Adam(groups_of(model), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(gaussian(4, 3).float()).square().sum().backward()
            optimizer.step()
        return model[0].delta_weight()

    plain = train(lambda model: [p for p in model.parameters() if p.requires_grad])
    assert torch.equal(train(lambda model: lora_plus_groups(model, 0.1, ratio=1)), plain)
    assert not torch.equal(train(lambda model: lora_plus_groups(model, 0.1, ratio=2)), plain)


def test_lora_plus_bad_input():
    model = replace_linears(net(), "0", partial(LoRALinear, rank=2))
    with pytest.raises(ValueError, match="ratio: got 0.5"):
        lora_plus_groups(model, 0.1, ratio=0.5)
    with pytest.raises(ValueError, match="lr: got 0"):
        lora_plus_groups(model, 0)
    with pytest.raises(ValueError, match="no LoRA layer"):
        lora_plus_groups(net(), 0.1)


# transformers models.


def test_conv1d_gives_what_the_transposed_linear_layer_gives():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv, linear, x = Conv1D(5, 3), nn.Linear(3, 5), torch.randn(2, 3)
    linear.weight, linear.bias = nn.Parameter(conv.weight.T.clone()), nn.Parameter(torch.randn(5))
    conv.bias = nn.Parameter(linear.bias.detach().clone())
    ours, theirs = (LoRALinear(base, 2, generator=seeded()) for base in (conv, linear))
    with torch.no_grad():
        ours.B.copy_(gaussian(5, 2))
        theirs.B.copy_(ours.B)
    assert (ours.in_features, ours.out_features) == (3, 5) and torch.equal(ours.A, theirs.A)
    assert_close(ours(x), theirs(x), 1e-6)
    merged = ours.merged()
    assert type(merged) is Conv1D and merged.weight.shape == (3, 5) and merged.nf == 5
    assert_close(merged(x), ours(x), 1e-6)


def move(model):
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.B.normal_(0, 0.2)
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_bert_adapts_trains_and_merges(bert, tokens):
    layers = r"attention\.self\.(query|value)$"
    model = replace_linears(bert(), layers, partial(LoRALinear, rank=2), trainable=r"^classifier\.")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(list(adapters(model))) == 4 and len(trained) == 8 + 2
    base = logits(bert(), tokens)
    assert torch.equal(logits(model, tokens), base)
    model(tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == trained
    adapted = logits(move(model), tokens)
    assert (adapted - base).abs().max() > 1e-2
    assert_close(logits(merge_adapters(model), tokens), adapted, 1e-5)
    assert model.state_dict().keys() == bert().state_dict().keys()


def test_gpt2_merges_to_a_plain_model_that_saves_and_loads(gpt2, tokens, tmp_path):
    model = move(replace_linears(gpt2(), r"c_attn$|lm_head$", partial(LoRALinear, rank=2)))
    embedding = model.transformer.wte.weight
    assert model.lm_head.base.weight is embedding  # still tied
    base, adapted, old = logits(gpt2(), tokens), logits(model, tokens), embedding.detach().clone()
    assert (adapted - base).abs().max() > 1e-2
    assert_close(logits(merge_adapters(model), tokens), adapted, 1e-5)
    assert torch.equal(model.transformer.wte.weight, old)  # the merge untied the output layer, not changed both
    model.save_pretrained(tmp_path)
    assert_close(logits(type(model).from_pretrained(tmp_path), tokens), adapted, 1e-5)


def test_a_pattern_without_match_names_candidates(gpt2):
    model = gpt2()
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"near candidates are: .*c_attn"):
        replace_linears(model, r"h\.0\.attn\.c_atn$", partial(LoRALinear, rank=2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]
