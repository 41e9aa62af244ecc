"""What the core waits for, by time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from heapq import heapify, heappop, heappush
from typing import NamedTuple


class Kind(Enum):
    #: A request's deadline.
    DEADLINE = "deadline"
    #: How long a pool that nobody can serve keeps its queue.
    PATIENCE = "patience"
    #: A worker that failed a leg may be given one again.
    REST = "rest"
    #: Time to look for workers that say nothing.
    SILENCE = "silence"


class Timer(NamedTuple):
    at: float
    number: int
    kind: Kind
    key: str


class Timers:
    """A heap whose stale entries are dropped when they are met, or swept when they might outnumber the others."""

    _SLACK = 64

    def __init__(self, is_live: Callable[[Timer], bool]) -> None:
        self._is_live = is_live
        self._heap: list[Timer] = []
        self._ever = 0
        self._sweep_above = self._SLACK

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Timer]:
        return (timer for timer in self._heap if self._is_live(timer))

    def set(self, at: float, kind: Kind, key: str) -> None:
        self._ever += 1
        heappush(self._heap, Timer(at, self._ever, kind, key))
        if len(self._heap) > self._sweep_above:
            self._heap = list(self)
            heapify(self._heap)
            self._sweep_above = 2 * len(self._heap) + self._SLACK

    def next_at(self) -> float | None:
        while self._heap and not self._is_live(self._heap[0]):
            heappop(self._heap)
        return self._heap[0].at if self._heap else None

    def pop_due(self, now: float) -> Timer | None:
        at = self.next_at()
        return heappop(self._heap) if at is not None and at <= now else None
