import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_ref.core import io
from lowrank_ref.core.io import (
    PeftCheckpoint,
    PeftLayer,
    load_adapters,
    load_tensors,
    read_peft,
    save_adapters,
    save_tensors,
    write_peft,
)
from lowrank_ref.core.layers import AdaptedLinear, replace_linears

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor([1, 2]), "flag": torch.tensor(True)}


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


# Tensor files.


def test_tensors_come_back_with_their_header(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(TENSORS, path, kind="moments", metadata={"step": "3"})
    assert_equal(load_tensors(path, kind="moments"), TENSORS)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "lowrank_ref", "kind": "moments", "step": "3"}
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_views_and_shared_memory_are_written_as_copies(tmp_path):
    W = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": W.T, "row": W[0], "again": W, "parameter": nn.Parameter(W), "wide": W[:1].expand(5, 4)}
    save_tensors(tensors, tmp_path / "x", kind="k")
    assert_equal(load_tensors(tmp_path / "x", kind="k"), {k: t.detach() for k, t in tensors.items()})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    save_tensors(TENSORS, path, kind="k")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(io.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors({"a": torch.zeros(1)}, path, kind="k")
    assert os.listdir(tmp_path) == ["x"]
    assert_equal(load_tensors(path, kind="k"), TENSORS)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3])


SPOILT = {
    "truncated": (truncated, "no whole safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "no whole safetensors file"),
    "text": (lambda path: path.write_text("hello, this is no tensor file at all"), "no whole safetensors file"),
    "pickle": (lambda path: torch.save(TENSORS, path), "no whole safetensors file"),
    "foreign": (lambda path: save_file(TENSORS, path, {"format": "pt"}), r"format and kind \('pt', None\), wanted"),
    "no header": (lambda path: save_file(TENSORS, path), r"\(None, None\), wanted"),
    "other kind": (lambda path: save_tensors(TENSORS, path, kind="other"), r"'other'\), wanted .*'adapters'"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file_raises(name, tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(TENSORS, path, kind="adapters")
    spoil, message = SPOILT[name]
    spoil(path)
    with pytest.raises(ValueError, match=f"path: got .*x.safetensors.*{message}"):
        load_tensors(path, kind="adapters")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "nothing", kind="k")


# Adapters.


class Gain(AdaptedLinear):
    """A trained gain of each output, on top of a frozen buffer and a frozen factor that belong to the adapter."""

    adapter_names = ("gain",)

    def __init__(self, base, scale=1.0):
        super().__init__(base)
        self.gain, self.scale = nn.Parameter(torch.randn(self.out_features)), scale
        self.mix = nn.Parameter(torch.randn(self.out_features, self.in_features), requires_grad=False)
        self.register_buffer("steps", torch.tensor([3]))

    def delta_weight(self):
        return self.scale * self.gain[:, None] * self.mix


class OtherGain(Gain):
    pass


def model(seed=0, kind=Gain, **options):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    return replace_linears(layers, "^[02]$", lambda base: kind(base, **options), trainable=r"^3\.")


def test_adapters_come_back_without_the_base(tmp_path):
    old, new = model(0), model(1)
    base = {k: v.clone() for k, v in new.state_dict().items() if "base" in k or k.startswith("1.")}
    save_adapters(old, tmp_path / "x")
    names = {f"{i}.{name}" for i in (0, 2) for name in ("gain", "mix", "steps")} | {"3.weight", "3.bias"}
    assert load_file(tmp_path / "x").keys() == names
    load_adapters(new, tmp_path / "x")
    state, wanted = new.state_dict(), old.state_dict()
    assert_equal({k: state[k] for k in names}, {k: wanted[k] for k in names})
    assert_equal({k: state[k] for k in base}, base)
    assert [n for n, p in new.named_parameters() if p.requires_grad] == ["0.gain", "2.gain", "3.weight", "3.bias"]


def test_a_bare_adapter_is_a_model_too(tmp_path):
    old, new = Gain(nn.Linear(3, 2)), Gain(nn.Linear(3, 2))
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(old.gain, new.gain) and not torch.equal(old.base.weight, new.base.weight)


def test_a_shared_tensor_is_stored_once(tmp_path):
    def shared(seed):
        layers = model(seed)
        layers[2].steps = layers[0].steps
        return layers

    old, new = shared(0), shared(1)
    old[0].steps.fill_(7)
    save_adapters(old, tmp_path / "x")
    assert "2.steps" not in load_file(tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert new[2].steps.item() == 7
    with pytest.raises(ValueError, match=r"missing: 2\.steps"):
        load_adapters(model(), tmp_path / "x")


def rewrite(path, edit):
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors, layers = load_file(path), json.loads(header["layers"])
    edit(tensors, layers)
    save_file(tensors, path, {**header, "layers": json.dumps(layers)})


EDITS = {
    "missing": (lambda t, c: t.pop("0.gain"), r"missing: 0\.gain \(4,\)"),
    "extra": (lambda t, c: t.update(x=torch.ones(2)), r"extra: x \(2,\)"),
    "shape": (lambda t, c: t.update({"0.gain": torch.ones(5)}), r"shape: 0\.gain is \(5,\) in the file, \(4,\) in"),
    "broadcast": (lambda t, c: t.update({"0.gain": torch.ones(1)}), r"shape: 0\.gain is \(1,\)"),
    "NaN": (lambda t, c: t["2.mix"][0].fill_(torch.nan), r"not finite: 2\.mix"),
    "dtype": (lambda t, c: t.update({"0.steps": torch.ones(1)}), r"dtype: 0\.steps is torch\.float32"),
    "class": (lambda t, c: c["2"].update({"class": "LoRALinear"}), r"layer 2: .*LoRALinear.*in the file.*Gain"),
    "scale": (lambda t, c: c["2"].update(scale=2.0), r"layer 2: .*'scale': 2\.0.*in the file.*'scale': 1\.0"),
    "no layer": (lambda t, c: c.pop("2"), r"layer 2: None in the file"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_file_that_does_not_fit_raises_and_changes_nothing(name, tmp_path):
    edit, message = EDITS[name]
    save_adapters(model(0), tmp_path / "x")
    rewrite(tmp_path / "x", edit)
    new = model(1)
    before = {k: v.clone() for k, v in new.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_adapters(new, tmp_path / "x")
    assert_equal(new.state_dict(), before)


def test_all_mismatches_are_listed(tmp_path):
    save_adapters(model(0), tmp_path / "x")
    rewrite(tmp_path / "x", lambda t, c: (t.pop("0.gain"), t.pop("2.gain"), t.update(x=torch.ones(2))))
    with pytest.raises(ValueError, match=r"3 mismatch(?s:.*)missing: 0\.gain(?s:.*)missing: 2\.gain(?s:.*)extra: x"):
        load_adapters(model(), tmp_path / "x")


def test_another_class_or_scale_does_not_load(tmp_path):
    save_adapters(model(), tmp_path / "x")
    for other in (model(kind=OtherGain), model(scale=0.5)):
        with pytest.raises(ValueError, match="layer 0"):
            load_adapters(other, tmp_path / "x")


def test_nothing_to_save_or_not_finite_raises(tmp_path):
    with pytest.raises(ValueError, match="no adapter layer"):
        save_adapters(nn.Linear(2, 2), tmp_path / "x")
    bad = model()
    with torch.no_grad():
        bad[0].gain[0] = torch.nan
    with pytest.raises(ValueError, match=r"0\.gain: got 1 NaN"):
        save_adapters(bad, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# PEFT folders as plain data. tests/adapters/test_peft_format.py holds them against the real package.


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
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config.update(use_rslora=True, lora_alpha=2, alpha_pattern={"^foo": 3, "foo": 5, r"\d\.q": 7})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
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
    assert not adapts("fc", target_modules=None)


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
    ],
)
def test_what_peft_would_misread_is_not_written(layers, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_peft(tmp_path / "x", layers, **options)
    assert not (tmp_path / "x").exists()


def test_missing_files_and_broken_configs(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_peft(tmp_path)
    write_peft(tmp_path, {"x": layer()})
    for text, message in [("{", "no JSON"), ("[1]", "peft_type: got"), ("{}", "peft_type: got None")]:
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_peft(tmp_path)
    write_peft(tmp_path, {"x": layer()})
    truncated(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        read_peft(tmp_path)
