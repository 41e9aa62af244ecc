"""Ends what a dead supervisor left behind.

Run as a child of the supervisor, which holds the other end of its standard input and writes process groups there:
`+123` to guard one, `-123` to forget it. However the supervisor dies, `kill -9` included, the pipe closes; the guard
then asks the leader of every group it knows to end, and soon ends them all. Works on every Unix, for grandchildren too.

Started by path with `python -I -S`, so it imports nothing but the standard library and starts in milliseconds.
"""

import contextlib
import os
import signal
import sys
import time

#: Long enough to unlink shared memory, short enough that a new start does not meet the old processes.
_GRACE_S = 3.0


def _terminate(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(leader, signal.SIGTERM)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def main() -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    deadline = time.monotonic() + _GRACE_S
    for group in groups:
        _terminate(group)
    while groups and time.monotonic() < deadline:
        time.sleep(0.05)
        groups = set(filter(_is_there, groups))
    for group in groups:
        _kill(group)


if __name__ == "__main__":
    main()
