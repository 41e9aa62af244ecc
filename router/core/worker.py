"""What a worker says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

#: Names that `ModelFacts.features` may have.
STRUCTURE, LOGIT_BIAS = "structure", "logit_bias"


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    #: Serves whole requests alone.
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    name: str
    revision: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    #: What requests may ask for beyond what every engine does.
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Legs the worker takes at once, by role, and its KV memory."""

    prefill_legs: int
    decode_legs: int
    kv_blocks: int
    block_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEndpoint:
    """Where peers reach a worker's KV memory, and what lies there."""

    address: str = ""
    incarnation: str = ""
    layout: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """A worker's hello."""

    worker_id: str
    incarnation: str
    role: Role
    model: ModelFacts
    capacity: Capacity
    kv: KvEndpoint
    labels: Mapping[str, str] = field(default_factory=dict)
    engine: str = ""
    engine_version: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    prefill_running: int = 0
    decode_running: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    leases_held: int = 0
    leased_blocks: int = 0
    staged_pages: int = 0
    transfer_bytes_total: int = 0
    transfer_failures_total: int = 0
    leases_expired_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLane:
    """How KV moves from `peer` to the worker that reports it; `refusal` names why it can't."""

    peer: str
    transport: str = ""
    gigabytes_per_s: float = 0.0
    refusal: str = ""


def misfit(ours: WorkerFacts, theirs: WorkerFacts) -> str:
    """Names every fact that keeps two workers of one model from sharing requests; empty when they fit."""
    differences = [
        f"model.{name}: {_brief(mine)} in the pool, {_brief(other)} offered"
        for name in ("revision", "max_model_len", "vocab_size", "eos_token_ids", "features")
        if (mine := getattr(ours.model, name)) != (other := getattr(theirs.model, name))
    ]
    if ours.capacity.block_tokens != theirs.capacity.block_tokens:
        differences.append(
            f"capacity.block_tokens: {ours.capacity.block_tokens} in the pool, {theirs.capacity.block_tokens} offered"
        )
    mine_kv, their_kv = ours.kv.layout, theirs.kv.layout
    differences += [
        f"kv.layout.{name}: {mine_kv.get(name, 'absent')} in the pool, {their_kv.get(name, 'absent')} offered"
        for name in sorted({*mine_kv, *their_kv})
        if mine_kv.get(name) != their_kv.get(name)
    ]
    return "; ".join(differences)


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 64 else f"{text[:61]}..."
