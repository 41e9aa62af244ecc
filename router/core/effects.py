"""Everything the core wants done. The shell does it in order, and reports back with events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.core.budget import Record
from router.core.errors import TandemError
from router.core.request import FinishReason, Route, Sampling, Timings, TokenLogprobs, Usage
from router.core.usage import UsageFacts
from router.core.worker import Role, WorkerFacts

# To workers.


@dataclass(frozen=True, slots=True, kw_only=True)
class SendPrefill:
    worker_id: str
    leg_id: str
    tenant: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: bytes
    timeout_s: float
    hand_off: bool
    reader: str
    resample: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SendDecode:
    worker_id: str
    leg_id: str
    tenant: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: Sampling
    cache_salt: bytes
    timeout_s: float
    #: Empty: the worker computes the prompt itself.
    handle: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchAhead:
    """A hint to the decode worker: the blocks of this prefill leg, which goes on, can be read as they become whole."""

    worker_id: str
    leg_id: str
    handle: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True)
class CancelLeg:
    """Also ends what was fetched ahead for a prefill leg."""

    worker_id: str
    leg_id: str


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """To the owner of a handle that nobody will read."""

    worker_id: str
    handle: bytes


@dataclass(frozen=True, slots=True)
class SendPeers:
    """Workers to meet, beside those told of before."""

    worker_id: str
    peers: tuple[WorkerFacts, ...]


@dataclass(frozen=True, slots=True)
class SendDrain:
    worker_id: str


@dataclass(frozen=True, slots=True)
class SendSetRole:
    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class CloseLink:
    """The core has forgotten this worker."""

    worker_id: str
    why: str


# To disk.


@dataclass(frozen=True, slots=True)
class Journal:
    """To be appended to the journal before the effects that follow are carried out."""

    record: Record


@dataclass(frozen=True, slots=True)
class UsageRecorded:
    """Once per request that was dispatched, when it ends."""

    usage: UsageFacts


# To clients.


class Tokens(NamedTuple):
    """`logprobs` is empty or as long as `token_ids`."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    reason: FinishReason
    usage: Usage
    timings: Timings
    route: Route


@dataclass(frozen=True, slots=True)
class Failed:
    error: TandemError


ClientEvent = Tokens | Finished | Failed


class Emit(NamedTuple):
    """Tokens any number of times, then exactly one of Finished or Failed."""

    key: str
    event: ClientEvent


Effect = (
    Emit
    | SendPrefill
    | SendDecode
    | FetchAhead
    | CancelLeg
    | ReleaseLease
    | SendPeers
    | SendDrain
    | SendSetRole
    | CloseLink
    | Journal
    | UsageRecorded
)
