"""Low-rank gradients: optimizers whose state is small."""

from lowrank_ref.optimizers.galore import GaLoreAdamW, GaLoreSGD
from lowrank_ref.optimizers.galore_variants import GaLoreAdafactor, GaLoreAdamW8bit, per_layer_updates

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreSGD", "per_layer_updates"]
