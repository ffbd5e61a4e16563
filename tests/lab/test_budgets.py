"""From stored rows to one comparison at a budget, and to one table."""

import pytest

from lowrank_ref.lab.budgets import at_budget, best_settings, versus_table
from lowrank_ref.lab.compare import Arm

ARMS = {name: Arm(name, steps=1) for name in ("LoRA", "full", "biases")}


def rows():
    found = []
    for method, name, numbers, loss in (
        ("LoRA r=1", "LoRA", 10, 0.5),
        ("LoRA r=2", "LoRA", 20, 0.3),
        ("full", "full", 100, 0.1),
        ("biases", "biases", 5, 0.9),
    ):
        for lr in (0.1, 0.2, 0.4):
            for seed in range(3):
                off = 0.1 * (lr != 0.2) + 0.01 * seed * (1 + (name == "full"))
                row = {"method": method, "name": name, "lr": lr, "seed": seed}
                found.append(row | {"numbers": numbers, "valid": loss + off, "loss": loss + off, "bytes": 4000.0})
    return found


def test_each_method_stands_at_its_largest_size_within_the_budget():
    names = {b: list(at_budget(rows(), b, ARMS, metric="valid", always=["full"]).grid) for b in (4, 10, 19, 20, 1000)}
    assert names[4] == ["full"]
    assert names[10] == names[19] == ["LoRA r=1", "full", "biases"]
    assert names[20] == names[1000] == ["LoRA r=2", "full", "biases"]
    result = at_budget(rows(), 10, ARMS, metric="valid")
    assert list(result.grid) == ["LoRA r=1", "biases"] and result.arms["LoRA r=1"] is ARMS["LoRA"]


def test_a_diverged_row_stays_and_costs_its_arm_the_rate():
    stored = rows()
    bad = next(row for row in stored if row["method"] == "LoRA r=1" and row["lr"] == 0.2)
    for key in ("numbers", "valid", "loss", "bytes"):
        del bad[key]
    bad["error"] = "diverged"
    assert at_budget(stored, 10, ARMS, metric="valid").best()["LoRA r=1"].lr != 0.2


def test_arms_and_rows_have_to_agree():
    with pytest.raises(ValueError, match="arms: got"):
        at_budget(rows(), 10, {**ARMS, "NOLA": ARMS["LoRA"]}, metric="valid")
    with pytest.raises(ValueError, match="wanted the names of the rows"):
        at_budget(rows(), 10, {"LoRA": ARMS["LoRA"]}, metric="valid")


def test_the_table_has_the_best_first_and_intervals_beside_the_reference():
    result = at_budget(rows(), 10, ARMS, metric="valid", always=["full"])
    table = versus_table(result, "LoRA r=1", "loss", {"bytes": 0}, digits=2)
    assert table.header == ["method", "loss", "minus LoRA r=1 (95 %)", "bytes", "seeds", "best lr"]
    assert [row[0] for row in table.rows] == ["full", "LoRA r=1", "biases"]
    assert table.rows[1] == ["LoRA r=1", "0.51", "-", "4,000", "3", "0.2"]
    assert table.rows[0][2] == "−0.39 (−0.41 to −0.37)" and table.rows[2][2].startswith("+0.40 (+0.40")


def test_an_edge_a_divergence_and_what_was_not_recorded_are_told():
    stored = [row for row in rows() if row["lr"] < 0.4]
    for row in stored:
        if row["name"] == "biases":
            row["loss"] = float("inf")
            del row["bytes"]
    table = versus_table(at_budget(stored, 10, ARMS, metric="valid"), "LoRA r=1", "loss", {"bytes": 0})
    assert [row[-1] for row in table.rows] == ["0.2 (edge)", "0.2 (edge)"]
    assert table.rows[1][:4] == ["biases", "diverged", "diverged", "-"]
    with pytest.raises(ValueError, match="reference: got 'x'"):
        versus_table(at_budget(stored, 10, ARMS, metric="valid"), "x", "loss")


def test_of_each_method_the_best_setting_is_kept():
    result = best_settings(rows(), ARMS, metric="valid")
    assert list(result.grid) == ["LoRA r=2", "full", "biases"]
    with pytest.raises(ValueError, match="arms: got"):
        best_settings(rows(), {"LoRA": ARMS["LoRA"]}, metric="valid")
