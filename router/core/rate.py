"""A rate limit in tokens (or requests), exact under any interleaving of reservations and refunds.

GCRA: instead of a level that must be refilled, the bucket keeps the moment at which it will be full. Its level at `now`
is `burst - (full_at - now) * rate`, never above `burst`.

- Something larger than the burst is admitted when the bucket is full, and puts it into debt: the long-run rate holds
  for requests of any size.
- A refund is worth nothing once the bucket has been full since the reservation: what was not taken would have run over
  the brim. Each time it is found full a new `epoch` begins, and a reservation's refund counts in its own epoch only.

So in any window, no more is *used* than rate x window + burst + what was reserved beyond use at one time.
"""

from __future__ import annotations

from math import exp, inf
from typing import NamedTuple

#: Floats of monotonic clocks are this exact, in seconds. Without it, retrying at the very time promised could fail.
_GRAIN_S = 1e-6


class RateLeft(NamedTuple):
    """What is left of a rate now, for who is limited by it."""

    unit: str
    per_minute: float
    left: float
    #: Until all of it is there again, if nothing else is taken.
    full_in_s: float


class Bucket:
    __slots__ = ("burst", "epoch", "full_at", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        assert rate > 0
        assert burst > 0
        #: Per second.
        self.rate = rate
        self.burst = burst
        self.full_at = -inf
        self.epoch = 0

    def level(self, now: float) -> float:
        """Below zero: in debt."""
        return min(self.burst, self.burst - (self.full_at - now) * self.rate)

    def full_in_s(self, now: float) -> float:
        return max(0.0, self.full_at - now)

    def admits_at(self, amount: float) -> float:
        """The first moment at which `amount` is admitted if nothing else happens."""
        return self.full_at - (self.burst - min(amount, self.burst)) / self.rate

    def admits(self, now: float, amount: float) -> bool:
        return now + _GRAIN_S >= self.admits_at(amount)

    def take(self, now: float, amount: float) -> int:
        """Returns the epoch, which a refund needs."""
        if self.full_at <= now:
            self.epoch += 1
            self.full_at = now
        self.full_at += amount / self.rate
        return self.epoch

    def give_back(self, amount: float, epoch: int) -> None:
        if epoch == self.epoch:
            self.full_at -= amount / self.rate

    def retune(self, now: float, rate: float, burst: float) -> None:
        """What was taken stays taken, in tokens."""
        missing = max(0.0, self.full_at - now) * self.rate
        self.rate, self.burst = rate, burst
        self.full_at = now + missing / rate


class BusyRate:
    """Service per second, averaged over about `window_s` of the time in which there was a queue. What is served with
    nobody waiting says nothing of how fast a queue would be."""

    __slots__ = ("_amount", "_at", "_busy", "_seconds", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._busy = False
        self._at = 0.0
        self._amount = 0.0
        self._seconds = 0.0

    def is_busy(self, now: float, busy: bool) -> None:
        self._pass(now)
        self._busy = busy

    def add(self, now: float, amount: float) -> None:
        if self._busy:
            self._pass(now)
            self._amount += amount

    def per_s(self, now: float) -> float | None:
        """None while too little was seen."""
        self._pass(now)
        return self._amount / self._seconds if self._seconds >= self._window_s / 10 and self._amount else None

    def _pass(self, now: float) -> None:
        passed, self._at = now - self._at, now
        if self._busy and passed > 0:
            kept = exp(-passed / self._window_s)
            self._amount *= kept
            self._seconds = self._seconds * kept + self._window_s * (1 - kept)
