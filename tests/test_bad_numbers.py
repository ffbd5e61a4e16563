"""Strengths, thresholds, rates and radii that are negative, NaN or infinite: a ValueError that names the argument.

A public function or class of a part that has an argument of one of these names and is not in the table fails here.
"""

import importlib
import inspect
import math

import pytest
import torch
from torch import nn

from lowrank_ref import adapters, analysis, compression, lowbit, optimizers, pretraining, ranks, robustness
from lowrank_ref.core.registry import PARTS

NAMES = {
    "strength",
    "penalty",
    "threshold",
    "temperature",
    "weight_decay",
    "epsilon",
    "beta",
    "decay",
    "clip",
    "gate_l2",
}
NAMES |= {"density", "sparsity", "lr", "learning_rate", "gate_learning_rate", "ratio", "dropout", "alpha"}


def weights():
    return [nn.Parameter(torch.ones(4, 4))]


def gated():
    return nn.Sequential(ranks.SoRALinear(nn.Linear(4, 4), 2))


def bayesian():
    return nn.Sequential(ranks.BayesianLoRALinear(nn.Linear(4, 4), 2))


def attack(function, **options):
    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 1])
    return function(nn.Linear(4, 2), x, y, **{"norm": math.inf, "epsilon": 0.1} | options)


def fitted(**options):
    X, y = torch.arange(24.0).reshape(12, 2).numpy(), torch.arange(12).remainder(2).numpy()
    return robustness.RMTGBClassifier(gated_rounds=1, task_rounds=1, **options).fit(X, y, tasks=[0, 1] * 6)


def optimizer(kind):
    return lambda **options: kind(weights(), **options)


def two_alike():
    return [nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)]


def trained_ranker(**options):
    model = robustness.DualEncoder(robustness.WordShares({"a": 0, "b": 1}), 2, generator=torch.Generator())
    options = {"lr": 0.1} | options
    return robustness.train_in_batches(model, [["a"]], [["b"]], steps=1, generator=torch.Generator(), **options)


def boosted(**options):
    X, grades = torch.zeros(1, 2, 1), torch.tensor([[0, 1]])
    return robustness.boost_lambdas(X, grades, fit=lambda X, y: None, rounds=0, **options)


CALLS = {
    ("adapters", "DoRALinear"): lambda **k: adapters.DoRALinear(nn.Linear(4, 4), 2, **k),
    ("adapters", "LoRAConv2d"): lambda **k: adapters.LoRAConv2d(nn.Conv2d(4, 4, 1), 2, **k),
    ("adapters", "LoRAEmbedding"): lambda **k: adapters.LoRAEmbedding(nn.Embedding(4, 4), 2, **k),
    ("adapters", "LoRALinear"): lambda **k: adapters.LoRALinear(nn.Linear(4, 4), 2, **k),
    ("adapters", "LoRASBLinear"): lambda **k: adapters.LoRASBLinear(
        nn.Linear(4, 4), *torch.eye(4).expand(3, 4, 4), **k
    ),
    ("adapters", "NOLALinear"): lambda **k: adapters.NOLALinear(nn.Linear(4, 4), 2, **k),
    ("adapters", "PiSSALinear"): lambda **k: adapters.PiSSALinear(nn.Linear(4, 4), 2, **k),
    ("adapters", "RandLoRALinear"): lambda **k: adapters.RandLoRALinear(nn.Linear(4, 4), 2, **k),
    ("adapters", "SaRALinear"): lambda **k: adapters.SaRALinear(nn.Linear(4, 4), **k),
    ("adapters", "threshold_for_density"): lambda **k: adapters.threshold_for_density([torch.ones(4)], **k),
    ("adapters", "confident_penalty"): lambda **k: adapters.confident_penalty(torch.eye(2), low=0.0, high=1.0, **k),
    ("adapters", "temperature_kl"): lambda **k: adapters.temperature_kl(torch.eye(2), torch.eye(2), **k),
    ("adapters", "lora_scaling"): lambda **k: adapters.lora_scaling(rank=2, **k),
    ("adapters", "rslora_scaling"): lambda **k: adapters.rslora_scaling(rank=2, **k),
    ("analysis", "MPSLinear"): lambda **k: analysis.MPSLinear(nn.Linear(4, 4), 2, **k),
    ("analysis", "marchenko_pastur_density"): lambda **k: analysis.marchenko_pastur_density(torch.ones(2), **k),
    ("adapters", "lora_plus_groups"): lambda **k: adapters.lora_plus_groups(gated(), **{"lr": 0.1} | k),
    ("compression", "RankShrinker"): lambda **k: compression.RankShrinker(
        nn.Sequential(compression.MaestroLinear.from_linear(nn.Linear(4, 4))), every=1, **k
    ),
    ("compression", "TrainedRankPruning"): lambda **k: compression.TrainedRankPruning(
        nn.Sequential(nn.Linear(4, 4)), "0", **k
    ),
    ("compression", "rank_at_threshold"): lambda **k: compression.rank_at_threshold(torch.ones(3), **k),
    ("compression", "RankPlan"): lambda **k: compression.RankPlan({"0": 1}, {"0": (2, 2)}, (), **{"nominal": 0.5} | k),
    ("compression", "pruned_counts"): lambda **k: compression.pruned_counts([torch.tensor([2.0, 1.0])], **k),
    ("compression", "Repair"): lambda **k: compression.Repair(*two_alike(), "0", **k),
    ("compression", "rank_at_ratio"): lambda **k: compression.rank_at_ratio(4, 4, **k),
    ("compression", "plan_by_ratio"): lambda **k: compression.plan_by_ratio(two_alike()[0], **k),
    ("lowbit", "NarrowAdamW"): optimizer(lowbit.NarrowAdamW),
    ("lowbit", "gate_penalty"): lambda **k: lowbit.gate_penalty(torch.ones(3), **k),
    ("optimizers", "GaLore"): optimizer(optimizers.GaLore),
    ("optimizers", "GaLoreAdafactor"): optimizer(optimizers.GaLoreAdafactor),
    ("optimizers", "GaLoreAdamW"): optimizer(optimizers.GaLoreAdamW),
    ("optimizers", "GaLoreAdamW8bit"): optimizer(optimizers.GaLoreAdamW8bit),
    ("optimizers", "GaLoreSGD"): optimizer(optimizers.GaLoreSGD),
    ("pretraining", "SLTrainLinear"): lambda **k: pretraining.SLTrainLinear(4, 4, rank=2, **k),
    ("ranks", "CoDyRALinear"): lambda **k: ranks.CoDyRALinear(nn.Linear(4, 4), 2, **k),
    ("ranks", "bernoulli_kl"): lambda **k: ranks.bernoulli_kl(torch.full((3,), 0.5), **k),
    ("ranks", "chain_divergence"): lambda **k: ranks.chain_divergence(bayesian(), **k),
    ("ranks", "chain_kl"): lambda **k: ranks.chain_kl(torch.full((3,), 0.5), **k),
    ("ranks", "logit_groups"): lambda **k: ranks.logit_groups(bayesian(), **{"lr": 0.1} | k),
    ("ranks", "ProximalGates"): lambda **k: ranks.ProximalGates(gated(), torch.optim.SGD(weights(), 0.1), **k),
    ("ranks", "DiffoRALinear"): lambda **k: ranks.DiffoRALinear(nn.Linear(4, 4), 2, **k),
    ("ranks", "ModuleSearch"): lambda **k: ranks.ModuleSearch(
        nn.Sequential(ranks.DiffoRALinear(nn.Linear(4, 4), 2)), lambda *_: torch.ones(()), lambda i: (), **k
    ),
    ("ranks", "IncreLoRALinear"): lambda **k: ranks.IncreLoRALinear(nn.Linear(4, 4), **k),
    ("ranks", "SoRALinear"): lambda **k: ranks.SoRALinear(nn.Linear(4, 4), 2, **k),
    ("ranks", "gate_groups"): lambda **k: ranks.gate_groups(gated(), **k),
    ("ranks", "soft_threshold"): lambda **k: ranks.soft_threshold(torch.ones(3), **k),
    ("robustness", "ConceptClassifier"): lambda **k: robustness.ConceptClassifier(torch.ones(2, 3, 4), **k),
    ("robustness", "LambdaMART"): lambda **k: robustness.LambdaMART(lambda q, d: torch.ones(1, 1, 1), [], **k),
    ("robustness", "boost_lambdas"): boosted,
    ("robustness", "concept_similarities"): lambda **k: robustness.concept_similarities(
        torch.ones(2, 4), torch.ones(2, 3, 4), **k
    ),
    ("robustness", "soft_trim"): lambda **k: robustness.soft_trim(torch.ones(3), **k),
    ("robustness", "train_in_batches"): trained_ranker,
    ("robustness", "GradientProjection"): lambda **k: robustness.GradientProjection(
        nn.Linear(2, 2), nn.Linear(2, 2), **k
    ),
    ("robustness", "choose_head"): lambda **k: robustness.choose_head(robustness.Heads(*torch.ones(3, 2, 4)), **k),
    ("robustness", "student_loss"): lambda **k: robustness.student_loss(
        *torch.ones(3, 2, 4), torch.tensor([0, 1]), torch.ones(2, 4), **k
    ),
    ("robustness", "weighted_distillation"): lambda **k: robustness.weighted_distillation(*torch.ones(2, 2, 4), **k),
    ("robustness", "RMTGBClassifier"): fitted,
    ("robustness", "RMTGBRegressor"): fitted,
    ("robustness", "apgd"): lambda **k: attack(robustness.apgd, **k),
    ("robustness", "fuse"): lambda **k: robustness.fuse(*torch.ones(3, 2), **k),
    ("robustness", "NaturalEdits"): lambda **k: robustness.NaturalEdits(
        nn.Linear(4, 4), torch.eye(4), **{"epsilon": 1.0} | k
    ),
    ("robustness", "expand_codes"): lambda **k: robustness.expand_codes(
        nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(1, 4), torch.ones(1, 2, 4), **k
    ),
    ("robustness", "inverse_codes"): lambda **k: robustness.inverse_codes(
        nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(1, 4), **k
    ),
    ("robustness", "invert"): lambda **k: robustness.invert(nn.Linear(4, 4), torch.ones(1, 4), torch.ones(1, 4), **k),
    ("robustness", "random_amplitudes"): lambda **k: robustness.random_amplitudes(2, 1, **k),
    ("robustness", "worst_amplitudes"): lambda **k: robustness.worst_amplitudes(
        nn.Linear(4, 2), nn.Identity(), torch.tensor([0]), torch.zeros(1, 4), **k
    ),
    ("robustness", "pgd"): lambda **k: attack(robustness.pgd, **k),
    ("robustness", "project"): lambda **k: robustness.project(torch.ones(2, 4), torch.ones(2, 4), norm=2, **k),
    ("robustness", "random_start"): lambda **k: robustness.random_start(torch.ones(2, 4), norm=2, **k),
}


def found():
    """(part, name, argument) of everything public that has such an argument."""
    for part in PARTS:
        package = importlib.import_module(f"lowrank_ref.{part}")
        for name in package.__all__:
            thing = getattr(package, name)
            if callable(thing):
                try:
                    arguments = inspect.signature(thing).parameters
                except ValueError:
                    continue
                yield from ((part, name, argument) for argument in arguments if argument in NAMES)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("part, name, argument", sorted(found()))
def test_a_number_that_means_nothing_is_refused(part, name, argument, value):
    assert (part, name) in CALLS, f"{part}.{name} has an argument {argument}: say in CALLS how it is called"
    with pytest.raises(ValueError, match=argument):
        CALLS[part, name](**{argument: value})
