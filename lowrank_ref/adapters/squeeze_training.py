"""LoRA-Squeeze while a model trains: the action, its plan, the rate after it, and a control that only restarts Adam."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lowrank_ref.adapters.lora_squeeze import carried_moments, retained_energy, split_factors, squeezed_factors
from lowrank_ref.adapters.squeeze_targets import Ranks, lora_parts, set_factors, take_rank, target_ranks, trained_layers
from lowrank_ref.core.actions import Action, innermost
from lowrank_ref.core.checks import check_integer

#: Adam's moments -> the power of the gradient that they average.
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def halving_plan(source: int, target: int, steps: int) -> dict[int, int]:
    """Return step -> rank for a run of equal stages: `source`, half of it, a quarter ... down to `target`.

    Args:
        source: rank of the first stage.
        target: rank of the last, 1 <= target < source.
        steps: of the whole run, at least one a stage.

    Raises:
        TypeError, ValueError: a number out of range.

    Example:
        >>> halving_plan(16, 4, 300)
        {100: 8, 200: 4}
    """
    check_integer("target", target, low=1)
    check_integer("source", source, low=target + 1)
    ranks = [source]
    while ranks[-1] > target:
        ranks.append(max(target, ranks[-1] // 2))
    check_integer("steps", steps, low=len(ranks))
    return {i * steps // len(ranks): rank for i, rank in enumerate(ranks) if i}


def rewarmed(schedule: Callable[[int], float], times: Iterable[int], warmup: int) -> Callable[[int], float]:
    """Return a schedule that rises in a line over `warmup` steps after each of the times, the last of them in full.

    Args:
        schedule: step, counted from 0 -> factor on the learning rate.
        times: counts of steps after which it starts again, such as the keys of a plan; 0 is the beginning.
        warmup: steps, >= 0; 0 returns the schedule's own factors.

    Raises:
        TypeError, ValueError: a number is no integer >= 0.

    Example:
        >>> factor = rewarmed(lambda step: 1.0, [10], warmup=4)
        >>> [factor(step) for step in (9, 10, 11, 13, 14)]
        [1.0, 0.25, 0.5, 1.0, 1.0]
    """
    starts = sorted(times)
    for start in starts:
        check_integer("times", start, low=0)
    check_integer("warmup", warmup, low=0)

    def factor(step: int) -> float:
        last = max((start for start in starts if start <= step), default=None)
        rise = 1.0 if last is None or not warmup else min(1.0, (step - last + 1) / warmup)
        return schedule(step) * rise

    return factor


class LoRASqueezer(Action):
    """Lowers the rank of LoRA layers at given steps of a training run (In-Squeeze).

    A squeezed layer has new parameters, and the optimizer gets them in the places of the old: ask the model for its
    parameters afterwards, a list from before is stale. DDP and FSDP cannot follow: wrap anew after each squeeze.
    `torch.compile` compiles once more. The layers can load factors of another rank from now on: a run resumes when
    model, optimizer and action, built as at the start, load their states in this order.

    Args:
        model: holds `LoRALinear` layers and no other adapters.
        optimizer: trains all their factors.
        plan: count of steps -> rank, one or a `rank_pattern`, see `squeeze`. The rank that a layer has already only
            balances its factors. See `halving_plan`.
        moments: "reset" forgets the optimizer's state of A and B, also its count of steps; "carry" takes Adam's moments
            along, see `carried_moments`. A learning rate that has to rise again is the schedule's, see `rewarmed`.
        scale: s' of all layers; None keeps that of each.
        split: see `split_factors`.

    Attributes:
        kept: count of steps -> path -> V(k), the share of energy that was kept.

    Raises:
        TypeError, ValueError: an argument out of range, an empty plan, a pattern that names no layer, a factor that the
            optimizer does not train, or that is sharded or has hooks, "carry" without `torch.optim.Adam` or `AdamW`, or
            other adapters.

    Example:
        >>> import torch
        >>> from lowrank_ref.adapters import LoRALinear, LoRASqueezer
        >>> layer = LoRALinear(torch.nn.Linear(6, 5), rank=4)
        >>> optimizer = torch.optim.Adam(layer.adapter_parameters().values(), lr=0.01)
        >>> squeezer = LoRASqueezer(layer, optimizer, {1: 2}).attach(optimizer)
        >>> layer(torch.ones(3, 6)).sum().backward()
        >>> optimizer.step()
        >>> layer.rank, tuple(layer.A.shape)
        (2, (2, 6))
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Mapping[int, Ranks],
        *,
        moments: str = "reset",
        scale: float | None = None,
        split: str = "balanced",
    ) -> None:
        self.optimizer, self.layers = innermost(optimizer), trained_layers(model, optimizer)
        if not isinstance(plan, Mapping) or not plan:
            raise ValueError(f"plan: got {plan!r}, wanted at least one count of steps -> rank")
        for step, rank in plan.items():
            check_integer("plan", step, low=1)
            target_ranks(model, rank)
        adam = isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW)
        if moments not in ("reset", "carry") or (moments == "carry" and not adam):
            got = f"{moments!r} with {type(self.optimizer).__name__}"
            raise ValueError(f"moments: got {got}, wanted 'reset', or 'carry' with Adam or AdamW")
        split_factors(torch.eye(1), torch.ones(1), torch.eye(1), 1.0 if scale is None else scale, split)
        self.model, self.plan, self.moments, self.scale, self.split = model, dict(plan), moments, scale, split
        self.steps, self.kept = 0, dict[int, dict[str, float]]()
        for layer in self.layers.values():
            layer._register_load_state_dict_pre_hook(take_rank, with_module=True)

    @torch.no_grad()
    def act(self) -> None:
        """Count a step, and squeeze if the plan says so."""
        self.steps += 1
        if self.steps not in self.plan:
            return
        new, kept = {}, {}
        for path, k in target_ranks(self.model, self.plan[self.steps]).items():
            A, B, s = lora_parts(self.layers[path])
            s_new = s if self.scale is None else float(self.scale)
            A_new, B_new, S = squeezed_factors(A, B, s, k, new_scale=s_new, split=self.split)
            new[path] = (A, B, s), (A_new.to(A.dtype), B_new.to(B.dtype), s_new)
            kept[path] = float(retained_energy(S)[k - 1])
        swapped: dict[nn.Parameter, nn.Parameter] = {}
        for path, (old, parts) in new.items():  # all are computed before the first is put in place
            before = tuple(self.layers[path].adapter_parameters().values())
            set_factors(self.layers[path], *parts)
            after = tuple(self.layers[path].adapter_parameters().values())
            swapped.update(zip(before, after))
            states = [self.optimizer.state.pop(p, {}) for p in before]
            if self.moments == "carry" and all(states):
                for key, power in MOMENTS.items():
                    if key in states[0]:
                        pair = carried_moments(old, parts, (states[0][key], states[1][key]), power)
                        for state, value in zip(states, pair):
                            state[key] = value.contiguous()
                self.optimizer.state.update(zip(after, states))
        for group in self.optimizer.param_groups:
            group["params"][:] = [swapped.get(p, p) for p in group["params"]]
        self.kept[self.steps] = kept

    def state_dict(self) -> dict[str, Any]:
        """Return the count of steps, the present ranks and scales, and what was kept."""
        ranks, scales = ({path: getattr(a, name) for path, a in self.layers.items()} for name in ("rank", "scale"))
        return {"steps": self.steps, "ranks": ranks, "scales": scales, "kept": {t: {**v} for t, v in self.kept.items()}}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state, after the model and the optimizer have loaded theirs.

        Raises:
            ValueError: the state is of something else, or of other ranks than the model has now.
        """
        self._check_keys(state)
        ranks, here = state["ranks"], {path: len(layer.A) for path, layer in self.layers.items()}
        if ranks != here or state["scales"].keys() != here.keys():
            raise ValueError(
                f"state: got ranks {ranks}, wanted {here}, those of the model; load the model's state first"
            )
        self.steps, self.kept = state["steps"], {int(t): {**v} for t, v in state["kept"].items()}
        for path, layer in self.layers.items():
            layer.scale = float(state["scales"][path])


class MomentRestart(Action):
    """Forgets the optimizer's state at given steps, all of it, and changes nothing else: the control of LoRA-Squeeze.

    Args:
        optimizer: whose state it is.
        times: counts of steps after which it starts again, at least one, each >= 1.

    Raises:
        TypeError: no optimizer of PyTorch, or a time that is no integer.
        ValueError: no time, or one below 1.

    Example:
        >>> import torch
        >>> from lowrank_ref.adapters import MomentRestart
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([p], lr=0.1)
        >>> restart = MomentRestart(optimizer, [1]).attach(optimizer)
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> len(optimizer.state)
        0
    """

    state_names = ("steps",)

    def __init__(self, optimizer: torch.optim.Optimizer, times: Iterable[int]) -> None:
        self.optimizer, self.times, self.steps = innermost(optimizer), frozenset(times), 0
        for time in self.times:
            check_integer("times", time, low=1)
        if not self.times:
            raise ValueError("times: got none, wanted at least one count of steps")

    def act(self) -> None:
        """Count a step, and forget if it is time."""
        self.steps += 1
        if self.steps in self.times:
            self.optimizer.state.clear()
