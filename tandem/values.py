"""What the client hands out: plain values. Durations are in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypedDict


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen and when to stop. What is absent or None takes the model's default; the server checks the
    ranges."""

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool | None
    #: Alternatives to report beside each sampled token; 0 reports the sampled token alone, None nothing.
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A sampled token's log probability and its best alternatives, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The next piece of the answer. `token_ids` is empty unless asked for; text may lag tokens by a character."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """As the router saw them. `ttft_s` is from arrival to the first token; `handoff_s` from there to the decode
    worker's first step, of which `transfer_s` was bytes on the move."""

    queue_s: float
    prefill_s: float
    ttft_s: float
    handoff_s: float
    transfer_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Who did the work. `transport` is empty when no KV blocks moved."""

    prefill_worker: str
    decode_worker: str
    transport: str
    transfer_bytes: int
    retries: int
    local_prefill: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of an answer."""

    reason: FinishReason
    stop_match: str
    usage: Usage
    timings: Timings
    route: Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finished: Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    max_model_len: int
    vocab_size: int
    ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A worker's own report of itself; all but the totals are zero, and all blocks free, when it is idle."""

    prefill_running: int
    decode_running: int
    kv_blocks_free: int
    kv_blocks_total: int
    leases_held: int
    leased_blocks: int
    staged_pages: int
    transfer_bytes_total: int
    transfer_failures_total: int
    leases_expired_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """How KV moves from one peer to a worker; `refusal` names why it cannot."""

    peer: str
    transport: str
    gigabytes_per_s: float
    refusal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    worker_id: str
    incarnation: str
    role: Role | None
    #: joining, ready or draining
    state: str
    model: str
    engine: str
    pid: int
    load: Load
    #: Legs the router holds open there, and how many it may.
    prefill_legs: int
    decode_legs: int
    prefill_legs_max: int
    decode_legs_max: int
    lanes: tuple[Lane, ...]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    request_id: str
    tenant: str
    state: str
    age_s: float
    prefill_worker: str
    decode_worker: str
    prompt_tokens: int
    completion_tokens: int
    transport: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    router_id: str
    uptime_s: float
    workers: tuple[WorkerStatus, ...]
    requests_queued: int
    requests_running: int
    #: Open requests; empty unless asked for.
    requests: tuple[RequestStatus, ...]
    #: How many requests have ended, by outcome: finished, refused, cancelled, expired, failed.
    outcomes: Mapping[str, int]
    #: Callers are not asked who they are.
    unauthenticated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """What a request waited for. `own_*` and `others_*` are what it found before it, cost in the units of shares."""

    #: None while it waits, and if it was never dispatched.
    queue_s: float | None
    #: Of that, since its tenant's tokens in flight were at their limit; and as the next in line, for room at a worker.
    capped_s: float
    stuck_s: float
    own_requests: int
    own_cost: float
    others_requests: int
    others_cost: float
    predicted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was predicted of a worker: prompt tokens to compute there, others' before it included, of its own those
    cached; `ttft_s` is None where the router knows no step times."""

    worker_id: str
    cached_tokens: int
    tokens: int
    ttft_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    why: str
    decode_worker: str
    chosen: Figures
    #: The best of those that were not taken.
    runner_up: Figures | None
    local_prefill: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    prefill_worker: str
    decode_worker: str
    transport: str
    nbytes: int
    transfer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    #: The most that it could use, set aside when it was admitted.
    reserved_tokens: int
    reserved_money_micros: int
    #: False while it is open, and if it was never dispatched; then nothing is charged.
    settled: bool
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    money_micros: int
    price_plan: str
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStory:
    """Why a request was served as it was."""

    request_id: str
    tenant: str
    model: str
    lane: str
    state: str
    #: Seconds since 1970.
    arrived_at: float
    #: How it ended, if badly.
    reason: str
    error: str
    retry_after_s: float | None
    waited: Waited
    placement: Placement | None
    handoff: Handoff | None
    ttft_s: float | None
    preemptions: int
    retries: int
    charge: Charge
    #: (seconds since arrival, what happened)
    lines: tuple[tuple[float, str], ...]
    #: The W3C trace that the call was part of; empty without one.
    trace_id: str = ""
    #: For operators who did not say whose: the other tenants with a request of this id. This is the latest.
    other_tenants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantFields:
    """A tenant as a router has it; values as the tenants' file spells them."""

    name: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """An API key without its secret. Times are in seconds since 1970."""

    id: str
    env: str
    tenant: str
    #: live, expired or revoked
    state: str
    scopes: tuple[str, ...]
    lane_max: str
    created: float
    expires: float | None
    revoked: float | None
