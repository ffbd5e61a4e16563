"""DiffoRA's search: which level moves what, Adam's first step, the warm-up, its state, and two processes."""

import copy
from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from processes import in_processes
from torch import nn

from lowrank_ref.core.layers import replace_linears
from lowrank_ref.ranks import DiffoRALinear, ModuleSearch, couple_logits, module_logits
from lowrank_ref.ranks.diffora import search_layers


def net(seed=0, **options):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return replace_linears(model, "", partial(DiffoRALinear, rank=2, generator=seeded(seed), **options))


def batch(i):
    return gaussian(8, 5, seed=10 + i), gaussian(8, 4, seed=110 + i)


def held_out(i):
    return gaussian(8, 5, seed=1010 + i), gaussian(8, 4, seed=2110 + i)


def loss_fn(model, x, y):
    return (model(x) - y).square().mean()


def built(seed=0, lr=0.05, warmup=2, **options):
    model = net(seed, **options)
    search = ModuleSearch(model, loss_fn, held_out, lr=lr, warmup=warmup)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return model, optimizer, search


def step(model, optimizer, i):
    optimizer.zero_grad()
    loss_fn(model, *batch(i)).backward()
    optimizer.step()


def run(model, optimizer, search, steps):
    for i in steps:
        step(model, optimizer, i)
        search.step()
    return model


def factors(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("logit")}


def logits(model):
    return torch.tensor(list(module_logits(model).values()), dtype=torch.float64)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_each_level_leaves_the_other_alone_to_the_bit():
    model, optimizer, search = built()
    run(model, optimizer, search, range(4))
    at, theta = factors(model), logits(model)
    step(model, optimizer, 4)
    assert torch.equal(logits(model), theta) and not same(factors(model), at)
    at, grads = factors(model), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    search.step()
    assert same(factors(model), at) and not torch.equal(logits(model), theta)
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert same(after, grads) and not any(name.endswith("logit") for name in after)


def test_the_alternation_by_a_slow_loop():
    """Written out: a step of Adam on A and B with one batch, then one on θ with another."""
    model, optimizer, search = built()
    run(model, optimizer, search, range(6))
    slow = net()
    theta = [layer.logit for layer in search_layers(slow).values()]
    weights = [p for n, p in slow.named_parameters() if p.requires_grad and not n.endswith("logit")]
    one, two = torch.optim.Adam(weights, lr=0.01), torch.optim.Adam(theta, lr=0.05)
    for i in range(6):
        slow.zero_grad()
        loss_fn(slow, *batch(i)).backward()
        one.step()
        if i >= 2:
            slow.zero_grad()
            loss_fn(slow, *held_out(i - 2)).backward()
            two.step()
    assert torch.equal(logits(slow), logits(model)) and same(factors(slow), factors(model))


def test_adams_first_step_is_the_rate_long():
    model, optimizer, search = built(warmup=3)
    run(model, optimizer, search, range(3))
    assert not logits(model).any()
    run(model, optimizer, search, [3])
    torch.testing.assert_close(logits(model).abs(), torch.full((3,), 0.05, dtype=torch.float64), rtol=1e-4, atol=0)


def test_without_warmup_the_first_gradient_is_not_zero_since_b_has_moved_once():
    model, optimizer, search = built(warmup=0)
    search.step()  # before any step of the optimizer: B = 0
    assert not logits(model).any()
    run(model, optimizer, search, [0])
    assert logits(model).all()


def test_history_has_a_row_a_step():
    model, optimizer, search = built()
    run(model, optimizer, search, range(5))
    assert torch.stack(search.history).shape == (5, 3) and not torch.stack(search.history)[:2].any()
    assert torch.equal(search.history[-1], logits(model)) and search.paths == ("0", "2", "4")


def test_the_same_seed_gives_the_same_logits():
    first, second = (run(*built(seed=3), range(6)) for _ in range(2))
    assert torch.equal(logits(first), logits(second))
    assert not torch.equal(logits(first), logits(run(*built(seed=4), range(6))))


def test_dropout_is_off_for_the_logits_and_modes_come_back():
    model, optimizer, search = built(dropout=0.5)
    model[2].eval()
    modes = [m.training for m in model.modules()]
    step(model, optimizer, 0)
    seen = []
    search.loss_fn = lambda model, x, y: seen.append([m.training for m in model.modules()]) or loss_fn(model, x, y)
    search.steps = 2
    state = torch.get_rng_state()
    search.step()
    assert torch.equal(torch.get_rng_state(), state) and not any(seen[0])
    assert [m.training for m in model.modules()] == modes


def test_it_moves_coupled_logits():
    model = net()
    couple_logits(model)
    search = ModuleSearch(model, loss_fn, held_out, warmup=0)
    run(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01), search, range(3))
    gates = torch.cat([layer.gate() for layer in search_layers(model).values()])
    assert logits(model).any() and gates.sum().item() == pytest.approx(3)


def test_inside_no_grad():
    model, optimizer, search = built(warmup=0)
    step(model, optimizer, 0)
    with torch.no_grad():
        search.step()
    assert logits(model).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_moves_and_counts_nothing(value):
    model, optimizer, search = built(warmup=0)
    run(model, optimizer, search, range(2))
    before = copy.deepcopy((model.state_dict(), search.state_dict()))
    search.batch = lambda i: (gaussian(8, 5), torch.full((8, 4), value, dtype=torch.float64))
    with pytest.raises(ValueError, match="grad of θ at '0': got 1 NaN or infinite"):
        search.step()
    torch.testing.assert_close((model.state_dict(), search.state_dict()), before, rtol=0, atol=0)
    assert not any(layer.logit.requires_grad for layer in search_layers(model).values())


def test_a_loss_that_raises_leaves_logits_frozen():
    model, _, search = built(warmup=0)
    search.batch = lambda i: 1 / 0
    with pytest.raises(ZeroDivisionError):
        search.step()
    assert search.steps == 0 and not any(layer.logit.requires_grad for layer in search_layers(model).values())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    "options, message",
    [({"lr": -1.0}, "lr: got -1.0"), ({"warmup": -1}, "warmup: got -1"), ({"warmup": 1.5}, "warmup")],
)
def test_bad_options_raise_and_freeze_nothing(options, message):
    model = net()
    with pytest.raises((TypeError, ValueError), match=message):
        ModuleSearch(model, loss_fn, held_out, **options)
    assert all(layer.logit.requires_grad for layer in search_layers(model).values())


def test_a_model_without_search_is_refused():
    with pytest.raises(ValueError, match="without a DiffoRALinear"):
        ModuleSearch(nn.Linear(3, 3), loss_fn, held_out)


def test_a_state_of_other_modules_is_refused():
    model, optimizer, search = built()
    run(model, optimizer, search, range(3))
    before = search.state_dict()
    small = replace_linears(nn.Sequential(nn.Linear(5, 4)).double(), "", partial(DiffoRALinear, rank=2))
    other = ModuleSearch(small, loss_fn, held_out)
    for state in (other.state_dict(), {**before, "steps": 7}, {**before, "history": before["history"][:, :2]}):
        with pytest.raises(ValueError, match="state"):
            search.load_state_dict(state)
    torch.testing.assert_close(search.state_dict(), before, rtol=0, atol=0)


def process(rank, world, folder):
    """One of two processes: its half of every batch of both levels."""
    model = net()
    search = ModuleSearch(model, loss_fn, lambda i: tuple(t[rank::2] for t in held_out(i)), warmup=1)
    whole = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    search.attach(optimizer)
    for i in range(5):
        optimizer.zero_grad()
        loss_fn(whole, *(t[rank::2] for t in batch(i))).backward()
        optimizer.step()
    torch.save(logits(model), f"{folder}/{rank}")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    in_processes(process, tmp_path)
    model = net()
    search = ModuleSearch(model, loss_fn, held_out, warmup=1)
    run(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01), search, range(5))
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), logits(model), rtol=0, atol=1e-9)
