"""The shared adversarial training: what it trains on, and that schemes differ where they should."""

import math

import pytest
import torch
from torch.nn import functional as F

from lowrank_ref.lab.adversarial import Scheme, train_robust
from lowrank_ref.lab.models import MLP
from lowrank_ref.robustness.attacks import pgd
from lowrank_ref.robustness.ramp import average_loss, cosine_projection, max_loss, no_projection, ramp_loss
from lowrank_ref.robustness.threats import survivors

THREAT = {math.inf: 0.1, 2: 0.3, 1: 0.6}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem():
    x = torch.rand(60, 6, generator=seeded())
    return x, (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 0.5)


def fit(scheme, **options):
    x, y = problem()
    settings = {"lr": 0.1, "epochs": 3, "seed": 1, "batch": 20, "steps": 2, **options}
    return train_robust(MLP((6, 16, 3), generator=seeded()), x, y, scheme, THREAT, **settings)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_step_is_a_step_of_sgd_on_the_attacked_batch():
    x, y = problem()
    model = MLP((6, 16, 3), generator=seeded())
    start = weights(model)
    got = train_robust(model, x, y, Scheme(average_loss), THREAT, lr=0.1, epochs=1, seed=1, batch=60, steps=3)
    assert torch.equal(weights(model), start)  # the caller's model stays
    points = [pgd(model, x, y, norm=p, epsilon=THREAT[p], steps=3).x_best for p in (math.inf, 1)]
    loss = sum(F.cross_entropy(model(u), y) for u in points) / 2
    loss.backward()
    wanted = start - 0.1 * torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(got), wanted, rtol=0, atol=1e-6)


def test_schemes_differ_and_repeat():
    schemes = {
        "linf": Scheme(norms=(math.inf,)),
        "drawn": Scheme(draw=True),
        "MAX": Scheme(max_loss),
        "RAMP": Scheme(lambda z, y: ramp_loss(*z, y)),
        "Lookahead": Scheme(projection=no_projection),
        "GP": Scheme(projection=cosine_projection),
    }
    found = {name: weights(fit(scheme)) for name, scheme in schemes.items()}
    for name, scheme in schemes.items():
        assert torch.equal(weights(fit(scheme)), found[name])
        others = (w for other, w in found.items() if other != name)
        assert not any(torch.equal(found[name], w) for w in others), name
    assert not torch.equal(weights(fit(schemes["drawn"], seed=2)), found["drawn"])


def test_warmup_begins_with_small_radii():
    assert not torch.equal(weights(fit(Scheme(), warmup=2)), weights(fit(Scheme())))


def test_training_on_attacks_helps_against_them():
    x, y = problem()
    alive = {}
    for name, epsilon in (("clean", 0.0), ("attacked", 0.1)):
        model = MLP((6, 16, 3), generator=seeded())
        scheme = Scheme(norms=(math.inf,))
        model = train_robust(model, x, y, scheme, {math.inf: epsilon}, lr=0.3, epochs=80, seed=0, batch=20)
        alive[name] = survivors(model, x, y, {math.inf: 0.1}, steps=10)[math.inf].double().mean().item()
    assert alive["attacked"] > alive["clean"] + 0.05


def test_a_norm_without_a_radius_is_an_error():
    with pytest.raises(KeyError):
        x, y = problem()
        train_robust(MLP((6, 3)), x, y, Scheme(norms=(3,)), THREAT, lr=0.1, epochs=1, seed=0, batch=20)
