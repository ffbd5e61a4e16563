"""R-MTGB as scikit-learn estimators: `RMTGBRegressor` (one or several targets) and `RMTGBClassifier`.

Which task a row belongs to is said in one of two ways, the same in `fit` and `predict`:

- `task_column=-1` (as in the official code): that column of X holds the task number. Works everywhere a plain matrix
  works: `Pipeline`, `GridSearchCV`, `cross_val_score`. A scaler on the way renames the tasks (-0.37 for 3): predictions
  are the same, `tasks_` cannot be read. `ColumnTransformer(..., remainder="passthrough")` keeps it, as the last column.
- `tasks=...`, one name or number per row, beside X. In meta-estimators it travels by metadata routing:
  `sklearn.set_config(enable_metadata_routing=True)` and `.set_fit_request(tasks=True)`, likewise for predict and score.

Not supported: `sample_weight` in fit, and a `task_column` given by name or holding text (names go through `tasks=...`).
`GridSearchCV.predict` takes X alone: call `search.best_estimator_.predict(X, tasks=...)`, or use a column.

With neither, all rows are one task, and the model is plain boosting with two trees a round in the gated block. This is
what `check_estimator` sees; both estimators pass it, and no check is listed as expected to fail.

Every task must be in every training fold. `StratifiedKFold().split(X, tasks)` makes such folds; pass them as
`GridSearchCV(cv=list(...))`. F starts at 0: standardise targets that are far from it, for example with
`TransformedTargetRegressor`.

Save a fitted model with `joblib.dump`, or with `skops.io.dump`, whose files hold no code: `skops.io.load` asks to trust
`lowrank_ref.robustness.r_mtgb_sklearn.RMTGBRegressor` (or `RMTGBClassifier`) and `sklearn.tree._tree.Tree`.

scikit-learn >= 1.6 is needed by this module alone; importing it without raises an ImportError with the line to install.
"""

from collections.abc import Iterator
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np

from lowrank_ref.core.checks import check_number
from lowrank_ref.robustness.r_mtgb import (
    CROSS_ENTROPY,
    SQUARED,
    Forest,
    Loss,
    boost,
    final_scores,
    gate,
    outlier_score,
    softmax,
    staged_scores,
)

try:
    from sklearn import config_context
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.tree import DecisionTreeRegressor
    from sklearn.utils import check_array, check_consistent_length, check_random_state, check_scalar
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError('R-MTGB\'s estimators need scikit-learn: pip install "scikit-learn>=1.6"') from error

__all__ = ["RMTGBClassifier", "RMTGBRegressor"]


# What goes into the trees was checked once; to check it anew for each would take a third of the time.
_FAST = partial(config_context, skip_parameter_validation=True, assume_finite=True)


def _check_names(tasks: np.ndarray) -> None:
    """Require names or numbers that can be sorted: a None among them would name no task."""
    if tasks.dtype != object:
        return
    if missing := sum(task is None for task in tasks):
        raise ValueError(f"tasks contains None in {missing} of {len(tasks)} rows; each row needs a task")
    try:
        np.unique(tasks)
    except TypeError as error:
        raise ValueError(f"tasks should be all names or all numbers, one in each row: {error}") from error


class _RMTGB(BaseEstimator):
    """What both estimators share: settings, tasks, fitting, scores."""

    _loss: Loss

    def __init__(  # Any: scikit-learn's rule is that settings are stored as they come and checked in fit
        self,
        *,
        shared_rounds: Any = 0,
        gated_rounds: Any = 100,
        task_rounds: Any = 50,
        learning_rate: Any = 0.1,
        gate_learning_rate: Any = None,
        gate_mean: Any = False,
        gate_l2: Any = 0.0,
        max_leaf_nodes: Any = 2,
        task_column: Any = None,
        random_state: Any = None,
    ) -> None:
        self.shared_rounds = shared_rounds
        self.gated_rounds = gated_rounds
        self.task_rounds = task_rounds
        self.learning_rate = learning_rate
        self.gate_learning_rate = gate_learning_rate
        self.gate_mean = gate_mean
        self.gate_l2 = gate_l2
        self.max_leaf_nodes = max_leaf_nodes
        self.task_column = task_column
        self.random_state = random_state

    def _check_settings(self) -> None:
        for name in ("shared_rounds", "gated_rounds", "task_rounds"):
            check_scalar(getattr(self, name), name, Integral, min_val=0)
        for name in ("learning_rate", "gate_learning_rate"):
            if (rate := getattr(self, name)) is not None or name == "learning_rate":
                check_scalar(rate, name, Real, min_val=0, include_boundaries="neither")
                check_number(name, float(rate), low=0, open_low=True)  # NaN and infinity pass the line above
        check_scalar(self.gate_l2, "gate_l2", Real, min_val=0)
        check_scalar(self.max_leaf_nodes, "max_leaf_nodes", Integral, min_val=2)
        if self.task_column is not None:
            check_scalar(self.task_column, "task_column", Integral)

    def _split(self, X: np.ndarray, tasks: Any, column: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the features as float32, as scikit-learn's trees want them, and the tasks, from wherever they come."""
        if column is not None:
            if tasks is not None:
                raise ValueError("tasks was given although task_column is set; only one of them may name the tasks")
            if not -X.shape[1] <= column < X.shape[1] or X.shape[1] < 2:
                raise ValueError(
                    f"task_column={column} is not a column of X beside others; X has {X.shape[1]} features"
                )
            tasks = X[:, column]  # still float64: float32 would mix up large numbers
            X = np.delete(X, column, axis=1)
        elif tasks is not None:
            tasks = check_array(tasks, ensure_2d=False, dtype=None, input_name="tasks")
            if tasks.ndim != 1:
                raise ValueError(f"tasks should be a 1d array, got an array of shape {tasks.shape} instead.")
            check_consistent_length(X, tasks)
            _check_names(tasks)
        return check_array(X, dtype=np.float32, order="C", input_name="X"), tasks

    def _fit(self, X: np.ndarray, Y: np.ndarray, tasks: Any) -> None:
        X, tasks = self._split(X, tasks, self.task_column)
        self.tasks_: Any = None
        task = np.zeros(len(X), dtype=np.intp)
        if tasks is not None:
            self.tasks_, task = np.unique(tasks, return_inverse=True)
            if len(self.tasks_) < 2:
                raise ValueError(
                    "The number of tasks has to be greater than one; got 1 task. Without tasks all rows are one."
                )
        rng = check_random_state(self.random_state)
        theta = 0.1 * rng.normal(size=1 if self.tasks_ is None else len(self.tasks_))
        # One seed for all trees: ties between features are then broken alike in both trees of a round.
        seed = int(rng.randint(np.iinfo(np.int32).max))

        def fit(X: np.ndarray, targets: np.ndarray) -> DecisionTreeRegressor:
            tree = DecisionTreeRegressor(max_leaf_nodes=self.max_leaf_nodes, random_state=seed)
            return tree.fit(X, targets, check_input=False)

        with _FAST():
            forest = boost(
                X,
                Y,
                task,
                theta,
                fit=fit,
                rounds=(int(self.shared_rounds), int(self.gated_rounds), int(self.task_rounds)),
                loss=self._loss,
                lr=float(self.learning_rate),
                gate_lr=None if self.gate_learning_rate is None else float(self.gate_learning_rate),
                gate_mean=bool(self.gate_mean),
                gate_l2=float(self.gate_l2),
            )
        self.shared_trees_, self.task_trees_ = forest.shared, forest.specific
        self.outlier_trees_, self.other_trees_ = forest.outlier, forest.other
        self.theta_path_, self.train_loss_ = np.stack(forest.theta_path), np.array(forest.loss_path)
        self.n_outputs_ = Y.shape[1]
        self.learning_rate_, self.task_column_ = float(self.learning_rate), self.task_column  # for predictions

    @property
    def gate_(self) -> np.ndarray:
        """σ(θ) of every task, in the order of `tasks_`, in [0, 1]."""
        check_is_fitted(self)
        return gate(self.theta_path_[-1])

    @property
    def outlier_score_(self) -> np.ndarray:
        """Every task's weight on the function that fewer tasks lean to, in the order of `tasks_`, in [0, 1]."""
        check_is_fitted(self)
        return outlier_score(self.theta_path_[-1])

    def _rows(self, X: Any, tasks: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the features and the task numbers of rows to predict."""
        check_is_fitted(self)
        X, tasks = self._split(validate_data(self, X, dtype=np.float64, reset=False), tasks, self.task_column_)
        if (tasks is None) != (self.tasks_ is None):
            had = "without" if self.tasks_ is None else "with"
            raise ValueError(f"This {type(self).__name__} was fitted {had} tasks; prediction has to be the same.")
        if tasks is None:
            return X, np.zeros(len(X), dtype=np.intp)
        unseen = ~np.isin(tasks, self.tasks_)
        if unseen.any():
            raise ValueError(
                f"tasks contains previously unseen tasks: {np.unique(tasks[unseen]).tolist()}. "
                f"Tasks of the training data: {self.tasks_.tolist()}"
            )
        return X, np.asarray(np.searchsorted(self.tasks_, tasks))

    def _forest(self) -> Forest:
        return Forest(
            self.shared_trees_, self.outlier_trees_, self.other_trees_, self.task_trees_, list(self.theta_path_)
        )

    def _scores(self, X: Any, tasks: Any) -> np.ndarray:
        X, task = self._rows(X, tasks)
        with _FAST():
            return final_scores(self._forest(), X, task, outputs=self.n_outputs_, lr=self.learning_rate_)

    def _staged_scores(self, X: Any, tasks: Any) -> Iterator[np.ndarray]:
        X, task = self._rows(X, tasks)
        return staged_scores(self._forest(), X, task, outputs=self.n_outputs_, lr=self.learning_rate_)

    def task_functions(self, X: Any, *, specific: bool = True) -> np.ndarray:
        """Return the score of every task's function on every row, shape (T, n, K).

        Args:
            X: rows of features, without a task column.
            specific: with the trees of the third block. Without them every (T, n) table has rank 2 at most.
        """
        check_is_fitted(self)
        X, forest = check_array(X, dtype=np.float32, order="C"), self._forest()
        if not specific:
            forest.specific = [[] for _ in forest.specific]
        number, lr = range(len(forest.specific)), self.learning_rate_
        return np.stack([final_scores(forest, X, np.full(len(X), r), outputs=self.n_outputs_, lr=lr) for r in number])


class RMTGBRegressor(RegressorMixin, _RMTGB):
    """Boosting for regression on many tasks, with one target or several.

    Args:
        shared_rounds: M₁ >= 0, trees for all tasks.
        gated_rounds: M₂ >= 0, pairs of trees mixed by the gates.
        task_rounds: M₃ >= 0, trees of each task alone.
        learning_rate: ν > 0.
        gate_learning_rate: step size of θ, > 0; None is ν.
        gate_mean: step with the mean over a task's rows, not the sum.
        gate_l2: λ >= 0 of a penalty ½λθ² on the gates.
        max_leaf_nodes: leaves of a tree, >= 2; 2 is a stump, as in the official code.
        task_column: column of X that holds the task number, or None; see the top of this module.
        random_state: source of θ₀ ~ 0.1·N(0, 1) and of the order in which trees try features.

    Attributes:
        tasks_: the tasks of the training data, sorted, or None.
        gate_: σ(θ) per task.
        outlier_score_: weight on the function that fewer tasks lean to, per task.
        theta_path_: θ before and after every gated round, (M₂+1, T).
        train_loss_: loss after every round, summed over rows.
        shared_trees_, outlier_trees_, other_trees_: lists of trees.
        task_trees_: one list of trees per task.
        learning_rate_, task_column_: the settings of the fit, by which it predicts, whatever is set since.
        n_features_in_: columns of X, the task column among them.

    Example:
        >>> import numpy as np
        >>> from lowrank_ref.robustness import RMTGBRegressor
        >>> rng = np.random.default_rng(0)
        >>> X, tasks = rng.uniform(-1, 1, (200, 2)), np.repeat(["a", "b", "c", "d"], 50)
        >>> y = np.where(tasks == "d", -X[:, 0], X[:, 0])
        >>> model = RMTGBRegressor(random_state=0).fit(X, y, tasks=tasks)
        >>> (model.outlier_score_ > 0.5).tolist()
        [False, False, False, True]
    """

    _loss = SQUARED

    def fit(self, X: Any, y: Any, *, tasks: Any = None) -> "RMTGBRegressor":
        """Fit to X (n, p) and y (n,) or (n, K), finite; tasks (n,) names or numbers, or None.

        Raises:
            ValueError: input that is not finite or of other lengths, a setting out of range, a single task.
        """
        self._check_settings()
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        self._flat = y.ndim == 1
        self._fit(X, np.asarray(y, dtype=np.float64).reshape(len(y), -1), tasks)
        return self

    def predict(self, X: Any, *, tasks: Any = None) -> np.ndarray:
        """Return predictions, (n,) or (n, K) as y was.

        Raises:
            ValueError: a task that was not in the training data.
        """
        F = self._scores(X, tasks)
        return F[:, 0] if self._flat else F

    def staged_predict(self, X: Any, *, tasks: Any = None) -> Iterator[np.ndarray]:
        """Yield the predictions after every round, M₁ + M₂ + M₃ times."""
        stages = self._staged_scores(X, tasks)
        return (F[:, 0] if self._flat else F for F in stages)

    def score(self, X: Any, y: Any, *, tasks: Any = None, sample_weight: Any = None) -> float:
        """Return R² of the predictions."""
        return r2_score(y, self.predict(X, tasks=tasks), sample_weight=sample_weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class RMTGBClassifier(ClassifierMixin, _RMTGB):
    """Boosting for classification, two classes or more, on many tasks.

    Settings and attributes are those of `RMTGBRegressor`, and `classes_`, the class labels, sorted.

    Example:
        >>> import numpy as np
        >>> from lowrank_ref.robustness import RMTGBClassifier
        >>> rng = np.random.default_rng(0)
        >>> X, tasks = rng.uniform(-1, 1, (200, 2)), np.repeat(["a", "b", "c", "d"], 50)
        >>> y = np.where(X[:, 0] > 0, "yes", "no")
        >>> model = RMTGBClassifier(random_state=0).fit(X, y, tasks=tasks)
        >>> model.predict([[0.9, 0.0]], tasks=["a"]).tolist()
        ['yes']
    """

    _loss = CROSS_ENTROPY

    def fit(self, X: Any, y: Any, *, tasks: Any = None) -> "RMTGBClassifier":
        """Fit to X (n, p) and labels y (n,) of two classes or more; tasks (n,) names or numbers, or None.

        Raises:
            ValueError: input that is not finite or of other lengths, a setting out of range, a single task or class.
        """
        self._check_settings()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, code = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("The number of classes has to be greater than one; got 1 class")
        self._fit(X, np.eye(len(self.classes_))[code], tasks)
        return self

    def decision_function(self, X: Any, *, tasks: Any = None) -> np.ndarray:
        """Return raw scores (n, K); for two classes the difference of the second's and the first's, (n,)."""
        F = self._scores(X, tasks)
        return F[:, 1] - F[:, 0] if len(self.classes_) == 2 else F

    def predict_proba(self, X: Any, *, tasks: Any = None) -> np.ndarray:
        """Return class probabilities (n, K), in the order of `classes_`."""
        return softmax(self._scores(X, tasks))

    def predict(self, X: Any, *, tasks: Any = None) -> np.ndarray:
        """Return the most probable class of every row.

        Raises:
            ValueError: a task that was not in the training data.
        """
        best = self._scores(X, tasks).argmax(axis=1)
        return self.classes_[best]

    def staged_predict(self, X: Any, *, tasks: Any = None) -> Iterator[np.ndarray]:
        """Yield the predictions after every round, M₁ + M₂ + M₃ times."""
        stages = self._staged_scores(X, tasks)
        return (self.classes_[F.argmax(axis=1)] for F in stages)

    def score(self, X: Any, y: Any, *, tasks: Any = None, sample_weight: Any = None) -> float:
        """Return the share of rows that are right."""
        return accuracy_score(y, self.predict(X, tasks=tasks), sample_weight=sample_weight)
