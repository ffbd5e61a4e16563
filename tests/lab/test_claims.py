import numpy as np
import pytest
import torch

from lowrank_ref.lab.claims import Claims


def claim(**changes):
    claims = Claims("galore")
    words = dict(where="Table 2", measured="3.10 against 3.12", verdict="holds", holds=True)
    claims.add("GaLore is as good as Adam", **{**words, **changes})
    return claims


def test_table_carries_what_a_ledger_needs():
    claims = claim()
    claims.add("Memory < half", where="Fig. 1", measured="0.6 of it", verdict="holds in part", holds=np.bool_(True))
    html = claims._repr_html_()
    assert '<table class="lr-table claims" data-paper="galore">' in html
    assert '<tr data-verdict="holds">' in html and '<tr data-verdict="holds in part">' in html
    assert "Memory &lt; half" in html
    assert repr(claims).splitlines()[0].split("  ")[0] == "claim"
    assert len(repr(claims).splitlines()) == 4


@pytest.mark.parametrize("no", [False, np.bool_(False), torch.tensor(False)])
def test_a_stale_verdict_cannot_be_shown(no):
    with pytest.raises(AssertionError, match="'holds' no longer follows.*GaLore is as good as Adam.*3.10 against"):
        claim(holds=no)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(verdict="confirmed"), ValueError, "verdict: got 'confirmed'"),
        (dict(where=" "), ValueError, "where: got an empty text"),
        (dict(holds="yes"), TypeError, "holds: got 'yes'"),
        (dict(holds=0.9), TypeError, "holds: got 0.9"),
        (dict(holds=torch.tensor([True, False])), TypeError, "holds"),
    ],
)
def test_claims_refuse(changes, error, message):
    with pytest.raises(error, match=message):
        claim(**changes)


def test_claims_belong_to_a_paper():
    with pytest.raises(ValueError, match="paper"):
        Claims("")
