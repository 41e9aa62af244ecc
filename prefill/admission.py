"""How many prefill legs a worker takes. The router decides order and fairness; a worker only keeps a short queue, so
that its engine never waits for the next order, and says no at once to what would wait behind it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    #: Legs given to the engine at once.
    running: int = 8
    #: Tokens of theirs at once; one leg may have more. Enough to fill an engine's largest step, so that it never waits
    #: for the next prompt. An engine that computes each token as fast in a small step (a CPU: about 512) answers the
    #: first of many prompts sooner with less, for a few percent of throughput.
    running_tokens: int = 8_192
    #: Legs that wait for one of those; one more is refused.
    queued: int = 8
    #: How long a finished prompt's blocks stay pinned for their reader.
    lease_ttl_s: float = 30.0

    @property
    def legs(self) -> int:
        return self.running + self.queued

    def problems(self) -> list[str]:
        found = []
        if self.running < 1:
            found.append(f"prefill.running: must be at least 1, is {self.running}")
        if self.running_tokens < 1:
            found.append(f"prefill.running_tokens: must be at least 1, is {self.running_tokens}")
        if self.queued < 0:
            found.append(f"prefill.queued: must not be negative, is {self.queued}")
        if not 0 < self.lease_ttl_s < float("inf"):
            found.append(f"prefill.lease_ttl_s: must be more than 0, is {self.lease_ttl_s}")
        return found

    def refusal(self, open_legs: int) -> str:
        """Why one more leg is not taken; empty when it is."""
        return f"prefill is full: {open_legs} of {self.legs} legs" if open_legs >= self.legs else ""


class Places:
    """The engine's places for legs, given in order of arrival; as many legs and tokens at once as the limits say, and
    one leg of any length."""

    def __init__(self, limits: PrefillLimits) -> None:
        self._limits = limits
        self._legs = 0
        self._tokens = 0
        #: Who waits, first come first.
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, tokens: int) -> AsyncIterator[None]:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((tokens, place))
        self._give()
        try:
            await place
            yield
        finally:
            if place.cancelled():
                self._queue.remove((tokens, place))
            else:
                self._legs -= 1
                self._tokens -= tokens
            self._give()

    def _give(self) -> None:
        waiting = [entry for entry in self._queue if not entry[1].cancelled()]
        for tokens, place in waiting:
            if not self._has_room(tokens):
                return
            self._queue.remove((tokens, place))
            self._legs += 1
            self._tokens += tokens
            place.set_result(None)

    def _has_room(self, tokens: int) -> bool:
        limits = self._limits
        return self._legs == 0 or (self._legs < limits.running and self._tokens + tokens <= limits.running_tokens)
