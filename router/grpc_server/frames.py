"""HTTP/2's frames and header blocks, as bytes (RFC 9113, RFC 7541)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
FRAME_BYTES_MAX = 16_384
WINDOW_DEFAULT = 65_535
WINDOW_MAX = 2**31 - 1
TABLE_DEFAULT = 4_096
#: Begins a header block: the table's size is 0 from here on.
NO_TABLE = b"\x20"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

END_STREAM, ACK = 0x1, 0x1
END_HEADERS, PADDED, WITH_PRIORITY = 0x4, 0x8, 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, STREAMS_MAX, INITIAL_WINDOW, FRAME_SIZE_MAX, HEADER_LIST_MAX = range(1, 7)

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 5, 6, 7, 8, 9
ENHANCE_YOUR_CALM = 11

_HEAD = struct.Struct(">BHBBI")
#: A DATA frame's head and gRPC's own five bytes before a message.
_MESSAGE_HEAD = struct.Struct(">BHBBIBI")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def message_frame(stream: int, message: bytes) -> bytes:
    """One DATA frame with one whole message; for messages that fit."""
    size = len(message) + 5
    return _MESSAGE_HEAD.pack(size >> 16, size & 0xFFFF, DATA, 0, stream, 0, size - 5) + message


def settings(values: Iterable[tuple[int, int]]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in values))


def window_update(stream: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, size.to_bytes(4))


def headers(stream: int, block: bytes, *, end: bool = False) -> bytes:
    """The HEADERS frame, and what follows of a block that is longer than one frame."""
    first, rest = block[:FRAME_BYTES_MAX], block[FRAME_BYTES_MAX:]
    flags = (END_STREAM if end else 0) | (0 if rest else END_HEADERS)
    frames = [frame(HEADERS, flags, stream, first)]
    while rest:
        part, rest = rest[:FRAME_BYTES_MAX], rest[FRAME_BYTES_MAX:]
        frames.append(frame(CONTINUATION, 0 if rest else END_HEADERS, stream, part))
    return b"".join(frames)


def header_block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Literals that no table remembers: nothing has to be kept in step with the other side."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)


def _text(text: bytes) -> bytes:
    return _integer(len(text)) + text


def _integer(value: int) -> bytes:
    """With a prefix of seven bits, the eighth zero."""
    if value < 127:
        return bytes((value,))
    out = bytearray((127,))
    value -= 127
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
