"""The dual encoder and KNRM from their equations, and that they learn."""

import math

import pytest
import torch

from lowrank_ref.robustness.neural_rankers import (
    KNRM,
    DualEncoder,
    TripleShares,
    WordShares,
    letter_triples,
    train_in_batches,
)

WORDS = {"red": 0, "fish": 1, "blue": 2, "sea": 3, "green": 4}
DOCS = [["red", "fish", "fish"], ["blue", "sea", "?"], ["green", "sea"]]
QUERIES = [["red"], ["sea", "blue"], ["fish", "unknown"]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_features():
    shares = WordShares(WORDS)
    assert torch.allclose(shares(DOCS)[0], torch.tensor([1 / 3, 2 / 3, 0, 0, 0]))
    assert torch.allclose(shares(DOCS)[1], torch.tensor([0, 0, 0.5, 0.5, 0])) and shares([["?"]]).abs().sum() == 0
    triples = TripleShares([["deer"]])
    assert triples.size == 4 and letter_triples("a") == ("#a#",)
    assert triples([["dear"]]).tolist() == [[0.0, 0.0, 0.0, 0.0]] or triples([["dear"]])[0].sum() == 1
    assert torch.allclose(triples([["deer"]]), torch.full((1, 4), 0.25))


def test_the_dual_encoder_is_its_equation():
    shares = WordShares(WORDS)
    model = DualEncoder(shares, shares.size, 6, generator=seeded())

    def vector(text):
        x = torch.tanh(shares([text])[0] @ model.E) @ model.H
        return x / x.norm()

    scores = model(QUERIES, DOCS)
    for i, q in enumerate(QUERIES):
        for j, d in enumerate(DOCS):
            assert scores[i, j].item() == pytest.approx((vector(q) @ vector(d)).item(), abs=1e-6)
    assert torch.allclose(model.encode(DOCS), model.encode(DOCS[:1] + DOCS[1:]))
    assert model([["unknown"]], DOCS).abs().max() == 0


def test_synonyms_with_one_vector_are_the_same_to_it():
    shares = WordShares(WORDS)
    model = DualEncoder(shares, shares.size, 6, generator=seeded())
    with torch.no_grad():
        model.E[0] = model.E[2]
    assert torch.allclose(model([["red", "sea"]], DOCS), model([["blue", "sea"]], DOCS), atol=1e-6)


def test_an_unknown_word_costs_what_its_deletion_costs():
    shares = WordShares(WORDS)
    for model in (DualEncoder(shares, 5, 6, generator=seeded()), KNRM(WORDS, 4, generator=seeded())):
        assert torch.equal(model([["red", "fihs"]], DOCS), model([["red"]], DOCS))
        assert torch.equal(model([["fihs"]], DOCS), torch.zeros(1, len(DOCS)))  # nothing known at all


def test_knrm_is_its_equation():
    model = KNRM(WORDS, 4, generator=seeded())
    with torch.no_grad():
        model.weights.copy_(torch.randn(11, generator=seeded(1)))
    scores = model(QUERIES, DOCS)
    unit = torch.nn.functional.normalize(model.vectors, dim=1)
    mus = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9]
    for i, q in enumerate(QUERIES):
        for j, d in enumerate(DOCS):
            slow = 0.0
            for k, mu in enumerate(mus):
                sigma = 1e-3 if k == 0 else 0.1
                for t in (WORDS[w] for w in q if w in WORDS):
                    near = [float(unit[t] @ unit[WORDS[u]]) for u in d if u in WORDS]
                    soft = sum(math.exp(-((m - mu) ** 2) / (2 * sigma**2)) for m in near)
                    slow += float(model.weights[k]) * math.log(max(soft, 1e-10)) / 100
            assert scores[i, j].item() == pytest.approx(slow, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["dual", "KNRM"])
def test_training_puts_the_right_document_first(kind):
    shares = WordShares(WORDS)
    g = seeded(3)
    model = DualEncoder(shares, 5, 8, generator=g) if kind == "dual" else KNRM(WORDS, 8, generator=g)
    asked, right = [["red"], ["blue"], ["green"]], [["fish"], ["sea"], ["green"]]
    temperature = 0.1 if kind == "dual" else 0.01
    options = {"lr": 0.03, "generator": g, "batch": 8, "temperature": temperature}
    train_in_batches(model, asked, right, steps=0, **options)
    train_in_batches(model, asked, right, steps=150, **options)
    assert not model.training
    with torch.no_grad():
        assert model(asked, right).argmax(1).tolist() == [0, 1, 2]


def test_training_repeats():
    shares = WordShares(WORDS)
    found = []
    for _ in range(2):
        g = seeded(4)
        model = DualEncoder(shares, 5, 8, generator=g)
        train_in_batches(model, QUERIES, DOCS, steps=5, lr=0.01, generator=g, batch=4)
        found.append(model.E.detach().clone())
    assert torch.equal(*found)


def test_bad_input():
    shares = WordShares(WORDS)
    model = DualEncoder(shares, 5, 4, generator=seeded())
    options = {"steps": 1, "lr": 0.1, "generator": seeded()}
    for call, kind, error in (
        (lambda: DualEncoder(shares, 0, generator=seeded()), ValueError, "size: got 0"),
        (lambda: DualEncoder(shares, 5, 0, generator=seeded()), ValueError, "dim: got 0"),
        (lambda: KNRM({}, generator=seeded()), ValueError, "words: got 0"),
        (lambda: model("ab", DOCS), TypeError, "texts: got a string"),
        (lambda: KNRM(WORDS, generator=seeded())([["a"]], []), ValueError, "documents: got none"),
        (lambda: TripleShares(["deer"]), TypeError, "texts: got a string"),
        (lambda: train_in_batches(model, QUERIES, DOCS[:2], **options), ValueError, "documents: got 2"),
        (lambda: train_in_batches(model, QUERIES, DOCS, batch=1, **options), ValueError, "batch: got 1"),
        (lambda: train_in_batches(model, QUERIES, DOCS, temperature=0, **options), ValueError, "temperature: got 0"),
    ):
        with pytest.raises(kind, match=error):
            call()
