"""Factors in few bits: packing against a loop, files that give the same bits back, and damaged ones."""

import copy
import json
import os
from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.core.io import load_tensors, read_safetensors, save_tensors
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.ranks import BayesianLoRALinear, GateSampler, gated_layers, load_bits, save_bits, stored_bits
from lowrank_ref.ranks.bit_export import KIND, pack_integers, unpack_integers

WIDTHS = (2, 4, 8, 16, 32)


def plain(dtype=torch.float32, m=24, n=16):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(n, m), nn.Tanh(), nn.Linear(m, 8)).to(dtype)


def model_of(ranks=(3, 4), bits=((4, 8, 16), (2, 4, 8)), dtype=torch.float32, most=16):
    """A model whose gates say these ranks and bits."""
    model = replace_linears(plain(dtype), "", partial(BayesianLoRALinear, rank=6, bits=most, generator=seeded()))
    with torch.no_grad():
        for layer, rank, widths in zip(gated_layers(model).values(), ranks, bits):
            layer.E.copy_(gaussian(6, seed=1))
            layer.rank_logits[rank - 1 :] = -3.0
            for logits, width in zip(layer.bit_logits, widths):
                logits[width.bit_length() - 2 :] = -3.0
    return model.eval()


@given(st.sampled_from(WIDTHS), st.integers(0, 20), st.integers(0, 1000))
def test_packing_by_a_loop(bits, count, seed):
    most = 2 ** (bits - 1) - 1
    codes = torch.randint(-most, most + 1, (count,), generator=seeded(seed))
    whole = sum((c + most) << (bits * i) for i, c in enumerate(codes.tolist()))
    data = pack_integers(codes, bits)
    assert bytes(data.tolist()) == whole.to_bytes(-(-count * bits // 8), "little")
    assert torch.equal(unpack_integers(data, bits, (count,)), codes)


def test_packing_refuses_what_does_not_fit():
    for bits in (0, 3, 64, -2):
        with pytest.raises(ValueError, match="bits: got"):
            pack_integers(torch.zeros(3, dtype=torch.long), bits)
    with pytest.raises(ValueError, match="codes: got 2 at most, wanted sizes up to 1 with 2 bits"):
        pack_integers(torch.tensor([0, -2]), 2)
    with pytest.raises(ValueError, match="wanted 2 bytes for 5 codes of 2 bits"):
        unpack_integers(torch.zeros(1, dtype=torch.uint8), 2, (5,))
    with pytest.raises(ValueError, match="got the code 2, wanted at most 1"):
        unpack_integers(torch.tensor([255], dtype=torch.uint8), 2, (4,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [((4, 8, 16), (2, 4, 8)), ((2, 2, 2), (16, 16, 16)), ((8, 8, 4), (8, 2, 16))])
def test_a_file_gives_the_same_bits_back(bits, dtype, tmp_path):
    model = model_of(bits=bits, dtype=dtype)
    GateSampler(model, generator=seeded())
    save_bits(model, tmp_path / "x")
    again = load_bits(plain(dtype), tmp_path / "x").eval()
    for old, new in zip(gated_layers(model).values(), gated_layers(again).values()):
        k = old.learned_rank
        assert new.rank == new.learned_rank == k and new.learned_bits == old.learned_bits and new.scale == old.scale
        A, B, E = old.quantized()
        for got, wanted in zip(new.quantized(), (A[:k], B[:, :k], E[:k])):
            assert torch.equal(got, wanted)
    x = gaussian(5, 16).to(dtype)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-6)
    GateSampler(again, generator=seeded())  # sure gates: drawing changes nothing but rounding
    torch.testing.assert_close(again.train()(x), model(x), rtol=0, atol=1e-5)


def test_the_output_is_the_same_to_the_bit_at_the_full_rank(tmp_path):
    model, x = model_of(ranks=(6, 6)), gaussian(5, 16).float()
    save_bits(model, tmp_path / "x")
    assert torch.equal(load_bits(plain(), tmp_path / "x").eval()(x), model(x))


def test_thirty_two_bits_come_back_to_rounding(tmp_path):
    model, x = model_of(bits=((32, 32, 32), (32, 8, 16)), dtype=torch.float64, most=32), gaussian(5, 16)
    save_bits(model, tmp_path / "x")
    torch.testing.assert_close(load_bits(plain(torch.float64), tmp_path / "x").eval()(x), model(x), rtol=0, atol=1e-12)


def test_the_file_takes_the_bits_that_were_counted(tmp_path):
    model = model_of()
    save_bits(model, tmp_path / "x")
    tensors = load_tensors(tmp_path / "x", kind=KIND)
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert 0 <= 8 * held - stored_bits(model) < 8 * 6  # each factor ends with a whole byte
    assert os.path.getsize(tmp_path / "x") < held + 2000


def test_files_that_do_not_fit_change_nothing(tmp_path):
    model = model_of()
    save_bits(model, tmp_path / "x")
    before = copy.deepcopy(plain().state_dict())

    def unchanged(path, target, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_bits(target, path)
        assert not list(m for m in target.modules() if isinstance(m, BayesianLoRALinear))

    unchanged(tmp_path / "none", plain(), "No such file")
    unchanged(tmp_path / "x", nn.Sequential(nn.Linear(16, 24)), r"got layers at \['2'\]")
    unchanged(tmp_path / "x", plain(m=12), "wanted")
    data = (tmp_path / "x").read_bytes()
    for damaged in (data[:-1], data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]):
        (tmp_path / "y").write_bytes(damaged)
        unchanged(tmp_path / "y", plain(), "damaged|no whole safetensors file")
    tensors = load_tensors(tmp_path / "x", kind=KIND)
    layers = json.loads(read_safetensors(tmp_path / "x")[1]["layers"])
    for wrong in ({}, {**layers, "0": {**layers["0"], "rank": 2}}, {"0": {**layers["0"], "bits": [4, 4, 4]}}):
        save_tensors(tensors, tmp_path / "y", kind=KIND, metadata={"layers": json.dumps(wrong)})
        unchanged(tmp_path / "y", plain(), "got")
    assert all(torch.equal(v, before[k]) for k, v in plain().state_dict().items())
    with torch.no_grad():
        model[0].A[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"0\.A: got 1 NaN"):
        save_bits(model, tmp_path / "z")
    assert not (tmp_path / "z").exists()
    with pytest.raises(ValueError, match="without a BayesianLoRALinear"):
        save_bits(plain(), tmp_path / "z")
