"""Runs ``reltune`` commands under a hard limit of memory: how much more than Python and its libraries the process may hold.

    python capped_worker.py MIB WARM_UP CAPPED

WARM_UP and CAPPED are JSON lists of words. The first command is run before the limit is set, so that libraries are loaded. The
limit is Linux's RLIMIT_DATA: memory that the process may write to, whether it was written or not, and no mapped files.
"""

import ctypes
import gc
import json
import resource
import sys
from pathlib import Path

from command_line import reltune


def held() -> int:
    """Bytes that count under RLIMIT_DATA."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmData:")[1].split()[0]) << 10


def main() -> None:
    limit, warm_up, capped = int(sys.argv[1]) << 20, *map(json.loads, sys.argv[2:])
    answer = reltune(*warm_up)
    assert answer.code in (None, 0), answer.err
    most = held() + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    answer = reltune(*capped)
    print(answer.out, answer.err[-2000:])
    raise SystemExit(answer.code)


if __name__ == "__main__":
    main()
