import re

import numpy as np
import pytest
import torch

from lowrank_ref.lab.claims import MARK, VERDICTS, Claims, checked
from lowrank_ref.lab.compare import Arm, compare


def claim(**changes):
    claims = Claims("galore")
    words = dict(
        where="Table 2",
        measured="{ours:.2f} against {theirs:.2f}",
        numbers={"ours": 3.10, "theirs": 3.12},
        condition="ours < theirs",
        verdict="holds",
    )
    claims.add("GaLore is as good as Adam", **{**words, **changes})
    return claims


def text(claims):
    return [row.measured.replace(MARK, "") for row in claims.rows]


# --- claims about numbers ---------------------------------------------------------------------------------------------


def test_table_carries_what_a_ledger_needs():
    claims = claim(seeds=3)
    claims.add(
        "Memory < half", where="Fig. 1", measured="{share:.1f} of it", verdict="holds in part",
        numbers={"share": np.float64(0.6)}, condition="share > 0.5",
    )  # fmt: skip
    html = claims._repr_html_()
    assert '<table class="lr-table claims" data-paper="galore">' in html
    assert '<tr data-verdict="holds">' in html and '<tr data-verdict="holds in part">' in html
    assert "Memory &lt; half" in html and "ours &lt; theirs" in html
    assert len(repr(claims).splitlines()) == 2 and repr(claims).startswith(
        "holds: GaLore is as good as Adam (Table 2)."
    )


def test_the_text_is_made_of_the_numbers_that_the_condition_reads():
    assert text(claim()) == ["3.10 against 3.12"]
    assert text(claim(measured="{ours:.1f}, {theirs:.1f}", numbers={"ours": torch.tensor(1.0), "theirs": 2})) == [
        "1.0, 2.0"
    ]
    several = claim(measured="gates {ours:.2f}", numbers={"ours": [0.1, 0.25]}, condition="min(ours) > 0.05")
    assert text(several) == ["gates 0.10, 0.25"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(measured="better than {theirs:.2f}"), r"measured: .*wanted it to show \['ours'\]"),
        (dict(measured="{ours:.2f} {theirs:.2f} {other}"), r"numbers: .*wanted also \['other'\]"),
        (dict(condition="ours < other"), r"numbers: .*wanted also \['other'\]"),
        (dict(condition="True"), "condition: got 'True', which reads no number"),
        (dict(condition=""), "condition: got ''"),
        (dict(condition="ours <"), "condition: got 'ours <'"),
        (dict(condition="ours < 4", measured="{ours:.1f}"), r"numbers: got \['theirs'\], which are not shown"),
        (dict(numbers={"ours": float("nan"), "theirs": 1.0}), "NaN for 'ours'"),
        (dict(verdict="confirmed"), "verdict: got 'confirmed'"),
        (dict(verdict="not at this scale"), "verdict: got"),
        (dict(where=" "), "where: got an empty text"),
        (dict(verdict="open"), "missing: got ''"),
        (dict(missing="a longer run"), "missing: got 'a longer run' with verdict 'holds'"),
        (dict(control={"ours": 1.0}), "control: got"),
        (dict(numbers=None, condition="", holds=True, control={}), "control: got one without numbers"),
    ],
)
def test_claims_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        claim(**changes)


def test_a_condition_can_call_nothing_but_a_few_functions():
    assert claim(measured="{ours}", numbers={"ours": [1, 2]}, condition="all(x > 0 for x in ours) and len(ours) == 2")
    with pytest.raises(ValueError, match="__import__"):
        claim(condition="__import__('os') and ours < theirs")


@pytest.mark.parametrize("bad", ["yes", 0.9, torch.tensor([True, False]), None])
def test_a_truth_value_is_one(bad):
    with pytest.raises(TypeError, match="condition: got"):
        claim(numbers=None, condition="", holds=bad)
    with pytest.raises(TypeError, match="condition: got 3.1"):
        claim(condition="ours", measured="{ours}", numbers={"ours": 3.1})


def test_a_stale_verdict_cannot_be_shown():
    with pytest.raises(AssertionError, match="'holds' no longer follows.*GaLore is as good as Adam.*3.13 against 3.12"):
        claim(numbers={"ours": 3.13, "theirs": 3.12})


@pytest.mark.parametrize("no", [False, np.bool_(False), torch.tensor(False)])
def test_a_bare_truth_value_is_looked_at_too(no):
    with pytest.raises(AssertionError, match="no longer follows"):
        claim(numbers=None, condition="", holds=no)


def test_a_control_must_fail():
    assert claim(control={"ours": 3.2, "theirs": 3.12})
    with pytest.raises(AssertionError, match="control: it satisfies 'ours < theirs' too"):
        claim(control={"ours": 3.0, "theirs": 3.12})


def test_an_open_verdict_says_what_is_missing():
    (row,) = claim(verdict="open", missing="the paper's 2,500 steps").rows
    assert row.measured.endswith("; open: the paper's 2,500 steps")


def test_claims_belong_to_a_paper():
    with pytest.raises(ValueError, match="paper"):
        Claims("")


# --- claims that one arm beats another --------------------------------------------------------------------------------

ARMS = {
    "a": Arm("A and B", steps=9),
    "b": Arm("all", steps=9),
    "a again": Arm("A and B, other seed", steps=9),
    "noisy": Arm("noise", steps=9),
}
OFFSET = {"a": 0.0, "b": 0.10, "a again": 0.001}


def measure(method, lr, seed):
    wobble = (-1) ** seed * (0.01 if method != "noisy" else 0.3)
    loss = 0.3 + OFFSET.get(method, 0.05) + wobble * (method != "a") + abs(lr - 2)
    return {"loss": loss, "accuracy": 1 - loss}


RESULT = compare(measure, ARMS, lrs=(1, 2, 3), seeds=range(4), workers=1, progress=False)


def beats(a="a", b="b", result=RESULT, metric="loss", **changes):
    claims = Claims("lora")
    words = dict(claim="a beats b", where="Table 1", verdict="holds", cause=["trains"])
    claims.beats(a, b, result, metric, **{**words, **changes})
    return claims.rows[0]


def test_a_claim_of_two_arms_shows_both_the_difference_its_interval_and_the_seeds():
    row = beats()
    assert row.measured.replace(MARK, "") == "a 0.300, b 0.400; difference −0.100"
    low, high = (float(end.replace("−", "-")) for end in row.check.replace(MARK, "").split(" to "))
    paired = RESULT.paired("a", "b", "loss")
    assert (low, high) == pytest.approx((paired.low, paired.high), abs=5e-4) and high < 0
    assert row.seeds == "4"


@pytest.mark.parametrize(
    "changes, strongest",
    [
        ({}, "holds"),
        (dict(metric="accuracy", higher=True), "holds"),
        (dict(a="b", b="a"), "not confirmed"),
        (dict(by=0.05), "holds"),
        (dict(by=0.2), "not confirmed"),
        (dict(b="a again"), "open"),  # the interval contains 0
        (dict(a="b", b="a", by=-0.2), "holds"),  # at most 0.2 worse
        (dict(b="noisy"), "open"),
        (dict(cause=[]), "open"),  # the cause is not isolated
    ],
)
def test_the_strongest_verdict_is_computed(changes, strongest):
    weaker = {
        "holds": ("holds", "holds in part", "open"),
        "not confirmed": ("not confirmed", "open"),
        "open": ("open",),
    }
    for verdict in VERDICTS:
        words = {**changes, "verdict": verdict, "missing": "something" if verdict == "open" else ""}
        if verdict in weaker[strongest]:
            assert beats(**words).verdict == verdict
        else:
            with pytest.raises(AssertionError, match=f"verdict: got '{verdict}'.*wanted at most '{strongest}'"):
                beats(**words)


def test_an_open_verdict_names_the_doubts_itself():
    assert beats(b="a again", verdict="open").measured.endswith("; open: the interval contains +0.000")
    assert beats(cause=[], verdict="open").measured.endswith("; open: the arms also differ in trains")


def test_names_alone_carry_no_verdict():
    bare = compare(measure, ["a", "b"], lrs=(1, 2, 3), seeds=range(4), workers=1, progress=False)
    with pytest.raises(AssertionError, match="wanted at most 'open': a, b not declared as an arm"):
        beats(result=bare, cause=[])


def test_a_control_pair_must_not_show_the_difference():
    assert beats(control=("a", "a again"))
    with pytest.raises(AssertionError, match="control: a again beats b too"):
        beats(control=("a again", "b"))


# --- numbers that survive another processor ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, low, high, options, line",
    [
        (0.781, 0.7, 0.85, {}, "energy: 0.78 (checked: 0.70 to 0.85)"),
        (torch.tensor(12.0), 10, 20, {"digits": 0}, "energy: 12 (checked: 10 to 20)"),
        (3.2e-16, 0, 1e-12, {}, "energy: 3.2e-16 (checked: 0.00 to 1.0e-12)"),
        (1234.5, 1000, 2000, {"digits": 0}, "energy: 1,234 (checked: 1,000 to 2,000)"),
    ],
)
def test_a_number_is_printed_with_its_range(value, low, high, options, line, capsys):
    checked("energy", value, low, high, **options)
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize("value", [0.69, 0.86, float("nan"), float("inf")])
def test_a_number_outside_its_range_raises_and_prints_nothing(value, capsys):
    with pytest.raises(AssertionError, match="outside its range: energy: .* .checked: 0.70 to 0.85"):
        checked("energy", value, 0.7, 0.85)
    assert capsys.readouterr().out == ""


def test_a_range_has_two_ends():
    with pytest.raises(ValueError, match="low, high: got 2, 1"):
        checked("x", 1.5, 2, 1)


def test_the_sanitizer_blanks_the_numbers_and_never_a_range_a_word_or_a_verdict(capsys, pytestconfig):
    """What another processor may print passes; what it may not print does not."""
    rules = re.findall(
        "^regex: (.*)$\n^replace: (.*)$", (pytestconfig.rootpath / "tests/nbval_sanitize.cfg").read_text(), re.M
    )

    def sanitized(output):
        for regex, replace in rules:
            output = re.sub(regex, replace, output)
        return output

    def printed(value, low, high):
        checked("energy", value, low, high)
        return sanitized(capsys.readouterr().out)

    assert printed(0.78, 0.7, 0.85) == printed(0.79, 0.7, 0.85) == "energy: # (checked: 0.70 to 0.85)\n"
    assert printed(0.78, 0.7, 0.85) != printed(0.78, 0.7, 0.9)
    ours, theirs = claim(), claim(numbers={"ours": 3.0, "theirs": 33.12})
    for show in (repr, Claims._repr_html_):
        assert sanitized(show(ours)) == sanitized(show(theirs)) and show(ours) != show(theirs)
        assert sanitized(show(ours)) != sanitized(show(claim(verdict="holds in part")))
        assert sanitized(show(ours)) != sanitized(show(claim(condition="ours < theirs + 1")))
