"""One HTTP/2 connection of a server: frames in, calls out, and what the calls say in as few writes as possible.

A connection that breaks the protocol is told why (GOAWAY) and closed; a stream that does is reset. Everything that the
other side may make us keep is bounded: streams, header blocks, bytes of requests, control frames that it does not read
the answers to.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import uniform
from typing import Protocol, cast

from hpack import Decoder
from hpack.exceptions import HPACKError

from router.grpc_server import frames as h2

_log = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]

#: So often pieces of a header block count at least: many small ones are no way to keep us busy.
_HEADER_PIECE_BYTES_MIN = 1_024
_FAREWELL = b"farewell"
_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_NEEDED = frozenset((b":method", b":scheme", b":path"))
#: HTTP/1's, which mean nothing here.
_FORBIDDEN = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
_NAME = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
_NO_VALUE = re.compile(rb"[\0\r\n]")

#: More than this of one turn of the loop is not held back, so that a client that does not read stops us soon.
_TURN_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    streams_max: int = 2_000
    header_bytes_max: int = 65_536
    #: Of one stream's request that may be on its way; what was read makes room again.
    stream_window: int = 1 << 20
    #: Of all requests of one connection that wait to be whole, or to be read. One more is refused.
    unread_bytes_max: int = 64 << 20
    #: One more is closed at once.
    connections_max: int = 10_000
    #: Calls that a client takes back, besides as many as it may have. Then it is let go.
    resets_per_s_max: float = 1_000.0
    #: Until the client has said its settings.
    greeting_timeout_s: float = 20.0
    #: A silent connection is asked for a sign of life after so long, and closed after as long again.
    silence_s_max: float = 60.0
    #: Then it takes no more calls (GOAWAY), and clients open another: so they spread over routers. 0: for ever.
    age_s_max: float = 0.0
    #: Of what a client has not read. More come from its own frames only (answers to them), so no more are read then.
    unsent_bytes_max: int = 1 << 18


class Stream(Protocol):
    """The connection's view of one call."""

    #: How many bytes may be sent on it, less the connection's `initial_window`.
    window: int
    #: It has sent its whole request.
    half_closed: bool

    def received(self, data: bytes, *, end: bool) -> None: ...

    def may_send(self) -> None:
        """There may be leave to."""
        ...

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
        #: One hands on what it read, and flushes all when that is done.
        self.reading = False

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
        self.stream_window = limits.stream_window
        self._everyone = everyone
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(max_header_list_size=limits.header_bytes_max)
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._greeted = False
        #: Streams whose calls run, also those that were reset: so resetting makes no room for more.
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        #: A header block that continues: its stream, whether the stream ends with it, the block so far, and how much
        #: that counts for.
        self._block: tuple[int, bool, bytes, int] | None = None
        #: What may be sent, by the other side's leave.
        self.window = h2.WINDOW_DEFAULT
        self.initial_window = h2.WINDOW_DEFAULT
        self._window_changed = False
        #: To say once that we use no table, when the other side wants a smaller one.
        self._table_update = b""
        #: The socket takes no more for now.
        self.paused = False
        #: In the order that they asked. One is woken at a time, and wakes the next if it leaves room.
        self._room: deque[asyncio.Future[None]] = deque()
        self._out: list[bytes] = []
        self._out_bytes = 0
        #: What the other side may send, and what will be added when that is worth a frame.
        self._leave = h2.WINDOW_DEFAULT + limits.unread_bytes_max
        self._owed = 0
        #: Of requests, received and not taken by their calls yet.
        self.unread = 0
        #: Resets that count, and when they were counted.
        self._resets = (0.0, self._loop.time())
        #: Was asked to leave; no more calls are taken.
        self._is_leaving = self._going_away = False
        self._heard = True
        self._timer: asyncio.TimerHandle | None = None
        self._age_timer: asyncio.TimerHandle | None = None
        #: Done when the connection is over.
        self.lost: asyncio.Future[None] = self._loop.create_future()

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        limits = self._limits
        if len(self._everyone.open) >= limits.connections_max:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(_TURN_BYTES_MAX)  # TLS has other ones
        self._everyone.open.add(self)
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

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._transport is not None:
            self._transport.resume_reading()
        self.wake()

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        if self.closed:  # TLS may have more of one that is
            return
        self._heard = True
        self._everyone.reading = True
        try:
            self._parse(self._rest + data if self._rest else data)
        except _Broken as broken:
            self._say_goodbye(broken.code, str(broken), self._last_stream)
            self.close()
        except Exception:
            _log.exception("internal error")
            self._say_goodbye(h2.INTERNAL_ERROR, "internal error", self._last_stream)
            self.close()
        try:
            self._everyone.after_read()
        finally:
            self._everyone.reading = False
            self._everyone.flush()

    # For calls.

    def send(self, data: bytes) -> None:
        """All that is sent in one turn of the loop leaves in one write."""
        if not self._out:
            if not self._everyone.unsent and not self._everyone.reading:
                self._loop.call_soon(self._everyone.flush)
            self._everyone.unsent.append(self)
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes > _TURN_BYTES_MAX:
            self.flush()

    def send_headers(self, stream_id: int, block: bytes, *, end: bool = False) -> None:
        self.send(h2.headers(stream_id, self._table_update + block, end=end))
        self._table_update = b""

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    @property
    def is_crowded(self) -> bool:
        """Who wants to send has to wait."""
        return self.paused or bool(self._room)

    @property
    def is_crammed(self) -> bool:
        """With requests that nobody takes."""
        return self.unread > self._limits.unread_bytes_max

    async def room(self) -> None:
        """Returns when there may be room to send again. Call `wake` once you need it no more."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._room.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._room:
                self._room.remove(waiter)
            else:
                self.wake()
            raise

    def wake(self) -> None:
        """The next that waits for room, if there is any."""
        while self._room and self.window > 0 and not self.paused:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def grant(self, stream_id: int, size: int, *, more: bool) -> None:
        """Leave to send so much again; `more` may come on that stream."""
        self._owed += size
        if more and size:
            self.send(h2.window_update(stream_id, size))
        if self._owed >= self._limits.unread_bytes_max // 4:
            self.send(h2.window_update(0, self._owed))
            self._leave += self._owed
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
        """Asks to open no more calls, takes those that are on their way, and closes when the last is over."""
        if self._is_leaving or self._transport is None:
            return
        self._is_leaving = True
        if not self._greeted:
            self.close()
            return
        self._say_goodbye(h2.NO_ERROR, why, h2.WINDOW_MAX)
        self.send(h2.frame(h2.PING, 0, 0, _FAREWELL))

    def _farewell(self) -> None:
        """The client knows that it has to go: what it opens from now on, it opens in vain."""
        self._going_away = True
        self._say_goodbye(h2.NO_ERROR, "", self._last_stream)
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

    def push(self) -> None:
        """What was sent leaves now, where it would otherwise wait for the other work of this turn of the loop."""
        if not self._everyone.reading:
            self.flush()

    def carry_out(self) -> None:
        """What `data_received` does when all that was read is handed on, in the middle of that."""
        self._everyone.after_read()
        self._everyone.flush()

    def flush(self) -> None:
        if self._out:
            data, self._out, self._out_bytes = b"".join(self._out), [], 0
            if self._transport is None:
                return
            try:
                self._transport.write(data)
            except Exception:  # this connection's alone: others are flushed, and told, in the same turn
                _log.exception("internal error")
                self.abort()
                return
            if self.paused and self._transport.get_write_buffer_size() > self._limits.unsent_bytes_max:
                self._transport.pause_reading()

    def _say_goodbye(self, code: int, why: str, last: int) -> None:
        self.send(h2.frame(h2.GOAWAY, 0, 0, last.to_bytes(4) + code.to_bytes(4) + why.encode()))

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
        elif kind == h2.PRIORITY:
            if stream_id == 0:
                raise _Broken(h2.PROTOCOL_ERROR, "a priority of no stream")
            if len(payload) != 5:
                raise _Broken(h2.FRAME_SIZE_ERROR, "a priority of another size")
        elif kind == h2.PUSH_PROMISE:
            raise _Broken(h2.PROTOCOL_ERROR, "clients don't push")
        elif kind == h2.GOAWAY:  # it closes when it is done
            if stream_id != 0:
                raise _Broken(h2.PROTOCOL_ERROR, "a goodbye of a stream")
            if len(payload) < 8:
                raise _Broken(h2.FRAME_SIZE_ERROR, "a goodbye of another size")
        # Kinds that we don't know change nothing.

    def _data(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id == 0 or stream_id > self._last_stream:
            raise _Broken(h2.PROTOCOL_ERROR, "data of a stream that was never opened")
        size = len(payload)
        self._leave -= size
        if self._leave < 0:
            raise _Broken(h2.FLOW_CONTROL_ERROR, "more was sent than there was leave for")
        if flags & h2.PADDED:
            payload = _unpadded(payload)
        stream = self._streams.get(stream_id)
        if stream is None or stream.half_closed:
            self.grant(stream_id, size, more=False)
            if stream is not None:
                self._take_back(stream)
                self.reset(stream_id, h2.STREAM_CLOSED)
            return
        if size > len(payload):
            self.grant(stream_id, size - len(payload), more=True)
        stream.received(payload, end=bool(flags & h2.END_STREAM))

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & h2.PADDED:
            payload = _unpadded(payload)
        if flags & h2.WITH_PRIORITY:
            if len(payload) < 5:
                raise _Broken(h2.FRAME_SIZE_ERROR, "headers without room for their priority")
            payload = payload[5:]
        self._header_block(stream_id, bool(flags & h2.END_STREAM), payload, 0, whole=bool(flags & h2.END_HEADERS))

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise _Broken(h2.PROTOCOL_ERROR, "nothing to continue")
        _, end, before, counted = self._block
        self._block = None
        counted += max(0, _HEADER_PIECE_BYTES_MIN - len(payload))
        self._header_block(stream_id, end, before + payload, counted, whole=bool(flags & h2.END_HEADERS))

    def _header_block(self, stream_id: int, end: bool, block: bytes, counted: int, *, whole: bool) -> None:
        if len(block) + counted > self._limits.header_bytes_max:
            raise _Broken(h2.ENHANCE_YOUR_CALM, "headers are too large, or in too many pieces")
        if not whole:
            self._block = (stream_id, end, block, counted)
            return
        try:
            fields = cast(Headers, self._decoder.decode(block, raw=True))
        except HPACKError as error:
            raise _Broken(h2.COMPRESSION_ERROR, f"headers can't be read: {type(error).__name__}") from None
        if (stream := self._streams.get(stream_id)) is not None:
            if stream.half_closed:
                raise _Broken(h2.STREAM_CLOSED, "headers after a stream's end")
            if not end or any(name[:1] == b":" for name, _ in fields):
                raise _Broken(h2.PROTOCOL_ERROR, "headers in the middle of a stream")
            stream.received(b"", end=True)  # trailers, which gRPC's clients don't send
        elif stream_id % 2 == 0 or stream_id == 0:
            raise _Broken(h2.PROTOCOL_ERROR, f"a client can't open stream {stream_id}")
        elif stream_id > self._last_stream:
            self._open(stream_id, fields, end)
        elif any(name[:1] == b":" for name, _ in fields):
            raise _Broken(h2.PROTOCOL_ERROR, f"stream {stream_id} is opened after {self._last_stream}")
        # Else: trailers of a stream that is over.

    def _open(self, stream_id: int, fields: Headers, end: bool) -> None:
        self._last_stream = stream_id
        if self._going_away or len(self._streams) >= self._limits.streams_max:
            self._count_reset()
            self.reset(stream_id, h2.REFUSED_STREAM)
        elif not _are_well_formed(fields):
            self._count_reset()
            self.reset(stream_id, h2.PROTOCOL_ERROR)
        else:
            self._streams[stream_id] = self._opener(self, stream_id, fields, end)

    def _take_back(self, stream: Stream) -> None:
        self._count_reset()
        stream.cancel()

    def _count_reset(self) -> None:
        """A call that is taken back at once costs its sender nothing, and us something."""
        before, then = self._resets
        now = self._loop.time()
        count = max(0.0, before - (now - then) * self._limits.resets_per_s_max) + 1
        self._resets = (count, now)
        if count > self._limits.streams_max + self._limits.resets_per_s_max:
            raise _Broken(h2.ENHANCE_YOUR_CALM, "calls are taken back too often")

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
            if stream.window + self.initial_window > h2.WINDOW_MAX:
                self._take_back(stream)
                self.reset(stream_id, h2.FLOW_CONTROL_ERROR)
            stream.may_send()
        elif stream_id > self._last_stream:
            raise _Broken(h2.PROTOCOL_ERROR, "leave for a stream that was never opened")
        self.wake()

    def _reset_by_client(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _Broken(h2.FRAME_SIZE_ERROR, "a reset of another size")
        if stream_id == 0 or stream_id > self._last_stream:
            raise _Broken(h2.PROTOCOL_ERROR, "a reset of a stream that was never opened")
        if (stream := self._streams.get(stream_id)) is not None:
            self._take_back(stream)

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id != 0:
            raise _Broken(h2.PROTOCOL_ERROR, "settings of a stream")
        if len(payload) % 6 or (flags & h2.ACK and payload):
            raise _Broken(h2.FRAME_SIZE_ERROR, "settings of another size")
        if flags & h2.ACK:
            return
        for at in range(0, len(payload), 6):
            name, value = int.from_bytes(payload[at : at + 2]), int.from_bytes(payload[at + 2 : at + 6])
            if name == h2.INITIAL_WINDOW:
                if value > h2.WINDOW_MAX:
                    raise _Broken(h2.FLOW_CONTROL_ERROR, "the window is too large")
                if value != self.initial_window and not self._window_changed:
                    self._window_changed = True
                    self._loop.call_soon(self._tell_of_window)
                self.initial_window = value
            elif name == h2.HEADER_TABLE_SIZE and value < h2.TABLE_DEFAULT:
                self._table_update = h2.NO_TABLE
            elif name == h2.ENABLE_PUSH and value > 1:
                raise _Broken(h2.PROTOCOL_ERROR, "push is on or off")
            elif name == h2.FRAME_SIZE_MAX and not h2.FRAME_BYTES_MAX <= value < 1 << 24:
                raise _Broken(h2.PROTOCOL_ERROR, "no such size of frames")
        # Frames are never longer than every client takes, and our header blocks use no table.
        self.send(h2.frame(h2.SETTINGS, h2.ACK, 0))

    def _tell_of_window(self) -> None:
        """Once in a turn of the loop, however often it changed."""
        self._window_changed = False
        for stream in tuple(self._streams.values()):
            stream.may_send()

    def _ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Answered however often: a client that pings to keep its connection has done nothing wrong."""
        if stream_id != 0:
            raise _Broken(h2.PROTOCOL_ERROR, "a ping of a stream")
        if len(payload) != 8:
            raise _Broken(h2.FRAME_SIZE_ERROR, "a ping of another size")
        if not flags & h2.ACK:
            self.send(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif payload == _FAREWELL and self._is_leaving and not self._going_away:
            self._farewell()


def _are_well_formed(fields: Headers) -> bool:
    """RFC 9113, 8.2 and 8.3."""
    pseudo: set[bytes] = set()
    regular = False
    for name, value in fields:
        if _NAME.fullmatch(name) is None or _NO_VALUE.search(value) is not None:
            return False
        if name[0] != 0x3A:
            regular = True
            if name in _FORBIDDEN or (name == b"te" and value != b"trailers"):
                return False
        elif regular or name in pseudo or name not in _PSEUDO or (name == b":path" and not value):
            return False
        else:
            pseudo.add(name)
    return pseudo >= _NEEDED


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise _Broken(h2.PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]
