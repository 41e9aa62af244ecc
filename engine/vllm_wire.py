"""What a worker process and its engine process say to each other, over the socket pair that the one gave the other.

Messages are msgpack in frames: four bytes of length, then a list of messages of one of two unions. The socket is the
private property of the two: nothing of it is in the file system, and its end is the end of the process behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

from engine.base import (
    EngineInfo,
    EngineLoad,
    EngineOptions,
    FailureKind,
    PeerLane,
    Sampling,
    Staged,
    TokenLogprobs,
)
from kv_transfer.vllm_params import PrefillOrder, PrefillReport

T = TypeVar("T")


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# To the engine process ------------------------------------------------------------------------------------------------


class Launch(_Message, frozen=True):
    """The first message: what to be."""

    options: EngineOptions
    incarnation: str
    revision: str
    eos_token_ids: tuple[int, ...]
    #: Module and class of the connector.
    connector: tuple[str, str]


class Add(_Message, frozen=True):
    """A leg. From here on it is the engine process that gives back what is staged for it."""

    name: str
    token_ids: tuple[int, ...]
    cache_salt: str
    sampling: Sampling
    prefill: PrefillOrder | None = None
    staged: Staged | None = None


class Abort(_Message, frozen=True):
    """Nobody waits for this leg any more, nor for a lease of its name."""

    name: str


class Fetch(_Message, frozen=True):
    call: int
    handle: bytes
    timeout_s: float
    ahead: bool


class Connect(_Message, frozen=True):
    call: int
    peer: str
    address: str


class Load(_Message, frozen=True):
    call: int


class Cancel(_Message, frozen=True):
    """Of a fetch."""

    call: int


class Discard(_Message, frozen=True):
    staged_id: str


class Release(_Message, frozen=True):
    handle: bytes


class ForgetPrefixes(_Message, frozen=True):
    """Empties the prefix cache."""


class Stop(_Message, frozen=True):
    pass


ToEngine = Launch | Add | Abort | Fetch | Connect | Load | Cancel | Discard | Release | ForgetPrefixes | Stop


# From the engine process ----------------------------------------------------------------------------------------------


class Ready(_Message, frozen=True):
    info: EngineInfo


class Output(_Message, frozen=True):
    """What a step gave one leg."""

    name: str
    token_ids: tuple[int, ...]
    #: vLLM's word; empty while the leg goes on.
    finish_reason: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0
    report: PrefillReport | None = None


class Offered(_Message, frozen=True):
    """The first part of a prompt can be read."""

    name: str
    handle: bytes


class Refused(_Message, frozen=True):
    """The leg did not reach vLLM's scheduler, or `name` is empty: the engine could not start, or a step failed."""

    name: str
    kind: FailureKind
    detail: str


class Fetched(_Message, frozen=True):
    call: int
    staged: Staged


class Met(_Message, frozen=True):
    call: int
    lane: PeerLane


class Loaded(_Message, frozen=True):
    call: int
    load: EngineLoad


class Failed(_Message, frozen=True):
    """A call did."""

    call: int
    kind: FailureKind
    detail: str


Answer = Fetched | Met | Loaded | Failed
FromEngine = Ready | Output | Offered | Refused | Fetched | Met | Loaded | Failed


# Frames ---------------------------------------------------------------------------------------------------------------

_LENGTH_BYTES = 4
_encoder = msgspec.msgpack.Encoder()


def frame(messages: Sequence[_Message]) -> bytes:
    body = _encoder.encode(messages)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class Frames(Generic[T]):
    """Bytes in, messages out."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[list[T]]) -> None:
        self._decoder = decoder
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        self._bytes += data
        while len(self._bytes) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._bytes[:_LENGTH_BYTES], "big")
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH_BYTES:end])
            del self._bytes[:end]
            yield from self._decoder.decode(body)


def to_engine() -> Frames[ToEngine]:
    return Frames(msgspec.msgpack.Decoder(list[ToEngine]))


def from_engine() -> Frames[FromEngine]:
    return Frames(msgspec.msgpack.Decoder(list[FromEngine]))
