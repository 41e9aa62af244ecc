"""Acts for the core: feeds it events with the time, carries its effects out, and wakes it at its next deadline.

Everything here runs on one event loop, and nothing here waits: worker-bound effects go into the links' outboxes, events
for clients into their streams. So effects are carried out in the core's order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from router.core import effects as fx
from router.core import events as ev
from router.core.budget import Record
from router.core.core import Core
from router.core.effects import ClientEvent, Effect, Emit, Tokens
from router.core.errors import AlreadyExists, NotFound
from router.core.rate import RateLeft
from router.core.request import GenerationRequest
from router.core.snapshot import Snapshot, snapshot
from router.core.stats import Stats
from router.core.story import Story
from router.core.usage import UsageFacts
from router.core.worker import ModelFacts, Role, WorkerFacts
from router.port import ModelView, RequestStream, tell_readers

WorkerEffect = (
    fx.SendPrefill
    | fx.SendDecode
    | fx.FetchAhead
    | fx.CancelLeg
    | fx.ReleaseLease
    | fx.SendPeers
    | fx.SendDrain
    | fx.SendSetRole
)


class WorkerLinks(Protocol):
    """The shell's view of links.py. Neither waits, and a worker that is not linked is ignored: the core hears of
    its loss anyway."""

    def send(self, effect: WorkerEffect) -> None: ...

    def close(self, worker_id: str, why: str) -> None: ...


class Sink(Protocol):
    """Where what the core says to one request goes: a RequestStream, or the way to one."""

    def put(self, event: ClientEvent) -> None:
        """Last of all, one Finished or Failed."""
        ...

    def arrived(self) -> None:
        """After `put`, once all that belongs to its event is done."""
        ...


class Shell:
    """Implements router.port's CorePort and AdminPort over a core in this process."""

    def __init__(self, core: Core, *, stream_tokens_max: int) -> None:
        self._core = core
        self._loop = asyncio.get_running_loop()
        self._stream_tokens_max = stream_tokens_max
        self._streams: dict[str, Sink] = {}
        #: Those that something came for, and whose readers were not told yet.
        self._touched: dict[Sink, None] = {}
        #: What the last worker of each model said of it. Stays when the worker goes.
        self._facts: dict[str, ModelFacts] = {}
        self._links: WorkerLinks | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = 0.0
        self._idle = asyncio.Event()
        #: What the core raised, or carrying out what it wants, if that ever did: a fault of ours, after which neither
        #: its state can be trusted nor that everybody knows of it.
        self.fault: Exception | None = None
        #: Called once, when that happens.
        self.on_fault: Callable[[], None] = lambda: None
        #: Where the budgets' records and the usage facts go. What follows from a record is done after it was called.
        self.on_record: Callable[[Record], None] = lambda record: None
        self.on_usage: Callable[[UsageFacts], None] = lambda usage: None
        #: Called after workers came, went or changed.
        self.on_workers_changed: Callable[[], None] = lambda: None

    def attach(self, links: WorkerLinks) -> None:
        self._links = links
        self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def handle(self, event: ev.Event) -> None:
        if self.fault is not None:
            return
        try:
            for effect in self._core.handle(self.now(), event):
                self._do(effect)
            self._arm()
        except Exception as fault:
            self.fault = fault
            self.on_fault()
            raise
        if isinstance(event, _ABOUT_WORKERS):
            self.on_workers_changed()

    def _do(self, effect: Effect) -> None:
        if isinstance(effect, Emit):
            self._emit(effect)
        elif isinstance(effect, fx.Journal):
            self.on_record(effect.record)
        elif isinstance(effect, fx.UsageRecorded):
            self.on_usage(effect.usage)
        elif self._links is not None:
            if isinstance(effect, fx.CloseLink):
                self._links.close(effect.worker_id, effect.why)
            else:
                self._links.send(effect)

    def _emit(self, emit: Emit) -> None:
        if isinstance(emit.event, Tokens):
            stream = self._streams.get(emit.key)
        else:
            stream = self._streams.pop(emit.key, None)
            self._idle.set()
        if stream is not None:
            stream.put(emit.event)
            if not self._touched:
                self._loop.call_soon(self.deliver)
            self._touched[stream] = None

    @property
    def owes_readers(self) -> bool:
        """Something came that `deliver` will tell of."""
        return bool(self._touched)

    def deliver(self) -> None:
        """Tells readers what came for them. Once for all that one turn of the loop brought, so that what several
        engine steps gave an answer while we lagged is one piece; whoever read it can call this sooner."""
        touched, self._touched = self._touched, {}
        tell_readers(touched)  # who may handle events of their own

    def _arm(self) -> None:
        """One timer, for the core's next deadline. A core that wants an earlier one gets it; a later one waits for
        the timer that is set, which then does nothing but set it."""
        at = self._core.next_deadline()
        if at is None or (self._timer is not None and self._armed_for <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = at
        self._timer = self._loop.call_later(max(0.0, at - self.now()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.handle(ev.Tick())

    async def idle(self) -> None:
        """Returns when no request is open."""
        while self._core.state.requests:
            self._idle.clear()
            await self._idle.wait()

    # For edges.

    def now(self) -> float:
        return time.monotonic()  # the loop's own clock may tick in milliseconds

    def submit(self, request: GenerationRequest) -> RequestStream:
        stream = RequestStream(
            request.key,
            tokens_max=self._stream_tokens_max,
            cancel=lambda key: self.handle(ev.Cancel(key)),
            stop_matched=lambda key, tokens: self.handle(ev.StopMatched(key, tokens)),
            overrun=self._overrun,
        )
        self.open(request, stream)
        return stream

    def open(self, request: GenerationRequest, sink: Sink) -> None:
        """Raises AlreadyExists."""
        if self._core.is_open(request.key):
            raise AlreadyExists(f"request_id {request.request_id!r} is in use by an open request of yours")
        self._streams[request.key] = sink
        self.handle(ev.Submit(request))

    def _overrun(self, key: str) -> None:
        # Not at once: the core is in the middle of handing out the very tokens that overran.
        self._loop.call_soon(self.handle, ev.Overrun(key))

    def models(self) -> list[ModelView]:
        return [ModelView(name, self._facts.get(name), self._core.serves(name)) for name in self._core.state.pools]

    async def explain(self, request_id: str, tenant: str | None) -> list[tuple[Story, float]]:
        since_1970 = time.time() - self.now()
        return [(story, since_1970 + story.arrival) for story in self._core.explain(request_id, tenant)]

    async def rates(self, tenant: str) -> tuple[RateLeft, ...]:
        return self._core.admission.rates(self.now(), tenant)

    def seen(self, *, requests: bool = False) -> Snapshot:
        return snapshot(self.now(), self._core.state, self._core.stats.outcomes, requests=requests)

    async def snapshot(self, *, requests: bool = False) -> Snapshot:
        return self.seen(requests=requests)

    async def stats(self) -> Stats:
        return self._core.stats

    async def drain(self, worker_id: str) -> None:
        self._known(worker_id)
        self.handle(ev.DrainRequested(worker_id))

    async def set_role(self, worker_id: str, role: Role) -> None:
        self._known(worker_id)
        self.handle(ev.SetRoleRequested(worker_id, role))

    def _known(self, worker_id: str) -> None:
        if worker_id not in self._core.state.workers:
            raise NotFound("worker", worker_id, f"no worker {worker_id!r} is linked to this router")

    # For links.

    def misfit(self, facts: WorkerFacts) -> str:
        return self._core.misfit(facts)

    def joined(self, facts: WorkerFacts) -> None:
        """For a worker that fits. Call `attach`ed, with its link ready to send on."""
        self._facts[facts.model.name] = facts.model
        self.handle(ev.WorkerJoined(facts))


_ABOUT_WORKERS = (ev.WorkerJoined, ev.WorkerLost, ev.RoleChanged, ev.DrainingAnnounced, ev.DrainRequested, ev.Tick)
