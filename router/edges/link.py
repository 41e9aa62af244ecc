"""One end of the socket between the core's process and an edge's: frames out in one write per turn of the loop, frames
in as they come, questions with their answers. Never waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from router.core.errors import Internal, TandemError, Unavailable
from router.edges import wire

#: Unread by the other end. It reads all the time, so this much means that it is stuck.
BACKLOG_BYTES_MAX = 32 << 20
_QUESTIONS_MAX = 1024

_log = logging.getLogger(__name__)


class Link(asyncio.Protocol):
    def __init__(
        self,
        kind: Any,
        take: Callable[[Any], None],
        answer: Callable[[wire.Question], Awaitable[object]],
        *,
        lost: Callable[[str], None],
        after_read: Callable[[], None] = lambda: None,
        last: Callable[[], wire.Message | None] = lambda: None,
    ) -> None:
        """`take` gets messages of `kind`; questions are for `answer`. `last` may add a message to each write. `lost`,
        called once, says why."""
        self._kind = kind
        self._take = take
        self._answer = answer
        self._lost = lost
        self._after_read = after_read
        self._last = last
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unread = bytearray()
        self._unsaid: list[wire.Message] = []
        self._flushing: asyncio.Handle | None = None
        self._numbers = count(1)
        self._asked: dict[int, asyncio.Future[wire.Told]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self.lost_because = ""

    # Speaking.

    def say(self, message: wire.Message) -> None:
        """With all else that this turn of the loop says."""
        self._unsaid.append(message)
        self.will_flush()

    def will_flush(self) -> None:
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self.flush)

    def flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if self._transport is None and not self.lost_because:
            return  # it is said when there is a connection
        unsaid, self._unsaid = self._unsaid, []
        if (last := self._last()) is not None:
            unsaid.append(last)
        if self._transport is None or self.lost_because or not unsaid:
            return
        self._transport.write(b"".join(map(wire.frame, unsaid)))
        if self.backlog_bytes > BACKLOG_BYTES_MAX:
            self.cut(f"the other end left {self.backlog_bytes} bytes unread")

    @property
    def backlog_bytes(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    async def ask(self, question: wire.Question, kind: Any, timeout_s: float) -> Any:
        """The answer, of this kind. Raises TandemError: what the other end said, or Unavailable."""
        if self.lost_because or len(self._asked) >= _QUESTIONS_MAX:
            raise _no_answer()
        number = next(self._numbers)
        told: asyncio.Future[wire.Told] = self._loop.create_future()
        self._asked[number] = told
        self.say(wire.Ask(number, question))
        try:
            async with asyncio.timeout(timeout_s):
                return wire.read_answer(await told, kind)
        except (TimeoutError, wire.Malformed):
            raise _no_answer() from None
        finally:
            del self._asked[number]

    # Listening.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self.flush()

    def data_received(self, data: bytes) -> None:
        self._unread += data
        try:
            for message in wire.messages(self._unread, self._kind):
                if self.lost_because:
                    return
                if isinstance(message, wire.Told):
                    self._told(message)
                elif isinstance(message, wire.Ask):
                    self._begin_answer(message)
                else:
                    self._take(message)
        except wire.Malformed as error:
            self.cut(f"it said what nobody should: {error}")
        self._after_read()

    def _told(self, told: wire.Told) -> None:
        asked = self._asked.get(told.number)
        if asked is not None and not asked.done():
            asked.set_result(told)

    def _begin_answer(self, ask: wire.Ask) -> None:
        if len(self._answering) >= _QUESTIONS_MAX:
            self.say(wire.Told(ask.number, error=_no_answer()))
            return
        answering = self._loop.create_task(self._find_answer(ask))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)

    async def _find_answer(self, ask: wire.Ask) -> None:
        try:
            told = wire.answer(ask.number, await self._answer(ask.question))
        except TandemError as error:
            told = wire.Told(ask.number, error=error)
        except Exception:
            _log.exception("internal error")
            told = wire.Told(ask.number, error=Internal("internal error; the server's log has the details"))
        self.say(told)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over("it closed its end" if exc is None else f"its end broke: {exc}")

    def cut(self, why: str) -> None:
        """Ends it from here."""
        if self._transport is not None:
            self._transport.abort()
        self._over(why)

    def _over(self, why: str) -> None:
        if self.lost_because:
            return
        self.lost_because = why
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(_no_answer())
        for answering in self._answering:
            answering.cancel()
        self._lost(why)


def _no_answer() -> Unavailable:
    return Unavailable("CORE_UNREACHABLE", "the router's processes do not reach each other", retry_after_s=1.0)
