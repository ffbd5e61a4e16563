"""NarrowAdamW beside torch's AdamW, and each kind of storage by a loop."""

import math
from functools import partial

import battery
import pytest
import torch
from torch import nn

from lowrank_ref.lowbit import QUANTIZERS, NarrowAdamW


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(count=20):
    return [randn(5, 4, seed=10 + i) for i in range(count)]


def run(optimizer, p, grads):
    for G in grads:
        p.grad = G.clone().to(p.dtype)
        optimizer.step()
    return p.detach().clone()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_without_quantisers_it_is_torchs_adamw(weight_decay):
    a, b = (nn.Parameter(randn(5, 4)) for _ in range(2))
    how = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    theirs = run(torch.optim.AdamW([a], **how), a, gradients())
    torch.testing.assert_close(run(NarrowAdamW([b], **how), b, gradients()), theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("compensated", [False, True])
def test_every_tensor_is_rounded_after_the_step(compensated):
    """m and v of the step are fresh; what is stored is rounded."""
    qs = {"weight": QUANTIZERS["int8 row"], "first": QUANTIZERS["E4M3 row"], "second": QUANTIZERS["E5M2 row"]}
    p = nn.Parameter(randn(5, 4))
    found = run(NarrowAdamW([p], lr=0.02, weight_decay=0.1, compensated=compensated, **qs), p, gradients(6))
    w, m, v, rest = randn(5, 4), torch.zeros(5, 4).double(), torch.zeros(5, 4).double(), torch.zeros(5, 4).double()
    for t, G in enumerate(gradients(6), start=1):
        m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G * G
        step = -0.02 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) - 0.02 * 0.1 * w
        new = qs["weight"](w + step + rest)
        if compensated:
            rest = qs["weight"](step + rest - (new - w))
        w, m, v = new, qs["first"](m), qs["second"](v)
    torch.testing.assert_close(found, w, rtol=0, atol=1e-9)
    assert torch.equal(qs["weight"](found), found) or (qs["weight"](found) - found).abs().max() < 1e-12


def walk(**storage):
    """Where 1 goes by 400 steps of 2⁻¹⁰ downhill; the way is 400/1024."""
    p = nn.Parameter(torch.full((64,), 1.0))
    optimizer = NarrowAdamW([p], lr=2.0**-10, generator=torch.Generator().manual_seed(0), **storage)
    return run(optimizer, p, [torch.ones(64)] * 400).mean().item()


def test_small_steps_stall_to_nearest_and_arrive_at_random_or_with_kahans_sum():
    bf16 = QUANTIZERS["bf16"]
    wanted = 1 - 400 / 1024
    assert walk(weight=bf16) == 1
    assert math.isclose(walk(weight=bf16.at_random()), wanted, abs_tol=0.01)
    assert math.isclose(walk(weight=bf16, compensated=True), wanted, abs_tol=0.005)
    assert math.isclose(walk(), wanted, abs_tol=1e-4)


def test_resumes():
    def build():
        torch.manual_seed(3)
        W = [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(3))]
        storage = {name: QUANTIZERS["int8 row"] for name in ("weight", "first")} | {"second": QUANTIZERS["bf16"]}
        return W, NarrowAdamW(W, lr=0.05, compensated=True, **storage)

    battery.assert_resumes(build, lambda W, t: torch.randn(W.shape, generator=torch.Generator().manual_seed(50 + t)))


def test_a_closure_and_parameters_without_a_gradient():
    p, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = NarrowAdamW([{"params": [p], "lr": 0.1}, {"params": [still]}])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert bool((p < 1).all()) and bool((still == 1).all())


@pytest.mark.parametrize(
    ("bad", "name"),
    [({"lr": -1}, "lr"), ({"eps": -1}, "eps"), ({"weight_decay": -1}, "weight_decay"), ({"betas": (0.9, 1)}, "betas")]
    + [({"betas": (-0.1, 0.9)}, "betas"), ({"compensated": True}, "compensated")],
)
def test_refuses(bad, name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        partial(NarrowAdamW, [nn.Parameter(torch.ones(2))])(**bad)
