"""What the connector inside vLLM is told, and tells.

vLLM makes the connector, and knows its settings by a name only: its own configuration is logged, and the cluster's
secret must not be. An order is told to the connector just before its request is, all in one process; a report comes
back with the request's final output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trust.tls import TlsFiles

#: The one key of ours in vLLM's dicts.
KEY = "tandem"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorSettings:
    """What the connector needs beyond vLLM's own configuration."""

    name: str
    incarnation: str
    model: str
    revision: str
    secret: bytes = field(repr=False)
    host: str
    transports: tuple[str, ...]
    staging_bytes: int
    kv_verify: bool
    tls: TlsFiles
    #: Called, from any thread, when leases have ended by themselves: a step will free their blocks.
    on_lease_ended: Callable[[], None]

    def extra_config(self) -> dict[str, str]:
        """For vLLM's `kv_connector_extra_config`. From here on the connector finds these settings."""
        _settings[self.incarnation] = self
        return {KEY: self.incarnation}


#: By incarnation; one for each engine that this process has had.
_settings: dict[str, ConnectorSettings] = {}


def settings_of(incarnation: str) -> ConnectorSettings:
    return _settings[incarnation]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOrder:
    """Report how the prefill went and, if `hand_off`, pin the prompt's blocks and report a handle to them."""

    transfer_id: str
    hand_off: bool
    tenant: str
    reader: str
    ttl_s: float
    #: Let it be read while it is computed.
    overlap: bool
    #: Hand off even when the sampled token ends the answer: it will be sampled again.
    even_if_stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOrder:
    """The KV of the prompt's first `tokens` tokens is in staging, claimed for this request: take it from there."""

    staged_id: str
    tokens: int
    pages: tuple[int, ...]


Order = PrefillOrder | DecodeOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillReport:
    """How a prefill leg went."""

    #: From arrival in vLLM's scheduler to the first step that computed a part of the prompt.
    queue_s: float
    #: From there to the sampled token.
    prefill_s: float
    handle: bytes | None = None
    #: Why there is no handle though one was asked for; empty when the answer ended.
    refusal: str = ""


def report_params(report: PrefillReport) -> dict[str, PrefillReport]:
    return {KEY: report}


def report_of(params: Mapping[str, Any] | None) -> PrefillReport | None:
    """The report in the `kv_transfer_params` of an output; None when there is none of ours."""
    return params.get(KEY) if params else None
