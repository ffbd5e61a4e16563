"""Rivals, near-duplicates, phrases and prompts, against loops."""

import pytest
import torch
from battery import seeded

from lowrank_ref.robustness.concept_pool import composed, concept_prompt, distinct_concepts, nearest_rivals


def test_rivals_equal_a_loop_and_leave_the_class_out():
    names = torch.randn(7, 4, generator=seeded(), dtype=torch.float64)
    found = nearest_rivals(names, 3)
    for i in range(7):
        cosines = {j: float(torch.cosine_similarity(names[i], names[j], dim=0)) for j in range(7) if j != i}
        assert found[i].tolist() == sorted(cosines, key=cosines.get, reverse=True)[:3]


def test_kept_concepts_are_distinct_and_what_is_dropped_is_near_one_kept_before():
    F = torch.randn(60, 3, generator=seeded(), dtype=torch.float64)
    unit = F / F.norm(dim=1, keepdim=True)
    kept = distinct_concepts(F, threshold=0.8)
    cosines = unit @ unit.T
    for i in range(60):
        before = [j for j in kept if j < i]
        near = bool(before) and float(cosines[i, before].max()) > 0.8
        assert (i in kept) is not near
    assert distinct_concepts(F, threshold=1.0) == list(range(60)) and distinct_concepts(F, threshold=-1.0) == [0]


def test_phrases_have_different_concepts_and_all_take_part():
    places = composed(6, 400, size=3, generator=seeded())
    assert places.shape == (400, 3) and set(places.flatten().tolist()) == set(range(6))
    assert all(len(set(row)) == 3 for row in places.tolist())
    assert torch.equal(places, composed(6, 400, size=3, generator=seeded()))


def test_prompts():
    assert concept_prompt("owl", ["big eyes"]) == "a photo of a owl with big eyes."
    satellite = concept_prompt("forest", ["trees", "shade"], template="a satellite photo of {}{}.")
    assert satellite == "a satellite photo of forest with trees or shade."


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: nearest_rivals(torch.rand(3, 2), 3), "count"),
        (lambda: nearest_rivals(torch.rand(3), 1), "names"),
        (lambda: distinct_concepts(torch.rand(3, 2), threshold=1.5), "threshold"),
        (lambda: distinct_concepts(torch.zeros(0, 2)), "features"),
        (lambda: composed(2, 5, size=3), "size"),
        (lambda: composed(0, 5), "pool"),
        (lambda: composed(4, 0), "count"),
    ],
)
def test_bad_input_is_named(call, name, no_shape_checks):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        call()
