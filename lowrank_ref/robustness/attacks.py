"""Attacks on classifiers of images in [0, 1]: PGD and APGD in an l1, l2 or l∞ ball.

The shared tool of the robustness chapters. An attack works on a batch, sample by sample, and looks for the point of
{u : ‖u - x‖_p <= ε} ∩ [0, 1]^d where the loss is largest. Projections and step directions are in `projections`, losses
in `attack_losses`.

| source                                                       | here                          |
|--------------------------------------------------------------|-------------------------------|
| PGD (Madry et al., 1706.06083)                               | `pgd`                         |
| APGD for l∞, l2 (Croce and Hein, 2003.01690, algorithm 1)    | `apgd`, `halving_checkpoints` |
| APGD for l1 (Croce and Hein, 2103.01208)                     | `apgd`                        |

Letters: x, y are clean images (batch, ...) and their labels; u a point near x; G the gradient at u; N steps.

Deviations. `pgd` takes steps that fall linearly to 0 and returns the best iterate, not the last. APGD here runs once
from one start; restarts are the caller's, through `start`. Steps of the l1 attacks pass over pixels that cannot move.

Cost: N + 1 forward and backward passes. The model is in eval mode during the attack and as before after it; its
weights get no gradients. An attack computes in the dtype of x: keep x in float32 under autocast.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.modes import eval_mode
from lowrank_ref.robustness.attack_losses import check_labels, cross_entropy
from lowrank_ref.robustness.projections import ascent, check_threat, project

SampleLoss = Callable[[Tensor, Tensor], Tensor]


class Attacked(NamedTuple):
    """What an attack found.

    `x_best` is the point with the largest loss seen, `loss` that loss; `x_adv` is the last misclassified point, or
    `x_best` where none was seen. Train on `x_best`, evaluate on `x_adv`.

    Example:
        >>> import math, torch
        >>> from lowrank_ref.robustness import pgd
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> found = pgd(model, x, y, norm=math.inf, epsilon=0.1)
        >>> bool((found.x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    x_best: Tensor
    loss: Tensor
    x_adv: Tensor


# --- attacks ----------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def pgd(
    model: nn.Module,
    x: Float[Tensor, "batch *shape"],
    y: Int64[Tensor, " _"],
    *,
    norm: float,
    epsilon: float,
    steps: int = 10,
    loss: SampleLoss = cross_entropy,
    start: Tensor | None = None,
    sparsity: float = 0.05,
) -> Attacked:
    """Projected gradient ascent with steps ε, ε(1 - 1/N), ..., ε/N.

    Args:
        model: maps images to logits.
        x: clean images in [0, 1].
        y: labels, one per image.
        norm: p, one of math.inf, 2, 1.
        epsilon: radius ε >= 0.
        steps: N >= 1.
        loss: (logits, y) -> one number per sample, to be made large.
        start: first points, projected; default x. See `random_start`.
        sparsity: share of the pixels that a step of the l1 attack moves, in (0, 1].

    Raises:
        TypeError, ValueError: ε < 0, another norm, images outside [0, 1], an empty batch, labels that do not fit,
            steps < 1, sparsity out of range; or NaN in what the model, the loss or its gradient gives for an image,
            which would else pass for robust.
    """
    x, y, u = _begin(x, y, norm, epsilon, steps, sparsity, start)
    with eval_mode(model):
        seen = _Seen(model, y, loss, u)
        for i in range(steps):
            size = epsilon * (1 - i / steps)
            u = project(u + size * ascent(seen.G, u, norm=norm, sparsity=sparsity), x, norm=norm, epsilon=epsilon)
            seen.look(u)
    return seen.result()


@torch.inference_mode(False)
def apgd(
    model: nn.Module,
    x: Float[Tensor, "batch *shape"],
    y: Int64[Tensor, " _"],
    *,
    norm: float,
    epsilon: float,
    steps: int = 10,
    loss: SampleLoss = cross_entropy,
    start: Tensor | None = None,
    sparsity: float = 0.05,
) -> Attacked:
    """Auto-PGD: a step size per sample that is halved (l∞, l2) or a step that grows sparser (l1) when progress stalls.

    Arguments and errors as `pgd`; `sparsity` is only where the l1 attack begins (0.05 in training, 0.2 to evaluate).
    """
    x, y, u = _begin(x, y, norm, epsilon, steps, sparsity, start)
    old = u
    with eval_mode(model):
        seen = _Seen(model, y, loss, u)
        plan = _Sparser(x, sparsity, steps) if norm == 1 else _Halving(seen, steps)
        for i in range(1, steps + 1):
            step = epsilon * _per_row(plan.size, x) * ascent(seen.G, u, norm=norm, sparsity=plan.sparsity)
            z = project(u + step, x, norm=norm, epsilon=epsilon)
            if norm != 1 and i > 1:
                z = project(u + 0.75 * (z - u) + 0.25 * (u - old), x, norm=norm, epsilon=epsilon)
            old, u = u, z
            seen.look(u)
            u = seen.back_to_best(plan.restarts(i, seen), u)
    return seen.result()


def random_start(
    x: Float[Tensor, "batch *shape"], *, norm: float, epsilon: float, generator: torch.Generator | None = None
) -> Float[Tensor, "batch *shape"]:
    """Return points of ball ∩ box: x plus Gaussian noise (uniform for l∞) about as long as ε, projected.

    Raises:
        TypeError, ValueError: another norm, ε < 0, or x outside [0, 1].
    """
    check_threat(x, norm, epsilon)
    x = x.detach()
    device = generator.device if generator is not None else x.device
    draw = torch.rand if norm == math.inf else torch.randn
    noise = draw(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
    noise = 2 * noise - 1 if norm == math.inf else noise / _per_row(noise.flatten(1).norm(p=norm, dim=1), x)
    return project(x + epsilon * noise, x, norm=norm, epsilon=epsilon)


def halving_checkpoints(steps: int) -> list[int]:
    """Return the iterations (from 1) after which APGD may halve its step: first 22 % of N, then ever shorter waits."""
    wait, done = max(int(0.22 * steps), 1), []
    at = wait
    while at <= steps:
        done.append(at)
        wait = max(wait - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        at += wait
    return done


def check_known(name: str, known: Bool[Tensor, "batch *shape"]) -> None:
    """Require that everything is known of every image. What is NaN would be compared with, and pass for robust.

    Raises:
        ValueError: with the number of images of which something is not.
    """
    bad = int((~known.reshape(len(known), -1).all(1)).sum())
    if bad:
        hint = ", as a norm has at 0; another start may have one (start=...)" if name == "gradient" else ""
        raise ValueError(f"{name}: got NaN or infinity for {bad} of {len(known)} images, wanted finite numbers{hint}")


# --- inside -----------------------------------------------------------------------------------------------------------


def _begin(
    x: Tensor, y: Tensor, norm: float, epsilon: float, steps: int, sparsity: float, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of an attack; return images, labels and first points, free of graphs and inference mode."""
    check_threat(x, norm, epsilon)
    if y.shape != x.shape[:1]:
        raise ValueError(f"y: got shape {tuple(y.shape)}, wanted ({len(x)},), a label for each image")
    check_integer("steps", steps, low=1)
    check_number("sparsity", sparsity, low=0, high=1, open_low=True)
    x, y = _free(x), _free(y)
    return x, y, x if start is None else project(_free(start), x, norm=norm, epsilon=epsilon)


def _free(t: Tensor) -> Tensor:
    return t.detach().clone() if t.is_inference() else t.detach()


def _per_row(value: Tensor, x: Tensor) -> Tensor:
    """Shape one number per sample so that it broadcasts over images."""
    return value.view(-1, *[1] * (x.ndim - 1))


class _Seen:
    """The points an attack has looked at: loss and gradient of the last one, and the best so far."""

    def __init__(self, model: nn.Module, y: Tensor, loss: SampleLoss, u: Tensor) -> None:
        self.model, self.y, self.loss = model, y, loss
        self.value, self.G, wrong = self._evaluate(u)
        self.x_best, self.top, self.G_best, self.rose = u, self.value, self.G, torch.zeros_like(wrong)
        self.x_wrong, self.fooled = u, wrong

    def _evaluate(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            logits = self.model(u)
            if logits.ndim != 2 or len(logits) != len(u):
                raise ValueError(f"model: got output of shape {tuple(logits.shape)}, wanted ({len(u)}, classes)")
            check_labels(self.y, logits.shape[1])
            value = self.loss(logits.to(u.dtype), self.y)
            (G,) = torch.autograd.grad(value.sum(), u)
        check_known("logits", ~logits.isnan())
        check_known("loss", ~value.isnan())
        check_known("gradient", G.isfinite())
        return value.detach(), G, logits.argmax(1) != self.y

    def look(self, u: Tensor) -> None:
        before = self.value
        self.value, self.G, wrong = self._evaluate(u)
        self.rose, better = self.value > before, _per_row(self.value > self.top, u)
        self.x_best, self.G_best = torch.where(better, u, self.x_best), torch.where(better, self.G, self.G_best)
        self.top = torch.maximum(self.value, self.top)
        self.x_wrong, self.fooled = torch.where(_per_row(wrong, u), u, self.x_wrong), self.fooled | wrong

    def back_to_best(self, rows: Tensor, u: Tensor) -> Tensor:
        rows = _per_row(rows, u)
        self.G = torch.where(rows, self.G_best, self.G)
        return torch.where(rows, self.x_best, u)

    def result(self) -> Attacked:
        x_adv = torch.where(_per_row(self.fooled, self.x_best), self.x_wrong, self.x_best)
        return Attacked(self.x_best, self.top, x_adv)


class _Halving:
    """Step 2ε, halved at a checkpoint where the loss rose too rarely, or the best loss stood still at a kept step."""

    sparsity = 1.0

    def __init__(self, seen: _Seen, steps: int) -> None:
        self.checkpoints, self.last = set(halving_checkpoints(steps)), 0
        self.size, self.top = torch.full_like(seen.top, 2.0), seen.top
        self.rises, self.halved = torch.zeros_like(seen.top), torch.zeros_like(seen.rose)

    def restarts(self, i: int, seen: _Seen) -> Tensor:
        self.rises = self.rises + seen.rose
        if i not in self.checkpoints:
            return torch.zeros_like(seen.rose)
        self.halved = (self.rises < 0.75 * (i - self.last)) | (~self.halved & (seen.top <= self.top))
        self.size = torch.where(self.halved, self.size / 2, self.size)
        self.rises, self.top, self.last = torch.zeros_like(self.rises), seen.top, i
        return self.halved


class _Sparser:
    """Step ε on a share of the pixels; both shrink with the support of the best perturbation."""

    def __init__(self, x: Tensor, sparsity: float, steps: int) -> None:
        self.x, self.every = x, max(int(0.04 * steps), 1)
        d = x[0].numel()
        self.size, self.support = x.new_ones(len(x)), x.new_full((len(x),), d)
        self.sparsity = x.new_full((len(x),), sparsity)

    def restarts(self, i: int, seen: _Seen) -> Tensor:
        if i % self.every:
            return torch.zeros_like(seen.rose)
        support = (seen.x_best != self.x).flatten(1).sum(1).to(self.x.dtype)
        shrank = support < 0.95 * self.support
        self.size = torch.where(shrank, 1.0, (self.size / 1.5).clamp_min(0.1))
        self.sparsity, self.support = support / self.x[0].numel() / 1.5, support
        return shrank
