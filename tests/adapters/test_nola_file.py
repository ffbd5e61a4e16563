"""The smallest file of a model with NOLA: what it holds, what it refuses, and that nothing is half loaded."""

import copy
from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from safetensors.torch import load_file
from torch import nn

from lowrank_ref.adapters import LoRALinear, NOLALinear, load_nola, save_nola
from lowrank_ref.adapters.nola_bits import rounded
from lowrank_ref.core.io import save_adapters, save_tensors
from lowrank_ref.core.layers import adapters, replace_linears


def model(seed=0, moved=True, pattern="", **options):
    """Two adapted layers on the same base weights; `moved` gives coefficients other than the start's."""
    layers = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(gaussian(*p.shape))
    options = {"rank": 2, "bases": (5, 8), "generator": seeded(seed)} | options
    replace_linears(layers, pattern, partial(NOLALinear, **options))
    if moved:
        for _, layer in adapters(layers):
            for i, p in enumerate(layer.adapter_parameters().values()):
                p.data += gaussian(*p.shape, seed=seed + i)
    return layers


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_file_rebuilds_what_was_rounded(bits, tmp_path):
    old, new, x = model(1), model(2), gaussian(3, 6)
    new[0].alpha.data.fill_(torch.nan)  # as of a layer that has not been loaded yet
    save_nola(old, tmp_path / "x", bits)
    load_nola(new, tmp_path / "x")
    for (_, a), (_, b) in zip(adapters(old), adapters(new)):
        assert torch.equal(a.recipe, b.recipe)
        assert torch.equal(b.alpha, rounded(a.alpha, bits)) and torch.equal(b.beta, rounded(a.beta, bits))
        a.bits = bits
    assert torch.equal(old(x), new(x))
    held = load_file(tmp_path / "x")
    assert held["codes"].numel() == -(-2 * 13 * bits // 8)
    assert {k: tuple(v.shape) for k, v in held.items() if k != "codes"} == {
        "bits": (),
        "card": (32,),
        "recipes": (2, 2),
        "steps": (4,),
    }


def test_kept_bases_are_drawn_anew_after_loading(tmp_path):
    old, new, x = model(1, keep=True), model(2, keep=True), gaussian(3, 6)
    new(x)
    save_nola(old, tmp_path / "x", 8)
    load_nola(new, tmp_path / "x")
    fresh = model(3)
    load_nola(fresh, tmp_path / "x")
    torch.testing.assert_close(new(x), fresh(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [{"rank": 3}, {"scale": 1.0}, {"start": "random"}, {"bases": (8, 5)}, {"pattern": "0"}],
)
def test_other_layers_or_settings_are_refused(other, tmp_path):
    save_nola(model(1), tmp_path / "x")
    target = model(2, **other)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="of layers with other paths, shapes or settings"):
        load_nola(target, tmp_path / "x")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_rounding_in_training_is_no_other_layer(tmp_path):
    trained, plain = model(1, bits=4), model(2)
    save_nola(trained, tmp_path / "x", 4)
    load_nola(plain, tmp_path / "x")
    assert torch.equal(plain(gaussian(3, 6)), trained(gaussian(3, 6)))


def test_foreign_files_and_damage_leave_the_model_as_it_was(tmp_path):
    good, target = model(1), model(2)
    before = copy.deepcopy(target.state_dict())
    save_adapters(good, tmp_path / "adapters")
    save_nola(good, tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-1])
    save_nola(good, tmp_path / "x")
    sound = load_file(tmp_path / "x")
    wrong = sound["recipes"].clone()
    wrong[1, 0] += 1  # the second layer: the first is not loaded either
    nan = sound["steps"].clone()
    nan[3] = torch.nan
    for name, change in {
        "seed": {"recipes": wrong},
        "step": {"steps": nan},
        "bits": {"bits": torch.tensor(3)},
        "code": {"codes": torch.full_like(sound["codes"], 255)},
    }.items():
        save_tensors(sound | change, tmp_path / name, kind="nola")
    save_tensors({"a": torch.ones(1)}, tmp_path / "empty", kind="nola")
    for name in ("adapters", "cut", "seed", "step", "bits", "code", "empty"):
        with pytest.raises(ValueError):
            load_nola(target, tmp_path / name)
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items()), name
    with pytest.raises(FileNotFoundError):
        load_nola(target, tmp_path / "none")


def test_models_and_bits_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="model: got no adapters, wanted NOLALinear"):
        save_nola(nn.Linear(2, 2), tmp_path / "x")
    mixed = replace_linears(model(pattern="0"), "2", partial(LoRALinear, rank=1))
    with pytest.raises(ValueError, match=r"model: got \['2'\], wanted NOLALinear"):
        save_nola(mixed, tmp_path / "x")
    for bits, error in ((9, ValueError), (4.0, TypeError)):
        with pytest.raises(error, match="bits"):
            save_nola(model(), tmp_path / "x", bits)
    broken = model()
    broken[0].alpha.data[0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_nola(broken, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_file_of_a_large_model_is_nearly_all_coefficients(tmp_path):
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(50))
    replace_linears(layers, "", partial(NOLALinear, rank=2, bases=64, generator=seeded()))
    save_nola(layers, tmp_path / "x", 4)
    assert (tmp_path / "x").stat().st_size < 50 * (64 + 16 + 8) + 1000
