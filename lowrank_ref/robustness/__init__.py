"""Staying right when inputs move.

Papers:

    ramp                       training against three norms at once
    natra                      training on natural changes, made in the latent space of a generator
    efficient_robustification  a small robust teacher, a few tuned layers of a large student, three heads
    lr0_fm                     tokens that repair a frozen model for pictures of low resolution
    cgbc                       zero-shot classes by many concepts, some of them wrong
    ranking_robustness         five tests of a ranker: variance, new queries, new documents, two kinds of attack
    r_mtgb                     boosting for many tasks, some of which are outliers

Companions:

    attack_losses              what an attack makes large
    attacks                    PGD and APGD in an l1, l2 or l∞ ball
    augmentation_chains        AugMix: mixed chains of operations, and the consistency of a model over them
    concept_classifier         CGBC's classifier as a module
    concept_pool               rivals, near-duplicates, phrases and prompts of concepts
    concept_rules              other ways to sum over concepts
    corruptions                twelve corruptions in five severities, to measure with
    document_edits             words put into a document
    dpp                        diverse subsets, the likeliest and exact draws
    dropout_uncertainty        probabilities of a classifier by Monte Carlo dropout
    head_baselines             the surest head and the average, which a choice of head is compared with
    intervals                  a bootstrap over queries, and Wilson's interval
    lambda_mart                LambdaMART, boosted trees on features of words
    latent_codes               images to codes of a frozen generator, one or several an image
    latent_directions          directions of a generator's code along which images change most
    lexical_rankers            BM25, query likelihood, LSI
    low_resolution             down to a few pixels and up again, as a matrix of low rank
    neural_rankers             a dual encoder and KNRM
    projections                exact projections on balls cut by the box
    query_edits                typos and other edits of a query
    r_mtgb_sklearn             R-MTGB as scikit-learn estimators
    robustness_scores          SAR, WAR and what they are made of
    threats                    several norms at once
    weight_interpolation       WiSE-FT: a model between the original and the tuned one
"""

from importlib.util import find_spec
from typing import Any

from lowrank_ref.robustness.attack_losses import cross_entropy, dlr, ranked_class, targeted_dlr
from lowrank_ref.robustness.attacks import Attacked, apgd, pgd, random_start
from lowrank_ref.robustness.augmentation_chains import chained, consistent_loss, jensen_shannon
from lowrank_ref.robustness.cgbc import concept_similarities, soft_trim
from lowrank_ref.robustness.concept_classifier import ConceptClassifier
from lowrank_ref.robustness.corruptions import CORRUPTIONS, corrupt
from lowrank_ref.robustness.document_edits import stuffed, substitution_attack
from lowrank_ref.robustness.dpp import greedy_dpp, sample_k_dpp
from lowrank_ref.robustness.dropout_uncertainty import dropout_probabilities
from lowrank_ref.robustness.efficient_robustification import (
    Heads,
    ThreeHeads,
    certainty,
    choose_head,
    student_loss,
    weighted_distillation,
)
from lowrank_ref.robustness.head_baselines import average_heads, surest_head
from lowrank_ref.robustness.intervals import bootstrap_interval, success_interval
from lowrank_ref.robustness.lambda_mart import LambdaMART, boost_lambdas, count_features, lambdas
from lowrank_ref.robustness.latent_codes import (
    Inverted,
    compose_codes,
    expand_codes,
    inversion_loss,
    invert,
    move_codes,
    shift_codes,
)
from lowrank_ref.robustness.latent_directions import (
    LatentDirections,
    class_flips,
    code_directions,
    first_layer_directions,
    jacobian_directions,
    random_amplitudes,
)
from lowrank_ref.robustness.lexical_rankers import BM25, LSI, QueryLikelihood, WordIndex
from lowrank_ref.robustness.low_resolution import draw_sides, low_resolution, low_resolution_matrix, resize_matrix
from lowrank_ref.robustness.lr0_fm import (
    LRTokens,
    MultiScaleDistillation,
    add_lr_tokens,
    contrastive_distance,
    cosine_distance,
    teacher_features,
)
from lowrank_ref.robustness.natra import (
    NaturalEdits,
    inverse_codes,
    natra_loss,
    plain_edit,
    residual_edit,
    worst_amplitudes,
)
from lowrank_ref.robustness.neural_rankers import KNRM, DualEncoder, TripleShares, WordShares, train_in_batches
from lowrank_ref.robustness.projections import project
from lowrank_ref.robustness.query_edits import misspelt, noisy_letters, reordered, reworded, with_typo, without_word
from lowrank_ref.robustness.ramp import GradientProjection, fuse, ramp_loss
from lowrank_ref.robustness.ranking_robustness import (
    average_precision,
    drop_rate,
    expected_reciprocal_rank,
    low_quantile,
    ndcg,
    normalised_variance,
    rank_of,
    ranking,
    reciprocal_rank,
    success_rate,
    worst_edit,
)
from lowrank_ref.robustness.robustness_scores import (
    CLASSES,
    WAR_WEIGHTS,
    aggregated_robustness,
    improved_robustness,
    relative_robustness,
)
from lowrank_ref.robustness.threats import hull_radius, is_free, survivors, union_accuracy
from lowrank_ref.robustness.weight_interpolation import interpolated

__all__ = [
    "Attacked",
    "BM25",
    "CLASSES",
    "CORRUPTIONS",
    "ConceptClassifier",
    "DualEncoder",
    "GradientProjection",
    "Heads",
    "Inverted",
    "KNRM",
    "LRTokens",
    "LSI",
    "LambdaMART",
    "LatentDirections",
    "MultiScaleDistillation",
    "NaturalEdits",
    "QueryLikelihood",
    "ThreeHeads",
    "TripleShares",
    "WAR_WEIGHTS",
    "WordIndex",
    "WordShares",
    "add_lr_tokens",
    "aggregated_robustness",
    "apgd",
    "average_heads",
    "average_precision",
    "boost_lambdas",
    "bootstrap_interval",
    "certainty",
    "chained",
    "choose_head",
    "class_flips",
    "code_directions",
    "compose_codes",
    "concept_similarities",
    "consistent_loss",
    "contrastive_distance",
    "corrupt",
    "cosine_distance",
    "count_features",
    "cross_entropy",
    "dlr",
    "draw_sides",
    "drop_rate",
    "dropout_probabilities",
    "expand_codes",
    "expected_reciprocal_rank",
    "first_layer_directions",
    "fuse",
    "greedy_dpp",
    "hull_radius",
    "improved_robustness",
    "interpolated",
    "inverse_codes",
    "inversion_loss",
    "invert",
    "is_free",
    "jacobian_directions",
    "jensen_shannon",
    "lambdas",
    "low_quantile",
    "low_resolution",
    "low_resolution_matrix",
    "misspelt",
    "move_codes",
    "natra_loss",
    "ndcg",
    "noisy_letters",
    "normalised_variance",
    "pgd",
    "plain_edit",
    "project",
    "ramp_loss",
    "random_amplitudes",
    "random_start",
    "rank_of",
    "ranked_class",
    "ranking",
    "reciprocal_rank",
    "relative_robustness",
    "reordered",
    "residual_edit",
    "resize_matrix",
    "reworded",
    "sample_k_dpp",
    "shift_codes",
    "soft_trim",
    "student_loss",
    "stuffed",
    "substitution_attack",
    "success_interval",
    "success_rate",
    "surest_head",
    "survivors",
    "targeted_dlr",
    "teacher_features",
    "train_in_batches",
    "union_accuracy",
    "weighted_distillation",
    "with_typo",
    "without_word",
    "worst_amplitudes",
    "worst_edit",
]
if find_spec("sklearn") is not None:  # `import *` asks for every name
    __all__ += ["RMTGBClassifier", "RMTGBRegressor"]


def __getattr__(name: str) -> Any:
    """Import the scikit-learn estimators when they are asked for: the package works without scikit-learn."""
    if name in ("RMTGBClassifier", "RMTGBRegressor"):
        from lowrank_ref.robustness import r_mtgb_sklearn

        return getattr(r_mtgb_sklearn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
