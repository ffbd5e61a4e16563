"""Test beds that several chapters share, so that their tables can be compared line by line.

**digits-shift**: a small network learns upright digits; the task is the same digits turned by 90° (or moved, negative,
relabelled, as `shift` says). Every method gets the same 200 Adam steps of 64 images, a learning rate that falls
linearly to 0, and a grid of rates for `lab.compare`.

**Markov pretraining**: a small GPT learns, from scratch, a language of 16 letters in which two letters decide the odds
of the next. Attention has to fetch the letter before the last. The entropy of the language is known.

**planted rank**: the weights of a known network move by updates of known rank, a different one in each layer, and a
student sees only noisy inputs and outputs. Whatever decides about ranks can be compared with the truth, layer by layer:

    task = planted_rank(seed)                       # the truth: task.ranks == (0, 1, 1, 8), task.updates
    model = train_planted(task, adapt, lr=5e-3)     # any adapter, any allocator
    measure_planted(task, model)                    # test error, rank and distance to the truth of each layer
"""

from lowrank_ref.lab.beds._shared import classification_loss
from lowrank_ref.lab.beds.digits_shift import digits_shift, pretrained_on_digits, shifted_digits
from lowrank_ref.lab.beds.markov import markov_language, markov_pretraining
from lowrank_ref.lab.beds.planted_rank import PlantedRank, TanhResidual, measure_planted, planted_rank, train_planted

__all__ = [
    "PlantedRank",
    "TanhResidual",
    "classification_loss",
    "digits_shift",
    "markov_language",
    "markov_pretraining",
    "measure_planted",
    "planted_rank",
    "pretrained_on_digits",
    "shifted_digits",
    "train_planted",
]
