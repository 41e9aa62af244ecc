"""Why a request was served as it was: admitted when, waited for what, placed where and why, charged what."""

from __future__ import annotations

from dataclasses import dataclass

from router.core.errors import TandemError
from router.core.fair import Ahead
from router.core.lifecycle import State
from router.core.request import Lane
from router.core.usage import UsageFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Names no other tenant: what a request waited behind is told as a sum."""

    request_id: str
    tenant: str
    lane: Lane
    state: State
    #: How it ended, if badly.
    error: TandemError | None
    #: What it found before it when it came; None when it was refused before that was asked.
    ahead: Ahead | None
    #: From arrival to dispatch; None while it waits, and when it never was.
    queue_s: float | None
    #: Of that, because its tenant's tokens in flight were at their limit. The rest was for its turn and for workers.
    capped_s: float
    #: Workers that served it last, and why these.
    prefill_worker: str
    decode_worker: str
    placed: str
    preemptions: int
    retries: int
    #: None while it is open, and when it was never dispatched.
    usage: UsageFacts | None
    #: (seconds since arrival, what happened)
    lines: tuple[tuple[float, str], ...]
