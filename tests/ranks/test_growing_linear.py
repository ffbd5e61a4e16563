"""IncreLoRA's layer: its invariants in float64 before, during and after growth, bad options, files and PEFT."""

import copy
import io
import json
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import load_peft, save_peft
from lowrank_ref.adapters.lora import lora_scaling
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import merge_adapters, replace_linears
from lowrank_ref.ranks.growing_linear import (
    RESERVE,
    IncreLoRALinear,
    component_sum,
    constant_scaling,
    growing_layers,
    grown_ranks,
)
from lowrank_ref.ranks.increlora import sensitivity


def growing(m=6, n=5, rank=1, *, moved=True, grown=0, **options):
    """A layer in float64; `moved` gives λ of the active components random values, as training would."""
    layer = IncreLoRALinear(nn.Linear(n, m, dtype=torch.float64), rank, generator=seeded(), **options)
    for _ in range(grown):
        layer.grow()
    if moved:
        with torch.no_grad():
            for i in range(grown + 1):
                lam = getattr(layer, f"lam{i}")
                lam.copy_(gaussian(len(lam), seed=10 + i))
    return layer


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@given(shapes())
def test_the_update_by_loops(shape):
    m, n, r = shape
    A, lam, B, s = gaussian(r, n), gaussian(r, seed=1), gaussian(m, r, seed=2), 0.7
    wanted = torch.zeros(m, n, dtype=torch.float64)
    for k in range(r):
        for i in range(m):
            for j in range(n):
                wanted[i, j] += s * lam[k] * B[i, k] * A[k, j]
    assert_close(component_sum(A, lam, B, s), wanted)


@given(shapes(), st.integers(1, 3))
def test_at_the_start_only_the_reserve_is_there(shape, block):
    m, n, r = shape
    layer = growing(m, n, r, block=block, moved=False)
    if not layer.room:
        assert not layer.delta_weight().any() and len(layer.components()[1]) == r
        return
    b, a = layer.B1, layer.A1
    assert_close(layer.delta_weight(), layer.scale * RESERVE * b @ a)
    if block == 1:
        wanted = layer.scale * 1e-5 * b.norm() * a.norm()
        torch.testing.assert_close(layer.delta_weight().norm(), wanted, rtol=1e-9, atol=0)
    layer.finish()
    assert not layer.delta_weight().any()
    assert not growing(m, n, r, block=block, moved=False, advance=False).delta_weight().any()


@pytest.mark.parametrize("watched", [True, False])
@given(shapes())
def test_gradients_are_those_of_the_dense_matrix(watched, shape):
    m, n, r = shape
    layer, x, dy = growing(m, n, r), gaussian(2, 3, n, seed=3), gaussian(2, 3, m, seed=4)
    seen = []
    layer.score = (lambda delta, G: seen.append((delta, G)) or G.sum()) if watched else None
    layer(x).mul(dy).sum().backward()
    G = dy.flatten(0, 1).T @ x.flatten(0, 1)
    if watched:
        [(delta, got)] = seen
        assert_close(got, G)
        assert_close(delta, layer.delta_weight())
    s = layer.scale
    for i in range(r):
        a, b, lam = layer.A0[i], layer.B0[:, i], layer.lam0[i]
        assert_close(layer.lam0.grad[i], s * b @ G @ a)
        assert_close(layer.B0.grad[:, i], s * lam * G @ a)
        assert_close(layer.A0.grad[i], s * lam * b @ G)
    if layer.growths:  # 1e-5 of what an active unit component would get
        assert_close(layer.B1.grad[:, 0], s * 1e-5 * G @ layer.A1[0])
        assert_close(layer.A1.grad[0], s * 1e-5 * layer.B1[:, 0] @ G)
        assert layer.lam1.grad is None and not layer.lam1.requires_grad


@given(shapes(), st.integers(0, 2))
def test_both_ways_through_the_layer_agree(shape, grown):
    m, n, r = shape
    layer, x = growing(m, n, r, grown=min(grown, min(m, n) - r)), gaussian(4, n, seed=3)
    plain = layer(x)
    layer.score = sensitivity
    assert_close(layer(x), plain, 1e-11)
    assert torch.equal(layer.eval()(x), layer(x)) and not layer._noted
    assert_close(layer.merged()(x), plain, 1e-11)
    A, B, s = layer.lora_factors()
    assert_close(s * B @ A, layer.delta_weight())


def test_growth_changes_the_update_by_the_new_reserve_only():
    layer, x = growing(moved=True), gaussian(4, 5)
    before, y = layer.delta_weight(), layer(x)
    layer.grow()
    assert layer.rank == 2
    new = layer.scale * RESERVE * layer.B2 @ layer.A2
    assert_close(layer.delta_weight(), before + new)
    assert_close(layer(x), y + x @ new.T)


@pytest.mark.parametrize("block", [1, 2])
def test_with_alpha_over_rank_growth_shrinks_what_is_there(block):
    layer = growing(rank=1, block=block, scaling=lora_scaling, alpha=3.0)
    assert layer.scale == 3.0
    active = lambda: component_sum(layer.A0, layer.lam0, layer.B0, layer.scale)  # noqa: E731
    before = active()
    layer.grow()
    assert layer.scale == 3.0 / (1 + block)
    assert_close(active(), before / (1 + block))
    assert constant_scaling(2.0, 5) == 2.0


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("block", [1, 2])
def test_what_trains_after_each_growth(block, advance):
    layer = growing(8, 7, 1, block=block, advance=advance, capacity=5, moved=False)
    assert layer.growths == (5 - 1) // block
    trained = {id(p) for p in layer.parameters() if p.requires_grad}
    for growth in range(1, layer.growths + 1):
        new = layer.newcomers(growth)
        assert trained.isdisjoint(map(id, new))
        layer.grow()
        trained |= set(map(id, new))
        assert {id(p) for p in layer.parameters() if p.requires_grad} == trained
        assert {id(p) for p in layer.adapter_parameters().values()} == trained
        r, vectors = layer.rank, 8 + 7
        reserve = block * vectors if advance and layer.room else 0
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == r * (vectors + 1) + reserve
    assert layer.rank == 1 + layer.growths * block and not layer.room
    with pytest.raises(ValueError, match=f"grow: got a layer at its capacity, rank {layer.rank}"):
        layer.grow()


def test_counts_of_the_paper_s_width():
    layer = IncreLoRALinear(nn.Linear(768, 768), capacity=4, generator=seeded())
    layer.grow()
    counts = {name: p.numel() for name, p in layer.adapter_parameters().items()}
    reserve = counts.pop("A2") + counts.pop("B2")
    assert sum(counts.values()) == 2 * 1537 == 3074 and reserve == 1536
    assert 0.019 < layer.A3.std() < 0.021


def test_finishing_drops_the_reserve_for_good():
    layer = growing(grown=1)
    A, lam, B = layer.components()
    layer.finish()
    assert [len(t) for t in layer.components()[:2]] == [2, 2]
    assert_close(layer.delta_weight(), component_sum(A[:2], lam[:2], B[:, :2], layer.scale))
    assert not layer.lam2.any() and not layer.A2.requires_grad
    layer.finish()
    x = gaussian(3, 5)
    assert_close(layer.merged()(x), layer(x))


def test_what_is_off_is_neither_moved_nor_decayed_nor_given_state():
    layer = growing(capacity=3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5, eps=1e-15)
    before = copy.deepcopy(layer.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        layer(gaussian(4, 5)).square().sum().backward()
        optimizer.step()
    off = {"lam1", "A2", "B2", "lam2"}
    for name, p in layer.named_parameters(recurse=False):
        assert torch.equal(p, before[name]) == (name in off), name
        assert (p in optimizer.state) == (name not in off)
    layer.grow()
    optimizer.zero_grad()
    layer(gaussian(4, 5)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[layer.lam1]["step"] == 1 and optimizer.state[layer.A1]["step"] == 3
    first = (layer.A2 - 0.95 * before["A2"]).abs()  # a first step of Adam is as long as the rate
    assert_close(first, torch.full_like(first, 0.1), 1e-6)


def test_scores_are_means_over_passes_and_overflows_do_not_count():
    layer, x = growing(), gaussian(4, 5)
    layer.score = sensitivity
    assert layer.take_score() is None
    wanted = []
    for scale in (1.0, 2.0, torch.inf):
        layer(x).mul(scale).sum().backward()
        G = scale * torch.ones(4, 6, dtype=torch.float64).T @ x
        wanted.append((layer.delta_weight() * G).abs().mean())
    assert_close(layer.take_score(), (wanted[0] + wanted[1]) / 2)
    assert layer.take_score() is None
    with torch.no_grad():
        layer(x)
    assert layer.take_score() is None


def test_a_model_in_eval_mode_or_one_that_multiplies_with_the_weight_is_scored_as_well():
    layer, x = growing().eval(), gaussian(4, 5)
    layer.score = sensitivity
    layer(x).sum().backward()
    wanted = layer.take_score()
    (x @ layer.weight.T + layer.bias).sum().backward()
    assert_close(layer.take_score(), wanted)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 6}, ValueError, "rank: got 6, wanted 1 <= rank <= 5"),
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"capacity": 1}, ValueError, "capacity: got 1, wanted an integer >= 2"),
        ({"capacity": 2.0}, TypeError, "capacity"),
        ({"block": 0}, ValueError, "block: got 0"),
        ({"alpha": 0.0}, ValueError, "alpha: got 0"),
        ({"alpha": torch.nan}, ValueError, "alpha: got nan"),
        ({"std": 0.0}, ValueError, "std: got 0"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1"),
    ],
)
def test_bad_options_raise_and_leave_the_base_trainable(options, error, message, no_shape_checks):
    base = nn.Linear(5, 6)
    with pytest.raises(error, match=message):
        IncreLoRALinear(base, **{"rank": 2, **options})
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("base", [nn.Conv1d(3, 3, 1), nn.Linear(3, 3, dtype=torch.complex64), nn.ReLU()])
def test_what_is_no_linear_layer_is_refused(base):
    with pytest.raises(TypeError, match="base"):
        IncreLoRALinear(base)


def test_an_empty_batch_and_a_wrong_width():
    layer = growing()
    assert layer(torch.zeros(0, 5, dtype=torch.float64)).shape == (0, 6)
    layer.score = sensitivity
    layer(torch.zeros(0, 5, dtype=torch.float64)).sum().backward()
    assert layer.take_score() == 0
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 4, dtype=torch.float64))


# Files.


def net(seed=0, **options):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return replace_linears(model, "", partial(IncreLoRALinear, capacity=4, generator=seeded(seed), **options))


def grown_net(seed=0):
    """A model whose first layer has rank 3 and whose second one has rank 1."""
    model = net(seed)
    for _ in range(2):
        model[0].grow()
    for _, layer in growing_layers(model):
        for i in range(layer.rank):
            getattr(layer, f"lam{i}").data.copy_(gaussian(1, seed=i))
        layer.finish()
    return model


@pytest.mark.parametrize("through_file", [True, False])
def test_a_state_brings_its_rank(through_file, tmp_path):
    old, new, x = grown_net(1), net(2), gaussian(3, 5)
    if through_file:
        save_adapters(old, tmp_path / "x")
        load_adapters(new, tmp_path / "x")
    else:
        file = io.BytesIO()
        torch.save(old.state_dict(), file)
        file.seek(0)
        new.load_state_dict(torch.load(file, weights_only=True))
    assert grown_ranks(new) == {"0": 3, "2": 1}
    assert torch.equal(new(x), old(x))
    assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in old.parameters()]


@pytest.mark.parametrize("state", [[4, 1], [-1, 0], [1, 2], [1], [1, 1, 1]])
def test_a_damaged_rank_is_refused_and_changes_nothing(state, tmp_path):
    model = grown_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="state: got"):
        model[0].set_extra_state(torch.tensor(state))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_action_of_other_capacity_is_another_model(tmp_path):
    save_adapters(grown_net(), tmp_path / "x")
    other = net()
    other[0] = IncreLoRALinear(nn.Linear(5, 6).double(), capacity=2, generator=seeded())
    with pytest.raises(ValueError, match="layer 0"):
        load_adapters(other, tmp_path / "x")


def test_export_to_peft_has_the_ranks_in_its_pattern(tmp_path):
    model, x = grown_net().eval(), gaussian(3, 5)
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = [config["rank_pattern"].get(f"^{path}", config["r"]) for path in ("0", "2")]
    assert ranks == [3, 1]
    plain = net()
    bases = nn.Sequential(plain[0].base, plain[1], plain[2].base)
    loaded = load_peft(bases, tmp_path).eval()
    assert [loaded[0].rank, loaded[2].rank] == [3, 1]
    assert_close(loaded(x), model(x), 1e-6)


def test_peft_reads_the_export(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = grown_net().eval(), gaussian(3, 5)
    save_peft(model, tmp_path)
    plain = net()
    theirs = peft.PeftModel.from_pretrained(nn.Sequential(plain[0].base, plain[1], plain[2].base), tmp_path).eval()
    assert_close(theirs(x), model(x), 1e-6)


def test_a_merged_model_computes_the_same():
    model, x = grown_net().eval(), gaussian(3, 5)
    y = model(x)
    merge_adapters(model)
    assert_close(model(x), y)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
