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
