"""How long to wait before dialling a router again."""

from __future__ import annotations

from random import Random


class Backoff:
    """Doubles from `first_s` to `max_s`; each wait is drawn from the upper half, so that a returning router is not
    met by all its workers at once."""

    def __init__(self, first_s: float, max_s: float, random: Random) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._random = random
        self._next_s = first_s

    def reset(self) -> None:
        self._next_s = self._first_s

    def next_s(self) -> float:
        wait_s = self._next_s
        self._next_s = min(self._max_s, 2 * wait_s)
        return wait_s * self._random.uniform(0.5, 1.0)
