"""docs/results.md and its picture say what the records say."""

import results_page


def test_the_page_and_the_picture_are_made_from_the_records():
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page()
    assert results_page.PICTURE.read_text(encoding="utf-8") == results_page.drawing()
