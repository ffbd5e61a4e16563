"""In-Squeeze: the action at its steps, what becomes of moments, resuming, and the plan and rate around it."""

import copy
from functools import partial

import pytest
import torch
from battery import batch, gaussian, loss, network, seeded, train
from torch import nn

from lowrank_ref.adapters import (
    DoRALinear,
    LoRALinear,
    LoRASqueezer,
    MomentRestart,
    halving_plan,
    rewarmed,
    save_peft,
)
from lowrank_ref.adapters.lora_squeeze import carried_moments, squeezed_factors
from lowrank_ref.adapters.squeeze_targets import lora_parts, target_ranks
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.ranks import SoRALinear


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def lora(rank=4, make=torch.optim.Adam, **options):
    model = replace_linears(network(), "", partial(LoRALinear, rank=rank, generator=seeded()))
    options = {"lr": 0.05, **options}
    return model, make([p for p in model.parameters() if p.requires_grad], **options)


def update(model):
    return torch.cat([layer.delta_weight().detach().flatten() for _, layer in adapters(model)])


def test_it_squeezes_at_its_steps_and_the_optimizer_keeps_its_order():
    model, optimizer = lora()
    squeezer = LoRASqueezer(model, optimizer, {2: 3, 4: {"2": 1}}).attach(optimizer)
    ranks, before = [], None
    for step in range(6):
        before = {path: layer.delta_weight().detach() for path, layer in adapters(model)}
        train(model, optimizer, [step])
        ranks.append([layer.rank for _, layer in adapters(model)])
    assert ranks == [[4, 4], [3, 3], [3, 3], [3, 1], [3, 1], [3, 1]] and before
    held = optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in model.parameters() if p.requires_grad]
    assert squeezer.kept.keys() == {2, 4} and squeezer.kept[4].keys() == {"2"}
    assert all(0 < v <= 1 for kept in squeezer.kept.values() for v in kept.values())
    assert all(p.shape == optimizer.state[p]["exp_avg"].shape for p in optimizer.param_groups[0]["params"])


def test_what_it_does_to_a_layer_is_the_equation():
    model, optimizer = lora()
    train(model, optimizer, range(3))
    parts = {path: lora_parts(layer) for path, layer in adapters(model)}
    wanted = {path: squeezed_factors(A, B, s, 2, new_scale=0.5) for path, (A, B, s) in parts.items()}
    LoRASqueezer(model, optimizer, {1: 2}, scale=0.5).step()
    for path, layer in adapters(model):
        assert torch.equal(layer.A, wanted[path][0]) and torch.equal(layer.B, wanted[path][1])
        assert layer.scale == 0.5 and layer.rank == 2 and layer.A.is_contiguous() and layer.B.is_contiguous()
        assert layer.A.grad is None and layer.A not in optimizer.state


def test_moments_are_forgotten_or_carried():
    for moments in ("reset", "carry"):
        model, optimizer = lora(amsgrad=True)
        train(model, optimizer, range(3))
        layer = model[0]
        old, state = lora_parts(layer), [copy.deepcopy(optimizer.state[p]) for p in (layer.A, layer.B)]
        LoRASqueezer(model, optimizer, {1: 2}, moments=moments).step()
        if moments == "reset":
            assert len(optimizer.state) == 0
            continue
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("max_exp_avg_sq", 2)):
            wanted = carried_moments(old, lora_parts(layer), (state[0][key], state[1][key]), power)
            for p, value in zip((layer.A, layer.B), wanted):
                assert_close(optimizer.state[p][key], value)
        assert float(optimizer.state[layer.A]["step"]) == 3
        train(model, optimizer, [3])


def test_one_stage_is_ordinary_lora():
    """Invariant 9, first half: a plan that is not reached yet changes no bit."""
    ends = []
    for plan in ({}, {7: 2}):
        model, optimizer = lora()
        if plan:
            LoRASqueezer(model, optimizer, plan).attach(optimizer)
        train(model, optimizer, range(6))
        ends.append(update(model))
    assert torch.equal(*ends)


def test_a_squeeze_to_its_own_rank_with_carried_moments_turns_signs_back():
    """Invariant 9, second half, for Adam: where factors are balanced, M is a matrix of signs, and nothing is lost."""
    model, optimizer = lora()
    train(model, optimizer, range(3))
    LoRASqueezer(model, optimizer, {1: 4}, moments="carry").step()
    twin, steps = copy.deepcopy((model, optimizer))
    for _, layer in adapters(twin):
        for p, row in ((layer.A, (0,)), (layer.B, (slice(None), 0))):
            for t in (p.data, steps.state[p]["exp_avg"]):
                t[row] = -t[row]
    LoRASqueezer(twin, steps, {1: 4}, moments="carry").step()
    assert_close(twin[0].A, model[0].A)
    for step in range(3, 6):
        train(model, optimizer, [step])
        train(twin, steps, [step])
    assert_close(update(twin), update(model), 1e-9)


@pytest.mark.parametrize("gauge, same", [("orthogonal", True), ("any", False)])
def test_gradient_descent_sees_a_squeeze_to_its_own_rank_only_through_the_balance(gauge, same):
    """Invariant 9, second half, for SGD: (BM, M⁻¹A) steps alike for an orthogonal M, and not for another."""
    ends = []
    for squeezes in (False, True):
        model, optimizer = lora(make=torch.optim.SGD)
        for _, layer in adapters(model):
            A, B, _ = squeezed_factors(layer.A.detach(), gaussian(*layer.B.shape, seed=4) / 3, layer.scale, 4)
            M = torch.eye(4).double() + 0.3 * gaussian(4, 4, seed=3)
            M = torch.linalg.qr(M).Q if gauge == "orthogonal" else M
            layer.A.data, layer.B.data = torch.linalg.solve(M, A), B @ M
        if squeezes:
            LoRASqueezer(model, optimizer, {1: 4}).step()
        train(model, optimizer, [0])
        ends.append(update(model))
    assert torch.allclose(*ends, rtol=0, atol=1e-12) == same


def test_a_squeeze_of_nan_raises_and_changes_nothing():
    model, optimizer = lora()
    train(model, optimizer, range(2))
    with torch.no_grad():
        model[2].B[0, 0] = torch.nan
    before, squeezer = copy.deepcopy(model[0].state_dict()), LoRASqueezer(model, optimizer, {1: 2})
    with pytest.raises(ValueError, match="B: got 1 NaN"):
        squeezer.step()
    assert all(torch.equal(v, before[k]) for k, v in model[0].state_dict().items())
    assert len(optimizer.state) == 4 and squeezer.kept == {}


def test_layers_take_the_rank_of_what_they_load_and_nothing_else():
    model, optimizer = lora()
    LoRASqueezer(model, optimizer, {1: 2}).step()
    fresh, steps = lora()
    with pytest.raises(RuntimeError, match="size mismatch"):  # a layer that nobody squeezes
        fresh.load_state_dict(model.state_dict())
    LoRASqueezer(fresh, steps, {1: 2})
    fresh.load_state_dict(model.state_dict())
    assert fresh[0].rank == 2 and torch.equal(fresh[0].A, model[0].A)
    for bad in (
        {"0.A": torch.ones(3, 5)},
        {"0.A": torch.ones(2, 12), "0.B": torch.ones(10, 1)},
        {"0.A": torch.ones(4)},
    ):
        with pytest.raises(RuntimeError, match="size mismatch"):
            fresh.load_state_dict({**model.state_dict(), **bad})
        assert fresh[0].rank == 2


def test_a_state_of_other_ranks_is_refused():
    model, optimizer = lora()
    squeezer = LoRASqueezer(model, optimizer, {1: 2})
    squeezer.step()
    fresh = LoRASqueezer(*lora(), {1: 2})
    with pytest.raises(ValueError, match="load the model's state first"):
        fresh.load_state_dict(squeezer.state_dict())
    assert fresh.steps == 0


def test_a_graph_that_is_still_alive_does_no_harm():
    """Who keeps `loss` keeps the node that collects its gradients, with the old shape in it."""
    model, optimizer = lora()
    LoRASqueezer(model, optimizer, {2: 1}).attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        value = loss(model, batch(step))
        value.backward()
        optimizer.step()
    assert value.grad_fn is not None and model[0].rank == 1


def test_it_compiles_before_and_after(no_shape_checks):
    model, optimizer = lora()
    compiled = torch.compile(model, backend="eager")
    LoRASqueezer(model, optimizer, {2: 2}).attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss(compiled, batch(step)).backward()
        optimizer.step()
    assert_close(compiled(batch(9)), model(batch(9)))
    assert model[0].rank == 2


def test_a_squeezed_run_is_a_peft_folder(tmp_path):
    from lowrank_ref.core.peft import read_peft

    model, optimizer = lora()
    LoRASqueezer(model, optimizer, {2: {"0": 1}}).attach(optimizer)
    train(model, optimizer, range(3))
    save_peft(model.float(), tmp_path)
    config = read_peft(tmp_path).config
    assert sorted([config["r"], *config["rank_pattern"].values()]) == [1, 4]


# Around it.


def test_halving_by_hand(no_shape_checks):
    assert halving_plan(16, 4, 300) == {100: 8, 200: 4}
    assert halving_plan(16, 1, 300) == {60: 8, 120: 4, 180: 2, 240: 1}
    assert halving_plan(6, 2, 9) == {3: 3, 6: 2}
    for bad in ((4, 4, 10), (4, 0, 10), (8, 1, 3), (8.0, 1, 30)):
        with pytest.raises((TypeError, ValueError), match="got"):
            halving_plan(*bad)


def test_a_rewarmed_schedule_by_hand():
    factor = rewarmed(lambda step: 1 - step / 10, [0, 5], warmup=2)
    assert [factor(t) for t in range(8)] == pytest.approx([0.5, 0.9, 0.8, 0.7, 0.6, 0.25, 0.4, 0.3])
    plain = rewarmed(lambda step: 0.5, [], warmup=3)
    assert plain(0) == rewarmed(lambda step: 0.5, [0], warmup=0)(0) == 0.5
    for times, warmup in (([-1], 2), ([0.5], 2), ([1], -1)):
        with pytest.raises((TypeError, ValueError), match="times|warmup"):
            rewarmed(lambda step: 1.0, times, warmup)


def test_a_restart_forgets_all_and_moves_nothing(no_shape_checks):
    model, optimizer = lora()
    restart = MomentRestart(optimizer, [2]).attach(optimizer)
    twin, steps = lora()
    train(model, optimizer, range(2))
    train(twin, steps, range(2))
    assert torch.equal(update(model), update(twin)) and len(optimizer.state) == 0 and restart.steps == 2
    train(model, optimizer, [2])
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    for times, error in (([], ValueError), ([0], ValueError), ([1.5], TypeError)):
        with pytest.raises(error, match="times: got"):
            MomentRestart(optimizer, times)


@pytest.mark.parametrize(
    "plan, options, error, message",
    [
        ({}, {}, ValueError, "plan: got {}"),
        ([(1, 2)], {}, ValueError, "plan: got"),
        ({0: 2}, {}, ValueError, "plan: got 0"),
        ({1.5: 2}, {}, TypeError, "plan: got 1.5"),
        ({1: 0}, {}, ValueError, "rank: got 0"),
        ({1: 2.0}, {}, TypeError, "rank: got 2.0"),
        ({1: {"nose": 2}}, {}, ValueError, "rank: got nose"),
        ({1: 2}, {"moments": "keep"}, ValueError, "moments: got 'keep'"),
        ({1: 2}, {"scale": 0.0}, ValueError, "scale: got 0.0"),
        ({1: 2}, {"scale": "s"}, TypeError, "scale: got 's'"),
        ({1: 2}, {"split": "up"}, ValueError, "split: got 'up'"),
    ],
)
def test_bad_options_are_named_and_nothing_is_hooked(plan, options, error, message, no_shape_checks):
    model, optimizer = lora()
    with pytest.raises(error, match=message):
        LoRASqueezer(model, optimizer, plan, **options)
    assert not model[0]._load_state_dict_pre_hooks


def test_models_and_optimizers_that_do_not_fit_are_named(no_shape_checks):
    model, optimizer = lora()
    with pytest.raises(ValueError, match="optimizer: got no factors of '0'"):
        LoRASqueezer(model, torch.optim.Adam([nn.Parameter(torch.ones(1))]), {1: 2})
    with pytest.raises(ValueError, match="moments: got 'carry' with SGD"):
        LoRASqueezer(*lora(make=torch.optim.SGD), {1: 2}, moments="carry")
    hooked, steps = lora()
    hooked[2].B.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="hooks on them at '2'"):
        LoRASqueezer(hooked, steps, {1: 2})
    with pytest.raises(TypeError, match="optimizer: got str"):
        LoRASqueezer(model, "adam", {1: 2})
    for make in (SoRALinear, DoRALinear):
        other = replace_linears(network(), "", partial(make, rank=2, generator=seeded()))
        with pytest.raises(ValueError, match=f"model: got {make.__name__} at '0'"):
            LoRASqueezer(other, torch.optim.Adam([p for p in other.parameters() if p.requires_grad]), {1: 1})
    with pytest.raises(ValueError, match="model: got Sequential"):
        target_ranks(network(), 2)
