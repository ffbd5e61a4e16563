"""SaRA's files: the same bits come back, on the right base only, and nothing half."""

import copy

import pytest
import torch
from battery import batch, linear, network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear, SaRALinear, load_sara, save_sara
from lowrank_ref.adapters.sara import sara_layers
from lowrank_ref.adapters.sara_file import MASKS, packed_mask, unpacked_mask
from lowrank_ref.core.io import save_adapters
from lowrank_ref.core.layers import replace_linears


def model_of(base=None, density=0.3, moved=False):
    model = replace_linears(network() if base is None else base, "", lambda layer: SaRALinear(layer, density))
    for i, layer in enumerate(sara_layers(model).values()):
        if moved:
            layer.values.data.add_(torch.linspace(-1, 1, len(layer.values)) + i)
    return model


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_packing_is_undone(bits):
    places = torch.tensor(bits).nonzero()[:, 0]
    packed = packed_mask(places, len(bits))
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(bits) // 8)
    assert unpacked_mask(packed).tolist() == places.tolist()


@pytest.mark.parametrize("masks", MASKS)
def test_the_same_base_gets_the_same_bits(masks, tmp_path):
    old, new = model_of(moved=True), model_of()
    sara_layers(old)["0"].active[0] = False
    save_sara(old, tmp_path / "x", masks)
    load_sara(new, tmp_path / "x")
    assert torch.equal(new(batch(0)), old(batch(0))) and bool(sara_layers(new)["0"].active.all())
    for a, b in zip(sara_layers(old).values(), sara_layers(new).values()):
        assert torch.equal(a.values, b.values) and torch.equal(a.support, b.support)


def test_sizes_are_as_stated(tmp_path):
    base = nn.Sequential(nn.Linear(400, 300))
    sizes = {}
    model = replace_linears(base, "0", lambda layer: SaRALinear(layer, 0.1))
    for masks in MASKS:
        save_sara(model, tmp_path / masks, masks)
        sizes[masks] = (tmp_path / masks).stat().st_size - 4 * 12_000
    save_adapters(model, tmp_path / "all")
    header = 1000
    assert 32 <= sizes["derived"] < header and 0 <= sizes["bits"] - 15_000 < header
    assert 0 <= sizes["places"] - 48_000 < header
    assert 0 <= (tmp_path / "all").stat().st_size - 9 * 12_000 < 2 * header


@pytest.mark.parametrize("masks", MASKS)
def test_a_cast_base_needs_masks_that_are_written(masks, tmp_path):
    old = model_of(density=0.15, moved=True)
    save_sara(old, tmp_path / "x", masks)
    other = network()
    for layer in (other[0], other[2]):
        layer.weight.data = (4 * layer.weight.data).round() / 4 + 1e-9 * torch.rand_like(layer.weight)
    new = model_of(other, density=0.15)
    assert not torch.equal(sara_layers(new)["0"].support, sara_layers(old)["0"].support)
    before = copy.deepcopy(new.state_dict())
    if masks == "derived":
        with pytest.raises(ValueError, match="for another mask.*the same base"):
            load_sara(new, tmp_path / "x")
        assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())
    else:
        load_sara(new, tmp_path / "x")
        for a, b in zip(sara_layers(old).values(), sara_layers(new).values()):
            assert torch.equal(a.values, b.values) and torch.equal(a.support, b.support)


@pytest.mark.parametrize("masks", MASKS)
def test_other_counts_damage_and_foreign_files_change_nothing(masks, tmp_path):
    save_sara(model_of(moved=True), tmp_path / "x", masks)
    good = (tmp_path / "x").read_bytes()
    other = model_of(density=0.4)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="mismatch"):
        load_sara(other, tmp_path / "x")
    for bad in (good[:-1], good[:200], good[:-3] + bytes([good[-3] ^ 4]) + good[-2:]):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="path: got"):
            load_sara(other, tmp_path / "bad")
    save_adapters(other, tmp_path / "y")
    with pytest.raises(ValueError, match="path: got"):
        load_sara(other, tmp_path / "y")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="^masks: got"):
        save_sara(model_of(), tmp_path / "x", "none")
    with pytest.raises(ValueError, match="^model: got"):
        save_sara(replace_linears(nn.Sequential(linear()), "0", LoRALinear), tmp_path / "x")
    model = model_of()
    sara_layers(model)["0"].values.data[0] = torch.nan
    with pytest.raises(ValueError, match="^0.values: got NaN"):
        save_sara(model, tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        load_sara(model, tmp_path / "nothing")
