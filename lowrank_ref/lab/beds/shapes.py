"""Rendered shapes, filled or outlined, and a small transformer that takes noise off them: a diffusion model in small.

x = shapes(64, generator=g)                        # discs, squares and triangles of 32x32 pixels
loss = denoising_loss(Denoiser(32, 4, dim=64, layers=2, heads=2), x, generator=g)
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer
from lowrank_ref.lab.models.transformer import Block

__all__ = ["Denoiser", "denoising_loss", "noised", "shapes"]


def shapes(
    count: int, *, outlined: bool = False, side: int = 32, generator: torch.Generator | None = None
) -> Float[Tensor, "count 3 side side"]:
    """Draw pictures with values in [-1, 1]: one disc, square or triangle of a random colour, place and size on black.

    Args:
        count: number of pictures, >= 1.
        outlined: a line of about one and a half pixels along the border, in the place of a filled shape.
        side: of the picture in pixels.
        generator: draws them, on its device.

    Raises:
        TypeError, ValueError: count or side is no integer >= 1.
    """
    check_integer("count", count, low=1)
    check_integer("side", side, low=1)
    device = generator.device if generator is not None else None
    u = torch.rand(count, 7, generator=generator, device=device)
    grid = (torch.arange(side, device=device) + 0.5) / side
    x, y = (
        grid[None, None, :] - (0.35 + 0.3 * u[:, 0, None, None]),
        grid[None, :, None] - (0.35 + 0.3 * u[:, 1, None, None]),
    )
    size = 0.14 + 0.12 * u[:, 2, None, None]
    disc = (x**2 + y**2).sqrt() - size
    square = torch.maximum(x.abs(), y.abs()) - size
    triangle = torch.maximum(y, x.abs() * 3**0.5 / 2 - y / 2) - 0.6 * size
    kind = (3 * u[:, 3, None, None]).floor()
    distance = torch.where(kind == 0, disc, torch.where(kind == 1, square, triangle)) * side  # in pixels
    inside = torch.sigmoid(3 * ((0.7 - distance.abs()) if outlined else -distance))
    colour = 2 * u[:, 4:, None, None] - 1
    return -1 + (colour + 1) * inside[:, None]


def noised(
    x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], noise: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch ..."]:
    """Return cos(πt/2)·x + sin(πt/2)·noise: the picture at t = 0, noise at t = 1."""
    t = (math.pi / 2 * t).view(-1, *[1] * (x.ndim - 1))
    return t.cos() * x + t.sin() * noise


class Denoiser(nn.Module):
    """A vision transformer that says which noise was added: patches and time in, patches out.

    Args:
        image: side of the square picture, divisible by patch.
        patch: side of a patch.
        dim: width, even and divisible by heads.
        layers: number of blocks.
        heads: attention heads.
        generator: draws the weights: normal with deviation 0.02; the last layer starts at 0.

    Raises:
        ValueError: patch does not divide image.
    """

    def __init__(
        self, image: int, patch: int, *, dim: int, layers: int, heads: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        if image % patch:
            raise ValueError(f"patch: got {patch}, wanted a divisor of image = {image}")
        self.image, self.patch = image, patch
        self.embed = nn.Linear(3 * patch**2, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.places = nn.Parameter(torch.zeros((image // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 8 * dim // 3 // 8 * 8, causal=False) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 3 * patch**2)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    p.normal_(0, 0.02, generator=generator)
                elif name.endswith("bias"):
                    p.zero_()
            self.head.weight.zero_()

    def forward(self, x: Float[Tensor, "batch 3 side side"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch ..."]:
        """Return the noise in x, at time t in [0, 1]."""
        half = self.places.shape[1] // 2
        angles = t[:, None] * torch.logspace(0, 3, half, device=t.device)
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        h = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        h = self.embed(h) + self.places + time[:, None]
        for block in self.blocks:
            h = block(h)
        h = self.head(self.norm(h)).transpose(1, 2)
        return F.fold(h, (self.image, self.image), self.patch, stride=self.patch)


def denoising_loss(
    model: nn.Module, x: Float[Tensor, "batch 3 side side"], *, generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared error of the predicted noise, at times and noises drawn on the generator's device."""
    t = torch.rand(len(x), generator=generator, device=x.device)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return F.mse_loss(model(noised(x, t, noise), t).float(), noise)
