"""RFC 9113 and RFC 7541, section by section: what a client may say, what it may not, and what it is told then."""

from __future__ import annotations

import asyncio

import pytest

from router.grpc_server import frames as h2
from tests.router.test_grpc_server import SERVICE, WAIT_S, by_frames

OPEN, WHOLE = h2.END_HEADERS, h2.END_HEADERS | h2.END_STREAM
REQUEST = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", f"/{SERVICE}/Same".encode()),
    (b":authority", b"x"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)
BLOCK = h2.header_block(REQUEST)
MESSAGE = b"\0\0\0\0\2hi"
CALL = h2.frame(h2.HEADERS, OPEN, 1, BLOCK) + h2.frame(h2.DATA, h2.END_STREAM, 1, MESSAGE)
UNENDED = h2.frame(h2.HEADERS, OPEN, 1, BLOCK)
PINGED = h2.frame(h2.PING, 0, 0, b"12345678")


def headers(*fields: tuple[bytes, bytes], without: bytes = b"", flags: int = WHOLE) -> bytes:
    kept = [field for field in REQUEST if field[0] != without]
    pseudo = [field for field in fields if field[0][:1] == b":"]
    regular = [field for field in fields if field[0][:1] != b":"]
    return h2.frame(h2.HEADERS, flags, 1, h2.header_block([*pseudo, *kept, *regular]))


def setting(name: int, value: int) -> bytes:
    return h2.settings(((name, value),))


#: What every client may say: the call on stream 1 is answered.
SERVED = {
    "4.1 unknown kinds of frames": h2.frame(0x16, 0xFF, 0, b"x") + CALL,
    "4.1 flags without a meaning": h2.frame(h2.PING, 0xFE, 0, bytes(8)) + CALL,
    "4.1 the reserved bit": PINGED[:5] + b"\x80" + PINGED[6:] + CALL,
    "5.3 priorities, of whatever": h2.frame(h2.PRIORITY, 0, 1, b"\0\0\0\1\xff") + CALL,
    "6.1 padding": UNENDED + h2.frame(h2.DATA, h2.PADDED | h2.END_STREAM, 1, b"\3" + MESSAGE + bytes(3)),
    "6.1 no data": UNENDED + h2.frame(h2.DATA, 0, 1) + h2.frame(h2.DATA, h2.END_STREAM, 1, MESSAGE),
    "6.2 padding and a priority": h2.frame(
        h2.HEADERS, OPEN | h2.PADDED | h2.WITH_PRIORITY, 1, b"\2" + bytes(5) + BLOCK + bytes(2)
    )
    + h2.frame(h2.DATA, h2.END_STREAM, 1, MESSAGE),
    "6.5.2 unknown settings": setting(0xFF, 1) + CALL,
    "6.5.2 no table": setting(h2.HEADER_TABLE_SIZE, 0) + CALL,
    "6.7 an answer to no ping": h2.frame(h2.PING, h2.ACK, 0, b"nobody's") + CALL,
    "6.8 goodbye, and then what was begun": h2.frame(h2.GOAWAY, 0, 0, bytes(8)) + CALL,
    "6.9.2 a window that was closed": setting(h2.INITIAL_WINDOW, 0) + CALL + setting(h2.INITIAL_WINDOW, 65_535),
    "6.10 headers in pieces, some empty": h2.frame(h2.HEADERS, 0, 1, BLOCK[:7])
    + h2.frame(h2.CONTINUATION, 0, 1)
    + h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, BLOCK[7:])
    + h2.frame(h2.DATA, h2.END_STREAM, 1, MESSAGE),
    "8.1 trailers": UNENDED + h2.frame(h2.DATA, 0, 1, MESSAGE) + h2.frame(h2.HEADERS, WHOLE, 1, b"\0\1a\1b"),
    "8.2.3 cookies in crumbs": headers((b"cookie", b"a"), (b"cookie", b"b"), flags=OPEN)
    + h2.frame(h2.DATA, h2.END_STREAM, 1, MESSAGE),
    "8.3.1 a host and no authority": headers((b"host", b"x"), without=b":authority", flags=OPEN)
    + h2.frame(h2.DATA, h2.END_STREAM, 1, MESSAGE),
    "7541 4.2 a table made smaller": h2.frame(h2.HEADERS, OPEN, 1, b"\x20" + BLOCK)
    + h2.frame(h2.DATA, h2.END_STREAM, 1, MESSAGE),
}

#: The stream alone is reset.
RESET = {
    "5.1 data after the end": (CALL + h2.frame(h2.DATA, h2.END_STREAM, 1, b"x"), h2.STREAM_CLOSED),
    "6.9.1 a stream's window too large": (UNENDED + h2.window_update(1, h2.WINDOW_MAX) * 2, h2.FLOW_CONTROL_ERROR),
    "8.2.1 capitals": (headers((b"X-A", b"1")), h2.PROTOCOL_ERROR),
    "8.2.2 connection": (headers((b"connection", b"close")), h2.PROTOCOL_ERROR),
    "8.2.2 te": (headers((b"te", b"trailers, deflate"), without=b"te"), h2.PROTOCOL_ERROR),
    "8.3 unknown": (headers((b":test", b"x")), h2.PROTOCOL_ERROR),
    "8.3 of responses": (headers((b":status", b"200")), h2.PROTOCOL_ERROR),
    "8.3 twice": (headers((b":method", b"POST")), h2.PROTOCOL_ERROR),
    "8.3 after others": (
        h2.frame(h2.HEADERS, WHOLE, 1, h2.header_block((*REQUEST[1:], REQUEST[0]))),
        h2.PROTOCOL_ERROR,
    ),
    "8.3.1 no method": (headers(without=b":method"), h2.PROTOCOL_ERROR),
    "8.3.1 no scheme": (headers(without=b":scheme"), h2.PROTOCOL_ERROR),
    "8.3.1 no path": (headers(without=b":path"), h2.PROTOCOL_ERROR),
    "8.3.1 an empty path": (headers((b":path", b""), without=b":path"), h2.PROTOCOL_ERROR),
    "8.5 CONNECT": (
        h2.frame(h2.HEADERS, WHOLE, 1, h2.header_block(((b":method", b"CONNECT"), (b":authority", b"x:1")))),
        h2.PROTOCOL_ERROR,
    ),
}

#: The connection is over.
BROKEN = {
    "4.2 data past the size of frames": (UNENDED + h2.frame(h2.DATA, 0, 1, bytes(16_385)), h2.FRAME_SIZE_ERROR),
    "4.2 headers past it": (h2.frame(h2.HEADERS, WHOLE, 1, bytes(16_385)), h2.FRAME_SIZE_ERROR),
    "4.3 something between pieces of headers": (h2.frame(h2.HEADERS, 0, 1, BLOCK) + PINGED, h2.PROTOCOL_ERROR),
    "4.3 another's headers there": (h2.frame(h2.HEADERS, 0, 1, BLOCK) * 2, h2.PROTOCOL_ERROR),
    "5.1 data before a stream is open": (h2.frame(h2.DATA, 0, 1, b"x"), h2.PROTOCOL_ERROR),
    "5.1 a reset before": (h2.frame(h2.RST_STREAM, 0, 1, bytes(4)), h2.PROTOCOL_ERROR),
    "5.1 leave before": (h2.window_update(1, 1), h2.PROTOCOL_ERROR),
    "5.1 headers after the end": (CALL + headers(), h2.STREAM_CLOSED),
    "5.1.1 an even stream": (h2.frame(h2.HEADERS, WHOLE, 2, BLOCK), h2.PROTOCOL_ERROR),
    "5.1.1 an older stream": (h2.frame(h2.HEADERS, WHOLE, 5, BLOCK) + headers(), h2.PROTOCOL_ERROR),
    "6.1 data of no stream": (h2.frame(h2.DATA, 0, 0, b"x"), h2.PROTOCOL_ERROR),
    "6.1 more padding than data": (UNENDED + h2.frame(h2.DATA, h2.PADDED, 1, b"\2x"), h2.PROTOCOL_ERROR),
    "6.2 headers of no stream": (h2.frame(h2.HEADERS, WHOLE, 0, BLOCK), h2.PROTOCOL_ERROR),
    "6.3 a priority of no stream": (h2.frame(h2.PRIORITY, 0, 0, bytes(5)), h2.PROTOCOL_ERROR),
    "6.3 a priority's size": (h2.frame(h2.PRIORITY, 0, 1, bytes(4)), h2.FRAME_SIZE_ERROR),
    "6.4 a reset of no stream": (h2.frame(h2.RST_STREAM, 0, 0, bytes(4)), h2.PROTOCOL_ERROR),
    "6.4 a reset's size": (UNENDED + h2.frame(h2.RST_STREAM, 0, 1, bytes(3)), h2.FRAME_SIZE_ERROR),
    "6.5 settings acknowledged with some": (h2.frame(h2.SETTINGS, h2.ACK, 0, bytes(6)), h2.FRAME_SIZE_ERROR),
    "6.5 settings of a stream": (h2.frame(h2.SETTINGS, 0, 1), h2.PROTOCOL_ERROR),
    "6.5 settings' size": (h2.frame(h2.SETTINGS, 0, 0, bytes(5)), h2.FRAME_SIZE_ERROR),
    "6.5.2 push": (setting(h2.ENABLE_PUSH, 2), h2.PROTOCOL_ERROR),
    "6.5.2 a window too large": (setting(h2.INITIAL_WINDOW, 1 << 31), h2.FLOW_CONTROL_ERROR),
    "6.5.2 frames too small": (setting(h2.FRAME_SIZE_MAX, 16_383), h2.PROTOCOL_ERROR),
    "6.5.2 frames too large": (setting(h2.FRAME_SIZE_MAX, 1 << 24), h2.PROTOCOL_ERROR),
    "6.6 a push": (h2.frame(h2.PUSH_PROMISE, OPEN, 1, bytes(4) + BLOCK), h2.PROTOCOL_ERROR),
    "6.7 a ping of a stream": (h2.frame(h2.PING, 0, 1, bytes(8)), h2.PROTOCOL_ERROR),
    "6.7 a ping's size": (h2.frame(h2.PING, 0, 0, bytes(7)), h2.FRAME_SIZE_ERROR),
    "6.8 a goodbye of a stream": (h2.frame(h2.GOAWAY, 0, 1, bytes(8)), h2.PROTOCOL_ERROR),
    "6.8 a goodbye's size": (h2.frame(h2.GOAWAY, 0, 0, bytes(7)), h2.FRAME_SIZE_ERROR),
    "6.9 leave for nothing": (h2.window_update(0, 0), h2.PROTOCOL_ERROR),
    "6.9 leave for nothing on a stream": (UNENDED + h2.window_update(1, 0), h2.PROTOCOL_ERROR),
    "6.9 leave's size": (h2.frame(h2.WINDOW_UPDATE, 0, 0, bytes(3)), h2.FRAME_SIZE_ERROR),
    "6.9.1 a window too large": (h2.window_update(0, h2.WINDOW_MAX) * 2, h2.FLOW_CONTROL_ERROR),
    "6.10 nothing to continue": (CALL + h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1), h2.PROTOCOL_ERROR),
    "6.10 another's headers continued": (
        h2.frame(h2.HEADERS, 0, 1, BLOCK) + h2.frame(h2.CONTINUATION, h2.END_HEADERS, 3),
        h2.PROTOCOL_ERROR,
    ),
    "8.1 headers in the middle": (UNENDED + h2.frame(h2.HEADERS, OPEN, 1, b"\0\1a\1b"), h2.PROTOCOL_ERROR),
    "8.1 a method in trailers": (UNENDED + headers(), h2.PROTOCOL_ERROR),
    "7541 2.3.3 no such entry": (h2.frame(h2.HEADERS, WHOLE, 1, BLOCK + b"\xc6"), h2.COMPRESSION_ERROR),
    "7541 4.2 a table's size at the end": (h2.frame(h2.HEADERS, WHOLE, 1, BLOCK + b"\x20"), h2.COMPRESSION_ERROR),
    "7541 5.2 too much padding": (h2.frame(h2.HEADERS, WHOLE, 1, BLOCK + b"\0\1x\x82\xff\xff"), h2.COMPRESSION_ERROR),
    "7541 5.2 a text's end": (
        h2.frame(h2.HEADERS, WHOLE, 1, BLOCK + b"\0\1x\x84\xff\xff\xff\xff"),
        h2.COMPRESSION_ERROR,
    ),
    "7541 6.1 the entry 0": (h2.frame(h2.HEADERS, WHOLE, 1, BLOCK + b"\x80"), h2.COMPRESSION_ERROR),
    "7541 6.3 a table too large": (h2.frame(h2.HEADERS, WHOLE, 1, b"\x3f\xe2\x1f" + BLOCK), h2.COMPRESSION_ERROR),
}


@pytest.mark.parametrize("said", SERVED.values(), ids=SERVED.keys())
async def test_what_a_client_may_say(said: bytes) -> None:
    async with by_frames() as (_, raw), asyncio.timeout(WAIT_S):
        raw.writer.write(said)
        answer = await raw.frame_of(h2.DATA, h2.RST_STREAM, h2.GOAWAY)
        assert (answer.kind, answer.payload) == (h2.DATA, MESSAGE)
        assert (await raw.status(1))["grpc-status"] == "0"


@pytest.mark.parametrize(("said", "code"), RESET.values(), ids=RESET.keys())
async def test_what_ends_a_stream_and_no_other(said: bytes, code: int) -> None:
    async with by_frames() as (_, raw), asyncio.timeout(WAIT_S):
        raw.writer.write(said)
        refused = await raw.frame_of(h2.RST_STREAM, h2.GOAWAY)
        assert (refused.kind, refused.stream, int.from_bytes(refused.payload)) == (h2.RST_STREAM, 1, code)
        raw.call(3, "Same", b"ho")
        while (answer := await raw.frame_of(h2.DATA, h2.GOAWAY)).stream != 3:
            assert answer.kind == h2.DATA
        assert answer.payload == b"\0\0\0\0\2ho"


@pytest.mark.parametrize(("said", "code"), BROKEN.values(), ids=BROKEN.keys())
async def test_what_ends_a_connection(said: bytes, code: int) -> None:
    async with by_frames() as (_, raw), asyncio.timeout(WAIT_S):
        raw.writer.write(said)
        assert (await raw.goodbye())[0] == code


@pytest.mark.parametrize("kind", [h2.DATA, h2.WINDOW_UPDATE, h2.RST_STREAM, h2.PRIORITY])
async def test_what_comes_late_for_a_stream_that_is_over_harms_nobody(kind: int) -> None:
    """5.1: it may have been on its way."""
    payload = {h2.DATA: b"x", h2.PRIORITY: bytes(5)}.get(kind, b"\0\0\0\1")
    async with by_frames() as (_, raw), asyncio.timeout(WAIT_S):
        raw.writer.write(CALL)
        await raw.status(1)
        raw.send(kind, 0, 1, payload)
        raw.call(3, "Same", b"ho")
        assert (await raw.frame_of(h2.DATA, h2.GOAWAY)).payload == b"\0\0\0\0\2ho"
