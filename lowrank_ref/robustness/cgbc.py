r"""CGBC: a zero-shot classifier that asks many concepts about each class, and trusts each only as far as an image does.

Liu et al., "Beyond Heuristic Prompting: A Concept-Guided Bayesian Framework for Zero-Shot Image Recognition",
arXiv 2603.07911v1.

| in the paper                                          | here                                 |
|-------------------------------------------------------|--------------------------------------|
| S, similarities of an image to all concepts           | `concept_similarities`               |
| median and MAD of the similarities of a class         | `median_and_mad`                     |
| estimated contamination                               | `outlier_share`                      |
| sharpness κ                                           | `trim_sharpness`                     |
| adaptive soft trim w                                  | `trim_weights`                       |
| sum over concepts, prior times likelihood             | `marginal_score`, `soft_trim`        |

Letters: K classes with M concepts each, features of D numbers; S is (..., M), m its median, the paper's λ is
`threshold`, its k `slope`. The module that holds concepts is `concept_classifier.ConceptClassifier`; how concepts are
made and thinned is in `concept_pool` and `dpp`, other ways to sum in `concept_rules`.

Deviations. The official code trims one side: its weight rises with S. Public notes of the paper give a weight that
falls with `|S - m|`. They are `side="lower"` and `side="both"`. In the second the share of outliers is at least 1/M, as
in the code's M-estimator; without that floor a class without outliers would have weight 0 everywhere but at m.
Everything is computed in float32 or wider, where the code keeps the model's half precision.
Cost: K·M·D stored numbers, 2·K·M·D FLOPs an image and a few passes over K·M numbers. Nothing trains.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_number
from lowrank_ref.core.registry import PaperInfo

#: What the weights push down, low similarities, as the official code does, or those far from the median on both sides.
TRIMS = ("lower", "both")
#: Ends of κ in the official code.
SHARPNESS = (0.1, 4.0)
#: 2·max x·σ(-x), how far sums of weighted deviations can get. The maximum is Lambert's W(1/e), at x = 1 + W.
REACH = 0.5569290855221476


def concept_similarities(
    images: Float[Tensor, "batch d"],
    concepts: Float[Tensor, "classes m d"],
    *,
    scale: float = 100.0,
    temperature: float = 1.0,
) -> Float[Tensor, "batch classes m"]:
    """Return S = (scale/temperature)·cosine of every image and every concept, in float32 or wider.

    A concept with a NaN is none: its S is NaN, and no gradient passes through it.

    Args:
        images: features of images, of any length.
        concepts: features of concepts, of any length.
        scale: the model's logit scale, > 0; 100 in CLIP.
        temperature: τ > 0, 1 in the official script.

    Raises:
        TypeError, ValueError: a scale or temperature <= 0.
    """
    check_number("scale", scale, low=0, open_low=True)
    check_number("temperature", temperature, low=0, open_low=True)
    wide = torch.promote_types(torch.promote_types(images.dtype, concepts.dtype), torch.float32)
    absent = concepts.isnan().any(dim=-1)
    v = F.normalize(images.to(wide), dim=-1)
    t = F.normalize(concepts.to(wide).masked_fill(absent[..., None], 0.0), dim=-1)  # 0·NaN would spoil all gradients
    S = scale / temperature * torch.einsum("bd,kmd->bkm", v, t)
    return S.masked_fill(absent, math.nan)


def median_and_mad(
    S: Float[Tensor, "*batch m"], *, eps: float = 1e-6
) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
    """Return the median over concepts, and the median distance from it plus eps. NaN counts as no concept.

    Of an even number the lower of the two middle ones is taken, as `torch.median` does. There is no factor 1.4826.

    Example:
        >>> [x.item() for x in median_and_mad(torch.tensor([1.0, 2.0, 4.0, 9.0]), eps=0.0)]
        [2.0, 1.0]
    """
    m = S.nanmedian(dim=-1, keepdim=True).values
    distance = _centred(S, m).abs().masked_fill(S.isnan(), math.nan)
    return m, distance.nanmedian(dim=-1, keepdim=True).values + eps


def _centred(S: Tensor, m: Tensor) -> Tensor:
    """S - m, and 0 where S is NaN: a NaN in a product would make the gradient of the whole class NaN."""
    return (S - m).masked_fill(S.isnan(), 0.0)


def outlier_share(S: Float[Tensor, "*batch m"], *, threshold: float = 2.5) -> Float[Tensor, "*batch 1"]:
    """Return ρ̂, the share of concepts further than threshold·MAD from the median, on either side.

    With a threshold >= 1 it is at most 1/2, whatever S is: half of the distances are at most their median.

    Raises:
        TypeError, ValueError: a threshold < 1.
    """
    check_number("threshold", threshold, low=1)
    m, mad = median_and_mad(S)
    count = (~S.isnan()).sum(dim=-1, keepdim=True)
    return ((S - m).abs() > threshold * mad).sum(dim=-1, keepdim=True) / count.to(S.dtype)


def trim_sharpness(
    S: Float[Tensor, "*batch m"], *, side: str = "lower", threshold: float = 2.5, slope: float = 1.0
) -> Float[Tensor, "*batch 1"]:
    """Return κ = log((1 - ρ̂)/ρ̂): clipped to [0.1, 4] for one side, times slope and with ρ̂ >= 1/M for both.

    Args:
        S: similarities.
        side: one of `TRIMS`.
        threshold: λ >= 1 of ρ̂.
        slope: k > 0, for "both" only.

    Raises:
        TypeError, ValueError: another side, a threshold < 1, or a slope <= 0.
    """
    check_number("slope", slope, low=0, open_low=True)
    if side not in TRIMS:
        raise ValueError(f"side: got {side!r}, wanted one of {TRIMS}")
    share = outlier_share(S, threshold=threshold)
    if side == "lower":
        return ((1 - share) / share).log().clamp(*SHARPNESS)
    floor = 1 / (~S.isnan()).sum(dim=-1, keepdim=True).to(S.dtype)
    share = torch.maximum(share, floor).clamp_max(0.5)
    return slope * ((1 - share) / share).log()


def trim_weights(
    S: Float[Tensor, "*batch m"], kappa: Float[Tensor, "*batch 1"] | float, *, side: str = "lower"
) -> Float[Tensor, "*batch m"]:
    """Return the likelihood w of each concept: σ(κz), or `σ(-κ|z|)` for both sides, with z = (S - m)/MAD.

    Args:
        S: similarities; where they are NaN, w is 0.
        kappa: κ >= 0, from `trim_sharpness` or fixed; 0 makes all weights ½.
        side: one of `TRIMS`.

    Raises:
        ValueError: another side.

    Example:
        >>> S = torch.tensor([0.0, 9.0, 10.0, 11.0, 12.0])
        >>> [round(w, 3) for w in trim_weights(S, 4.0).tolist()]
        [0.0, 0.018, 0.5, 0.982, 1.0]
        >>> [round(w, 3) for w in trim_weights(S, 4.0, side="both").tolist()]
        [0.0, 0.018, 0.5, 0.018, 0.0]
    """
    if side not in TRIMS:
        raise ValueError(f"side: got {side!r}, wanted one of {TRIMS}")
    m, mad = median_and_mad(S)
    z = _centred(S, m) / mad
    return torch.sigmoid(kappa * (z if side == "lower" else -z.abs())).masked_fill(S.isnan(), 0.0)


def marginal_score(
    S: Float[Tensor, "*batch m"],
    likelihood: Float[Tensor, "*batch m"],
    prior: Float[Tensor, "*prior m"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return Σ p(C)·w·S / Σ p(C)·w over the concepts of a class; without a prior all concepts have the same.

    NaN in S counts as no concept. Where all weights of a class are 0 the score is NaN.

    Example:
        >>> S, w = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])
        >>> marginal_score(S, w).item(), marginal_score(S, w, torch.tensor([3.0, 1.0])).item()
        (2.0, 1.5)
    """
    weight = likelihood if prior is None else likelihood * prior
    weight = weight.masked_fill(S.isnan(), 0.0)
    return (weight * S.nan_to_num(nan=0.0)).sum(dim=-1) / weight.sum(dim=-1)


def soft_trim(
    S: Float[Tensor, "*batch m"],
    *,
    side: str = "lower",
    threshold: float = 2.5,
    slope: float = 1.0,
    prior: Float[Tensor, "*prior m"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return the score of each class: `marginal_score` under the adaptive weights.

    Raises:
        TypeError, ValueError: another side, a threshold < 1, or a slope <= 0.

    Example:
        >>> S = torch.tensor([0.0, 9.0, 10.0, 11.0, 12.0])
        >>> [round(soft_trim(S, side=side).item(), 2) for side in TRIMS]
        [11.02, 10.12]
    """
    kappa = trim_sharpness(S, side=side, threshold=threshold, slope=slope)
    return marginal_score(S, trim_weights(S, kappa, side=side), prior)


def score_bounds(
    S: Float[Tensor, "*batch m"], kappa: Float[Tensor, "*batch 1"] | float, *, side: str = "lower"
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return two numbers between which the score lies, whatever the outliers are: m ± c·MAD.

    c = 0.557/(κ·σ(-κ)) for both sides: weighted distances sum to at most 0.279·M·MAD/κ, and half of the weights are
    σ(-κ) or more. For one side c = 0.557/κ below, and nothing is promised above. At κ = 0, which a
    minority can reach where M is even, nothing is promised at all. The prior must be uniform.

    Raises:
        ValueError: another side.
    """
    if side not in TRIMS:
        raise ValueError(f"side: got {side!r}, wanted one of {TRIMS}")
    m, mad = (x.squeeze(-1) for x in median_and_mad(S))
    k = torch.as_tensor(kappa, dtype=S.dtype, device=S.device)
    k = k.squeeze(-1) if k.ndim else k
    if side == "lower":
        return m - REACH / k * mad, torch.full_like(m, math.inf)
    far = REACH / (k * torch.sigmoid(-k)) * mad
    return m - far, m + far


PAPER = PaperInfo(
    key="cgbc",
    part="robustness",
    name="CGBC",
    title="Beyond Heuristic Prompting: A Concept-Guided Bayesian Framework for Zero-Shot Image Recognition",
    authors=("Hui Liu", "Kecheng Chen", "Jialiang Wang", "Xianming Liu", "Wenya Wang", "Haoliang Li"),
    arxiv="2603.07911v1",
    summary="Describe each class by many concepts, some of them wrong, and let every image decide which to trust.",
    use_when="you classify without training, class names say too little, and a minority of their descriptions is wrong",
    instead={"lora": "you have labelled pictures and may train"},
    needs=("primer",),
    official_code="less-and-less-bugs/CGBC",
    code_licence="Apache-2.0",
    equations={
        "S": "concept_similarities",
        "ρ̂": "outlier_share",
        "κ": "trim_sharpness",
        "w": "trim_weights",
        "p(Y|X)": "marginal_score",
    },
    deviations=("both forms of the weight", "ρ̂ >= 1/M in the two-sided one", "float32 or wider"),
    aliases=("concept-guided Bayesian classification", "soft trim", "prompt ensembling", "CLIP", "zero-shot", "k-DPP"),
    status="checked",
    verified="2026-11-30",
)
