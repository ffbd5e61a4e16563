"""Where data come from, and how a fixed split is drawn."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_ref.lab._tools import need


@dataclass(frozen=True)
class Arrays:
    """Inputs (float32) and targets (int64) of a fixed split, with where they come from.

    Rates and sizes are chosen on the validation rows, results are reported on the test rows.
    """

    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor
    name: str
    source: str
    licence: str


def arrays(x: Tensor, y: Tensor, rows: Sequence[Tensor], name: str, source: str, licence: str) -> Arrays:
    """Divide inputs and targets by the rows that train, validate and test."""
    train, valid, test = rows
    return Arrays(x[train], y[train], x[valid], y[valid], x[test], y[test], name, source, licence)


def hub() -> bool:
    """Whether the environment asks for the counterparts on the hub.

    Raises:
        ValueError: LOWRANK_DATA is neither "embedded" nor "hub".
    """
    choice = os.environ.get("LOWRANK_DATA", "embedded")
    if choice not in ("embedded", "hub"):
        raise ValueError(f"LOWRANK_DATA: got {choice!r}, wanted 'embedded' (the default) or 'hub'")
    return choice == "hub"


def from_hub(*name: str, size: str, **options: Any) -> Any:
    """Load a data set from the hub; what it is and how large is said on stderr first.

    Args:
        name: what `datasets.load_dataset` takes: the set, and perhaps its part.
        size: what a first call downloads, in words.
        options: others of `datasets.load_dataset`.
    """
    load = need("datasets").load_dataset
    sys.stderr.write(f"LOWRANK_DATA=hub: {name[0]} from the Hugging Face hub, {size} at the first call\n")
    return load(*name, **options)


def split(n: int, train: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that train, validate and test: the first, the last and the middle ones of a fixed order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:train], order[train + test :], order[train : train + test]
