"""Who says which rank each matrix keeps: WeLore, its rivals and its controls, cut and measured on any model.

Every arm is ranks for all matrices and a way to factor them. "aware" arms see E[xxᵀ] of calibration data: their
spectra and their factors are those of W·L. At equal ERR all matrices are cut. At an equal share of the parameters a
matrix stays whole where factors would be larger. "dealt" arms have the same ranks at other matrices of the same shape,
"levelled" ones the mean rank of each shape.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ref.compression import (
    RankPlan,
    input_covariances,
    plan_ranks,
    plan_within,
    spectral_factors,
    uniform_pruning,
)
from lowrank_ref.compression.maestro import prefix_product

TARGETS = (0.1, 0.2, 0.3, 0.4, 0.5)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
DRAWS = 3


def dealt(ranks: dict[str, int], shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, int]:
    """Deal the ranks to other matrices of the same shape."""
    g, found = torch.Generator().manual_seed(seed), dict(ranks)
    for shape in dict.fromkeys(shapes.values()):
        paths = [path for path in ranks if shapes[path] == shape]
        order = torch.randperm(len(paths), generator=g).tolist()
        found |= {path: ranks[paths[i]] for path, i in zip(paths, order)}
    return found


def levelled(ranks: dict[str, int], shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Give all matrices of a shape the same rank, as many directions in all."""
    found = dict(ranks)
    for shape in dict.fromkeys(shapes.values()):
        paths = [path for path in ranks if shapes[path] == shape]
        total = sum(ranks[path] for path in paths)
        found |= {path: total // len(paths) + (i < total % len(paths)) for i, path in enumerate(paths)}
    return found


def in_threads(function: Callable[..., Any], *columns: Any) -> list[Any]:
    """Map with one thread a core: LAPACK's single calls do not fill a machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(os.cpu_count() if threads > 1 else 1) as pool:
            return list(pool.map(function, *columns))
    finally:
        torch.set_num_threads(threads)


class Cutter:
    """Holds a model's matrices, their factors at full rank, plain and activation-aware, and puts cut ones in place."""

    def __init__(self, model: nn.Module, pattern: str, run: Callable[[], Any]) -> None:
        covariances = input_covariances(model, run, pattern)
        self.model, place = model, next(model.parameters()).device
        self.weights = {path: model.get_submodule(path).weight.detach().clone() for path in covariances}
        self.shapes = {path: (W.shape[0], W.shape[1]) for path, W in self.weights.items()}
        self.factors, self.spectra = {}, {}
        for aware in (0, 1):

            def split(path: str, aware: int = aware) -> list[Tensor]:
                W, C = self.weights[path].cpu(), covariances[path].cpu() if aware else None
                return [M.to(place) for M in spectral_factors(W, min(W.shape), C)]

            self.factors[aware] = dict(zip(self.weights, in_threads(split, self.weights)))
            pairs = self.factors[aware].items()  # B = U·√S, so that its columns have the norms √σ
            self.spectra[aware] = {p: B.square().sum(0).sort(descending=True).values.cpu() for p, (_, B) in pairs}

    def size(self, ranks: dict[str, int]) -> float:
        """Share of the parameters that is left where no matrix is stored as larger factors."""
        left = sum(min(r * sum(self.shapes[p]), self.shapes[p][0] * self.shapes[p][1]) for p, r in ranks.items())
        return left / sum(m * n for m, n in self.shapes.values())

    def reduction(self, ranks: dict[str, int]) -> float:
        """Share of all directions that is gone."""
        whole = sum(min(shape) for shape in self.shapes.values())
        return 1 - sum(ranks.values()) / whole

    @torch.no_grad()
    def put(self, ranks: dict[str, int], aware: int) -> None:
        """Write the cut weights into the model; full rank writes the old ones."""
        for path, W in self.weights.items():
            full = ranks[path] >= min(W.shape)
            new = W if full else prefix_product(*self.factors[aware][path], ranks[path])
            self.model.get_submodule(path).weight.copy_(new)

    def _within(self, plan: RankPlan) -> dict[str, int]:
        return {p: plan.ranks[p] if p in plan.low_rank else min(plan.shapes[p]) for p in plan.ranks}

    def _uniform(self, share: float) -> dict[str, int]:
        return {path: max(1, int(share * m * n / (m + n))) for path, (m, n) in self.shapes.items()}

    def _energy(self, share: float, aware: int) -> dict[str, int]:
        """Least squared error for the share of parameters: one threshold on σ²/(m + n)."""
        spectra = self.spectra[aware]
        scores = {path: S.double().square() / sum(self.shapes[path]) for path, S in spectra.items()}
        values = torch.cat([*scores.values()]).sort().values

        def ranks(i: int) -> dict[str, int]:
            found = {path: max(1, int((score > values[i]).sum())) for path, score in scores.items()}
            whole = {path: m * n / (m + n) for path, (m, n) in self.shapes.items()}
            return {path: min(self.shapes[path]) if r >= whole[path] else r for path, r in found.items()}

        low, high = 0, len(values) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.size(ranks(middle)) <= share else (middle + 1, high)
        return ranks(low)

    def arms(
        self, targets: Sequence[float] = TARGETS, shares: Sequence[float] = SHARES
    ) -> Iterator[tuple[dict[str, Any], dict[str, int], int]]:
        """Iterate over (key, ranks, aware) of all arms."""
        sizes = {path: len(S) for path, S in self.spectra[0].items()}
        for target in targets:
            by_err: dict[str, tuple[dict[str, int], int]] = {}
            pruned = dict(zip(sizes, uniform_pruning([*sizes.values()], target)))
            uniform = {path: q - pruned[path] for path, q in sizes.items()}
            for aware in (0, 1):
                by_err["uniform" + ", aware" * aware] = uniform, aware
                for by in ("minmax", "tail") if aware else ("minmax", "max", "tail"):
                    how = {"by": by, "min_ratio": 0.0, "step": None}
                    plan = plan_ranks(self.model, target, **how, spectra=self.spectra[aware])
                    by_err[by + ", aware" * aware] = plan.ranks, aware
            shipped = plan_ranks(self.model, target, spectra=self.spectra[0])
            by_err["minmax, rest dense"] = self._within(shipped), 0
            for name, (ranks, aware) in by_err.items():
                yield {"method": name, "at": "ERR", "value": target, "draw": 0}, ranks, aware
            for name in ("minmax", "tail"):
                key = {"method": f"{name}, levelled", "at": "ERR", "value": target, "draw": 0}
                yield key, levelled(by_err[name][0], self.shapes), 0
                for draw in range(DRAWS):
                    key = {"method": f"{name}, dealt", "at": "ERR", "value": target, "draw": draw}
                    yield key, dealt(by_err[name][0], self.shapes, draw), 0
        for share in shares:
            by_size = {}
            for aware in (0, 1):
                by_size["uniform" + ", aware" * aware] = self._uniform(share), aware
                for by in ("minmax", "tail") if aware else ("minmax", "max", "tail"):
                    plan = plan_within(self.model, share, by=by, spectra=self.spectra[aware])
                    by_size[by + ", aware" * aware] = self._within(plan), aware
                by_size["energy" + ", aware" * aware] = self._energy(share, aware), aware
            for name, (ranks, aware) in by_size.items():
                yield {"method": name, "at": "size", "value": share, "draw": 0}, ranks, aware

    def measure(self, ranks: dict[str, int], aware: int, score: Callable[[], dict[str, list[float]]]) -> dict[str, Any]:
        """Cut, score, put the old weights back."""
        self.put(ranks, aware)
        try:
            found: dict[str, Any] = score()
        finally:
            self.put({path: min(shape) for path, shape in self.shapes.items()}, 0)
        return {"size": round(self.size(ranks), 4), "reduction": round(self.reduction(ranks), 4), **found}


def grouped(values: Tensor, groups: int, digits: int = 5) -> list[float]:
    """Means over groups of equal length, what is left over at the end apart."""
    length = len(values) // groups
    return [round(v, digits) for v in values[: groups * length].view(groups, length).double().mean(1).tolist()]
