"""Test beds that several chapters share, so that their tables can be compared line by line.

**digits-shift**: a small network learns upright digits; the task is the same digits turned by 90° (or moved, negative,
relabelled, as `shift` says). Every method gets the same 200 Adam steps of 64 images, a learning rate that falls
linearly to 0, and a grid of rates for `lab.compare`.

**Markov pretraining**: a small GPT learns, from scratch, a language of 16 letters in which two letters decide the odds
of the next. Attention has to fetch the letter before the last. The entropy of the language is known.

**biased digits**: upright digits, then lower and paler ones of which half of the classes are rare and labels are wrong;
or a pretraining with wrong labels, or with a mark that tells the class:

    data = biased_digits(seed, agreement=0.95)      # a mark that told the class in the pretraining, not in the task
    train_biased(data, adapt, lr=5e-3, seed=seed)   # right answers: minority, majority, old; reliance on the mark

**planted rank**: the weights of a known network move by updates of known rank, a different one in each layer, and a
student sees only noisy inputs and outputs. Whatever decides about ranks can be compared with the truth, layer by layer:

    task = planted_rank(seed)                       # the truth: task.ranks == (0, 1, 1, 8), task.updates
    model = train_planted(task, adapt, lr=5e-3)     # any adapter, any allocator
    measure_planted(task, model)                    # test error, rank and distance to the truth of each layer

**synonym search**: documents and queries in a made-up language whose relevance is known; **verse search**: find the
verse of a modern translation by words of an old one.

    language = synonym_language(seed)
    corpus = language.corpus(seed, 1500, range(16), (0, 1))      # topics, and which words of each concept
    queries = language.queries(seed, corpus, 200, (0, 1))        # words, grades

**two tasks**: a network knows upright digits and learns turned ones; how much of the old is left, at equal skill in the
new? **shapes**: a small diffusion model of rendered shapes, filled or outlined. **species**: rendered pictures with
captions, a small CLIP that learns them, and species to recognise by descriptions of which some are wrong. **blurred
digits**: a frozen vision transformer that knows sharp digits, and digits of fewer pixels.

**corrupted digits**: MNIST at 14x14 pixels, the same test images in twelve corruptions, and residual networks that
learn them, on clean images or on augmented ones. **lit digits**: the same digits lit from a side; in the few labelled
ones the light tells the class, in the many unlabelled ones it does not; a small VAE learns these.
"""

from lowrank_ref.lab.beds._shared import classification_loss
from lowrank_ref.lab.beds.biased_digits import BiasedDigits, biased_digits, marked, train_biased
from lowrank_ref.lab.beds.blurred_digits import SharpViT, block_errors, distil, resolution_accuracies, sharp_vit
from lowrank_ref.lab.beds.corrupted_digits import (
    CorruptedDigits,
    ResidualBlock,
    corrupted_digits,
    residual_network,
    train_with_chains,
)
from lowrank_ref.lab.beds.digits_shift import digits_shift, pretrained_on_digits, shifted_digits
from lowrank_ref.lab.beds.lit_digits import (
    DigitVAE,
    LitDigits,
    light_reading,
    lit,
    lit_digits,
    train_lit,
    train_vae,
)
from lowrank_ref.lab.beds.markov import markov_language, markov_pretraining
from lowrank_ref.lab.beds.planted_rank import PlantedRank, TanhResidual, measure_planted, planted_rank, train_planted
from lowrank_ref.lab.beds.shapes import Denoiser, denoising_loss, shapes
from lowrank_ref.lab.beds.species import SpeciesWorld, species_world
from lowrank_ref.lab.beds.synonym_search import Language, SearchCorpus, SearchQueries, synonym_language
from lowrank_ref.lab.beds.two_tasks import frontier, knows_upright, two_tasks
from lowrank_ref.lab.beds.verse_search import SentenceVectors, VerseSearch, last_words, verse_search, words_of

__all__ = [
    "BiasedDigits",
    "CorruptedDigits",
    "Denoiser",
    "DigitVAE",
    "Language",
    "LitDigits",
    "PlantedRank",
    "SpeciesWorld",
    "SearchCorpus",
    "SearchQueries",
    "SentenceVectors",
    "SharpViT",
    "ResidualBlock",
    "TanhResidual",
    "VerseSearch",
    "biased_digits",
    "block_errors",
    "classification_loss",
    "corrupted_digits",
    "denoising_loss",
    "distil",
    "digits_shift",
    "frontier",
    "knows_upright",
    "light_reading",
    "lit",
    "lit_digits",
    "last_words",
    "marked",
    "markov_language",
    "markov_pretraining",
    "measure_planted",
    "planted_rank",
    "pretrained_on_digits",
    "resolution_accuracies",
    "residual_network",
    "shapes",
    "sharp_vit",
    "shifted_digits",
    "species_world",
    "synonym_language",
    "train_biased",
    "train_lit",
    "train_planted",
    "train_vae",
    "train_with_chains",
    "two_tasks",
    "verse_search",
    "words_of",
]
