"""Staying right when inputs move.

Papers:

    ramp            training against three norms at once
    r_mtgb          boosting for many tasks, some of which are outliers

Companions:

    attacks         PGD and APGD in an l1, l2 or l∞ ball
    attack_losses   what an attack makes large
    projections     exact projections on balls cut by the box
    threats         several norms at once
    r_mtgb_sklearn  R-MTGB as scikit-learn estimators
"""

from importlib.util import find_spec
from typing import Any

from lowrank_ref.robustness.attack_losses import cross_entropy, dlr, ranked_class, targeted_dlr
from lowrank_ref.robustness.attacks import Attacked, apgd, pgd, random_start
from lowrank_ref.robustness.projections import project
from lowrank_ref.robustness.ramp import GradientProjection, fuse, ramp_loss
from lowrank_ref.robustness.threats import hull_radius, is_free, survivors, union_accuracy

__all__ = [
    "Attacked",
    "GradientProjection",
    "apgd",
    "cross_entropy",
    "dlr",
    "fuse",
    "hull_radius",
    "is_free",
    "pgd",
    "project",
    "ramp_loss",
    "ranked_class",
    "random_start",
    "survivors",
    "targeted_dlr",
    "union_accuracy",
]
if find_spec("sklearn") is not None:  # `import *` asks for every name
    __all__ += ["RMTGBClassifier", "RMTGBRegressor"]


def __getattr__(name: str) -> Any:
    """Import the scikit-learn estimators when they are asked for: the package works without scikit-learn."""
    if name in ("RMTGBClassifier", "RMTGBRegressor"):
        from lowrank_ref.robustness import r_mtgb_sklearn

        return getattr(r_mtgb_sklearn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
