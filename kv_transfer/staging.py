"""Who has which page of staging memory. A page holds one whole block.

Every page is in one place: free, in use by one fetch, or in quarantine because a failed read may still write into it.
Runs are kept whole where possible: blocks that are neighbours at both ends move as one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


class Staging:
    def __init__(self, pages: int) -> None:
        self.pages = pages
        #: Free runs as (first page, length), ascending, never touching one another.
        self._runs: list[tuple[int, int]] = [(0, pages)] if pages else []
        #: Pages not to be used before a read is known to be over, by that read's name.
        self._quarantine: dict[str, list[int]] = {}

    @property
    def free(self) -> int:
        return sum(length for _, length in self._runs)

    @property
    def quarantined(self) -> int:
        return sum(len(pages) for pages in self._quarantine.values())

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` pages, in as few runs as there are; None when there are not enough."""
        if count > self.free:
            return None
        # The shortest run that holds all, or else the longest runs first.
        whole = min((run for run in self._runs if run[1] >= count), key=lambda run: run[1], default=None)
        if whole is not None:
            return self._take_from(whole, count)
        taken: list[int] = []
        for run in sorted(self._runs, key=lambda run: -run[1]):
            taken += self._take_from(run, min(run[1], count - len(taken)))
            if len(taken) == count:
                break
        return tuple(taken)

    def _take_from(self, run: tuple[int, int], count: int) -> tuple[int, ...]:
        first, length = run
        if not count:
            return ()
        self._runs.remove(run)
        if length > count:
            insort(self._runs, (first + count, length - count))
        return tuple(range(first, first + count))

    def give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._give_back_one(page)

    def _give_back_one(self, page: int) -> None:
        at = bisect_left(self._runs, (page, 0))
        before = self._runs[at - 1] if at else None
        after = self._runs[at] if at < len(self._runs) else None
        if not 0 <= page < self.pages or (before and page < before[0] + before[1]) or (after and after[0] == page):
            raise AssertionError(f"page {page} is free already or does not exist")
        first, length = page, 1
        if after and after[0] == page + 1:
            length += after[1]
            del self._runs[at]
        if before and before[0] + before[1] == page:
            first, length = before[0], length + before[1]
            del self._runs[at - 1]
        insort(self._runs, (first, length))

    def quarantine(self, read: str, pages: Iterable[int]) -> None:
        assert read not in self._quarantine, f"{read} has pages in quarantine already"
        self._quarantine[read] = list(pages)

    def end_quarantine(self, read: str) -> None:
        """Nothing of this read writes any more."""
        self.give_back(self._quarantine.pop(read, ()))

    def check_integrity(self, in_use: Iterable[int]) -> None:
        """Every page is free, in quarantine or in `in_use`, and in one of them only."""
        free = [page for first, length in self._runs for page in range(first, first + length)]
        held = [page for pages in self._quarantine.values() for page in pages]
        everything = sorted([*free, *held, *in_use])
        assert everything == list(range(self.pages)), f"pages lost or doubled: {len(everything)} of {self.pages}"
        for (first, length), (after, _) in zip(self._runs, self._runs[1:], strict=False):
            assert first + length < after, "free runs touch"
