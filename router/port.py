"""The narrow port between an edge and the core that decides: values in, a stream of event values out.

Nothing here needs the two to share a process. An edge in another process gets its own implementation of `CorePort`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from router.core.effects import ClientEvent, Failed, Finished, Tokens
from router.core.request import GenerationRequest
from router.core.snapshot import Snapshot
from router.core.worker import ModelFacts, Role


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
        request_id: str,
        *,
        tokens_max: int,
        cancel: Callable[[str], None],
        stop_matched: Callable[[str, int], None],
        overrun: Callable[[str], None],
    ) -> None:
        self.request_id = request_id
        self._tokens_max = tokens_max
        self._cancel = cancel
        self._stop_matched = stop_matched
        self._overrun = overrun
        self._waiting: deque[ClientEvent] = deque()
        self._arrived = asyncio.Event()
        #: The core said the last word.
        self._ended = False
        self._read_to_end = False

    # The core's side.

    def put(self, event: ClientEvent) -> None:
        assert not self._ended
        waiting = self._waiting
        if isinstance(event, Tokens) and waiting and isinstance(waiting[-1], Tokens):
            last = waiting[-1]
            waiting[-1] = Tokens(last.token_ids + event.token_ids, last.logprobs + event.logprobs)
        else:
            waiting.append(event)
        self._ended = not isinstance(event, Tokens)
        self._arrived.set()
        newest = waiting[-1]
        if isinstance(newest, Tokens) and len(newest.token_ids) > self._tokens_max:
            self._overrun(self.request_id)

    # The edge's side.

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> ClientEvent:
        if self._read_to_end:
            raise StopAsyncIteration
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._waiting.popleft()
        self._read_to_end = isinstance(event, Finished | Failed)
        return event

    def stop_matched(self, completion_tokens: int) -> None:
        """The answer is to end with its first `completion_tokens` tokens. Read on, to the Finished."""
        if not self._ended:
            self._stop_matched(self.request_id, completion_tokens)

    def close(self) -> None:
        """The reader leaves. Idempotent; cancels what has not ended."""
        if not self._ended:
            self._cancel(self.request_id)


class CorePort(Protocol):
    """What an edge for clients may ask."""

    def now(self) -> float:
        """Seconds, on the clock of arrivals and deadlines."""
        ...

    def submit(self, request: GenerationRequest) -> RequestStream: ...

    def models(self) -> list[ModelView]: ...


class AdminPort(Protocol):
    """What an edge for operators may ask. Raise NotFound for a worker that is not linked."""

    def snapshot(self, *, requests: bool) -> Snapshot: ...

    def drain(self, worker_id: str) -> None: ...

    def set_role(self, worker_id: str, role: Role) -> None: ...
