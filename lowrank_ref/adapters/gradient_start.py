"""LoRA-SB on a model: one pass over a few samples sums the gradients of the weights, and every layer starts from them.

The sums live on the CPU. A gradient exists on the model's device only while backward passes its layer; to keep fewer
sums as well, take the layers in groups (`at_once`), at one pass a group.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.lora_sb import LoRASBLinear, first_step, update_approximation
from lowrank_ref.core.checks import check_finite, check_integer, check_number
from lowrank_ref.core.layers import Model, adapters, is_linear, replace_linears, weight_of
from lowrank_ref.core.matching import Pattern, capped, select


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters and switch to eval mode for a while."""
    flags, modes = [(p, p.requires_grad) for p in model.parameters()], [(m, m.training) for m in model.modules()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for p, trains in flags:
            p.requires_grad_(trains)
        for module, training in modes:
            module.training = training


def gradient_sums(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Iterable[Any]],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Float[Tensor, "m n"]]:
    """Return path -> Σ∇L, the gradient of an update of each layer at ΔW = 0, summed over batches.

    The model runs in eval mode with all parameters frozen, so no gradient but these is made: as backward passes a
    layer, its dYᵀx is added to a sum on `device` and dropped. Modes, flags, and gradients that were there, stay.

    Args:
        model: the plain model.
        layers: path -> linear layer of the model.
        loss_fn: called as `loss_fn(model, *batch)`; a mean over the batch makes all batches count the same.
        batches: what to sum over, a few dozen samples of the task.
        device: where the sums are kept, in float32 or wider.

    Raises:
        ValueError: no batch, a layer whose forward was not called, or sums with NaN or infinity.
    """
    sums: dict[str, Tensor] = {}

    def add(path: str, kept: list[Tensor], dY: Tensor) -> None:
        x, wide = kept.pop(), torch.promote_types(dY.dtype, torch.float32)
        G = (dY.flatten(0, -2) if dY.ndim > 1 else dY[None]).to(wide).T @ x.reshape(-1, x.shape[-1]).to(wide)
        sums[path] = sums[path].add_(G.to(device)) if path in sums else G.to(device)

    def watch(path: str, layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # not in the first of two passes that activation checkpointing makes
            y = y if y.requires_grad else y.detach().requires_grad_().clone()
            y.register_hook(partial(add, path, [inputs[0].detach()]))  # in a list, for backward to take it out and drop
        return y

    handles = [layer.register_forward_hook(partial(watch, path)) for path, layer in layers.items()]
    count = 0
    try:
        with _resting(model), torch.enable_grad():
            for batch in batches:
                count += 1
                loss = loss_fn(model, *batch)
                if loss.requires_grad:
                    loss.backward()
                del loss  # and its graph, before the next one grows
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("batches: got none, wanted at least one")
    if silent := [path for path in layers if path not in sums]:
        raise ValueError(f"layers: got no gradient for {capped(silent)}, wanted layers whose forward the loss calls")
    for path, G in sums.items():
        check_finite(f"gradient of {path}", G)
    return sums


def start_lora_sb(
    model: Model,
    pattern: Pattern,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Iterable[Any]],
    *,
    rank: int,
    eta: float,
    at_once: int | None = None,
    device: torch.device | str = "cpu",
    trainable: Pattern | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Model:
    """Put a `LoRASBLinear` in the place of every linear layer that `pattern` means, started from a gradient pass.

    Args:
        model, pattern, trainable: see `replace_linears`.
        loss_fn, batches: see `gradient_sums`.
        rank: r >= 1; a smaller layer takes min(m, n).
        eta: η > 0, the size of the first step: the learning rate over the steps of its warm-up.
        at_once: how many layers' sums are kept at a time, each group with a gradient pass of its own; None keeps all.
        device: where the sums are kept. On a GPU it saves the copies: there take as many at once as memory allows.
        generator: source of the sketches of large layers.
        options: scale, dropout of `LoRASBLinear`.

    Returns:
        The same model. After an error it is as it was.

    Raises:
        TypeError, ValueError: an argument out of range, or what `replace_linears`, `gradient_sums` and
            `update_approximation` refuse.
    """
    check_integer("rank", rank, low=1)
    check_number("eta", eta, low=0, open_low=True)
    check_integer("at_once", 1 if at_once is None else at_once, low=1)
    inside = tuple(f"{path}." for path, _ in adapters(model))
    named = model.named_modules(remove_duplicate=False)
    found = select(model, {p: m for p, m in named if p and is_linear(m) and not p.startswith(inside)}, pattern)
    paths = list({id(layer): path for path, layer in found.items()}.values())  # a layer at two places counts once
    batches, size, starts = list(batches), at_once or len(paths), {}
    for i in range(0, len(paths), size):
        group = {path: found[path] for path in paths[i : i + size]}
        sums = gradient_sums(model, group, loss_fn, batches, device=device)
        for path, layer in group.items():
            step = first_step(sums.pop(path), eta).to(weight_of(layer).device)
            starts[id(layer)] = update_approximation(step, min(rank, *step.shape), generator)
    return replace_linears(
        model, pattern, lambda base: LoRASBLinear(base, *starts[id(base)], **options), trainable=trainable
    )
