"""Ends what a dead supervisor left behind.

Run as a child of the supervisor, which holds the other end of its standard input and writes process groups there:
`+123` to guard one, `-123` to forget it. However the supervisor dies, `kill -9` included, the pipe closes; the guard
then asks every group it knows to end, and soon makes it. Works on every Unix, and reaches grandchildren too.

Started by path with `python -I -S`, so it imports nothing but the standard library and starts in milliseconds.
"""

import os
import signal
import sys
import time

#: Long enough to unlink shared memory, short enough that a new start does not meet the old processes.
_GRACE_S = 3.0


def _signal(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def main() -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    deadline = time.monotonic() + _GRACE_S
    groups = {group for group in groups if _signal(group, signal.SIGTERM)}
    while groups and time.monotonic() < deadline:
        time.sleep(0.05)
        groups = {group for group in groups if _signal(group, 0)}
    for group in groups:
        _signal(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
