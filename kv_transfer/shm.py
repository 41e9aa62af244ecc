"""Transport between processes of one host: `process_vm_readv`, the kernel's copy from another process's memory.

One copy at memory speed, no package needed, and the owner does nothing. Engines' arenas are ordinary anonymous memory;
nothing has to be allocated in a shared segment, which is why this is not `/dev/shm` in spite of its name.

A process is addressed by its number, and numbers lie: in another PID namespace the same one is another process, and
after a death it is given away again. So `connect` opens a pidfd first, compares the start time, and reads a random
nonce at the address that the peer exported; only the process that exported it passes. Every read ends with a look at
the pidfd: not signalled means that the number was the peer's all the while.

The kernel asks for the right to ptrace: same user, not forbidden by Yama (`kernel.yama.ptrace_scope`), seccomp or a
missing CAP_SYS_PTRACE. Where that is not given, `connect` says so and the pair takes its next transport.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import select
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from kv_transfer.segments import check_bounds, pieces
from kv_transfer.transport import PeerGone, ReadTimedOut, Region, Segments, TransportError, refuse_device_memory

#: Read between two looks at the clock.
_PIECE_BYTES = 8 << 20
#: IOV_MAX of Linux.
_VECTORS_MAX = 1024
_NONCE_BYTES = 32

_process_vm_readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t
_process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)

#: Rows of `struct iovec`: address, length.
_Vectors = NDArray[np.uint64]


class _ExportedRegion(msgspec.Struct, frozen=True):
    address: int
    nbytes: int


class _Exported(msgspec.Struct, frozen=True):
    pid: int
    #: In clock ticks since boot.
    started: int
    nonce_address: int
    nonce: bytes
    regions: dict[str, _ExportedRegion]
    #: What is not in host memory: "arena on cuda:0".
    elsewhere: list[str]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Remote:
    """A peer that passed. Its pidfd is closed when the last read of it is over."""

    pid: int
    pidfd: int
    regions: Mapping[str, _ExportedRegion]
    sizes: Mapping[str, int]

    def is_alive(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)


class ShmTransport:
    name = "shm"

    def __init__(self) -> None:
        self._regions: Mapping[str, Region] = {}
        self._sizes: Mapping[str, int] = {}
        self._elsewhere: list[str] = []
        self._nonce = ctypes.create_string_buffer(secrets.token_bytes(_NONCE_BYTES), _NONCE_BYTES)
        self._peers: dict[str, _Remote] = {}

    def register(self, regions: Mapping[str, Region]) -> None:
        """Memory of devices is no error: such a node has other transports, and its pairs must fall through to them."""
        self._regions = {name: region for name, region in regions.items() if region.device == "cpu"}
        self._sizes = {name: region.nbytes for name, region in self._regions.items()}
        self._elsewhere = [f"{region.name} on {region.device}" for region in regions.values() if region.device != "cpu"]

    def export(self) -> bytes:
        pid = os.getpid()
        regions = {name: _ExportedRegion(region.address, region.nbytes) for name, region in self._regions.items()}
        nonce = self._nonce.raw
        return msgspec.msgpack.encode(
            _Exported(pid, _start_time(pid), ctypes.addressof(self._nonce), nonce, regions, self._elsewhere),
        )

    def connect(self, peer: str, incarnation: str, exported: bytes) -> None:
        self.disconnect(peer)
        try:
            theirs = msgspec.msgpack.decode(exported, type=_Exported)
        except msgspec.MsgspecError as error:
            raise TransportError(f"{peer} exports what is no process: {error}") from error
        refuse_device_memory("shm", self._elsewhere, theirs.elsewhere)
        if len(theirs.nonce) != _NONCE_BYTES or not any(theirs.nonce):
            raise TransportError(f"{peer} exports no nonce")
        remote = _find_process(peer, theirs)
        _check_nonce(peer, theirs)
        self._peers[peer] = remote

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        remote = self._peers.get(peer)
        if remote is None:
            raise PeerGone(f"{peer} is not connected")
        check_bounds(segments, remote.sizes, self._sizes)
        if not segments.sizes.size:
            return
        ours = self._regions[segments.local_region].address
        theirs = remote.regions[segments.remote_region].address
        # All of them before the first: after some megabytes every cache is cold, and Python then ten times as slow.
        copies = [
            copy
            for piece in pieces(segments, _PIECE_BYTES)
            for copy in _copies(
                remote.pid,
                _vectors(theirs, piece.remote, piece.sizes),
                _vectors(ours, piece.local, piece.sizes),
            )
        ]
        try:
            for copy in copies:
                if time.monotonic() > deadline:
                    raise ReadTimedOut(f"the read from {peer} is past its deadline")
                copy.run()
        except OSError as error:
            self._forget(peer, remote)
            raise PeerGone(f"{peer}, process {remote.pid}: {error.strerror}") from error
        if not remote.is_alive():
            self._forget(peer, remote)
            raise PeerGone(f"{peer}: process {remote.pid} has ended")

    def _forget(self, peer: str, remote: _Remote) -> None:
        if self._peers.get(peer) is remote:
            self._peers.pop(peer, None)

    def lane(self, peer: str) -> str:
        return self.name

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def close(self) -> None:
        """Peers that connected can go on reading, as long as this process lives; nobody can connect any more."""
        ctypes.memset(self._nonce, 0, _NONCE_BYTES)
        self._peers.clear()


def _find_process(peer: str, theirs: _Exported) -> _Remote:
    """The process of that number, if it began when the peer did. Its memory has not been looked at yet."""
    try:
        pidfd = os.pidfd_open(theirs.pid)
    except (OSError, OverflowError) as error:
        raise TransportError(f"{peer} is process {theirs.pid}, which can't be found here: {error}") from error
    sizes = {name: region.nbytes for name, region in theirs.regions.items()}
    remote = _Remote(theirs.pid, pidfd, theirs.regions, sizes)
    weakref.finalize(remote, os.close, pidfd)
    try:
        started = _start_time(theirs.pid)
    except OSError as error:
        raise TransportError(f"{peer} is process {theirs.pid}, of which nothing is known: {error}") from error
    if started != theirs.started:
        raise TransportError(
            f"process {theirs.pid} is not {peer}: it is on another host, in another PID namespace, or has ended"
        )
    return remote


def _check_nonce(peer: str, theirs: _Exported) -> None:
    found = ctypes.create_string_buffer(_NONCE_BYTES)
    try:
        source = np.array([[theirs.nonce_address, _NONCE_BYTES]], np.uint64)
        target = np.array([[ctypes.addressof(found), _NONCE_BYTES]], np.uint64)
        for copy in _copies(theirs.pid, source, target):
            copy.run()
    except (OSError, OverflowError) as error:
        hint = ""
        if isinstance(error, PermissionError):
            hint = " (it is another user's, or ptrace is kept from us: Yama's ptrace_scope, seccomp, no CAP_SYS_PTRACE)"
        raise TransportError(f"the memory of {peer}, process {theirs.pid}, can't be read: {error}{hint}") from error
    if not secrets.compare_digest(found.raw, theirs.nonce):
        raise TransportError(f"process {theirs.pid} does not hold the nonce of {peer}: it is another one, or closed")


def is_readable(pid: int, address: int) -> bool:
    """Whether the kernel lets this process read that one's memory, in which there is something at `address`."""
    found = ctypes.create_string_buffer(1)
    try:
        for copy in _copies(
            pid, np.array([[address, 1]], np.uint64), np.array([[ctypes.addressof(found), 1]], np.uint64)
        ):
            copy.run()
    except (OSError, OverflowError):
        return False
    return True


def _start_time(pid: int) -> int:
    """Raises OSError."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        # The second field is the command's name, in parentheses, and may hold anything. The 22nd is wanted.
        return int(stat.read().rpartition(b")")[2].split()[19])


def _vectors(address: int, offsets: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> _Vectors:
    vectors = np.empty((offsets.size, 2), np.uint64)
    np.add(offsets, np.uint64(address), out=vectors[:, 0])
    vectors[:, 1] = sizes
    return vectors


class _Copy:
    """One system call: what `source` names in that process goes to what `target`, of the same sizes, names here."""

    __slots__ = ("_arguments", "_nbytes", "_pid", "_source", "_target")

    def __init__(self, pid: int, source: _Vectors, target: _Vectors) -> None:
        self._pid = pid
        self._source, self._target = source, target
        self._nbytes = int(target[:, 1].sum())
        self._arguments = (pid, target.ctypes.data, len(target), source.ctypes.data, len(source), 0)

    def run(self) -> None:
        """Raises OSError."""
        if not self._nbytes:
            return
        copied = _process_vm_readv(*self._arguments)
        if copied <= 0:
            code = ctypes.get_errno() if copied else errno.EFAULT
            raise OSError(code, os.strerror(code))
        if copied < self._nbytes:  # it stopped at a page that could not be read: from there, the call says why
            _Copy(self._pid, _after(self._source, copied), _after(self._target, copied)).run()


def _copies(pid: int, source: _Vectors, target: _Vectors) -> Iterator[_Copy]:
    for start in range(0, len(source), _VECTORS_MAX):
        part = slice(start, start + _VECTORS_MAX)
        yield _Copy(pid, source[part], target[part])


def _after(vectors: _Vectors, done: int) -> _Vectors:
    """What is left of `vectors` when their first `done` bytes are."""
    ends = np.cumsum(vectors[:, 1])
    first = int(np.searchsorted(ends, np.uint64(done), side="right"))
    rest = vectors[first:].copy()
    within = np.uint64(done) - (ends[first - 1] if first else np.uint64(0))
    rest[0, 0] += within
    rest[0, 1] -= within
    return rest
