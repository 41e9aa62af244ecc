"""The seam to what moves bytes between two processes.

A transport reads from a peer's *regions* into this process's own, one-sidedly where the hardware allows: the owner's
Python does nothing while its bytes are read. There are three regions: `arena`, the KV memory; `board`, the lease board
(always host memory); and `staging`, where fetched blocks land. Bounds are checked against what the peer exported.

**Quiescence.** When `read` returns or raises, no byte of this read is written any more; the destination may be reused.
A transport that cannot promise that for a failed read raises `Unquiesced`, and the caller keeps the destination
out of use until the exception's `is_quiet` says that the read is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ARENA = "arena"
BOARD = "board"
STAGING = "staging"


class TransportError(Exception):
    """The bytes did not arrive. Nothing writes to the destination any more."""


class PeerGone(TransportError):
    """The peer's process or connection is gone; `connect` must be called again before the next read."""


class ReadTimedOut(TransportError):
    """The deadline passed first."""


class Unquiesced(TransportError):
    """The read failed and may still be writing: the destination must not be reused before `is_quiet()` is true.

    `is_quiet` does not wait. It is called like the transport's methods but `read`, also after `disconnect`: forgetting
    a peer does not stop what it is sending. After `close` everything is quiet.
    """

    def __init__(self, message: str, is_quiet: Callable[[], bool]) -> None:
        super().__init__(message)
        self.is_quiet = is_quiet


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory of this process. `device` is "cpu" or "cuda:N"."""

    name: str
    address: int
    nbytes: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Segments:
    """A scattered read: `sizes[i]` bytes from `remote[i]` in `remote_region` to `local[i]` in `local_region`.

    Offsets are bytes from the region's start, uint64, all arrays of one length.
    """

    remote_region: str
    local_region: str
    remote: NDArray[np.uint64]
    local: NDArray[np.uint64]
    sizes: NDArray[np.uint64]

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())


class Transport(Protocol):
    """One per process and kind. Methods but `read` are called from one thread at a time; `read` may be called from
    several threads for different destinations and blocks its caller."""

    name: str

    def register(self, regions: Mapping[str, Region]) -> None:
        """Once, at start, with the whole of each region."""
        ...

    def export(self) -> bytes:
        """What a peer needs to reach the registered regions. Carried over an authenticated channel; never logged."""
        ...

    def connect(self, peer: str, incarnation: str, exported: bytes) -> None:
        """Makes `peer` readable. A second incarnation of the same peer replaces the first. Raises TransportError."""
        ...

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        """Blocks until all bytes are in. Raises TransportError, of which see the subclasses."""
        ...

    def lane(self, peer: str) -> str:
        """What a connected peer is read through, for people: the transport's name, or more exactly, "nixl/cma"."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forgets a peer. Unknown peers are ignored."""
        ...

    def close(self) -> None:
        """Ends everything; afterwards nothing writes here any more."""
        ...


class Forwarding:
    """All that another transport does, for one that does some of it differently."""

    def __init__(self, transport: Transport) -> None:
        self.name = transport.name
        self._transport = transport

    def register(self, regions: Mapping[str, Region]) -> None:
        self._transport.register(regions)

    def export(self) -> bytes:
        return self._transport.export()

    def connect(self, peer: str, incarnation: str, exported: bytes) -> None:
        self._transport.connect(peer, incarnation, exported)

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        self._transport.read(peer, segments, timeout_s)

    def lane(self, peer: str) -> str:
        return self._transport.lane(peer)

    def disconnect(self, peer: str) -> None:
        self._transport.disconnect(peer)

    def close(self) -> None:
        self._transport.close()


def refuse_device_memory(transport: str, here: Sequence[str], there: Sequence[str]) -> None:
    """For a transport of host memory, at `connect`. Raises TransportError when either side has regions elsewhere."""
    elsewhere = [f"{what} here" for what in here] + [f"{what} there" for what in there]
    if elsewhere:
        raise TransportError(f"{transport} reaches host memory only, not {', '.join(elsewhere)}")
