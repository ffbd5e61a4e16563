import numpy as np
import pytest
import torch

from lowrank_ref.lab import data


def test_digits_split_and_scale():
    d = data.digits()
    assert d.x_train.shape == (1000, 64) and d.x_test.shape == (500, 64) and d.x_valid.shape == (297, 64)
    assert d.x_train.dtype == torch.float32 and d.y_train.dtype == torch.int64
    assert d.x_train.min() == pytest.approx(-0.3) and d.x_train.max() == pytest.approx(0.7)
    # Every image of the package is used exactly once.
    from sklearn.datasets import load_digits

    ours = torch.cat([d.x_train, d.x_valid, d.x_test])
    theirs = torch.tensor(load_digits().data, dtype=torch.float32) / 16 - 0.3
    assert torch.equal(_sorted_rows(ours), _sorted_rows(theirs))


def test_digits_split_is_the_documented_one():
    # A change here changes the numbers of many chapters.
    d = data.digits()
    assert d.y_train[:12].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8, 6, 0]
    assert torch.bincount(torch.cat([d.y_test, d.y_valid])).tolist() == [75, 79, 72, 77, 84, 83, 84, 81, 74, 88]


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotated_digits_are_the_same_digits_turned(angle):
    upright, turned = data.digits(), data.digits(rotate=angle)
    assert torch.equal(upright.y_test, turned.y_test)
    want = np.rot90(upright.x_test[5].view(8, 8).numpy(), angle // 90)
    assert np.array_equal(turned.x_test[5].view(8, 8).numpy(), want)


def test_digits_refuse_other_angles():
    with pytest.raises(ValueError, match="rotate: got 45"):
        data.digits(rotate=45)


def test_mnist5k_is_stratified_and_mixed():
    d = data.mnist5k()
    assert d.x_train.shape == (4000, 1, 28, 28) and d.x_test.shape == (600, 1, 28, 28)
    assert torch.bincount(d.y_train).tolist() == [400] * 10
    assert torch.bincount(torch.cat([d.y_test, d.y_valid])).tolist() == [100] * 10
    assert d.x_train.min() == 0 and d.x_train.max() == 1
    assert len(set(d.y_train[:50].tolist())) >= 8  # mixed: the package sorts them by class
    # Mean ink of the whole set, summed from the package's file: nothing lost, nothing twice.
    x = torch.cat([d.x_train, d.x_valid, d.x_test]).flatten(1)
    assert int((x * 255).round().double().sum()) == 131_267_102
    assert len(x.unique(dim=0)) == 5000


def _sorted_rows(x):
    return x[np.lexsort(x.numpy().T)]


@pytest.mark.parametrize("name", data.PHOTOGRAPHS)
def test_every_photograph_loads_without_network(name, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("photograph tried the network"))
    x = data.photograph(name, size=32)
    assert x.shape == (32, 32) and x.dtype == torch.float32
    assert x.min() >= 0 and x.max() <= 1 and x.std() > 0.02


def test_photograph_shapes_and_luminance():
    assert data.photograph("coffee").shape == (400, 600)
    colour = data.photograph("coffee", gray=False)
    assert colour.shape == (3, 400, 600)
    from skimage.color import rgb2gray

    want = rgb2gray(colour.permute(1, 2, 0).double().numpy())
    assert np.abs(data.photograph("coffee").numpy() - want).max() < 1e-5
    assert data.photograph("coffee", size=20, gray=False).shape == (3, 20, 20)


def test_photograph_resize_keeps_the_mean():
    x = data.photograph("camera")
    assert data.photograph("camera", size=64).mean() == pytest.approx(float(x.mean()), abs=2e-3)


def test_photograph_refuses():
    with pytest.raises(ValueError, match="name: got 'kidney', wanted one of astronaut"):
        data.photograph("kidney")  # would need the network
    with pytest.raises(ValueError, match="size: got 0"):
        data.photograph(size=0)
    with pytest.raises(ValueError, match="no colour"):
        data.photograph("camera", gray=False)
