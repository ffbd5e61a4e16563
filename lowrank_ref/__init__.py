"""Readable, tested reference implementations of low-rank, sparse and ternary methods for neural networks.

The ten names below cover adapting, training, saving and merging a model; they are imported when first used.

    from lowrank_ref import LoRALinear, replace_linears
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
    from lowrank_ref.core.accounting import parameter_report
    from lowrank_ref.core.io import load_adapters, save_adapters
    from lowrank_ref.core.layers import disabled, merge_adapters, replace_linears
    from lowrank_ref.optimizers import GaLoreAdamW

__version__ = "0.1.0"

__all__ = [
    "GaLoreAdamW",
    "LoRALinear",
    "disabled",
    "load_adapters",
    "load_peft",
    "merge_adapters",
    "parameter_report",
    "replace_linears",
    "save_adapters",
    "save_peft",
]
_HOMES = {
    "adapters": ("LoRALinear", "load_peft", "save_peft"),
    "core.accounting": ("parameter_report",),
    "core.io": ("load_adapters", "save_adapters"),
    "core.layers": ("disabled", "merge_adapters", "replace_linears"),
    "optimizers": ("GaLoreAdamW",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"lowrank_ref.{home}"), name)
    raise AttributeError(f"module 'lowrank_ref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
