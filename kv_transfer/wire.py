"""Where protobuf ends: values of this package to messages and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kv_transfer.handle import MAC_BYTES, Handle, HandleRefused, sign, verify
from kv_transfer.segments import ArenaMap
from protos import kv_pb2

#: More is no handle of ours: a million tokens in blocks of 16 take less.
HANDLE_BYTES_MAX = 1 << 20
_HANDLE = "tandem kv handle"
_ASK = "tandem kv describe"
_ANSWER = "tandem kv description"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFacts:
    """What a node tells another about itself when they meet."""

    name: str
    incarnation: str
    model: str
    layout: Mapping[str, str]
    arena: ArenaMap
    board_rows: int
    board_row_bytes: int
    #: In a row; 0 when the owner makes none.
    board_digests_offset: int
    #: By transport name. Gives access to memory: never logged.
    transports: Mapping[str, bytes]


def _body(message: kv_pb2.KvHandle | kv_pb2.PeerDescription) -> bytes:
    """The message's bytes without its MAC."""
    bare = type(message)()
    bare.CopyFrom(message)  # type: ignore[arg-type]
    bare.ClearField("mac")
    return bare.SerializeToString(deterministic=True)


def seal(handle: Handle, secret: bytes) -> bytes:
    """A handle, signed and serialized."""
    message = kv_pb2.KvHandle(
        transfer_id=handle.transfer_id,
        tenant=handle.tenant,
        model=handle.model,
        reader=handle.reader,
        owner=handle.owner,
        owner_incarnation=handle.owner_incarnation,
        owner_address=handle.owner_address,
        row=handle.row,
        word=handle.word,
        tokens=handle.tokens,
        block_ids=handle.block_ids,
        layout_digest=handle.layout_digest,
        deadline_ms=handle.deadline_ms,
    )
    message.mac = sign(secret, _HANDLE, message.SerializeToString(deterministic=True))
    return message.SerializeToString(deterministic=True)


def parse_handle(raw: bytes) -> kv_pb2.KvHandle:
    """Not verified. Raises HandleRefused."""
    if len(raw) > HANDLE_BYTES_MAX:
        raise HandleRefused(f"{len(raw)} bytes; a handle has at most {HANDLE_BYTES_MAX}")
    try:
        return kv_pb2.KvHandle.FromString(raw)
    except DecodeError as error:
        raise HandleRefused("not a handle: its bytes do not parse") from error


def unseal(raw: bytes | kv_pb2.KvHandle, secret: bytes) -> Handle:
    """The handle, if its MAC is right. Raises HandleRefused."""
    message = parse_handle(raw) if isinstance(raw, bytes) else raw
    if len(message.mac) != MAC_BYTES or not verify(message.mac, secret, _HANDLE, _body(message)):
        raise HandleRefused("the handle's MAC is wrong: it was changed, or made with another cluster's secret")
    return to_handle(message)


def to_handle(message: kv_pb2.KvHandle) -> Handle:
    return Handle(
        transfer_id=message.transfer_id,
        tenant=message.tenant,
        model=message.model,
        reader=message.reader,
        owner=message.owner,
        owner_incarnation=message.owner_incarnation,
        owner_address=message.owner_address,
        row=message.row,
        word=message.word,
        tokens=message.tokens,
        block_ids=tuple(message.block_ids),
        layout_digest=message.layout_digest,
        deadline_ms=message.deadline_ms,
    )


def ask(caller: str, nonce: bytes, secret: bytes) -> kv_pb2.DescribeRequest:
    return kv_pb2.DescribeRequest(caller=caller, nonce=nonce, mac=sign(secret, _ASK, caller.encode(), nonce))


def is_authentic(request: kv_pb2.DescribeRequest, secret: bytes) -> bool:
    return verify(request.mac, secret, _ASK, request.caller.encode(), request.nonce)


def answer(facts: PeerFacts, nonce: bytes, secret: bytes) -> kv_pb2.PeerDescription:
    message = kv_pb2.PeerDescription(
        name=facts.name,
        incarnation=facts.incarnation,
        model=facts.model,
        layout=facts.layout,
        transports=facts.transports,
        arena_offset=facts.arena.offset,
        segment_stride=facts.arena.segment_stride,
        block_stride=facts.arena.block_stride,
        blocks=facts.arena.blocks,
        board_rows=facts.board_rows,
        board_row_bytes=facts.board_row_bytes,
        board_digests_offset=facts.board_digests_offset,
    )
    message.mac = sign(secret, _ANSWER, nonce, message.SerializeToString(deterministic=True))
    return message


def read_answer(message: kv_pb2.PeerDescription, nonce: bytes, secret: bytes) -> PeerFacts | None:
    """None when the answer is not authentic."""
    if not verify(message.mac, secret, _ANSWER, nonce, _body(message)):
        return None
    return PeerFacts(
        name=message.name,
        incarnation=message.incarnation,
        model=message.model,
        layout=dict(message.layout),
        arena=ArenaMap(
            blocks=message.blocks,
            segment_stride=message.segment_stride,
            block_stride=message.block_stride,
            offset=message.arena_offset,
        ),
        board_rows=message.board_rows,
        board_row_bytes=message.board_row_bytes,
        board_digests_offset=message.board_digests_offset,
        transports=dict(message.transports),
    )
