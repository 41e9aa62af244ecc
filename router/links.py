"""The router's end of the links: one stream per worker, its hello first, orders out, events in.

A worker joins by proving that it is one (`joining`), and is linked from its welcome until its stream ends, however it
ends: that moment the core hears of its loss. Of two streams that name one worker the newer is the worker; the older is
closed and no longer heard.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

import grpc

from protos import worker_link_pb2_grpc
from router import wire
from router.core import events as ev
from router.core.errors import Invalid, Misfit, TandemError, Unauthenticated, Unavailable
from router.core.worker import WorkerFacts
from router.edge.errors import abort
from router.grpc_server.call import Call
from router.joining import Gate, Introduction
from router.refusals import Refusals, source_of
from router.shell import Shell, WorkerEffect
from trust.tls import certificate_names

if TYPE_CHECKING:
    Stream = grpc.aio.ServicerContext[wire.WorkerMessage, wire.RouterMessage]

_log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0
#: Orders that a worker has not read yet. It reads all the time, so this many mean that it is stuck.
_OUTBOX_MAX = 16_384
#: Streams that have not been welcomed yet; more are refused.
_JOINING_MAX = 1_024


class _Link:
    """What waits to be sent on one stream, and whether the stream is to go on."""

    def __init__(self, first: wire.RouterMessage, call: Call | None) -> None:
        """`call`: the stream, where it takes messages at once."""
        self._waiting = deque([first])
        self._call = call
        self._filled = asyncio.Event()
        self._closed = asyncio.Event()
        self.closed_because = ""

    def put(self, message: wire.RouterMessage) -> None:
        if self._call is not None and not self._waiting and self._call.write_now(message.SerializeToString()):
            self._call.push()
            return
        self._waiting.append(message)
        self._filled.set()
        if len(self._waiting) > _OUTBOX_MAX:
            self.close(f"it left {_OUTBOX_MAX} messages unread")

    def carry_out(self) -> None:
        """What its worker said so far, which otherwise waits until all that came with it was handed on."""
        if self._call is not None:
            self._call.carry_out()

    async def get(self) -> wire.RouterMessage:
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        return self._waiting.popleft()

    def close(self, why: str) -> None:
        self.closed_because = self.closed_because or why
        self._closed.set()

    async def closed(self) -> str:
        await self._closed.wait()
        return self.closed_because


class Links(worker_link_pb2_grpc.WorkerLinkServicer):
    def __init__(self, shell: Shell, gate: Gate, *, router_id: str, load_report_interval_s: float) -> None:
        self._shell = shell
        self._gate = gate
        self._router_id = router_id
        #: Of strangers. A worker that is told wrong tries again for ever: one line a minute will do.
        self.refusals = Refusals("joining", burst=1, per_s=1 / 60)
        self._joining = 0
        self._load_report_interval_s = load_report_interval_s
        self._links: dict[str, _Link] = {}

    # For the shell.

    def send(self, effect: WorkerEffect) -> None:
        if (link := self._links.get(effect.worker_id)) is not None:
            link.put(wire.order(effect))

    def close(self, worker_id: str, why: str) -> None:
        if (link := self._links.pop(worker_id, None)) is not None:
            link.close(why)

    def close_all(self, why: str) -> None:
        for link in self._links.values():
            link.close(why)

    # The stream.

    async def Connect(  # type: ignore[override]  # writes by the context, so that it can read at the same time
        self,
        request_iterator: AsyncIterator[wire.WorkerMessage],
        context: Stream,
    ) -> None:
        try:
            facts = await self._join(request_iterator, context)
        except TandemError as error:
            await abort(context, error)
        link = self._open(facts, context if isinstance(context, Call) else None)
        _log.info("worker %s (%s) linked, pid %d", facts.worker_id, facts.role.value, facts.pid)
        why = "its stream broke"
        try:
            async with asyncio.TaskGroup() as tasks:
                # Either may hang for as long as the worker does, so neither is who notices that the link is closed.
                receiving = tasks.create_task(self._receive(request_iterator, facts.worker_id, link))
                sending = tasks.create_task(_send(context, link))
                why = await link.closed()
                receiving.cancel()
                sending.cancel()
        finally:
            self._over(facts.worker_id, link, why)

    async def _join(self, requests: AsyncIterator[wire.WorkerMessage], context: Stream) -> WorkerFacts:
        if self._joining >= _JOINING_MAX:
            raise Unavailable("JOINING_FULL", f"{_JOINING_MAX} others are joining", retry_after_s=1.0)
        self._joining += 1
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                return await self._greet(aiter(requests), context)
        except (TimeoutError, StopAsyncIteration):
            raise Invalid("hello", f"must come first, within {_HELLO_TIMEOUT_S:g} s") from None
        finally:
            self._joining -= 1

    async def _greet(self, requests: AsyncIterator[wire.WorkerMessage], context: Stream) -> WorkerFacts:
        message = await anext(requests)
        introduction, challenge = wire.introduction(message), None
        try:
            if introduction is not None:
                challenge = self._gate.challenge(introduction)
                await context.write(wire.challenge(challenge))
                message = await anext(requests)
            if not message.HasField("hello"):
                raise Invalid("hello", "must come first")
            hello = message.hello
            if introduction is not None and not _is_of(introduction, hello.worker_id, hello.incarnation):
                raise Invalid("hello.worker_id", "must be the introduction's, as must be its incarnation")
            self._gate.check(introduction, challenge, hello.proof, certificate_names(context.auth_context()))
        except Unauthenticated as refused:
            self.refusals.note(source_of(context.peer()), refused, introduction.worker_id if introduction else "")
            raise
        facts = wire.facts(hello)
        if difference := self._shell.misfit(facts):
            _log.warning("worker %s refused: %s", facts.worker_id, difference)
            raise Misfit(difference)
        return facts

    def _open(self, facts: WorkerFacts, call: Call | None) -> _Link:
        if (old := self._links.get(facts.worker_id)) is not None:
            old.close("a newer stream names the same worker")
        link = _Link(wire.welcome(self._router_id, self._load_report_interval_s), call)
        self._links[facts.worker_id] = link
        self._shell.joined(facts)
        return link

    async def _receive(self, requests: AsyncIterator[wire.WorkerMessage], worker_id: str, link: _Link) -> None:
        def take(message: wire.WorkerMessage) -> None:
            if self._links.get(worker_id) is not link:
                return
            hand_on(self._shell, wire.events(worker_id, message), link.carry_out)

        try:
            if isinstance(requests, Call):
                requests.at_once(take)
            async for message in requests:
                take(message)
            link.close("it closed its stream")
        except Exception:  # whatever it was, the link must not stay up with nobody reading it
            _log.exception("worker %s: reading its stream failed", worker_id)
            link.close("reading its stream failed")

    def _over(self, worker_id: str, link: _Link, why: str) -> None:
        _log.info("worker %s unlinked: %s", worker_id, why)
        if self._links.get(worker_id) is link:
            del self._links[worker_id]
            self._shell.handle(ev.WorkerLost(worker_id, why))


def hand_on(shell: Shell, events: Sequence[ev.Event], carry_out: Callable[[], None]) -> None:
    """What begins answers reaches its readers before the rest is looked at, unless we lag: then what several steps gave
    an answer is one piece."""
    lags = shell.owes_readers
    for number, event in enumerate(events):
        if number and not lags:
            carry_out()
        shell.handle(event)


def _is_of(introduction: Introduction, worker_id: str, incarnation: str) -> bool:
    return (introduction.worker_id, introduction.incarnation) == (worker_id, incarnation)


async def _send(context: Stream, link: _Link) -> None:
    while True:
        message = await link.get()
        try:
            await context.write(message)
        except Exception as error:  # grpc.aio raises several kinds for a stream that is over
            link.close(f"writing to its stream failed: {type(error).__name__}")
            return
