"""The classifier is the functions, with its concepts in a buffer."""

import copy
import io
import math

import pytest
import torch
from battery import seeded

from lowrank_ref.robustness import ConceptClassifier
from lowrank_ref.robustness.cgbc import concept_similarities, soft_trim


def concepts(k=4, m=6, d=5):
    return torch.randn(k, m, d, generator=seeded(), dtype=torch.float64)


def images(n=7, d=5):
    return torch.randn(n, d, generator=seeded(1), dtype=torch.float64)


@pytest.mark.parametrize("side", ["lower", "both"])
def test_it_is_the_functions_one_image_or_many(side):
    prior = torch.rand(4, 6, generator=seeded(2))
    model = ConceptClassifier(concepts(), prior=prior, scale=30.0, temperature=2.0, side=side, threshold=2.0, slope=0.5)
    S = concept_similarities(images(), concepts(), scale=30.0, temperature=2.0)
    wanted = soft_trim(S, side=side, threshold=2.0, slope=0.5, prior=prior.double())
    torch.testing.assert_close(model(images()), wanted)
    torch.testing.assert_close(model(images()[3:4]), wanted[3:4])
    assert not list(model.parameters())


def test_classes_may_have_different_numbers_of_concepts():
    T = concepts()
    T[1, 2:] = math.nan
    few = ConceptClassifier(T[1:2, :2])(images())
    torch.testing.assert_close(ConceptClassifier(T)(images())[:, 1:2], few)


def test_a_class_with_fewer_concepts_leaves_the_gradient_of_the_image():
    T = concepts()
    T[1, 2:] = math.nan
    x, y = images().requires_grad_(), images().requires_grad_()
    ConceptClassifier(T)(x)[:, 0].sum().backward()
    ConceptClassifier(concepts())(y)[:, 0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_it_is_saved_copied_and_moved_in_half_precision():
    model = ConceptClassifier(concepts().float())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = ConceptClassifier(torch.ones(4, 6, 5))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = images().float()
    assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.float32 and bool(half.isfinite().all())


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: ConceptClassifier([[1.0]]), "concepts"),
        (lambda: ConceptClassifier(torch.ones(2, 3, dtype=torch.long)), "concepts"),
        (lambda: ConceptClassifier(torch.ones(2, 3)), "concepts"),
        (lambda: ConceptClassifier(torch.ones(2, 0, 3)), "concepts"),
        (lambda: ConceptClassifier(concepts() * math.inf), "concepts"),
        (lambda: ConceptClassifier(concepts() * math.nan), "concepts, prior"),
        (lambda: ConceptClassifier(concepts(), prior=torch.ones(4)), "prior"),
        (lambda: ConceptClassifier(concepts(), prior=-torch.ones(4, 6)), "prior"),
        (lambda: ConceptClassifier(concepts(), prior=torch.zeros(4, 6)), "concepts, prior"),
        (lambda: ConceptClassifier(concepts(), prior=math.nan * torch.ones(4, 6)), "prior"),
        (lambda: ConceptClassifier(concepts(), side="upper"), "side"),
        (lambda: ConceptClassifier(concepts(), threshold=0.0), "threshold"),
        (lambda: ConceptClassifier(concepts(), scale=0.0), "scale"),
        (lambda: ConceptClassifier(concepts(), temperature=0.0), "temperature"),
    ],
)
def test_bad_input_is_named(make, name, no_shape_checks):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        make()
