"""HTTP, as thin as it goes: uvicorn's connections with limits on what a client may take, and one request's exchange.

Neither uvicorn's server (its signal handlers, its polling) nor a web framework stands between a token and the socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import zlib
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from email.utils import formatdate
from math import inf
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from router.config import HttpLimits
from router.core.errors import Invalid, TandemError
from router.edge.errors import BodyTooLarge, BodyTooSlow, UnknownEncoding, http_status, openai_error
from trust.tls import Tls

#: Of a body past the limit so much is read, and thrown away, before its sender is told: clients that still write
#: rarely read, and see a broken connection.
_DISCARD_TIMES = 4
#: So much, for so long, of a body that nobody asked for: who is refused unread is told, and may use the connection on.
_DISCARD_BYTES_MAX = 1 << 20
_DISCARD_S_MAX = 1.0
_REQUEST_ID_CHARS_MAX = 128
#: What may wait for a client that does not read, beside its tokens; answers that lag are held as those.
_WRITE_BUFFER_BYTES = 16_384

_EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_DONE = b"data: [DONE]\n\n"

#: zlib's names for the encodings of bodies; `deflate` is zlib's own format.
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}

# uvicorn warns of every malformed request, which would let a client write our log.
logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


class ClientGone(Exception):
    """Nobody is there to be told anything."""


class Exchange:
    """One request and its response: either `reply`, or any number of `event`s and `done`, or `fail`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        self._header = dict(self.headers)
        #: Of a client's certificate that was verified, see `trust.tls.certificate_names`.
        self.certificate_names: tuple[str, ...] = scope.get(_NAMES, ())
        #: The address at the other end, without its port.
        self.peer: str = (scope.get("client") or ("",))[0]
        self._receive = receive
        self._send = send
        #: What `send` belongs to, in uvicorn: says at once whether a write would wait.
        cycle = getattr(send, "__self__", None)
        self._cycle = cycle if isinstance(cycle, RequestResponseCycle) else None
        #: HTTP/1.0 has none: an answer of unknown length ends with its connection.
        self._has_chunks = scope["http_version"] != "1.0"
        self._starting = asyncio.Lock()
        self._started = False
        self._is_unread = True
        said = self.header("x-request-id")
        own = uuid4().hex
        #: For ids of what is made here.
        self.own_id = own
        #: Go with whatever is answered.
        self.also: list[tuple[bytes, bytes]] = []
        #: The client's, or ours where it sent none that a header and a log line can carry.
        self.request_id = said if 0 < len(said) <= _REQUEST_ID_CHARS_MAX and is_visible(said) else own

    def header(self, name: str) -> str:
        return self._header.get(name, "")

    async def body(self, bytes_max: int, timeout_s: float) -> bytes:
        """Raises BodyTooLarge, BodyTooSlow, UnknownEncoding, Invalid, ClientGone. Holds no more than `bytes_max`."""
        encoding = self.header("content-encoding").strip().lower()
        if encoding not in ("", "identity", *_WINDOW_BITS):
            raise UnknownEncoding(f"bodies may be encoded with gzip or deflate, not with {encoding[:40]!r}")
        declared = self.header("content-length")
        too_large = declared.isdecimal() and int(declared) > bytes_max
        if too_large and self.header("expect"):
            raise _too_large(bytes_max)  # it has not begun to send
        self._is_unread = False
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(timeout_s):
                while more and size <= _DISCARD_TIMES * bytes_max:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    size += len(message["body"])
                    more = message["more_body"]
                    too_large = too_large or size > bytes_max
                    if too_large:
                        parts.clear()
                    else:
                        parts.append(message["body"])
        except TimeoutError:
            raise BodyTooSlow(f"the request's body did not come within {timeout_s:g} s") from None
        if too_large:
            raise _too_large(bytes_max)
        data = b"".join(parts)
        return _inflated(data, _WINDOW_BITS[encoding], bytes_max) if encoding in _WINDOW_BITS else data

    async def gone(self) -> None:
        """Returns when the client has left. Call when the body is read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(
        self, body: bytes, *, status: int = 200, kind: bytes = b"application/json", headers: Headers = ()
    ) -> None:
        self._started = True
        own = ((b"content-type", kind), (b"content-length", str(len(body)).encode()))
        await self._begin(status, (*own, *headers))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def event(self, data: bytes) -> None:
        """Whole server-sent events. The first of them begins the response, so that what fails earlier has a status.
        Waits while the client does not read."""
        if not self._started:
            async with self._starting:
                if not self._started:
                    if not self._has_chunks:
                        self._ends_with_connection()
                    await self._begin(200, _EVENT_STREAM)
                    self._started = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def has_room(self) -> bool:
        """For an event at once: the client keeps up."""
        cycle = self._cycle
        if cycle is None or cycle.response_complete or cycle.disconnected or cycle.flow.write_paused:
            return False
        if not self._started:
            return self._has_chunks and not self._starting.locked()
        return cycle.response_started and bool(cycle.chunked_encoding)

    def event_now(self, data: bytes) -> None:
        """An event that there is room for. The same bytes as `event`'s, past what that takes to say that they may be
        sent."""
        assert self._cycle is not None
        if not self._started:
            self._started = True
            _at_once(self._begin(200, _EVENT_STREAM))
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _ends_with_connection(self, length: int = 1 << 62) -> None:
        """uvicorn sends chunks to everybody; what has a length it sends as it is."""
        if self._cycle is not None:
            self._cycle.chunked_encoding, self._cycle.expected_content_length = False, length

    async def done(self) -> None:
        await self.event(_DONE)
        if not self._has_chunks:
            self._ends_with_connection(0)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: TandemError) -> None:
        if self._started:
            await self.event(b"data: " + openai_error(error) + b"\n\n")
            await self.done()
            return
        said = http_status(error)
        is_whole = await self._discard() if self._is_unread else not isinstance(error, BodyTooLarge | BodyTooSlow)
        close = () if is_whole else ((b"connection", b"close"),)  # the rest of its body is not worth reading
        await self.reply(said.body, status=said.status, headers=(*said.headers, *close))

    async def _discard(self) -> bool:
        """Whether the body ended."""
        if self.header("expect"):
            return False  # reading would ask for it
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S_MAX):
                while size <= _DISCARD_BYTES_MAX:
                    message = await self._receive()
                    if message["type"] == "http.disconnect" or not message["more_body"]:
                        return True
                    size += len(message["body"])
        return False

    async def _begin(self, status: int, headers: Headers) -> None:
        own = ((b"date", formatdate(usegmt=True).encode()), (b"x-request-id", self.request_id.encode()))
        start: Message = {"type": "http.response.start", "status": status, "headers": [*headers, *own, *self.also]}
        await self._send(start)


def _at_once(sending: Coroutine[None, None, None]) -> None:
    """uvicorn's sending waits for nothing where there is room."""
    try:
        sending.send(None)
    except StopIteration:
        return
    sending.close()
    raise AssertionError("there was no room")


#: Where a connection leaves them in a request's scope.
_NAMES = "tandem.certificate_names"

Headers = Iterable[tuple[bytes, bytes]]


def is_visible(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _too_large(bytes_max: int) -> BodyTooLarge:
    return BodyTooLarge("body", f"is more than the {bytes_max} bytes allowed", limit=str(bytes_max))


def _inflated(data: bytes, window_bits: int, bytes_max: int) -> bytes:
    """Raises BodyTooLarge, Invalid."""
    inflate = zlib.decompressobj(window_bits)
    try:
        plain = inflate.decompress(data, bytes_max + 1)
    except zlib.error:
        raise Invalid("body", "is not encoded as its content-encoding says") from None
    if len(plain) > bytes_max:
        raise _too_large(bytes_max)
    if not inflate.eof:
        raise Invalid("body", "ends before its content-encoding does")
    return plain


class HttpServer:
    """Listens from `listen` to `close`, in the running loop. Leaves signals and logging alone."""

    def __init__(self, app: ASGIApp, limits: HttpLimits, tls: Tls | None = None, *, age_s_max: float = 0.0) -> None:
        """`age_s_max`: the request that comes after so long is its connection's last; 0: connections grow old."""
        self._limits = limits
        self._age_s_max = age_s_max
        self._tls = tls
        self._config = Config(
            app,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=75,  # longer than proxies keep theirs: else they send into one that is being closed
        )
        self._config.load()
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def listen(self, host: str, port: int, *, shared: bool = False) -> None:
        """`shared`: the port, with other processes that say so. Raises OSError."""
        context = self._tls.renewing_context("http/1.1") if self._tls else None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        backlog = self._config.backlog
        listener = socket.create_server((host, port), family=family, backlog=backlog, reuse_port=shared)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited; asyncio sets it for its own only
        self.port = listener.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(
            self._connection,
            sock=listener,
            backlog=backlog,
            ssl=context,
            ssl_handshake_timeout=self._limits.read_timeout_s if self._tls else None,
        )

    def _connection(self) -> _Connection:
        return _Connection(self._config, self._state, self._limits, self._age_s_max)

    async def close(self, last_words_s: float) -> None:
        """Takes nothing new; what is being answered has that long to be said."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=last_words_s)
        for connection in list(self._state.connections):
            with suppress(RuntimeError):  # of a transport that is closing
                connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=last_words_s)
        self._server = None


def _certificate_names(certificate: Mapping[str, Any]) -> Iterator[str]:
    """As `trust.tls.certificate_names` has them, from `ssl.SSLObject.getpeercert`."""
    for kind, name in certificate.get("subjectAltName", ()):
        if kind in ("URI", "DNS"):
            yield name.lower() if kind == "DNS" else name


class _Connection(HttpToolsProtocol):
    """uvicorn's, with an end to its patience."""

    def __init__(self, config: Config, state: ServerState, limits: HttpLimits, age_s_max: float) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._old_at = self.loop.time() + age_s_max if age_s_max else inf
        #: Runs while a head is awaited: at the beginning, and from the first byte of each later request.
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._write_timer: asyncio.TimerHandle | None = None
        self._names: tuple[str, ...] = ()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self._limits.connections_max:
            self.transport = transport
            transport.abort()
            return
        super().connection_made(transport)
        transport.set_write_buffer_limits(_WRITE_BUFFER_BYTES)
        if (tls := transport.get_extra_info("ssl_object")) is not None:
            self._names = tuple(_certificate_names(tls.getpeercert() or {}))
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes_max:
                self._refuse(431, "the head of the request is too large", "HEAD_TOO_LARGE")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[_NAMES] = self._names  # type: ignore[literal-required]
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()
        if self.loop.time() >= self._old_at:
            self.cycle.keep_alive = False

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not HTTP/1.1", "NOT_HTTP")

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(
            self._limits.read_timeout_s, self._refuse, 408, "the head of the request did not come", "HEAD_TOO_SLOW"
        )

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, why: str, reason: str) -> None:
        """Without a whole head there is no request for the app to answer."""
        self._head_is_here()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # else it would land in the middle of an answer
            error = Invalid("", why)
            error.reason = reason
            body = openai_error(error)
            self.transport.write(
                b"HTTP/1.1 %d \r\ncontent-type: application/json\r\nx-request-id: %s\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%s" % (status, uuid4().hex.encode(), len(body), body)
            )
        self.transport.close()
