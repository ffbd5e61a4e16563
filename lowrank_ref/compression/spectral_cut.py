"""WeLore on whole models: which rank each matrix keeps, the cut, and what trains afterwards. Equations: `welore.py`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.compression.input_covariances import matching_linears
from lowrank_ref.compression.welore import (
    WeLoreLinear,
    find_threshold,
    is_low_rank,
    normalised_spectrum,
    pruned_counts,
    rank_reduction,
)
from lowrank_ref.core.checks import check_number
from lowrank_ref.core.layers import Model, replace_linears, weight_of
from lowrank_ref.core.matching import Pattern, matcher, no_match

#: Path -> E[xxᵀ] of the layer's inputs.
Covariances = Mapping[str, Tensor]
#: Path -> singular values.
Spectra = Mapping[str, Tensor]


@dataclass(frozen=True)
class RankPlan:
    """Which rank every matrix keeps. Three different numbers call themselves compression: they are kept apart.

    Attributes:
        ranks: path -> rank that the threshold leaves, of every matrix, 1 or more.
        shapes: path -> (m, n).
        low_rank: paths of the matrices that become factors; the others stay dense, at full rank.
        threshold: k.
        nominal: ERR that the threshold gives, over all matrices.

    Raises:
        TypeError, ValueError: the threshold is no number >= 0.

    Example:
        >>> from lowrank_ref.compression import RankPlan
        >>> plan = RankPlan({"0": 2}, {"0": (6, 8)}, ("0",), threshold=0.3, nominal=4 / 6)
        >>> plan.parameters, round(plan.kept, 2)  # 2·(6 + 8) of 48
        (28, 0.58)
    """

    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    low_rank: tuple[str, ...]
    threshold: float
    nominal: float

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, low=0)

    @property
    def reached(self) -> float:
        """ERR after the dense ones have got their rank back."""
        gone = [min(self.shapes[path]) - self.ranks[path] for path in self.low_rank]
        return sum(gone) / sum(map(min, self.shapes.values()))

    @property
    def trainable(self) -> int:
        """What trains if the factors alone do, Σ r(m+n)."""
        return sum(self.ranks[path] * sum(self.shapes[path]) for path in self.low_rank)

    @property
    def parameters(self) -> int:
        """Numbers in the matrices after the cut, biases apart."""
        return self.trainable + sum(m * n for path, (m, n) in self.shapes.items() if path not in self.low_rank)

    @property
    def kept(self) -> float:
        """Share of the matrices' parameters that is left, which can be more than 1."""
        return self.parameters / sum(m * n for m, n in self.shapes.values())


def _whitened(path: str, W: Tensor, covariances: Covariances | None) -> Tensor:
    """Return W, or W·L where the covariance of its inputs is LLᵀ."""
    if covariances is None:
        return W
    if path not in covariances:
        raise ValueError(f"covariances: got none for {path!r}, wanted one for every matrix")
    C = covariances[path].to(W)
    if C.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"covariances: got shape {tuple(C.shape)} for {path!r}, wanted {(W.shape[1],) * 2}")
    return W @ torch.linalg.cholesky(C)


@torch.no_grad()
def weight_spectra(
    model: nn.Module, pattern: Pattern = "all-linear", covariances: Covariances | None = None
) -> dict[str, Float[Tensor, " _"]]:
    """Return path -> singular values of every linear layer that the pattern means, each layer once.

    Args:
        model: stays as it is.
        pattern: see `replace_linears`.
        covariances: from `input_covariances`; then the singular values are those of W·L.

    Raises:
        TypeError, ValueError: what `replace_linears` raises for the pattern; a covariance is missing or does not fit.
    """
    found = {}
    for path, layer in matching_linears(model, pattern).items():
        W = weight_of(layer).detach()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        found[path] = torch.linalg.svdvals(_whitened(path, W, covariances))
    return found


def _plan(model: nn.Module, spectra: Spectra, threshold: float, by: str, low: Any) -> RankPlan:
    pruned = dict(zip(spectra, pruned_counts([*spectra.values()], threshold, by)))
    sizes = {path: len(S) for path, S in spectra.items()}
    weights = ((path, weight_of(model.get_submodule(path))) for path in spectra)
    shapes = {path: (W.shape[0], W.shape[1]) for path, W in weights}
    ranks = {path: max(1, sizes[path] - pruned[path]) for path in spectra}
    chosen = tuple(path for path in spectra if low(path, ranks[path], shapes[path]))
    return RankPlan(ranks, shapes, chosen, threshold, rank_reduction([*pruned.values()], [*sizes.values()]))


def plan_ranks(
    model: nn.Module,
    target: float,
    pattern: Pattern = "all-linear",
    *,
    by: str = "minmax",
    min_ratio: float = 0.4999,
    step: float | None = 5e-4,
    spectra: Spectra | None = None,
) -> RankPlan:
    """Plan WeLore's cut: the threshold whose rank reduction is nearest to the target, factors where half is gone.

    Args:
        model: stays as it is.
        target: ERR wanted, in [0, 1].
        pattern: see `replace_linears`.
        by: see `normalised_spectrum`.
        min_ratio: a matrix becomes factors if it loses more than this share of its rank. 0 takes all that lose any,
            also where factors are larger than the matrix.
        step: of the line search, see `find_threshold`.
        spectra: from `weight_spectra`, to plan several times, or to look at activations; then the pattern says nothing.

    Raises:
        TypeError, ValueError: see `weight_spectra`, or a number is out of range.
    """
    check_number("min_ratio", min_ratio, low=0, high=1)
    spectra = weight_spectra(model, pattern) if spectra is None else spectra
    k = find_threshold([*spectra.values()], target, by, step=step)
    return _plan(model, spectra, k, by, lambda path, r, shape: is_low_rank(min(shape) - r, min(shape), min_ratio))


def plan_within(
    model: nn.Module,
    share: float,
    pattern: Pattern = "all-linear",
    *,
    by: str = "tail",
    spectra: Spectra | None = None,
) -> RankPlan:
    """Plan a cut to a share of the parameters: the lowest threshold that gets there. Ours, not the paper's.

    A matrix becomes factors where these are smaller, r(m+n) < mn, and else stays as it is.

    Args:
        model, pattern, spectra: as for `plan_ranks`.
        share: of the matrices' parameters, in (0, 1].
        by: see `normalised_spectrum`.

    Raises:
        TypeError, ValueError: see `plan_ranks`, or rank 1 everywhere is more than that share.
    """
    check_number("share", share, low=0, high=1, open_low=True)
    spectra = weight_spectra(model, pattern) if spectra is None else spectra
    values = torch.cat([normalised_spectrum(S, by) for S in spectra.values()]).unique()
    cuts = [*values.tolist(), float(values[-1]) + 1]

    def plan(i: int) -> RankPlan:
        return _plan(model, spectra, cuts[i], by, lambda path, r, shape: r * sum(shape) < shape[0] * shape[1])

    low, high = 0, len(cuts) - 1
    if plan(high).kept > share:
        raise ValueError(f"share: got {share}, wanted at least {plan(high).kept:.4f}, what rank 1 everywhere takes")
    while low < high:  # what is left falls as the threshold rises
        middle = (low + high) // 2
        low, high = (low, middle) if plan(middle).kept <= share else (middle + 1, high)
    return plan(low)


def cut_model(model: Model, plan: RankPlan, covariances: Covariances | None = None) -> Model:
    """Put factors in the place of the plan's low-rank components, in place. As with every `WeightLayer`, all trains.

    Raises:
        TypeError, ValueError: see `replace_linears`; the plan has no low-rank component, or is of another model. The
            model is unchanged.
    """
    if not plan.low_rank:
        raise ValueError("plan: got one without low-rank components, wanted a higher target or a lower min_ratio")
    named = dict(model.named_modules())
    if strangers := [path for path in plan.low_rank if path not in named]:
        raise ValueError(f"plan: got paths of another model, such as {strangers[0]!r}, wanted those of this one")
    paths = {id(named[path]): path for path in plan.low_rank}

    def factors(base: nn.Module) -> WeLoreLinear:
        path = paths[id(base)]
        return WeLoreLinear.from_linear(base, plan.ranks[path], None if covariances is None else covariances[path])

    return replace_linears(model, rf"^({'|'.join(map(re.escape, plan.low_rank))})$", factors)


def train_low_rank_only(model: Model, keep: Pattern | None = None) -> Model:
    """Freeze everything but A and B of the low-rank components: WeLore's fine-tuning. Returns the model.

    Args:
        model: holds layers of `cut_model`.
        keep: parameters that go on training beside them, as `trainable` of `replace_linears`; the official code keeps
            the gains of all norms, r"norm".

    Raises:
        ValueError: the model holds no low-rank component, or `keep` matches no parameter. Nothing is changed.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, WeLoreLinear)]
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without low-rank component, wanted one from cut_model")
    trained = {id(p) for layer in layers for p in (layer.A, layer.B)}
    if keep is not None:
        named = dict(model.named_parameters(remove_duplicate=False))
        hits = {id(p) for path, p in named.items() if matcher("keep", keep)(path)}
        if not hits:
            raise ValueError(no_match(f"keep: got {keep!r}, which", keep, named))
        trained |= hits
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    return model
