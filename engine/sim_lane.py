"""A lane of a given speed, simulated: what moves the bytes is real, and then waits until that lane would be done."""

from __future__ import annotations

import time

from kv_transfer.transport import Forwarding, Segments, Transport


class PacedTransport(Forwarding):
    """`transport` is faster than `bytes_per_s`."""

    def __init__(self, transport: Transport, bytes_per_s: float) -> None:
        super().__init__(transport)
        self._bytes_per_s = bytes_per_s

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        due = time.monotonic() + segments.nbytes / self._bytes_per_s
        super().read(peer, segments, timeout_s)
        left = due - time.monotonic()
        if left > 0:
            time.sleep(left)
