"""Weights that are low-rank (and sparse) from the start."""

from lowrank_ref.pretraining.sltrain import SLTrainLinear

__all__ = ["SLTrainLinear"]
