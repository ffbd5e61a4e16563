"""Balls around images: the exact projection on an l1, l2 or l∞ ball cut by the box [0, 1]^d, and ascent directions.

The geometry under `attacks`. Common libraries scale a perturbation into the ball and clip it to the box afterwards; the
result lies in both, but it is not the nearest point, and for l1 most of the budget is lost. Here ball and box are
projected on together, exactly, from one sort: d numbers a sample for l2, 2d for l1, computed in float64 inside.

Letters: x are clean images (batch, ...) in [0, 1], u points near them, δ = u - x, d pixels, radius ε, norm p.
Sources: Croce and Hein, arXiv 2103.01208, section 3 (l1 ∩ box and the sparse step); the l2 form is the same argument.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_finite, check_floating, check_number

#: The threat models, by their p.
NORMS = (math.inf, 2, 1)


def check_threat(x: Tensor, norm: float, epsilon: float) -> None:
    """Require a non-empty batch of images in [0, 1], a norm of `NORMS` and a radius >= 0.

    Raises:
        TypeError: x is no floating-point tensor, or epsilon no number.
        ValueError: anything else.
    """
    check_floating("x", x)
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted a batch (n, ...) with n >= 1 and at least one pixel")
    check_finite("x", x)
    if bool((x < 0).any()) or bool((x > 1).any()):
        raise ValueError(f"x: got values from {x.min().item()!r} to {x.max().item()!r}, wanted images in [0, 1]")
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, wanted one of {NORMS}")
    check_number("epsilon", epsilon, low=0)


def project(
    z: Float[Tensor, "batch *shape"], x: Float[Tensor, "batch *shape"], *, norm: float, epsilon: float
) -> Float[Tensor, "batch *shape"]:
    """Return the point of {u : ‖u - x‖_p <= ε, 0 <= u <= 1} that is nearest to z in the Euclidean sense.

    Args:
        z: any finite points, of the shape of x, floating point.
        x: centres in [0, 1].
        norm: p, one of math.inf, 2, 1.
        epsilon: radius ε >= 0.

    Raises:
        TypeError, ValueError: another norm, ε < 0, x outside [0, 1], or a z that is none.

    Example:
        >>> project(torch.tensor([[2.0, 0.9]]), torch.tensor([[0.5, 0.5]]), norm=1, epsilon=0.75).tolist()
        [[1.0, 0.75]]
    """
    check_threat(x, norm, epsilon)
    check_floating("z", z)
    check_finite("z", z)
    if z.shape != x.shape:
        raise ValueError(f"z: got shape {tuple(z.shape)}, wanted that of x, {tuple(x.shape)}")
    if norm == math.inf:
        return torch.minimum(torch.maximum(z, x - epsilon), x + epsilon).clamp(0, 1)
    centre = x.flatten(1).double()
    step = z.flatten(1).double() - centre
    room = torch.where(step > 0, 1 - centre, centre)  # how far the box lets a pixel go in the direction of its step
    size = (_shrink_l1 if norm == 1 else _shrink_l2)(step.abs(), room, epsilon)
    return (centre + step.sign() * size).clamp(0, 1).to(z.dtype).view_as(z)


def _shrink_l1(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """Return min((a - τ)+, b) with the smallest τ >= 0 that keeps the row sums within ε.

    A row's sum is φ(τ) = Σ (a - τ)+ - (a - b - τ)+, piecewise linear. Walking down its sorted knots, a (slope +1) and
    a - b (slope -1), cumulative sums give φ at every knot; τ lies below the last knot with φ <= ε.
    """
    knots, order = torch.cat([a, a - b], 1).sort(1, descending=True)
    slopes = torch.where(order < a.shape[1], 1.0, -1.0).to(a.dtype).cumsum(1)  # of φ below each knot
    rises = slopes[:, :-1] * -knots.diff(dim=1)
    phi = F.pad(rises.cumsum(1), (1, 0))
    last = ((phi <= epsilon).sum(1, keepdim=True) - 1).clamp_min(0)
    knot, slope, below = (t.gather(1, last) for t in (knots, slopes, phi))
    tau = (knot - (epsilon - below) / slope.clamp_min(1)).clamp_min(0)
    return torch.minimum((a - tau).clamp_min(0), b)


def _shrink_l2(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """Return min(s·a, b) with the largest s in [0, 1] that keeps the row norms within ε.

    ‖·‖² is Σ b² over pixels at their bound plus s² Σ a² over the others; pixels reach the bound at s = b/a, in order.
    """
    reach, order = (b / a.clamp_min(torch.finfo(a.dtype).tiny)).clamp_max(1).sort(1)
    b2, a2 = torch.minimum(a, b).square().gather(1, order), a.square().gather(1, order)
    at_bound = b2.cumsum(1) - b2  # of the pixels before this one
    free = a2.flip(1).cumsum(1).flip(1)  # of this one and those after
    used = at_bound + reach.square() * free  # squared norm when this pixel reaches its bound: rises along the row
    first = (used < epsilon**2).sum(1, keepdim=True).clamp_max(a.shape[1] - 1)
    room = (epsilon**2 - at_bound.gather(1, first)).clamp_min(0)
    s = (room / free.gather(1, first).clamp_min(torch.finfo(a.dtype).tiny)).sqrt().clamp_max(1)
    return torch.minimum(s * a, b)


def ascent(
    G: Float[Tensor, "batch *shape"],
    u: Float[Tensor, "batch *shape"],
    *,
    norm: float,
    sparsity: float | Float[Tensor, " batch"] = 0.05,
) -> Float[Tensor, "batch *shape"]:
    """Return the direction of length 1 in the p-norm: sign(G), G/‖G‖₂, or the signs of the k largest entries over k.

    For p = 1 the k are chosen among the pixels that the box lets move: a pixel at 0 or 1 with a gradient pointing out
    would be chosen again and again (as in the sparse l1 descent of Tramer and Boneh, 1904.13000).

    Args:
        G: gradient, finite. Where it is 0 the direction is 0.
        u: the point, in [0, 1].
        norm: p.
        sparsity: k/d for p = 1, in (0, 1], one number or one per sample; k is at least 1.

    Raises:
        TypeError, ValueError: G is not floating point or not finite, u has another shape, or another norm.
    """
    check_floating("G", G)
    check_finite("G", G)
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, wanted one of {NORMS}")
    if u.shape != G.shape:
        raise ValueError(f"u: got shape {tuple(u.shape)}, wanted that of G, {tuple(G.shape)}")
    if norm == math.inf:
        return G.sign()
    g, tiny = G.flatten(1), torch.finfo(G.dtype).tiny
    if norm == 2:
        g = g / g.abs().amax(1, keepdim=True).clamp_min(tiny)  # squares of small or large numbers are out of range
        return (g / g.norm(dim=1, keepdim=True).clamp_min(tiny)).view_as(G)
    g = torch.where(((u <= 0) & (G < 0) | (u >= 1) & (G > 0)).flatten(1), 0.0, g)
    k = (torch.as_tensor(sparsity, device=g.device) * g.shape[1]).long().clamp(1, g.shape[1]).expand(len(g))
    least = g.abs().sort(1, descending=True).values.gather(1, k[:, None] - 1)
    u = torch.where(g.abs() >= least, g.sign(), 0.0)
    return (u / u.abs().sum(1, keepdim=True).clamp_min(1)).view_as(G)
