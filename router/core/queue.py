"""Where requests wait, and in which order they leave.

One queue per pool. The order is all that a queue decides; whether the head can be placed is the core's question. So a
fairer order replaces `FirstCome` alone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, Protocol

from router.core.request import Lane


class Waiting(NamedTuple):
    """What an order may depend on."""

    request_id: str
    tenant: str
    lane: Lane
    #: Prompt tokens to compute.
    prompt_tokens: int
    #: Tokens it may generate.
    max_tokens: int


class DispatchQueue(Protocol):
    """Every method costs O(log n) or better."""

    #: Prompt tokens waiting.
    tokens: int

    def __len__(self) -> int: ...

    def __contains__(self, request_id: object) -> bool: ...

    def push(self, waiting: Waiting, *, again: bool = False) -> None:
        """`again`: it was dispatched before, is charged already, and goes ahead of what was not."""
        ...

    def peek(self) -> str | None:
        """The request that leaves next. Stable until the queue changes."""
        ...

    def pop(self) -> str:
        """Takes the head, charging its flow for what it is expected to cost."""
        ...

    def remove(self, request_id: str) -> None:
        """Takes out a request that ended while waiting; nothing is charged. KeyError when it isn't here."""
        ...

    def settle(self, waiting: Waiting, prompt_tokens: int, completion_tokens: int) -> None:
        """A dispatched request ended; corrects its flow's charge to what it really used."""
        ...


class FirstCome:
    """In order of arrival, over all tenants and lanes. What it charges nobody asks for."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, Waiting] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._waiting

    def push(self, waiting: Waiting, *, again: bool = False) -> None:
        assert waiting.request_id not in self._waiting
        self._waiting[waiting.request_id] = waiting
        if again:
            self._waiting.move_to_end(waiting.request_id, last=False)
        self.tokens += waiting.prompt_tokens

    def peek(self) -> str | None:
        return next(iter(self._waiting), None)

    def pop(self) -> str:
        request_id, waiting = self._waiting.popitem(last=False)
        self.tokens -= waiting.prompt_tokens
        return request_id

    def remove(self, request_id: str) -> None:
        self.tokens -= self._waiting.pop(request_id).prompt_tokens

    def settle(self, waiting: Waiting, prompt_tokens: int, completion_tokens: int) -> None:
        pass
