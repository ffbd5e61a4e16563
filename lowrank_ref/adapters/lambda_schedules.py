"""How BA-LoRA's official code moves the weights λ of its penalties while a model trains.

| train.py at 2829797 of llm172/BA-LoRA                                      | here                |
|----------------------------------------------------------------------------|---------------------|
| λ1: half a cosine down to a tenth                                          | `cosine_fall`       |
| λ2, λ3: nothing for a fifth of the steps, then a ramp of a twentieth       | `two_phase`         |
| λ1 as an option: the higher, the surer the teacher is of this batch        | `confident_penalty` |

The state before (847505a) leaves the second and the third empty: λ2 and λ3 are then constant. `done` is the share of
the training that is done, from 0 to 1.
"""

import math

from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_number


def cosine_fall(done: float, *, last: float = 0.1) -> float:
    """Return last + (1 - last)(1 + cos(π done))/2: the factor on λ1. done outside [0, 1] raises a ValueError."""
    check_number("done", done, low=0, high=1)
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2


def two_phase(done: float, *, wait: float = 0.2, ramp: float = 0.05) -> float:
    """Return the factor on λ2 and λ3: 0 while done <= wait, then a line up to 1 at wait + ramp.

    Raises:
        TypeError, ValueError: done outside [0, 1], wait or ramp < 0.
    """
    check_number("done", done, low=0, high=1)
    check_number("wait", wait, low=0)
    check_number("ramp", ramp, low=0)
    return min(1.0, max(0.0, (done - wait) / ramp)) if ramp else float(done >= wait)


def confident_penalty(
    teacher: Float[Tensor, "rows classes"], *, low: float, high: float, temperature: float = 2.0
) -> float:
    """Return λ1 = low + (high - low)(1 - H/log D), H the teacher's mean entropy at T, D >= 2 classes (an option).

    Raises:
        TypeError, ValueError: bad logits, a single class, temperature <= 0, or not 0 <= low <= high.
    """
    check_number("temperature", temperature, low=0, open_low=True)
    check_number("high", high, low=0)
    check_number("low", low, low=0, high=high)
    if teacher.shape[-1] < 2:
        raise ValueError(f"teacher: got shape {tuple(teacher.shape)}, wanted at least 2 classes")
    log_p = (teacher.detach().float() / temperature).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean().item()
    return low + (high - low) * (1 - entropy / math.log(teacher.shape[1]))
