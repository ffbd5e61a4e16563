"""Weights that are low-rank (and sparse) from the start.

Papers:

    sltrain  a product of thin factors plus a sparse matrix of fixed support
"""

from lowrank_ref.pretraining.sltrain import SLTrainLinear, training_bytes

__all__ = ["SLTrainLinear", "training_bytes"]
