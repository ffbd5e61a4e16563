"""Which cards run the kernels, and that every kernel compiles for all of them. None of it needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowrank_ref
from lowrank_ref import kernels
from lowrank_ref.lowbit import BitLinear, PackedLinear, fast, ternary

CARDS = [80, 86, 89, 90, 100, 120]  # A100; A10, RTX 30; L4, RTX 40; Hopper; Blackwell; RTX 50


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_compiles_in_every_variant_and_fits_into_shared_memory(card):
    """In a process of its own: here Triton may be the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert kernels.takes_card(divmod(card, 10))
    script = Path(__file__).with_name("compile_all.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(lowrank_ref.__file__).parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script, str(card)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _, _ in found["launches"]} == set(found["kernels"]), "a kernel that nothing here launches"
    too_large = [launch for launch in found["launches"] if launch[-1] > found["room"]]
    assert not too_large


def test_what_a_card_gets_is_decided_by_its_capability():
    cards = [(6, 0), (7, 0), (7, 5), *(divmod(card, 10) for card in CARDS)]
    assert [card for card in cards if kernels.takes_card(card)] == cards[3:]
    assert not any(kernels.takes_card(c, amd=True) for c in [(7, 5), (9, 0), (9, 4), (11, 0)])


@pytest.fixture
def card(monkeypatch):
    """Function capability, amd -> claim that the current GPU is such a card, and that kernels are compiled."""
    pytest.importorskip("triton", reason="Triton is not installed")

    def claim(capability, hip=None):
        kernels._capability.cache_clear()
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    yield claim
    kernels._capability.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "hip", "runs"), [((7, 5), None, False), ((8, 0), None, True), ((9, 4), "6.2", False)]
)
def test_layers_take_the_kernel_or_the_definition(capability, hip, runs, card, monkeypatch):
    card(capability, hip)
    assert kernels.runs_on(GPU) is runs and not kernels.runs_on(torch.device("cpu"))
    layer, x, taken = PackedLinear(BitLinear(torch.nn.Linear(6, 4))), torch.ones(2, 6), []
    monkeypatch.setattr(fast, "packed_linear", lambda *a: taken.append("kernel") or torch.ones(2, 4))
    monkeypatch.setattr(ternary, "packed_linear", lambda *a: taken.append("definition") or torch.ones(2, 4))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "device", GPU)  # to `takes` the numbers lie on this card
    layer(x)
    assert taken == ["kernel" if runs else "definition"]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("capability", "sign"), [((7, 5), -1), ((8, 6), 1)])
def test_torch_compile_asks_for_the_card_once(capability, sign, card, recwarn):
    card(capability)

    def step(x):
        return x + 1 if kernels.runs_on(GPU) else x - 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [sign, sign]
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_matrices_on_a_card_that_runs_no_kernel_take_the_plain_step(card, monkeypatch):
    galore = pytest.importorskip("lowrank_ref.kernels.galore", reason="Triton is not installed")
    matrix = torch.ones(8, 16, dtype=torch.float16)
    for capability, usable in (((7, 5), False), ((8, 0), True)):
        card(capability)
        monkeypatch.setattr(galore, "INTERPRETED", False)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            patch.setattr(torch.Tensor, "device", GPU)
            patch.setattr(torch.Tensor, "get_device", lambda self: 0)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            assert galore.usable([matrix]) is usable
