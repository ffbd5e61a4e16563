"""Staying right when inputs move."""

from lowrank_ref.robustness.attack_losses import cross_entropy, dlr, targeted_dlr
from lowrank_ref.robustness.attacks import Attacked, apgd, pgd, random_start
from lowrank_ref.robustness.projections import project
from lowrank_ref.robustness.ramp import GradientProjection, ramp_loss
from lowrank_ref.robustness.threats import survivors, union_accuracy

__all__ = [
    "Attacked",
    "GradientProjection",
    "apgd",
    "cross_entropy",
    "dlr",
    "pgd",
    "project",
    "ramp_loss",
    "random_start",
    "survivors",
    "targeted_dlr",
    "union_accuracy",
]
