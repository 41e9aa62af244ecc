"""What one router process is told. Built once, validated here, passed as values from there on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from router.core.limits import CoreLimits

#: gRPC frames a message's length in 32 bits; past 1 GiB every message is a mistake.
_MESSAGE_BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask for."""

    message_bytes_max: int = 16 * 1024 * 1024
    request_id_chars_max: int = 128
    stop_strings_max: int = 16
    stop_chars_max: int = 256
    stop_token_ids_max: int = 64
    logprobs_max: int = 20
    #: Tokens to generate when the client names no number.
    max_tokens_default: int = 256
    #: Time a request gets when the client names no deadline, and the most it can get.
    timeout_s_max: float = 3600.0
    #: Tokens that may wait for a client that reads slowly; one more ends its request.
    stream_tokens_max: int = 16_384

    def problems(self) -> list[str]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found = [f"requests.{name}: must be at least 1, is {value}" for name, value in values.items() if value < 1]
        if self.message_bytes_max > _MESSAGE_BYTES_MAX:
            found.append(
                f"requests.message_bytes_max: must be at most {_MESSAGE_BYTES_MAX}, is {self.message_bytes_max}"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    #: A model directory with tokenizer.json; the router needs no weights.
    model_dir: str
    model_name: str
    router_id: str = "router"
    #: Clients, operators and workers all come to this port; 0 takes any free one.
    host: str = "127.0.0.1"
    port: int = 50051
    #: Prometheus metrics over HTTP; None serves none, 0 takes any free port.
    metrics_port: int | None = None
    limits: CoreLimits = field(default_factory=CoreLimits)
    requests: RequestLimits = field(default_factory=RequestLimits)
    #: How often workers report their load.
    load_report_interval_s: float = 1.0
    #: How long requests may go on after the router was told to stop.
    shutdown_grace_s: float = 30.0
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        found = self.requests.problems()
        for name in ("port", "metrics_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65_535:
                found.append(f"{name}: must be from 0 to 65535, is {port}")
        if self.metrics_port and self.metrics_port == self.port:
            found.append(f"metrics_port: {self.metrics_port} is the gRPC port already")
        if not 0 < self.load_report_interval_s < self.limits.silence_s_max / 2:
            found.append(
                "load_report_interval_s: must be more than 0 and less than half of limits.silence_s_max "
                f"({self.limits.silence_s_max}), is {self.load_report_interval_s}"
            )
        if self.shutdown_grace_s < 0:
            found.append(f"shutdown_grace_s: must not be negative, is {self.shutdown_grace_s}")
        if not (Path(self.model_dir) / "tokenizer.json").is_file():
            found.append(f"model_dir: {self.model_dir} has no tokenizer.json")
        for name in ("model_name", "router_id", "host"):
            if not getattr(self, name):
                found.append(f"{name}: must not be empty")
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        if self.log_level not in levels:
            found.append(f"log_level: must be one of {', '.join(levels)}, is {self.log_level!r}")
        return found


def to_json(config: RouterConfig) -> bytes:
    return msgspec.json.format(msgspec.json.encode(config))


def from_json(text: bytes | str) -> RouterConfig:
    """Raises ValueError that names the key."""
    try:
        return msgspec.json.decode(text, type=RouterConfig)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
