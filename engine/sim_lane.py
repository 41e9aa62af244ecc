"""A lane of a given speed, simulated: what moves the bytes is real, and then waits until that lane would be done."""

from __future__ import annotations

import time
from collections.abc import Mapping

from kv_transfer.transport import Region, Segments, Transport


class PacedTransport:
    """See Transport. `transport` is faster than `bytes_per_s`."""

    def __init__(self, transport: Transport, bytes_per_s: float) -> None:
        self.name = transport.name
        self._transport = transport
        self._bytes_per_s = bytes_per_s

    def register(self, regions: Mapping[str, Region]) -> None:
        self._transport.register(regions)

    def export(self) -> bytes:
        return self._transport.export()

    def connect(self, peer: str, incarnation: str, exported: bytes) -> None:
        self._transport.connect(peer, incarnation, exported)

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        due = time.monotonic() + segments.nbytes / self._bytes_per_s
        self._transport.read(peer, segments, timeout_s)
        left = due - time.monotonic()
        if left > 0:
            time.sleep(left)

    def lane(self, peer: str) -> str:
        return self._transport.lane(peer)

    def disconnect(self, peer: str) -> None:
        self._transport.disconnect(peer)

    def close(self) -> None:
        self._transport.close()
