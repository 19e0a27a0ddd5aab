"""``python -m reltune`` is the ``reltune`` command."""

from reltune.cli.commands import main

main()
