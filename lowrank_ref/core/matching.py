"""Which layers a user means: a regular expression, a list of names, or "all-linear"; and what to say if none."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from lowrank_ref.core.weights import is_quantised

#: What a user may write, a regular expression, names, or "all-linear".
Pattern = str | Collection[str]
#: Names under which models keep the layer that answers a task, new in a model that is about to be fine-tuned.
HEADS = ("classifier", "score", "qa_outputs")


def capped(names: Iterable[Any], most: int = 4) -> str:
    """List the first names, and say how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def matcher(argument: str, pattern: Pattern) -> Callable[[str], Any]:
    """Return a test of paths: does the regular expression occur in it, or is one of the names its end?

    A name may have dots; "q_proj" is the end of "layers.0.q_proj" and not of "layers.0.mq_proj": PEFT's rule for lists.

    Raises:
        TypeError: neither text nor a list of texts.
        ValueError: no regular expression (a glob, say), or an empty list.
    """
    if isinstance(pattern, str):
        try:
            return re.compile(pattern).search
        except re.error as error:
            hint = r"for a name at any depth write r'q_proj$' or the list ['q_proj']"
            raise ValueError(f"{argument}: got {pattern!r}, no regular expression ({error}); {hint}") from error
    if not isinstance(pattern, Collection) or not all(isinstance(name, str) for name in pattern):
        raise TypeError(f"{argument}: got {pattern!r}, wanted a regular expression or a list of names")
    if not pattern:
        raise ValueError(f"{argument}: got an empty list, wanted at least one name")
    return lambda path: any(f".{path}".endswith(f".{name}") for name in pattern)


def select(model: nn.Module, candidates: Mapping[str, nn.Module], pattern: Pattern) -> dict[str, nn.Module]:
    """Return those of the candidates, path -> layer, that the pattern means.

    Raises:
        TypeError: a quantised layer is among them, or the pattern is neither text nor a list.
        ValueError: none, or a name of the list means none, or no regular expression.
    """
    if pattern == "all-linear":
        outputs = output_layers(model)
        hits = {path: layer for path, layer in candidates.items() if path not in outputs}
    else:
        matches = matcher("pattern", pattern)
        hits = {path: layer for path, layer in candidates.items() if matches(path)}
        for part in [pattern] if isinstance(pattern, str) else [[name] for name in pattern]:
            if not any(map(matcher("pattern", part), hits)):
                got = f"{pattern!r}, which" if isinstance(pattern, str) else f"{pattern!r}, of which {part[0]!r}"
                raise ValueError(no_match(f"pattern: got {got}", part, candidates, model))
    if quantised := [path for path, layer in hits.items() if is_quantised(layer)]:
        which = f"{len(quantised)} quantised layers (bitsandbytes?): {capped(quantised)}"
        raise TypeError(f"pattern: got {pattern!r}, which matches {which}; wanted floating-point weights")
    return hits


def no_match(start: str, pattern: Pattern, names: Iterable[str], model: nn.Module | None = None) -> str:
    """Return a message: a pattern matches nothing, or only modules of `model` that are not wanted; what names are near.

    Args:
        start: begin of the message, up to the verb.
        pattern: what was asked for.
        names: what it could have matched.
        model: where else to look.
    """
    names, what = list(names), "matches nothing"
    if found := _others(model, pattern) if model is not None else []:
        counts = (f"{count} {kind}" for kind, count in Counter(found).most_common())
        what = f"matches nothing that can be replaced, only {capped(counts)}"
    plain = re.sub(r"[^\w.]+", ".", pattern if isinstance(pattern, str) else " ".join(pattern))
    kinds = {re.sub(r"\d+", "*", name): name for name in reversed(names)}  # one name of each kind, the first
    firsts = [name for name in names if name in kinds.values()]
    close = [name for name in firsts if _closeness(plain, name) > 0.6]
    near = [*sorted(close, key=partial(_closeness, plain), reverse=True), *(n for n in firsts if n not in close)][:4]
    if re.sub(r"[^a-z]", "", plain.lower()) == "alllinear":
        what += ' (all layers are the text "all-linear", with a hyphen)'
    elif isinstance(pattern, str) and re.search(r"[,\s]", pattern):
        parts = re.findall(r"[^,\s]+", pattern)
        what += f" (several names are a list: {parts!r})"
    return f"{start} {what}; near candidates are: {', '.join(near) or 'none, the model has no such module'}"


def _closeness(wanted: str, path: str) -> float:
    """Return how near a text is to a path, or to one of the names in it."""
    return max(difflib.SequenceMatcher(None, wanted, name).ratio() for name in (path, *path.split(".")))


def _others(model: nn.Module, pattern: Pattern) -> list[str]:
    """Return the kind of every module that the pattern matches; what is inside an adapter only if nothing else is."""
    matches, modules = matcher("pattern", pattern), dict(model.named_modules(remove_duplicate=False))
    taken = {path: getattr(module, "taken", "") for path, module in modules.items()}  # "adapted already"
    found = [path for path in modules if path and matches(path)]
    inside = {path for path in found if any(taken[path[:i]] for i, letter in enumerate(path) if letter == ".")}
    kinds = {path: f"{type(modules[path]).__name__} ({taken[path]})".removesuffix(" ()") for path in found}
    return [kinds[path] for path in found if path not in inside] or [f"{kinds[path]} inside one" for path in inside]


def heads(model: nn.Module) -> list[str]:
    """Return the paths of the modules that answer a task: by name, or beside the base of a transformers model.

    There, what stands beside the base is a head, unless the model has an output layer: then it was trained before.
    """
    found = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in HEADS}
    for path, module in model.named_modules():
        base = getattr(module, getattr(module, "base_model_prefix", "") or " ", None)
        if isinstance(base, nn.Module) and _output(module) is None:
            beside = [name for name, child in module.named_children() if child is not base and [*child.parameters()]]
            found |= {f"{path}.{name}".lstrip(".") for name in beside}
    return [path for path in sorted(found) if not any(path.startswith(f"{other}.") for other in found)]


def _output(module: nn.Module) -> Any:
    return getattr(module, "get_output_embeddings", lambda: None)()


def output_layers(model: nn.Module) -> set[str]:
    """Return the paths of the layers that give a model's answer, which PEFT leaves out of "all-linear" too."""
    outputs = {id(output) for output in map(_output, model.modules()) if output is not None}
    tops = tuple(f"{path}." for path in heads(model))
    named = model.named_modules(remove_duplicate=False)
    return {path for path, module in named if id(module) in outputs or f"{path}.".startswith(tops)}
