"""PEFT's adapter folders as plain data: read, checked to the last key, and written.

A folder holds adapter_config.json, and adapter_model.safetensors with keys "base_model.model.<path>.<suffix>". Which
layer becomes which entry is decided in `lowrank_ref.adapters.peft_format`. The header of the tensors' file holds a
digest of both files, so that a torn or damaged folder of ours is noticed; a folder of PEFT's own has none.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lowrank_ref.core.checks import check_finite, check_number, finite
from lowrank_ref.core.io import DIGEST, cpu_copies, digest, locked, read_file, read_safetensors, refuse, write_files
from lowrank_ref.core.patterns import matches

_PREFIX = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
#: Kind of layer -> suffixes of A and B. The factors of a Conv1D are stored as those of a linear layer.
_SUFFIXES = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "conv1d": ("lora_A.weight", "lora_B.weight"),
    "conv2d": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
_MAGNITUDE = "lora_magnitude_vector"
_KEY = re.compile(rf"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|{_MAGNITUDE})")
#: Fields that are honoured, and fields that cannot change what the loaded model computes. Any other field that is set
#: belongs to an extension of LoRA, and is refused.
_HONOURED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"}
_HONOURED |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
_HONOURED |= {"fan_in_fan_out", "init_lora_weights", "task_type", "lora_dropout"}
_HARMLESS = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "eva_config"}
_HARMLESS |= {"megatron_core", "qalora_group_size"}
#: Field -> the field that overrides it for some modules.
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
#: Ways to draw A and B that leave the base as it is. "pissa", "olora" and the like replace the base by a residual.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
#: What PEFT calls its tasks.
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
#: Modules inside PEFT's layers. It takes them for a trained module whose name ends one of these, and fails.
_INNER = ("lora_embedding_A", "lora_A", "lora_embedding_B", "lora_B", "lora_dropout", "base_layer", "default")
#: Task -> modules that PEFT's wrapper for it trains and saves in full, whatever the config says.
PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class PeftLayer:
    """The update of one layer in PEFT's layout: s·BA, rescaled to `magnitude` if there is one (DoRA).

    Attributes:
        kind: "linear", "conv1d" (GPT-2's transposed linear layer), "conv2d" or "embedding".
        A: (r, in); embedding (r, num), conv2d (r, in, k, k). Never transposed, also not for "conv1d".
        B: (out, r); embedding (dim, r), conv2d (out, r, 1, 1).
        scale: s > 0.
        magnitude: (out,), linear layers only, or None.
        dropout: probability in [0, 1) of zeroing an input of the update in training.

    Raises:
        ValueError: shapes that do not belong together, another kind, NaN or infinity, or a number out of range.
    """

    kind: str
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _SUFFIXES:
            raise ValueError(f"kind: got {self.kind!r}, wanted one of {sorted(_SUFFIXES)}")
        A, B = tuple(self.A.shape), tuple(self.B.shape)
        ndim, tail = (4, (1, 1)) if self.kind == "conv2d" else (2, ())
        if len(A) != ndim or B[1:] != (self.rank, *tail) or 0 in A + B:
            raise ValueError(f"A, B: got shapes {A} and {B}, wanted factors of one {self.kind} layer")
        check_number("scale", self.scale, low=0, open_low=True)
        check_number("dropout", self.dropout, low=0, high=1 - 1e-9)
        check_finite("A", self.A)
        check_finite("B", self.B)
        if self.magnitude is not None:
            if self.kind not in ("linear", "conv1d") or self.magnitude.shape != B[:1]:
                got = f"{tuple(self.magnitude.shape)} for kind {self.kind!r}"
                raise ValueError(f"magnitude: got shape {got}, wanted {B[:1]} for a linear layer")
            check_finite("magnitude", self.magnitude)

    @property
    def rank(self) -> int:
        """Rank r of the factors."""
        return self.A.shape[0]


@dataclass(frozen=True)
class PeftCheckpoint:
    """One adapter folder of PEFT.

    Attributes:
        config: content of `adapter_config.json`.
        layers: module path -> its update.
        extra: tensor path -> values, of the modules that were trained in full.
        base: tensor path -> values of frozen embeddings and heads, which PEFT adds where it adapts or resizes them.
    """

    config: dict[str, Any]
    layers: dict[str, PeftLayer]
    extra: dict[str, Tensor]
    base: dict[str, Tensor] = field(default_factory=dict)

    def adapts(self, path: str) -> bool:
        """Say whether PEFT would adapt a layer at this path (`layers_to_transform`, if set, narrows it further)."""
        if _listed(self.config.get("exclude_modules"), path) or self.saves(path):
            return False
        return _listed(self.config.get("target_modules"), path)

    def saves(self, path: str) -> bool:
        """Say whether PEFT would train and save the module at this path in full."""
        return _saved(self.config.get("modules_to_save"), self.config.get("task_type"), path)


def _listed(entries: str | Iterable[str] | None, path: str) -> bool:
    """PEFT's rule for targets: a regular expression for the whole path, or a list of paths or endings of paths."""
    if isinstance(entries, str):
        return entries == "all-linear" or matches(entries, path)
    return any(path == entry or path.endswith(f".{entry}") for entry in entries or ())


def _saved(modules: Iterable[str] | None, task_type: str | None, path: str) -> bool:
    """PEFT's rule for modules_to_save: any ending of a path counts, "classifier" takes "pre_classifier" too."""
    names = {*(modules or ()), *PEFT_HEADS.get(task_type or "", ())}
    return any(re.search(rf"{re.escape(name)}(\.|$)", path) for name in names)


def _pattern_hits(pattern: str, path: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern."""
    return matches(pattern, path, starts=[0, *(i + 1 for i, letter in enumerate(path) if letter == ".")])


def rank_patterns(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return "r", "lora_alpha", "rank_pattern" and "alpha_pattern" as a LoraConfig takes them, with α = s·r.

    The most common rank and α stand once, the others in the patterns.

    Args:
        layers: path -> (rank, scale), at least one.

    Example:
        >>> rank_patterns({"up": (4, 2.0), "down": (4, 2.0), "out": (2, 2.0)})["rank_pattern"]
        {'^out': 2}
    """
    ranks = {path: rank for path, (rank, _) in layers.items()}
    alphas = {path: scale * rank for path, (rank, scale) in layers.items()}
    alphas = {path: int(a) if float(a).is_integer() else a for path, a in alphas.items()}  # some readers want integers
    rank, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {"^" + re.escape(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {"^" + re.escape(path): a for path, a in alphas.items() if a != alpha},
    }


def pattern_rank(pattern: Mapping[str, int], path: str) -> int | None:
    """Return the rank that a `rank_pattern` gives the module at this path, or None: the first key that matches counts.

    A key is a regular expression for the path or for its end after a dot, as in PEFT.

    Raises:
        ValueError: a key is no plain regular expression.

    Example:
        >>> pattern_rank({"^a.up": 2, "up": 4}, "b.up"), pattern_rank({"up": 4}, "b.down")
        (4, None)
    """
    return next((rank for key, rank in pattern.items() if _pattern_hits(key, path)), None)


def task_name(task_type: str | None) -> str | None:
    """Return a task as PEFT spells it, or None for None; any other word raises a ValueError."""
    if task_type is not None and task_type.upper() not in _TASKS:
        raise ValueError(f"task_type: got {task_type!r}, wanted None or one of {_TASKS}")
    return None if task_type is None else task_type.upper()


def write_peft(
    folder: str | Path,
    layers: Mapping[str, PeftLayer],
    *,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    base_model: str = "",
    auto_mapping: Mapping[str, str] | None = None,
    task_type: str | None = None,
    plain_lora: bool = False,
    exact_targets: bool = False,
) -> None:
    """Write updates as a folder that huggingface/peft loads: float32 tensors, α = s·r.

    Both files are put in place together: of two writers the last wins. Who is killed between the two moves leaves a
    folder that `read_peft` refuses.

    Args:
        folder: created if needed; its adapter files are replaced.
        layers: module path in the base model -> update, at least one.
        extra: module path -> its state_dict, of the modules that were trained in full ("modules_to_save").
        base_model: name or path of the base model, where PEFT's `AutoPeftModel...` classes look for it.
        auto_mapping: "base_model_class" and "parent_library", by which `AutoPeftModel` finds the class without a task.
        task_type: "CAUSAL_LM", "SEQ_CLS" and so on: which wrapper PEFT chooses; None for its plain one.
        plain_lora: refuse what many serving engines cannot load: DoRA, fully trained modules, and layers that differ
            in rank or α.
        exact_targets: name the layers by one regular expression. PEFT takes a listed path for every longer path that
            ends with it, so this is needed where the model has such.

    Raises:
        ValueError: nothing to write, an unknown task, NaN or infinity (also beyond float32), DoRA on some layers only,
            a fully trained module whose name hides an adapted layer from PEFT or is taken by PEFT, or content that
            `plain_lora` refuses.
        OSError: what the system reports; files that were there are unchanged.
    """
    extra, task_type = extra or {}, task_name(task_type)
    if not layers:
        raise ValueError("layers: got none, wanted at least one")
    layers = dict(sorted(layers.items()))
    dora = [path for path, layer in layers.items() if layer.magnitude is not None]
    if len(dora) not in (0, len(layers)):
        raise ValueError(f"layers: got magnitudes (DoRA) for {dora} only, wanted them for all layers or none")
    tensors = {f"{path}.{name}": t for path, state in extra.items() for name, t in state.items()}
    if "" in layers.keys() | extra.keys():
        raise ValueError("layers, extra: got an empty module path, wanted layers and parameters inside a model")
    if hidden := [path for path in layers if _saved(extra, task_type, path)]:
        heads = [*extra, *PEFT_HEADS.get(task_type or "", ())]
        raise ValueError(
            f"extra: got modules {heads} trained in full, which hide {hidden} from PEFT, wanted other names"
        )
    if taken := [path for path in extra if any(inner.endswith(path) for inner in _INNER)]:
        raise ValueError(f"extra: got modules {taken}, which PEFT takes for parts of its layers, wanted other names")
    sizes = rank_patterns({path: (layer.rank, layer.scale) for path, layer in layers.items()})
    dropouts = [layer.dropout for layer in layers.values() if layer.kind != "embedding"]  # PEFT knows one for all
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model or None,
        "auto_mapping": dict(auto_mapping) if auto_mapping else None,
        "inference_mode": True,
        **sizes,
        "use_rslora": False,
        "use_dora": bool(dora),
        "target_modules": "|".join(map(re.escape, layers)) if exact_targets else list(layers),
        "modules_to_save": sorted(extra) or None,
        "fan_in_fan_out": any(layer.kind == "conv1d" for layer in layers.values()),
        "bias": "none",
        "lora_dropout": statistics.mode(dropouts or [0.0]),
        "init_lora_weights": True,
    }
    unwanted = [field for field in ("use_dora", "modules_to_save", *_PATTERNS.values()) if config[field]]
    if plain_lora and unwanted:
        raise ValueError(f"plain_lora: got content that needs {unwanted}, wanted LoRA of one rank and alpha only")
    for path, layer in layers.items():
        tensors |= {f"{path}.{suffix}": t for suffix, t in zip(_SUFFIXES[layer.kind], (layer.A, layer.B))}
        if layer.magnitude is not None:
            tensors[f"{path}.{_MAGNITUDE}"] = layer.magnitude
    floats = {_PREFIX + name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    plain = cpu_copies(floats)
    for name, value in plain.items():
        check_finite(name.removeprefix(_PREFIX), value)
    header, folder = {"format": "pt", DIGEST: digest(plain, _facts(config))}, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(
        {
            folder / _CONFIG: json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode(),
            folder / _TENSORS: safetensors.torch.save(plain, header),
        }
    )


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that changes what a model computes. Whoever moves the base model may edit the rest."""
    return {key: value for key, value in config.items() if key not in _HARMLESS}


def read_peft(folder: str | Path, *, embeddings: Iterable[str] = ()) -> PeftCheckpoint:
    """Read an adapter folder of PEFT (LoRA, rsLoRA, DoRA). Pickled `.bin` files are not read.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        embeddings: paths of modules whose frozen weights may be in the file: the model's embedding and head, which PEFT
            adds after a change of the vocabulary.

    Returns:
        The content. Linear layers have kind "conv1d" if the config says `fan_in_fan_out`; the tensors do not tell.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a damaged file, files of two different saves, another method or an extension of LoRA, a field of a
            wrong type or range, a pattern that is no plain regular expression, an unknown key, a factor without its
            partner, a wrong shape, or NaN.
    """
    folder, embeddings = Path(folder), set(embeddings)
    path = folder / _TENSORS
    with locked(folder, shared=True):
        config = _read_config(folder / _CONFIG)
        tensors, header = read_safetensors(path)
    if DIGEST in header and header[DIGEST] != digest(tensors, _facts(config)):
        raise ValueError(f"folder: got {folder}, damaged or of two saves (another SHA-256), wanted it as written")
    checkpoint = PeftCheckpoint(config, {}, {})
    problems = [] if tensors else ["missing: no factors at all"]
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in sorted(tensors.items()):
        hit = _KEY.fullmatch(key.removeprefix(_PREFIX)) if key.startswith(_PREFIX) else None
        if hit:
            parts.setdefault(hit[1], {})[hit[2]] = value
        else:
            others[key] = value
    for key, value in others.items():
        name = key.removeprefix(_PREFIX)
        owner, _, leaf = name.rpartition(".")
        adapted = owner.removesuffix(".base_layer")
        if key != name and checkpoint.saves(owner):
            checkpoint.extra[name] = value
        elif key != name and (owner in embeddings or (owner != adapted and adapted in parts)):
            checkpoint.base[f"{adapted}.{leaf}"] = value
        else:
            problems.append(f"unknown key: {key}")
        if not bool(finite(value).all()):
            problems.append(f"not finite: {name}")
    for name, factors in parts.items():
        try:
            checkpoint.layers[name] = _layer(name, factors, config)
            if not checkpoint.adapts(name):
                problems.append(f"extra: {name} is no target module")
        except ValueError as error:
            problems.append(f"{name}: {error}")
    refuse(path, problems)
    return checkpoint


def _per_layer(config: Mapping[str, Any], field: str, path: str) -> float:
    """The value of r or lora_alpha for one module: the first pattern that matches, else the common one."""
    patterns = config.get(_PATTERNS[field]) or {}
    return next((value for pattern, value in patterns.items() if _pattern_hits(pattern, path)), config.get(field, 8))


def _positive(value: Any) -> bool:
    """Say whether a value is a finite number > 0. JSON may hold integers that no float can."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


#: Field -> what it has to be, in words, and the test. A field that is missing has PEFT's default.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number > 0", lambda v: _positive(v) and isinstance(v, int)),
    "lora_alpha": ("a number > 0", _positive),
    "lora_dropout": ("a number in [0, 1)", lambda v: v == 0 or (_positive(v) and v < 1)),
    "rank_pattern": ("a dict of whole numbers > 0", lambda v: not v or _all(v, lambda r: _positive(r) and int(r) == r)),
    "alpha_pattern": ("a dict of numbers > 0", lambda v: not v or _all(v, _positive)),
    "target_modules": ("a list of names or an expression", lambda v: v is None or isinstance(v, str) or _strings(v)),
    "exclude_modules": ("a list of names or an expression", lambda v: v is None or isinstance(v, str) or _strings(v)),
    "modules_to_save": ("a list of names", lambda v: v is None or _strings(v)),
    "task_type": ("a word", lambda v: v is None or isinstance(v, str)),
    "bias": ("'none'", lambda v: v == "none"),
} | {f: ("true or false", lambda v: v in (None, True, False)) for f in ("use_rslora", "use_dora", "fan_in_fan_out")}


def _all(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(test, value.values()))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: got {path}, no JSON ({error}), wanted a PEFT config") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path}: peft_type: got {got!r}, wanted 'LORA'")
    unknown = {key: value for key, value in config.items() if value and key not in _HONOURED | _HARMLESS}
    problems = [f"{key}: got {value!r:.200}, wanted it unset" for key, value in sorted(unknown.items())]
    if config.get("init_lora_weights", True) not in _INITS:
        wanted = "one that leaves the base weights as they are; peft can convert the checkpoint to plain LoRA"
        problems.append(f"init_lora_weights: got {config['init_lora_weights']!r}, wanted {wanted}")
    wrong = {key: words for key, (words, test) in _FIELDS.items() if key in config and not test(config[key])}
    problems += [f"{key}: got {config[key]!r:.200}, wanted {words}" for key, words in wrong.items()]
    patterns = [config[key] for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    for pattern in [*patterns, *(p for key in _PATTERNS.values() if key not in wrong for p in config.get(key) or ())]:
        try:
            matches(pattern, "")
        except ValueError as error:
            problems.append(str(error))
    refuse(path, problems)
    return config


def _layer(path: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> PeftLayer:
    """Put the tensors of one module together, and check them against the config."""
    linear = "lora_A.weight" in parts or "lora_B.weight" in parts
    A_name, B_name = _SUFFIXES["linear" if linear else "embedding"]
    wanted = {A_name, B_name} | ({_MAGNITUDE} if config.get("use_dora") else set())
    if parts.keys() != wanted:
        raise ValueError(f"got {sorted(parts)}, wanted {sorted(wanted)}")
    kind = "conv1d" if config.get("fan_in_fan_out") else "linear"
    kind = "embedding" if not linear else "conv2d" if parts[A_name].ndim == 4 else kind
    rank, alpha = _per_layer(config, "r", path), _per_layer(config, "lora_alpha", path)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    dropout = 0.0 if kind == "embedding" else config.get("lora_dropout", 0.0)
    layer = PeftLayer(kind, parts[A_name], parts[B_name], scale, parts.get(_MAGNITUDE), dropout)
    if layer.rank != rank:
        raise ValueError(f"A: got rank {layer.rank}, wanted {rank} as the config says")
    return layer
