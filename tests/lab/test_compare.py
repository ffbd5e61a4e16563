import json
import math
import textwrap

import pytest

from lowrank_ref.lab.compare import Comparison, compare


def run(method, lr, seed):
    """A valley with its bottom at lr = 0.1 (a) or 1 (b), lifted by the seed; c explodes above 0.5."""
    if method == "c" and lr > 0.5:
        raise FloatingPointError("loss: got inf at step 3")
    bottom = {"a": 0.1, "b": 1.0, "c": 0.1}[method]
    return {"loss": abs(math.log10(lr / bottom)) + 0.01 * seed, "accuracy": 0.9, "params": 1234}


LRS = (0.01, 0.1, 1.0)


def small(**changes):
    options = dict(lrs=LRS, seeds=(0, 1, 2), workers=1, progress=False)
    return compare(run, ["a", "b", "c"], **{**options, **changes})


def test_all_combinations_in_order():
    rows = small().rows
    assert [(r["method"], r["lr"], r["seed"]) for r in rows[:4]] == [
        ("a", 0.01, 0), ("a", 0.01, 1), ("a", 0.01, 2), ("a", 0.1, 0),
    ]  # fmt: skip
    assert len(rows) == 27
    assert rows[3]["loss"] == 0 and rows[3]["params"] == 1234


def test_best_takes_the_lowest_mean_and_reports_edges():
    best = small().best()
    assert (best["a"].lr, best["a"].edge, best["a"].seeds) == (0.1, "", 3)
    assert best["a"].mean == pytest.approx(0.01) and best["a"].sd == pytest.approx(0.01)
    assert (best["b"].lr, best["b"].edge) == (1.0, "highest")
    one_rate = small(lrs={"a": [0.1], "b": [1.0, 10.0], "c": [0.1]}).best()
    assert one_rate["a"].edge == "" and one_rate["b"].edge == "lowest"


def test_maximize_turns_everything_round():
    best = small(metric="loss", maximize=True).best()
    assert best["a"].lr == 0.01  # a tie of 0.01 and 1.0: the earlier one
    assert best["c"].lr == 0.01  # a diverged run never wins


def test_diverged_runs_are_kept_and_lose():
    comparison = small()
    diverged = [r for r in comparison.rows if "error" in r]
    assert [(r["method"], r["lr"]) for r in diverged] == [("c", 1.0)] * 3
    assert diverged[0]["error"] == "FloatingPointError: loss: got inf at step 3"
    assert comparison.values("c", 1.0) == [math.inf] * 3
    assert comparison.sweep("c")[1.0][0] == math.inf
    assert repr(comparison) == "Comparison of a, b, c: 27 runs, 3 diverged"


def test_one_diverged_seed_spoils_the_rate():
    rows = [{"method": "m", "lr": lr, "seed": s, "loss": lr} for lr in (0.1, 0.2) for s in (0, 1)]
    rows[0] = {"method": "m", "lr": 0.1, "seed": 0, "error": "FloatingPointError: x"}
    assert Comparison(rows, {"m": (0.1, 0.2)}, "loss").best()["m"].lr == 0.2


def test_a_loss_of_nan_counts_as_diverged():
    c = compare(lambda m, lr, s: {"loss": math.nan if lr > 1 else lr}, ["m"], lrs=(1, 2), seeds=[0], workers=1)
    assert c.values("m", 2.0) == [math.inf] and c.best()["m"].lr == 1.0


def test_a_method_without_any_finite_run_is_an_error_that_says_why():
    def broken(method, lr, seed):
        raise ValueError("rank: got 9")

    with pytest.raises(ValueError, match="no finite run of 'm': ValueError: rank: got 9"):
        compare(broken, ["m"], lrs=[0.1], seeds=[0, 1], workers=1, progress=False)


def test_programming_errors_are_not_hidden():
    def broken(method, lr, seed):
        raise AttributeError("typo")

    with pytest.raises(AttributeError, match="typo"):
        compare(broken, ["m"], lrs=[0.1], seeds=[0, 1], workers=1, progress=False)


def test_table_rounds_as_told_and_is_the_same_every_time():
    table = small().table({"loss": 2, "accuracy": 1, "params": 0})
    assert str(table) == (
        "method         loss  accuracy  params   best lr\n"
        "------  -----------  --------  ------  --------\n"
        "a       0.01 ± 0.01       0.9   1,234       0.1\n"
        "b       0.01 ± 0.01       0.9   1,234  1 (edge)\n"
        "c       0.01 ± 0.01       0.9   1,234       0.1"
    )
    assert small().table()._repr_html_() == small().table()._repr_html_()
    assert 'class="lr-table"' in table._repr_html_()


def test_at_best_gives_the_seeds():
    assert small().at_best("loss")["b"] == pytest.approx([0, 0.01, 0.02])


# --- the store --------------------------------------------------------------------------------------------------------


def counting(calls):
    def counted(method, lr, seed):
        calls.append((method, lr, seed))
        return run(method, lr, seed)

    return counted


def test_store_resumes_where_it_stopped(tmp_path):
    store = tmp_path / "folder" / "runs.jsonl"
    calls: list = []

    def stops(method, lr, seed):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return counting(calls)(method, lr, seed)

    options = dict(lrs=LRS, seeds=[0, 1], workers=1, store=store, progress=False)
    with pytest.raises(KeyboardInterrupt):
        compare(stops, ["a", "c"], **options)
    assert len(store.read_text().splitlines()) == 5
    with open(store, "a") as file:
        file.write('{"version": "1", "key": ["a", 0.')  # torn by a kill
    calls.clear()
    resumed = compare(counting(calls), ["a", "c"], **options)
    assert len(calls) == 12 - 5
    calls.clear()
    again = compare(counting(calls), ["a", "c"], **options)
    assert calls == []
    fresh = compare(run, ["a", "c"], lrs=LRS, seeds=[0, 1], workers=1, progress=False)
    assert resumed.rows == again.rows == fresh.rows


def test_store_asks_for_the_version(tmp_path):
    calls: list = []
    options = dict(lrs=[0.1], seeds=[0], workers=1, store=tmp_path / "runs.jsonl", progress=False)
    for version in ("1", "2", "1"):
        compare(counting(calls), ["a"], version=version, **options)
    assert len(calls) == 2


def test_damaged_store_is_an_error(tmp_path):
    store = tmp_path / "runs.jsonl"
    store.write_text('{"version": "1"}\n')
    with pytest.raises(ValueError, match="line 1 of"):
        compare(run, ["a"], lrs=[0.1], seeds=[0], store=store, workers=1, progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(seeds=[]), "methods, lrs, seeds"),
        (dict(lrs={"a": [1.0]}), "methods, lrs, seeds"),
        (dict(workers=0), "workers: got 0"),
        (dict(metric="lost"), "metric: got 'lost'"),
    ],
)
def test_compare_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_processes_give_the_same_rows_even_for_functions_of_a_notebook(tmp_path):
    # A function of __main__ cannot be pickled by name; run the comparison in a script of its own.
    import subprocess
    import sys

    script = tmp_path / "notebook.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, torch
            from lowrank_ref.lab.compare import compare

            scale = 3.0
            here = os.getpid()

            def run(method, lr, seed):
                g = torch.Generator().manual_seed(seed)
                value = torch.randn(100, 100, generator=g).svd().S[0].item() * scale * lr
                return {"loss": value, "threads": torch.get_num_threads(), "outside": os.getpid() != here}

            def rows(workers):
                return compare(run, ["m"], lrs=[0.1, 0.2], seeds=[0, 1], workers=workers, progress=False).rows

            torch.set_num_threads(1)
            alone, together = rows(1), rows(2)
            print(json.dumps([alone, together]))
            """
        )
    )
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert out.stderr == ""  # anything there would fail a notebook's check
    alone, together = json.loads(out.stdout)
    assert [r["loss"] for r in alone] == [r["loss"] for r in together]
    assert all(r["outside"] == 1 and r["threads"] == 1 for r in together)
