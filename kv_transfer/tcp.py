"""Transport over sockets: between hosts, with no package, and with an owner that checks every read.

Where the other transports let a peer read this process's memory, here the owner's process serves it: a thread for each
connection waits for requests, compares them with the registered regions, and sends from memory. Nothing else can be
reached. It costs the owner a core while bytes flow, and nothing when idle.

    owner   magic | nonce
    reader  nonce | MAC(token, both nonces)
    owner   MAC(token, both nonces)                      now both know that the other holds the exported token
    reader  region u32 | count u32 | offsets u64 x count | sizes u64 x count
    owner   0 u64 | the bytes, in that order             or: length u64 | why not
    ...

The token never crosses the wire, so listening in does not give access; it does give the bytes. For a network that is
not trusted there is TLS: the cluster's certificates, of the owner and, where they are asked for, of the reader.

A read that fails in any way closes its connection before it returns, and only the reading thread writes to the
destination: there are no late bytes. After a timeout the next read dials again; after `PeerGone`, the next `connect`.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kv_transfer.handle import MAC_BYTES, sign, verify
from kv_transfer.segments import check_bounds
from kv_transfer.served import Exported, ServedTransport
from kv_transfer.transport import PeerGone, ReadTimedOut, Segments, TransportError
from trust.tls import Tls

log = logging.getLogger(__name__)

_MAGIC = b"tandem kv tcp 1\n"
_NONCE_BYTES = 16
_OWNER, _READER = "tandem kv tcp owner", "tandem kv tcp reader"
_REQUEST = struct.Struct("<II")
_ANSWER = struct.Struct("<Q")
_REFUSAL_BYTES_MAX = 4096

#: More are cut into several requests.
_SEGMENTS_MAX = 1 << 16
#: Buffers per system call: enough to fill a socket buffer with blocks of 16 KiB, few enough to be quick to pass.
_VECTORS_MAX = 64
#: Readers at once; more are turned away.
_CONNECTIONS_MAX = 512
#: To dial and prove who one is. Below the time for which two nodes try to meet, so that they can try what comes next.
_DIAL_S = 2.0
#: A reader that takes no byte for this long in the middle of a read is cut off.
_STALL_S = 30.0
#: Idle connections are probed, so that a host that vanished does not hold a thread for ever: after, every, times.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


class TcpTransport(ServedTransport):
    name = "tcp"

    def __init__(self, host: str = "127.0.0.1", tls: Tls | None = None) -> None:
        super().__init__(host, tls=tls is not None)
        self._tls = tls

    def _serve(self, token: bytes, memory: Mapping[str, memoryview]) -> _Server:
        try:
            return _Server(self._host, token, memory, self._tls)
        except OSError as error:
            raise TransportError(f"tcp can't listen on {self._host}: {error}") from error

    def _dial(self, peer: str, theirs: Exported) -> _Reader:
        reader = _Reader(peer, theirs, self._tls)
        reader.dial()
        return reader


# -------------------------------------------------------------------------------------------------------- the reader


class _Reader:
    def __init__(self, peer: str, theirs: Exported, tls: Tls | None) -> None:
        self._peer = peer
        self._theirs = theirs
        self._tls = tls
        self._region_numbers = {name: number for number, name in enumerate(theirs.regions)}
        self._turn = threading.Lock()
        self._closed = False
        #: None before the first dial and after a read that failed.
        self._connection: socket.socket | None = None

    def dial(self) -> None:
        """Raises TransportError."""
        with self._turn:
            try:
                self._connection = _dial(self._theirs, self._tls, time.monotonic() + _DIAL_S)
            except (OSError, ValueError, OverflowError) as error:
                raise TransportError(f"{self._peer} can't be dialled: {error}") from error

    def read(self, segments: Segments, memory: memoryview, deadline: float) -> None:
        if not self._turn.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise ReadTimedOut(f"other reads from {self._peer} took until the deadline")
        try:
            self._read(segments, memory, deadline)
        except BaseException as error:
            if not isinstance(error, _OwnerRefused):
                self._drop()
            if isinstance(error, TimeoutError):
                raise ReadTimedOut(f"the read from {self._peer} is past its deadline") from error
            if isinstance(error, OSError):
                raise PeerGone(f"{self._peer}: {error}") from error
            raise
        finally:
            self._turn.release()

    def _read(self, segments: Segments, memory: memoryview, deadline: float) -> None:
        if self._connection is None:
            self._connection = _dial(self._theirs, self._tls, min(deadline, time.monotonic() + _DIAL_S))
        if self._closed:  # looked at after the dial: `close` ends the connection that it finds
            raise PeerGone(f"{self._peer} is not connected")
        connection = self._connection
        region = self._region_numbers[segments.remote_region]
        for start in range(0, segments.sizes.size, _SEGMENTS_MAX):
            part = slice(start, start + _SEGMENTS_MAX)
            sizes = segments.sizes[part]
            request = _REQUEST.pack(region, sizes.size) + segments.remote[part].tobytes() + sizes.tobytes()
            _send(connection, [memoryview(request)], deadline)
            self._check_answer(connection, deadline)
            _receive(connection, _runs(memory, segments.local[part], sizes), deadline)

    def _check_answer(self, connection: socket.socket, deadline: float) -> None:
        (refusal_bytes,) = _ANSWER.unpack(_receive_bytes(connection, _ANSWER.size, deadline))
        if refusal_bytes > _REFUSAL_BYTES_MAX:
            raise ConnectionError("the owner's answer makes no sense")
        if refusal_bytes:
            why = _receive_bytes(connection, refusal_bytes, deadline).decode(errors="replace")
            raise _OwnerRefused(f"{self._peer} refuses the read: {why}")

    def close(self) -> None:
        """Ends a read under way; when this returns, none writes any more."""
        self._closed = True
        connection = self._connection
        if connection is not None:
            _shut(connection)
        with self._turn:
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _OwnerRefused(TransportError):
    """The owner will not serve this; the connection is in order."""


def _dial(theirs: Exported, tls: Tls | None, deadline: float) -> socket.socket:
    """A connection on which both sides have shown that they hold the token. Raises OSError."""
    connection = socket.create_connection((theirs.host, theirs.port), timeout=_left(deadline))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            connection.settimeout(_left(deadline))
            name = tls.files.server_name or theirs.host
            connection = tls.client_context().wrap_socket(connection, server_hostname=name)
        greeting = _receive_bytes(connection, len(_MAGIC) + _NONCE_BYTES, deadline)
        if not greeting.startswith(_MAGIC):
            raise ConnectionError("there is no Tandem node")
        nonces = greeting[len(_MAGIC) :], secrets.token_bytes(_NONCE_BYTES)
        _send(connection, [memoryview(nonces[1] + sign(theirs.token, _READER, *nonces))], deadline)
        if not verify(_receive_bytes(connection, MAC_BYTES, deadline), theirs.token, _OWNER, *nonces):
            raise ConnectionError("there is another node by now")
    except BaseException:
        connection.close()
        raise
    return connection


# --------------------------------------------------------------------------------------------------------- the owner


class _Server:
    """Serves reads of this process's regions. Idle, all its threads wait in the kernel."""

    def __init__(self, host: str, token: bytes, memory: Mapping[str, memoryview], tls: Tls | None) -> None:
        self._token = token
        self._memory = tuple(memory.items())
        self._sizes = {name: view.nbytes for name, view in memory.items()}
        self._tls = tls
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.port: int = self._listener.getsockname()[1]
        #: Guards what follows.
        self._lock = threading.Lock()
        self._serving: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._acceptor = threading.Thread(target=self._accept, name="kv-tcp-accept", daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                self._start(self._listener.accept()[0])
            except (OSError, RuntimeError) as error:
                if self._closed:
                    return
                log.warning("accepting a reader: %s", error)
                time.sleep(0.1)  # no file descriptors or threads, most likely: do not spin until there are some

    def _start(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_DIAL_S)
            if self._tls is not None:
                context = self._tls.server_context()
                connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=self._serve, args=(connection,), name="kv-tcp-serve", daemon=True)
            with self._lock:
                if self._closed or len(self._serving) >= _CONNECTIONS_MAX:
                    connection.close()
                    return
                thread.start()
                self._serving[connection] = thread
        except BaseException:
            connection.close()
            raise

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._welcome(connection)
            while self._answer(connection):
                pass
        except OSError as error:
            log.debug("a reader is gone: %s", error)
        finally:
            connection.close()
            with self._lock:
                self._serving.pop(connection, None)

    def _welcome(self, connection: socket.socket) -> None:
        """Raises OSError unless the reader holds the token."""
        deadline = time.monotonic() + _DIAL_S
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        if isinstance(connection, ssl.SSLSocket):
            connection.do_handshake()
        nonce = secrets.token_bytes(_NONCE_BYTES)
        _send(connection, [memoryview(_MAGIC + nonce)], deadline)
        reply = _receive_bytes(connection, _NONCE_BYTES + MAC_BYTES, deadline)
        nonces = nonce, reply[:_NONCE_BYTES]
        if not verify(reply[_NONCE_BYTES:], self._token, _READER, *nonces):
            raise ConnectionError("the reader does not hold the token")
        _send(connection, [memoryview(sign(self._token, _OWNER, *nonces))], deadline)

    def _answer(self, connection: socket.socket) -> bool:
        """Waits for one request and serves it; False when the reader has left, or makes no sense."""
        raw = _receive_bytes(connection, _REQUEST.size, None)
        region, count = _REQUEST.unpack(raw)
        if not 0 < count <= _SEGMENTS_MAX:
            return False
        raw = _receive_bytes(connection, 16 * count, time.monotonic() + _STALL_S)
        offsets, sizes = np.frombuffer(raw, np.uint64).reshape(2, count)
        try:
            if region >= len(self._memory):
                raise TransportError(f"there is no region {region}")
            name, memory = self._memory[region]
            check_bounds(Segments(name, name, offsets, offsets, sizes), self._sizes, self._sizes)
        except TransportError as error:
            why = str(error).encode()[:_REFUSAL_BYTES_MAX]
            _send(connection, [memoryview(_ANSWER.pack(len(why)) + why)], None)
            return True
        _send(connection, [memoryview(_ANSWER.pack(0)), *_runs(memory, offsets, sizes)], None)
        return True

    def close(self) -> None:
        """When this returns, nothing is sent from the regions any more."""
        with self._lock:
            self._closed = True
            serving = dict(self._serving)
        _shut(self._listener)
        self._listener.close()
        self._acceptor.join()
        for connection in serving:
            _shut(connection)
        for thread in serving.values():
            thread.join()


# ------------------------------------------------------------------------------------------------------------- bytes


def _runs(memory: memoryview, offsets: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> list[memoryview]:
    """The segments' memory, neighbours joined, nothing empty."""
    if not sizes.all():
        offsets, sizes = offsets[sizes > 0], sizes[sizes > 0]
    if not sizes.size:
        return []
    first = np.flatnonzero(np.concatenate(([True], offsets[:-1] + sizes[:-1] != offsets[1:])))
    starts = offsets[first]
    ends = starts + np.add.reduceat(sizes, first)
    return [memory[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _send(connection: socket.socket, views: list[memoryview], deadline: float | None) -> None:
    """Without a deadline, as long as the other side goes on taking. Raises OSError."""
    if isinstance(connection, ssl.SSLSocket):
        _move(connection, lambda left: connection.send(left[0]), views, deadline)
    else:
        _move(connection, connection.sendmsg, views, deadline)


def _receive(connection: socket.socket, views: list[memoryview], deadline: float | None) -> None:
    """Raises OSError. Without a deadline it waits for ever: that is how idle connections wait for requests."""
    if isinstance(connection, ssl.SSLSocket):
        _move(connection, lambda left: connection.recv_into(left[0]), views, deadline, None)
    else:
        _move(connection, lambda left: connection.recvmsg_into(left)[0], views, deadline, None)


def _receive_bytes(connection: socket.socket, nbytes: int, deadline: float | None) -> bytes:
    buffer = bytearray(nbytes)
    _receive(connection, [memoryview(buffer)], deadline)
    return bytes(buffer)


def _move(
    connection: socket.socket,
    step: Callable[[Sequence[memoryview]], int],
    views: list[memoryview],
    deadline: float | None,
    patience_s: float | None = _STALL_S,
) -> None:
    """Calls `step` with what is left until nothing is. Each call is given until the deadline, or `patience_s`."""
    first = 0
    while first < len(views):
        connection.settimeout(patience_s if deadline is None else _left(deadline))
        moved = step(views[first : first + _VECTORS_MAX])
        if not moved:
            raise ConnectionError("the connection was closed")
        while first < len(views) and moved >= views[first].nbytes:
            moved -= views[first].nbytes
            first += 1
        if moved:
            views[first] = views[first][moved:]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def _shut(connection: socket.socket) -> None:
    """Wakes whoever waits on it. Not SSLSocket's shutdown, after which its other thread would send in the clear."""
    try:
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        log.debug("the connection was down already")
