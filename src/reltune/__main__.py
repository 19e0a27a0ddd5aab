"""The ``reltune`` command, and ``python -m reltune``."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from reltune.cli.commands import main as command
    except KeyboardInterrupt:  # what handles it is being loaded
        print("reltune: error: interrupted; nothing was begun.", file=sys.stderr)
        raise SystemExit(130) from None
    command()


if __name__ == "__main__":
    main()
