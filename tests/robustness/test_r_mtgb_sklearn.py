"""R-MTGB as scikit-learn estimators."""

import io
import pickle
import runpy
import sys
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor
from sklearn.utils.estimator_checks import parametrize_with_checks

from lowrank_ref import robustness
from lowrank_ref.robustness import RMTGBClassifier, RMTGBRegressor
from lowrank_ref.robustness.r_mtgb import CROSS_ENTROPY, SQUARED, boost, final_scores, softmax

each_estimator = pytest.mark.parametrize("estimator", [RMTGBRegressor, RMTGBClassifier])
SMALL = {"shared_rounds": 2, "gated_rounds": 5, "task_rounds": 3, "random_state": 0}


def table(estimator=RMTGBRegressor, seed=0, n=120, tasks=4):
    """Features, targets and task names; the rule is turned around in the last task."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, (n, 3))
    task = np.arange(n) % tasks
    y = np.where(task == tasks - 1, -1, 1) * X[:, 0] + 0.3 * X[:, 1]
    if estimator is RMTGBClassifier:
        y = np.array(["low", "middle", "high"])[np.digitize(y, [-0.3, 0.3])]
    return X, y, np.array(["a", "b", "c", "d", "e"])[task]


def raw(model, X, **tasks):
    return model.predict_proba(X, **tasks) if hasattr(model, "predict_proba") else model.predict(X, **tasks)


# check_array_api_input is skipped by scikit-learn itself unless SCIPY_ARRAY_API is set; no check is expected to fail.
@parametrize_with_checks(
    [
        RMTGBRegressor(shared_rounds=5, gated_rounds=15, task_rounds=15),
        RMTGBClassifier(shared_rounds=5, gated_rounds=15, task_rounds=15),
    ]
)
def test_scikit_learns_own_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


# --- the estimators are the functions


@each_estimator
def test_the_estimator_is_boost(estimator):
    X, y, tasks = table(estimator)
    model = estimator(**SMALL).fit(X, y, tasks=tasks)
    names, task = np.unique(tasks, return_inverse=True)
    rng = np.random.RandomState(0)
    theta, seed = 0.1 * rng.normal(size=4), int(rng.randint(np.iinfo(np.int32).max))
    Y, loss = y.reshape(-1, 1), SQUARED
    if estimator is RMTGBClassifier:
        Y, loss = (y[:, None] == np.unique(y)).astype(float), CROSS_ENTROPY

    def fit(X, targets):
        return DecisionTreeRegressor(max_leaf_nodes=2, random_state=seed).fit(X, targets)

    X32 = X.astype(np.float32)
    forest = boost(X32, Y, task, theta, fit=fit, rounds=(2, 5, 3), loss=loss)
    F = final_scores(forest, X32, task, outputs=Y.shape[1])
    want = F[:, 0] if estimator is RMTGBRegressor else softmax(F)
    np.testing.assert_array_equal(raw(model, X, tasks=tasks), want)
    np.testing.assert_array_equal(model.theta_path_, forest.theta_path)
    np.testing.assert_array_equal(model.train_loss_, forest.loss_path)
    assert model.tasks_.tolist() == names.tolist()


def test_only_shared_trees_are_scikit_learns_boosting():
    X, y, tasks = table()
    model = RMTGBRegressor(shared_rounds=40, gated_rounds=0, task_rounds=0).fit(X, y, tasks=tasks)
    peer = GradientBoostingRegressor(init="zero", max_depth=1, n_estimators=40).fit(X, y)
    np.testing.assert_allclose(model.predict(X, tasks=tasks), peer.predict(X), atol=1e-10)


@each_estimator
def test_the_turned_task_is_found(estimator):
    X, y, tasks = table(estimator, n=400)
    model = estimator(task_rounds=10, random_state=1).fit(X, y, tasks=tasks)
    assert model.outlier_score_[3] > 0.8 and model.outlier_score_[:3].max() < 0.2
    assert set(np.round(np.minimum(model.gate_, 1 - model.gate_), 6)) == set(
        np.round(np.minimum(model.outlier_score_, 1 - model.outlier_score_), 6)
    )


@each_estimator
def test_tree_count(estimator):
    X, y, tasks = table(estimator)
    model = estimator(**SMALL).fit(X, y, tasks=tasks)
    assert (len(model.shared_trees_), len(model.outlier_trees_), len(model.other_trees_)) == (2, 5, 5)
    assert [len(trees) for trees in model.task_trees_] == [3] * 4
    assert all(tree.get_n_leaves() == 2 for tree in model.outlier_trees_)


@each_estimator
def test_task_functions(estimator):
    """Rank 2 without the third block, more with it; the row of a task is its prediction."""
    X, y, tasks = table(estimator)
    model = estimator(**SMALL).fit(X, y, tasks=tasks)
    outputs = 1 if estimator is RMTGBRegressor else 3
    both, whole = model.task_functions(X, specific=False), model.task_functions(X)
    assert both.shape == whole.shape == (4, len(X), outputs)
    for k in range(outputs):
        S = np.linalg.svd(both[:, :, k], compute_uv=False)
        assert S[2] < 1e-12 * S[0]
        S = np.linalg.svd(both[:, :, k] - both[:, :, k].mean(axis=0), compute_uv=False)
        assert S[1] < 1e-12 * S[0]
        assert np.linalg.matrix_rank(whole[:, :, k]) == 4
    for r, name in enumerate(model.tasks_):
        F = whole[r, tasks == name]
        want = raw(model, X[tasks == name], tasks=tasks[tasks == name])
        np.testing.assert_allclose(F[:, 0] if outputs == 1 else softmax(F), want, atol=1e-12)


@each_estimator
def test_stages_end_in_the_prediction(estimator):
    X, y, tasks = table(estimator)
    model = estimator(**SMALL).fit(X, y, tasks=tasks)
    stages = list(model.staged_predict(X, tasks=tasks))
    assert len(stages) == 10
    np.testing.assert_array_equal(stages[-1], model.predict(X, tasks=tasks))


def test_several_targets():
    X, y, tasks = table()
    Y = np.stack([y, 2 * y, X[:, 2]], axis=1)
    model = RMTGBRegressor(random_state=0).fit(X, Y, tasks=tasks)
    assert model.predict(X, tasks=tasks).shape == Y.shape
    assert model.score(X, Y, tasks=tasks) > 0.8
    one = RMTGBRegressor(random_state=0).fit(X, y[:, None], tasks=tasks)
    assert one.predict(X, tasks=tasks).shape == (len(X), 1)


def test_probabilities_and_decisions():
    X, y, tasks = table(RMTGBClassifier)
    model = RMTGBClassifier(**SMALL).fit(X, y, tasks=tasks)
    p = model.predict_proba(X, tasks=tasks)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert model.classes_[p.argmax(axis=1)].tolist() == model.predict(X, tasks=tasks).tolist()
    assert model.decision_function(X, tasks=tasks).shape == (len(X), 3)
    binary = RMTGBClassifier(**SMALL).fit(X, y == "low", tasks=tasks)
    d = binary.decision_function(X, tasks=tasks)
    np.testing.assert_allclose(1 / (1 + np.exp(-d)), binary.predict_proba(X, tasks=tasks)[:, 1])


# --- where the tasks come from


@each_estimator
@pytest.mark.parametrize("column", [-1, 0, 2])
def test_a_task_column_is_the_same_as_tasks(estimator, column):
    X, y, tasks = table(estimator)
    number = np.searchsorted(["a", "b", "c", "d"], tasks) * 7.0 + 3
    place = column if column >= 0 else X.shape[1]
    wide = np.insert(X, place, number, axis=1)
    before = wide.copy()
    one = estimator(**SMALL).fit(X, y, tasks=tasks)
    two = estimator(**SMALL, task_column=column).fit(wide, y)
    np.testing.assert_array_equal(raw(one, X, tasks=tasks), raw(two, wide))
    np.testing.assert_array_equal(wide, before)
    assert two.tasks_.tolist() == [3.0, 10.0, 17.0, 24.0] and two.n_features_in_ == 4


def test_large_task_numbers_stay_apart():
    """As float32 these two would be one task."""
    X, y, _ = table()
    ids = np.where(np.arange(len(X)) % 2, 16777216.0, 16777217.0)
    model = RMTGBRegressor(**SMALL, task_column=-1).fit(np.column_stack([X, ids]), y)
    assert len(model.tasks_) == 2


@each_estimator
def test_prediction_does_not_need_every_task(estimator):
    """The official code numbers the tasks of the test set anew, and so takes the wrong gate and trees here."""
    X, y, tasks = table(estimator)
    model = estimator(**SMALL).fit(X, y, tasks=tasks)
    whole = raw(model, X, tasks=tasks)
    for some in (tasks == "d", (tasks == "b") | (tasks == "d")):
        np.testing.assert_array_equal(raw(model, X[some], tasks=tasks[some]), whole[some])


def test_a_frame_keeps_its_names():
    X, y, tasks = table()
    frame = pd.DataFrame(X, columns=["u", "v", "w"]).assign(school=np.unique(tasks, return_inverse=True)[1])
    model = RMTGBRegressor(**SMALL, task_column=-1).fit(frame, y)
    assert model.feature_names_in_.tolist() == ["u", "v", "w", "school"]
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["v", "u", "w", "school"]])


# --- inside scikit-learn's tools


@each_estimator
def test_clone_and_parameters(estimator):
    model = estimator(gated_rounds=7, task_column=-1)
    copy = clone(model).set_params(gated_rounds=8)
    assert model.gated_rounds == 7 and copy.get_params()["gated_rounds"] == 8 and copy.task_column == -1


@each_estimator
def test_the_same_seed_is_the_same_model_and_the_global_generator_stays(estimator):
    X, y, tasks = table(estimator)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = (estimator(**SMALL).fit(X, y, tasks=tasks) for _ in range(2))
    np.testing.assert_array_equal(raw(one, X, tasks=tasks), raw(two, X, tasks=tasks))
    np.testing.assert_array_equal(one.theta_path_, two.theta_path_)
    other = estimator(**{**SMALL, "random_state": 1}).fit(X, y, tasks=tasks)
    assert not np.array_equal(one.theta_path_, other.theta_path_)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@each_estimator
def test_pipeline_and_grid_search_with_a_column(estimator):
    X, y, tasks = table(estimator)
    number = np.unique(tasks, return_inverse=True)[1]
    wide = np.column_stack([X * 100, number])
    scale = ColumnTransformer([("scale", StandardScaler(), [0, 1, 2])], remainder="passthrough")
    pipe = make_pipeline(scale, estimator(**SMALL, task_column=-1))
    folds = list(StratifiedKFold(3).split(X, number))
    assert np.isfinite(cross_val_score(pipe, wide, y, cv=folds)).all()
    name = estimator.__name__.lower()
    search = GridSearchCV(pipe, {f"{name}__learning_rate": np.array([1e-6, 0.3])}, cv=folds).fit(wide, y)
    assert search.best_params_[f"{name}__learning_rate"] == 0.3
    assert search.predict(wide).shape == y.shape


@each_estimator
def test_grid_search_with_routed_tasks(estimator):
    X, y, tasks = table(estimator)
    folds = list(StratifiedKFold(3).split(X, tasks))
    with sklearn.config_context(enable_metadata_routing=True):
        model = estimator(**SMALL).set_fit_request(tasks=True).set_score_request(tasks=True)
        model.set_predict_request(tasks=True)
        search = GridSearchCV(model, {"learning_rate": [1e-6, 0.3]}, cv=folds).fit(X, y, tasks=tasks)
        assert search.best_params_ == {"learning_rate": 0.3}
        assert search.best_estimator_.predict(X, tasks=tasks).shape == y.shape
        pipe = make_pipeline(StandardScaler(), model).fit(X, y, tasks=tasks)
        assert pipe.predict(X, tasks=tasks).shape == y.shape


def test_targets_far_from_zero_are_standardised_outside():
    X, y, tasks = table()
    wide = np.column_stack([X, np.unique(tasks, return_inverse=True)[1]])
    model = TransformedTargetRegressor(RMTGBRegressor(**SMALL, task_column=-1), transformer=StandardScaler())
    near, far = (model.fit(wide, y + shift).predict(wide) for shift in (0.0, 1e4))
    np.testing.assert_allclose(far, near + 1e4, atol=1e-6)


@each_estimator
@pytest.mark.parametrize("with_tasks", [True, False])
def test_saved_models_predict_the_same(estimator, with_tasks, tmp_path):
    skops = pytest.importorskip("skops.io")
    X, y, tasks = table(estimator)
    given = {"tasks": tasks} if with_tasks else {}
    model = estimator(**SMALL).fit(X, y, **given)
    joblib.dump(model, tmp_path / "joblib")
    data = skops.dumps(model)
    unknown = skops.get_untrusted_types(data=data)
    assert unknown == [f"lowrank_ref.robustness.r_mtgb_sklearn.{estimator.__name__}", "sklearn.tree._tree.Tree"]
    for again in (
        pickle.loads(pickle.dumps(model)),
        joblib.load(tmp_path / "joblib"),
        skops.loads(data, trusted=unknown),
    ):
        np.testing.assert_array_equal(raw(again, X, **given), raw(model, X, **given))
        np.testing.assert_array_equal(again.gate_, model.gate_)
        assert again.get_params() == model.get_params()


def test_a_truncated_or_untrusted_file_raises():
    skops = pytest.importorskip("skops.io")
    X, y, tasks = table()
    data = skops.dumps(RMTGBRegressor(**SMALL).fit(X, y, tasks=tasks))
    with pytest.raises(Exception, match="zip"):
        skops.load(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(TypeError, match="Untrusted"):
        skops.loads(data)


# --- bad input


@each_estimator
@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"gated_rounds": -1}, ValueError, "gated_rounds == -1, must be >= 0"),
        ({"task_rounds": 1.5}, TypeError, "task_rounds must be an instance of int"),
        ({"shared_rounds": 0, "gated_rounds": 0, "task_rounds": 0}, ValueError, "wanted at least one round"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate == 0.0, must be > 0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be an instance of float"),
        ({"gate_learning_rate": -1.0}, ValueError, "gate_learning_rate == -1.0, must be > 0"),
        ({"gate_l2": -0.1}, ValueError, "gate_l2 == -0.1, must be >= 0"),
        ({"max_leaf_nodes": 1}, ValueError, "max_leaf_nodes == 1, must be >= 2"),
        ({"task_column": 1.0}, TypeError, "task_column must be an instance of int"),
    ],
)
def test_bad_settings_raise(estimator, settings, error, message):
    X, y, tasks = table(estimator)
    with pytest.raises(error, match=message):
        estimator(**{**SMALL, **settings}).fit(X, y, tasks=tasks)


@each_estimator
def test_bad_tasks_raise(estimator):
    X, y, tasks = table(estimator)
    for bad, message in (
        (np.full(len(X), "a"), "The number of tasks has to be greater than one; got 1 task"),
        (tasks[:-1], "inconsistent numbers of samples"),
        (np.where(np.arange(len(X)) == 3, np.nan, 1.0), "tasks contains NaN"),
        (tasks[:, None], r"tasks should be a 1d array, got an array of shape \(120, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator(**SMALL).fit(X, y, tasks=bad)
    with pytest.raises(ValueError, match="task_column=9 is not a column of X beside others; X has 3 features"):
        estimator(**SMALL, task_column=9).fit(X, y)
    with pytest.raises(ValueError, match="task_column=0 is not a column of X beside others; X has 1 features"):
        estimator(**SMALL, task_column=0).fit(X[:, :1], y)
    with pytest.raises(ValueError, match="tasks was given although task_column is set"):
        estimator(**SMALL, task_column=0).fit(X, y, tasks=tasks)
    with pytest.raises(ValueError, match="The number of tasks has to be greater than one"):
        estimator(**SMALL, task_column=0).fit(np.column_stack([np.ones(len(X)), X]), y)


@each_estimator
@pytest.mark.parametrize(
    "missing, message",
    [
        (None, "tasks contains None in 1 of 120 rows"),
        (float("nan"), "contains NaN"),
        (3, "all names or all"),
    ],
)
def test_a_row_without_a_task_is_named(estimator, missing, message):
    X, y, tasks = table(estimator)
    model = estimator(**SMALL).fit(X, y, tasks=tasks)
    bad = tasks.astype(object)
    bad[7] = missing
    for call in (lambda: estimator(**SMALL).fit(X, y, tasks=bad), lambda: model.predict(X, tasks=bad)):
        with pytest.raises(ValueError, match=message):
            call()
    good = tasks.astype(object)
    np.testing.assert_array_equal(raw(model, X, tasks=good), raw(model, X, tasks=tasks))


@each_estimator
def test_what_is_set_after_the_fit_does_not_change_its_predictions(estimator):
    X, y, tasks = table(estimator)
    model = estimator(**SMALL).fit(X, y, tasks=tasks)
    wanted, stages = raw(model, X, tasks=tasks), list(model.staged_predict(X, tasks=tasks))
    functions = model.task_functions(X)
    model.set_params(learning_rate=0.9, task_column=0, shared_rounds=9, random_state=5)
    np.testing.assert_array_equal(raw(model, X, tasks=tasks), wanted)
    np.testing.assert_array_equal(model.task_functions(X), functions)
    for got, stage in zip(model.staged_predict(X, tasks=tasks), stages):
        np.testing.assert_array_equal(got, stage)


def test_without_scikit_learn_the_package_names_no_estimator(monkeypatch):
    """`import *` asks for every name, and each of these would raise."""
    names = runpy.run_path(robustness.__file__)
    assert "RMTGBRegressor" in names["__all__"]
    monkeypatch.setitem(sys.modules, "sklearn", None)
    names = runpy.run_path(robustness.__file__)
    assert all(name in names for name in names["__all__"]) and "RMTGBRegressor" not in names["__all__"]


@each_estimator
def test_tasks_at_prediction_are_those_of_fit(estimator):
    X, y, tasks = table(estimator)
    model, plain = estimator(**SMALL).fit(X, y, tasks=tasks), estimator(**SMALL).fit(X, y)
    with pytest.raises(ValueError, match=r"previously unseen tasks: \['e', 'z'\]. Tasks of the training data: \['a',"):
        model.predict(X[:3], tasks=np.array(["z", "a", "e"]))
    with pytest.raises(ValueError, match="was fitted with tasks; prediction has to be the same"):
        model.predict(X)
    with pytest.raises(ValueError, match="was fitted without tasks; prediction has to be the same"):
        plain.predict(X, tasks=tasks)


@each_estimator
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_bad_numbers_raise(estimator, value):
    X, y, tasks = table(estimator)
    bad = X.copy()
    bad[2, 1] = value
    model = estimator(**SMALL).fit(X, y, tasks=tasks)
    for call in (lambda: estimator(**SMALL).fit(bad, y, tasks=tasks), lambda: model.predict(bad, tasks=tasks)):
        with pytest.raises(ValueError, match="Input X contains (NaN|infinity or a value too large)"):
            call()


@each_estimator
def test_a_target_with_nan_or_of_one_class_raises(estimator):
    X, y, tasks = table()
    y = y.copy()
    y[0] = np.nan
    with pytest.raises(ValueError, match="Input y contains NaN"):
        estimator(**SMALL).fit(X, y, tasks=tasks)
    if estimator is RMTGBClassifier:
        with pytest.raises(ValueError, match="The number of classes has to be greater than one; got 1 class"):
            estimator(**SMALL).fit(X, np.ones(len(X), int), tasks=tasks)


@each_estimator
def test_not_fitted(estimator):
    X, _, tasks = table()
    model = estimator()
    for call in (
        lambda: model.predict(X, tasks=tasks),
        lambda: model.task_functions(X),
        lambda: model.outlier_score_,
        lambda: model.gate_,
    ):
        with pytest.raises(NotFittedError):
            call()
