"""The narrow port between an edge and the core that decides: values in, a stream of event values out.

Nothing here needs the two to share a process. An edge in another process gets its own implementation of `CorePort`.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from router.core.effects import ClientEvent, Failed, Finished, Tokens
from router.core.rate import RateLeft
from router.core.request import GenerationRequest, TokenLogprobs
from router.core.snapshot import Snapshot
from router.core.stats import Stats
from router.core.story import Story
from router.core.worker import ModelFacts, Role

_log = logging.getLogger(__name__)


class ModelView(NamedTuple):
    name: str
    #: What the model's workers said of it; None until the first one joined.
    facts: ModelFacts | None
    ready: bool


class RequestStream:
    """What one request gives: any number of Tokens, then one Finished or Failed; then the iteration ends.

    While the reader lags, tokens are merged into one event. At most `tokens_max` may wait; one more and the core is
    told, which ends the request.
    """

    def __init__(
        self,
        key: str,
        *,
        tokens_max: int,
        cancel: Callable[[str], None],
        stop_matched: Callable[[str, int], None],
        overrun: Callable[[str], None],
    ) -> None:
        #: As the core knows the request.
        self._key = key
        self._tokens_max = tokens_max
        self._cancel = cancel
        self._stop_matched = stop_matched
        self._overrun = overrun
        #: Tokens that the reader has not taken yet, and the last word once the core has said it.
        self._token_ids = array("Q")
        self._logprobs: list[TokenLogprobs] = []
        #: Log probabilities among them, which count as tokens do.
        self._alternatives = 0
        self._end: Finished | Failed | None = None
        #: The reader waits for it.
        self._arrived: asyncio.Future[None] | None = None
        self._read_to_end = False
        #: Tries to take what came, while the reader waits; says whether it did.
        self._at_once: Callable[[], bool] | None = None

    # The core's side.

    def put(self, event: ClientEvent) -> None:
        assert self._end is None
        if isinstance(event, Tokens):
            self._token_ids.extend(event.token_ids)
            if event.logprobs:
                self._logprobs += event.logprobs
                self._alternatives += sum(1 + len(entry.top) for entry in event.logprobs)
            if len(self._token_ids) + self._alternatives > self._tokens_max:
                self._overrun(self._key)
        else:
            self._end = event

    def arrived(self) -> None:
        """After `put`, once all that belongs to its event is done."""
        if self._arrived is None or self._arrived.done():
            return  # the reader is busy, and will look
        if self._end is not None or self._at_once is None or not self._at_once():
            self._arrived.set_result(None)

    # The edge's side.

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> ClientEvent:
        if self._read_to_end:
            raise StopAsyncIteration
        if not self._token_ids and self._end is None:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        if self._token_ids or self._end is None:
            return self.take()
        self._read_to_end = True
        return self._end

    def take(self) -> Tokens:
        """Those that wait; there may be none."""
        tokens = Tokens(tuple(self._token_ids), tuple(self._logprobs))
        self._token_ids, self._logprobs, self._alternatives = array("Q"), [], 0
        return tokens

    def at_once(self, take: Callable[[], bool]) -> None:
        """While the reader waits, `take` is asked first, in the very turn of the loop that brings tokens: it takes them
        and says True, or False, and the reader is woken. So a token costs no change of tasks."""
        self._at_once = take

    def stop_matched(self, completion_tokens: int) -> None:
        """The answer is to end with its first `completion_tokens` tokens. Read on, to the Finished."""
        if self._end is None:
            self._stop_matched(self._key, completion_tokens)

    def close(self) -> None:
        """The reader leaves. Idempotent; cancels what has not ended."""
        if self._end is None:
            self._cancel(self._key)


class Arriving(Protocol):
    def arrived(self) -> None:
        """After what was put, once all that belongs to its event is done."""
        ...


def tell_readers(streams: Iterable[Arriving]) -> None:
    """Of what came for them. A fault of one reader's is not the others'."""
    for stream in streams:
        try:
            stream.arrived()
        except Exception:
            _log.exception("internal error")


class CorePort(Protocol):
    """What an edge for clients may ask."""

    def now(self) -> float:
        """Seconds, on the clock of arrivals and deadlines."""
        ...

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Raises AlreadyExists when an open request of its tenant has its id, Unavailable when the core is out of
        reach; or the stream says so, as it says every other refusal."""
        ...

    def models(self) -> list[ModelView]: ...

    async def rates(self, tenant: str) -> tuple[RateLeft, ...]:
        """What is left of the tenant's limits on requests and tokens; empty without such limits."""
        ...


class AdminPort(Protocol):
    """What an edge for operators may ask. Raise NotFound for a worker that is not linked."""

    async def explain(self, request_id: str, tenant: str | None) -> list[tuple[Story, float]]:
        """Of each tenant that has a request of this id its story, and when it came in seconds since 1970; the latest
        first. Given a tenant, only of that tenant's."""
        ...

    async def snapshot(self, *, requests: bool = False) -> Snapshot: ...

    async def stats(self) -> Stats: ...

    async def drain(self, worker_id: str) -> None: ...

    async def set_role(self, worker_id: str, role: Role) -> None: ...
