import numpy as np
import pytest

from lowrank_ref.lab import data


def test_multitask():
    d = data.multitask()
    assert d.x_train.shape == (1500, 103) and d.y_train.shape == (1500, 14)
    assert d.x_valid.shape == (417, 103) and d.y_valid.shape == (417, 14)
    assert d.x_test.shape == (500, 103) and d.y_test.shape == (500, 14)
    assert set(d.y_train.unique().tolist()) == {0, 1}
    functions = d.y_train.sum() + d.y_valid.sum() + d.y_test.sum()
    assert int(functions) == 10241  # 4.237 functions a gene, as published for Yeast


@pytest.mark.parametrize(
    "name, shape, outputs, tasks",
    [
        ("chicks", (561, 2), (), 47),
        ("cars", (392, 6), (), 3),
        ("flares", (1066, 9), (3,), 6),
        ("yeast", (2417, 103), (), 14),
        ("phishing", (1250, 9), (), 10),
    ],
)
def test_task_tables(name, shape, outputs, tasks):
    d = data.task_table(name)
    assert d.x.shape == shape and d.x.dtype == np.float64 and np.isfinite(d.x).all()
    assert d.y.shape == shape[:1] + outputs and np.isfinite(d.y).all()
    assert np.unique(d.task).tolist() == list(range(tasks)) and d.task.shape == shape[:1]
    assert np.bincount(d.task).min() >= 10


def test_known_numbers_of_task_tables():
    chicks, cars, flares = (data.task_table(name) for name in ("chicks", "cars", "flares"))
    assert chicks.y.min() == 39 and chicks.y.max() == 373 and chicks.x[:, 0].max() == 21  # grams, days
    assert np.bincount(cars.task).tolist() == [245, 68, 79]  # USA, Europe, Japan
    assert flares.y.sum(axis=0).tolist() == [320.0, 50.0, 6.0]
    yeast, whole = data.task_table("yeast"), data.multitask()
    assert set(np.unique(yeast.y)) == {0, 1}
    assert abs(yeast.y.mean() * 14 - 4.237) < 0.2
    assert len(yeast.y) == sum(map(len, (whole.x_train, whole.x_valid, whole.x_test)))
    with pytest.raises(ValueError, match="name: got 'schools', wanted one of chicks, cars"):
        data.task_table("schools")


def test_planted_tasks():
    train, test = data.planted_tasks(0, rows=400, test_rows=50)
    assert train.x.shape == (4000, 5) and test.x.shape == (500, 5)
    assert np.bincount(train.task).tolist() == [400] * 10
    again, _ = data.planted_tasks(0, rows=400, test_rows=50)
    assert np.array_equal(train.y, again.y)
    assert not np.array_equal(train.y, data.planted_tasks(1, rows=400)[0].y)

    # The same x under two tasks: near one another within a group, far across.
    def miss(r, s):
        nearest = np.linalg.norm(train.x[train.task == r][:, None] - train.x[train.task == s][None], axis=2)
        i, j = np.nonzero(nearest < 0.35)
        return np.square(train.y[train.task == r][i] - train.y[train.task == s][j]).mean()

    assert max(miss(0, 1), miss(3, 6), miss(8, 9)) < 0.5 * min(miss(0, 8), miss(5, 9))


def _sorted_rows(x):
    return x[np.lexsort(x.numpy().T)]
