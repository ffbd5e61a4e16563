"""Twelve corruptions of images, each in five severities, to measure with and never to train on.

    for name in CORRUPTIONS:
        noisy = corrupt(x, name, severity=3, generator=torch.Generator().manual_seed(0))

The idea of a fixed list with five severities is that of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261). Code
and constants here are our own, chosen for small gray pictures: numbers are not comparable with those of ImageNet-C.

| kind    | corruptions                                  | amount                                                   |
|---------|----------------------------------------------|----------------------------------------------------------|
| noise   | `gaussian_noise`, `shot_noise`, `impulse_noise` | deviation; photons a pixel; share of pixels           |
| blur    | `gaussian_blur`, `motion_blur`               | deviation and length, as shares of the shorter side      |
| light   | `fog`, `brightness`, `contrast`              | weight of the fog; what is added; what is left           |
| place   | `elastic`, `occlusion`                       | displacement and side of the square, as shares           |
| digital | `pixelate`, `block_dct`                      | share of the side that is left; first step of the levels |

Every one takes images (n, c, h, w) with values in [0, 1], an amount and a generator, and returns images of the same
shape in [0, 1]; whatever is random is drawn anew for each image. Geometry is sampled bilinearly, and beyond the border
the nearest pixel of the border continues.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_floating, check_integer, check_names

Generator = torch.Generator | None
Corruption = Callable[[Tensor, float, Generator], Tensor]


def gaussian_noise(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return x + N(0, amount²), cut to [0, 1]."""
    return (x + amount * _normal(x.shape, x, generator)).clamp(0, 1)


def shot_noise(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return Poisson(amount·x)/amount, cut to [0, 1]: `amount` photons for a white pixel, fewer are worse."""
    rates = amount * x.clamp_min(0)
    device = generator.device if generator is not None else x.device
    return (torch.poisson(rates.to(device), generator=generator).to(x.device) / amount).clamp(0, 1)


def impulse_noise(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return x with a share `amount` of the values set to 0 or 1, by the toss of a coin."""
    u = _uniform(x.shape, x, generator)
    return torch.where(u < amount / 2, 0.0, torch.where(u < amount, 1.0, x))


def gaussian_blur(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return x convolved with a Gaussian of deviation amount·min(h, w) pixels, cut off at three deviations."""
    return _blurred(x, amount * min(x.shape[-2:])).clamp(0, 1)


def motion_blur(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return the mean of seven copies along a line of length amount·min(h, w) pixels, in a random direction."""
    angle = math.pi * _uniform((len(x),), x, generator)
    direction = torch.stack([angle.cos(), angle.sin()], dim=1) * amount * min(x.shape[-2:])
    copies = [_sampled(x, (place * direction)[:, None, None]) for place in torch.linspace(-0.5, 0.5, 7).tolist()]
    return torch.stack(copies).mean(0)


def fog(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return (x + amount·f)/(1 + amount) with smooth clouds f in [0, 1], the same for all channels.

    f sums noise on grids of 2, 4 and 8 cells a side, enlarged bilinearly, with weights 4, 2, 1, and is scaled so that
    each image's clouds reach from 0 to 1.
    """
    n, _, h, w = x.shape
    f = x.new_zeros(n, 1, h, w)
    for cells, weight in ((2, 4.0), (4, 2.0), (8, 1.0)):
        noise = _uniform((n, 1, cells, cells), x, generator)
        f = f + weight * F.interpolate(noise, size=(h, w), mode="bilinear", align_corners=True)
    low, high = f.amin((2, 3), keepdim=True), f.amax((2, 3), keepdim=True)
    f = (f - low) / (high - low).clamp_min(1e-6)
    return (x + amount * f) / (1 + amount)


def brightness(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return x + amount, cut to [0, 1]."""
    return (x + amount).clamp(0, 1)


def contrast(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return mean + amount·(x - mean), with each image's own mean: 1 leaves it, 0 makes it gray."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + amount * (x - mean)).clamp(0, 1)


def elastic(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return x with every pixel taken from elsewhere, by a smooth field whose root mean square is amount·min(h, w).

    The field is Gaussian noise, blurred with a deviation of an eighth of the shorter side.
    """
    side = min(x.shape[-2:])
    field = _blurred(_normal((len(x), 2, *x.shape[-2:]), x, generator), side / 8)
    rms = field.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
    return _sampled(x, (amount * side * field / rms).permute(0, 2, 3, 1))


def occlusion(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return x with a gray square (0.5) of side amount·min(h, w), rounded, somewhere inside the picture."""
    n, _, h, w = x.shape
    side = min(round(amount * min(h, w)), min(h, w))
    u = _uniform((2, n), x, generator)
    top, left = ((u[k] * (size - side + 1)).floor()[:, None] for k, size in ((0, h), (1, w)))
    rows, columns = torch.arange(h, device=x.device)[None], torch.arange(w, device=x.device)[None]
    inside = ((rows >= top) & (rows < top + side))[:, :, None] & ((columns >= left) & (columns < left + side))[:, None]
    return torch.where(inside[:, None], 0.5, x)


def pixelate(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return x shrunk to a share `amount` of its sides, at least one pixel, by area, and enlarged again in squares."""
    small = tuple(max(1, round(amount * side)) for side in x.shape[-2:])
    return F.interpolate(F.interpolate(x, size=small, mode="area"), size=x.shape[-2:], mode="nearest-exact")


def block_dct(x: Float[Tensor, "n c h w"], amount: float, generator: Generator = None) -> Float[Tensor, "n c h w"]:
    """Return x after the lossy part of JPEG: blocks of 8x8, a cosine transform, levels of step amount·(1 + u + v).

    u and v number the frequencies from 0. The step grows linearly, which is not JPEG's own table. A picture whose sides
    are no multiples of 8 is continued to the right and below by its last column and row.
    """
    n, c, h, w = x.shape
    padded = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
    k = torch.arange(8, dtype=x.dtype, device=x.device)
    D = torch.cos(math.pi / 8 * k[:, None] * (k + 0.5)) / 2  # (8, 8), orthonormal once row 0 is divided by √2
    D = torch.cat([D[:1] / math.sqrt(2), D[1:]])
    blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (n, c, rows, columns, 8, 8)
    steps = amount * (1 + k[:, None] + k)
    levels = (D @ blocks @ D.T / steps).round() * steps
    whole = (D.T @ levels @ D).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return whole[:, :, :h, :w].clamp(0, 1)


#: Name -> (corruption, its amounts at severity 1 to 5).
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float, float, float, float]]] = {
    "gaussian_noise": (gaussian_noise, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "shot_noise": (shot_noise, (30.0, 12.0, 6.0, 3.0, 1.5)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.1, 0.17, 0.25)),
    "gaussian_blur": (gaussian_blur, (0.04, 0.055, 0.07, 0.085, 0.1)),
    "motion_blur": (motion_blur, (0.15, 0.22, 0.3, 0.38, 0.46)),
    "fog": (fog, (0.3, 0.6, 1.0, 1.5, 2.0)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.6, 0.5, 0.4, 0.3, 0.2)),
    "elastic": (elastic, (0.02, 0.035, 0.05, 0.065, 0.08)),
    "occlusion": (occlusion, (0.15, 0.25, 0.35, 0.45, 0.55)),
    "pixelate": (pixelate, (0.7, 0.5, 0.4, 0.3, 0.2)),
    "block_dct": (block_dct, (0.05, 0.1, 0.2, 0.3, 0.4)),
}


def corrupt(
    x: Float[Tensor, "n c h w"], name: str, severity: int, *, generator: Generator = None
) -> Float[Tensor, "n c h w"]:
    """Return the images, corrupted.

    Args:
        x: images with values in [0, 1].
        name: a key of `CORRUPTIONS`.
        severity: 1 (slight) to 5.
        generator: draws whatever is random, on its device.

    Raises:
        TypeError: x is no floating-point tensor, or severity no integer.
        ValueError: x is not (n, c, h, w) with values in [0, 1]; an unknown name; a severity outside 1 to 5.

    Example:
        >>> x = torch.full((1, 1, 4, 4), 0.5)
        >>> corrupt(x, "brightness", 3).max().item()
        0.800000011920929
    """
    check_floating("x", x)
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted images (n, c, h, w)")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("x: got values outside [0, 1] or NaN, wanted pixels in [0, 1]")
    check_names("name", [name], CORRUPTIONS)
    check_integer("severity", severity)
    if not 1 <= severity <= 5:
        raise ValueError(f"severity: got {severity}, wanted 1 to 5")
    corruption, amounts = CORRUPTIONS[name]
    return corruption(x, amounts[severity - 1], generator)


# --- inside -----------------------------------------------------------------------------------------------------------


def _uniform(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _normal(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _blurred(x: Tensor, deviation: float) -> Tensor:
    """Convolve rows and columns with a Gaussian; the border is continued."""
    reach = max(1, math.ceil(3 * deviation))
    places = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(places**2) / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    n, c, h, w = x.shape
    flat = F.pad(x.reshape(n * c, 1, h, w), (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None]).view(n, c, h, w)


def _sampled(x: Tensor, offset: Tensor) -> Tensor:
    """Take every pixel from (x, y) + offset, in pixels; offset broadcasts to (n, h, w, 2)."""
    n, _, h, w = x.shape
    rows, columns = (torch.arange(size, dtype=x.dtype, device=x.device) for size in (h, w))
    grid = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w)], dim=-1) + offset
    sides = torch.tensor([w, h], dtype=x.dtype, device=x.device)
    grid = (2 * grid + 1) / sides - 1
    return F.grid_sample(x, grid.expand(n, h, w, 2), mode="bilinear", padding_mode="border", align_corners=False)
