"""A priority queue whose items change their keys often."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K", float, tuple[int, float])
T = TypeVar("T", bound=Hashable)


class LazyHeap(Generic[K, T]):
    """Of items with equal keys, the one whose key was set first. A changed key leaves its old entry behind; those are
    dropped when they come up, or swept when they outnumber the others. All costs are O(log n), amortized."""

    __slots__ = ("_entries", "_ever", "_heap")

    _SLACK = 64

    def __init__(self) -> None:
        self._heap: list[tuple[K, int, T]] = []
        #: The one valid entry of each item here.
        self._entries: dict[T, tuple[K, int, T]] = {}
        self._ever = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def key(self, item: T) -> K:
        return self._entries[item][0]

    def set(self, item: T, key: K) -> None:
        entry = self._entries.get(item)
        if entry is not None and entry[0] == key:
            return
        self._ever += 1
        entry = self._entries[item] = (key, self._ever, item)
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + self._SLACK:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def drop(self, item: T) -> None:
        self._entries.pop(item, None)

    def first(self) -> T | None:
        heap = self._heap
        while heap:
            if self._entries.get(heap[0][2]) is heap[0]:
                return heap[0][2]
            heappop(heap)
        return None
