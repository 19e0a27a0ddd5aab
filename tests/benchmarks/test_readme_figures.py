"""Every figure of the READMEs that was measured names its record and equals it."""

import pytest

from readme_figures import READMES, ROOT, problems, written

STEP = 'The step takes 0.506 s <!-- tuner_step.json: seconds("eager", "columns, r = 32") --> in all.'


@pytest.mark.parametrize("name", READMES)
def test_every_figure_is_its_records(name):
    assert problems((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("0.506", "0.507", "0.507 is 0.506 in tuner_step.json"),
        ("in all", "in all, 3 times", "3 names no record"),
        (' <!-- tuner_step.json: seconds("eager", "columns, r = 32") -->', "", "0.506 names no record"),
        ("0.506 s", "0.506 s and 58.4 GiB", "1 expressions for 2 figures"),
        ("tuner_step.json", "no_such_record.json", "FileNotFoundError"),
        ("eager", "no such case", "StopIteration"),
    ],
)
def test_figures_without_a_record_or_that_differ_from_it_are_found(before, after, says):
    assert problems(STEP) == []
    found = problems(STEP.replace(before, after))
    assert len(found) == 1 and says in found[0], found


def test_figures_in_tables_lists_and_other_languages_are_found():
    assert len(problems("| method | 1,234 | +0.5 [-0.1, +1.1] |\n| other | 88.4 |")) == 5
    assert len(problems("- 高 0.32 分\n- 高 3 倍")) == 2
    assert (
        problems("LoRA with r = 8 on MiniLM-L6, 4 × 2048 tokens (Hu et al. 2021), `--budget 0.5%`, [docs](docs/x2.md)")
        == []
    )
    assert problems("```bash\nreltune run --budget 0.5%  # 12 s\n```") == []


@pytest.mark.parametrize(
    ("value", "like", "expected"),
    [
        (0.5061, "0.506", "0.506"),
        (1234.4, "1,200", "1,234"),
        (0.32, "+0.50", "+0.32"),
        (6.7e-5, "7e-5", "7e-5"),
        (8.4, "8", "8"),
    ],
)
def test_a_record_is_rounded_as_the_figure_is(value, like, expected):
    assert written(value, like) == expected
