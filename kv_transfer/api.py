"""What crosses KvNode's border: values and errors that engines, connectors and workers may hold.

Imports nothing heavy, so that a worker can speak of fetches without loading gRPC or a transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

MiB = 1 << 20


class Outcome(Enum):
    """How a fetch ended."""

    STAGED = 1
    #: The lease did not hold until the bytes were in; they were thrown away. The prefill must be done again.
    STALE = 2
    #: The bytes did not arrive: link, timeout, owner gone, cancelled.
    FAILED = 3
    #: The handle is not authentic, not for this node, used before, or names blocks this node can't use.
    REFUSED = 4
    #: No staging room, or too many fetches at once. The handle stays good: try again, here or later.
    FULL = 5
    #: The lease held, but the bytes do not match the owner's digests; they were thrown away. As after STALE.
    CORRUPT = 6


class FetchError(Exception):
    """A fetch that did not end STAGED; nothing of it is left in staging."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(f"{outcome.name.lower()}: {detail}")
        self.outcome = outcome
        self.detail = detail


class OfferRefused(Exception):
    """The lease board can't take this lease (full, or too many blocks); the blocks stay the caller's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Blocks that are in staging memory and whose lease held to the end. `KvNode.discard(staged_id)` frees them."""

    staged_id: str
    tokens: int
    transport: str
    nbytes: int
    fetch_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """How bytes move between this node and a peer, as measured when they met; `refusal` names why they can't."""

    peer: str
    transport: str = ""
    gigabytes_per_s: float = 0.0
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLimits:
    """Every bound of a KvNode. Durations in seconds."""

    #: Leases held at once.
    rows: int = 256
    blocks_per_row: int = 4096
    #: A lease asked to last longer lasts this long.
    lease_ttl_s_max: float = 600.0
    #: Fetches at once; more are answered FULL.
    fetches: int = 32
    #: Peers known at once; the least recently used is forgotten.
    peers: int = 256
    #: Bytes per transport read: what a cancel or a deadline waits for at most, some milliseconds on a lane of 5 GB/s.
    #: Each piece costs a fixed part, which a fast lane would feel in smaller ones.
    piece_bytes: int = 32 * MiB
    #: Handles remembered as used; a replay of an older one finds its lease ended.
    used_handles: int = 4096
    #: Bytes of the self-test read when two nodes meet.
    self_test_bytes: int = MiB
    meet_timeout_s: float = 5.0
    #: A fetch that takes longer asks the owner, again and again, to keep the lease until its own deadline.
    extend_after_s: float = 2.0
    #: Calls that end a lease at its owner; those that fail are not repeated, the lease expires instead.
    release_timeout_s: float = 2.0
    releases_in_flight: int = 256
    #: Threads of the KvPeer server.
    server_threads: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStats:
    """A snapshot. All gauges are zero, and `staging_pages_free` equals `staging_pages`, when nothing is going on."""

    leases_held: int = 0
    leased_blocks: int = 0
    #: Ended leases that `take_ended` has not returned yet.
    leases_ended_untaken: int = 0
    leases_offered_total: int = 0
    leases_released_total: int = 0
    leases_expired_total: int = 0
    leases_cancelled_total: int = 0
    staging_pages: int = 0
    staging_pages_free: int = 0
    #: Pages of fetches that are staged or under way.
    staged_pages: int = 0
    #: Pages a failed read might still write into; they return when the peer is disconnected.
    quarantined_pages: int = 0
    fetches_in_flight: int = 0
    fetch_outcomes: Mapping[Outcome, int] = field(default_factory=lambda: MappingProxyType({}))
    transfer_bytes_total: int = 0
    releases_lost_total: int = 0
    lanes: tuple[Lane, ...] = ()

    @property
    def transfers_corrupt_total(self) -> int:
        return self.fetch_outcomes.get(Outcome.CORRUPT, 0)

    @property
    def transfer_failures_total(self) -> int:
        failures = (Outcome.FAILED, Outcome.STALE, Outcome.CORRUPT)
        return sum(self.fetch_outcomes.get(outcome, 0) for outcome in failures)
