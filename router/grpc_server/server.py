"""Listens, and hands each call to the handler of its method. Handlers are registered the way gRPC's code generator
does it, so services' generated `add_..._to_server` take this server as well as gRPC's own."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

import grpc

from router.grpc_server.call import Call, Malformed, Metadata, metadata, timeout_s
from router.grpc_server.connection import Connection, ConnectionLimits, Connections, Headers
from trust.tls import Tls

_log = logging.getLogger(__name__)

_ENCODINGS = ("", "identity", "gzip", "deflate")


class _Details(NamedTuple):
    """What gRPC's handlers are asked by."""

    method: str
    invocation_metadata: Metadata


class GrpcServer:
    def __init__(
        self,
        *,
        message_bytes_max: int,
        limits: ConnectionLimits | None = None,
        after_read: Callable[[], None] = lambda: None,
    ) -> None:
        """`after_read` is called when all that a connection brought at a time was handed on."""
        self._message_bytes_max = message_bytes_max
        self._limits = limits or ConnectionLimits()
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._connections = Connections(after_read)
        self._listeners: list[asyncio.Server] = []
        self._sockets: list[tuple[socket.socket, ssl.SSLContext | None]] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, object]) -> None:
        """gRPC's own shortcut to the same handlers."""

    def bind(self, host: str, port: int, tls: Tls | None = None, *, shared: bool = False) -> int:
        """The port that is listened on once the server starts; `shared` with other processes that say so. Raises
        OSError."""
        context = None if tls is None else tls.renewing_context("h2")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host.strip("[]"), port), family=family, backlog=1024, reuse_port=shared)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited; asyncio sets it for its own only
        self._sockets.append((listener, context))
        return int(listener.getsockname()[1])

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for listener, tls in self._sockets:
            self._listeners.append(await loop.create_server(self._connection, sock=listener, ssl=tls, backlog=1024))

    async def stop(self, grace_s: float | None) -> None:
        """Takes no more calls; those that run have so long to end. Also of one that was never started, and again."""
        for listener in self._listeners:
            listener.close()
        for bound, _ in self._sockets:
            bound.close()
        for connection in tuple(self._connections.open):
            connection.go_away()
        if open_still := [connection.lost for connection in self._connections.open]:
            await asyncio.wait(open_still, timeout=grace_s or 0.0)
        for connection in tuple(self._connections.open):
            connection.abort()

    def _connection(self) -> Connection:
        return Connection(self._open, self._limits, self._connections)

    # Calls.

    def _open(self, connection: Connection, stream_id: int, headers: Headers, end: bool) -> Call:
        fields = dict(headers)
        refusal: Malformed | None = None
        said, timeout = [], None
        try:
            said = metadata(headers)
            if b"grpc-timeout" in fields:
                timeout = timeout_s(fields[b"grpc-timeout"].decode("latin-1"))
        except Malformed as error:
            refusal = error
        encoding = fields.get(b"grpc-encoding", b"").decode("latin-1")
        if encoding not in _ENCODINGS:
            refusal = Malformed(grpc.StatusCode.UNIMPLEMENTED, f"grpc-encoding {encoding[:40]!r} is not supported")
        path = fields.get(b":path", b"").decode("latin-1")
        handler = None
        if refusal is None and (handler := self._handler(path, said)) is None:
            refusal = Malformed(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {path[:200]!r} here")

        not_grpc = _http_refusal(fields)

        def run(call: Call) -> None:
            if call.task is not None:
                return
            if not_grpc:
                call.say_http_status(not_grpc)
            self._run(call, handler, refusal)

        call = Call(
            connection,
            stream_id,
            said,
            timeout_s=timeout,
            encoding=encoding,
            message_bytes_max=self._message_bytes_max,
            whole=run,
        )
        if end:
            call.half_closed = True
        if end or refusal is not None or not_grpc or (handler is not None and handler.request_streaming):
            run(call)
        return call

    def _handler(self, path: str, said: Metadata) -> Any:
        details = _Details(path, said)
        for handlers in self._handlers:
            if (handler := handlers.service(details)) is not None:  # type: ignore[arg-type]
                return handler
        return None

    def _run(self, call: Call, handler: Any, refusal: Malformed | None) -> None:
        loop = asyncio.get_running_loop()
        if refusal is not None:
            task = loop.create_task(_refuse(call, refusal))
            call.serve(task, None, None)
        else:
            task = loop.create_task(_serve(call, handler))
            call.serve(task, handler.request_deserializer, handler.response_serializer)


def _http_refusal(fields: Mapping[bytes, bytes]) -> bytes:
    """The HTTP status for what is no call of gRPC; empty for one that is."""
    if fields[b":method"] != b"POST":
        return b"405"
    kind = fields.get(b"content-type", b"").partition(b";")[0].strip()
    return b"" if kind.partition(b"+")[0] == b"application/grpc" else b"415"


async def _refuse(call: Call, refusal: Malformed) -> None:
    call.say_status(refusal.code, str(refusal), ())


async def _serve(call: Call, handler: Any) -> None:
    try:
        await _answer(call, handler)
        call.finish()
    except grpc.aio.AbortError:
        pass
    except Malformed as error:
        call.say_status(error.code, str(error), ())
    except asyncio.CancelledError:
        call.say_status(grpc.StatusCode.CANCELLED, "", ())
    except Exception:
        _log.exception("internal error")
        call.say_status(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details", ())


async def _answer(call: Call, handler: Any) -> None:
    request = call if handler.request_streaming else call.only_message()
    behaviour = _behaviour(handler)
    answers = behaviour(request, call)
    if inspect.isasyncgen(answers):
        async with aclosing(answers):
            async for answer in answers:
                await call.write(answer)
        return
    answer = await answers
    if not handler.response_streaming:
        await call.write(answer)


def _behaviour(handler: Any) -> Callable[[object, Call], Any]:
    if handler.request_streaming:
        return handler.stream_stream if handler.response_streaming else handler.stream_unary
    return handler.unary_stream if handler.response_streaming else handler.unary_unary
