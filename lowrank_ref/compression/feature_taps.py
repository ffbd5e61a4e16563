"""What blocks of a model return while it runs: features by which a small network is taught, or compared."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lowrank_ref.core.matching import Pattern, matcher, no_match


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Pattern) -> Iterator[list[Tensor]]:
    """Collect what these modules return while the model runs inside the block, in the order of the calls.

    Args:
        model: is called as always; hooks are set, and taken away again at the end.
        taps: paths of modules: a regular expression searched in them, or a list of names, each the end of a path. Of a
            module that returns several things the first counts; one that is called several times counts as often.

    Raises:
        TypeError, ValueError: a pattern that is none, or means no module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowrank_ref.compression import tapped
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with tapped(model, r"^1$") as found:
        ...     _ = model(torch.ones(5, 4))
        >>> [tuple(F.shape) for F in found]
        [(5, 3)]
    """
    means = matcher("taps", taps)
    named = {path: module for path, module in model.named_modules() if path}
    hits = [module for path, module in named.items() if means(path)]
    if not hits:
        raise ValueError(no_match(f"taps: got {taps!r}, which", taps, named))
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handles = [module.register_forward_hook(keep) for module in hits]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
