"""Taking turns at a transport, and giving up the wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kv_transfer.transport import ReadTimedOut


class Cancelled(Exception):
    """The work was cancelled while it waited or between two pieces."""


class Cancel:
    """Tells one piece of work to stop. Set once, from any thread; stays set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._wake: Callable[[], None] | None = None

    def set(self) -> None:
        with self._lock:
            self._is_set = True
            wake = self._wake
        if wake is not None:
            wake()

    def is_set(self) -> bool:
        return self._is_set

    def check(self) -> None:
        if self._is_set:
            raise Cancelled

    def wait(self, timeout_s: float) -> None:
        """Sleeps; raises Cancelled when set before or meanwhile."""
        woken = threading.Event()
        with self.waking(woken.set):
            self.check()
            woken.wait(timeout_s)
        self.check()

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Calls `wake` when set meanwhile. One waiter at a time: the work this belongs to."""
        with self._lock:
            self._wake = wake
        try:
            yield
        finally:
            with self._lock:
                self._wake = None


class Turn:
    """Mutual exclusion, first come first served, whose wait ends at a deadline or a cancel.

    Reads through one transport take turns, whole fetches at a time. Two reads at once share one memory bus and, on a
    small machine, two cores with the engines: measured, two threads on one NIXL agent moved less than half of what one
    does. One after the other, the first fetch is ready in half the time and the second no later, and the time between
    a lease's first byte and its confirmation, in which it may expire, is shortest.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: Who waits, the holder in front.
        self._queue: deque[object] = deque()

    @contextmanager
    def hold(self, deadline: float | None = None, cancel: Cancel | None = None) -> Iterator[None]:
        """Raises ReadTimedOut or Cancelled instead of entering."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
        try:
            if cancel is None:
                self._wait(ticket, deadline, cancel)
            else:
                with cancel.waking(self._wake):
                    self._wait(ticket, deadline, cancel)
            yield
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _wait(self, ticket: object, deadline: float | None, cancel: Cancel | None) -> None:
        with self._changed:
            while True:
                if cancel is not None:
                    cancel.check()
                if self._queue[0] is ticket:
                    return
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise ReadTimedOut("the deadline passed while other transfers were under way")
                self._changed.wait(left)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
