"""The gRPC server: by gRPC's own client where that can say it, by frames where it can't."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from router.grpc_server import frames as h2
from router.grpc_server.call import Malformed, timeout_s
from router.grpc_server.connection import Connection, ConnectionLimits
from router.grpc_server.server import GrpcServer

WAIT_S = 60.0
MESSAGE_BYTES_MAX = 4 << 20
SERVICE = "test.Echo"


@dataclass
class Echo:
    """Handlers, and what became of them."""

    running: int = 0
    cancelled: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[Any] = field(default_factory=list)

    async def same(self, request: bytes, context: Any) -> bytes:
        self.seen.append((context.invocation_metadata(), context.time_remaining(), context.peer()))
        return request

    async def thrice(self, request: bytes, context: Any) -> None:
        for _ in range(3):
            await context.write(request)

    async def each(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def now(self, request: bytes, context: Any) -> None:
        """Twenty numbers, each at once if it may be."""
        for number in range(20):
            if not context.write_now(b"%02d" % number):
                await context.write(b"%02d" % number)

    async def joined(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        """What came while it waited, and what it had to fetch, in the order that they came."""
        heard: list[bytes] = []

        def take(request: bytes) -> None:
            if request == b"bad":
                raise RuntimeError("a secret")
            heard.append(request)

        requests.at_once(take)
        async for request in requests:
            take(request)
        yield b" ".join(heard)

    async def wait(self, request: bytes, context: Any) -> None:
        self.running += 1
        try:
            await context.write(b"begun")
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def deaf(self, requests: Any, context: Any) -> None:
        """Reads nothing."""
        await self.released.wait()

    async def hasty(self, request: bytes, context: Any) -> None:
        """Gives up in the middle of a message."""
        try:
            async with asyncio.timeout(0.05):
                await context.write(bytes(1_000))
        except TimeoutError:
            await context.write(b"next")

    async def overlapping(self, request: bytes, context: Any) -> None:
        await asyncio.gather(*(context.write(b"%020d" % number) for number in range(10)))

    async def refuse(self, request: bytes, context: Any) -> None:
        context.set_trailing_metadata((("ignored", "x"),))
        await context.abort(grpc.StatusCode.NOT_FOUND, "nichts da: 100 % ü", (("why-bin", b"\0\xff"), ("why", "so")))

    async def fail(self, request: bytes, context: Any) -> None:
        raise RuntimeError("a secret")

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Same": grpc.unary_unary_rpc_method_handler(self.same),
                "Thrice": grpc.unary_stream_rpc_method_handler(self.thrice),
                "Each": grpc.stream_stream_rpc_method_handler(self.each),
                "Now": grpc.unary_stream_rpc_method_handler(self.now),
                "Joined": grpc.stream_stream_rpc_method_handler(self.joined),
                "Wait": grpc.unary_stream_rpc_method_handler(self.wait),
                "Deaf": grpc.stream_stream_rpc_method_handler(self.deaf),
                "Hasty": grpc.unary_stream_rpc_method_handler(self.hasty),
                "Overlapping": grpc.unary_stream_rpc_method_handler(self.overlapping),
                "Refuse": grpc.unary_unary_rpc_method_handler(self.refuse),
                "Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            },
        )


@asynccontextmanager
async def running(limits: ConnectionLimits | None = None) -> AsyncIterator[tuple[GrpcServer, Echo, int]]:
    server, echo = GrpcServer(message_bytes_max=MESSAGE_BYTES_MAX, limits=limits), Echo()
    server.add_generic_rpc_handlers((echo.handlers(),))
    port = server.bind("127.0.0.1", 0)
    await server.start()
    async with asyncio.timeout(WAIT_S):
        yield server, echo, port
        await server.stop(0)


@asynccontextmanager
async def by_grpc(**options: int) -> AsyncIterator[tuple[GrpcServer, Echo, Any]]:
    """And a channel; its methods' types are nothing that a checker could know."""
    async with running() as (server, echo, port):
        said = [(f"grpc.{name}", value) for name, value in options.items()]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=said) as channel:
            yield server, echo, channel


def unary(channel: Any, method: str) -> Any:
    return channel.unary_unary(f"/{SERVICE}/{method}")


class TestCalls:
    @pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 65_531, 3 << 20])
    async def test_messages_of_every_size_come_back_as_they_were(self, size: int) -> None:
        async with by_grpc() as (_, _, channel):
            message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
            assert await unary(channel, "Same")(message) == message
            got = [reply async for reply in channel.unary_stream(f"/{SERVICE}/Thrice")(message)]
            assert got == [message] * 3

    async def test_many_streams_share_a_connection_without_mixing(self) -> None:
        async with by_grpc() as (_, _, channel):

            async def one(number: int) -> None:
                messages = [b"%d/%d " % (number, at) * (at * 700) for at in range(20)]
                call = channel.stream_stream(f"/{SERVICE}/Each")(iter(messages))
                assert [reply async for reply in call] == messages

            await asyncio.gather(*(one(number) for number in range(40)))

    async def test_what_is_taken_the_moment_it_comes_is_in_order_and_complete(self) -> None:
        async with by_grpc() as (_, _, channel):
            messages = [b"%d" % number for number in range(200)]

            async def requests() -> AsyncIterator[bytes]:
                for number, message in enumerate(messages):
                    yield message
                    await asyncio.sleep(0.002 if number % 7 == 0 else 0)

            replies = [reply async for reply in channel.stream_stream(f"/{SERVICE}/Joined")(requests())]
            assert replies == [b" ".join(messages)]

    async def test_a_fault_of_who_takes_at_once_ends_the_call_and_nothing_else(self) -> None:
        async with by_grpc() as (_, _, channel):

            async def requests() -> AsyncIterator[bytes]:
                await asyncio.sleep(0.05)
                yield b"bad"
                await asyncio.sleep(WAIT_S)

            with pytest.raises(grpc.aio.AioRpcError) as failed:
                [reply async for reply in channel.stream_stream(f"/{SERVICE}/Joined")(requests())]
            assert failed.value.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in (failed.value.details() or "")
            assert await unary(channel, "Same")(b"x") == b"x"

    async def test_metadata_deadline_and_peer_reach_the_handler(self) -> None:
        async with by_grpc() as (_, echo, channel):
            await unary(channel, "Same")(b"", metadata=(("a", "b"), ("c-bin", b"\0\xff\1")), timeout=WAIT_S)
            metadata, remaining, peer = echo.seen[0]
            assert ("a", "b") in metadata
            assert ("c-bin", b"\0\xff\1") in metadata
            assert 0 < remaining <= WAIT_S + 1, "clients round it up a little"
            assert peer.startswith("ipv4:127.0.0.1:")

    async def test_a_refusal_brings_its_message_and_metadata(self) -> None:
        async with by_grpc() as (_, _, channel):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await unary(channel, "Refuse")(b"")
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            assert refused.value.details() == "nichts da: 100 % ü"
            assert dict(refused.value.trailing_metadata()) == {"why-bin": b"\0\xff", "why": "so"}

    async def test_what_went_wrong_inside_is_not_told(self) -> None:
        async with by_grpc() as (_, _, channel):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await unary(channel, "Fail")(b"")
            assert failed.value.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in (failed.value.details() or "")

    async def test_an_unknown_method_is_unimplemented(self) -> None:
        async with by_grpc() as (_, _, channel):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await unary(channel, "Nothing")(b"")
            assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_a_handler_ends_with_its_deadline(self) -> None:
        async with by_grpc() as (_, echo, channel):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                async for _ in channel.unary_stream(f"/{SERVICE}/Wait")(b"", timeout=0.2):
                    pass
            assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: echo.running == 0)

    async def test_a_handler_is_cancelled_when_its_client_leaves(self) -> None:
        async with by_grpc() as (_, echo, channel):
            call = channel.unary_stream(f"/{SERVICE}/Wait")(b"")
            await call.read()
            call.cancel()
            await until(lambda: echo.cancelled == 1)

    async def test_compressed_messages_are_taken(self) -> None:
        async with by_grpc() as (_, _, channel):
            said = b"again and " * 10_000
            assert await unary(channel, "Same")(said, compression=grpc.Compression.Gzip) == said

    async def test_a_message_that_grows_past_the_limit_when_decompressed_is_refused(self) -> None:
        async with by_grpc() as (_, _, channel):
            bomb = bytes(MESSAGE_BYTES_MAX + 1)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await unary(channel, "Same")(bomb, compression=grpc.Compression.Gzip)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_what_runs_may_finish_when_the_server_stops_and_what_comes_is_not_taken(self) -> None:
        async with by_grpc() as (server, echo, channel):
            call = channel.unary_stream(f"/{SERVICE}/Wait")(b"")
            await call.read()
            stopping = asyncio.create_task(server.stop(WAIT_S))
            (connection,) = server._connections.open
            await until(lambda: connection._going_away)  # its client has heard
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await unary(channel, "Same")(b"", timeout=WAIT_S)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            echo.released.set()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
            await stopping

    async def test_a_client_that_keeps_its_connection_alive_keeps_it(self) -> None:
        """As chatty as gRPC's client can be; its server would say `too_many_pings` to pings without data."""
        options = {"keepalive_time_ms": 1_000, "keepalive_permit_without_calls": 1, "http2.max_pings_without_data": 0}
        async with by_grpc(**options) as (_, echo, channel):
            call = channel.unary_stream(f"/{SERVICE}/Wait")(b"")
            await call.read()
            await asyncio.sleep(3.5)
            echo.released.set()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110  the state of another task
        await asyncio.sleep(0.005)


@dataclass
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


class Raw:
    """A client that says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.encoder = Encoder()
        self.decoder = Decoder()

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        self.writer.write(h2.frame(kind, flags, stream, payload))

    def block(self, method: str, *more: tuple[str, str]) -> bytes:
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{SERVICE}/{method}"),
            (":authority", "x"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *more,
        ]
        return self.encoder.encode(fields)

    def call(self, stream: int, method: str, message: bytes = b"", *more: tuple[str, str]) -> None:
        self.send(h2.HEADERS, h2.END_HEADERS, stream, self.block(method, *more))
        self.send(h2.DATA, h2.END_STREAM, stream, b"\0" + len(message).to_bytes(4) + message)

    async def frame(self) -> Frame:
        head = await self._reader.readexactly(9)
        payload = await self._reader.readexactly(int.from_bytes(head[:3]))
        return Frame(head[3], head[4], int.from_bytes(head[5:]), payload)

    async def frame_of(self, *kinds: int) -> Frame:
        while (frame := await self.frame()).kind not in kinds:
            pass
        return frame

    async def status(self, stream: int) -> dict[str, str]:
        """Of the answer's end. Header blocks must be decoded in order."""
        while True:
            frame = await self.frame_of(h2.HEADERS)
            fields = dict(self.decoder.decode(frame.payload))
            if frame.stream == stream and frame.flags & h2.END_STREAM:
                return cast(dict[str, str], fields)

    async def goodbye(self) -> tuple[int, str]:
        payload = (await self.frame_of(h2.GOAWAY)).payload
        assert await self._reader.read() == b"", "it says more after GOAWAY"
        return int.from_bytes(payload[4:8]), payload[8:].decode()


@asynccontextmanager
async def by_frames(limits: ConnectionLimits | None = None, window: int = 65_535) -> AsyncIterator[tuple[Echo, Raw]]:
    async with running(limits) as (_, echo, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(h2.PREFACE + h2.settings(((h2.INITIAL_WINDOW, window),)))
        try:
            yield echo, Raw(reader, writer)
        finally:
            writer.close()


class TestFrames:
    async def test_pings_are_answered_however_many(self) -> None:
        async with by_frames() as (_, raw):
            for number in range(1_000):
                raw.send(h2.PING, payload=number.to_bytes(8))
            answers = [await raw.frame_of(h2.PING, h2.GOAWAY) for _ in range(1_000)]
            assert [(frame.kind, int.from_bytes(frame.payload)) for frame in answers] == [
                (h2.PING, number) for number in range(1_000)
            ]

    async def test_no_more_is_sent_than_the_client_gave_leave_for(self) -> None:
        async with by_frames(window=10) as (_, raw):
            raw.call(1, "Same", b"0123456789")
            first = await raw.frame_of(h2.DATA)
            assert first.payload == b"\0\0\0\0\x0a01234"
            raw.send(h2.WINDOW_UPDATE, stream=1, payload=(3).to_bytes(4))
            assert (await raw.frame_of(h2.DATA)).payload == b"567"
            raw.writer.write(h2.settings(((h2.INITIAL_WINDOW, 100),)))
            assert (await raw.frame_of(h2.DATA)).payload == b"89"

    async def test_what_may_not_be_written_at_once_waits_its_turn(self) -> None:
        async with by_frames(window=16) as (_, raw):
            raw.call(1, "Now")
            data = b""
            while len(data) < 20 * 7:
                data += (await raw.frame_of(h2.DATA)).payload
                raw.send(h2.WINDOW_UPDATE, stream=1, payload=(5).to_bytes(4))
            assert data == b"".join(b"\0\0\0\0\x02%02d" % number for number in range(20))

    async def test_a_header_block_may_come_in_pieces_padded_and_with_a_priority(self) -> None:
        async with by_frames() as (_, raw):
            block = raw.block("Same")
            padded = bytes([3]) + bytes(5) + block[:10] + bytes(3)
            raw.send(h2.HEADERS, h2.PADDED | h2.WITH_PRIORITY, 1, padded)
            raw.send(h2.CONTINUATION, 0, 1, block[10:20])
            raw.send(h2.CONTINUATION, h2.END_HEADERS, 1, block[20:])
            raw.send(h2.DATA, h2.PADDED | h2.END_STREAM, 1, bytes([2]) + b"\0\0\0\0\x02hi" + bytes(2))
            assert (await raw.frame_of(h2.DATA)).payload == b"\0\0\0\0\x02hi"

    async def test_a_stream_past_the_limit_is_refused_also_when_others_were_reset(self) -> None:
        """Resetting streams makes no room before their handlers are gone."""
        async with by_frames(ConnectionLimits(streams_max=2)) as (echo, raw):
            for stream in (1, 3):
                raw.call(stream, "Wait")
            await until(lambda: echo.running == 2)
            for stream in range(5, 205, 2):
                raw.call(stream, "Wait")
                raw.send(h2.RST_STREAM, stream=stream, payload=(8).to_bytes(4))
            raw.call(205, "Same")
            refused = await raw.frame_of(h2.RST_STREAM)
            assert int.from_bytes(refused.payload) == h2.REFUSED_STREAM
            assert echo.running == 2

    @pytest.mark.parametrize(
        ("said", "code"),
        [
            (h2.frame(h2.DATA, 0, 1, b"x"), h2.PROTOCOL_ERROR),
            (h2.frame(h2.DATA, 0, 0, b"x"), h2.PROTOCOL_ERROR),
            (h2.frame(h2.HEADERS, h2.END_HEADERS, 2, b"\x83"), h2.PROTOCOL_ERROR),
            (h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff\xff\xff\xff"), h2.COMPRESSION_ERROR),
            (h2.frame(h2.HEADERS, h2.PADDED | h2.END_HEADERS, 1, b"\x09x"), h2.PROTOCOL_ERROR),
            (h2.frame(h2.HEADERS, 0, 1, b"\x83") + h2.frame(h2.PING, 0, 0, bytes(8)), h2.PROTOCOL_ERROR),
            (h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, b"\x83"), h2.PROTOCOL_ERROR),
            (h2.frame(h2.WINDOW_UPDATE, 0, 0, bytes(4)), h2.PROTOCOL_ERROR),
            (h2.frame(h2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), h2.FLOW_CONTROL_ERROR),
            (h2.frame(h2.WINDOW_UPDATE, 0, 0, b"x"), h2.FRAME_SIZE_ERROR),
            (h2.frame(h2.SETTINGS, 0, 0, b"12345"), h2.FRAME_SIZE_ERROR),
            (h2.frame(h2.SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"), h2.FLOW_CONTROL_ERROR),
            (h2.frame(h2.PING, 0, 0, b"short"), h2.FRAME_SIZE_ERROR),
            (h2.frame(h2.PUSH_PROMISE, 0, 1, bytes(4)), h2.PROTOCOL_ERROR),
            (h2.frame(h2.RST_STREAM, 0, 7, bytes(4)), h2.PROTOCOL_ERROR),
            (b"\xff\xff\xff\0\0\0\0\0\0", h2.FRAME_SIZE_ERROR),
        ],
    )
    async def test_who_breaks_the_protocol_is_told_how_and_let_go(self, said: bytes, code: int) -> None:
        async with by_frames() as (_, raw):
            raw.writer.write(said)
            assert (await raw.goodbye())[0] == code

    async def test_headers_without_end_are_cut_off(self) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, 0, 1, bytes(10_000))
            for _ in range(6):  # no more: what it leaves unread may cost us its last words
                raw.send(h2.CONTINUATION, 0, 1, bytes(10_000))
            assert (await raw.goodbye())[0] == h2.ENHANCE_YOUR_CALM

    async def test_headers_that_unfold_to_too_much_are_cut_off(self) -> None:
        async with by_frames(ConnectionLimits(header_bytes_max=10_000)) as (_, raw):
            block = raw.encoder.encode([("a", "x" * 3_000)] + [("a", "x" * 3_000)] * 100)
            assert len(block) < 5_000
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, block)
            assert (await raw.goodbye())[0] == h2.COMPRESSION_ERROR

    async def test_a_client_that_says_nothing_is_let_go(self) -> None:
        async with running(ConnectionLimits(greeting_timeout_s=0.1)) as (_, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await reader.read()
            writer.close()

    async def test_a_silent_connection_is_asked_and_then_let_go(self) -> None:
        async with by_frames(ConnectionLimits(greeting_timeout_s=2, silence_s_max=0.1)) as (echo, raw):
            raw.call(1, "Wait")
            assert (await raw.frame_of(h2.PING)).flags == 0
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await raw.frame_of(h2.GOAWAY)
            await until(lambda: echo.cancelled == 1)

    async def test_a_request_cut_off_in_a_message_is_refused(self) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, raw.block("Same"))
            raw.send(h2.DATA, h2.END_STREAM, 1, b"\0\0\0\0\x09short")
            assert (await raw.status(1))["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])

    async def test_an_encoding_that_is_not_known_is_refused(self) -> None:
        async with by_frames() as (_, raw):
            raw.call(1, "Same", b"", ("grpc-encoding", "snappy"))
            assert (await raw.status(1))["grpc-status"] == str(grpc.StatusCode.UNIMPLEMENTED.value[0])

    async def test_a_compressed_flag_without_an_encoding_is_refused(self) -> None:
        async with by_frames() as (_, raw):
            data = gzip.compress(b"x")
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, raw.block("Same"))
            raw.send(h2.DATA, h2.END_STREAM, 1, b"\1" + len(data).to_bytes(4) + data)
            assert (await raw.status(1))["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])


class Recorder(asyncio.Transport):
    """A transport that keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


def connected(echo: Echo) -> tuple[Connection, Recorder]:
    server = GrpcServer(message_bytes_max=MESSAGE_BYTES_MAX)
    server.add_generic_rpc_handlers((echo.handlers(),))
    connection, transport = server._connection(), Recorder()
    connection.connection_made(transport)
    return connection, transport


async def test_what_all_streams_say_in_one_turn_leaves_in_one_write() -> None:
    connection, transport = connected(Echo())
    raw = Raw(cast(Any, None), cast(Any, transport))
    transport.writes.clear()
    calls = b"".join(
        h2.frame(h2.HEADERS, h2.END_HEADERS, stream, raw.block("Thrice"))
        + h2.frame(h2.DATA, h2.END_STREAM, stream, b"\0\0\0\0\1x")
        for stream in range(1, 101, 2)
    )
    connection.data_received(h2.PREFACE + h2.settings(()) + calls)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(transport.writes) <= 2  # what was said at once, and the answers of all fifty
    assert b"".join(transport.writes).count(h2.message_frame(1, b"x")[9:]) == 150
    connection.connection_lost(None)


async def test_what_is_carried_out_leaves_before_the_rest_of_what_was_read_is_handed_on() -> None:
    """To all connections."""
    left: list[int] = []

    async def told(requests: Any, context: Any) -> None:
        def take(request: bytes) -> None:
            left.append(len(written.writes) - greeting)
            other.send(h2.frame(h2.PING, 0, 0, bytes(8)))
            if request == b"now":
                requests.carry_out()

        requests.at_once(take)
        async for _ in requests:
            pass

    handlers: dict[str, Any] = {"Told": grpc.stream_stream_rpc_method_handler(told)}
    server = GrpcServer(message_bytes_max=MESSAGE_BYTES_MAX)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    connection, other = server._connection(), server._connection()
    transport, written = Recorder(), Recorder()
    connection.connection_made(transport)
    other.connection_made(written)
    await asyncio.sleep(0)
    greeting = len(written.writes)
    headers = h2.frame(h2.HEADERS, h2.END_HEADERS, 1, Raw(cast(Any, None), cast(Any, transport)).block("Told"))
    connection.data_received(h2.PREFACE + h2.settings(()) + headers)
    for _ in range(3):
        await asyncio.sleep(0)
    connection.data_received(b"".join(h2.message_frame(1, said) for said in (b"later", b"now", b"later", b"later")))
    assert left == [0, 0, 1, 1]
    assert len(written.writes) - greeting == 2
    for one in (connection, other):
        one.connection_lost(None)


class Broken(Recorder):
    def write(self, data: bytes | bytearray | memoryview) -> None:
        raise RuntimeError("the handler is closed")


async def test_a_connection_that_cannot_be_written_to_is_ended_and_others_are_answered() -> None:
    server = GrpcServer(message_bytes_max=MESSAGE_BYTES_MAX)
    broken, transport = Broken(), Recorder()
    connections = server._connection(), server._connection()
    for connection, its in zip(connections, (broken, transport), strict=True):  # both greet in one turn
        connection.connection_made(its)
    await asyncio.sleep(0)
    assert broken.closing
    assert transport.writes
    assert not transport.closing
    for connection in connections:
        connection.connection_lost(None)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.builds(
                h2.frame,
                st.integers(0, 11),
                st.integers(0, 255),
                st.one_of(st.integers(0, 9), st.integers(0, 2**31 - 1)),
                st.one_of(
                    st.binary(max_size=40),
                    st.just(b"\0\0\0\0\2hi"),
                    st.integers(0, 2**32 - 1).map(lambda n: n.to_bytes(4)),
                ),
            ),
            st.binary(max_size=30),
        ),
        max_size=30,
    ),
    st.lists(st.integers(1, 200), max_size=20),
)
def test_whatever_is_sent_a_connection_serves_it_or_closes(frames: list[bytes], cuts: list[int]) -> None:
    async def feed() -> None:
        echo = Echo()
        connection, transport = connected(echo)
        block = Encoder().encode(
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", f"/{SERVICE}/Each"),
                ("content-type", "application/grpc"),
            ]
        )
        data = h2.PREFACE + h2.settings(()) + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, block) + b"".join(frames)
        for cut in [*cuts, len(data)]:
            part, data = data[:cut], data[cut:]
            if part and not transport.closing:
                connection.data_received(part)
                await asyncio.sleep(0)
        connection.connection_lost(None)
        for _ in range(5):
            await asyncio.sleep(0)
        assert connection.unread == 0
        assert not connection._streams
        assert b"internal error" not in b"".join(transport.writes)

    asyncio.run(feed())


@pytest.mark.parametrize(
    ("said", "seconds"), [("1S", 1.0), ("99999999H", 99999999 * 3600.0), ("20m", 0.02), ("5n", 5e-9)]
)
def test_timeouts_are_read(said: str, seconds: float) -> None:
    assert timeout_s(said) == seconds


@pytest.mark.parametrize("said", ["", "S", "1", "-1S", "1.5S", "123456789S", "1x", "²S"])
def test_what_is_no_timeout_is_refused(said: str) -> None:
    with pytest.raises(Malformed):
        timeout_s(said)
