"""What VllmEngine and the connector inside vLLM tell each other.

They are two processes with vLLM between them, and vLLM carries three things for them: settings at start
(`kv_connector_extra_config`), an order with each request (`kv_transfer_params`), and a report with its final output.
All three are `dict[str, Any]` to vLLM; here they are typed, and inside the dict there is one encoded value. The
cluster's secret travels by none of these: vLLM logs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trust.tls import TlsFiles

#: The one key of ours in vLLM's dicts.
KEY = "tandem"


class ConnectorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the connector needs beyond vLLM's own configuration."""

    name: str
    incarnation: str
    model: str
    revision: str
    host: str
    transports: tuple[str, ...]
    staging_bytes: int
    kv_verify: bool
    #: Private to the worker and its EngineCore, see `RunDir`.
    run_dir: str
    #: Names of files, no secrets.
    tls: TlsFiles = TlsFiles()

    def extra_config(self) -> dict[str, str]:
        return {KEY: msgspec.json.encode(self).decode()}

    @classmethod
    def parse(cls, encoded: str) -> ConnectorSettings:
        return msgspec.json.decode(encoded, type=cls)


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What the connector has opened, told once through `RunDir.endpoint`."""

    address: str
    layout: dict[str, str]


class RunDir:
    """Files shared by a worker process and its EngineCore, in a folder that no other user can enter."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        #: Where KvLocal listens.
        self.socket = self.path / "kv.sock"
        #: The cluster's secret, from the worker to the connector, which deletes it.
        self.secret = self.path / "secret"
        #: The connector's `Endpoint`, from the moment its node is open.
        self.endpoint = self.path / "endpoint.json"

    def write_secret(self, secret: bytes) -> None:
        self.secret.touch(mode=0o600)
        self.secret.write_bytes(secret)

    def take_secret(self) -> bytes:
        secret = self.secret.read_bytes()
        self.secret.unlink()
        return secret

    def write_endpoint(self, endpoint: Endpoint) -> None:
        self.endpoint.write_bytes(msgspec.json.encode(endpoint))

    def read_endpoint(self) -> Endpoint:
        return msgspec.json.decode(self.endpoint.read_bytes(), type=Endpoint)


class PrefillOrder(msgspec.Struct, frozen=True, kw_only=True, tag="prefill"):
    """Report how the prefill went and, if `hand_off`, pin the prompt's blocks and report a handle to them."""

    transfer_id: str
    hand_off: bool
    tenant: str = ""
    reader: str = ""
    ttl_s: float = 0.0
    #: Hand off even when the sampled token ends the answer: it will be sampled again.
    even_if_stopped: bool = False


class DecodeOrder(msgspec.Struct, frozen=True, kw_only=True, tag="decode"):
    """The KV of the prompt's first `tokens` tokens is in staging: take it from there."""

    staged_id: str
    tokens: int


class EndOrder(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    """End the lease of this transfer, or of all. Like `DropOrder`, it rides on a request that vLLM aborts at once, so
    that it is seen after every order sent before it."""

    transfer_id: str | None


class DropOrder(msgspec.Struct, frozen=True, kw_only=True, tag="drop"):
    """Free what a decode order named, if that order was never seen."""

    staged_id: str


Order = PrefillOrder | DecodeOrder | EndOrder | DropOrder


class PrefillReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a prefill leg went."""

    #: From arrival in vLLM's scheduler to the first step that computed a part of the prompt.
    queue_s: float
    #: From there to the sampled token.
    prefill_s: float
    handle: bytes | None = None
    #: Why there is no handle though one was asked for; empty when the answer ended.
    refusal: str = ""


def order_params(order: Order) -> dict[str, bytes]:
    return {KEY: msgspec.msgpack.encode(order)}


def parse_order(params: Mapping[str, Any] | None) -> Order | None:
    """The order in vLLM's `kv_transfer_params`; None when there is none of ours. Raises msgspec.DecodeError."""
    encoded = params.get(KEY) if params else None
    return msgspec.msgpack.decode(encoded, type=Order) if encoded is not None else None


def report_params(report: PrefillReport) -> dict[str, bytes]:
    return {KEY: msgspec.msgpack.encode(report)}


def parse_report(params: Mapping[str, Any] | None) -> PrefillReport | None:
    encoded = params.get(KEY) if params else None
    return msgspec.msgpack.decode(encoded, type=PrefillReport) if encoded is not None else None
