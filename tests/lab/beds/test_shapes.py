"""Rendered shapes, and the model that takes noise off them."""

import pytest
import torch
from battery import seeded

from lowrank_ref.lab.beds.shapes import Denoiser, denoising_loss, noised, shapes


def test_pictures_are_in_range_repeat_and_lie_inside():
    x, same, other = (shapes(20, generator=seeded(s)) for s in (1, 1, 2))
    assert x.shape == (20, 3, 32, 32) and torch.equal(x, same) and not torch.equal(x, other)
    assert float(x.min()) >= -1 and float(x.max()) <= 1
    assert float((x[:, :, 0] + 1).abs().max()) < 0.02  # the border is black


def test_an_outline_is_the_same_shape_with_a_hole():
    filled, line = shapes(20, generator=seeded()), shapes(20, outlined=True, generator=seeded())
    area = [(x + 1).sum(dim=(1, 2, 3)) for x in (filled, line)]
    assert bool((area[1] < 1.1 * area[0]).all()) and float((area[1] / area[0]).median()) < 0.7
    assert float((line + 1 - 1.05 * (filled + 1)).mean()) < 0  # darker as a whole


def test_noise_goes_from_none_to_all():
    x, noise = torch.ones(2, 3, 4, 4), torch.randn(2, 3, 4, 4, generator=seeded())
    torch.testing.assert_close(noised(x, torch.tensor([0.0, 1.0]), noise)[0], x[0])
    torch.testing.assert_close(noised(x, torch.tensor([0.0, 1.0]), noise)[1], noise[1], rtol=0, atol=1e-6)


def test_a_new_denoiser_says_nothing_and_learns():
    model = Denoiser(32, 4, dim=64, layers=1, heads=2, generator=seeded())
    x = shapes(32, generator=seeded())
    assert not model(x, torch.rand(32, generator=seeded())).any()
    start = float(denoising_loss(model, x, generator=seeded(1)).detach())
    assert start == pytest.approx(1, abs=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(60):
        optimizer.zero_grad()
        denoising_loss(model, x, generator=seeded(2 + i)).backward()
        optimizer.step()
    assert float(denoising_loss(model, x, generator=seeded(1)).detach()) < 0.8 * start


def test_time_matters_and_bad_sizes_are_named(no_shape_checks):
    model = Denoiser(8, 4, dim=16, layers=1, heads=2, generator=seeded())
    torch.nn.init.ones_(model.head.weight)
    x = shapes(1, side=8, generator=seeded()).expand(2, 3, 8, 8)
    y = model(x, torch.tensor([0.1, 0.9]))
    assert not torch.allclose(y[0], y[1])
    with pytest.raises(ValueError, match="^patch: got"):
        Denoiser(8, 3, dim=16, layers=1, heads=2)
    with pytest.raises((TypeError, ValueError), match="^count: got"):
        shapes(0)
