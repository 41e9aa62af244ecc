"""Transport between nodes of one process: a copy in memory. For engines that share a process, and for tests, which
can look at and interfere with every read through `hook`."""

from __future__ import annotations

import ctypes
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kv_transfer.segments import check_bounds
from kv_transfer.transport import PeerGone, ReadTimedOut, Region, Segments, TransportError

_CHECK_EVERY_BYTES = 1 << 20


class InprocHub:
    """The memory that nodes of this process let each other read. Whoever creates the nodes creates one and hands it to
    each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exports: dict[bytes, Mapping[str, Region]] = {}

    def add(self, regions: Mapping[str, Region]) -> bytes:
        token = secrets.token_bytes(16)
        with self._lock:
            self._exports[token] = regions
        return token

    def find(self, token: bytes) -> Mapping[str, Region] | None:
        with self._lock:
            return self._exports.get(token)

    def remove(self, token: bytes) -> None:
        with self._lock:
            self._exports.pop(token, None)


@dataclass(frozen=True, slots=True)
class ReadEvent:
    """One read, before or after its bytes moved; `destination(i)` is the memory that segment i lands in."""

    peer: str
    segments: Segments
    done: bool
    local: Region

    def destination(self, index: int) -> NDArray[np.uint8]:
        start = self.local.address + int(self.segments.local[index])
        return view(start, int(self.segments.sizes[index]))


def view(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Memory of this process as an array. The caller keeps the memory alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


class InprocTransport:
    name = "inproc"

    def __init__(self, hub: InprocHub) -> None:
        self._hub = hub
        self._regions: Mapping[str, Region] = {}
        self._token = b""
        self._peers: dict[str, bytes] = {}
        #: Called before and after every read, in the reading thread; what it raises is what the read raises.
        self.hook: Callable[[ReadEvent], None] | None = None

    def register(self, regions: Mapping[str, Region]) -> None:
        for region in regions.values():
            if region.device != "cpu":
                raise TransportError(f"inproc reaches host memory only, {region.name!r} is on {region.device}")
        self._regions = dict(regions)
        self._token = self._hub.add(self._regions)

    def export(self) -> bytes:
        return self._token

    def connect(self, peer: str, incarnation: str, exported: bytes) -> None:
        if self._hub.find(exported) is None:
            raise TransportError(f"{peer} is not in this process")
        self._peers[peer] = exported

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        token = self._peers.get(peer)
        theirs = None if token is None else self._hub.find(token)
        if theirs is None:
            raise PeerGone(f"{peer} is not connected")
        check_bounds(segments, _sizes(theirs), _sizes(self._regions))
        local = self._regions[segments.local_region]
        self._tell(ReadEvent(peer, segments, False, local))
        _copy(theirs[segments.remote_region], local, segments, deadline)
        self._tell(ReadEvent(peer, segments, True, local))

    def _tell(self, event: ReadEvent) -> None:
        if self.hook is not None:
            self.hook(event)

    def lane(self, peer: str) -> str:
        return self.name

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def close(self) -> None:
        self._hub.remove(self._token)
        self._peers.clear()


def _sizes(regions: Mapping[str, Region]) -> dict[str, int]:
    return {name: region.nbytes for name, region in regions.items()}


def _copy(remote: Region, local: Region, segments: Segments, deadline: float) -> None:
    unchecked = 0
    for source, target, nbytes in zip(
        segments.remote.tolist(), segments.local.tolist(), segments.sizes.tolist(), strict=True
    ):
        ctypes.memmove(local.address + target, remote.address + source, nbytes)
        unchecked += nbytes
        if unchecked >= _CHECK_EVERY_BYTES:
            unchecked = 0
            if time.monotonic() > deadline:
                raise ReadTimedOut("inproc read past its deadline")
