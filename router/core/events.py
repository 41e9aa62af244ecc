"""Everything the core hears. Events about a leg that the core no longer knows are ignored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from router.core.request import FinishReason, GenerationRequest, TokenLogprobs
from router.core.tenant import TenantBook
from router.core.worker import Load, PeerLane, Role, WorkerFacts

# From edges.


@dataclass(frozen=True, slots=True)
class Submit:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    key: str


@dataclass(frozen=True, slots=True)
class Overrun:
    """The reader of this request's stream let more pile up than its buffer may hold."""

    key: str


@dataclass(frozen=True, slots=True)
class StopMatched:
    """The edge found a stop string; the answer ends with its first `completion_tokens` tokens."""

    key: str
    completion_tokens: int


# From workers.


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """The facts must fit, see `Core.misfit`. A worker known by the same id is lost at this moment."""

    facts: WorkerFacts


@dataclass(frozen=True, slots=True)
class WorkerLost:
    worker_id: str
    why: str = "link closed"


@dataclass(frozen=True, slots=True)
class LoadReported:
    worker_id: str
    load: Load


@dataclass(frozen=True, slots=True)
class Offered:
    worker_id: str
    leg_id: str
    handle: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDone:
    worker_id: str
    leg_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    handle: bytes = b""
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    worker_id: str
    leg_id: str
    transport: str
    nbytes: int
    fetch_s: float


class StepOutput(NamedTuple):
    leg_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """One engine step's tokens for all its legs: handled as one event."""

    worker_id: str
    outputs: tuple[StepOutput, ...]


class Failure(Enum):
    """Why a leg failed, by what may be done next. See `protos/worker_link.proto`."""

    REJECTED = "rejected"
    TRANSFER = "transfer"
    INVALID = "invalid"
    ENGINE = "engine"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class LegFailed:
    worker_id: str
    leg_id: str
    failure: Failure
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RoleChanged:
    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class DrainingAnnounced:
    worker_id: str


@dataclass(frozen=True, slots=True)
class PeerLaneReported:
    worker_id: str
    lane: PeerLane


# From operators.


@dataclass(frozen=True, slots=True)
class DrainRequested:
    worker_id: str


@dataclass(frozen=True, slots=True)
class SetRoleRequested:
    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class TenantsChanged:
    """What is open goes on; what waits and what comes is judged by this book."""

    book: TenantBook


@dataclass(frozen=True, slots=True)
class ShutdownRequested:
    """Refuse what comes; `final` also ends what is open."""

    final: bool = False


# From the clock.


@dataclass(frozen=True, slots=True)
class Tick:
    """`Core.next_deadline` has come."""


Event = (
    Submit
    | Cancel
    | Overrun
    | StopMatched
    | WorkerJoined
    | WorkerLost
    | LoadReported
    | Offered
    | PrefillDone
    | Fetched
    | StepOutputs
    | LegFailed
    | RoleChanged
    | DrainingAnnounced
    | PeerLaneReported
    | DrainRequested
    | SetRoleRequested
    | TenantsChanged
    | ShutdownRequested
    | Tick
)
