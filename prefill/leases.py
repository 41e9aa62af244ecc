"""Which leases a worker has handed out, and to whom, so that it can end those that nobody will read.

A lease ends without this account too: its reader releases it, or its deadline passes. What the account adds is
haste: when a router is lost, or cancels a leg whose handle it has not seen yet, the blocks are free at once and not
after the rest of the lease. So an entry that is dropped early costs time, never correctness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _HandedOut:
    handle: bytes
    deadline: float


class LeaseAccount:
    """Times are seconds of one monotonic clock, passed in."""

    def __init__(self, entries_max: int = 4096) -> None:
        self._entries_max = entries_max
        #: By customer and leg, first handed out first; at most `entries_max`.
        self._entries: OrderedDict[tuple[Hashable, str], _HandedOut] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def hand_out(self, now: float, customer: Hashable, leg_id: str, handle: bytes, ttl_s: float) -> None:
        self._forget_old(now)
        self._entries[customer, leg_id] = _HandedOut(handle, now + ttl_s)

    def take(self, customer: Hashable, leg_id: str) -> bytes | None:
        """The handle that this leg gave out, if its lease may still be held."""
        entry = self._entries.pop((customer, leg_id), None)
        return entry.handle if entry else None

    def take_all(self, customer: Hashable) -> list[bytes]:
        keys = [key for key in self._entries if key[0] == customer]
        return [self._entries.pop(key).handle for key in keys]

    def _forget_old(self, now: float) -> None:
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if oldest.deadline > now and len(self._entries) < self._entries_max:
                return
            self._entries.popitem(last=False)
