import numpy as np
import pytest

from lowrank_ref.lab.compare import compare
from lowrank_ref.lab.draw import plots

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def ax():
    plt.switch_backend("agg")
    with plt.rc_context(plots.style()):
        figure, ax = plt.subplots()
        yield ax
        plt.close(figure)


def test_style_is_valid_and_small():
    with plt.rc_context(plots.style()):
        assert plt.rcParams["figure.figsize"][0] <= 6 and plt.rcParams["axes.facecolor"] == "white"


def test_curves_show_mean_and_range(ax):
    plots.curves(ax, {"LoRA": [[1, 2, 3], [3, 2, 1]]})
    assert ax.lines[0].get_ydata().tolist() == [2, 2, 2] and ax.lines[0].get_xdata().tolist() == [1, 2, 3]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1 and band[:, 1].max() == 3
    with pytest.raises(ValueError, match=r"runs: got shape \(3,\)"):
        plots.curves(ax, {"LoRA": [1, 2, 3]})


def test_bars_show_every_seed(ax):
    plots.bars_with_spread(ax, {"LoRA": [1.0, 3.0], "full": [2.0, 2.0]}, label="loss (nats)")
    assert [bar.get_width() for bar in ax.patches] == [2, 2]
    assert ax.lines[0].get_xdata().tolist() == [1, 3]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["LoRA", "full"] and ax.get_xlabel() == "loss (nats)"


def test_lr_sweep_leaves_diverged_rates_out(ax):
    def run(method, lr, seed):
        if lr > 1:
            raise FloatingPointError("inf")
        return {"loss": lr + seed}

    plots.lr_sweep(ax, compare(run, ["LoRA"], lrs=(0.1, 10.0, 1.0), seeds=(0, 1), workers=1, progress=False))
    line = ax.lines[0]
    assert np.allclose(line.get_xdata(), [0.1, 1.0]) and np.allclose(line.get_ydata(), [0.6, 1.5])
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "loss"
