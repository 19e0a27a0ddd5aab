"""Both languages have every text, with the same values in it."""

import re
import string
from pathlib import Path

import pytest

from reltune.runs.directory import STAGES
from reltune.studio import words as module
from reltune.studio.jobs import ENDS
from reltune.studio.words import LANGUAGES, WORDS, Words

CODE = "".join(path.read_text(encoding="utf-8") for path in Path(module.__file__).parent.glob("*.py"))


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_text_is_there_in_every_language() -> None:
    for key, texts in WORDS.items():
        assert len(texts) == len(LANGUAGES) and all(text.strip() for text in texts), key
        assert len({frozenset(fields(text)) for text in texts}) == 1, key


def test_chinese_texts_are_chinese() -> None:
    english = Words("en")
    for key in WORDS:
        if key not in ("title", "other_language"):
            assert re.search("[\u4e00-\u9fff]", Words("zh")(key)), key
            assert not re.search("[\u4e00-\u9fff]", english(key)), key


def test_every_text_that_the_code_asks_for_is_there_and_no_other() -> None:
    built = {f"stage_{stage}" for stage in STAGES} | {
        f"state_{state}" for state in (*ENDS.values(), "running", "failed", "ended")
    }
    built |= {f"kind_{kind}" for kind in ("run", "comparison", "damaged")}
    built |= {f"split_{split}" for split in ("train", "validation", "test")}
    assert built <= set(WORDS)
    assert set(re.findall(r"""words\(\s*["'](\w+)["']""", CODE)) <= set(WORDS)
    code = CODE.replace(Path(module.__file__).read_text(encoding="utf-8"), "")
    assert {key for key in WORDS if f'"{key}"' not in code and f"'{key}'" not in code} - built == set()


def test_values_are_filled_in() -> None:
    assert Words("en")("splits", train=1, validation=2, test=3).startswith("1 to train on, 2")
    assert Words("zh").other == "en"
    with pytest.raises(KeyError):
        Words("en")("nothing")
