"""The battery of all methods on the GPU: the same checks as on the CPU, in float32 and bfloat16."""

import battery
import pytest
import test_battery
import torch

pytestmark = pytest.mark.gpu

#: Checks that compare two ways to compute in one dtype, by a bound that bfloat16 with its 8 bits cannot meet, or that
#: multiply its rows by float32 updates. `test_bfloat16_is_float32_rounded` stands for them.
FLOAT32_ONLY = {
    "test_forward_is_base_plus_delta_for_any_batch",
    "test_merged_is_plain_and_computes_the_same",
    "test_a_merged_model_is_plain",
    "test_conv1d_gives_what_the_transposed_linear_layer_gives",
    "test_compiles_to_one_graph",
}
#: Needs processes, not a GPU.
LEFT_OUT = {"test_two_processes_equal_one"}
CHECKS = {name: check for name, check in vars(test_battery).items() if name.startswith("test_")}
globals().update({name: check for name, check in CHECKS.items() if name not in LEFT_OUT})


def pytest_generate_tests(metafunc):
    dtypes = [torch.float32] if metafunc.function.__name__ in FLOAT32_ONLY else [torch.float32, torch.bfloat16]
    if metafunc.function.__name__ in CHECKS:
        metafunc.parametrize("precision", dtypes, indirect=True, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def precision(request, device, monkeypatch):
    """Put the battery's cases on the device, in this dtype."""
    monkeypatch.setattr(battery, "DEVICE", device)
    monkeypatch.setattr(battery, "DTYPE", getattr(request, "param", torch.float32))
    return battery.DTYPE


def test_the_lists_name_checks_that_exist():
    assert all(name in CHECKS for name in FLOAT32_ONLY | LEFT_OUT)


@pytest.mark.parametrize("name", battery.LAYERS)
def test_bfloat16_is_float32_rounded(name):
    """Base and update are rounded to 8 bits, and so is their sum: three roundings of half a unit, of values up to peak.

    The base's and the update's sum over n may be rounded once more inside, where the GPU splits it.
    """
    rows = battery.batch(0, torch.bfloat16)
    half = battery.adapter(name, base=battery.linear(torch.bfloat16), moved=True).eval()
    base = battery.linear(torch.bfloat16).float()
    whole = battery.adapter(name, base=base, moved=True).eval()
    whole.load_state_dict(half.state_dict())
    with torch.no_grad():
        parts = [whole.base(rows.float()), whole(rows.float()) - whole.base(rows.float())]
    peak = max(float(part.abs().max()) for part in [*parts, sum(parts)])
    for got in (half(rows), half.merged()(rows)):
        torch.testing.assert_close(got.float(), sum(parts), rtol=0, atol=5 * peak * 2**-8)
