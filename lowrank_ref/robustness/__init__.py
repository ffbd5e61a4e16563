"""Staying right when inputs move."""

from typing import Any

__all__ = ["RMTGBClassifier", "RMTGBRegressor"]


def __getattr__(name: str) -> Any:
    """Import the scikit-learn estimators when they are asked for: the package works without scikit-learn."""
    if name in ("RMTGBClassifier", "RMTGBRegressor"):
        from lowrank_ref.robustness import r_mtgb_sklearn

        return getattr(r_mtgb_sklearn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
