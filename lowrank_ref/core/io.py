"""Files: tensors with strict loading, and the trained part of a model. PEFT's folders are in `lowrank_ref.core.peft`.

Loading never guesses. A missing, extra, mis-shaped or non-finite tensor raises, and the message lists all of them; the
model is written only after everything has been checked, and put back if a layer then refuses what it is given. Every
file holds the SHA-256 of its content. Files appear whole or not at all: they are written beside their place and then
moved onto it.
"""

import contextlib
import hashlib
import importlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lowrank_ref.core.checks import check_finite, finite
from lowrank_ref.core.layers import Adapter, adapters, log
from lowrank_ref.core.matching import capped

FORMAT = "lowrank_ref"
#: Where a file's header keeps the digest of the rest.
DIGEST = "lowrank_ref_sha256"
#: What safetensors can hold and give back; complex128 is not among it.
_DTYPES = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64"
_DTYPES += " float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
#: What torch.compile, activation checkpointing and FSDP put into the path of a module that they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


# Bytes.


def check_file(path: Path) -> None:
    """Refuse a place where something stands that is no file: a folder, a device, a pipe.

    Raises:
        ValueError: there is such a thing.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"path: got {path}, which is no regular file, wanted a file")


def check_place(path: Path) -> Path:
    """Return the file that a path means (links followed), where one can be written.

    Raises:
        ValueError: something that is no regular file stands there.
        OSError: the folder is missing or cannot be written to.
    """
    check_file(path)
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: got {path}, whose folder does not exist, wanted a folder that does")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"path: got {path}, whose folder cannot be written to, wanted one that can")
    return target


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Let others wait who read or write several files of this folder as one, where the system and the disk can."""
    if os.name != "posix":
        yield
        return
    fcntl, handle = importlib.import_module("fcntl"), os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files, each in one step: a crash leaves the old file or the new one, never half of it. Links are followed.

    All are written beside their places, under names that nobody else uses, before the first is moved. Several are of
    one folder, and change together for readers who take its lock.

    Raises:
        ValueError: something that is no regular file stands at a path.
        OSError: what the system reports, such as a full disk. All old files are then whole.
    """
    moves: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            target = check_place(path)
            beside = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.part")
            moves[beside] = target
            with open(beside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with locked(target.parent) if len(moves) > 1 else contextlib.nullcontext():
            for beside, target in moves.items():
                os.replace(beside, target)
    finally:
        for beside in moves:
            beside.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write one file as `write_files` does."""
    write_files({path: data})


def read_file(path: Path) -> bytes:
    """Read a regular file whole, so that nothing that happens to it later reaches what was read.

    Raises:
        ValueError: no regular file stands there.
    """
    check_file(path)
    return path.read_bytes()


# Tensors.


def cpu_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to contiguous CPU memory that no other tensor shares, as safetensors wants it.

    Raises:
        TypeError: a value is no tensor.
        ValueError: a tensor that is sharded, sparse, quantised, on the meta device, or of a dtype such as complex128
            that the format cannot hold; all are listed.
    """
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, wanted a torch.Tensor")
    wanted = f"wanted a plain tensor in memory, one of {_DTYPES}"
    odd = {name: f"{type(t.detach()).__name__} of {t.dtype} on {t.device}" for name, t in tensors.items() if _odd(t)}
    refuse("tensors", [f"{name}: got {what}, {wanted}" for name, what in odd.items()])
    plain = {name: t.detach().resolve_conj().resolve_neg() for name, t in tensors.items()}
    return {n: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in plain.items()}


def _odd(t: Tensor) -> bool:
    """Say whether a tensor is more than numbers in memory, or of a dtype that safetensors does not know."""
    plain = type(t.detach()) is Tensor and t.layout == torch.strided and not t.is_nested and not t.is_meta
    return not plain or str(t.dtype).removeprefix("torch.") not in _DTYPES.split()


def digest(tensors: Mapping[str, Tensor], facts: Any) -> str:
    """Return the SHA-256 of tensors on the CPU (names, dtypes, shapes, bytes) and of plain facts beside them."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        total.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        data: Any = t.contiguous().flatten().view(torch.uint8).numpy()
        total.update(data)
    return total.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors, in memory of their own, and metadata of a safetensors file.

    Raises:
        ValueError: no whole safetensors file.
    """
    data = read_file(path)
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"path: got {path}, no whole safetensors file ({error!r}), wanted one") from error
    return tensors, header.get("__metadata__") or {}


def refuse(where: str | Path, problems: Iterable[str]) -> None:
    """Raise a ValueError that lists the problems found at a place, if there are any."""
    lines = list(problems)
    if lines:
        raise ValueError("\n  ".join([f"{where}: got {len(lines)} mismatch(es), wanted none", *lines]))


def mismatches(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, infinite: bool = False) -> Iterable[str]:
    """Yield a line for each tensor of a file that is not what the model wants, or would change when cast to it.

    NaN and infinity are refused, unless `infinite` says that they may be right, as in a mask.
    """
    for name in sorted(wanted.keys() - got.keys()):
        yield f"missing: {name} {tuple(wanted[name].shape)}"
    for name in sorted(got.keys() - wanted.keys()):
        yield f"extra: {name} {tuple(got[name].shape)}"
    for name in sorted(got.keys() & wanted.keys()):
        new, old = got[name], wanted[name]
        if new.shape != old.shape:
            yield f"shape: {name} is {tuple(new.shape)} in the file, {tuple(old.shape)} in the model"
        elif old.is_meta:
            yield f"meta: {name} has no memory in the model, load its weights first"
        elif not infinite and not bool(finite(new).all()):
            yield f"not finite: {name}"
        elif not holds(old.dtype, new):
            yield f"dtype: {name} is {new.dtype} in the file, {old.dtype} in the model, which cannot hold its values"


def holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Say whether a dtype is of the same kind (floating, complex, whole) and casting to it changes no value."""
    old = values.dtype
    if (old.is_floating_point, old.is_complex) != (dtype.is_floating_point, dtype.is_complex):
        return False
    return old == dtype or torch.equal(values.to(dtype).to(old), values)


def load_all(where: str | Path, parts: Iterable[tuple[Callable[[Any], Any], Any, Any]]) -> None:
    """Call load(new) for every (load, new, old); if one raises, call load(old) for all of them.

    Raises:
        ValueError: with the message of the first that raised.
    """
    parts = list(parts)
    try:
        for load, new, _ in parts:
            load(new)
    except Exception as error:
        for load, _, old in parts:
            load(old)
        raise ValueError(f"{where}: got a state that cannot be loaded ({error}), wanted one that fits") from error


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, *, kind: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors to a safetensors file.

    Args:
        tensors: name -> tensor, of any shape; views and shared memory are written as copies.
        path: file to create or replace; its folder exists.
        kind: what the file holds, such as "adapters"; `load_tensors` asks for the same.
        metadata: further strings to keep in the file's header.

    Raises:
        TypeError, ValueError: what `cpu_copies` refuses (complex128, meta, sparse, sharded ...), or no regular file.
        OSError: the folder is missing, full or read-only; a file that was there is unchanged.
    """
    plain, header = cpu_copies(tensors), {**(metadata or {}), "format": FORMAT, "kind": kind}
    write_file(Path(path), safetensors.torch.save(plain, header | {DIGEST: digest(plain, header)}))


def load_tensors(path: str | Path, *, kind: str) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, into memory of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, damaged, no safetensors file, or of another format or kind.
    """
    return _load(Path(path), kind)[0]


def _load(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = read_safetensors(path)
    got = metadata.get("format"), metadata.get("kind")
    if got != (FORMAT, kind):
        raise ValueError(f"path: got {path} of format and kind {got}, wanted {(FORMAT, kind)}")
    if metadata.pop(DIGEST, None) != digest(tensors, metadata):
        raise ValueError(f"path: got {path}, damaged (its SHA-256 is another), wanted the file as it was written")
    return tensors, metadata


# Models.


def plain_path(model: nn.Module, path: str) -> str:
    """Return a path without what torch.compile, DDP, FSDP and activation checkpointing put into it by wrapping."""
    parts, place = [], model
    for part in path.split("."):
        parallel = isinstance(place, nn.DataParallel | nn.parallel.DistributedDataParallel)
        if part not in _WRAPPED and not (part == "module" and parallel):
            parts.append(part)
        place = getattr(place, part, place)
    return ".".join(parts)


def plain_state(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """Return the state dict under plain paths, with `keep_vars` the model's own parameters, not their detached data."""
    return {plain_path(model, name): value for name, value in model.state_dict(keep_vars=keep_vars).items()}


def load_plain(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load a state dict with plain paths into a model that may be wrapped."""
    names = {plain_path(model, name): name for name in model.state_dict()}
    model.load_state_dict({names.get(name, name): value for name, value in state.items()}, strict=strict)


def layer_cards(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return path -> class and settings that say what the tensors mean.

    Of an adapter all plain numbers and words (rank, scale); of a layer with `dense_weight()` the fractions (scale),
    since its whole numbers may change in training.
    """
    cards = {}
    for path, layer in model.named_modules():
        kinds = (int, float, str) if isinstance(layer, Adapter) else (float,) if hasattr(layer, "dense_weight") else ()
        if kinds:
            settings = {k: v for k, v in vars(layer).items() if type(v) in kinds and not k.startswith("_")}
            cards[plain_path(model, path)] = {"class": type(layer).__name__} | settings
    return cards


def card_mismatches(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterable[str]:
    """Yield a line for each layer whose card in a file is not that of the model."""
    for name in sorted(got.keys() | wanted.keys()):
        if got.get(name) != wanted.get(name):
            yield f"layer {name or 'model'}: {got.get(name)} in the file, {wanted.get(name)} in the model"


def base_samples(model: nn.Module) -> dict[str, list[float]]:
    """Return path -> a few entries of the weight that an adapter stands beside, by which another base is noticed."""
    found = {}
    for path, layer in adapters(model):
        weight: Any = getattr(layer.base, "weight", None)
        if isinstance(weight, Tensor) and weight.numel() and not _odd(weight):
            sample = layer.sample().flatten()
            found[plain_path(model, path)] = [float(f"{v:.4g}") for v in sample[:: max(1, len(sample) // 8)].tolist()]
    return found


def _other_bases(got: Any, wanted: Mapping[str, list[float]]) -> list[str]:
    """Return the paths whose base had other numbers when the file was written; rounding to 16 bits is no difference."""
    found = []
    for path in got.keys() & wanted.keys() if isinstance(got, dict) else ():
        old, new = torch.tensor(got[path]), torch.tensor(wanted[path])
        if old.shape != new.shape or not torch.allclose(old, new, 0.02, float(old.abs().max()) / 500, equal_nan=True):
            found.append(path)
    return sorted(found)


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything an adapter owns (not its base), every other trained parameter, and the buffers beside or among those.

    A shared tensor comes once. Paths are plain.
    """
    homes = [f"{path}." if path else "" for path in (plain_path(model, path) for path, _ in adapters(model))]
    if not homes:
        raise ValueError("model: got no adapter layer, wanted at least one")
    trained = {plain_path(model, name).rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():  # modules that train whole: what they hold without parameters counts too
        flags = [p.requires_grad for p in module.parameters()]
        if flags and all(flags):
            trained |= {plain_path(model, f"{path}.{inner}".strip(".")) for inner, _ in module.named_modules()}
    state: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in plain_state(model, keep_vars=True).items():
        own = any(name.startswith(home) and not name.startswith(f"{home}base.") for home in homes)
        beside = name.rpartition(".")[0] in trained and not isinstance(tensor, nn.Parameter)
        if own or beside or (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            state.setdefault(id(tensor), (name, tensor))
    return dict(state.values())


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the trained part of a model: adapters with their buffers, all other trained parameters, and the buffers of
    the modules that own these, such as the running statistics of a BatchNorm that trains.

    A frozen BatchNorm in training mode still moves its running statistics. They belong to the base and are not
    written: keep it in eval mode, or name it in `trainable`. The paths in the file are those of the plain model, also
    if the model is compiled or wrapped by DDP.

    Args:
        model: holds at least one adapter. The frozen base is not written.
        path: file to create or replace.

    Raises:
        ValueError: no adapter, a tensor with NaN or infinity, or what `save_tensors` refuses.

    Example:
        >>> import copy
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, load_adapters, save_adapters, replace_linears
        >>> base = nn.Sequential(nn.Linear(6, 2))
        >>> make = lambda: replace_linears(copy.deepcopy(base), "0", partial(LoRALinear, rank=2))
        >>> trained, fresh = make(), make()
        >>> with TemporaryDirectory() as folder:
        ...     save_adapters(trained, f"{folder}/mine.safetensors")
        ...     load_adapters(fresh, f"{folder}/mine.safetensors")
        >>> bool((fresh[0].A == trained[0].A).all())
        True
    """
    state = cpu_copies(_trained_state(model))
    for name, tensor in state.items():
        check_finite(name, tensor)
    facts = {"layers": layer_cards(model), "bases": base_samples(model)}
    save_tensors(state, path, kind="adapters", metadata={k: json.dumps(v, sort_keys=True) for k, v in facts.items()})


def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Load what `save_adapters` wrote into a model that was adapted in the same way.

    Beside another base, with other numbers in the adapted weights, the logger "lowrank_ref" warns.

    Args:
        model: same adapters at the same paths, same trained parameters; compiled, wrapped by DDP, or plain. Changed in
            place, or not at all.
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or of another kind; a name, shape, class or number (rank, scale) differs; a
            value is not finite or does not fit the model's dtype; or a layer refuses its state. All that was found is
            listed.

    Example:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, load_adapters, replace_linears, save_adapters
        >>> model = replace_linears(nn.Sequential(nn.Linear(6, 2)), "0", partial(LoRALinear, rank=2))
        >>> with TemporaryDirectory() as folder:  # keep two sets, and swap them by loading one over the other
        ...     save_adapters(model, f"{folder}/a")
        ...     _ = model[0].B.data.fill_(1.0)
        ...     save_adapters(model, f"{folder}/b")
        ...     load_adapters(model, f"{folder}/a")
        >>> model[0].B.abs().max().item()
        0.0
    """
    path = Path(path)
    tensors, metadata = _load(path, "adapters")
    state = _trained_state(model)
    try:
        cards, bases = json.loads(metadata.get("layers", "")), json.loads(metadata.get("bases", "{}"))
    except (ValueError, RecursionError):
        cards, bases = None, {}
    if not isinstance(cards, dict):
        raise ValueError(f"path: got {path} without cards of its layers, wanted a file of save_adapters()")
    refuse(path, [*card_mismatches(cards, layer_cards(model)), *mismatches(tensors, state)])
    old = {name: t.detach().clone() for name, t in state.items()}
    load_all(path, [(partial(load_plain, model, strict=False), tensors, old)])  # a layer may act on what it loads
    if other := _other_bases(bases, base_samples(model)):
        what = "load_adapters: %d of %d adapted weights are not those of the base beside which %s was saved (%s)"
        advice = "; if that is not meant, load that base first, then adapt it"
        log.warning(what + advice, len(other), len(bases), path, capped(other))
