"""Fetches begun on a router's hint, while the prompt is still being computed and before an order wants them.

                begin            all bytes in, confirmed
        (hint) -------> READING ------------------------> HELD
                         |   |                            |  |
             order: take |   | failed, cancelled,    take |  | cancelled, link lost, gave way,
                         |   | gave way                   |  | nobody came for fetch_timeout_s
                         v   v                            v  v
                     (order's) (gone: the order fetches)  (order's) (gone: the pages are free, the order finds STALE)

A hint decides nothing: whatever becomes of it, an order that follows is served, at worst as if there had been none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum

from decode.admission import DecodeLimits
from engine.base import Engine, FailureKind, LegError, Staged

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    #: Of the prefill leg that computes the blocks.
    leg_id: str
    handle: bytes
    timeout_s: float


class AheadOutcome(Enum):
    TAKEN = "taken"
    #: By the engine: no room to spare, or a transfer that failed.
    FAILED = "failed"
    DROPPED = "dropped"


@dataclass(slots=True, eq=False)
class _Ahead:
    customer: Hashable
    hint: Hint
    #: None when the engine could not.
    task: asyncio.Task[Staged | None]
    #: Runs while it is HELD.
    timer: asyncio.TimerHandle | None = None


class FetchesAhead:
    """At most `limits.fetches_ahead`; further hints are ignored. Tasks live in `scope`; none of them fails it."""

    def __init__(
        self,
        engine: Engine,
        limits: DecodeLimits,
        scope: asyncio.TaskGroup,
        ended: Callable[[AheadOutcome], None] = lambda outcome: None,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._scope = scope
        self._ended = ended
        #: By handle: READING and HELD.
        self._open: dict[bytes, _Ahead] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, customer: Hashable, hint: Hint) -> None:
        if hint.handle in self._open or len(self._open) >= self._limits.fetches_ahead or hint.timeout_s <= 0:
            return
        ahead = _Ahead(customer, hint, self._scope.create_task(self._fetch(hint), name=f"ahead of {hint.leg_id}"))
        self._open[hint.handle] = ahead
        ahead.task.add_done_callback(lambda _: self._fetched(ahead))

    async def take(self, handle: bytes, timeout_s: float) -> Staged | None:
        """For the order: what was begun for it, waiting until it is there; None when it has to fetch itself.

        Raises LegError when it is not there in time. What is returned is the caller's. Cancelling gives it up.
        """
        ahead = self._open.pop(handle, None)
        if ahead is None:
            return None
        if ahead.timer is not None:
            ahead.timer.cancel()
        try:
            async with asyncio.timeout(timeout_s):
                staged = await ahead.task
        except BaseException as error:
            # It may have ended in the same moment.
            self._give_up(ahead)
            if isinstance(error, TimeoutError):
                raise LegError(FailureKind.TRANSFER, f"not fetched {timeout_s:.3f} s after the order") from None
            raise
        if staged is not None:
            self._ended(AheadOutcome.TAKEN)
        return staged

    def drop(self, customer: Hashable, leg_id: str) -> None:
        """The customer gave up the leg."""
        self._drop([a for a in self._open.values() if a.customer == customer and a.hint.leg_id == leg_id])

    def drop_all(self, customer: Hashable) -> None:
        self._drop([a for a in self._open.values() if a.customer == customer])

    async def give_way(self) -> bool:
        """Drops all that nobody has come for, for one that has. True when there was something."""
        tasks = self._drop(list(self._open.values()))
        if tasks:
            await asyncio.wait(tasks)
        return bool(tasks)

    async def _fetch(self, hint: Hint) -> Staged | None:
        try:
            return await self._engine.fetch(hint.handle, hint.timeout_s, ahead=True)
        except LegError as error:
            log.info("not fetched ahead of %s: %s", hint.leg_id, error)
            return None

    def _fetched(self, ahead: _Ahead) -> None:
        if self._open.get(ahead.hint.handle) is not ahead:
            return
        if ahead.task.cancelled() or ahead.task.exception() is not None or ahead.task.result() is None:
            del self._open[ahead.hint.handle]
            self._ended(AheadOutcome.FAILED)
            return
        loop = asyncio.get_running_loop()
        ahead.timer = loop.call_later(self._limits.fetch_timeout_s, lambda: self._drop([ahead]))

    def _drop(self, dropped: list[_Ahead]) -> list[asyncio.Task[object]]:
        """The tasks that end when their pages are free."""
        for ahead in dropped:
            del self._open[ahead.hint.handle]
            if ahead.timer is not None:
                ahead.timer.cancel()
            self._ended(AheadOutcome.DROPPED)
        return [task for ahead in dropped if (task := self._give_up(ahead)) is not None]

    def _give_up(self, ahead: _Ahead) -> asyncio.Task[object] | None:
        if not ahead.task.done():
            ahead.task.cancel()
            return ahead.task
        if ahead.task.cancelled() or ahead.task.exception() is not None:
            return None
        staged = ahead.task.result()
        return None if staged is None else self._scope.create_task(self._discard(staged))

    async def _discard(self, staged: Staged) -> None:
        try:
            await self._engine.discard(staged)
        except LegError as error:
            log.info("%s was not discarded: %s", staged.staged_id, error)
