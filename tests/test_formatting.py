"""Values as text."""

from hypothesis import given
from hypothesis import strategies as st

from smolforge.formatting import flatten, format_bytes, format_duration, format_setting, format_value


def test_durations_are_in_a_unit_that_fits():
    durations = [format_duration(seconds) for seconds in (5.2, 89, 600, 7200, 864_000, 1e9)]
    assert durations == ["5 s", "89 s", "10 min", "2.0 h", "10 days", "11,574 days"]


def test_sizes_are_in_a_unit_that_fits():
    sizes = [format_bytes(size) for size in (1000, 12 << 10, 727 << 20, 3 << 29, 1 << 42)]
    assert sizes == ["1 KiB", "12 KiB", "727 MiB", "1.50 GiB", "4,096.00 GiB"]


def test_values_are_written_as_a_recipe_has_them():
    assert [format_value(value) for value in (None, True, 1, "a", [1, "b"])] == ["none", "true", "1", "'a'", "[1, 'b']"]
    assert format_value("a" * 100) == f"'{'a' * 59}..."
    assert format_value(10**5000) == "a value too long to show"
    settings = (None, False, 0, 1, 0.5, "a", "", [], ("a", None), {}, {"web": 2, "code": None, "book": [1, True]})
    words = ["none", "false", "0", "1", "0.5", "a"]
    assert [format_setting(value) for value in settings] == [
        *words, '""', "nothing", "a, none", "nothing", "web 2, book 1, true",
    ]  # fmt: skip


def test_flatten_keeps_every_value_under_its_dotted_name():
    assert flatten({"a": {"b": 1, "c": {"d": [{"e": 2}]}}, "f": None, "g": {}}) == {
        "a.b": 1, "a.c.d": [{"e": 2}], "f": None,
    }  # fmt: skip


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.text("abc", min_size=1), inner), max_leaves=20))
def test_flatten_has_a_key_for_each_leaf(tree):
    def leaves(node, path=()):
        if not isinstance(node, dict):
            yield ".".join(path), node
        else:
            for key, value in node.items():
                yield from leaves(value, (*path, key))

    assert list(flatten({"root": tree}).items()) == list(leaves({"root": tree}))
