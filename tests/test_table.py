"""The one table that commands print."""

from hypothesis import given
from hypothesis import strategies as st

from smolforge.cli.table import MISSING, table_lines

WORDS = st.lists(st.text("ab ", min_size=1, max_size=12).map(str.strip).filter(bool), min_size=2, max_size=6)


def test_table_aligns_columns_under_a_heading():
    rows = [("web", 1234567, "70.0%", None), ("code [x]", 5, "3.0%", "1.50")]
    assert table_lines(rows, ("source", "tokens", "share", "epochs")) == [
        "source       tokens  share  epochs",
        f"web       1,234,567  70.0%       {MISSING}",
        "code [x]          5   3.0%    1.50",
    ]
    assert table_lines(rows, align="<>")[1] == "code [x]          5   3.0%  1.50"
    assert table_lines([]) == []


def test_table_measures_wide_characters_and_drops_spaces_at_the_end():
    assert table_lines([("日本", "a", ""), ("x", "b", "c")], align="<") == ["日本  a", "x     b  c"]


@given(WORDS, st.integers(40, 80))
def test_table_wraps_inside_its_column(words, width):
    lines = table_lines([("name", " ".join(words * 5))], align="<", width=width)
    assert max(map(len, lines)) <= width
    assert all(line.startswith("      ") for line in lines[1:])
    assert " ".join(lines).split() == ["name", *" ".join(words * 5).split()]
