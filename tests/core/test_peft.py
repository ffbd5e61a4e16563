"""PEFT folders as plain data. tests/adapters/test_peft_format.py holds them against the real package."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_ref.core.peft import PeftCheckpoint, PeftLayer, read_peft, write_peft


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3])


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def edit(folder, **fields):
    """Change the config of a folder as its own writer would: without our digest, PEFT's folders have none."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors", {"format": "pt"})


def layer(kind="linear", r=2, scale=0.5, **options):
    shapes = {"conv2d": ((r, 3, 2, 2), (4, r, 1, 1)), "embedding": ((r, 9), (4, r))}
    A, B = (torch.randn(shape) for shape in shapes.get(kind, ((r, 3), (4, r))))
    return PeftLayer(kind, A, B, scale, **options)


def test_peft_layers_come_back(tmp_path):
    layers = {
        "b.lin": layer(r=3, scale=2.0),
        "a": layer("embedding"),
        "c": layer("conv2d", scale=0.3),
        "d.lora_A": layer(r=1),  # a name that looks like a suffix
    }
    extra = {
        "norm": {"weight": torch.randn(3), "steps": torch.tensor([2])},
        "head": {"gain": torch.ones(2), "out.bias": torch.randn(2)},
    }
    write_peft(tmp_path / "new" / "folder", layers, extra=extra, base_model="b", task_type="CAUSAL_LM")
    found = read_peft(tmp_path / "new" / "folder")
    assert found.layers.keys() == layers.keys()
    for path, got in found.layers.items():
        assert (got.kind, got.rank) == (layers[path].kind, layers[path].rank)
        assert got.scale == pytest.approx(layers[path].scale, rel=1e-15)
        assert torch.equal(got.A, layers[path].A) and torch.equal(got.B, layers[path].B)
    assert_equal(found.extra, {f"{path}.{name}": t for path, state in extra.items() for name, t in state.items()})
    assert found.config["modules_to_save"] == ["head", "norm"]
    assert found.config["rank_pattern"] == {"^b\\.lin": 3, "^d\\.lora_A": 1}


def test_conv1d_and_dora_come_back(tmp_path):
    layers = {path: layer("conv1d", magnitude=torch.rand(4)) for path in ("x", "y")}
    write_peft(tmp_path, layers)
    found = read_peft(tmp_path)
    assert found.config["use_dora"] and found.config["fan_in_fan_out"]
    assert [entry.kind for entry in found.layers.values()] == ["conv1d", "conv1d"]
    assert all(torch.equal(found.layers[p].magnitude, layers[p].magnitude) for p in layers)


def test_alpha_is_an_integer_where_it_can_be(tmp_path):
    write_peft(tmp_path, {"x": layer(r=2, scale=4.0)})
    assert '"lora_alpha": 8,' in (tmp_path / "adapter_config.json").read_text()
    write_peft(tmp_path, {"x": layer(r=2, scale=0.7)})
    assert '"lora_alpha": 1.4,' in (tmp_path / "adapter_config.json").read_text()


def test_the_config_is_utf8_and_the_same_for_any_order(tmp_path):
    a, b = layer(), layer()
    write_peft(tmp_path / "1", {"é": a, "b": b})
    write_peft(tmp_path / "2", {"b": b, "é": a})
    first, second = ((tmp_path / i / "adapter_config.json").read_bytes() for i in "12")
    assert first == second and "é" in first.decode()


def test_rslora_scale_and_patterns_are_read_as_peft_matches_them(tmp_path):
    layers = {path: layer(r=4) for path in ("foo", "barfoo", "x.foo", "x.1.q", "y")}
    write_peft(tmp_path, layers)
    edit(tmp_path, use_rslora=True, lora_alpha=2, alpha_pattern={"^foo": 3, "foo": 5, r"\d\.q": 7})
    scales = {path: entry.scale for path, entry in read_peft(tmp_path).layers.items()}
    assert scales == {"foo": 3 / 2, "x.foo": 5 / 2, "barfoo": 2 / 2, "x.1.q": 7 / 2, "y": 2 / 2}


def test_targets_match_as_in_peft():
    def adapts(path, **config):
        return PeftCheckpoint({"target_modules": ["fc", "a.q"], **config}, {}, {}).adapts(path)

    assert adapts("fc") and adapts("x.fc") and adapts("a.q") and adapts("1.a.q")
    assert not adapts("attn_fc") and not adapts("fc.x") and not adapts("q")
    assert not adapts("x.fc", exclude_modules=["x.fc"]) and adapts("y.fc", exclude_modules=["x.fc"])
    assert not adapts("x.fc", exclude_modules=r"x\..*")
    assert not adapts("head.fc", modules_to_save=["head"]) and not adapts("score.fc", task_type="SEQ_CLS")
    assert adapts("x.fc", target_modules=r".*\.fc") and not adapts("fc", target_modules=r".*\.fc")
    assert not adapts("fc", target_modules=None) and adapts("any", target_modules="all-linear")
    # dots and digits are no wildcards in a list: layer 1 is not layer 10
    assert adapts("layers.1", target_modules=["layers.1"]) and not adapts("layers.10", target_modules=["layers.1"])
    assert not adapts("layers.10.q", target_modules=r"layers\.1\..*")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PeftLayer("conv3d", torch.ones(1, 1), torch.ones(1, 1), 1.0), "kind: got 'conv3d'"),
        (lambda: PeftLayer("linear", torch.ones(2, 3), torch.ones(4, 1), 1.0), "A, B: got shapes"),
        (lambda: PeftLayer("linear", torch.ones(2, 3, 1, 1), torch.ones(4, 2, 1, 1), 1.0), "A, B: got shapes"),
        (lambda: PeftLayer("conv2d", torch.ones(2, 3), torch.ones(4, 2), 1.0), "A, B: got shapes"),
        (lambda: PeftLayer("linear", torch.ones(0, 3), torch.ones(4, 0), 1.0), "A, B: got shapes"),
        (lambda: PeftLayer("linear", torch.full((1, 1), torch.nan), torch.ones(1, 1), 1.0), "A: got 1 NaN"),
        (lambda: layer(magnitude=torch.ones(3)), r"magnitude: got shape \(3,\)"),
        (lambda: layer("embedding", magnitude=torch.ones(4)), "magnitude: .*'embedding'"),
        (lambda: layer(scale=0.0), "scale: got 0.0"),
        (lambda: layer(scale=float("nan")), "scale: got nan"),
        (lambda: layer(dropout=1.0), "dropout: got 1.0"),
    ],
)
def test_bad_layers_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "layers, options, message",
    [
        ({}, {}, "at least one"),
        ({"": layer()}, {}, "empty module path"),
        ({"x": layer()}, {"extra": {"": {"bias": torch.ones(1)}}}, "empty module path"),
        ({"x": layer()}, {"extra": {"n": {"bias": torch.full((1,), torch.nan)}}}, r"n\.bias: got 1 NaN"),
        ({"x": layer(), "y": layer(magnitude=torch.ones(4))}, {}, r"DoRA\) for \['y'\] only"),
        ({"b.x": layer()}, {"extra": {"x": {"bias": torch.ones(1)}}}, r"hide \['b.x'\]"),
        ({"classifier": layer()}, {"task_type": "SEQ_CLS"}, r"hide \['classifier'\]"),
        ({"classifier": layer()}, {"task_type": "seq_cls"}, r"hide \['classifier'\]"),
        ({"x": layer()}, {"task_type": "classification"}, "task_type: got 'classification', wanted None or one of"),
        ({"x": layer()}, {"extra": {"out": {"bias": torch.ones(1)}}}, r"\['out'\], which PEFT takes for parts"),
        ({"x": layer()}, {"extra": {"layer": {"bias": torch.ones(1)}}}, r"\['layer'\], which PEFT takes for parts"),
        ({"x": layer()}, {"extra": {"n": {"bias": torch.ones(1).double() * 1e300}}}, r"n\.bias: got 1 NaN or inf"),
    ],
)
def test_what_peft_would_misread_is_not_written(layers, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_peft(tmp_path / "x", layers, **options)
    assert not (tmp_path / "x").exists()


def test_task_types_are_written_as_peft_spells_them(tmp_path):
    write_peft(tmp_path, {"x": layer()}, task_type="causal_lm")
    assert read_peft(tmp_path).config["task_type"] == "CAUSAL_LM"


def test_dropout_is_written_and_read_but_for_embeddings(tmp_path):
    layers = {"a": layer(dropout=0.1), "b": layer("conv2d", dropout=0.1), "c": layer(), "d": layer("embedding")}
    write_peft(tmp_path, layers)
    found = read_peft(tmp_path)
    assert found.config["lora_dropout"] == 0.1  # the most common: PEFT knows one for all
    assert [entry.dropout for entry in found.layers.values()] == [0.1, 0.1, 0.1, 0.0]


# Two files of one folder.


def test_files_of_two_saves_are_refused(tmp_path):
    """alpha 64 with factors of alpha 16 would compute with four times the update."""
    A, B = torch.randn(8, 4), torch.randn(4, 8)
    for name, alpha in (("one", 16), ("two", 64)):
        write_peft(tmp_path / name, {"x": PeftLayer("linear", A, B, alpha / 8)})
    one, two = (tmp_path / name / "adapter_config.json" for name in ("one", "two"))
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match="folder: got .*one, damaged or of two saves"):
        read_peft(tmp_path / "one")


def test_who_moves_the_base_model_may_say_so(tmp_path):
    write_peft(tmp_path, {"x": layer()}, base_model="here")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    changed = config | {"base_model_name_or_path": "there", "inference_mode": False, "peft_version": "1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))  # in one line, too
    assert read_peft(tmp_path).config["base_model_name_or_path"] == "there"
    for field, value in (("lora_alpha", 3), ("lora_dropout", 0.5), ("use_rslora", True), ("fan_in_fan_out", True)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(ValueError, match="two saves"):
            read_peft(tmp_path)


def test_names_that_match_nothing_are_no_mistake(tmp_path):
    write_peft(tmp_path, {"a.x": layer(), "b.x": layer()})
    edit(
        tmp_path,
        target_modules=["x", "k_proj"],
        exclude_modules=["c.x", "z"],
        rank_pattern={"nose": 7},
        alpha_pattern={r"ear\d+": 9},
    )
    assert read_peft(tmp_path).layers.keys() == {"a.x", "b.x"}


WRONG = [
    ("r", [0, -1, 2.5, True, "8", None, [8], 10**400, float("nan"), float("inf")]),
    ("lora_alpha", [0, -1, True, "8", None, {}, 10**400, float("inf")]),
    ("lora_dropout", [-0.1, 1, 1.5, "0.1", None, True, 10**400]),
    ("rank_pattern", [True, 3, "x", ["x"], {"x": None}, {"x": "2"}, {"x": 0}, {"x": 2.5}, {"x": 10**400}]),
    ("alpha_pattern", [True, {"x": [1]}, {"x": -1}, {"x": 10**400}]),
    ("target_modules", [5, True, {"x": 1}, ["x", 3], [["x"]], 1.5]),
    ("exclude_modules", [5, ["x", None]]),
    ("modules_to_save", ["head", 5, [None], {"head": 1}]),
    ("task_type", [5, ["SEQ_CLS"]]),
    ("use_dora", ["no", 2, [0]]),
    ("use_rslora", ["yes", 0.5]),
    ("fan_in_fan_out", ["true", {}]),
    ("bias", ["all", None, True]),
    ("init_lora_weights", ["pissa", "loftq", ["gaussian"], 3]),
]


@pytest.mark.parametrize("name, values", WRONG, ids=[name for name, _ in WRONG])
def test_a_field_of_a_wrong_type_or_range_is_named(name, values, tmp_path):
    write_peft(tmp_path, {"x": layer()})
    for value in values:
        edit(tmp_path, **{name: value})
        with pytest.raises(ValueError, match=f"{name}: got "):
            read_peft(tmp_path)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_that_are_none_or_would_hang(name, tmp_path):
    write_peft(tmp_path, {"a" * 60: layer()})

    def read(pattern):
        edit(tmp_path, **{name: pattern if name.endswith("modules") else {pattern: 4}})
        return read_peft(tmp_path)

    for pattern, message in [("(", "unterminated"), (r"(a)\1", "GROUPREF")]:
        with pytest.raises(ValueError, match=f"adapter_config.json: .*(?s:.*){message}"):
            read(pattern)
    if name == "target_modules":
        with pytest.raises(ValueError, match="no target module"):
            read("(a+)+b")
    else:
        assert len(read("(a+)+b").layers) == 1  # matches nothing, at once


def test_missing_files_and_broken_configs(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_peft(tmp_path)
    write_peft(tmp_path, {"x": layer()})
    texts = [b"{", b"\xff\xfe", b"[" * 99999, b"[1]", b"{}", b'{"peft_type": "LORA", "r": 1' + b"0" * 9999 + b"}"]
    messages = ["no JSON", "no JSON", "no JSON", "peft_type: got", "peft_type: got None", "no JSON"]
    for text, message in zip(texts, messages):
        (tmp_path / "adapter_config.json").write_bytes(text)
        with pytest.raises(ValueError, match=f"adapter_config.json.*{message}"):
            read_peft(tmp_path)
    write_peft(tmp_path, {"x": layer()})
    truncated(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        read_peft(tmp_path)
