"""docs/selection.md says what the records say."""

from selection_tables import PAGE, difference, page


def test_the_page_is_made_from_the_records():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_differences_are_paired():
    one = {("a", 0): 3.0, ("a", 1): 5.0, ("b", 0): 9.0}
    assert difference(one, {("a", 0): 2.0, ("a", 1): 4.0}) == "+1.00 [+1.00, +1.00]"
    assert difference(one, {("a", 0): 2.0, ("b", 0): 4.0}, tasks=("b",)) == "+5.00 [+5.00, +5.00]"
