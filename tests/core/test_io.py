import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_ref.core import io
from lowrank_ref.core.io import load_adapters, load_tensors, save_adapters, save_tensors
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
