"""The gRPC server and clients that mean harm: each is bounded, told why, and in nobody's way."""

from __future__ import annotations

import asyncio
import gzip
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import cast

import grpc
import pytest

from router.grpc_server import frames as h2
from router.grpc_server.connection import Connection, ConnectionLimits
from tests.router.test_grpc_server import SERVICE, Frame, Raw, by_frames, running, until

RESET = (8).to_bytes(4)


@asynccontextmanager
async def less_than(bytes_max: int) -> AsyncIterator[None]:
    """Of memory at any time."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        assert tracemalloc.get_traced_memory()[1] - before < bytes_max
    finally:
        tracemalloc.stop()


@asynccontextmanager
async def by_small_buffers() -> AsyncIterator[tuple[Connection, Raw]]:
    """The kernel keeps little for who does not read."""
    async with running() as (server, _, port):
        dialled = socket.create_connection(("127.0.0.1", port))
        dialled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        reader, writer = await asyncio.open_connection(sock=dialled, limit=1_000)
        writer.write(h2.PREFACE + h2.settings(()))
        await until(lambda: bool(server._connections.open))
        (connection,) = server._connections.open
        cast(socket.socket, connection.info("socket")).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        try:
            yield connection, Raw(reader, writer)
        finally:
            writer.transport.abort()


async def is_ignored(connection: Connection, raw: Raw, next_part: Callable[[], bytes], bytes_max: int) -> bool:
    """Whether the server stops reading before so much was sent."""
    sent = 0
    transport = cast(asyncio.Transport, connection._transport)
    while sent < bytes_max:
        part = next_part()
        raw.writer.write(part)
        sent += len(part)
        while raw.writer.transport.get_write_buffer_size() > 65_536 and transport.is_reading():  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # the state of another end
        await asyncio.sleep(0)
        if not transport.is_reading():
            return True
    return False


class TestFloods:
    @pytest.mark.parametrize(
        "frame",
        [
            h2.frame(h2.PING, 0, 0, bytes(8)),
            h2.settings(()),
            h2.settings(((h2.INITIAL_WINDOW, 1),)) + h2.settings(((h2.INITIAL_WINDOW, 70_000),)),
        ],
        ids=["ping", "settings", "windows"],
    )
    async def test_who_does_not_read_the_answers_is_not_listened_to(self, frame: bytes) -> None:
        part = frame * (16_384 // len(frame))
        async with less_than(2 << 20), by_small_buffers() as (connection, raw):
            assert await is_ignored(connection, raw, lambda: part, 2 << 20)

    async def test_nor_is_who_does_not_read_refusals(self) -> None:
        """Of calls that end at once: streams' limit does not count them."""
        async with less_than(4 << 20), by_small_buffers() as (connection, raw):
            streams = count(1, 2)

            def calls() -> bytes:
                return b"".join(
                    h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, next(streams), raw.block("Nothing"))
                    for _ in range(200)
                )

            assert await is_ignored(connection, raw, calls, 2 << 20)

    async def test_empty_data_costs_nothing_that_lasts(self) -> None:
        async with less_than(2 << 20), by_frames() as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, raw.block("Same"))
            for _ in range(20):
                raw.writer.write(h2.frame(h2.DATA, 0, 1) * 1_000)
                await raw.writer.drain()
            raw.send(h2.DATA, h2.END_STREAM, 1, b"\0\0\0\0\2hi")
            assert (await raw.frame_of(h2.DATA)).payload == b"\0\0\0\0\2hi"

    async def test_calls_that_are_taken_back_at_once(self) -> None:
        limits = ConnectionLimits(streams_max=100, resets_per_s_max=1)
        async with less_than(8 << 20), by_frames(limits) as (echo, raw):
            raw.writer.write(
                b"".join(
                    h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream, raw.block("Wait"))
                    + h2.frame(h2.RST_STREAM, 0, stream, RESET)
                    for stream in range(1, 301, 2)
                )
            )
            code, why = await raw.goodbye()
            assert (code, why) == (h2.ENHANCE_YOUR_CALM, "calls are taken back too often")
            await until(lambda: echo.running == 0)

    async def test_calls_that_make_the_server_take_them_back(self) -> None:
        """By what is wrong on their streams alone."""
        limits = ConnectionLimits(streams_max=100, resets_per_s_max=1)
        async with by_frames(limits) as (echo, raw):
            raw.writer.write(
                b"".join(
                    h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream, raw.block("Wait"))
                    + h2.frame(h2.WINDOW_UPDATE, 0, stream, h2.WINDOW_MAX.to_bytes(4))
                    for stream in range(1, 301, 2)
                )
            )
            assert (await raw.goodbye())[0] == h2.ENHANCE_YOUR_CALM
            await until(lambda: echo.running == 0)

    async def test_some_that_are_taken_back_are_no_reason(self) -> None:
        async with by_frames() as (_, raw):
            for stream in range(1, 2_001, 2):
                raw.send(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream, raw.block("Wait"))
                raw.send(h2.RST_STREAM, 0, stream, RESET)
            raw.call(2_001, "Same", b"hi")
            assert (await raw.frame_of(h2.DATA, h2.GOAWAY)).payload == b"\0\0\0\0\2hi"

    @pytest.mark.parametrize("size", [0, 1])
    async def test_headers_in_many_small_pieces(self, size: int) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, 0, 1, raw.block("Same"))
            for _ in range(64):  # no more: what it leaves unread may cost us its last words
                raw.send(h2.CONTINUATION, 0, 1, bytes(size))
            assert (await raw.goodbye())[0] == h2.ENHANCE_YOUR_CALM


class TestHeaders:
    @pytest.mark.parametrize(
        "block",
        [b"\x3f\xe2\x1f", b"\x00\x7f" + b"\xff" * 9_000, b"\xff" * 9_000, b"\x82" * 9_000],
        ids=["a table too large", "a length without end", "an index without end", "many"],
    )
    async def test_bombs_are_told_in_one_frame(self, block: bytes) -> None:
        async with by_frames(ConnectionLimits(header_bytes_max=10_000)) as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, block)
            code, why = await raw.goodbye()
            assert code == h2.COMPRESSION_ERROR
            assert len(why) < 200

    @pytest.mark.parametrize(
        "changed",
        [
            (("Upper", "x"),),
            (("connection", "close"),),
            (("transfer-encoding", "chunked"),),
            (("te", "gzip"),),
            ((":path", "/again"),),
            ((":status", "200"),),
            (("", "x"),),
            (("a b", "x"),),
            (("a", "x\r\ny"),),
        ],
        ids=lambda changed: changed[0][0] or "empty",
    )
    async def test_malformed_ones_end_their_stream_alone(self, changed: tuple[tuple[str, str], ...]) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, raw.block("Same", *changed))
            refused = await raw.frame_of(h2.RST_STREAM, h2.GOAWAY)
            assert (refused.kind, int.from_bytes(refused.payload)) == (h2.RST_STREAM, h2.PROTOCOL_ERROR)
            raw.call(3, "Same", b"hi")
            assert (await raw.frame_of(h2.DATA)).payload == b"\0\0\0\0\2hi"

    @pytest.mark.parametrize("kind", ["text/html", "application/grpc-web", "application/grpcx", ""])
    async def test_what_is_not_grpc_is_told_so_in_http(self, kind: str) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, request(raw, kind))
            assert await raw.status(1) == {":status": "415"}

    @pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"])
    async def test_grpc_is_known_by_its_names_also_without_te(self, kind: str) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, request(raw, kind))
            raw.send(h2.DATA, h2.END_STREAM, 1, b"\0\0\0\0\2hi")
            assert (await raw.frame_of(h2.DATA)).payload == b"\0\0\0\0\2hi"

    async def test_get_is_not_allowed(self) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, request(raw, "application/grpc", "GET"))
            assert await raw.status(1) == {":status": "405"}

    async def test_trailers_end_a_request(self) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, raw.block("Same"))
            raw.send(h2.DATA, 0, 1, b"\0\0\0\0\2hi")
            raw.send(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, raw.encoder.encode([("x", "y")]))
            assert (await raw.frame_of(h2.DATA)).payload == b"\0\0\0\0\2hi"

    async def test_a_table_made_smaller_is_acknowledged_in_the_next_headers(self) -> None:
        async with by_frames() as (_, raw):
            raw.writer.write(h2.settings(((h2.HEADER_TABLE_SIZE, 0),)))
            raw.decoder.max_allowed_table_size = 0
            for stream in (1, 3):
                raw.call(stream, "Same")
                assert (await raw.status(stream))["grpc-status"] == "0"


def request(raw: Raw, kind: str, method: str = "POST") -> bytes:
    fields = [(":method", method), (":scheme", "http"), (":path", f"/{SERVICE}/Same")]
    return raw.encoder.encode([*fields, ("content-type", kind)] if kind else fields)


class TestMessages:
    async def test_bombs_are_unpacked_one_at_a_time_and_no_further_than_may_be(self) -> None:
        """Each becomes 4 MiB. They are sent to a handler that takes none."""
        async with less_than(24 << 20), by_frames() as (_, raw):
            packed = gzip.compress(bytes(4 << 20))
            message = b"\1" + len(packed).to_bytes(4) + packed
            for stream in range(1, 41, 2):
                raw.send(h2.HEADERS, h2.END_HEADERS, stream, raw.block("Deaf", ("grpc-encoding", "gzip")))
                for _ in range(5):
                    raw.send(h2.DATA, 0, stream, message)
            raw.send(h2.PING, 0, 0, bytes(8))
            await raw.frame_of(h2.PING)

    async def test_many_in_small_pieces_take_time_by_their_length_only(self) -> None:
        """Copying all that came for each piece would take minutes."""
        async with by_frames(window=8 << 20) as (_, raw):
            raw.writer.write(h2.window_update(0, 8 << 20))
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, raw.block("Same"))
            size = 1_000_000
            head = b"\0" + size.to_bytes(4)
            raw.writer.write(h2.frame(h2.DATA, 0, 1, head) + h2.frame(h2.DATA, 0, 1, bytes(10)) * (size // 10 - 1))
            raw.send(h2.DATA, h2.END_STREAM, 1, bytes(10))
            answered = 0
            while answered < size + 5:
                answered += len((await raw.frame_of(h2.DATA)).payload)

    async def test_more_of_a_stream_than_there_was_leave_for(self) -> None:
        async with by_frames(ConnectionLimits(stream_window=1_000)) as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, raw.block("Wait"))
            raw.send(h2.DATA, 0, 1, b"\0\0\1\0\0" + bytes(1_000))
            refused = await raw.frame_of(h2.RST_STREAM)
            assert int.from_bytes(refused.payload) == h2.FLOW_CONTROL_ERROR

    async def test_more_of_a_connection_than_there_was_leave_for(self) -> None:
        async with by_frames(ConnectionLimits(unread_bytes_max=10_000)) as (_, raw):
            for stream in range(1, 13, 2):
                raw.send(h2.HEADERS, h2.END_HEADERS, stream, raw.block("Deaf"))
                raw.send(h2.DATA, 0, stream, b"\0\0\0\x3a\x98" + bytes(15_000))
            assert (await raw.goodbye())[0] == h2.FLOW_CONTROL_ERROR

    async def test_requests_that_wait_to_be_whole_and_are_too_many_together_are_refused_one_by_one(self) -> None:
        async with by_frames(ConnectionLimits(unread_bytes_max=100_000, stream_window=60_000)) as (_, raw):
            for stream in range(1, 21, 2):
                raw.send(h2.HEADERS, h2.END_HEADERS, stream, raw.block("Same"))
                raw.send(h2.DATA, 0, stream, b"\0\0\1\0\0" + bytes(15_000))
            refused = await raw.frame_of(h2.RST_STREAM, h2.GOAWAY)
            assert (refused.kind, refused.stream) == (h2.RST_STREAM, 13)
            raw.call(101, "Same", b"")
            assert (await raw.frame_of(h2.DATA)).stream == 101

    async def test_refused_ones_leave_the_connection_the_leave_that_they_took(self) -> None:
        """4 MB of too large messages on a connection that may have 256 KiB on its way."""
        async with by_frames(ConnectionLimits(unread_bytes_max=1 << 18, stream_window=1 << 16)) as (_, raw):
            for stream in range(1, 201, 2):
                raw.send(h2.HEADERS, h2.END_HEADERS, stream, raw.block("Same"))
                raw.writer.write(h2.frame(h2.DATA, 0, stream, b"\0\x7f\0\0\0" + bytes(10_000)) * 4)
                assert (await raw.frame_of(h2.RST_STREAM)).stream == stream
            raw.call(201, "Same", b"hi")
            assert (await raw.frame_of(h2.DATA)).payload == b"\0\0\0\0\2hi"

    async def test_data_after_the_end(self) -> None:
        async with by_frames() as (echo, raw):
            raw.call(1, "Wait")
            await until(lambda: echo.running == 1)
            raw.send(h2.DATA, 0, 1, b"more")
            assert int.from_bytes((await raw.frame_of(h2.RST_STREAM)).payload) == h2.STREAM_CLOSED
            await until(lambda: echo.running == 0)

    async def test_two_where_one_is_expected(self) -> None:
        async with by_frames() as (_, raw):
            raw.send(h2.HEADERS, h2.END_HEADERS, 1, raw.block("Same"))
            raw.send(h2.DATA, h2.END_STREAM, 1, b"\0\0\0\0\0" * 2)
            assert (await raw.status(1))["grpc-status"] == str(grpc.StatusCode.UNIMPLEMENTED.value[0])


class TestConnections:
    async def test_kinds_of_frames_that_are_not_known_and_reserved_bits_are_ignored(self) -> None:
        async with by_frames() as (_, raw):
            raw.send(0x17, 0xFF, 0, b"grease")
            raw.send(h2.PRIORITY, 0, 1, bytes(5))
            raw.writer.write(h2.settings(((0x1A2A, 7),)))
            raw.call(1, "Same", b"hi")
            raw.send(h2.HEADERS, h2.END_HEADERS, 0x80000003, raw.block("Same"))
            raw.send(h2.DATA, h2.END_STREAM | 0xF0, 0x80000003, b"\0\0\0\0\2ho")
            assert (await raw.frame_of(h2.DATA)).payload == b"\0\0\0\0\2hi"
            assert (await raw.frame_of(h2.DATA)).payload == b"\0\0\0\0\2ho"

    @pytest.mark.parametrize(
        ("said", "code"),
        [
            (h2.frame(h2.SETTINGS, 0, 1), h2.PROTOCOL_ERROR),
            (h2.settings(((h2.ENABLE_PUSH, 2),)), h2.PROTOCOL_ERROR),
            (h2.settings(((h2.FRAME_SIZE_MAX, 100),)), h2.PROTOCOL_ERROR),
            (h2.frame(h2.PING, 0, 1, bytes(8)), h2.PROTOCOL_ERROR),
            (h2.frame(h2.PRIORITY, 0, 1, bytes(4)), h2.FRAME_SIZE_ERROR),
            (h2.frame(h2.HEADERS, h2.END_HEADERS | h2.WITH_PRIORITY, 1, bytes(4)), h2.FRAME_SIZE_ERROR),
        ],
    )
    async def test_what_is_broken_is_told(self, said: bytes, code: int) -> None:
        async with by_frames() as (_, raw):
            raw.writer.write(said)
            assert (await raw.goodbye())[0] == code

    async def test_a_preface_that_comes_in_drops_does_not_hold_its_connection(self) -> None:
        async with running(ConnectionLimits(greeting_timeout_s=0.2)) as (server, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(h2.PREFACE[:1])
            await asyncio.sleep(0.1)
            writer.write(h2.PREFACE[1:5])
            with suppress(ConnectionError):
                while await reader.read(100):
                    pass
            assert not server._connections.open
            writer.close()

    async def test_no_more_than_may_be(self) -> None:
        async with running(ConnectionLimits(connections_max=2)) as (server, _, port):
            taken = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            await until(lambda: len(server._connections.open) == 2)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(ConnectionError):
                assert not await reader.read()
            assert len(server._connections.open) == 2
            for _, one in [*taken, (reader, writer)]:
                one.close()

    async def test_an_old_one_takes_what_is_on_its_way_and_then_no_more(self) -> None:
        async with running() as (server, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(h2.PREFACE + h2.settings(()))
            raw = Raw(reader, writer)
            await raw.frame_of(h2.SETTINGS)
            await until(lambda: all(one._greeted for one in server._connections.open))
            (connection,) = server._connections.open
            connection.go_away("old")
            first = await raw.frame_of(h2.GOAWAY)
            assert int.from_bytes(first.payload[:4]) == h2.WINDOW_MAX
            ping = await raw.frame_of(h2.PING)
            raw.call(1, "Same", b"hi")
            raw.send(h2.PING, h2.ACK, 0, ping.payload)
            seen: list[Frame] = [await raw.frame_of(h2.DATA, h2.GOAWAY) for _ in range(2)]
            (last,) = (frame for frame in seen if frame.kind == h2.GOAWAY)
            assert int.from_bytes(last.payload[:4]) == 1
            assert {frame.kind for frame in seen} == {h2.DATA, h2.GOAWAY}
            while await reader.read(1_000):
                pass
            writer.close()

    async def test_a_message_cut_off_by_its_writer_is_not_followed_by_others(self) -> None:
        async with by_frames(window=100) as (_, raw):
            raw.call(1, "Hasty")
            assert int.from_bytes((await raw.frame_of(h2.RST_STREAM)).payload) == h2.CANCEL

    async def test_writes_that_overlap_keep_their_order(self) -> None:
        async with by_frames(window=50) as (_, raw):
            raw.call(1, "Overlapping")
            data = b""
            while len(data) < 10 * 25:
                data += (await raw.frame_of(h2.DATA)).payload
                raw.send(h2.WINDOW_UPDATE, 0, 1, (17).to_bytes(4))
            assert data == b"".join(b"\0\0\0\0\x14" + b"%020d" % number for number in range(10))
