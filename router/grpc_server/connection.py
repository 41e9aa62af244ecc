"""One HTTP/2 connection of a server: frames in, calls out, and what the calls say in as few writes as possible.

A connection that breaks the protocol is told why (GOAWAY) and closed; a stream that does is reset. Everything that the
other side may make us keep is bounded: streams, header blocks, bytes of requests, control frames that it does not read
the answers to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import uniform
from typing import Protocol, cast

from hpack import Decoder
from hpack.exceptions import HPACKError

from router.grpc_server import frames as h2

_log = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]

#: More than this of one turn of the loop is not held back, so that a client that does not read stops us soon.
_TURN_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    streams_max: int = 2_000
    header_bytes_max: int = 65_536
    #: Of one stream's request that may be on its way; what was read makes room again.
    stream_window: int = 1 << 20
    #: Of all requests of one connection that wait to be whole, or to be read.
    unread_bytes_max: int = 64 << 20
    #: Until the client has said its settings.
    greeting_timeout_s: float = 20.0
    #: A silent connection is asked for a sign of life after so long, and closed after as long again.
    silence_s_max: float = 60.0
    #: Then it takes no more calls (GOAWAY), and clients open another: so they spread over routers. 0: for ever.
    age_s_max: float = 0.0
    #: Answers to control frames that a client has not read.
    unread_answers_max: int = 1 << 18


class Stream(Protocol):
    """The connection's view of one call."""

    #: How many bytes may be sent on it.
    window: int
    #: It has sent its whole request.
    half_closed: bool

    def received(self, data: bytes, *, end: bool) -> None: ...

    def cancel(self) -> None:
        """The client has left. `Connection.forget` follows once it is over."""
        ...


#: Makes a stream of a request's headers. `end`: nothing follows them.
Opener = Callable[["Connection", int, Headers, bool], Stream]


class _Broken(Exception):
    """The other side broke the protocol."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Connections:
    """All of a server's."""

    def __init__(self, after_read: Callable[[], None]) -> None:
        self.after_read = after_read
        self.open: set[Connection] = set()
        #: Those that have something to send, in this turn of the loop.
        self.unsent: list[Connection] = []

    def flush(self) -> None:
        unsent, self.unsent = self.unsent, []
        for connection in unsent:
            connection.flush()


class Connection(asyncio.Protocol):
    def __init__(self, opener: Opener, limits: ConnectionLimits, everyone: Connections) -> None:
        self._opener = opener
        self._limits = limits
        #: Less leave than this on one stream is not worth a frame yet.
        self.grant_bytes = limits.stream_window // 2
        self._everyone = everyone
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(max_header_list_size=limits.header_bytes_max)
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._greeted = False
        #: Streams whose calls run, also those that were reset: so resetting makes no room for more.
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        #: A header block that continues: its stream, whether the stream ends with it, and the block so far.
        self._block: tuple[int, bool, bytes] | None = None
        #: What may be sent, by the other side's leave.
        self.window = h2.WINDOW_DEFAULT
        self._initial_window = h2.WINDOW_DEFAULT
        #: The socket takes no more for now.
        self.paused = False
        #: Bytes of answers to control frames since it was so.
        self._answers_unread = 0
        self._room: list[asyncio.Future[None]] = []
        self._out: list[bytes] = []
        self._out_bytes = 0
        #: Received and not given leave for again.
        self._owed = 0
        #: Of requests, received and not taken by their calls yet.
        self.unread = 0
        self._going_away = False
        self._heard = True
        self._timer: asyncio.TimerHandle | None = None
        self._age_timer: asyncio.TimerHandle | None = None
        #: Done when the connection is over.
        self.lost: asyncio.Future[None] = self._loop.create_future()

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._everyone.open.add(self)
        limits = self._limits
        self.send(
            h2.settings(
                (
                    (h2.STREAMS_MAX, limits.streams_max),
                    (h2.INITIAL_WINDOW, limits.stream_window),
                    (h2.HEADER_LIST_MAX, limits.header_bytes_max),
                )
            )
            + h2.window_update(0, limits.unread_bytes_max)
        )
        self._timer = self._loop.call_later(limits.greeting_timeout_s, self._look_for_silence)
        if limits.age_s_max:
            age_s = limits.age_s_max * uniform(0.9, 1.1)  # those that came together do not leave together
            self._age_timer = self._loop.call_later(age_s, self.go_away, "the connection is old; open another")

    def connection_lost(self, error: Exception | None) -> None:
        self._everyone.open.discard(self)
        self._transport = None
        self.lost.set_result(None)
        for timer in (self._timer, self._age_timer):
            if timer is not None:
                timer.cancel()
        for stream in tuple(self._streams.values()):
            stream.cancel()
        self._wake()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._answers_unread = 0
        self._wake()

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        self._heard = True
        try:
            self._parse(self._rest + data if self._rest else data)
        except _Broken as broken:
            self._say_goodbye(broken.code, str(broken))
            self.close()
        except Exception:
            _log.exception("internal error")
            self._say_goodbye(h2.INTERNAL_ERROR, "internal error")
            self.close()
        self._everyone.after_read()
        self._everyone.flush()

    # For calls.

    def send(self, data: bytes) -> None:
        """All that is sent in one turn of the loop leaves in one write."""
        if not self._out:
            if not self._everyone.unsent:
                self._loop.call_soon(self._everyone.flush)
            self._everyone.unsent.append(self)
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes > _TURN_BYTES_MAX:
            self.flush()

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    async def room(self) -> None:
        """Returns when there may be room to send again."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._room.append(waiter)
        await waiter

    def grant(self, stream_id: int, size: int, *, more: bool) -> None:
        """Leave to send so much again; `more` may come on that stream."""
        self._owed += size
        if more and size:
            self.send(h2.window_update(stream_id, size))
        if self._owed >= self._limits.unread_bytes_max // 4:
            self.send(h2.window_update(0, self._owed))
            self._owed = 0

    def reset(self, stream_id: int, code: int) -> None:
        self.send(h2.frame(h2.RST_STREAM, 0, stream_id, code.to_bytes(4)))

    def forget(self, stream_id: int) -> None:
        """Its call is over."""
        del self._streams[stream_id]
        if self._going_away and not self._streams:
            self.close()

    def info(self, name: str) -> object:
        return None if self._transport is None else self._transport.get_extra_info(name)

    # For the server.

    def go_away(self, why: str = "the server stops") -> None:
        """Takes no more calls, and closes when the last is over."""
        if self._going_away or self._transport is None:
            return
        self._going_away = True
        self._say_goodbye(h2.NO_ERROR, why)
        if not self._streams:
            self.close()

    def close(self) -> None:
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # Out.

    def flush(self) -> None:
        if self._out:
            data, self._out, self._out_bytes = b"".join(self._out), [], 0
            if self._transport is not None:
                self._transport.write(data)

    def _wake(self) -> None:
        waiters, self._room = self._room, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _answer(self, data: bytes) -> None:
        """To a control frame."""
        if self.paused:
            self._answers_unread += len(data)
            if self._answers_unread > self._limits.unread_answers_max:
                raise _Broken(h2.ENHANCE_YOUR_CALM, "answers to control frames are not read")
        self.send(data)

    def _say_goodbye(self, code: int, why: str) -> None:
        self.send(h2.frame(h2.GOAWAY, 0, 0, self._last_stream.to_bytes(4) + code.to_bytes(4) + why.encode()))

    def _look_for_silence(self) -> None:
        if not self._greeted or not self._heard:
            self.abort()
            return
        self._heard = False
        self.send(h2.frame(h2.PING, 0, 0, b"tandem??"))
        self._timer = self._loop.call_later(self._limits.silence_s_max, self._look_for_silence)

    # In.

    def _parse(self, data: bytes) -> None:
        at, size = 0, len(data)
        if not self._greeted:
            if not h2.PREFACE.startswith(data[: len(h2.PREFACE)]):
                raise _Broken(h2.PROTOCOL_ERROR, "this is not HTTP/2")
            if size < len(h2.PREFACE) + h2.HEAD_BYTES:
                self._rest = data
                return
            at = len(h2.PREFACE)
            if data[at + 3] != h2.SETTINGS:
                raise _Broken(h2.PROTOCOL_ERROR, "settings come first")
            self._greeted = True
        while size - at >= h2.HEAD_BYTES:
            length = int.from_bytes(data[at : at + 3])
            if length > h2.FRAME_BYTES_MAX:
                raise _Broken(h2.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            end = at + h2.HEAD_BYTES + length
            if end > size:
                break
            stream_id = int.from_bytes(data[at + 5 : at + 9]) & h2.WINDOW_MAX
            self._frame(data[at + 3], data[at + 4], stream_id, data[at + h2.HEAD_BYTES : end])
            if self.closed:
                return
            at = end
        self._rest = data[at:]

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is not None and kind != h2.CONTINUATION:
            raise _Broken(h2.PROTOCOL_ERROR, "a header block was not continued")
        if kind == h2.DATA:
            self._data(flags, stream_id, payload)
        elif kind == h2.HEADERS:
            self._headers(flags, stream_id, payload)
        elif kind == h2.CONTINUATION:
            self._continuation(flags, stream_id, payload)
        elif kind == h2.WINDOW_UPDATE:
            self._window_update(stream_id, payload)
        elif kind == h2.RST_STREAM:
            self._reset_by_client(stream_id, payload)
        elif kind == h2.SETTINGS:
            self._settings(flags, stream_id, payload)
        elif kind == h2.PING:
            self._ping(flags, stream_id, payload)
        elif kind == h2.PUSH_PROMISE:
            raise _Broken(h2.PROTOCOL_ERROR, "clients don't push")
        # GOAWAY: it closes when it is done. Priorities and kinds that we don't know change nothing.

    def _data(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id == 0 or stream_id > self._last_stream:
            raise _Broken(h2.PROTOCOL_ERROR, "data of a stream that was never opened")
        size = len(payload)
        self.unread += size
        if flags & h2.PADDED:
            payload = _unpadded(payload)
        stream = self._streams.get(stream_id)
        if stream is None or stream.half_closed:
            self.unread -= size
            self.grant(stream_id, size, more=False)
            if stream is not None:
                stream.cancel()
                self.reset(stream_id, h2.STREAM_CLOSED)
            return
        if (padding := size - len(payload)) > 0:
            self.unread -= padding
            self.grant(stream_id, padding, more=True)
        if self.unread > self._limits.unread_bytes_max:
            raise _Broken(h2.FLOW_CONTROL_ERROR, "more was sent than there was leave for")
        stream.received(payload, end=bool(flags & h2.END_STREAM))

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & h2.PADDED:
            payload = _unpadded(payload)
        if flags & h2.WITH_PRIORITY:
            payload = payload[5:]
        self._header_block(stream_id, bool(flags & h2.END_STREAM), payload, whole=bool(flags & h2.END_HEADERS))

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise _Broken(h2.PROTOCOL_ERROR, "nothing to continue")
        _, end, before = self._block
        self._block = None
        self._header_block(stream_id, end, before + payload, whole=bool(flags & h2.END_HEADERS))

    def _header_block(self, stream_id: int, end: bool, block: bytes, *, whole: bool) -> None:
        if len(block) > self._limits.header_bytes_max:
            raise _Broken(h2.ENHANCE_YOUR_CALM, "headers are too large")
        if not whole:
            self._block = (stream_id, end, block)
            return
        try:
            fields = cast(Headers, self._decoder.decode(block, raw=True))
        except HPACKError as error:
            raise _Broken(h2.COMPRESSION_ERROR, f"headers can't be read: {error}") from None
        if (stream := self._streams.get(stream_id)) is not None:
            if stream.half_closed or not end:
                raise _Broken(h2.PROTOCOL_ERROR, "headers in the middle of a stream")
            stream.received(b"", end=True)  # trailers, which gRPC's clients don't send
        elif stream_id % 2 == 0 or stream_id == 0:
            raise _Broken(h2.PROTOCOL_ERROR, f"a client can't open stream {stream_id}")
        elif stream_id > self._last_stream:
            self._open(stream_id, fields, end)
        # Else: of a stream that is over.

    def _open(self, stream_id: int, fields: Headers, end: bool) -> None:
        if self._going_away or len(self._streams) >= self._limits.streams_max:
            self._last_stream = stream_id
            self.reset(stream_id, h2.REFUSED_STREAM)
            return
        self._last_stream = stream_id
        stream = self._opener(self, stream_id, fields, end)
        stream.window += self._initial_window
        self._streams[stream_id] = stream

    def _window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _Broken(h2.FRAME_SIZE_ERROR, "a window update of another size")
        more = int.from_bytes(payload) & h2.WINDOW_MAX
        if more == 0:
            raise _Broken(h2.PROTOCOL_ERROR, "a window update of nothing")
        if stream_id == 0:
            self.window += more
            if self.window > h2.WINDOW_MAX:
                raise _Broken(h2.FLOW_CONTROL_ERROR, "the window is too large")
        elif (stream := self._streams.get(stream_id)) is not None:
            stream.window += more
            if stream.window > h2.WINDOW_MAX:
                stream.cancel()
                self.reset(stream_id, h2.FLOW_CONTROL_ERROR)
        elif stream_id > self._last_stream:
            raise _Broken(h2.PROTOCOL_ERROR, "leave for a stream that was never opened")
        if self._room:
            self._wake()

    def _reset_by_client(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _Broken(h2.FRAME_SIZE_ERROR, "a reset of another size")
        if stream_id == 0 or stream_id > self._last_stream:
            raise _Broken(h2.PROTOCOL_ERROR, "a reset of a stream that was never opened")
        if (stream := self._streams.get(stream_id)) is not None:
            stream.cancel()

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id != 0 or len(payload) % 6 or (flags & h2.ACK and payload):
            raise _Broken(h2.FRAME_SIZE_ERROR, "settings of another size")
        if flags & h2.ACK:
            return
        for at in range(0, len(payload), 6):
            name, value = int.from_bytes(payload[at : at + 2]), int.from_bytes(payload[at + 2 : at + 6])
            if name == h2.INITIAL_WINDOW:
                if value > h2.WINDOW_MAX:
                    raise _Broken(h2.FLOW_CONTROL_ERROR, "the window is too large")
                for stream in self._streams.values():
                    stream.window += value - self._initial_window
                self._initial_window = value
        # Frames are never longer than every client takes, and our header blocks use no table.
        self._answer(h2.frame(h2.SETTINGS, h2.ACK, 0))
        self._wake()

    def _ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Answered however often: a client that pings to keep its connection has done nothing wrong."""
        if stream_id != 0 or len(payload) != 8:
            raise _Broken(h2.FRAME_SIZE_ERROR, "a ping of another size")
        if not flags & h2.ACK:
            self._answer(h2.frame(h2.PING, h2.ACK, 0, payload))


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise _Broken(h2.PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]
