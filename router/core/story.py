"""Why a request was served as it was: admitted when, waited for what, placed where and why, charged what.

Names no other tenant: what a request waited behind is told as a sum. Stories of ended requests are kept up to a limit;
past it, who has more than an even part of them loses the oldest of its own, so that a tenant which is refused a
thousand times does not wipe out what others may want to ask about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.core.errors import TandemError
from router.core.fair import Ahead
from router.core.lifecycle import State
from router.core.request import Lane
from router.core.usage import UsageFacts


class Figures(NamedTuple):
    """What was predicted of a worker that could compute the prompt."""

    worker_id: str
    #: Prompt tokens that it probably has cached.
    cached_tokens: int
    #: Prompt tokens to compute there, others' before it included.
    tokens: int
    #: From then to the first token, the move included; None without a step-time model.
    ttft_s: float | None


class Placed(NamedTuple):
    why: str
    chosen: Figures
    #: The best of those that were not taken.
    runner_up: Figures | None


class Reserved(NamedTuple):
    """What was set aside for it when it was admitted: the most it can use."""

    tokens: int
    money_micros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    request_id: str
    trace_id: str
    tenant: str
    model: str
    lane: Lane
    state: State
    #: On the core's clock.
    arrival: float
    #: How it ended, if badly.
    error: TandemError | None
    #: What it found before it when it came; None when it was refused before that was asked.
    ahead: Ahead | None
    #: From arrival to dispatch; None while it waits, and when it never was.
    queue_s: float | None
    #: Of that, because its tenant's tokens in flight were at their limit; and as the next in line, because no worker
    #: had room. The rest was for its turn.
    capped_s: float
    stuck_s: float
    #: Where it was placed last, and why there.
    placed: Placed | None
    prefill_worker: str
    decode_worker: str
    #: Of the last hand-off; empty and 0 where nothing was moved.
    transport: str
    transfer_bytes: int
    transfer_s: float
    local_prefill: bool
    ttft_s: float | None
    preemptions: int
    retries: int
    #: None for one that was refused.
    reserved: Reserved | None
    #: None while it is open, and when it was never dispatched.
    usage: UsageFacts | None
    #: (seconds since arrival, what happened)
    lines: tuple[tuple[float, str], ...]


class History:
    """Stories of requests that ended. Of an id that a tenant used twice the later one is kept."""

    def __init__(self, stories_max: int) -> None:
        self._max = stories_max
        self._count = 0
        #: By tenant, then by request, oldest first; tenants by whose latest story is oldest.
        self._by_tenant: dict[str, dict[str, Story]] = {}

    def __len__(self) -> int:
        return self._count

    def add(self, story: Story) -> None:
        mine = self._by_tenant.pop(story.tenant, {})
        self._by_tenant[story.tenant] = mine
        self._count += mine.pop(story.request_id, None) is None
        mine[story.request_id] = story
        if self._count > self._max:
            even = self._max // len(self._by_tenant)
            self._drop_oldest(story.tenant if len(mine) > even else next(iter(self._by_tenant)))

    def find(self, request_id: str) -> list[Story]:
        """Of every tenant that had a request of this id."""
        return [mine[request_id] for mine in self._by_tenant.values() if request_id in mine]

    def check_integrity(self) -> None:
        assert self._count == sum(map(len, self._by_tenant.values())) <= self._max
        assert all(self._by_tenant.values())

    def _drop_oldest(self, tenant: str) -> None:
        mine = self._by_tenant[tenant]
        del mine[next(iter(mine))]
        self._count -= 1
        if not mine:
            del self._by_tenant[tenant]
