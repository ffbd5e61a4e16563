"""What the GPU tests share: the device they run on, and full float32 products.

They are skipped where there is no CUDA device. `LOWRANK_TEST_DEVICE=cpu pytest tests/gpu` runs on the CPU what needs no
CUDA, to check the tests themselves.
"""

import os

import pytest
import torch

pytest.register_assert_rewrite("test_battery")

WANTED = os.environ.get("LOWRANK_TEST_DEVICE", "cuda")


@pytest.fixture(autouse=True)
def device():
    """The device under test. Float32 products are computed in float32: no tolerance here allows the 10 bits of TF32."""
    if WANTED == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; LOWRANK_TEST_DEVICE=cpu runs what needs none")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions have a switch of their own
        yield WANTED
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def cuda(device):
    """The device, where the test needs what only CUDA has."""
    if device != "cuda":
        pytest.skip("needs CUDA's allocator or graphs")
    return device


@pytest.fixture
def generators(device):
    """Function seed -> a generator on the CPU and one on the device, both of this seed."""

    def build(seed=0):
        return [torch.Generator(place).manual_seed(seed) for place in ("cpu", device)]

    return build
