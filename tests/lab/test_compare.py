import json
import math
import textwrap

import pytest

from lowrank_ref.lab.compare import Arm, Comparison, compare


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
    result = small()
    result.best().clear()  # chosen once, but nobody can spoil it
    assert result.best() == best
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
        "method         loss  accuracy  params  seeds   best lr\n"
        "------  -----------  --------  ------  -----  --------\n"
        "a       0.01 ± 0.01       0.9   1,234      3       0.1\n"
        "b       0.01 ± 0.01       0.9   1,234      3  1 (edge)\n"
        "c       0.01 ± 0.01       0.9   1,234      3       0.1"
    )
    assert small().table()._repr_html_() == small().table()._repr_html_()
    assert 'class="lr-table"' in table._repr_html_()


def test_a_number_that_an_arm_did_not_record_is_no_divergence():
    rows = [{"method": m, "lr": 0.1, "seed": s, "loss": 1.0 + s} for m in ("a", "b") for s in (0, 1)]
    rows[0]["accuracy"] = rows[1]["accuracy"] = 0.9
    rows.append({"method": "c", "lr": 0.1, "seed": 0, "error": "diverged"})
    rows.append({"method": "c", "lr": 0.2, "seed": 0, "loss": 3.0})
    found = Comparison.stored(rows, {m: Arm(m, 1) for m in "abc"}, metric="loss")
    assert [line.split()[4:5] for line in str(found.table({"loss": 1, "accuracy": 1})).split("\n")[2:4]] == [
        ["0.9"],
        ["-"],
    ]
    assert found.values("b", 0.1, "accuracy") == [] and found.values("c", 0.1, "accuracy") == [math.inf]
    with pytest.raises(ValueError, match="seeds: got 0 that both"):
        found.paired("a", "b", "accuracy")


def test_at_best_gives_the_seeds():
    assert small().at_best("loss")["b"] == pytest.approx([0, 0.01, 0.02])


# --- arms, and what may be said of two of them ------------------------------------------------------------------------

#: Seed by seed, b - a is 0.10, 0.12, 0.08; c is a again, with one more thing about it.
LOSSES = {"a": (0.30, 0.33, 0.27), "b": (0.40, 0.45, 0.35), "c": (0.30, 0.33, 0.27)}
ARMS = {
    "a": Arm("A and B", steps=200, facts={"norm": "no"}),
    "b": Arm("all", steps=200, facts={"norm": "no"}, numbers=5000),
    "c": Arm("A and B", steps=200, facts={"norm": "yes", "start": "zero"}),
}


def valley(method, lr, seed):
    """Best at 0.1 in validation; the test loss is LOSSES there."""
    away = abs(math.log10(lr / 0.1))
    return {
        "valid": 1 + away + 0.01 * seed,
        "loss": LOSSES[method][seed] + away,
        "trainable": 100.0,
        "state bytes": 800,
    }


def declared(arms=ARMS, lrs=LRS, seeds=(0, 1, 2)):
    return compare(valley, arms, lrs=lrs, seeds=seeds, metric="valid", workers=1, progress=False)


def test_paired_differences_and_their_interval():
    from scipy import stats

    paired = declared().paired("a", "b", "loss")
    assert paired.differences == pytest.approx((-0.10, -0.12, -0.08)) and paired.seeds == (0, 1, 2)
    half = stats.t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    assert (paired.mean, paired.low, paired.high) == pytest.approx((-0.10, -0.10 - half, -0.10 + half))
    assert str(paired) == "loss, a - b: -0.1 (95 %: -0.15 to -0.0503, 3 seeds: -0.1, -0.12, -0.08)"


def test_differences_that_are_all_the_same_have_an_interval_of_no_width():
    assert declared().paired("a", "c", "loss").low == declared().paired("a", "c", "loss").high == 0.0


def test_the_rate_is_chosen_by_validation_and_the_test_loss_is_reported():
    rows = [
        {"method": m, "lr": lr, "seed": s, "valid": v, "loss": v}
        for m in "ab" for lr, v in ((0.1, 1.0), (0.2, 2.0)) for s in (0, 1)
    ]  # fmt: skip
    rows[0]["loss"] = rows[1]["loss"] = 9.0  # the test loss would have chosen otherwise
    result = Comparison.stored(rows, {"a": Arm("x", steps=1), "b": Arm("y", steps=1)}, metric="valid")
    assert result.best()["a"].lr == 0.1 and result.at_best("loss")["a"] == [9.0, 9.0] and result.mean("a", "loss") == 9


def test_the_seeds_that_all_rates_have_choose_the_rate():
    # Two more seeds at the best rate must not make it lose to a rate that only the lucky seed ran.
    rows = [{"method": "m", "lr": lr, "seed": 0, "loss": loss} for lr, loss in ((1.0, 1.0), (2.0, 1.1), (3.0, 1.2))]
    rows += [{"method": "m", "lr": 1.0, "seed": seed, "loss": 1.5} for seed in (1, 2)]
    best = Comparison.stored(rows, {"m": Arm("x", steps=1)}, metric="loss").best()["m"]
    assert best.lr == 1.0 and best.seeds == 3


def test_a_stored_row_cannot_be_left_out():
    rows = [{"method": m, "lr": 1.0, "seed": 0, "loss": 1.0} for m in "ab"]
    with pytest.raises(ValueError, match=r"arms: got \['a'\], wanted the methods of the rows: \['a', 'b'\]"):
        Comparison.stored(rows, {"a": Arm("x", steps=1)}, metric="loss")


def test_two_arms_are_told_apart_in_all_that_is_known():
    differing = declared().differing("a", "b")
    assert differing == {"trains": ("A and B", "all"), "trained numbers": ("100", "5,000")}
    assert declared().differing("a", "c") == {"norm": ("no", "yes"), "start": ("-", "zero")}
    table = str(declared().differences("a", "c"))
    assert "a and c differ in" in table and "norm" in table and "yes" in table
    assert declared().facts("a")["rates tried"] == "3, 0.01 to 1" and declared().facts("a")["bytes of state"] == "800"


def test_a_fair_comparison_leaves_no_doubt():
    assert declared().doubts("a", "b", "loss", cause=["trains"]) == []


@pytest.mark.parametrize(
    "a, b, changes, cause, doubt",
    [
        ("a", "b", {}, [], "the arms also differ in trains"),
        ("b", "c", {}, ["trains"], "the arms also differ in norm, start"),
        ("a", "b", dict(seeds=(0, 1)), ["trains"], "2 seeds"),
        ("a", "b", dict(lrs={"a": LRS, "b": (0.1, 1.0), "c": LRS}), ["trains"], "3 rates for a, 2 for b"),
        ("a", "b", dict(lrs=(0.1, 1.0)), ["trains"], "the best rate of a is the lowest tried"),
        ("a", "b", dict(lrs=(0.01, 0.1)), ["trains"], "the best rate of b is the highest tried"),
        ("a", "b", dict(arms=["a", "b"]), [], "a, b not declared as an arm"),
        (
            "a",
            "b",
            dict(arms={**ARMS, "b": Arm("all", steps=400, facts={"norm": "no"})}),
            ["trains"],
            "differ in steps",
        ),
    ],
)
def test_doubts(a, b, changes, cause, doubt):
    assert any(doubt in found for found in declared(**changes).doubts(a, b, "loss", cause=cause))


def test_an_edge_where_the_sweep_is_flat_is_no_doubt():
    def flat(method, lr, seed):
        return {"loss": LOSSES[method][seed] + (0.001 if lr > 0.1 else 0.0)}

    result = compare(flat, ARMS, lrs=(0.1, 1.0), seeds=(0, 1, 2), workers=1, progress=False)
    assert result.best()["a"].edge == "lowest" and result.doubts("a", "b", cause=["trains"]) == []


def test_a_cause_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"cause: got \['norm'\], wanted some in which the arms differ: .'trains'"):
        declared().doubts("a", "b", "loss", cause=["norm"])
    with pytest.raises(ValueError, match="arms: got 'z', wanted one of a, b, c"):
        declared().paired("a", "z", "loss")


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(trains=" ", steps=1), "trains: got ' '"),
        (dict(trains="x", steps=-1), "steps: got -1"),
        (dict(trains="x", steps=True), "steps: got True"),
        (dict(trains="x", steps=1, facts={"seeds": 3}), r"facts: got \['seeds'\]"),
    ],
)
def test_arms_refuse(words, message):
    with pytest.raises(ValueError, match=message):
        Arm(**words)


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


@pytest.mark.parametrize(
    "text",
    [
        b'{"version": "1"}\n',
        b"notes of mine",  # one line without an end
        b'{\n "a": 1\n}',  # a JSON file with indents, the last line without an end
        b'{"version": "1", "key": ["a", 0.1, 0], "row": {"loss": 1}}\nmy notes',
        b"\xff\xfe\x00",
        b'{"version": "2", "key": "a", "row": {}}\n',
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(text, tmp_path):
    store = tmp_path / "runs.jsonl"
    store.write_bytes(text)
    with pytest.raises(ValueError, match="store: .*runs.jsonl"):
        compare(run, ["a"], lrs=[0.1], seeds=[0], store=store, workers=1, progress=False)
    assert store.read_bytes() == text


def test_a_folder_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="store: got .*, wanted a file"):
        compare(run, ["a"], lrs=[0.1], seeds=[0], store=tmp_path, workers=1, progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(seeds=[]), "arms, lrs, seeds"),
        (dict(lrs={"a": [1.0]}), "arms, lrs, seeds"),
        (
            dict(lrs={"a": [1.0], "b": [1.0], "c": [0.1], "d": [1.0]}),
            r"lrs: got grids for \['d'\], wanted arms: a, b, c",
        ),
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
