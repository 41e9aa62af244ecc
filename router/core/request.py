"""What a generation is: the values that cross between edges, core and worker links."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Lane(Enum):
    """A priority class. Serving order between lanes belongs to the dispatch queue."""

    # An Enum's own hash is of the name and in Python; lanes are looked up many times per decision.
    __hash__ = object.__hash__

    REALTIME = "realtime"
    STANDARD = "standard"
    BATCH = "batch"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


class TokenLogprobs(NamedTuple):
    """The sampled token's log probability and the best alternatives, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class StructureKind(Enum):
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    #: EBNF, with a rule called root.
    GRAMMAR = "grammar"


class Structure(NamedTuple):
    """What the whole answer must look like. `text` is the schema, expression or grammar."""

    kind: StructureKind
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop. Complete and valid: edges fill defaults in and check ranges.

    `logprobs` is None (report none) or the number of alternatives beside the sampled token. Stop *strings* are text,
    so they stay at the edge.
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
    #: Token ids, and what is added to their logits.
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt, one answer. `request_id` is what its client calls it; `arrival` and `deadline` are seconds on the
    core's monotonic clock."""

    request_id: str
    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    arrival: float
    deadline: float
    tenant: str = "default"
    #: Names the credential it came with; not secret.
    key_id: str = ""
    lane: Lane = Lane.STANDARD
    cache_salt: bytes = b""
    #: The caller's trace, as W3C trace context has it; for whoever reads the story.
    trace_id: str = ""

    @property
    def key(self) -> str:
        """Names it among all that are open. Clients choose ids (without a slash), and only those of one tenant must
        differ: nobody can find out, or take, an id of another's."""
        return f"{self.tenant}/{self.request_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds, as the router saw them; 0 for a part that did not happen."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    #: Arrival to the first token handed to the edge.
    ttft_s: float = 0.0
    #: Prefill known to be done to the decode worker's first step.
    handoff_s: float = 0.0
    #: Bytes on the move, as the decode worker measured it.
    transfer_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Who served. Of a request that was run again, the workers that served it last."""

    prefill_worker: str = ""
    decode_worker: str = ""
    transport: str = ""
    transfer_bytes: int = 0
    retries: int = 0
    local_prefill: bool = False
