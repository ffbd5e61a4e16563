"""MNIST digits of 14x14 pixels lit from a side, a few labelled ones in which the light tells the class, and a VAE.

data = lit_digits(seed)                      # 300 labelled, light tied to the class; 3,500 unlabelled, light free
vae = train_vae(data.unlabelled, seed=seed)  # 3 s; vae.generator, vae.encode
model = train_lit(data, edited, lr=1e-3, seed=seed)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.lab.data import array_batches, mnist5k
from lowrank_ref.lab.models import MLP
from lowrank_ref.lab.train import linear_decay, train

__all__ = ["DigitVAE", "LitDigits", "light_reading", "lit", "lit_digits", "train_lit", "train_vae"]

SIDE = 14
LABELLED, VALID, GAIN = 300, 200, 0.8
#: How the light goes with the class: as in the labelled images, anyhow, or the other way round.
LIGHTS = ("iid", "uniform", "anti")

_Pair = tuple[Tensor, Tensor]


def lit(x: Float[Tensor, "n 1 h w"], light: Float[Tensor, " n"]) -> Float[Tensor, "n 1 h w"]:
    """Return (0.3 + 0.7x)(1 + 0.8·L·r)/1.8, paper of reflectance 0.3 to 1 under a light that falls from one side.

    Args:
        x: images in [0, 1].
        light: L in [-1, 1]; r rises from -1 at the left edge to 1 at the right.

    Returns:
        Images in (0, 1].
    """
    ramp = torch.linspace(-1, 1, x.shape[-1])
    return (0.3 + 0.7 * x) * (1 + GAIN * light.view(-1, 1, 1, 1) * ramp) / (1 + GAIN)


@dataclass(frozen=True)
class LitDigits:
    """Images (n, 1, 14, 14) in [0, 1] and labels.

    Attributes:
        labelled: 300 images to learn from. Digits 0 to 4 are lit from the right, the others from the left.
        unlit: the 300 as they were before, in [0, 1]: for whoever may light them anew.
        valid: 200 more of that kind, to choose by.
        unlabelled: 3,500 images, the light free.
        light: L of the unlabelled images: to measure with.
        classes: their labels: to measure with.
        tests: "iid", "uniform", "anti", "above" -> 1,000 images in four lights: as in the labelled ones, free, the
            other way, and free but from above or below, which no other image shows.
    """

    labelled: _Pair
    unlit: Tensor
    valid: _Pair
    unlabelled: Tensor
    light: Tensor
    classes: Tensor
    tests: dict[str, _Pair]


@cache
def _pooled() -> tuple[_Pair, _Pair]:
    data = mnist5k()
    held = torch.cat([data.x_test[:600], data.x_valid[:400]]), torch.cat([data.y_test[:600], data.y_valid[:400]])
    return (F.avg_pool2d(data.x_train[:4000], 2), data.y_train[:4000]), (F.avg_pool2d(held[0], 2), held[1])


def lit_digits(seed: int) -> LitDigits:
    """Return the digits of `mnist5k`, each 2x2 pixels averaged, split and lit.

    Its 4,000 training images are dealt to the labelled, the valid and the unlabelled ones; its test and validation
    images make the tests, the same 1,000 in all four.

    Args:
        seed: of the split and of all lights.

    Raises:
        TypeError: the seed is no whole number.
    """
    check_integer("seed", seed)
    g = torch.Generator().manual_seed(seed)
    (x, y), (x_test, y_test) = _pooled()
    rows = torch.randperm(len(x), generator=g)
    few, valid, many = rows.split([LABELLED, VALID, len(x) - LABELLED - VALID])
    tied = {name: (lit(x[part], _light(y[part], "iid", g)), y[part]) for name, part in (("few", few), ("valid", valid))}
    light = _light(y[many], "uniform", g)
    tests = {how: (lit(x_test, _light(y_test, how, g)), y_test) for how in LIGHTS}
    tests["above"] = (lit(x_test.mT, _light(y_test, "uniform", g)).mT, y_test)
    return LitDigits(tied["few"], x[few], tied["valid"], lit(x[many], light), light, y[many], tests)


def _light(y: Int64[Tensor, " n"], how: str, g: torch.Generator) -> Float[Tensor, " n"]:
    """L uniform in [-1, 1], or of size 0.3 to 1 with the sign that the class has, or the opposite one."""
    u = torch.rand(len(y), generator=g)
    if how == "uniform":
        return 2 * u - 1
    return torch.where((y < 5) == (how == "iid"), 1.0, -1.0) * (0.3 + 0.7 * u)


def light_reading(x: Float[Tensor, "n 1 h w"], light: Float[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    """Return images -> L, a least-squares fit on these images: to measure how much an edit turns the light."""

    def rows(x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), x.new_ones(len(x), 1)], 1).double()

    fit = torch.linalg.lstsq(rows(x), light.double()[:, None]).solution
    return lambda x: (rows(x) @ fit)[:, 0]


class DigitVAE(nn.Module):
    """A variational autoencoder of three linear layers each way.

    `generator[0]` is the linear layer that reads the code; for several codes it is cut behind `generator[:2]`.

    Args:
        latent: width d of the code.
        width: of the hidden layers.
        first: factor on the start of `generator[0].weight`. At PyTorch's own start (1) the columns of entries of the
            code that are never used keep more than half of their squared length.
        generator: draws the weights.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self, latent: int = 16, width: int = 128, *, first: float = 0.1, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_integer("latent", latent, low=1)
        check_integer("width", width, low=1)
        check_number("first", first, low=0)
        pixels = SIDE * SIDE
        there = MLP((pixels, width, width, 2 * latent), generator=generator)
        back = MLP((latent, width, width, pixels), generator=generator).layers
        with torch.no_grad():
            next(back[0].parameters()).mul_(first)  # its weight
        self.encoder = nn.Sequential(nn.Flatten(), there)
        self.generator = nn.Sequential(
            back[0], nn.ReLU(), back[1], nn.ReLU(), back[2], nn.Unflatten(1, (1, SIDE, SIDE))
        )

    def encode(self, x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n d"]:
        """Return the mean of the code of each image."""
        return self.encoder(x).chunk(2, 1)[0]


def train_vae(
    x: Float[Tensor, "n 1 h w"],
    *,
    seed: int,
    penalty: float = 60.0,
    epochs: int = 15,
    lr: float = 2e-3,
    batch: int = 100,
    first: float = 0.1,
) -> DigitVAE:
    """Train a VAE by Adam on κ‖x̂ - x‖² + KL(q(z|x) ‖ N(0, I)), its rate falling to 0; return it frozen.

    Args:
        x: images, no labels.
        seed: of weights, order and noise.
        penalty: κ > 0, on the squared error; 1/(2σ²) of pixels with Gaussian noise σ.
        epochs, lr, batch: of the training.
        first: as for `DigitVAE`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    check_number("penalty", penalty, low=0, open_low=True)
    check_integer("epochs", epochs, low=1)
    g = torch.Generator().manual_seed(seed)
    vae = DigitVAE(first=first, generator=g)

    def loss_fn(vae: DigitVAE, x: Tensor, _: Tensor) -> Tensor:
        mean, log_var = vae.encoder(x).chunk(2, 1)
        z = mean + torch.randn(mean.shape, generator=g) * (log_var / 2).exp()
        kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
        return (penalty * (vae.generator(z) - x).square().flatten(1).sum(1) + kl).mean()

    steps = epochs * (len(x) // batch)
    adam = torch.optim.Adam(vae.parameters(), lr=lr, fused=True)
    batches = array_batches(x, torch.zeros(len(x)), batch=batch, seed=seed)
    train(vae, batches, loss_fn, adam, steps=steps, schedule=linear_decay(steps), progress=False)
    return vae.eval().requires_grad_(False)


def train_lit(
    data: _Pair,
    edited: Callable[[nn.Module, Tensor, Tensor], Tensor] | None,
    *,
    lr: float,
    seed: int,
    epochs: int = 40,
    batch: int = 100,
    weight: float = 1.0,
) -> nn.Module:
    """Train a network of 128 hidden units by AdamW on CE(f(x), y) + γ·CE(f(edited x), y), the rate falling to 0.

    Args:
        data: images of any shape, and labels.
        edited: (model, rows, labels) -> the images of these rows to train on beside them; None trains on them alone.
        lr: first rate.
        seed: of weights and order.
        epochs, batch: of the training.
        weight: γ >= 0.

    Returns:
        The network, from images to logits.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    check_number("lr", lr, low=0, open_low=True)
    check_number("weight", weight, low=0)
    check_integer("epochs", epochs, low=1)
    x, y = data
    mlp = MLP((x[0].numel(), 128, 10), generator=torch.Generator().manual_seed(seed))
    model = nn.Sequential(nn.Flatten(), mlp)

    def loss_fn(model: nn.Module, rows: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x[rows]), y)
        return loss if edited is None else loss + weight * F.cross_entropy(model(edited(model, rows, y)), y)

    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2, fused=True)
    batches = array_batches(torch.arange(len(x)), y, batch=batch, seed=seed)
    train(model, batches, loss_fn, optimizer, steps=steps, schedule=linear_decay(steps), progress=False)
    return model.eval()
