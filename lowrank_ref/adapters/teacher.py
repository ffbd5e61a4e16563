"""What BA-LoRA compares: the logits of the pretrained model, and those of the tokens that a response consists of."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lowrank_ref.core.layers import disabled


def response_logits(
    logits: Float[Tensor, "batch length classes"], labels: Int64[Tensor, "batch length"], *, ignore: int = -100
) -> Float[Tensor, "rows classes"]:
    """Return the logits (rows, classes) of the places t whose *next* label is not ignored: each predicts a response.

    Raises:
        ValueError: labels of another shape, or none to predict.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, wanted {tuple(logits.shape[:2])}")
    rows = logits[:, :-1][labels[:, 1:] != ignore]
    if not len(rows):
        raise ValueError(f"labels: got none but {ignore} from the second place on, wanted at least one to predict")
    return rows


@torch.no_grad()
def teacher_logits(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """Return the logits of the pretrained model: all adapters off, dropout off, no gradient.

    What trains beside the adapters, such as a new head, is used as it is now. A model without adapters: a ValueError.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with disabled(model.eval()):
            out = model(*inputs, **named)
    finally:
        for module, training in modes:
            module.training = training
    return getattr(out, "logits", out)
