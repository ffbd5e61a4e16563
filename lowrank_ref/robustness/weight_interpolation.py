"""WiSE-FT: the model between the original and the tuned one (Wortsman et al., arXiv 2109.01903). A rival."""

import copy

import torch
from torch import nn

from lowrank_ref.core.checks import check_number


def interpolated(start: nn.Module, end: nn.Module, share: float) -> nn.Module:
    """Return a copy of `end` with the parameters (1 - s)·start + s·end: WiSE-FT, a rival. Buffers are those of `end`.

    Raises:
        TypeError, ValueError: s outside [0, 1], or models with other parameters.
    """
    check_number("share", share, low=0, high=1)
    ours, others = dict(start.named_parameters()), dict(end.named_parameters())
    if {k: p.shape for k, p in ours.items()} != {k: p.shape for k, p in others.items()}:
        raise ValueError("end: got other parameters than start has, wanted the same names and shapes")
    mixed = copy.deepcopy(end)
    with torch.no_grad():
        for name, p in mixed.named_parameters():
            p.copy_((1 - share) * ours[name] + share * others[name])
    return mixed
