"""One call: what gRPC's API calls a servicer context, over one HTTP/2 stream.

Only what handlers use is here. A handler is cancelled when the client leaves, its connection breaks, or its deadline
passes; whatever it says after its status was said is lost.
"""

from __future__ import annotations

import asyncio
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote_from_bytes

import grpc

from router.grpc_server import frames as h2

if TYPE_CHECKING:
    from router.grpc_server.connection import Connection

Metadata = Sequence[tuple[str, str | bytes]]

_BEGIN = b"\x88" + h2.header_block(  # :status 200
    ((b"content-type", b"application/grpc"), (b"grpc-accept-encoding", b"identity,deflate,gzip"))
)
_OK = h2.header_block(((b"grpc-status", b"0"),))
#: Characters of a status message that need no escape.
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
#: zlib's names for the encodings of messages.
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
#: Timers take no infinity.
_TIMEOUT_S_MAX = 30 * 24 * 3600.0


class Malformed(Exception):
    """Of the client's making; said as a status."""

    def __init__(self, code: grpc.StatusCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class Call:
    def __init__(
        self,
        connection: Connection,
        stream_id: int,
        metadata: Metadata,
        *,
        timeout_s: float | None,
        encoding: str,
        message_bytes_max: int,
        whole: Callable[[Call], None],
    ) -> None:
        """`whole` is called when the request has ended, or can't be read."""
        #: What may be sent, less the connection's `initial_window`.
        self.window = 0
        self.half_closed = False
        #: The status was said, or nobody is there to hear it.
        self.over = False
        #: Runs the handler.
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._stream_id = stream_id
        self._metadata = metadata
        self._encoding = encoding
        self._message_bytes_max = message_bytes_max
        self._whole = whole
        self._deserialize: Callable[[bytes], object] = bytes
        self._serialize: Callable[[object], bytes] = bytes  # type: ignore[assignment]
        self._began = False
        self._trailing: Metadata = ()
        self._code = grpc.StatusCode.OK
        self._details = ""
        # Of the request.
        #: As it came. Messages are cut from it, and unpacked, when the handler takes them: so what waits is as large
        #: as what was sent, whatever it would become.
        self._request = bytearray()
        #: A whole message is in it.
        self._ready = False
        #: Received, and no leave given for more.
        self._ungranted = 0
        self._came: asyncio.Future[None] | None = None
        self._at_once: Callable[[Any], None] | None = None
        self._fault: Exception | None = None
        self._broken: Malformed | None = None
        # Of the answer, while there is no room for it.
        self._writers = 0
        self._turn: asyncio.Lock | None = None
        self._leave: asyncio.Future[None] | None = None
        loop = asyncio.get_running_loop()
        self._deadline = None if timeout_s is None else loop.time() + min(timeout_s, _TIMEOUT_S_MAX)
        self._timer = None if self._deadline is None else loop.call_at(self._deadline, self._expire)

    def serve(
        self,
        task: asyncio.Task[None],
        deserialize: Callable[[bytes], object] | None,
        serialize: Callable[[object], bytes] | None,
    ) -> None:
        self.task = task
        task.add_done_callback(lambda _: self.end())  # also of one that is cancelled before it begins
        self._deserialize = deserialize or bytes
        self._serialize = serialize or bytes  # type: ignore[assignment]

    # The connection's side.

    def received(self, data: bytes, *, end: bool) -> None:
        self._ungranted += len(data)
        if self._ungranted > self._connection.stream_window:
            self._connection.reset(self._stream_id, h2.FLOW_CONTROL_ERROR)
            self.cancel()
            return
        self.half_closed = end
        if self._broken is None:
            self._request += data
            self._connection.unread += len(data)
            self._look()
        if end or self._broken is not None:
            self._whole(self)
        if self._came is not None and not self._came.done() and not self._gave():
            self._came.set_result(None)

    def _look(self) -> None:
        """Whether the next message is whole, or will never be."""
        request = self._request
        size = 5 + int.from_bytes(request[1:5]) if len(request) >= 5 else 5
        self._ready = len(request) >= size
        if size - 5 > self._message_bytes_max:
            why = f"Received message larger than max ({size - 5} vs. {self._message_bytes_max})"
            self._break(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        elif self._ready:
            pass
        elif self.half_closed:
            if request:
                self._break(grpc.StatusCode.INVALID_ARGUMENT, "the request ended in the middle of a message")
        elif self._connection.is_crammed:
            self._break(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much of this connection's requests waits to be whole")
        else:
            self._grant(self._connection.grant_bytes)

    def _break(self, code: grpc.StatusCode, why: str) -> None:
        self._broken = Malformed(code, why)
        self._ready = False
        self._drop()

    def _drop(self) -> None:
        self._connection.unread -= len(self._request)
        self._request.clear()

    def _gave(self) -> bool:
        """Whether all that came was taken at once."""
        if self._at_once is None or self.half_closed or self._broken is not None:
            return False
        try:
            while self._ready:
                self._at_once(self._take())
        except Exception as fault:  # the handler's, who waits; not the connection's
            self._fault = fault
            return False
        return True

    def _decompressed(self, message: bytes) -> bytes:
        if self._encoding not in _WINDOW_BITS:
            raise Malformed(
                grpc.StatusCode.INVALID_ARGUMENT, f"a compressed message, and grpc-encoding is {self._encoding!r}"
            )
        inflate = zlib.decompressobj(_WINDOW_BITS[self._encoding])
        try:
            plain = inflate.decompress(message, self._message_bytes_max)
        except zlib.error as error:
            raise Malformed(grpc.StatusCode.INVALID_ARGUMENT, f"a message can't be decompressed: {error}") from None
        if not inflate.eof:
            raise Malformed(grpc.StatusCode.RESOURCE_EXHAUSTED, "a message is too large when decompressed, or cut off")
        return plain

    def may_send(self) -> None:
        """There may be leave to."""
        if self._leave is not None and not self._leave.done() and self.window + self._connection.initial_window > 0:
            self._leave.set_result(None)

    def cancel(self) -> None:
        """The client has left."""
        self.over = True
        if self.task is not None:
            self.task.cancel()
        else:
            self.end()

    def _expire(self) -> None:
        if not self.over:
            self.say_status(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed", ())
            self.cancel()

    def _grant(self, least: int = 0) -> None:
        if self._ungranted > least:
            granted, self._ungranted = self._ungranted, 0
            self._connection.grant(self._stream_id, granted, more=not self.half_closed)

    # The server's side.

    def end(self) -> None:
        """Nothing runs for it any more."""
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
        self._drop()
        self._grant()
        self._connection.forget(self._stream_id)

    def only_message(self) -> object:
        """Of a request that is whole. Raises Malformed."""
        if self._broken is not None:
            raise self._broken
        if not self._ready:
            raise Malformed(grpc.StatusCode.UNIMPLEMENTED, "one message is expected, none came")
        message = self._take()
        if self._request or self._broken is not None:
            raise Malformed(grpc.StatusCode.UNIMPLEMENTED, "one message is expected, more came")
        return message

    def _take(self) -> object:
        """Raises Malformed."""
        size = 5 + int.from_bytes(self._request[1:5])
        packed, message = self._request[0], bytes(self._request[5:size])
        del self._request[:size]
        self._connection.unread -= size
        self._look()
        if packed:
            message = self._decompressed(message)
        try:
            return self._deserialize(message)
        except Exception:
            raise Malformed(grpc.StatusCode.INVALID_ARGUMENT, "the request's message can't be read") from None

    def say_status(self, code: grpc.StatusCode, details: str, metadata: Metadata) -> None:
        """The answer's end. Nothing happens when it was said, or nobody is there to hear it."""
        if self.over:
            return
        self.over = True
        block = _OK
        if code is not grpc.StatusCode.OK or details or metadata:
            said = [(b"grpc-status", str(code.value[0]).encode())]
            if details:
                said.append((b"grpc-message", quote_from_bytes(details.encode(), safe=_PLAIN).encode()))
            block = h2.header_block((*said, *map(_field, metadata)))
        connection, stream_id = self._connection, self._stream_id
        connection.send_headers(stream_id, block if self._began else _BEGIN + block, end=True)
        if not self.half_closed:  # it need not send the rest
            connection.reset(stream_id, h2.NO_ERROR)

    def say_http_status(self, status: bytes) -> None:
        """To who does not speak gRPC."""
        if not self.over:
            self.over = self._began = True
            block = h2.header_block(((b":status", status),))
            self._connection.send_headers(self._stream_id, block, end=True)
            if not self.half_closed:
                self._connection.reset(self._stream_id, h2.NO_ERROR)

    def finish(self) -> None:
        self.say_status(self._code, self._details, self._trailing)

    # For handlers, under gRPC's names.

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> object:
        while not self._ready:
            if self._fault is not None:
                raise self._fault
            if self._broken is not None:
                raise self._broken
            if self.half_closed:
                raise StopAsyncIteration
            self._came = asyncio.get_running_loop().create_future()
            await self._came
        return self._take()

    def at_once(self, take: Callable[[Any], None]) -> None:
        """While a handler waits for a message, `take` gets it, in the very turn of the loop that it comes."""
        self._at_once = take

    async def read(self) -> object:
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            return grpc.aio.EOF

    async def write(self, message: object) -> None:
        """Waits while the client reads nothing. Writes of one call leave in the order they were begun."""
        data = self._serialize(message)
        if self.over:
            return
        if not self.write_now(data):
            await self._write_in_parts(b"\0" + len(data).to_bytes(4) + data)

    def write_now(self, data: bytes) -> bool:
        """One message, if there is room for it."""
        if self.over:
            return True
        connection, size = self._connection, len(data) + 5
        if (
            size > self.window + connection.initial_window
            or size > connection.window
            or size > h2.FRAME_BYTES_MAX
            or connection.is_crowded
            or self._writers
        ):
            return False
        self._begin()
        self.window -= size
        connection.window -= size
        connection.send(h2.message_frame(self._stream_id, data))
        return True

    def push(self) -> None:
        """What was written leaves now, before the other work of this turn of the loop."""
        self._connection.push()

    def carry_out(self) -> None:
        """What was taken so far is followed up, and what is said of it leaves, before the rest that was read is."""
        self._connection.carry_out()

    async def _write_in_parts(self, data: bytes) -> None:
        if self._turn is None:
            self._turn = asyncio.Lock()
        self._writers += 1
        try:
            async with self._turn:
                await self._write_parts(data)
        finally:
            self._writers -= 1

    async def _write_parts(self, data: bytes) -> None:
        connection = self._connection
        self._begin()
        at = 0
        try:
            while at < len(data) and not self.over:
                leave = self.window + connection.initial_window
                if leave <= 0:
                    await self._leave_to_send()
                    continue
                room = min(leave, connection.window, h2.FRAME_BYTES_MAX)
                if room <= 0 or connection.paused:
                    await connection.room()
                    continue
                part = data[at : at + room]
                at += len(part)
                self.window -= len(part)
                connection.window -= len(part)
                connection.send(h2.frame(h2.DATA, 0, self._stream_id, part))
        except asyncio.CancelledError:
            if at and not self.over:  # whatever followed would be taken for the rest of this message
                self.over = True
                connection.reset(self._stream_id, h2.CANCEL)
            raise
        connection.wake()

    async def _leave_to_send(self) -> None:
        self._connection.wake()  # others may have it
        self._leave = asyncio.get_running_loop().create_future()
        await self._leave

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self._begin(metadata)

    def _begin(self, metadata: Metadata = ()) -> None:
        if not self._began and not self.over:
            self._began = True
            block = _BEGIN + h2.header_block(map(_field, metadata)) if metadata else _BEGIN
            self._connection.send_headers(self._stream_id, block)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        self.say_status(code, details, trailing_metadata or self._trailing)
        raise grpc.aio.AbortError

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._trailing = metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - asyncio.get_running_loop().time())

    def peer(self) -> str:
        address = self._connection.info("peername")
        if not isinstance(address, tuple):
            return "unknown"
        return f"ipv6:[{address[0]}]:{address[1]}" if ":" in address[0] else f"ipv4:{address[0]}:{address[1]}"

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """A verified certificate's names, as gRPC calls them."""
        shown = self._connection.info("peercert")
        if not isinstance(shown, dict):
            return {}
        names = shown.get("subjectAltName", ())
        return {
            "peer_uri": [value.encode() for kind, value in names if kind == "URI"],
            "peer_dns": [value.encode() for kind, value in names if kind == "DNS"],
        }

    def cancelled(self) -> bool:
        return self.task is not None and self.task.cancelled()


def metadata(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str | bytes]]:
    """What a client added to its call. Raises Malformed."""
    found: list[tuple[str, str | bytes]] = []
    for name, value in fields:
        if name[:1] == b":" or name in _OUR_OWN:
            continue
        text = name.decode("ascii", "replace")
        if text.endswith("-bin"):
            try:
                for one in value.split(b","):
                    found.append((text, b64decode(one + b"=" * (-len(one) % 4), validate=True)))
            except ValueError:
                raise Malformed(grpc.StatusCode.INVALID_ARGUMENT, f"metadata {text} is not base64") from None
        else:
            found.append((text, value.decode("latin-1")))
    return found


_OUR_OWN = frozenset((b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"))


def timeout_s(text: str) -> float:
    """Of `grpc-timeout`. Raises Malformed."""
    digits, unit = text[:-1], text[-1:]
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 8 and unit in _UNITS_S):
        raise Malformed(grpc.StatusCode.INVALID_ARGUMENT, f"grpc-timeout is not a timeout: {text[:20]!r}")
    return int(digits) * _UNITS_S[unit]


def _field(pair: tuple[str, str | bytes]) -> tuple[bytes, bytes]:
    name, value = pair
    if name.endswith("-bin"):
        raw = value if isinstance(value, bytes) else value.encode()
        return name.encode(), b64encode(raw).rstrip(b"=")
    return name.encode(), value.encode("latin-1", "replace") if isinstance(value, str) else value
