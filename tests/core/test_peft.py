"""PEFT folders as plain data. tests/adapters/test_peft_format.py holds them against the real package."""

import json

import pytest
import torch

from lowrank_ref.core.peft import PeftCheckpoint, PeftLayer, read_peft, write_peft


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3])


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


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
