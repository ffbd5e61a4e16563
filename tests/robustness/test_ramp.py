"""RAMP: each equation against a loop, the identities of gradient projection, and the step between two trajectories."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from torch import nn
from torch.nn import functional as F

from lowrank_ref.core.io import load_tensors, save_tensors
from lowrank_ref.lab.train import Steppable, train
from lowrank_ref.robustness.ramp import (
    GradientProjection,
    average_loss,
    cosine,
    cosine_projection,
    fuse,
    logit_pairing,
    max_loss,
    no_projection,
    orthogonal_projection,
    ramp_loss,
    whole_natural,
)

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
seeds = st.integers(0, 1000)
PROJECTIONS = [cosine_projection, orthogonal_projection, no_projection, whole_natural]


def randoms(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n, classes, seed=0):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


# --- equations 1 to 3 -------------------------------------------------------------------------------------------------


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


@given(st.integers(1, 9), st.integers(2, 6), seeds)
def test_losses_equal_loops(n, classes, seed):
    z_q, z_r, y = randoms(n, classes, seed=seed), randoms(n, classes, seed=seed + 1), labels(n, classes, seed)
    pairing, worst, mean, right = 0.0, 0.0, 0.0, 0
    for a, b, label in zip(z_q.tolist(), z_r.tolist(), y.tolist()):
        p, q = softmax(a), softmax(b)
        worst += max(-math.log(p[label]), -math.log(q[label])) / n
        mean += (-math.log(p[label]) - math.log(q[label])) / (2 * n)
        if max(range(classes), key=a.__getitem__) == label:
            right += 1
            pairing += sum(u * math.log(u / v) for u, v in zip(p, q))
    pairing = pairing / right if right else 0.0
    assert logit_pairing(z_q, z_r, y).item() == pytest.approx(pairing, abs=1e-12)
    assert max_loss((z_q, z_r), y).item() == pytest.approx(worst, abs=1e-12)
    assert average_loss((z_q, z_r), y).item() == pytest.approx(mean, abs=1e-12)
    assert ramp_loss(z_q, z_r, y, weight=1.7).item() == pytest.approx(worst + 1.7 * pairing, abs=1e-11)


@given(st.integers(1, 9), st.integers(2, 6), seeds)
def test_identities_of_the_loss(n, classes, seed):
    z_q, z_r, y = randoms(n, classes, seed=seed), randoms(n, classes, seed=seed + 1), labels(n, classes, seed)
    close(ramp_loss(z_q, z_r, y, weight=0.0), max_loss((z_q, z_r), y))
    assert logit_pairing(z_q, z_r, y) >= 0
    shift_q, shift_r = randoms(n, 1, seed=seed + 2), randoms(n, 1, seed=seed + 3)
    close(ramp_loss(z_q + shift_q, z_r + shift_r, y), ramp_loss(z_q, z_r, y))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    close(ramp_loss(z_q[order], z_r[order], y[order]), ramp_loss(z_q, z_r, y))
    close(max_loss((z_q, z_r), y), max_loss((z_r, z_q), y))
    close(max_loss((z_q,), y), F.cross_entropy(z_q, y))


def test_pairing_is_zero_iff_the_predictions_agree_where_q_is_right():
    z_q, z_r = randoms(6, 4), randoms(6, 4, seed=1)
    y = z_q.argmax(1)
    y[3:] = (y[3:] + 1) % 4  # fooled
    mixed = torch.cat([z_q[:3] + 5, z_r[3:]])  # the same probabilities on the first three, others elsewhere
    close(logit_pairing(z_q, mixed, y), torch.tensor(0.0, dtype=torch.float64))
    assert logit_pairing(z_q, z_r, y) > 0.01


def test_nobody_right_gives_zero_with_finite_gradients():
    z_q, z_r = (randoms(5, 4, seed=s).requires_grad_() for s in (0, 1))
    y = (z_q.argmax(1) + 1) % 4
    loss = logit_pairing(z_q, z_r, y)
    loss.backward()
    assert loss.item() == 0 and not z_q.grad.any() and not z_r.grad.any()


def test_gradients_flow_into_both_attacks():
    z_q, z_r = (randoms(5, 4, seed=s).requires_grad_() for s in (0, 1))
    y = z_q.argmax(1)
    assert torch.autograd.gradcheck(lambda a, b: ramp_loss(a, b, y, weight=0.7), (z_q, z_r))
    logit_pairing(z_q, z_r, y).backward()
    assert bool(z_q.grad.any(1).all() and z_r.grad.any(1).all())


def test_with_clean_logits_for_q_and_everybody_right_it_is_the_regulariser_of_trades():
    z, z_r = randoms(7, 4), randoms(7, 4, seed=1)
    p = z.softmax(1)
    trades = (p * (p.log() - z_r.log_softmax(1))).sum(1).mean()
    close(logit_pairing(z, z_r, z.argmax(1)), trades)


def test_extreme_logits_stay_finite():
    z_q = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    z_r = torch.tensor([[0.0, 1e4], [0.0, 1e4]], requires_grad=True)
    loss = ramp_loss(z_q, z_r, torch.tensor([0, 1]))
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(z_q.grad).all() and torch.isfinite(z_r.grad).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_finite_and_near(dtype):
    z_q, z_r, y = randoms(9, 5), randoms(9, 5, seed=1), labels(9, 5)
    got = ramp_loss(z_q.to(dtype), z_r.to(dtype), y)
    torch.testing.assert_close(got.double(), ramp_loss(z_q, z_r, y), rtol=0.05, atol=0.05)


def test_compiles_to_one_graph_whoever_is_right():
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(ramp_loss, fullgraph=True, backend="aot_eager")
        z_q, z_r = (randoms(6, 4, seed=s).requires_grad_() for s in (0, 1))
        for y in (z_q.argmax(1), (z_q.argmax(1) + 1) % 4):
            close(compiled(z_q, z_r, y), ramp_loss(z_q, z_r, y))
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def test_bad_input_of_the_loss_is_named():
    z, y = randoms(4, 3), labels(4, 3)
    with pytest.raises(ValueError, match="weight: got -1"):
        ramp_loss(z, z, y, weight=-1.0)
    for z_r, other in ((z[:2], y), (z[:, :2], y), (z, y[:2])):
        with pytest.raises((ValueError, TypeError)):
            ramp_loss(z, z_r, other)


# --- equations 5 and 7 ------------------------------------------------------------------------------------------------

shapes = st.sampled_from([(1,), (5,), (4, 3), (3, 4), (3, 3), (2, 3, 2, 2), ()])


@given(shapes, seeds)
def test_projections_equal_loops(shape, seed):
    g_n, g_a = randoms(*shape, seed=seed), randoms(*shape, seed=seed + 1)
    a, b = g_n.flatten().tolist(), g_a.flatten().tolist()
    inner = sum(u * v for u, v in zip(a, b))
    len_n, len_a = math.sqrt(sum(u * u for u in a)), math.sqrt(sum(v * v for v in b))
    c = max(inner / (len_n * len_a), 0)
    close(cosine_projection(g_n, g_a), torch.tensor([c * u for u in a], dtype=torch.float64).view(shape))
    wanted = torch.tensor([max(inner, 0) / len_n**2 * u for u in a], dtype=torch.float64).view(shape)
    close(orthogonal_projection(g_n, g_a), wanted)
    assert cosine(g_n, g_a).item() == pytest.approx(inner / (len_n * len_a))
    close(orthogonal_projection(g_n, g_a), cosine_projection(g_n, g_a) * len_a / len_n)  # exercise 1


@given(shapes, seeds)
def test_identities_of_the_projections(shape, seed):
    g_n, g_a = randoms(*shape, seed=seed), randoms(*shape, seed=seed + 1)
    if cosine(g_n, g_a) < 0:
        g_a = -g_a
    P = orthogonal_projection(g_n, g_a)
    close(orthogonal_projection(3.7 * g_n, g_a), P)
    close(orthogonal_projection(g_n, P), P)
    assert P.norm() <= g_a.norm() * (1 + 1e-12)
    close(((g_a - P) * g_n).sum(), torch.tensor(0.0, dtype=torch.float64))
    close(cosine_projection(3.7 * g_n, g_a), 3.7 * cosine_projection(g_n, g_a))
    close(cosine_projection(g_n, 3.7 * g_a), cosine_projection(g_n, g_a))
    same = g_a * (g_n.norm() / g_a.norm())
    close(cosine_projection(g_n, same), orthogonal_projection(g_n, same))
    assert not torch.allclose(cosine_projection(2 * same, same), orthogonal_projection(2 * same, same))
    for projection in (cosine_projection, orthogonal_projection):
        assert not projection(g_n, -g_a).any()


@given(shapes, seeds, st.floats(0, 1))
def test_identities_of_the_fusion(shape, seed, beta):
    f, f_n, f_a = (randoms(*shape, seed=seed + i) for i in range(3))
    for projection in PROJECTIONS:
        close(fuse(f, f_n, f_a, beta=0.0, projection=projection), f_a)
        got = fuse(f, f_n, f_a, beta=beta, projection=projection)
        close(got, f + beta * projection(f_n - f, f_a - f) + (1 - beta) * (f_a - f))
    for projection in (cosine_projection, orthogonal_projection, whole_natural):
        close(fuse(f, f_a, f_a, beta=beta, projection=projection), f_a)  # c = 1
    lookahead = f + (1 - beta) * (f_a - f)
    close(fuse(f, f_n, f_a, beta=beta, projection=no_projection), lookahead)
    close(fuse(f, 2 * f - f_a, f_a, beta=beta), lookahead)  # c = -1
    close(fuse(f, f_n, f_a, beta=beta, projection=whole_natural), (1 - beta) * f_a + beta * f_n)


def test_orthogonal_epochs_give_lookahead():
    f, f_n, f_a = torch.zeros(3, 2), torch.tensor([[1.0, 0], [2, 0], [0, 0]]), torch.tensor([[0, 3.0], [0, 1], [0, 2]])
    close(fuse(f, f_n, f_a, beta=0.3), 0.7 * f_a)


def test_a_tensor_that_did_not_move_stays_finite():
    f, g = torch.zeros(3), torch.ones(3)
    for projection in PROJECTIONS:
        for n, a in ((f, g), (g, f), (f, f)):
            assert bool(torch.isfinite(fuse(f, n, a, projection=projection)).all())


# --- the step between two trajectories --------------------------------------------------------------------------------


def network(seed=0):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randoms(*p.shape, seed=seed + i) / 2)
    return model


def batch(i):
    return randoms(8, 6, seed=100 + i), labels(8, 3, 100 + i)


def loss_of_both(pair, x, y):
    """The model on moved inputs, the twin on clean ones."""
    return F.cross_entropy(pair[0](x + 0.3 * x.sign()), y) + F.cross_entropy(pair[1](x), y)


def setup(**options):
    model = network()
    twin = copy.deepcopy(model)
    pair = nn.ModuleList([model, twin])
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1, momentum=0.9)
    return pair, optimizer, GradientProjection(model, twin, **options)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_two_epochs_equal_a_loop(projection):
    pair, optimizer, gp = setup(beta=0.3, projection=projection, every=3)
    assert isinstance(gp, Steppable)
    train(pair, batch, loss_of_both, optimizer, steps=6, actions=[gp], progress=False)

    models, step = [network(), network()], 0
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]  # never reset
    for _ in range(2):
        start = {name: p.detach().clone() for name, p in models[0].named_parameters()}
        for _ in range(3):
            x, y = batch(step)
            for model, opt, moved in zip(models, optimizers, (x + 0.3 * x.sign(), x)):
                opt.zero_grad(), F.cross_entropy(model(moved), y).backward(), opt.step()
            step += 1
        other = dict(models[1].named_parameters())
        with torch.no_grad():
            for name, p in models[0].named_parameters():
                g_n, g_a = other[name] - start[name], p - start[name]
                p.copy_(start[name] + 0.3 * projection(g_n, g_a) + 0.7 * g_a)
        models[1].load_state_dict(models[0].state_dict())
    for key, value in models[0].state_dict().items():
        close(pair[0].state_dict()[key], value)
        assert torch.equal(pair[1].state_dict()[key], pair[0].state_dict()[key])


def test_running_statistics_are_those_of_the_model():
    pair, optimizer, gp = setup()
    train(pair, batch, loss_of_both, optimizer, steps=2, progress=False)
    mean = pair[0][1].running_mean.clone()
    assert not torch.equal(pair[1][1].running_mean, mean)
    gp.step()
    assert torch.equal(pair[0][1].running_mean, mean) and torch.equal(pair[1][1].running_mean, mean)


def test_nothing_happens_within_an_epoch():
    pair, optimizer, gp = setup(every=5)
    train(pair, batch, loss_of_both, optimizer, steps=4, progress=False)
    before = copy.deepcopy(pair.state_dict())
    for _ in range(4):
        gp.step()
    assert all(torch.equal(value, before[key]) for key, value in pair.state_dict().items())
    gp.step()
    assert not torch.equal(pair[0][0].weight, before["0.0.weight"])


def test_a_run_resumes_to_the_same_bits(tmp_path):
    """lab.train saves model, optimizer and action in the middle of an epoch; a run without the saved start differs."""
    pair, optimizer, gp = setup(every=3)
    train(pair, batch, loss_of_both, optimizer, steps=8, actions=[gp], progress=False)
    path = tmp_path / "x"
    first = setup(every=3)
    train(first[0], batch, loss_of_both, first[1], steps=5, actions=[first[2]], checkpoint=path, progress=False)
    again = setup(every=3)
    train(again[0], batch, loss_of_both, again[1], steps=8, actions=[again[2]], checkpoint=path, progress=False)
    assert all(torch.equal(value, pair.state_dict()[key]) for key, value in again[0].state_dict().items())
    forgetful = setup(every=3)[2]
    assert not torch.equal(forgetful.start["0.weight"], gp.start["0.weight"])


def test_the_state_is_a_copy_and_goes_through_safetensors(tmp_path):
    pair, _, gp = setup()
    state = gp.state_dict()
    state["start"]["0.weight"].zero_()
    assert gp.start["0.weight"].any()
    save_tensors(gp.state_dict()["start"], tmp_path / "x", kind="start")
    gp.load_state_dict({"calls": 7, "start": load_tensors(tmp_path / "x", kind="start")})
    assert gp.calls == 7 and torch.equal(gp.start["0.weight"], pair[0][0].weight)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_tensors(tmp_path / "x", kind="start")
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="state: got weights of another model"):
        gp.load_state_dict(GradientProjection(other, copy.deepcopy(other)).state_dict())


def test_deepcopy_is_independent():
    _, _, gp = setup()
    other = copy.deepcopy(gp)
    with torch.no_grad():
        for p in (*other.model.parameters(), *other.start.values()):
            p.zero_()
    assert gp.model[0].weight.any() and gp.start["0.weight"].any()


def test_bad_input_is_named():
    model = network()
    twin = copy.deepcopy(model)
    for change, message in (
        ({"beta": -0.1}, "beta: got"),
        ({"beta": 1.1}, "beta: got"),
        ({"every": 0}, "every: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GradientProjection(model, twin, **change)
    for bad in (model, network(seed=5), nn.Linear(6, 3)):
        with pytest.raises(ValueError, match="twin: got"):
            GradientProjection(model, bad)


def test_a_broken_epoch_is_refused_whole():
    pair, _, gp = setup()
    with torch.no_grad():
        pair[0][0].weight += 1
        pair[1][3].bias[0] = torch.nan
    before = copy.deepcopy(pair[0].state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"twin\.3\.bias"):
            gp.step()
        assert gp.calls == 0  # the epoch is not over
    assert all(torch.equal(value, before[key]) for key, value in pair[0].state_dict().items())
    for state in ({}, {"calls": 1}, {"start": gp.start}):
        with pytest.raises(ValueError, match="state: got keys"):
            gp.load_state_dict(state)


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_with_the_whole_natural_step_the_fusion_is_a_weighted_average(beta):
    f, f_n, f_a = (torch.randn(3, 4, generator=torch.Generator().manual_seed(s)).double() for s in range(3))
    close(fuse(f, f_n, f_a, beta=beta, projection=whole_natural), beta * f_n + (1 - beta) * f_a)


# --- two processes ----------------------------------------------------------------------------------------------------


class Pair(nn.ModuleList):
    """Both models in one module, so that DDP averages both gradients."""

    def forward(self, x):
        return self[0](x + 0.3 * x.sign()), self[1](x)


def plain():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def follow(wrap, rows):
    torch.manual_seed(0)
    model = plain()
    twin = copy.deepcopy(model)
    pair = Pair([model, twin])
    optimizer, gp = torch.optim.SGD(pair.parameters(), lr=0.1, momentum=0.9), GradientProjection(model, twin, every=2)
    wrapped = wrap(pair)
    for i in range(4):
        x, y = batch(i)
        z, z_n = wrapped(x[rows])
        optimizer.zero_grad()
        (F.cross_entropy(z, y[rows]) + F.cross_entropy(z_n, y[rows])).backward()
        optimizer.step()
        gp.step()
    return pair.state_dict()


def distributed(rank, world, folder):
    state = follow(nn.parallel.DistributedDataParallel, slice(rank, None, 2))
    torch.save(state, f"{folder}/{rank}")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    in_processes(distributed, tmp_path)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1))
    wanted = follow(lambda pair: pair, slice(None))
    for key, value in wanted.items():
        assert torch.equal(first[key], second[key])
        close(first[key], value)
