"""SoRA's sparsifying schedule (algorithm 1 of arXiv 2311.11696v1): raise the penalty level by level and keep training.

| in the paper                     | here                                         |
|----------------------------------|----------------------------------------------|
| ξ₁ < ξ₂ < ... < ξ_N              | `threshold_levels`                           |
| train on at every level          | `SparsifyingSchedule`, after `ProximalGates` |

Deviation. The official script reuses the learning-rate schedule of its first phase, which ends at 0, so that its later
phases only shrink gates and train nothing (read from its code, not from its paper). Here the learning rate is the
caller's: one that has fallen to 0 also stops coupled shrinking. Let it start again at each level, or keep it constant.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.ranks.sora import ProximalGates


def threshold_levels(first: float, last: float, count: int, spacing: str = "linear") -> list[float]:
    """Return ξ₁ ... ξ_N with even steps of ξ ("linear") or of exp(ξ) ("log"), or with a constant ratio ("geometric").

    The official names are `linear`, `log_linear` and `exp_linear`.

    Raises:
        TypeError: count is no integer.
        ValueError: not 0 <= first < last, fewer than 2 levels, another spacing, or a geometric one that starts at 0.

    Example:
        >>> threshold_levels(1.0, 4.0, 3), threshold_levels(1.0, 4.0, 3, "geometric")
        ([1.0, 2.5, 4.0], [1.0, 2.0, 4.0])
    """
    if spacing not in ("linear", "log", "geometric"):
        raise ValueError(f"spacing: got {spacing!r}, wanted 'linear', 'log' or 'geometric'")
    check_number("first", first, low=0, open_low=spacing == "geometric")
    check_number("last", last, low=first, open_low=True)
    check_integer("count", count, low=2)
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    low, high = torch.tensor([first, last], dtype=torch.float64)
    if spacing == "linear":
        levels = low + share * (high - low)
    elif spacing == "log" and last - first < 1:  # log(exp ξ₁ + share·(exp ξ_N - exp ξ₁)), for small and for large ξ
        levels = low + torch.log1p(share * torch.expm1(high - low))
    elif spacing == "log":
        levels = torch.logaddexp(low + torch.log1p(-share), high + torch.log(share))
    else:
        levels = (low.log() + share * (high.log() - low.log())).exp()
    return [float(first), *levels[1:-1].tolist(), float(last)]


class SparsifyingSchedule(Action):
    """Sets the penalty of a `ProximalGates` level by level and notes the kept rank at the end of each.

    Attach it after the `ProximalGates`, or call `.step()` after theirs. When the last level is over, its penalty stays.

    Args:
        proximal: its penalty is overwritten, at once with the first level.
        levels: penalties, rising, at least one (`threshold_levels`).
        first: steps of the first level, long enough to converge, >= 1.
        later: steps of each later level, >= 1.

    Attributes:
        records: (penalty, kept rank of the whole model) of each level that is over.

    Raises:
        TypeError, ValueError: levels that do not rise or are negative, or a length below 1.

    Example:
        >>> import torch
        >>> from lowrank_ref.ranks import ProximalGates, SoRALinear, SparsifyingSchedule
        >>> layer = SoRALinear(torch.nn.Linear(6, 4), rank=2)
        >>> optimizer = torch.optim.Adam(layer.adapter_parameters().values(), lr=0.01)
        >>> proximal = ProximalGates(layer, optimizer, penalty=0.0).attach(optimizer)
        >>> schedule = SparsifyingSchedule(proximal, [0.1, 0.5], first=100, later=20).attach(optimizer)
        >>> proximal.penalty, schedule.steps
        (0.1, 120)
    """

    state_names = ("done", "records")  # the present penalty is in the state of the `ProximalGates`

    def __init__(self, proximal: ProximalGates, levels: Sequence[float], *, first: int, later: int) -> None:
        check_integer("first", first, low=1)
        check_integer("later", later, low=1)
        for level in levels:
            check_number("levels", level, low=0)
        if not levels or any(a >= b for a, b in zip(levels, levels[1:])):
            raise ValueError(f"levels: got {list(levels)}, wanted at least one number >= 0, rising")
        self.proximal, self.levels, self.first, self.later = proximal, list(levels), first, later
        self.records: list[tuple[float, int]] = []
        self.done = 0
        proximal.penalty = self.levels[0]

    @property
    def steps(self) -> int:
        """Steps of all levels together."""
        return self.first + self.later * (len(self.levels) - 1)

    def attach(self, optimizer: torch.optim.Optimizer) -> "SparsifyingSchedule":
        """Act after every step of the optimizer; ValueError if the `ProximalGates` would then act too late."""
        if not self.proximal.attached:
            raise ValueError("proximal: got one that is not attached, wanted it attached first")
        return super().attach(optimizer)

    def act(self) -> None:
        """Count a step; at the end of a level note its rank and go to the next."""
        self.done += 1
        over, rest = divmod(self.done - self.first, self.later)
        if self.done <= self.steps and over >= 0 and rest == 0:
            rank = sum(int(g.count_nonzero()) for g in self.proximal.gates.values())
            self.records.append((self.levels[over], rank))
            self.proximal.penalty = self.levels[min(over + 1, len(self.levels) - 1)]

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take back what `state_dict` returned; the penalty of the `ProximalGates` is set again.

        Raises:
            ValueError: the state is of something else.
        """
        self._check_keys(state)
        self.done, self.records = state["done"], [(float(level), int(rank)) for level, rank in state["records"]]
        self.proximal.penalty = self.levels[min(len(self.records), len(self.levels) - 1)]
