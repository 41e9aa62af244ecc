"""What a router says to a worker, as values. What a worker says is encoded as it is put into the outbox."""

from __future__ import annotations

from dataclasses import dataclass

from decode.ahead import Hint
from decode.service import DecodeOrder
from prefill.service import PrefillOrder
from worker.config import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    router_id: str
    nonce: bytes
    #: Empty where the router says by its certificate alone who it is.
    proof: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    router_id: str
    load_report_interval_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidOrder:
    """An order that no worker could carry out; `detail` names the field."""

    leg_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class CancelLeg:
    leg_id: str


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    handle: bytes


@dataclass(frozen=True, slots=True)
class Drain:
    pass


@dataclass(frozen=True, slots=True)
class SetRole:
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    worker_id: str
    address: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Peers:
    """All that the router knows, or those that are new: the worker takes either."""

    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """From a router newer than this worker."""

    name: str


Message = (
    Challenge
    | Welcome
    | PrefillOrder
    | DecodeOrder
    | Hint
    | InvalidOrder
    | CancelLeg
    | ReleaseLease
    | Drain
    | SetRole
    | Peers
    | Unknown
)
