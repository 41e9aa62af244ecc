"""What one worker process is told. Built once, validated here, passed as values from there on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from decode.admission import DecodeLimits
from engine.base import EngineOptions
from prefill.admission import PrefillLimits
from trust.tls import is_loopback


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """The stream to each router."""

    #: From dialling to the router's welcome.
    connect_timeout_s: float = 10.0
    #: Waits between attempts grow from the first to the second, with jitter.
    retry_first_s: float = 0.1
    retry_max_s: float = 5.0
    #: Bytes sent but not acknowledged for so long mean that the router's machine is gone.
    dead_after_s: float = 20.0
    #: What the last messages of a worker that leaves may take.
    close_timeout_s: float = 2.0
    message_bytes_max: int = 64 * 1024 * 1024
    #: Messages waiting for a router that does not read; one more and the link is given up.
    outbox_max: int = 4096

    def problems(self) -> list[str]:
        found = [
            f"link.{name}: must be more than 0, is {value}"
            for name, value in (
                ("connect_timeout_s", self.connect_timeout_s),
                ("retry_first_s", self.retry_first_s),
                ("retry_max_s", self.retry_max_s),
                ("dead_after_s", self.dead_after_s),
                ("close_timeout_s", self.close_timeout_s),
                ("message_bytes_max", self.message_bytes_max),
                ("outbox_max", self.outbox_max),
            )
            if not 0 < value < float("inf")
        ]
        if self.retry_first_s > self.retry_max_s:
            found.append(f"link.retry_first_s: {self.retry_first_s} is more than link.retry_max_s: {self.retry_max_s}")
        return found


class LogFormat(Enum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    level: str = "INFO"
    format: LogFormat = LogFormat.TEXT

    def problems(self) -> list[str]:
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        return [] if self.level in levels else [f"log.level: must be one of {', '.join(levels)}, is {self.level!r}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    role: Role
    #: host:port of every router to serve. The worker dials them; they never dial it.
    routers: tuple[str, ...]
    #: "vllm" or "sim", see engine/build.py.
    engine: str
    engine_options: EngineOptions
    labels: Mapping[str, str] = field(default_factory=dict)
    prefill: PrefillLimits = PrefillLimits()
    decode: DecodeLimits = DecodeLimits()
    link: LinkSettings = LinkSettings()
    log: LogSettings = LogSettings()
    #: Introductions to peers made at once.
    peers_met_at_once: int = 4
    #: How long a worker that was told to leave waits for its legs and leases.
    drain_grace_s: float = 120.0
    #: How long the engine may take to stop before its processes are killed.
    stop_timeout_s: float = 15.0
    #: host:port of the gRPC health service and of Prometheus metrics; empty means none, port 0 any free one.
    health_address: str = ""
    metrics_address: str = ""
    #: host:port of vLLM's engine API, by which a gateway of somebody else's can drive this worker; empty means none,
    #: port 0 any free one. With TLS it takes clients' certificates; without, this machine's own addresses only.
    engine_listen: str = ""
    #: SPIFFE ids and DNS names in certificates that may call there; needed where other machines can. Empty: everybody
    #: who may connect.
    engine_certificates: tuple[str, ...] = ()

    @property
    def worker_id(self) -> str:
        """One name for the worker and for its engine among KV peers."""
        return self.engine_options.name

    def __post_init__(self) -> None:
        """Raises ValueError with one line for each wrong key."""
        if problems := self._problems():
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        found = [*self.prefill.problems(), *self.decode.problems(), *self.link.problems(), *self.log.problems()]
        if not self.worker_id or len(self.worker_id) > 128:
            found.append(f"engine_options.name: must have 1 to 128 characters, has {len(self.worker_id)}")
        if not self.routers:
            found.append("routers: must name at least one")
        if len(set(self.routers)) != len(self.routers):
            found.append(f"routers: names one twice: {', '.join(self.routers)}")
        found += [f"routers: {address!r} is not host:port" for address in self.routers if not is_address(address)]
        for name in ("health_address", "metrics_address", "engine_listen"):
            if (address := getattr(self, name)) and not is_address(address):
                found.append(f"{name}: {address!r} is not host:port")
        tls = self.engine_options.tls
        host = self.engine_listen.rpartition(":")[0]
        names_callers = tls.serves and bool(tls.ca)
        if host and not is_loopback(host) and not (names_callers and self.engine_certificates):
            found.append(
                f"engine_listen: {host} can be reached from other machines: whoever calls there is served and may end "
                "others' requests, so it takes certificates (engine_options.tls: cert, key and ca) with names that "
                "engine_certificates lists"
            )
        elif self.engine_certificates and not names_callers:
            found.append("engine_certificates: needs a port that knows who vouches for them (engine_options.tls)")
        tls_problems = tls.problems() + tls.listen_problems(self.engine_options.kv_host)
        for address in self.routers:
            tls_problems += tls.dial_problems(address.rpartition(":")[0])
        found += [f"engine_options.tls.{problem}" for problem in dict.fromkeys(tls_problems)]
        if self.peers_met_at_once < 1:
            found.append(f"peers_met_at_once: must be at least 1, is {self.peers_met_at_once}")
        if not 0 <= self.drain_grace_s < float("inf"):
            found.append(f"drain_grace_s: must not be negative, is {self.drain_grace_s}")
        if not 0 < self.stop_timeout_s < float("inf"):
            found.append(f"stop_timeout_s: must be more than 0, is {self.stop_timeout_s}")
        # A worker knows only its own end of a lease, but a cluster's workers are configured alike: a read that may
        # take longer than the promise to keep the blocks would end as stale.
        if self.decode.fetch_timeout_s > self.prefill.lease_ttl_s:
            found.append(
                f"decode.fetch_timeout_s: {self.decode.fetch_timeout_s} is more than "
                f"prefill.lease_ttl_s: {self.prefill.lease_ttl_s}"
            )
        # Else every drain with a lease that nobody fetches would be cut off.
        if self.role.prefills and self.drain_grace_s < self.prefill.lease_ttl_s:
            found.append(
                f"drain_grace_s: {self.drain_grace_s} is less than prefill.lease_ttl_s: {self.prefill.lease_ttl_s}"
            )
        return found


def is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon) and port.isascii() and port.isdigit() and int(port) < 65536


def to_json(config: WorkerConfig) -> bytes:
    """For `python -m worker`. Holds the cluster's secret: hand it over by a pipe or a private file."""
    return msgspec.json.encode(config)


def from_json(text: bytes) -> WorkerConfig:
    """Raises ValueError that names what is wrong."""
    return msgspec.json.decode(text, type=WorkerConfig, strict=True)
