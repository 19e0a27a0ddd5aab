"""``python -m reltune`` is the ``reltune`` command."""

from reltune.cli import main

main()
