"""What is on its way to one router.

Step outputs are joined: what one engine step gave all of a router's legs, and whatever came on top while the stream was
slow, leaves as one message, with what legs began with in front: somebody waits for an answer's first words longer than
for any others. So `take` may reorder across legs, but never within one: what precedes a leg's outputs (`Fetched`)
leaves before them, what ends the leg (`LegFailed`) after.
"""

from __future__ import annotations

import asyncio

from decode.batch import StepBatch
from engine.base import EngineLoad, FailureKind, PeerLane, PrefillResult, Staged, StepOutput
from worker import wire
from worker.config import Role


class Outbox:
    """Methods that put never wait. Past `entries_max` the box is `overflowed` for good, and takes nothing more."""

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        self._notices: list[wire.WorkerMessage] = []
        self._load: wire.WorkerMessage | None = None
        #: Of legs whose first output waits, all that waits; the others' outputs.
        self._firsts, self._steps = StepBatch(), StepBatch()
        self._failures: list[wire.WorkerMessage] = []
        self._something = asyncio.Event()
        self.overflowed = asyncio.Event()

    def offered(self, leg_id: str, handle: bytes) -> None:
        self._put(self._notices, wire.offered(leg_id, handle))

    def prefill_done(self, leg_id: str, result: PrefillResult) -> None:
        self._put(self._notices, wire.prefill_done(leg_id, result))

    def fetched(self, leg_id: str, staged: Staged) -> None:
        self._put(self._notices, wire.fetched(leg_id, staged))

    def step(self, leg_id: str, output: StepOutput, *, first: bool = False) -> None:
        if self._has_room():
            batch = self._firsts if first or leg_id in self._firsts else self._steps
            batch.add(leg_id, output)
            self._something.set()

    def failed(self, leg_id: str, kind: FailureKind, detail: str) -> None:
        self._put(self._failures, wire.leg_failed(leg_id, kind, detail))

    def load(self, load: EngineLoad, *, prefill_running: int, decode_running: int) -> None:
        """Replaces the last one if that still waits."""
        self._load = wire.load_report(load, prefill_running=prefill_running, decode_running=decode_running)
        self._something.set()

    def role_changed(self, role: Role) -> None:
        self._put(self._notices, wire.role_changed(role))

    def draining(self) -> None:
        self._put(self._notices, wire.draining())

    def peer_lane(self, lane: PeerLane) -> None:
        self._put(self._notices, wire.peer_lane(lane))

    def wake(self) -> None:
        self._something.set()

    async def wait(self) -> None:
        """Until there is something to take, or `wake` was called."""
        await self._something.wait()

    def take(self) -> list[wire.WorkerMessage]:
        self._something.clear()
        taken, self._notices = self._notices, []
        if self._load:
            taken.append(self._load)
            self._load = None
        while (firsts := self._firsts.take()) or self._steps:
            taken.append(wire.steps([*firsts, *self._steps.take()], firsts=len(firsts)))
        taken += self._failures
        self._failures = []
        return taken

    def _put(self, box: list[wire.WorkerMessage], message: wire.WorkerMessage) -> None:
        if self._has_room():
            box.append(message)
            self._something.set()

    def _has_room(self) -> bool:
        if len(self._notices) + len(self._firsts) + len(self._steps) + len(self._failures) >= self._entries_max:
            self.overflowed.set()
        return not self.overflowed.is_set()
