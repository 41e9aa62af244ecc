"""The core's port, in an edge's process: what is asked here is decided over there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from router.core.effects import Failed, Tokens
from router.core.errors import Unavailable
from router.core.rate import RateLeft
from router.core.request import GenerationRequest
from router.core.snapshot import Snapshot
from router.core.stats import Stats
from router.core.story import Story
from router.core.tenant import TenantBook
from router.core.worker import Role
from router.edges import wire
from router.edges.link import Link
from router.port import ModelView, RequestStream, tell_readers

_ANSWER_S_MAX = 5.0
#: Every process reads its files again.
LOOK_S_MAX = 30.0
#: What the core has not read yet may be so much; requests that come then are refused.
_UNREAD_BYTES_MAX = 16 << 20


class FarCore:
    """Implements router.port's CorePort and AdminPort over a link."""

    def __init__(self, *, stream_tokens_max: int, book: Callable[[], TenantBook]) -> None:
        self._stream_tokens_max = stream_tokens_max
        self._book = book
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._streams: dict[int, RequestStream] = {}
        #: Those that something came for, and whose readers were not told yet.
        self._touched: dict[RequestStream, None] = {}
        self._models: list[ModelView] = []
        #: The core has said how the pools are.
        self.told = asyncio.Event()
        self._link: Link | None = None
        #: See `router.edge.orca`.
        self.load_report = b""
        #: Called after workers came, went or changed.
        self.on_workers_changed: Callable[[], None] = lambda: None

    def attach(self, link: Link) -> None:
        self._link = link

    # From the core.

    def now_is(self, now: wire.Now) -> None:
        self.told.set()
        self.load_report = now.load_report
        if now.models != self._models:
            self._models = now.models
            self.on_workers_changed()

    def take(self, turn: wire.Turn) -> None:
        self.load_report = turn.load_report or self.load_report
        for said in turn.said:
            if (stream := self._streams.get(said.stream)) is not None:
                stream.put(Tokens(said.token_ids, said.logprobs))
                self._touched[stream] = None
        for ended in turn.ended:
            if (stream := self._streams.pop(ended.stream, None)) is not None:
                stream.put(ended.finished or Failed(ended.error or _core_is_gone()))
                self._touched[stream] = None

    def deliver(self) -> None:
        """Tells readers what came for them, once for all that one read brought."""
        touched, self._touched = self._touched, {}
        tell_readers(touched)

    def lost(self) -> None:
        """The core is gone, and with it every request."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(Failed(_core_is_gone()))
        tell_readers(streams.values())
        self._models = [view._replace(ready=False) for view in self._models]
        self.on_workers_changed()

    # For edges.

    def now(self) -> float:
        return time.monotonic()  # one clock for all processes of a host

    def submit(self, request: GenerationRequest) -> RequestStream:
        link = self._link
        if link is None or link.lost_because or link.backlog_bytes > _UNREAD_BYTES_MAX:
            raise _core_is_gone()
        number = next(self._numbers)
        stream = RequestStream(
            request.key,
            tokens_max=self._stream_tokens_max,
            cancel=lambda _: link.say(wire.Cancel(number)),
            stop_matched=lambda _, tokens: link.say(wire.StopMatched(number, tokens)),
            overrun=lambda _: link.say(wire.Overrun(number)),
        )
        self._streams[number] = stream
        link.say(wire.Submit(number, request))
        return stream

    def models(self) -> list[ModelView]:
        return self._models

    async def rates(self, tenant: str) -> tuple[RateLeft, ...]:
        known = self._book().tenant(tenant)
        if known is None or (known.requests_per_minute is None and known.tokens_per_minute is None):
            return ()
        rates: tuple[RateLeft, ...] = await self._ask(wire.GetRates(tenant), tuple[RateLeft, ...])
        return rates

    async def explain(self, request_id: str, tenant: str | None) -> list[tuple[Story, float]]:
        found: list[tuple[Story, float]] = await self._ask(wire.Explain(request_id, tenant), list[tuple[Story, float]])
        return found

    async def snapshot(self, *, requests: bool = False) -> Snapshot:
        seen: Snapshot = await self._ask(wire.GetSnapshot(requests), Snapshot)
        return seen

    async def stats(self) -> Stats:
        stats: Stats = await self._ask(wire.GetStats(), Stats)
        return stats

    async def drain(self, worker_id: str) -> None:
        await self._ask(wire.Drain(worker_id), None)

    async def set_role(self, worker_id: str, role: Role) -> None:
        await self._ask(wire.SetRole(worker_id, role), None)

    async def look_again(self) -> None:
        """Returns when tenants and keys are in force in every process as the files have them."""
        await self._ask(wire.LookAgain(), None, LOOK_S_MAX)

    def metrics_page(self) -> bytes:
        """Called on a thread."""
        asking = self._ask(wire.GetMetrics(), bytes)
        page: bytes = asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        return page

    async def _ask(self, question: wire.Question, kind: Any, timeout_s: float = _ANSWER_S_MAX) -> Any:
        assert self._link is not None
        return await self._link.ask(question, kind, timeout_s)


def _core_is_gone() -> Unavailable:
    return Unavailable("CORE_UNREACHABLE", "the router's core cannot be reached", retry_after_s=1.0)
