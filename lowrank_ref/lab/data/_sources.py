"""Where data come from, and how a fixed split is drawn."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrays:
    """Inputs (float32) and targets (int64) of a fixed train / test split, with where they come from."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    name: str
    source: str
    licence: str


def hub() -> bool:
    choice = os.environ.get("LOWRANK_DATA", "embedded")
    if choice not in ("embedded", "hub"):
        raise ValueError(f"LOWRANK_DATA: got {choice!r}, wanted 'embedded' (the default) or 'hub'")
    return choice == "hub"


def split(n: int, train: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:train], order[train:]
