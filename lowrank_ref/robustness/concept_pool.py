"""Pools of concepts for CGBC: rivals to contrast with, near-duplicates out, three concepts in one phrase, prompts.

Who writes the concepts is not here. In the paper it is a language model, which is shown the class and its rivals.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_matrix, check_number
from lowrank_ref.robustness.dpp import check_count


def nearest_rivals(names: Float[Tensor, "classes d"], count: int = 10) -> Int64[Tensor, "classes count"]:
    """Return for each class the others whose names have the largest cosine with its own, nearest first.

    Raises:
        TypeError, ValueError: names that are no finite matrix, or a count out of [1, classes - 1].
    """
    check_matrix("names", names)
    check_count("count", count, len(names) - 1)
    unit = F.normalize(names.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-2.0).argsort(dim=1, descending=True, stable=True)[:, :count]


def distinct_concepts(features: Float[Tensor, "n d"], *, threshold: float = 0.95) -> list[int]:
    """Return the places of concepts that are kept: each one whose cosine with all kept before is at most threshold.

    Raises:
        TypeError, ValueError: features that are no finite matrix, or a threshold out of [-1, 1].

    Example:
        >>> distinct_concepts(torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.0, 1.0]]))
        [0, 2]
    """
    check_matrix("features", features)
    check_number("threshold", threshold, low=-1, high=1)
    unit = F.normalize(features.double(), dim=1)
    kept: list[int] = []
    for i, row in enumerate(unit):
        if not kept or float((unit[kept] @ row).max()) <= threshold:
            kept.append(i)
    return kept


def composed(
    pool: int, count: int, *, size: int = 3, generator: torch.Generator | None = None
) -> Int64[Tensor, "count size"]:
    """Draw `count` phrases of `size` different concepts from a pool of so many; return the places of the concepts.

    Raises:
        TypeError, ValueError: pool, count or size is no integer >= 1, or size > pool.
    """
    check_integer("pool", pool, low=1)
    check_integer("count", count, low=1)
    check_count("size", size, pool)
    return torch.stack([torch.randperm(pool, generator=generator)[:size] for _ in range(count)])


def concept_prompt(name: str, concepts: Sequence[str] = (), *, template: str = "a photo of a {}{}.") -> str:
    """Return the prompt of a class with concepts joined by "or", or without any.

    Example:
        >>> concept_prompt("heron", ["grey wings", "long legs"])
        'a photo of a heron with grey wings or long legs.'
        >>> concept_prompt("heron")
        'a photo of a heron.'
    """
    return template.format(name, " with " + " or ".join(concepts) if concepts else "")
