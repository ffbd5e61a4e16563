import json
import os
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_ref.adapters import RandLoRALinear
from lowrank_ref.core import io
from lowrank_ref.core.io import load_adapters, load_tensors, save_adapters, save_tensors, write_file
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
        header = file.metadata()
    assert len(header.pop("lowrank_ref_sha256")) == 64
    assert header == {"format": "lowrank_ref", "kind": "moments", "step": "3"}
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


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64", "bfloat16", "uint16"])
def test_rare_dtypes_come_back(dtype, tmp_path):
    dtype = getattr(torch, dtype)
    numbers = torch.tensor([[0.0, 1.0, 2.0]]).to(dtype)
    save_tensors({"x": numbers, "empty": numbers[:0], "one": numbers[0, 1]}, tmp_path / "x", kind="k")
    again = load_tensors(tmp_path / "x", kind="k")
    assert again["x"].dtype == dtype and again["empty"].shape == (0, 3) and again["one"].shape == ()
    assert again["x"].to(torch.complex64).tolist() == [[0, 1, 2]] and again["one"].to(torch.complex64) == 1


def test_conjugate_views_are_written_as_they_read(tmp_path):
    x = torch.tensor([1 + 2j])
    save_tensors({"x": x.conj(), "y": x.conj().imag}, tmp_path / "x", kind="k")
    again = load_tensors(tmp_path / "x", kind="k")
    assert again["x"].tolist() == [1 - 2j] and again["y"].tolist() == [-2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2, device="meta"),
        lambda: torch.ones(2, dtype=torch.complex128),
        lambda: torch.ones(2).to_sparse(),
        lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu),  # written, but never read, by safetensors
    ],
    ids=["meta", "complex128", "sparse", "scales of 8 bits"],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_what_the_format_cannot_give_back_is_not_written(make, tmp_path):
    path = tmp_path / "x"
    save_tensors(TENSORS, path, kind="k")
    with pytest.raises(ValueError, match="bad: got .*wanted a plain tensor in memory"):
        save_tensors({"good": torch.ones(1), "bad": make()}, path, kind="k")
    with pytest.raises(TypeError, match="bad: got list"):
        save_tensors({"bad": [1.0]}, path, kind="k")
    assert_equal(load_tensors(path, kind="k"), TENSORS)


def test_what_was_loaded_no_longer_depends_on_the_file(tmp_path):
    path = tmp_path / "x"
    save_tensors({"x": torch.ones(5000)}, path, kind="k")
    loaded = load_tensors(path, kind="k")["x"]
    with open(path, "r+b") as file:  # the same file, not a new one under its name
        file.write(b"\0" * path.stat().st_size)
        file.truncate(10)
    assert loaded.sum() == 5000
    loaded.zero_()  # writable, and its own


def test_only_a_regular_file_is_replaced_or_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="no regular file"):
            save_tensors(TENSORS, path, kind="k")
        with pytest.raises(ValueError, match="no regular file"):
            load_tensors(path, kind="k")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    for content in (b"1", b"2"):
        write_file(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_bytes() == content


def test_long_and_odd_names_are_names(tmp_path):
    for name in ("x" * 255, "é" * 120, " ", "-rf", "a\nb", "\udcff", "?*[]"):
        save_tensors(TENSORS, tmp_path / name, kind="k")
        assert_equal(load_tensors(tmp_path / name, kind="k"), TENSORS)
    assert len(os.listdir(tmp_path)) == 7


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
    with pytest.raises(FileNotFoundError, match="whose folder does not exist"):
        save_tensors(TENSORS, tmp_path / "no" / "folder", kind="k")


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
    """Write the file again with other content, as a program that knows the format would."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors, layers = load_tensors(path, kind="adapters"), json.loads(header["layers"])
    edit(tensors, layers)
    save_tensors(tensors, path, kind="adapters", metadata={"layers": json.dumps(layers)})


EDITS = {
    "missing": (lambda t, c: t.pop("0.gain"), r"missing: 0\.gain \(4,\)"),
    "extra": (lambda t, c: t.update(x=torch.ones(2)), r"extra: x \(2,\)"),
    "shape": (lambda t, c: t.update({"0.gain": torch.ones(5)}), r"shape: 0\.gain is \(5,\) in the file, \(4,\) in"),
    "broadcast": (lambda t, c: t.update({"0.gain": torch.ones(1)}), r"shape: 0\.gain is \(1,\)"),
    "NaN": (lambda t, c: t["2.mix"][0].fill_(torch.nan), r"not finite: 2\.mix"),
    "dtype": (lambda t, c: t.update({"0.steps": torch.ones(1)}), r"dtype: 0\.steps is torch\.float32"),
    "class": (lambda t, c: c["2"].update({"class": "LoRALinear"}), r"layer 2: .*LoRALinear.*in the file.*Gain"),
    "scale": (lambda t, c: c["2"].update(scale=2.0), r"layer 2: .*'scale': 2\.0.*in the file.*'scale': 1\.0"),
    "too large": (lambda t, c: t.update({"0.gain": torch.ones(4).double() * 1e300}), r"dtype: 0\.gain is .*float64"),
    "too fine": (lambda t, c: t.update({"0.gain": torch.ones(4).double() + 1e-12}), r"dtype: 0\.gain .*cannot hold"),
    "too many": (lambda t, c: t.update({"0.steps": torch.tensor([2.0**70])}), r"dtype: 0\.steps is torch\.float32"),
    "complex": (lambda t, c: t.update({"0.gain": torch.ones(4) + 0j}), r"dtype: 0\.gain is torch\.complex64"),
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


@pytest.mark.parametrize("text", ["[]", "[1]", "null", "3", '"x"', "{", "[" * 9999, "\\", "1" * 9999])
def test_cards_of_layers_that_are_none_are_refused(text, tmp_path):
    save_tensors(load_tensors_of(model(), tmp_path), tmp_path / "x", kind="adapters", metadata={"layers": text})
    with pytest.raises(ValueError, match="cards of its layers"):
        load_adapters(model(1), tmp_path / "x")
    save_tensors(load_tensors_of(model(), tmp_path), tmp_path / "x", kind="adapters")
    with pytest.raises(ValueError, match="cards of its layers"):
        load_adapters(model(1), tmp_path / "x")


def load_tensors_of(made, folder):
    save_adapters(made, folder / "good")
    return load_tensors(folder / "good", kind="adapters")


def test_a_cast_that_changes_nothing_is_done(tmp_path):
    old, new = model(0), model(1).double()
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(new[0].gain, old[0].gain.double()) and new[0].gain.dtype == torch.float64
    with torch.no_grad():
        old[0].gain.fill_(0.5), old[2].gain.fill_(-2), old[0].mix.fill_(1), old[2].mix.zero_()
        old[3].weight.fill_(1), old[3].bias.fill_(0.25)
    save_adapters(old, tmp_path / "x")
    half = model(1)
    for p in half.parameters():  # one by one: a cast of the whole model leaves adapters in float32
        p.data = p.data.bfloat16()
    load_adapters(half, tmp_path / "x")
    assert half[0].gain.tolist() == [0.5] * 4 and half[0].gain.dtype == torch.bfloat16


def test_a_model_without_memory_is_refused(tmp_path):
    save_adapters(model(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"meta: 0\.gain has no memory"):
        load_adapters(model().to("meta"), tmp_path / "x")
    with pytest.raises(ValueError, match="wanted a plain tensor in memory"):
        save_adapters(model().to("meta"), tmp_path / "y")


def test_two_layers_change_or_none(tmp_path):
    """RandLoRA's second layer refuses the recipe of other bases when the first has been written."""

    def build(seed):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        make = partial(RandLoRALinear, rank=2, generator=torch.Generator().manual_seed(seed))
        return replace_linears(layers, "", make)

    old, new = build(1), build(2)
    with torch.no_grad():
        old[0].lam.add_(1)
    save_adapters(old, tmp_path / "x")

    def damage(tensors, layers):
        tensors["1.recipe"][1:] += 5

    rewrite(tmp_path / "x", damage)
    before, x = {k: v.clone() for k, v in new.state_dict().items()}, torch.randn(3, 6)
    wanted = new(x)
    with pytest.raises(ValueError, match=r"1\.recipe: got bases"):
        load_adapters(new, tmp_path / "x")
    assert_equal(new.state_dict(), before)
    assert torch.equal(new(x), wanted)  # the bases too, which are not in the state


# Statistics of a layer that trains.


def with_norms(seed, trainable):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    layers = nn.ModuleDict({"fc": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "head": head})
    layers.forward = lambda x: layers.head(layers.norm(layers.fc(x)))
    return replace_linears(layers, "^fc$", Gain, trainable=trainable)


@pytest.mark.parametrize(
    "trainable, moved",
    [
        (r"^norm\.", ["norm"]),
        (r"^norm\.bias$", ["norm"]),  # its other half stays frozen, its statistics move all the same
        (r"^head\.", ["head.1"]),  # no parameter of its own, but inside a part that trains whole
        (r"^(norm|head)\.", ["norm", "head.1"]),
        (None, []),
    ],
)
def test_running_statistics_travel_with_what_trains(trainable, moved, tmp_path):
    old, new = with_norms(0, trainable), with_norms(0, trainable)
    for _ in range(3):
        old.forward(torch.randn(8, 3) + 2)
    save_adapters(old, tmp_path / "x")
    statistics = {name for name in load_file(tmp_path / "x") if "running" in name or "num_batches" in name}
    wanted = {f"{path}.{name}" for path in moved for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert statistics == wanted
    load_adapters(new, tmp_path / "x")
    for path in ("norm", "head.1"):
        same = torch.equal(new.get_submodule(path).running_mean, old.get_submodule(path).running_mean)
        assert same == (path in moved)  # a frozen one drifts in training mode, and its drift is not saved
    if len(moved) == 2:
        x = torch.randn(5, 3)
        assert torch.equal(new.eval().forward(x), old.eval().forward(x))


# Wrapped models.


def inner_compiled(made):
    made[0] = torch.compile(made[0], backend="eager")
    made[3] = torch.compile(made[3], backend="eager")
    return made


def checkpointed(made):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    made[2] = checkpoint_wrapper(made[2])
    return made


@pytest.mark.usefixtures("group_of_one")
def test_a_file_does_not_tell_how_the_model_was_wrapped(tmp_path):
    parallel = nn.parallel.DistributedDataParallel
    wraps = {
        "plain": lambda made: made,
        "compiled": lambda made: torch.compile(made, backend="eager"),
        "inside": inner_compiled,
        "checkpointed": checkpointed,
        "DDP": parallel,
        "DDP, compiled": lambda made: torch.compile(parallel(made), backend="eager"),
        "compiled, DDP": lambda made: parallel(torch.compile(made, backend="eager")),
    }
    old = model(0)
    save_adapters(old, tmp_path / "plain")
    for name, wrap in wraps.items():
        made = model(0)
        save_adapters(wrap(made), tmp_path / name)
        assert_equal(load_file(tmp_path / name), load_file(tmp_path / "plain"))
        made = model(1)
        load_adapters(wrap(made), tmp_path / "plain")
        save_adapters(made, tmp_path / "again")
        assert_equal(load_file(tmp_path / "again"), load_file(tmp_path / "plain"))


def test_a_layer_called_module_keeps_its_name(tmp_path):
    old = nn.ModuleDict({"module": model(0)})
    save_adapters(old, tmp_path / "x")
    assert "module.0.gain" in load_file(tmp_path / "x")
    load_adapters(nn.ModuleDict({"module": model(1)}), tmp_path / "x")
    with pytest.raises(ValueError, match=r"missing: 0\.gain"):
        load_adapters(model(1), tmp_path / "x")
