"""Every open leg of this worker: one task each, and one end.

              open                      work returned, LegError, deadline, fault
    (order) ---------> OPEN ------------------------------------------------------> ENDED   one terminal message
                         |                                                            |
                         |  cancelled by its router, or the router's link is gone     |  task over
                         +----------------------------------------------------> ENDED |
                              no message                                              v
                                                                                   (gone)

A leg is *ended* when its router has heard the last of it, and *gone* when its task is over and the engine has let go of
it. The router counts a place as free from the end on, so that is what capacity is measured by.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from engine.base import FailureKind, LegError, PrefillResult, Staged, StepOutput
from worker.config import Role
from worker.metrics import WorkerMetrics

log = logging.getLogger(__name__)

#: A router's deadline is never this far off; clocks and timers take no infinity.
_TIMEOUT_MAX_S = 24 * 3600.0
_DETAIL_CHARACTERS_MAX = 2000


class Reply(Protocol):
    """Where a leg's messages go: its router's outbox."""

    def __hash__(self) -> int: ...
    def offered(self, leg_id: str, handle: bytes) -> None: ...
    def prefill_done(self, leg_id: str, result: PrefillResult) -> None: ...
    def fetched(self, leg_id: str, staged: Staged) -> None: ...
    def step(self, leg_id: str, output: StepOutput, *, first: bool = False) -> None: ...
    def failed(self, leg_id: str, kind: FailureKind, detail: str) -> None: ...


class Leg:
    """Says each thing once: after the terminal message, or a cancel, nothing more leaves."""

    def __init__(self, table: LegTable, reply: Reply, leg_id: str, engine_leg_id: str, role: Role) -> None:
        self._table = table
        self.reply = reply
        self.leg_id = leg_id
        #: Unlike `leg_id`, which begins with what a client chose, never used before by this process.
        self.engine_leg_id = engine_leg_id
        #: What it needs of the worker: PREFILL or DECODE.
        self.role = role
        #: It has said tokens.
        self.began = False
        self.ended = False

    def offered(self, handle: bytes) -> None:
        if not self.ended:
            self.reply.offered(self.leg_id, handle)

    def prefill_done(self, result: PrefillResult) -> None:
        if self._end("served"):
            self.reply.prefill_done(self.leg_id, result)

    def fetched(self, staged: Staged) -> None:
        if not self.ended:
            self._table.metrics.fetched(staged)
            self.reply.fetched(self.leg_id, staged)

    def step(self, output: StepOutput) -> None:
        if not self.ended:
            self.reply.step(self.leg_id, output, first=not self.began)
            self.began = True
            if output.finish_reason:
                self._end("served")

    def fail(self, kind: FailureKind, detail: str) -> None:
        if self._end(kind.name.lower()):
            log.info("leg %s failed: %s: %s", self.leg_id, kind.name.lower(), detail)
            self.reply.failed(self.leg_id, kind, detail[:_DETAIL_CHARACTERS_MAX])

    def cancel(self) -> None:
        self._end("cancelled")

    def _end(self, outcome: str) -> bool:
        """True the first time."""
        if self.ended:
            return False
        self.ended = True
        self._table.leg_ended(self, outcome)
        return True


Work = Callable[[Leg], Awaitable[None]]


class LegTable:
    """Owns every leg's task. The tasks live in `scope`; none of them fails it."""

    def __init__(self, scope: asyncio.TaskGroup, metrics: WorkerMetrics) -> None:
        self.metrics = metrics
        self._scope = scope
        self._sequence = itertools.count(1)
        #: The legs that have not ended, by router and its id for them.
        self._open: dict[tuple[Reply, str], Leg] = {}
        #: The legs that are not gone, and so all that are open.
        self._tasks: dict[Leg, asyncio.Task[None]] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def count(self, role: Role) -> int:
        """Legs that are not gone. May be called from any thread, hence the copy."""
        return sum(leg.role is role for leg in tuple(self._tasks))

    def count_open(self, role: Role) -> int:
        return sum(leg.role is role for leg in self._open.values())

    def has(self, reply: Reply, leg_id: str) -> bool:
        return (reply, leg_id) in self._open

    def open(self, reply: Reply, leg_id: str, role: Role, timeout_s: float, work: Work) -> None:
        """`work` says the leg's terminal message on it, or raises LegError."""
        assert not self.has(reply, leg_id), f"leg {leg_id} is open already"
        leg = Leg(self, reply, leg_id, f"{leg_id}~{next(self._sequence)}", role)
        task = self._scope.create_task(_run(leg, timeout_s, work), name=leg.engine_leg_id)
        self._open[reply, leg_id] = leg
        self._tasks[leg] = task
        self._empty.clear()
        # Not in the task: one that is cancelled before its first step runs no `finally`.
        task.add_done_callback(lambda _: self._gone(leg))

    def cancel(self, reply: Reply, leg_id: str) -> bool:
        """False when no such leg is open."""
        leg = self._open.get((reply, leg_id))
        if leg is None:
            return False
        leg.cancel()
        self._tasks[leg].cancel()
        return True

    def cancel_all(self, reply: Reply) -> int:
        return sum(self.cancel(reply, leg_id) for owner, leg_id in tuple(self._open) if owner is reply)

    def fail_all(self, kind: FailureKind, detail: str) -> None:
        for leg in tuple(self._open.values()):
            leg.fail(kind, detail)
            self._tasks[leg].cancel()

    async def empty(self) -> None:
        """Until every leg is gone."""
        await self._empty.wait()

    def check_integrity(self) -> None:
        assert all(leg in self._tasks and not leg.ended for leg in self._open.values())
        assert len(self._open) == sum(not leg.ended for leg in self._tasks)
        assert self._empty.is_set() == (not self._tasks)

    def leg_ended(self, leg: Leg, outcome: str) -> None:
        """For legs, which say it once."""
        del self._open[leg.reply, leg.leg_id]
        self.metrics.leg_ended(leg.role, outcome)

    def _gone(self, leg: Leg) -> None:
        # Only an engine that cancels our task, which it must not, leaves a leg without an end.
        leg.fail(FailureKind.ENGINE, "the engine gave no answer")
        del self._tasks[leg]
        if not self._tasks:
            self._empty.set()


async def _run(leg: Leg, timeout_s: float, work: Work) -> None:
    if not timeout_s > 0:
        leg.fail(FailureKind.EXPIRED, "the deadline had passed when the order came")
        return
    deadline = asyncio.timeout(min(timeout_s, _TIMEOUT_MAX_S))
    try:
        async with deadline:
            await work(leg)
    except LegError as error:
        leg.fail(error.kind, error.detail)
    except Exception as error:
        if isinstance(error, TimeoutError) and deadline.expired():
            leg.fail(FailureKind.EXPIRED, f"not done within its {timeout_s:.3f} s")
        else:
            # A fault of ours or of the engine's ends this leg, and not the other tenants' beside it.
            log.exception("leg %s: fault", leg.leg_id)
            leg.fail(FailureKind.ENGINE, f"{type(error).__name__}: {error}")
