"""Uncertainty of a classifier by Monte Carlo dropout (Gal and Ghahramani, arXiv 1506.02142)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.core.checks import check_integer
from lowrank_ref.core.modes import eval_mode


@torch.no_grad()
def dropout_probabilities(
    model: nn.Module, x: Tensor, *, passes: int = 8, seed: int = 0
) -> Float[Tensor, "batch classes"]:
    """Return the mean of softmax(model(x)) over passes in which the dropout layers act and all others are in eval mode.

    Its entropy is the uncertainty by Monte Carlo dropout. Without a dropout layer all passes are alike. Modes and
    PyTorch's own random state are afterwards as they were.

    Args:
        model: returns logits.
        x: its input.
        passes: >= 1.
        seed: of the dropout; PyTorch's layers take no generator.

    Raises:
        TypeError, ValueError: passes or seed is no integer, or out of range.
    """
    check_integer("passes", passes, low=1)
    check_integer("seed", seed, low=0)
    with eval_mode(model), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for module in model.modules():
            module.training = isinstance(module, nn.modules.dropout._DropoutNd)
        torch.manual_seed(seed)
        return torch.stack([model(x).softmax(1) for _ in range(passes)]).mean(0)
