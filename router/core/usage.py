"""What a request used and what that is charged, told once, when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.core.lifecycle import State
from router.core.request import Lane


class Used(NamedTuple):
    """What a record of usage settles a reservation at."""

    tokens: int
    money_micros: int


def record_id(tenant: str, request_id: str, admitted_wall_s: float) -> str:
    """A tenant may use a request's id again, but not while it is open."""
    return f"{tenant}/{request_id}@{admitted_wall_s:.6f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFacts:
    """Billed is what the client got: its prompt once it was computed, and the tokens of the answer. Of a request that
    ended while its prompt was being computed, the part that was. What retries and preemptions computed again is not
    billed, but what was computed in failed attempts counts in the tenant's share (`cost`)."""

    #: Of this one ended request, whatever happens to the router: who gets a record twice takes it once.
    record_id: str
    request_id: str
    tenant: str
    #: The credential's, not secret; empty where callers have none.
    key_id: str = ""
    model: str
    lane: Lane
    outcome: State
    #: Seconds since 1970.
    ended_wall_s: float
    #: Billed.
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    money_micros: int
    #: Empty without a price plan.
    price_plan: str = ""
    price_plan_version: str = ""
    #: Prompt tokens that workers computed for it, over all attempts.
    prefill_tokens_computed: int = 0
    #: What its flow was charged, in the units of fair shares.
    cost: float = 0.0
    #: Legs that failed, and times it gave way to others.
    retries: int = 0
    preemptions: int = 0
    transfer_bytes: int = 0
    queue_s: float = 0.0
    total_s: float = 0.0
    #: Known from the journal only, because the router died while it ran: an upper bound.
    estimated: bool = False
