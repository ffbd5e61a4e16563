"""From logits to modules: budgets, the matrix, and the model that is left, with its shared pairs."""

import copy
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
from lowrank_ref.core.accounting import parameter_report
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import adapters, merge_adapters, replace_linears
from lowrank_ref.ranks import DiffoRALinear, adaptation_matrix, keep_modules, modules_within, update_norms
from lowrank_ref.ranks.module_selection import module_type


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return x + torch.tanh(self.q(x)) * self.v(x)


def blocks(layers=3):
    torch.manual_seed(4)
    return nn.Sequential(*(Block() for _ in range(layers))).double()


def net(layers=3, rank=2, **options):
    return replace_linears(blocks(layers), "", partial(DiffoRALinear, rank=rank, generator=seeded(), **options))


def kinds(model):
    return {path: type(model.get_submodule(path)).__name__ for path in ("0.q", "0.v", "1.q", "1.v", "2.q", "2.v")}


def moved(model):
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(gaussian(*p.shape, seed=i), alpha=0.3)
    return model


# Names and matrix.


def test_types_are_paths_without_numbers():
    assert module_type("encoder.layer.11.output.dense") == "encoder.layer.*.output.dense"
    assert module_type("0.q") == "*.q" and module_type("fc1") == "fc1" and module_type("h.0.mlp2.3") == "h.*.mlp2.*"


def test_the_matrix_has_a_place_for_every_module_and_nan_for_none():
    values = {"0.q": 1.0, "0.v": 2.0, "1.q": 3.0, "head": 9.0}
    layers, types, matrix = adaptation_matrix(values)
    assert layers == ["0", "1", ""] and types == ["*.q", "*.v", "head"]
    found = [["-" if math.isnan(value) else value for value in row] for row in matrix.tolist()]
    assert found == [[1.0, 2.0, "-"], [3.0, "-", "-"], ["-", "-", 9.0]]


# Budgets.


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 9)), min_size=1, max_size=7), st.integers(0, 30))
def test_modules_within_by_a_slow_loop(pairs, budget):
    values = {str(i): float(v) for i, (v, _) in enumerate(pairs)}
    costs = {str(i): c for i, (_, c) in enumerate(pairs)}
    left, todo, taken = budget, list(values), []
    while todo:
        best = max(todo, key=lambda path: (values[path], -todo.index(path)))
        todo.remove(best)
        if costs[best] <= left:
            left -= costs[best]
            taken.append(best)
    kept = modules_within(values, costs, budget)
    assert kept == tuple(path for path in values if path in taken)
    assert sum(costs[path] for path in kept) <= budget


@pytest.mark.parametrize(
    "values, costs, budget, message",
    [
        ({"a": 1.0}, {"a": 1}, -1, "budget: got -1"),
        ({"a": 1.0}, {"a": 1}, 1.5, "budget"),
        ({"a": 1.0}, {"b": 1}, 1, "costs: got \\['b'\\]"),
        ({"a": 1.0}, {"a": 0}, 1, "costs\\['a'\\]: got 0"),
        ({"a": math.inf}, {"a": 1}, 1, "values\\['a'\\]"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(values, costs, budget, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modules_within(values, costs, budget)


def test_update_norms_by_loops():
    model = moved(net())
    for path, got in update_norms(model).items():
        delta = model.get_submodule(path).delta_weight()
        assert got == pytest.approx(sum(float(v) ** 2 for v in delta.flatten()) ** 0.5)
        layer = model.get_submodule(path)
        assert got == pytest.approx(
            (layer.gate() * layer.scale * (layer.B @ layer.A).norm()).item()
        )  # the gate is in it
    with pytest.raises(ValueError, match="without an adapter"):
        update_norms(blocks())


# The model that is left.


def test_all_modules_kept_is_lora_with_the_same_draws():
    ours = keep_modules(net(), ["0.q", "0.v", "1.q", "1.v", "2.q", "2.v"], rank=3, generator=seeded(1))
    alpha = 16.0 / 2 * 3  # the scale of the search
    wanted = replace_linears(blocks(), "", partial(LoRALinear, rank=3, alpha=alpha, generator=seeded(1)))
    got, state = ours.state_dict(), wanted.state_dict()
    assert got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state)
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in wanted.parameters()]
    assert all(layer.scale == 8.0 for _, layer in adapters(ours))


def test_kept_modules_start_anew_and_the_others_are_plain():
    model, x = moved(net()), gaussian(3, 5)
    base = blocks()(x)
    assert keep_modules(model, ("0.v", "2.q"), rank=4, generator=seeded()) is model
    found = kinds(model)
    assert [path for path, kind in found.items() if kind == "LoRALinear"] == ["0.v", "2.q"]
    assert set(found.values()) == {"LoRALinear", "Linear"}
    assert torch.equal(model(x), base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.{name}" for path in ("0.v", "2.q") for name in ("A", "B")
    }
    assert parameter_report(model).trainable == 2 * 4 * (5 + 5)


def test_rank_scale_and_dropout_are_those_of_the_search_unless_told():
    model = keep_modules(net(dropout=0.25, alpha=3).eval(), ["1.q", "2.v"], rank={"1.q": 1, "2.v": 5})
    one, five = model.get_submodule("1.q"), model.get_submodule("2.v")
    assert (one.rank, five.rank) == (1, 5) and one.scale == five.scale == 1.5 and one.dropout.p == 0.25
    assert not one.training and keep_modules(net(), ["0.q"]).get_submodule("0.q").rank == 2


def test_kept_modules_of_a_half_precision_base_are_float32():
    model = keep_modules(replace_linears(blocks().bfloat16(), "", partial(DiffoRALinear, rank=2)), ["0.q"])
    assert model.get_submodule("0.q").A.dtype == torch.float32


def test_sharing_gives_the_others_one_pair_a_type():
    model = moved(keep_modules(net(), ["1.v"], share="by_type", generator=seeded()))
    assert set(kinds(model).values()) == {"LoRALinear"}
    q = [model.get_submodule(f"{i}.q") for i in range(3)]
    v = [model.get_submodule(f"{i}.v") for i in range(3)]
    assert q[0].A is q[1].A is q[2].A and q[0].B is q[2].B and v[0].A is v[2].A and v[0].A is not v[1].A
    assert q[0].A is not v[0].A
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 2 * (5 + 5)
    x = gaussian(4, 5)
    y = model(x)
    torch.testing.assert_close(merge_adapters(model)(x), y, rtol=0, atol=1e-12)


def test_the_gradient_of_a_shared_pair_is_the_sum_of_its_places():
    shared = moved(keep_modules(net(), ["1.v"], share="by_type", generator=seeded()))
    apart = copy.deepcopy(shared)
    for _, layer in adapters(apart):
        layer.A, layer.B = nn.Parameter(layer.A.detach().clone()), nn.Parameter(layer.B.detach().clone())
    x = gaussian(4, 5)
    for model in (shared, apart):
        model(x).pow(3).sum().backward()
    for name in ("A", "B"):
        total = sum(getattr(apart.get_submodule(f"{i}.q"), name).grad for i in range(3))
        torch.testing.assert_close(getattr(shared.get_submodule("0.q"), name).grad, total, rtol=1e-12, atol=1e-10)


def test_with_one_module_left_over_a_type_sharing_is_a_pair_of_its_own():
    chosen = ["0.q", "0.v", "1.q", "1.v"]
    shared = keep_modules(net(), chosen, share="by_type", generator=seeded())
    alone = keep_modules(net(), [*chosen, "2.q", "2.v"], generator=seeded())
    got, wanted = shared.state_dict(), alone.state_dict()
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    x = gaussian(4, 5)
    for model in (shared, alone):
        moved(model)(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(shared.parameters(), alone.parameters()) if p.requires_grad)


@pytest.mark.parametrize("share", ["none", "by_type"])
def test_files_and_peft_round_trip(share, tmp_path):
    def build(seed):
        return keep_modules(net(), ["0.q", "1.v"], share=share, generator=seeded(seed))

    model, x = moved(build(1)), gaussian(3, 5)
    save_adapters(model, tmp_path / "x")
    other = build(2)
    load_adapters(other, tmp_path / "x")
    assert torch.equal(other(x), model(x))
    if share == "by_type":
        assert other.get_submodule("1.q").A is other.get_submodule("2.q").A
    save_peft(model, tmp_path / "peft")
    torch.testing.assert_close(load_peft(blocks(), tmp_path / "peft")(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "chosen, options, error, message",
    [
        ([], {}, ValueError, "chosen: got \\[\\]"),
        ("0.q", {}, ValueError, "chosen: got '0.q'"),
        (["3.q"], {}, ValueError, "chosen: got \\['3.q'\\]"),
        (["0.q"], {"rank": 6}, ValueError, "rank: got 6"),
        (["0.q"], {"rank": 0}, ValueError, "rank: got 0"),
        (["0.q"], {"rank": 2.0}, TypeError, "rank"),
        (["0.q"], {"rank": {"0.v": 2}}, ValueError, "rank: got none for '0.q'"),
        (["0.q"], {"share": "all"}, ValueError, "share: got 'all', wanted 'none' or 'by_type'"),
    ],
)
def test_a_choice_that_means_nothing_changes_nothing(chosen, options, error, message):
    model = net()
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises((error, TypeError), match=message):
        keep_modules(model, chosen, **options)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    assert all(kind == "DiffoRALinear" for kind in kinds(model).values())


def test_a_model_that_was_not_searched_is_refused():
    with pytest.raises(ValueError, match="without a DiffoRALinear"):
        keep_modules(blocks(), ["0.q"])
