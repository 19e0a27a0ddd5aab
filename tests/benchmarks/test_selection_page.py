"""docs/selection.md says what the records say."""

import re

from selection_tables import PAGE, difference, page


def test_the_page_is_made_from_the_records():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_differences_are_paired():
    one = {("a", 0): 3.0, ("a", 1): 5.0, ("b", 0): 9.0}
    assert difference(one, {("a", 0): 2.0, ("a", 1): 4.0}) == "+1.00 [+1.00, +1.00]"
    assert difference(one, {("a", 0): 2.0, ("b", 0): 4.0}, tasks=("b",)) == "+5.00 [+5.00, +5.00]"


def test_the_readmes_claims_are_the_pages():
    """Differences with their intervals, such as +0.32 [+0.08, +0.58]."""
    claim = re.compile(r"([+-]\d+\.\d+)[^\[\d]{0,8}\[([+-]\d+\.\d+), ([+-]\d+\.\d+)\]")
    page = set(claim.findall(PAGE.read_text(encoding="utf-8")))
    for name in ("README.md", "README.zh.md"):
        text = (PAGE.parent.parent / name).read_text(encoding="utf-8")
        claims = claim.findall(re.sub(r"(\d\.\d+) 分", r"+\1", text).replace("++", "+"))
        assert claims, name
        assert set(claims) <= page, name
