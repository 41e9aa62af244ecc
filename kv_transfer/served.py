"""What the transports have in common whose owner answers, instead of letting its memory be read.

The owner compares every request with its registered regions, in its own process, and sends the bytes: nothing else of
it can be reached. Readers prove that they hold the exported token. Only the reading thread writes to a read's
destination, and a read that fails gives up its connection first, so there are no late bytes. Host memory only.
"""

from __future__ import annotations

import ctypes
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import msgspec

from kv_transfer.segments import check_bounds
from kv_transfer.transport import PeerGone, Region, Segments, TransportError, refuse_device_memory


class Exported(msgspec.Struct, frozen=True):
    host: str
    port: int
    token: bytes
    tls: bool
    #: Sizes. A region's position here is its number in requests.
    regions: dict[str, int]
    #: What is not in host memory: "arena on cuda:0".
    elsewhere: list[str]


class Server(Protocol):
    """Serves reads of this process's regions, until `close` returns."""

    port: int

    def close(self) -> None: ...


class Reader(Protocol):
    """The connection to one peer. One read at a time uses it; others wait."""

    def read(self, segments: Segments, memory: memoryview, deadline: float) -> None:
        """Raises TransportError; after PeerGone the reader is not used again."""
        ...

    def close(self) -> None:
        """Ends a read under way; when this returns, none writes any more."""
        ...


class ServedTransport(ABC):
    """A Transport, but for how bytes are sent. `host` is the name by which peers dial this process."""

    name: str

    def __init__(self, host: str, *, tls: bool) -> None:
        self._host = host
        self._speaks_tls = tls
        self._token = secrets.token_bytes(32)
        self._memory: Mapping[str, memoryview] = {}
        self._sizes: Mapping[str, int] = {}
        self._elsewhere: list[str] = []
        self._server: Server | None = None
        self._peers: dict[str, tuple[Reader, Mapping[str, int]]] = {}

    @abstractmethod
    def _serve(self, token: bytes, memory: Mapping[str, memoryview]) -> Server:
        """Raises TransportError."""

    @abstractmethod
    def _dial(self, peer: str, theirs: Exported) -> Reader:
        """Raises TransportError."""

    def register(self, regions: Mapping[str, Region]) -> None:
        """Memory of devices is no error: such a node has other transports, and its pairs must fall through to them."""
        host = {name: region for name, region in regions.items() if region.device == "cpu"}
        self._memory = {name: _view(region) for name, region in host.items()}
        self._sizes = {name: region.nbytes for name, region in host.items()}
        self._elsewhere = [f"{region.name} on {region.device}" for region in regions.values() if region.device != "cpu"]
        if not self._elsewhere:
            self._server = self._serve(self._token, self._memory)

    def export(self) -> bytes:
        port = 0 if self._server is None else self._server.port
        return msgspec.msgpack.encode(
            Exported(self._host, port, self._token, self._speaks_tls, dict(self._sizes), self._elsewhere)
        )

    def connect(self, peer: str, incarnation: str, exported: bytes) -> None:
        self.disconnect(peer)
        try:
            theirs = msgspec.msgpack.decode(exported, type=Exported)
        except msgspec.MsgspecError as error:
            raise TransportError(f"{peer} exports what is no address: {error}") from error
        refuse_device_memory(self.name, self._elsewhere, theirs.elsewhere)
        if theirs.tls != self._speaks_tls:
            raise TransportError(f"{peer} serves {'TLS only' if theirs.tls else 'no TLS, which is wanted here'}")
        self._peers[peer] = self._dial(peer, theirs), theirs.regions

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        connected = self._peers.get(peer)
        if connected is None:
            raise PeerGone(f"{peer} is not connected")
        reader, sizes = connected
        check_bounds(segments, sizes, self._sizes)
        if not segments.sizes.any():
            return
        try:
            reader.read(segments, self._memory[segments.local_region], deadline)
        except PeerGone:
            if self._peers.get(peer) is connected:
                self._peers.pop(peer, None)
            raise

    def lane(self, peer: str) -> str:
        return f"{self.name}/tls" if self._speaks_tls else self.name

    def disconnect(self, peer: str) -> None:
        connected = self._peers.pop(peer, None)
        if connected is not None:
            connected[0].close()

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        if self._server is not None:
            self._server.close()


def _view(region: Region) -> memoryview:
    """The region's memory. The caller keeps it mapped."""
    return memoryview((ctypes.c_uint8 * region.nbytes).from_address(region.address)).cast("B")
