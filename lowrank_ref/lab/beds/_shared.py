"""What the beds share: how an arm adapts a model, and the optimizer over what then trains."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowrank_ref.lab.train import Steppable

Adapt = Callable[[nn.Module, torch.Generator], Iterable[Any] | None]
Actions = Callable[[nn.Module, torch.optim.Optimizer], Sequence[Steppable]]


def classification_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy, in nats."""
    return F.cross_entropy(model(x), y)


def adapted(adapt: Adapt, model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    """Let `adapt` change the model; return Adam over what trains, the groups' "lr" being factors on `lr`."""
    groups = adapt(model, torch.Generator().manual_seed(seed))
    if groups is None:
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    return torch.optim.Adam([{**group, "lr": lr * group.get("lr", 1.0)} for group in groups])
