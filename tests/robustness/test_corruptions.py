"""Corruptions: each against its definition, the same under a seed, and worse with every severity."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.robustness import corruptions
from lowrank_ref.robustness.corruptions import CORRUPTIONS, corrupt

close = torch.testing.assert_close
NAMES = list(CORRUPTIONS)


def images(n=3, c=1, h=14, w=14, seed=0, dtype=torch.float64):
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def strokes(n=40, side=16):
    """Smooth blobs on black, as digits are."""
    g = torch.Generator().manual_seed(1)
    return (
        corruptions.gaussian_blur((torch.rand(n, 1, side, side, generator=g) > 0.9).double(), 0.08).mul(3).clamp(0, 1)
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_there_are_twelve():
    assert len(NAMES) == 12 and all(len(amounts) == 5 for _, amounts in CORRUPTIONS.values())


@pytest.mark.parametrize("name", NAMES)
@given(n=st.integers(1, 3), c=st.sampled_from([1, 3]), h=st.integers(3, 20), w=st.integers(3, 20), k=st.integers(1, 5))
def test_every_one_keeps_shape_dtype_and_range(name, n, c, h, w, k):
    for dtype in (torch.float32, torch.float64):
        x = images(n, c, h, w, dtype=dtype)
        before = x.clone()
        y = corrupt(x, name, k, generator=seeded(1))
        assert y.shape == x.shape and y.dtype == dtype and torch.equal(x, before)
        assert y.min() >= 0 and y.max() <= 1
        assert torch.equal(y, corrupt(x, name, k, generator=seeded(1)))


@pytest.mark.parametrize("name", NAMES)
def test_a_higher_severity_is_further_away(name):
    x = strokes()
    far = [(corrupt(x, name, k, generator=seeded(2)) - x).square().mean().item() for k in range(1, 6)]
    assert far == sorted(far) and far[0] > 0


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("gaussian_blur", "brightness", "contrast", "pixelate", "block_dct")]
)
def test_what_is_random_differs_between_images(name):
    x = strokes(1).expand(2, -1, -1, -1)
    one, two = corrupt(x, name, 4, generator=seeded(3))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("name", ["gaussian_blur", "brightness", "contrast", "pixelate", "block_dct"])
def test_what_is_not_random_needs_no_generator(name):
    x = images()
    assert torch.equal(corrupt(x, name, 3), corrupt(x, name, 3, generator=seeded(9)))


def test_noise_is_the_noise_that_is_told():
    x = torch.full((1, 1, 300, 300), 0.5, dtype=torch.float64)
    noise = corruptions.gaussian_noise(x, 0.1, seeded()) - x
    assert noise.mean().abs() < 2e-3 and noise.std().item() == pytest.approx(0.1, rel=0.02)
    shots = corruptions.shot_noise(x, 30.0, seeded())
    close((shots * 30).round(), shots * 30)
    assert shots.std().item() == pytest.approx(math.sqrt(0.5 / 30), rel=0.03)
    hit = corruptions.impulse_noise(x, 0.2, seeded())
    assert (hit == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (hit == 1).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert ((hit == 0) | (hit == 1) | (hit == 0.5)).all()


def test_blur_equals_a_loop():
    x, amount = images(1, 1, 7, 9), 0.1
    deviation = amount * 7
    reach = math.ceil(3 * deviation)
    weights = [math.exp(-(i**2) / (2 * deviation**2)) for i in range(-reach, reach + 1)]
    y = torch.zeros(7, 9, dtype=torch.float64)
    for r in range(7):
        for c in range(9):
            for i, a in enumerate(weights):
                for j, b in enumerate(weights):
                    row, column = min(max(r + i - reach, 0), 6), min(max(c + j - reach, 0), 8)
                    y[r, c] += a * b * x[0, 0, row, column]
    close(corruptions.gaussian_blur(x, amount)[0, 0], y / sum(weights) ** 2)


def test_a_constant_picture_has_nothing_to_blur_move_or_pixelate():
    x = torch.full((2, 1, 9, 11), 0.3, dtype=torch.float64)
    for name in ("gaussian_blur", "motion_blur", "elastic", "pixelate", "contrast"):
        close(corrupt(x, name, 5, generator=seeded()), x)


def test_light_is_what_its_formula_says():
    x = images()
    close(corruptions.brightness(x, 0.3), (x + 0.3).clamp_max(1))
    close(corruptions.contrast(x, 1.0), x)
    y = corruptions.contrast(x, 0.2)
    close(y.mean((1, 2, 3)), x.mean((1, 2, 3)))
    close(y.var((1, 2, 3)), 0.04 * x.var((1, 2, 3)))
    foggy = corruptions.fog(x, 1.0, seeded())
    clouds = 2 * foggy - x
    assert clouds.amin((2, 3)).abs().max() < 1e-12 and (clouds.amax((2, 3)) - 1).abs().max() < 1e-12
    close(corruptions.fog(x, 0.0, seeded()), x)


def test_a_sideways_motion_is_a_mean_along_the_line():
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 4, 4] = 1
    for seed in range(5):
        y = corruptions.motion_blur(x, 0.4, seeded(seed))
        assert y.sum().item() == pytest.approx(1, abs=1e-9)
        rows, columns = (torch.nonzero(y[0, 0])[:, k].double() for k in (0, 1))
        assert max(rows.max() - rows.min(), columns.max() - columns.min()) <= 5


def test_elastic_moves_by_the_amount_that_is_told():
    field = torch.linspace(0, 1, 20, dtype=torch.float64).expand(1, 1, 20, 20)  # value = column / 19
    moved = corruptions.elastic(field, 0.04, seeded())
    inside = (moved - field)[..., 4:-4, 4:-4] * 19  # horizontal displacement in pixels
    assert 0.2 < inside.square().mean().sqrt().item() < 1.2  # both directions together: 0.04 * 20 = 0.8


def test_occlusion_is_one_square_inside():
    x = images(50, 1, 10, 12)
    y = corruptions.occlusion(x, 0.35, seeded())
    changed = y != x
    assert (changed.sum((1, 2, 3)) == round(0.35 * 10) ** 2).all() and (y[changed] == 0.5).all()
    assert len({tuple(torch.nonzero(part[0])[0].tolist()) for part in changed}) > 20
    assert (corruptions.occlusion(x, 1.0, seeded())[:, :, :, 1:11] == 0.5).double().mean() > 0.9


def test_pixelate_makes_squares():
    y = corruptions.pixelate(images(1, 1, 12, 12), 0.25)[0, 0]
    for r in range(0, 12, 4):
        for c in range(0, 12, 4):
            square = y[r : r + 4, c : c + 4]
            close(square, square[:1, :1].expand(4, 4))
    close(corruptions.pixelate(images(), 1.0), images())


def test_block_dct_equals_a_loop_over_frequencies():
    x, amount = images(1, 1, 8, 8), 0.1

    def wave(u, i):
        return (math.sqrt(1 / 8) if u == 0 else 0.5) * math.cos(math.pi / 8 * u * (i + 0.5))

    y = torch.zeros(8, 8, dtype=torch.float64)
    for u in range(8):
        for v in range(8):
            basis = torch.tensor([[wave(u, i) * wave(v, j) for j in range(8)] for i in range(8)], dtype=torch.float64)
            step = amount * (1 + u + v)
            y += ((x[0, 0] * basis).sum() / step).round() * step * basis
    close(corruptions.block_dct(x, amount)[0, 0], y.clamp(0, 1))
    close(corruptions.block_dct(images(2, 3, 14, 11), 1e-12), images(2, 3, 14, 11))


@pytest.mark.parametrize(
    "x, name, severity, error, words",
    [
        (images(), "rain", 1, ValueError, "name: got unknown 'rain'"),
        (images(), "fog", 0, ValueError, "severity: got 0"),
        (images(), "fog", 6, ValueError, "severity: got 6"),
        (images(), "fog", 1.5, TypeError, "severity"),
        (images() + 1, "fog", 1, ValueError, "x: got values outside"),
        (images() * math.nan, "fog", 1, ValueError, "x: got values outside"),
        (images()[0], "fog", 1, ValueError, "x: got shape"),
        (images(0), "fog", 1, ValueError, "x: got shape"),
        (torch.ones(1, 1, 4, 4, dtype=torch.long), "fog", 1, TypeError, "x: got dtype"),
        ([[1.0]], "fog", 1, TypeError, "x: got list"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input(x, name, severity, error, words):
    with pytest.raises(error, match=words):
        corrupt(x, name, severity)
