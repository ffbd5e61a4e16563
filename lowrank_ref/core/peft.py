"""PEFT's adapter folders as plain data: read, checked to the last key, and written.

A folder holds adapter_config.json, and adapter_model.safetensors with keys "base_model.model.<path>.<suffix>". Which
layer becomes which entry is decided in `lowrank_ref.adapters.peft_format`.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lowrank_ref.core.checks import check_finite
from lowrank_ref.core.io import cpu_copy, read_safetensors, refuse, write_file

_PREFIX = "base_model.model."
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
_HONOURED |= {"fan_in_fan_out", "init_lora_weights", "task_type"}
_HARMLESS = {"base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version", "auto_mapping"}
_HARMLESS |= {"eva_config", "megatron_core", "qalora_group_size"}
#: Field -> the field that overrides it for some modules.
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
#: Ways to draw A and B that leave the base as it is. "pissa", "olora" and the like replace the base by a residual.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
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
        scale: s.
        magnitude: (out,), linear layers only, or None.
    """

    kind: str
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in _SUFFIXES:
            raise ValueError(f"kind: got {self.kind!r}, wanted one of {sorted(_SUFFIXES)}")
        A, B = tuple(self.A.shape), tuple(self.B.shape)
        ndim, tail = (4, (1, 1)) if self.kind == "conv2d" else (2, ())
        if len(A) != ndim or B[1:] != (self.rank, *tail) or 0 in A + B:
            raise ValueError(f"A, B: got shapes {A} and {B}, wanted factors of one {self.kind} layer")
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
    """

    config: dict[str, Any]
    layers: dict[str, PeftLayer]
    extra: dict[str, Tensor]

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
        return re.fullmatch(entries, path) is not None
    return any(path == entry or path.endswith(f".{entry}") for entry in entries or ())


def _saved(modules: Iterable[str] | None, task_type: str | None, path: str) -> bool:
    """PEFT's rule for modules_to_save: any ending of a path counts, "classifier" takes "pre_classifier" too."""
    names = {*(modules or ()), *PEFT_HEADS.get(task_type or "", ())}
    return any(re.search(rf"{re.escape(name)}(\.|$)", path) for name in names)


def _pattern_hits(pattern: str, path: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def write_peft(
    folder: str | Path,
    layers: Mapping[str, PeftLayer],
    *,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    base_model: str = "",
    task_type: str | None = None,
    plain_lora: bool = False,
    exact_targets: bool = False,
) -> None:
    """Write updates as a folder that huggingface/peft loads: float32 tensors, α = s·r.

    Args:
        folder: created if needed; its adapter files are replaced.
        layers: module path in the base model -> update, at least one.
        extra: module path -> its state_dict, of the modules that were trained in full ("modules_to_save").
        base_model: name or path of the base model, for the reader's information.
        task_type: "CAUSAL_LM", "SEQ_CLS" and so on: which wrapper PEFT chooses; None for its plain one.
        plain_lora: refuse what many serving engines cannot load: DoRA, fully trained modules, and layers that differ
            in rank or α.
        exact_targets: name the layers by one regular expression. PEFT takes a listed path for every longer path that
            ends with it, so this is needed where the model has such.

    Raises:
        ValueError: nothing to write, NaN or infinity, DoRA on some layers only, a fully trained module whose name
            hides an adapted layer from PEFT, or content that `plain_lora` refuses.
    """
    extra = extra or {}
    if not layers:
        raise ValueError("layers: got none, wanted at least one")
    layers = dict(sorted(layers.items()))
    dora = [path for path, layer in layers.items() if layer.magnitude is not None]
    if len(dora) not in (0, len(layers)):
        raise ValueError(f"layers: got magnitudes (DoRA) for {dora} only, wanted them for all layers or none")
    tensors = {f"{path}.{name}": t for path, state in extra.items() for name, t in state.items()}
    for name, value in tensors.items():
        check_finite(name, value)
    if "" in layers.keys() | extra.keys():
        raise ValueError("layers, extra: got an empty module path, wanted layers and parameters inside a model")
    if hidden := [path for path in layers if _saved(extra, task_type, path)]:
        heads = [*extra, *PEFT_HEADS.get(task_type or "", ())]
        raise ValueError(
            f"extra: got modules {heads} trained in full, which hide {hidden} from PEFT, wanted other names"
        )
    ranks = {path: layer.rank for path, layer in layers.items()}
    alphas = {path: layer.scale * layer.rank for path, layer in layers.items()}
    alphas = {path: int(a) if float(a).is_integer() else a for path, a in alphas.items()}  # some readers want integers
    rank, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {"^" + re.escape(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {"^" + re.escape(path): a for path, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": bool(dora),
        "target_modules": "|".join(map(re.escape, layers)) if exact_targets else list(layers),
        "modules_to_save": sorted(extra) or None,
        "fan_in_fan_out": any(layer.kind == "conv1d" for layer in layers.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
    unwanted = [field for field in ("use_dora", "modules_to_save", *_PATTERNS.values()) if config[field]]
    if plain_lora and unwanted:
        raise ValueError(f"plain_lora: got content that needs {unwanted}, wanted LoRA of one rank and alpha only")
    for path, layer in layers.items():
        tensors |= {f"{path}.{suffix}": t for suffix, t in zip(_SUFFIXES[layer.kind], (layer.A, layer.B))}
        if layer.magnitude is not None:
            tensors[f"{path}.{_MAGNITUDE}"] = layer.magnitude
    plain = {_PREFIX + name: cpu_copy(t.float() if t.is_floating_point() else t) for name, t in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "adapter_model.safetensors", safetensors.torch.save(plain, {"format": "pt"}))
    write_file(
        folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode()
    )


def read_peft(folder: str | Path) -> PeftCheckpoint:
    """Read an adapter folder of PEFT (LoRA, rsLoRA, DoRA). Pickled `.bin` files are not read.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The content. Linear layers have kind "conv1d" if the config says `fan_in_fan_out`; the tensors do not tell.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: another method or an extension of LoRA, a pattern or target that matches nothing, an unknown key, a
            factor without its partner, a wrong shape, or NaN.
    """
    folder = Path(folder)
    config = _read_config(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    checkpoint = PeftCheckpoint(config, {}, {})
    parts: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, value in sorted(read_safetensors(path)[0].items()):
        name = key.removeprefix(_PREFIX)
        if key != name and (hit := _KEY.fullmatch(name)):
            parts.setdefault(hit[1], {})[hit[2]] = value
        elif key != name and checkpoint.saves(name.rpartition(".")[0]):
            checkpoint.extra[name] = value
            if not bool(torch.isfinite(value).all()):
                problems.append(f"not finite: {name}")
        else:
            problems.append(f"unknown key: {key}")
    for name, tensors in parts.items():
        try:
            checkpoint.layers[name] = _layer(name, tensors, config)
        except ValueError as error:
            problems.append(f"{name}: {error}")
        if not checkpoint.adapts(name):
            problems.append(f"extra: {name} is no target module")
    targets = config.get("target_modules") or []
    for target in [targets] if isinstance(targets, str) else [[entry] for entry in sorted(targets)]:
        if not any(_listed(target, name) for name in parts):
            problems.append(f"missing: no factors for target_modules {target!r}")
    for field in _PATTERNS.values():
        for pattern in config.get(field) or {}:
            if not any(_pattern_hits(pattern, name) for name in parts):
                problems.append(f"{field}: {pattern!r} matches no layer of the file")
    refuse(path, problems)
    return checkpoint


def _per_layer(config: Mapping[str, Any], field: str, path: str) -> float:
    """The value of r or lora_alpha for one module: the first pattern that matches, else the common one."""
    patterns = config.get(_PATTERNS[field]) or {}
    return next((value for pattern, value in patterns.items() if _pattern_hits(pattern, path)), config.get(field, 8))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: got {path}, no JSON ({error}), wanted a PEFT config") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path}: peft_type: got {got!r}, wanted 'LORA'")
    unknown = {key: value for key, value in config.items() if value and key not in _HONOURED | _HARMLESS}
    problems = [f"{key}: got {value!r}, wanted it unset" for key, value in sorted(unknown.items())]
    if config.get("bias", "none") != "none":
        problems.append(f"bias: got {config['bias']!r}, wanted 'none'")
    if config.get("init_lora_weights", True) not in _INITS:
        wanted = "one that leaves the base weights as they are; peft can convert the checkpoint to plain LoRA"
        problems.append(f"init_lora_weights: got {config['init_lora_weights']!r}, wanted {wanted}")
    for field, pattern in _PATTERNS.items():
        for value in [config.get(field, 8), *(config.get(pattern) or {}).values()]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                problems.append(f"{field}: got {value!r}, wanted a number > 0")
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
    layer = PeftLayer(kind, parts[A_name], parts[B_name], scale, parts.get(_MAGNITUDE))
    if layer.rank != rank:
        raise ValueError(f"A: got rank {layer.rank}, wanted {rank} as the config says")
    return layer
