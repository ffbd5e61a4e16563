"""Low-rank gradients: optimizers whose state is small.

Papers:

    galore           Adam on a low-rank projection of the gradient

Companions:

    galore_variants  8-bit moments, Adafactor, updates inside backward
    projected        base of optimizers that step in a projected space
    fast             steps of many matrices at once
    sharded          projected optimizers under FSDP2
"""

from lowrank_ref.optimizers.galore import GaLore, GaLoreAdamW, GaLoreSGD
from lowrank_ref.optimizers.galore_variants import GaLoreAdafactor, GaLoreAdamW8bit, per_layer_updates

__all__ = ["GaLore", "GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreSGD", "per_layer_updates"]
