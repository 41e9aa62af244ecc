"""Transport over ucxx, the living successor of ucx-py: UCX's sockets and shared memory, the owner's process answering.

ucxx gives Python messages, not one-sided reads. So this is `tcp` with another carrier: the owner compares each request
with its registered regions and answers with a copy of the bytes, and the reader copies them to where they belong. Only
the reading thread writes to the destination, so there are no late bytes. Host memory only; its wheels lack RDMA.

The messages are those of `tcp`, with the same proof, both ways, of holding the exported token.

ucxx is asynchronous and tied to one event loop: a thread here runs it for all transports of this kind. Its listener
takes no address to bind, so its port is open on every interface: keep it closed to everyone who is not a worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kv_transfer import ucx_stack
from kv_transfer.handle import MAC_BYTES, sign, verify
from kv_transfer.segments import check_bounds, pieces
from kv_transfer.served import Exported, ServedTransport
from kv_transfer.transport import PeerGone, ReadTimedOut, Segments, TransportError

log = logging.getLogger(__name__)

T = TypeVar("T")
Bytes = NDArray[np.uint8]

_MAGIC = b"tandem kv ucx 1\n"
_NONCE_BYTES = 16
_OWNER, _READER = "tandem kv ucx owner", "tandem kv ucx reader"
_REQUEST = struct.Struct("<II")
_ANSWER = struct.Struct("<Q")

#: Of one answer: both sides hold a copy of it.
_PIECE_BYTES = 4 << 20
_SEGMENTS_MAX = 1 << 16
_REFUSAL_BYTES_MAX = 4096
#: Readers at once; more are turned away.
_CONNECTIONS_MAX = 512
_DIAL_S = 2.0
_CLOSE_S = 5.0
#: How long ucxx's progress thread sleeps when nothing wakes it. Its own choice, 1 ms, is a few percent of a core.
_PROGRESS_DELAY_MS = 100


class UcxTransport(ServedTransport):
    name = "ucx"

    def __init__(self, host: str = "127.0.0.1") -> None:
        """Raises ImportError without the package."""
        super().__init__(host, tls=False)
        self._ucxx = _ucxx(host)

    def _serve(self, token: bytes, memory: Mapping[str, memoryview]) -> _Server:
        return self._ucxx.run(_start_server(self._ucxx, token, memory), _DIAL_S)

    def _dial(self, peer: str, theirs: Exported) -> _Reader:
        reader = _Reader(self._ucxx, peer, theirs)
        reader.dial(time.monotonic() + _DIAL_S)
        return reader


# -------------------------------------------------------------------------------------------------------- the reader


class _Reader:
    def __init__(self, ucxx: _Ucxx, peer: str, theirs: Exported) -> None:
        self._ucxx = ucxx
        self._peer = peer
        self._theirs = theirs
        self._region_numbers = {name: number for number, name in enumerate(theirs.regions)}
        self._turn = threading.Lock()
        self._closed = False
        #: None before the first dial and after a read that failed.
        self._endpoint: Any = None

    def dial(self, deadline: float) -> None:
        """Raises TransportError."""
        with self._turn:
            try:
                self._endpoint = self._call(_dial(self._ucxx.context, self._theirs), deadline)
            except TransportError as error:
                raise TransportError(f"{self._peer} can't be dialled: {error}") from error

    def read(self, segments: Segments, memory: memoryview, deadline: float) -> None:
        destination = np.frombuffer(memory, np.uint8)
        if not self._turn.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise ReadTimedOut(f"other reads from {self._peer} took until the deadline")
        try:
            for piece in pieces(segments, _PIECE_BYTES):
                for start in range(0, piece.sizes.size, _SEGMENTS_MAX):
                    part = slice(start, start + _SEGMENTS_MAX)
                    remote, local, sizes = piece.remote[part], piece.local[part], piece.sizes[part]
                    if sizes.any():
                        self._read(segments.remote_region, remote, local, sizes, destination, deadline)
        except BaseException as error:
            if not isinstance(error, _OwnerRefused):
                self._drop()
            raise
        finally:
            self._turn.release()

    def _read(
        self,
        region: str,
        remote: NDArray[np.uint64],
        local: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        memory: Bytes,
        deadline: float,
    ) -> None:
        if self._closed:
            raise PeerGone(f"{self._peer} is not connected")
        if self._endpoint is None:
            self._endpoint = self._call(
                _dial(self._ucxx.context, self._theirs), min(deadline, time.monotonic() + _DIAL_S)
            )
        request = _REQUEST.pack(self._region_numbers[region], sizes.size) + remote.tobytes() + sizes.tobytes()
        refusal, found = self._call(_ask(self._endpoint, request, int(sizes.sum())), deadline)
        if refusal:
            raise _OwnerRefused(f"{self._peer} refuses the read: {refusal}")
        came = 0
        for start, size in zip(local.tolist(), sizes.tolist(), strict=True):
            memory[start : start + size] = found[came : came + size]
            came += size

    def _call(self, work: Coroutine[Any, Any, T], deadline: float) -> T:
        """Raises ReadTimedOut, PeerGone."""
        try:
            return self._ucxx.run(work, deadline - time.monotonic())
        except TimeoutError as error:
            raise ReadTimedOut(f"{self._peer} did not answer in time") from error
        except Exception as error:
            raise PeerGone(f"{self._peer}: {type(error).__name__} {error}") from error

    def close(self) -> None:
        """Ends a read under way; when this returns, none writes any more."""
        self._closed = True
        endpoint = self._endpoint
        if endpoint is not None:
            self._ucxx.abort(endpoint)
        with self._turn:
            self._drop()

    def _drop(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            self._ucxx.abort(endpoint)


class _OwnerRefused(TransportError):
    """The owner will not serve this; the connection is in order."""


async def _dial(context: Any, theirs: Exported) -> Any:
    """An endpoint on which both sides have shown that they hold the token."""
    address = (await asyncio.to_thread(socket.getaddrinfo, theirs.host, theirs.port))[0][4][0]
    endpoint = await context.create_endpoint(address, theirs.port)
    try:
        greeting = (await _receive(endpoint, len(_MAGIC) + _NONCE_BYTES)).tobytes()
        if not greeting.startswith(_MAGIC):
            raise ConnectionError("there is no Tandem node")
        nonces = greeting[len(_MAGIC) :], secrets.token_bytes(_NONCE_BYTES)
        await _send(endpoint, nonces[1] + sign(theirs.token, _READER, *nonces))
        if not verify((await _receive(endpoint, MAC_BYTES)).tobytes(), theirs.token, _OWNER, *nonces):
            raise ConnectionError("there is another node by now")
    except BaseException:
        _abort(endpoint)
        raise
    return endpoint


async def _ask(endpoint: Any, request: bytes, nbytes: int) -> tuple[str, Bytes]:
    """Why the owner will not, or empty; and the bytes."""
    await _send(endpoint, request[: _REQUEST.size])
    await _send(endpoint, request[_REQUEST.size :])
    (refusal_bytes,) = _ANSWER.unpack((await _receive(endpoint, _ANSWER.size)).tobytes())
    if not refusal_bytes:
        return "", await _receive(endpoint, nbytes)
    if refusal_bytes > _REFUSAL_BYTES_MAX:
        raise ConnectionError("the owner's answer makes no sense")
    return (await _receive(endpoint, refusal_bytes)).tobytes().decode(errors="replace"), np.empty(0, np.uint8)


# --------------------------------------------------------------------------------------------------------- the owner


async def _start_server(ucxx: _Ucxx, token: bytes, memory: Mapping[str, memoryview]) -> _Server:
    return _Server(ucxx, token, memory)


class _Server:
    """Serves reads of this process's regions. Lives on the loop."""

    def __init__(self, ucxx: _Ucxx, token: bytes, memory: Mapping[str, memoryview]) -> None:
        self._ucxx = ucxx
        self._token = token
        self._memory = tuple((name, np.frombuffer(view, np.uint8)) for name, view in memory.items())
        self._sizes = {name: view.nbytes for name, view in memory.items()}
        self._serving: set[asyncio.Task[None]] = set()
        self._listener = ucxx.context.create_listener(self._welcome)
        self.port: int = self._listener.port

    async def _welcome(self, endpoint: Any) -> None:
        """Runs as long as the reader stays."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            if len(self._serving) <= _CONNECTIONS_MAX:
                async with asyncio.timeout(_DIAL_S):
                    await self._authenticate(endpoint)
                while True:
                    await self._answer(endpoint)
        except Exception as error:
            log.debug("a reader is gone: %s", error)
        finally:
            self._serving.discard(task)
            _abort(endpoint)

    async def _authenticate(self, endpoint: Any) -> None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        await _send(endpoint, _MAGIC + nonce)
        reply = (await _receive(endpoint, _NONCE_BYTES + MAC_BYTES)).tobytes()
        nonces = nonce, reply[:_NONCE_BYTES]
        if not verify(reply[_NONCE_BYTES:], self._token, _READER, *nonces):
            raise ConnectionError("the reader does not hold the token")
        await _send(endpoint, sign(self._token, _OWNER, *nonces))

    async def _answer(self, endpoint: Any) -> None:
        """Waits for one request and serves it. Raises ConnectionError when it makes no sense."""
        region, count = _REQUEST.unpack((await _receive(endpoint, _REQUEST.size)).tobytes())
        if not 0 < count <= _SEGMENTS_MAX:
            raise ConnectionError("the request makes no sense")
        offsets, sizes = (await _receive(endpoint, 16 * count)).view(np.uint64).reshape(2, count)
        try:
            found = self._read(region, offsets, sizes)
        except TransportError as error:
            why = str(error).encode()[:_REFUSAL_BYTES_MAX]
            await _send(endpoint, _ANSWER.pack(len(why)))
            await _send(endpoint, why)
            return
        await _send(endpoint, _ANSWER.pack(0))
        await endpoint.send(found)

    def _read(self, region: int, offsets: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> Bytes:
        """A copy of the wanted bytes. Raises TransportError, which says why not."""
        if region >= len(self._memory):
            raise TransportError(f"there is no region {region}")
        name, memory = self._memory[region]
        check_bounds(Segments(name, name, offsets, offsets, sizes), self._sizes, self._sizes)
        if not 0 < sizes.sum(dtype=np.float64) <= _PIECE_BYTES:
            raise TransportError(f"a request is for 1 to {_PIECE_BYTES} bytes")
        found = np.empty(int(sizes.sum()), np.uint8)
        came = 0
        for start, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            found[came : came + size] = memory[start : start + size]
            came += size
        return found

    def close(self) -> None:
        self._ucxx.run(self._close(), _CLOSE_S)

    async def _close(self) -> None:
        self._listener.close()
        serving = set(self._serving)
        for task in serving:
            task.cancel()
        if serving:
            await asyncio.wait(serving, timeout=_DIAL_S)


# ---------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True, slots=True)
class _Ucxx:
    """This process's ucxx: its context, and the loop on which everything of it runs."""

    loop: asyncio.AbstractEventLoop
    context: Any

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """From another thread. Raises TimeoutError, and then the work is cancelled."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(max(timeout_s, 0.0))
        except TimeoutError:
            future.cancel()
            raise

    def abort(self, endpoint: Any) -> None:
        self.loop.call_soon_threadsafe(_abort, endpoint)


_starting = threading.Lock()
_running: _Ucxx | None = None


def _ucxx(host: str) -> _Ucxx:
    """Started at the first call, ends with the process. Raises ImportError, TransportError."""
    global _running
    with _starting:
        if _running is None:
            ucx_stack.only("ucxx")
            found = ucx_stack.prepare_environment(os.environ, host)
            if found:
                log.warning("UCX settings in the environment: %s", ", ".join(found))
            from ucxx.core import ApplicationContext

            loop = asyncio.new_event_loop()
            # A daemon, and so are the threads that ucxx starts from it: else a process that crashes would not exit.
            threading.Thread(target=loop.run_forever, name="kv-ucx", daemon=True).start()
            making = asyncio.run_coroutine_threadsafe(_make_context(ApplicationContext), loop)
            _running = _Ucxx(loop, making.result(_CLOSE_S))
        return _running


async def _make_context(context_class: Any) -> Any:
    """In the one mode in which neither an idle process spins nor one with a request under way."""
    context = context_class(progress_mode="thread", enable_delayed_submission=True, enable_python_future=True)
    context.worker.stop_progress_thread()
    context.worker.start_progress_thread(polling_mode=False, epoll_timeout=_PROGRESS_DELAY_MS)
    return context


# Tags, not active messages: ucxx files those under the endpoint's address in memory, and a wait that was given up takes
# the first message of the next endpoint that gets the same address.


async def _send(endpoint: Any, message: bytes) -> None:
    await endpoint.send(np.frombuffer(message, np.uint8))


async def _receive(endpoint: Any, nbytes: int) -> Bytes:
    """Into memory of its own, which may still be written to when this is cancelled."""
    buffer = np.empty(nbytes, np.uint8)
    await endpoint.recv(buffer)
    return buffer


def _abort(endpoint: Any) -> None:
    try:
        endpoint.abort()
    except Exception as error:
        log.info("closing an endpoint: %s", error)
