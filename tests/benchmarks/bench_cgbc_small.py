"""CGBC against plain means on small species, with concepts of which it is known which are wrong (CPU, five minutes).

    python tests/benchmarks/bench_cgbc_small.py --out book/results/cgbc_small.json --device cpu

rules: how to sum over 50 concepts a class, when none, a fifth, two or three fifths are wrong, in two ways. selection:
which phrases to take of 500. cost: time and bytes of the classifier. A seed is a new encoder, twelve new species to
report on and twelve others to choose on, and new pictures; what is chosen (λ, k, κ, a share) is chosen on those others.
controls: on the same pools and pictures as rules, weights put on embeddings, weights that no image changes, and what a
reader who knows the right concepts could reach.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from common import Runs, arguments, milliseconds
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.linalg import svd
from lowrank_ref.lab.beds import species
from lowrank_ref.robustness import ConceptClassifier, cgbc, concept_pool, concept_rules, dpp

SEEDS = 5
POOLS, CONCEPTS = 2, 50
WRONG = (0.0, 0.2, 0.4, 0.6)
TAKEN = (4, 8, 16, 50)
SPAN = 32  # numbers of a feature: no more phrases can differ

Score = Callable[[Tensor], Tensor]
#: Arms without anything to choose.
FIXED: dict[str, Score] = {
    **concept_rules.SCORE_RULES,
    "upper half": concept_rules.upper_half,
    "κ = 1": partial(concept_rules.fixed_trim, kappa=1.0),
    "κ = 4": partial(concept_rules.fixed_trim, kappa=4.0),
    "one-sided": cgbc.soft_trim,
    "two-sided": partial(cgbc.soft_trim, side="both"),
}
#: Arms with a number that is chosen on other species.
CHOSEN: dict[str, dict[float, Score]] = {
    "one-sided, λ chosen": {v: partial(cgbc.soft_trim, threshold=v) for v in (1.5, 2.5, 4.0, 6.0)},
    "two-sided, k chosen": {v: partial(cgbc.soft_trim, side="both", slope=v) for v in (0.1, 0.25, 0.5, 1.0, 2.0)},
    "fixed κ chosen": {v: partial(concept_rules.fixed_trim, kappa=v) for v in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)},
    "hard trim, share chosen": {v: partial(concept_rules.hard_trim, share=v) for v in (0.0, 0.1, 0.2, 0.3, 0.4, 0.49)},
}


@cache
def world(seed: int, tiny: bool) -> species.SpeciesWorld:
    """Train the encoder of a seed."""
    return species.species_world(seed, **({"pictures": 100, "steps": 2} if tiny else {}))


def seeded(seed: int, part: int) -> torch.Generator:
    """Make the stream of a seed for one purpose."""
    return torch.Generator().manual_seed(100_000 * part + seed)


class Task:
    """Pictures of the species of a seed, or of its other species."""

    def __init__(self, seed: int, tiny: bool, *, others: bool = False):
        self.world = world(seed, tiny)
        self.species = self.world.others if others else self.world.species
        count = 60 if tiny else 400 if others else 1000
        self.V, self.y = self.world.pictures(count, species=self.species, generator=seeded(seed, 1 + others))

    def features(self, words: Tensor) -> Tensor:
        """Return features (classes, m, d) of prompts: the name and these words."""
        return self.world.texts(species.with_name(words, self.species))

    def similarities(self, words: Tensor) -> Tensor:
        """Return S (pictures, classes, m)."""
        return cgbc.concept_similarities(self.V, self.features(words), scale=self.world.scale)

    def accuracy(self, score: Tensor) -> float:
        """Return the share of pictures whose own class has the largest score."""
        return float((score.argmax(dim=1) == self.y).double().mean())


def random_words(classes: int, g: torch.Generator) -> Tensor:
    """Concepts that know nothing: each of a random species, of the same kinds of words."""
    fakes = [torch.randint(c, (classes * CONCEPTS,), generator=g) for c in species.COUNTS[:3]]
    words = species.concept_words(torch.stack(fakes, dim=1), 1, generator=g)
    return words.view(classes, CONCEPTS, -1)


def premise(task: Task, pool: Tensor, g: torch.Generator) -> dict[str, float]:
    """Name, templates, concepts, and two kinds of concepts that cannot help; all as a mean of embeddings."""
    w = task.species

    def embedded(features: Tensor) -> float:
        return task.accuracy(concept_rules.mean_embedding_scores(task.V, features, scale=task.world.scale))

    texts = task.world.texts
    wrong_class = pool[species.rival_species(w)]
    contrasted = species.concept_words(w, CONCEPTS, contrast=True, generator=g)
    return {
        "name": embedded(texts(species.name_words(w))[:, None]),
        "templates": embedded(texts(species.template_words(w))),
        "random words": embedded(task.features(random_words(len(w), g))),
        "rival's concepts": embedded(task.features(wrong_class)),
        "contrasted, one-sided": task.accuracy(cgbc.soft_trim(task.similarities(contrasted))),
    }


def truncated(task: Task, words: Tensor, rank: int) -> float:
    """Accuracy of one-sided soft trim when the table of all concepts has this rank."""
    T = task.features(words)
    U, S, Vh = svd(T.flatten(0, 1), rank)
    return task.accuracy(
        cgbc.soft_trim(cgbc.concept_similarities(task.V, (U * S @ Vh).view_as(T), scale=task.world.scale))
    )


def rules(seed: int, kind: str, wrong: float, tiny: bool) -> dict[str, Any]:
    """All arms on the same pools; means over the pools."""
    test, valid = Task(seed, tiny), Task(seed, tiny, others=True)
    streams = [seeded(seed, 10 + pool) for pool in range(POOLS)]
    words, other = (
        [species.concept_words(t.species, CONCEPTS, wrong=wrong, kind=kind, generator=g) for g in streams]
        for t in (test, valid)
    )
    tables = [valid.similarities(pool) for pool in other]
    arms, chosen, tried = dict(FIXED), {}, {}
    for name, grid in CHOSEN.items():
        tried[name] = {
            str(v): round(sum(valid.accuracy(rule(S)) for S in tables) / POOLS, 5) for v, rule in grid.items()
        }
        chosen[name] = max(grid, key=lambda v: tried[name][str(v)])
        arms[name] = grid[chosen[name]]
    found: dict[str, list[float]] = {}
    for pool, g in zip(words, streams):
        S = test.similarities(pool)
        embeddings = concept_rules.mean_embedding_scores(test.V, test.features(pool), scale=test.world.scale)
        numbers = {"share found": float(cgbc.outlier_share(S).mean()), "mean embedding": test.accuracy(embeddings)}
        numbers |= {name: test.accuracy(rule(S)) for name, rule in arms.items()}
        if wrong == 0:
            numbers |= premise(test, pool, g)
        if kind == "stray" and wrong == 0.2:
            numbers |= {f"rank {r}": truncated(test, pool, r) for r in (2, 4, 6, 8, 12, 16, 24, 32)}
        for name, value in numbers.items():
            found.setdefault(name, []).append(value)
    means = {name: round(sum(values) / POOLS, 5) for name, values in found.items()}
    return {"numbers": means, "chosen": chosen, "tried": tried}


def right_ones(words: Tensor, kinds: Tensor) -> Tensor:
    """Return 1 for concepts (classes, m, words) whose colours and textures are all the species' own, else 0."""
    own = torch.zeros(len(kinds), words.shape[2]).scatter_(1, torch.tensor(species.FIRST)[1:3] + kinds[:, 1:], 1.0)
    looks = slice(species.FIRST[1], species.FIRST[3])
    return (words[..., looks] <= own[:, None, looks]).all(dim=2).float()


def controls(seed: int, kind: str, wrong: float, tiny: bool) -> dict[str, Any]:
    """Arms that tell apart what the weights do: where they sit, whether the image is needed, what is the ceiling."""
    task, found = Task(seed, tiny), {}
    full = torch.zeros(len(task.species), 1, len(species.WORDS))
    full.scatter_(2, (torch.tensor(species.FIRST)[1:3] + task.species[:, 1:])[:, None], 1.0)
    for pool in range(POOLS):
        words = species.concept_words(task.species, CONCEPTS, wrong=wrong, kind=kind, generator=seeded(seed, 10 + pool))
        T, S = task.features(words), task.similarities(words)
        fit = (T * F.normalize(T.mean(dim=1, keepdim=True), dim=-1)).sum(dim=-1)  # of a concept to its own class
        weights = {
            "one-sided, embeddings": cgbc.trim_weights(S, cgbc.trim_sharpness(S)),
            "upper half, embeddings": (S.median(dim=-1, keepdim=True).values < S).to(S.dtype),
            "upper half of the text": (fit > fit.median(dim=-1, keepdim=True).values).to(S.dtype),
            "right ones only": right_ones(words, task.species),
        }
        scores = {n: concept_rules.weighted_embedding_scores(task.V, T, w) for n, w in weights.items()}
        scores["one-sided"] = cgbc.soft_trim(S)
        scores["one full prompt"] = concept_rules.mean_embedding_scores(task.V, task.features(full))
        for name, score in scores.items():
            found.setdefault(name, []).append(task.accuracy(score))
    return {"numbers": {name: round(sum(values) / POOLS, 5) for name, values in found.items()}}


def farthest(E: Tensor, count: int) -> Tensor:
    """Take the first, then always what has the smallest cosine with its nearest neighbour among the taken."""
    picks, nearest = [0], E @ E[0]
    while len(picks) < count:
        nearest[picks] = 2.0
        picks.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, E @ E[picks[-1]])
    return torch.tensor(picks)


def taken(way: str, E: Tensor, name: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Places of `count` of the phrases with unit features E, by one of the ways of `selection`."""
    if way == "random":
        return torch.randperm(len(E), generator=g)[:count]
    if way == "greedy DPP":
        return dpp.greedy_dpp(E, count)[0]
    if way == "k-DPP":
        return dpp.sample_k_dpp(E, count, generator=g)
    if way == "farthest":
        return farthest(E, count)
    return (E @ name).argsort(descending=True)[:count]


def wrong_words(bags: Tensor, kinds: Tensor) -> float:
    """Share of the colours and textures in these bags (classes, words) that are not the species' own."""
    first = torch.tensor(species.FIRST)
    own = bags.gather(1, first[1:3] + kinds[:, 1:]).sum()
    return float(1 - own / bags[:, species.FIRST[1] : species.FIRST[3]].sum())


WAYS = ("random", "greedy DPP", "k-DPP", "farthest", "nearest to the name")


def selection(seed: int, wrong: float, repeated: bool, tiny: bool) -> dict[str, Any]:
    """Phrases of three concepts of 50 (or of five, each ten times): which to take, and how to sum them."""
    task, g = Task(seed, tiny), seeded(seed, 20 + repeated)
    w = task.species
    atoms = species.concept_words(w, 5 if repeated else CONCEPTS, wrong=wrong, generator=g)
    atoms = atoms.repeat(1, 10, 1) if repeated else atoms
    places = torch.stack([concept_pool.composed(CONCEPTS, 60 if tiny else 500, generator=g) for _ in w])
    phrases = species.join_words(atoms, places)
    bare, names = task.world.texts(phrases), task.world.texts(species.name_words(w))
    numbers: dict[str, float] = {}

    def record(arm: str, words: Tensor) -> None:
        S = task.similarities(words)
        numbers[f"{arm}, one-sided"] = round(task.accuracy(cgbc.soft_trim(S)), 5)
        numbers[f"{arm}, mean"] = round(task.accuracy(S.mean(dim=-1)), 5)

    for count in TAKEN:
        for way in WAYS:
            if count > SPAN and way == "k-DPP":
                continue
            try:
                picks = torch.stack([taken(way, E, n, count, g) for E, n in zip(bare, names)])
            except ValueError:  # five concepts span too little for an exact draw
                continue
            record(f"{way}, {count}", phrases.gather(1, picks[..., None].expand(-1, -1, phrases.shape[2])))
            words = phrases.gather(1, picks[..., None].expand(-1, -1, phrases.shape[2])).sum(dim=1)
            numbers[f"{way}, {count}, wrong words"] = round(wrong_words(words, w), 5)
            volumes = [float(dpp.log_volume(E, p)) for E, p in zip(bare, picks)]
            if math.isfinite(sum(volumes)):
                numbers[f"{way}, {count}, log volume"] = round(sum(volumes) / len(volumes), 3)
        alone = torch.stack([torch.randperm(CONCEPTS, generator=g)[:count] for _ in w])
        record(f"atoms, {count}", atoms.gather(1, alone[..., None].expand(-1, -1, atoms.shape[2])))
    ranks = [int(torch.linalg.matrix_rank(E, rtol=1e-4)) for E in bare]
    return {"numbers": numbers, "rank of the phrases": sum(ranks) / len(ranks)}


def cost(concepts: int, tiny: bool) -> dict[str, Any]:
    """Time of 16 images and 100 classes, with D = 512 as in CLIP ViT-B/16, and bytes of the table."""
    g = torch.Generator().manual_seed(0)
    classes, d = (3, 8) if tiny else (100, 512)
    T = torch.randn(classes, concepts, d, generator=g)
    x, model = torch.randn(16, d, generator=g), ConceptClassifier(T)
    mean = ConceptClassifier(F.normalize(T, dim=-1).mean(dim=1, keepdim=True))
    repeats = 1 if tiny else 5
    times = {
        "soft trim": milliseconds(lambda: model(x), repeats=repeats),
        "mean embedding": milliseconds(lambda: mean(x), repeats=repeats),
    }
    return {"ms": {name: t["median_ms"] / 16 for name, t in times.items()}, "table bytes": 4 * T.numel()}


def main() -> None:
    """Run all parts, seed by seed."""
    args = arguments(__doc__ or "", ("rules", "selection", "controls", "cost"))
    torch.set_num_threads(1)
    bed = "species bed: 16x16 pictures, CLIP loss, 12 species of 4 names, 1,000 pictures; accuracy"
    runs = {
        "rules": Runs(args.out, "rules", setting=f"{bed}, mean of 2 pools of 50 concepts", seconds=args.seconds),
        "selection": Runs(
            args.out, "selection", setting=f"{bed}; phrases of 3 concepts, M of 500", seconds=args.seconds
        ),
        "controls": Runs(args.out, "controls", setting=f"{bed}, the pools of rules", seconds=args.seconds),
        "cost": Runs(args.out, "cost", setting="100 classes, 512 numbers, float32, one thread", seconds=args.seconds),
    }
    for seed in range(1 if args.tiny else SEEDS):
        if "rules" in args.part:
            for kind in species.KINDS:
                for wrong in WRONG:
                    key = {"kind": kind, "wrong": wrong, "seed": seed}
                    runs["rules"].row(key, partial(rules, seed, kind, wrong, args.tiny))
        if "selection" in args.part:
            for wrong, repeated in ((0.0, False), (0.4, False), (0.0, True)):
                key = {"wrong": wrong, "repeated": repeated, "seed": seed}
                runs["selection"].row(key, partial(selection, seed, wrong, repeated, args.tiny))
        if "controls" in args.part:
            for kind, wrong in (("stray", 0.0), *((k, w) for k in species.KINDS for w in WRONG[1:])):
                key = {"kind": kind, "wrong": wrong, "seed": seed}
                runs["controls"].row(key, partial(controls, seed, kind, wrong, args.tiny))
    if "cost" in args.part:
        for concepts in (1, 16, 50, 500):
            runs["cost"].row({"concepts": concepts}, partial(cost, concepts, args.tiny))


if __name__ == "__main__":
    main()
