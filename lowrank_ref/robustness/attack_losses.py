"""What an attack makes large: one number per sample, from logits and labels.

| source                                              | here            |
|-----------------------------------------------------|-----------------|
| cross-entropy                                       | `cross_entropy` |
| DLR (Croce and Hein, 2003.01690, section 4)         | `dlr`           |
| DLR towards a class (the same, section 4)           | `targeted_dlr`, `ranked_class` |

Cross-entropy has no gradient left where the network is certain (in float32 from a margin of about 100 on). The
difference of logits ratio (DLR) does not change when logits are scaled or shifted, so certainty does not protect.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer

#: PyTorch would give this label the loss 0, whatever the logits. By default it is -100.
NO_LABEL = -(2**62)


def check_labels(y: Tensor, classes: int) -> None:
    """Require int64 labels from 0 to classes - 1. The losses leave this to the attacks: it needs a look at the labels.

    Raises:
        TypeError: another dtype.
        ValueError: a label out of range.
    """
    if y.dtype != torch.int64:
        raise TypeError(f"y: got dtype {y.dtype}, wanted labels of torch.int64")
    if bool(((y < 0) | (y >= classes)).any()):
        raise ValueError(f"y: got labels from {int(y.min())} to {int(y.max())}, wanted 0 to {classes - 1}")


def cross_entropy(logits: Float[Tensor, "batch classes"], y: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return the cross-entropy of every sample, in nats. No label is ignored: one of -100 raises PyTorch's error."""
    return F.cross_entropy(logits, y, reduction="none", ignore_index=NO_LABEL)


def dlr(logits: Float[Tensor, "batch classes"], y: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return (best other - true) / (largest - third largest logit): unchanged by scale and shift, > 0 where fooled.

    Raises:
        ValueError: fewer than 3 classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"logits: got {logits.shape[1]} classes, wanted at least 3 for the DLR loss")
    top = logits.topk(3, dim=1).values
    true = logits.gather(1, y[:, None])
    other = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return (other - true[:, 0]) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def ranked_class(
    logits: Float[Tensor, "batch classes"], y: Int64[Tensor, " batch"], target: int = 1
) -> Int64[Tensor, " batch"]:
    """Return of every sample the wrong class with the `target`-th largest logit, 1 = the best.

    Raises:
        TypeError, ValueError: target is not an integer in [1, classes).
    """
    check_integer("target", target, low=1)
    if target >= logits.shape[1]:
        raise ValueError(f"target: got {target} with {logits.shape[1]} classes, wanted target < classes")
    return logits.scatter(1, y[:, None], -math.inf).topk(target, dim=1).indices[:, -1]


def targeted_dlr(
    logits: Float[Tensor, "batch classes"],
    y: Int64[Tensor, " batch"],
    *,
    target: int = 1,
    classes: Int64[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return (target - true) / (largest - mean of third and fourth logit).

    Args:
        logits: at least 4 classes.
        y: labels.
        target: which wrong class to aim at, 1 = the best at this point: another one as soon as the ranks change.
        classes: the class to aim at, of each sample. An attack such as APGD-T keeps the one of the clean image:
            `partial(targeted_dlr, classes=ranked_class(model(x), y, target))`.

    Raises:
        ValueError: fewer than 4 classes, or target not in [1, classes - 1].
    """
    check_integer("target", target, low=1)
    if logits.shape[1] < 4 or target >= logits.shape[1]:
        raise ValueError(f"target: got {target} with {logits.shape[1]} classes, wanted target < classes, classes >= 4")
    top = logits.topk(4, dim=1).values
    aim = ranked_class(logits, y, target) if classes is None else classes
    true, wrong = (logits.gather(1, label[:, None])[:, 0] for label in (y, aim))
    return (wrong - true) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(1e-12)
