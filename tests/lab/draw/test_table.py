import pytest

from lowrank_ref.lab.draw.table import Table


def test_text_is_aligned_with_numbers_to_the_right():
    table = Table(["method", "loss"], [["LoRA", "0.500 ± 0.010"], ["full fine-tuning", "12.250"]])
    assert str(table) == (
        "method                     loss\n"
        "----------------  -------------\n"
        "LoRA              0.500 ± 0.010\n"
        "full fine-tuning         12.250"
    )
    assert repr(table) == str(table)


def test_html_is_escaped_and_carries_attributes():
    table = Table(["a<b"], [["x & y"]], css="c", attributes={"data-k": 'v"'}, row_attributes=[{"data-r": "1"}])
    html = table._repr_html_()
    assert '<table class="c" data-k="v&quot;">' in html
    assert "a&lt;b" in html and "x &amp; y" in html and '<tr data-r="1">' in html


def test_a_table_may_be_empty_but_not_ragged():
    assert str(Table(["a", "b"], [])) == "a  b\n-  -"
    with pytest.raises(ValueError, match="got 1 cells"):
        Table(["a", "b"], [["x"]])
