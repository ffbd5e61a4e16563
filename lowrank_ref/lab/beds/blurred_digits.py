"""A small vision transformer that knows sharp digits, and the same digits at lower resolution.

Real MNIST digits of 28x28 pixels (`mnist5k`). The transformer has four blocks of width 32 and 4x4 patches of 7x7
pixels; its features are compared with ten class vectors, which stand in for a text tower: nothing but the transformer
may be adapted. Adaptation sees training pictures without labels.

    base = sharp_vit(seed)                                   # about 10 s, once a seed
    model = add_lr_tokens(copy.deepcopy(base.model), r"^blocks\\.\\d$", places=16, dim=32, embed="^embed$")
    distil(base, model, lr=3e-3, seed=seed)                  # 100 steps, about 3 s
    resolution_accuracies(base, model)                       # of test digits, at all of SIDES
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.lab.data import Arrays, mnist5k
from lowrank_ref.lab.data.batches import array_batches
from lowrank_ref.lab.models import ViT
from lowrank_ref.lab.train import train, warmup_cosine
from lowrank_ref.robustness.low_resolution import Bucket, low_resolution
from lowrank_ref.robustness.lr0_fm import MultiScaleDistillation, contrastive_distance

__all__ = [
    "BUCKETS",
    "SIDES",
    "SharpViT",
    "agreement",
    "block_errors",
    "distil",
    "resolution_accuracies",
    "sharp_vit",
]

#: Sides in pixels at which models are judged; 28 is sharp.
SIDES = (28, 14, 10, 7, 5)
#: The paper's three ranges of sides, scaled from 224 to 28 pixels and widened at the lower end, where digits are lost.
BUCKETS: tuple[Bucket, ...] = ((5, 8), (8, 12), (12, 20))
SHAPE = {"dim": 32, "layers": 4, "heads": 2}


class SharpViT(NamedTuple):
    """A frozen transformer whose output is a feature (batch, 32), class vectors (10, 32) of length 1, and its features.

    `features` are those of all training pictures, of length 1: what a tuned copy has to hit.
    """

    model: ViT
    classes: Tensor
    features: Tensor


@functools.cache
def _digits() -> Arrays:
    return mnist5k()


def sharp_vit(seed: int, *, steps: int = 250) -> SharpViT:
    """Train a transformer on sharp digits: AdamW at 5e-3, batches of 64, cross-entropy of 10 times the cosines.

    Args:
        seed: of its weights and of the batches.
        steps: of the optimizer, with a tenth of warm-up and a cosine to a tenth.
    """
    data = _digits()
    model = ViT(28, 7, classes=10, generator=torch.Generator().manual_seed(seed), **SHAPE)
    classes = model.head.weight

    def loss(both: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(10 * F.normalize(model(x), dim=1) @ F.normalize(classes, dim=1).T, y)

    both = nn.ModuleList([model, model.head])  # whose class vectors train, though the features pass them by
    model.add_module("head", nn.Identity())
    adam = torch.optim.AdamW(both.parameters(), lr=5e-3, weight_decay=0.01)
    batch = array_batches(data.x_train, data.y_train, batch=64, seed=seed)
    schedule = warmup_cosine(steps, warmup=max(1, steps // 10))
    train(both, batch, loss, adam, steps=steps, schedule=schedule, progress=False)
    model.requires_grad_(False)
    return SharpViT(model, F.normalize(classes.detach(), dim=1), _unit(model, data.x_train))


def distil(
    base: SharpViT,
    model: nn.Module,
    *,
    lr: float,
    seed: int,
    steps: int = 100,
    buckets: Sequence[Bucket] = BUCKETS,
    distance: Callable[[Tensor, Tensor, Tensor], Tensor] = contrastive_distance,
    pictures: Float[Tensor, "n 1 28 28"] | None = None,
) -> nn.Module:
    """Train whatever trains in the model by `MultiScaleDistillation`, on batches of 16 pictures without labels.

    Args:
        base: the teacher.
        model: a copy of its model, changed in place.
        lr: learning rate of AdamW, without decay; a tenth of warm-up, a cosine to a tenth; gradients clipped at 1.
        seed: of batches and sides.
        steps: of the optimizer.
        buckets, distance: see `MultiScaleDistillation`.
        pictures: to learn from, values as those of the digits; default the 4,000 training digits.
    """
    x = _digits().x_train if pictures is None else pictures
    t = base.features if pictures is None else _unit(base.model, pictures)
    loss = MultiScaleDistillation(buckets, distance=distance)
    both = nn.ModuleList([model, loss])
    adam = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    rows = array_batches(x, t, batch=16, seed=1000 + seed)

    def batch(step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        x, t = rows(step)
        return x, t, torch.Generator().manual_seed(100_003 * seed + step)

    def objective(both: nn.Module, x: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        return loss(model, x, t, generator)

    schedule = warmup_cosine(steps, warmup=max(1, steps // 10))
    train(both, batch, objective, adam, steps=steps, schedule=schedule, clip=1.0, progress=False)
    return model


@torch.no_grad()
def _unit(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([F.normalize(model(part), dim=1) for part in x.split(500)])


def resolution_accuracies(base: SharpViT, model: nn.Module, sides: Sequence[int] = SIDES) -> dict[int, float]:
    """Return side -> share of the 600 test digits whose feature is nearest to its class vector."""
    data, found = _digits(), {}
    for side in sides:
        features = _unit(model, low_resolution(data.x_test, side))
        found[side] = float(((features @ base.classes.T).argmax(1) == data.y_test).double().mean())
    return found


def agreement(base: SharpViT, model: nn.Module, sides: Sequence[int] = SIDES) -> float:
    """Return how often a small validation digit gets the class that the frozen model gives the sharp one.

    It is a mean over the 400 digits and all sides. It needs no label, so rates may be chosen by it.
    """
    x = _digits().x_valid
    wanted = (_unit(base.model, x) @ base.classes.T).argmax(1)
    found = [(_unit(model, low_resolution(x, side)) @ base.classes.T).argmax(1) for side in sides]
    return float(torch.stack([(classes == wanted).double().mean() for classes in found]).mean())


@torch.no_grad()
def block_errors(
    model: nn.Module, side: int, *, reference: nn.Module | None = None, pooled: bool = False
) -> list[float]:
    """Return, in front of the blocks and behind each, how far the stream of small test digits is from the sharp one.

    Each is the Frobenius norm of the difference, over that of the sharp stream, for the first 200 test digits; the
    first one is measured with positions and T_0, in front of T_1.

    Args:
        model: sees the small pictures.
        side: of these, in pixels.
        reference: sees the sharp ones; default the model itself.
        pooled: average each stream over the patches first, as `forward_inter_features` of the official code does.
    """
    x = _digits().x_test[:200]
    sharp, small = _streams(reference or model, x), _streams(model, low_resolution(x, side))
    if pooled:
        sharp, small = ([stream.mean(1) for stream in streams] for streams in (sharp, small))
    return [float((b - a).norm() / a.norm()) for a, b in zip(sharp, small)]


def _streams(model: nn.Module, x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    blocks = list(model.get_submodule("blocks").children())
    hooks = [blocks[0].register_forward_pre_hook(lambda m, a: found.append(a[0]))]
    hooks += [block.register_forward_hook(lambda m, a, out: found.append(out)) for block in blocks]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
