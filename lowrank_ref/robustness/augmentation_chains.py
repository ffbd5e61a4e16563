"""Augmented images to train on, and a loss that wants the same answer for all of them: AugMix, by its definition.

Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty", arXiv 1912.02781.

| there                                                  | here                  |
|--------------------------------------------------------|-----------------------|
| x_mix = Σ_i w_i chain_i(x), a(x) = m·x + (1 - m)·x_mix | `chained`             |
| JS(p₁; p₂; p₃), mean of KL to the mean                 | `jensen_shannon`      |
| CE(g(x), y) + λ·JS(g(x); g(a₁x); g(a₂x))               | `consistent_loss`     |

w ~ Dirichlet(1, 1, 1) and m ~ Beta(1, 1) = U(0, 1), for each image anew; a chain is one to three operations, each drawn
from `OPERATIONS`. None of these is a corruption of `corruptions.py`. Operations and their ranges are our own, for gray
pictures.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_number

Operation = Callable[[Tensor, Tensor], Tensor]


def turned(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return the images turned by u·20°; u in [-1, 1] as for all operations."""
    angle = u * math.radians(20)
    return _affine(x, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def sheared_rows(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return the images with each row moved sideways by 0.3·u of its height above the middle."""
    return _affine(x, 1.0, 0.3 * u, 0.0, 1.0)


def sheared_columns(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return the images with each column moved up or down by 0.3·u of its distance from the middle."""
    return _affine(x, 1.0, 0.0, 0.3 * u, 1.0)


def moved_sideways(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return the images moved sideways by u tenths of their width."""
    return _affine(x, 1.0, 0.0, 0.0, 1.0, dx=0.2 * u)


def moved_up_or_down(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return the images moved up or down by u tenths of their height."""
    return _affine(x, 1.0, 0.0, 0.0, 1.0, dy=0.2 * u)


def posterised(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return the images in few gray levels: 2 at u = ±1, up to 8 at 0."""
    steps = (7 - 6 * u.abs()).round().clamp(1, 7).view(-1, 1, 1, 1)
    return (x * steps).round() / steps


def solarised(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return the images with values above `1 - |u|/2` turned to their negative."""
    return torch.where(x > 1 - u.abs().view(-1, 1, 1, 1) / 2, 1 - x, x)


def darkened_or_lightened(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return x to the power 3^u: gamma correction, which leaves black and white as they are."""
    return x.clamp_min(0) ** (3**u).view(-1, 1, 1, 1)


def lit_from_a_side(x: Float[Tensor, "n c h w"], u: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Return `(x + |u|·r)/(1 + |u|)` with a ramp r from 0 at one side to 1 at the other, from left for u > 0."""
    ramp = torch.linspace(0, 1, x.shape[3], dtype=x.dtype, device=x.device)
    u = u.view(-1, 1, 1, 1)
    return (x + u.abs() * torch.where(u > 0, ramp.flip(0), ramp)) / (1 + u.abs())


#: What a chain is made of.
OPERATIONS: tuple[Operation, ...] = (
    turned,
    sheared_rows,
    sheared_columns,
    moved_sideways,
    moved_up_or_down,
    posterised,
    solarised,
    darkened_or_lightened,
    lit_from_a_side,
)


def chained(
    x: Float[Tensor, "n c h w"],
    *,
    chains: int = 3,
    longest: int = 3,
    operations: Sequence[Operation] = OPERATIONS,
    mix: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n c h w"]:
    """Return a(x) = m·x + (1 - m)·Σ_i w_i chain_i(x), drawn anew for each image.

    Order of the draws: exponential numbers (n, chains), whose shares of their sum are w; m; for each chain its length
    (n), and for each of its `longest` places the operation (n) and u (n), whether the chain is that long or not.

    Args:
        x: images with values in [0, 1].
        chains: number of chains, >= 1.
        longest: most operations in a chain, >= 1.
        operations: called as operation(images, u) with u in [-1, 1], one number an image.
        mix: m in [0, 1], the same for all; None draws it.
        generator: draws everything, on the device of x.

    Raises:
        TypeError, ValueError: chains, longest or mix out of range; no operation.

    Example:
        >>> x = torch.rand(2, 1, 8, 8)
        >>> torch.equal(chained(x, mix=1.0), x)
        True
    """
    check_integer("chains", chains, low=1)
    check_integer("longest", longest, low=1)
    if not operations:
        raise ValueError("operations: got none, wanted at least one")
    if mix is not None:
        check_number("mix", mix, low=0, high=1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)

    n = len(x)
    w = -(1 - uniform(n, chains)).log()  # exponential numbers: their shares are Dirichlet(1, ..., 1)
    w = w / w.sum(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    m = uniform(n).view(-1, 1, 1, 1) if mix is None else torch.full((n, 1, 1, 1), mix, dtype=x.dtype, device=x.device)
    mixed = torch.zeros_like(x)
    for i in range(chains):
        length = 1 + (longest * uniform(n)).long()
        link = x
        for place in range(longest):
            which, u = (len(operations) * uniform(n)).long(), 2 * uniform(n) - 1
            new = link.clone()
            for k, operation in enumerate(operations):
                rows = torch.nonzero((which == k) & (place < length)).flatten()
                if len(rows):
                    new[rows] = operation(link[rows], u[rows])
            link = new
        mixed = mixed + w[:, i].view(-1, 1, 1, 1) * link
    return torch.where(m == 1, x, (m * x + (1 - m) * mixed).clamp(0, 1))


def jensen_shannon(logits: Sequence[Float[Tensor, "batch classes"]]) -> Float[Tensor, ""]:
    """Return the mean over rows of Σ_k KL(p_k ‖ p̄)/K with p̄ = Σ_k p_k/K, in nats; in [0, log K].

    Raises:
        ValueError: fewer than two rows of logits to compare.
    """
    if len(logits) < 2:
        raise ValueError(f"logits: got {len(logits)}, wanted at least two to compare")
    log_p = torch.stack([z.log_softmax(1) for z in logits])
    log_mean = log_p.logsumexp(0) - math.log(len(logits))
    return (log_p.exp() * (log_p - log_mean)).sum(2).mean()


def consistent_loss(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    views: Sequence[Float[Tensor, "n ..."]],
    y: Int64[Tensor, " n"],
    *,
    weight: float = 12.0,
) -> Float[Tensor, ""]:
    """Return CE(g(x), y) + λ·JS(g(x); g(a₁x); ...), all of it in one forward pass.

    Args:
        model: g.
        x: clean images.
        views: augmented ones, one tensor for each view.
        y: labels.
        weight: λ >= 0; AugMix has 12.

    Raises:
        TypeError, ValueError: a negative weight, or no view.
    """
    check_number("weight", weight, low=0)
    logits = model(torch.cat([x, *views])).split(len(x))
    return F.cross_entropy(logits[0], y) + weight * jensen_shannon(logits)


def _affine(
    x: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    c: Tensor | float,
    d: Tensor | float,
    *,
    dx: Tensor | float = 0.0,
    dy: Tensor | float = 0.0,
) -> Tensor:
    """Take pixel (x, y), in [-1, 1]², from (a·x + b·y + dx, c·x + d·y + dy); black beyond the border."""
    rows = [torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x)) for v in (a, b, dx, c, d, dy)]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
