"""The seam to what computes.

An engine serves *legs*. A prefill leg computes a prompt, samples one token and, when asked to, pins the prompt's KV
blocks under a lease and returns a handle to them. A decode leg continues from a prompt whose KV was fetched before the
leg began, or computes the prompt itself. The order is always **fetch, confirm, then admit**: bytes land in the
engine's staging memory and their lease is confirmed before the engine's scheduler hears of the request. So the
scheduler never waits for a network, a failed transfer never reaches it, and no unconfirmed byte is ever attended to.

**Overlap.** A prompt of several chunks moves while it is computed. The prefill engine says `offered` once its first
chunk is done (`KvNode.stream`) and publishes what every step adds (`KvNode.publish`); the decode engine is asked to
`fetch` that handle *ahead*, which returns when the prompt is complete, read and confirmed. Nothing else changes: the
decode leg comes after, and every failure on this way costs the time that was to be saved.

Values that cross this seam are frozen; token ids are tuples of ints; durations are seconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from kv_transfer.api import Outcome
from trust.tls import TlsFiles


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


class FailureKind(Enum):
    """Why a leg failed, by what the caller may do next. Numbers are those of `protos/worker_link.proto`."""

    REJECTED = 1
    TRANSFER = 2
    INVALID = 3
    ENGINE = 4
    EXPIRED = 5


#: What a fetch that failed means for its leg.
FETCH_FAILURES: Mapping[Outcome, FailureKind] = {
    Outcome.STALE: FailureKind.TRANSFER,
    Outcome.FAILED: FailureKind.TRANSFER,
    Outcome.REFUSED: FailureKind.INVALID,
    Outcome.FULL: FailureKind.REJECTED,
    Outcome.CORRUPT: FailureKind.TRANSFER,
}


class LegError(Exception):
    """A leg ended without a result."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(f"{kind.name.lower()}: {detail}")
        self.kind = kind
        self.detail = detail


class StructureKind(Enum):
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    #: EBNF, with a rule called root.
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Structure:
    """What the whole answer must look like. `text` is the schema, expression or grammar."""

    kind: StructureKind
    text: str = ""


#: What not every engine can do, by the names that `ModelInfo.features` has.
STRUCTURE, LOGIT_BIAS = "structure", "logit_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop. Validated by the router; engines may trust it.

    `max_tokens` counts tokens still to generate on this leg. `logprobs` is None (report none) or the number of
    alternatives beside the sampled token. Stop *strings* never reach an engine: the router's edge owns text.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    structure: Structure | None = None
    #: Added to tokens' logits before anything else.
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The sampled token's log probability and the best alternatives, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    name: str
    #: Hash over configuration and weights: two workers with the same revision compute the same thing.
    revision: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    #: What requests may ask for beyond what every engine does.
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    kind: str
    version: str
    model: ModelInfo
    block_tokens: int
    kv_blocks: int
    #: Sequences the engine runs at once.
    max_running: int
    #: host:port of the engine's KvPeer service.
    kv_address: str
    kv_incarnation: str
    #: Layout fingerprint, see kv_transfer.layout.
    kv_layout: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLeg:
    leg_id: str
    tenant: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: str = ""
    #: Pin the blocks and return a handle to them.
    hand_off: bool
    #: The one worker that may use the handle; empty lets any.
    reader: str = ""
    #: The decode worker samples the first token again, so hand off even when this leg sampled a stop token.
    resample: bool = False
    lease_ttl_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillResult:
    token_id: int
    logprobs: TokenLogprobs | None = None
    #: Set when the first token ends the answer.
    finish_reason: FinishReason | None = None
    #: Serialized handle (kv_transfer.handle); None unless asked for.
    handle: bytes | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLeg:
    leg_id: str
    tenant: str
    #: Prompt and every token generated so far.
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: Sampling
    cache_salt: str = ""
    #: What `fetch` returned for this leg; None means: compute the prompt here.
    staged: Staged | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """KV bytes of the first `tokens` tokens of a prompt: here, confirmed, not yet attended to.

    Belongs to one leg. Either a decode leg consumes it or `discard` frees it.
    """

    #: "<transfer>#<word>", where the transfer is named like the prefill leg that offered the bytes.
    staged_id: str
    tokens: int
    transport: str
    transfer_bytes: int
    fetch_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one engine step (or a few, when the reader lagged) gave one decode leg."""

    leg_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLane:
    """How KV moves between this engine and one peer, as measured; `refusal` names why it can't."""

    peer: str
    transport: str = ""
    gigabytes_per_s: float = 0.0
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """A snapshot for the status API; all zero but `kv_blocks_total` and `kv_blocks_free` when idle."""

    running: int = 0
    waiting: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    leases_held: int = 0
    leased_blocks: int = 0
    staged_pages: int = 0
    transfer_bytes_total: int = 0
    transfer_failures_total: int = 0
    leases_expired_total: int = 0
    #: Of the failures: bytes that were not the owner's (kv_verify).
    transfers_corrupt_total: int = 0
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What a worker tells its engine. Sizes in bytes or tokens; one value object for both engines."""

    #: The worker's id: the engine's name among its peers.
    name: str
    #: A Hugging Face model directory. The sim engine reads its config.json and needs no weights.
    model: str
    served_model_name: str
    #: Authenticates handles and peers; the same in all workers of a cluster.
    cluster_secret: bytes = field(repr=False)
    kv_host: str = "127.0.0.1"
    #: What this worker shows to routers and to its peers, and whom it believes: on its links, and on the ways of KV
    #: that go over a network.
    tls: TlsFiles = TlsFiles()
    #: Allowed transports, best first; what this machine lacks is left out. A pair takes the first that both have.
    transports: tuple[str, ...] = ("nixl", "shm", "tcp")
    block_tokens: int = 32
    kv_cache_bytes: int = 256 * 1024 * 1024
    #: Bytes for fetched blocks that no decode leg has taken yet.
    staging_bytes: int = 64 * 1024 * 1024
    max_running: int = 64
    #: Tokens one engine step computes at most; longer prompts are prefilled in chunks.
    max_batched_tokens: int = 2048
    #: Of these, tokens of one prompt; 0: as many as fit. The rest is left to others, who would wait for that prompt.
    long_prefill_token_threshold: int = 0
    #: None takes the model's own.
    max_model_len: int | None = None
    prefix_caching: bool = True
    #: Digests of every block that is handed over, made by its owner and compared by its reader; in host memory only.
    #: All workers of a cluster or none.
    kv_verify: bool = False
    dtype: str = "auto"
    #: "auto", "cpu" or "cuda".
    device: str = "auto"
    #: Threads that compute on a CPU. 0: what OMP_NUM_THREADS says, or one; `tandem up` shares this machine's cores out.
    cpu_threads: int = 0
    seed: int = 0
    #: Sim engine: a row of engine/step_time.py ("h200-llama-3.1-8b", ...), and how much faster than real; 0 waits for
    #: nothing.
    step_time: str = "h200-llama-3.1-8b"
    speedup: float = 0.0
    #: Sim engine: KV bytes per token; None derives them from the model's configuration.
    kv_bytes_per_token: int | None = None


#: Told the handle to blocks that are still being computed.
Offered = Callable[[bytes], None]

#: Takes an output of a leg.
Take = Callable[[StepOutput], None]


class Engine(Protocol):
    """One model on one set of devices. Created unstarted; all methods are called from one event loop."""

    async def start(self) -> EngineInfo:
        """Loads the model, warms up, opens the KV endpoint. Returns when a leg could be served at once."""
        ...

    async def stop(self) -> None:
        """Frees everything; legs still running fail with ENGINE. Idempotent."""
        ...

    async def prefill(self, leg: PrefillLeg, offered: Offered | None = None) -> PrefillResult:
        """Raises LegError. Cancelling the awaiting task aborts the leg and frees its blocks within a step.

        `offered` is called at most once, in the event loop and before this returns: with a handle to all of the
        prompt's blocks, which can be read as they become whole. The result's handle is the same, unless the first had
        to be withdrawn: then whoever reads by that finds it stale, and the result has another, or none.
        """
        ...

    async def fetch(self, handle: bytes, timeout_s: float, *, ahead: bool = False) -> Staged:
        """Reads a handle's blocks into staging and confirms the lease held to the end, then releases it.

        Raises LegError(TRANSFER) when the bytes did not arrive or the lease did not hold, LegError(INVALID) when the
        handle is refused, LegError(REJECTED) when there is no room. Cancelling stops the read; the owner is told either
        way. `ahead`: before the blocks are sure to be wanted. Then there is room only while there is plenty, and one
        that fails, is cancelled or discarded leaves the handle as good as it was, for another fetch.
        """
        ...

    async def discard(self, staged: Staged) -> None: ...

    def decode(self, leg: DecodeLeg, take: Take | None = None) -> AsyncIterator[StepOutput]:
        """Yields until an output carries a finish reason. Raises LegError. Closing the iterator aborts the leg.

        Outputs before the one that ends the leg may go to `take` instead, in the very turn of the event loop that
        brings them: a step of many legs is then no change of tasks for each. It must not raise.
        """
        ...

    async def release(self, handle: bytes) -> None:
        """Owner's side: ends the lease of a handle that nobody will read. Unknown or ended leases are ignored."""
        ...

    async def connect(self, peer: str, address: str) -> PeerLane:
        """Meets a peer's KV endpoint: compares layouts, wires the transport up, measures it."""
        ...

    async def load(self) -> EngineLoad: ...

    async def wait_dead(self) -> str:
        """Returns, with the reason, when the engine can serve no more. For the worker to exit on."""
        ...
