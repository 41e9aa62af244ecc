"""What the core's process and an edge's say to each other, as bytes and back.

MessagePack of our own values, field by field: both ends are one version of one program on one host, started together,
so nothing here is a contract with anybody. A frame is one message behind its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from router.core import errors
from router.core.effects import Finished
from router.core.errors import TandemError
from router.core.quota import OverQuota, QuotaFacts
from router.core.request import GenerationRequest, TokenLogprobs
from router.core.stats import Histogram
from router.core.worker import Role
from router.port import ModelView

T = TypeVar("T")

#: The longest prompt, with what goes with it, is a small part of that.
FRAME_BYTES_MAX = 64 << 20
_LENGTH_BYTES = 4


class Message(Struct, tag=True, array_like=True, frozen=True, gc=False):
    """A stream's number is its edge's alone, and is never used again."""


# Both ways.


class Ask(Message, frozen=True):
    number: int
    question: Question


class Told(Message, frozen=True):
    number: int
    #: Of the type that the question asks for.
    answer: msgspec.Raw = msgspec.Raw(b"\xc0")
    #: Instead of an answer.
    error: TandemError | None = None


# From an edge.


class Serving(Message, frozen=True):
    """Its ports are open."""


class Submit(Message, frozen=True):
    stream: int
    request: GenerationRequest


class Cancel(Message, frozen=True):
    stream: int


class StopMatched(Message, frozen=True):
    stream: int
    completion_tokens: int


class Overrun(Message, frozen=True):
    stream: int


# To an edge.


class Now(Message, frozen=True):
    """How the pools are: whenever that changes, and now and then."""

    models: list[ModelView]
    #: See `router.edge.orca`.
    load_report: bytes


class Said(Struct, array_like=True, frozen=True, gc=False):
    stream: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


class Ended(Struct, array_like=True, frozen=True, gc=False):
    stream: int
    finished: Finished | None
    #: Instead.
    error: TandemError | None


class Turn(Message, frozen=True):
    """All that one turn of the core's loop has to say to requests. What is said to one that ended is before its end."""

    said: list[Said]
    ended: list[Ended]
    #: Empty: still the last one.
    load_report: bytes = b""


class Draining(Message, frozen=True):
    """Health turns NOT_SERVING; what runs goes on."""


class Stop(Message, frozen=True):
    """Everything has ended: close the ports, with last words, and exit."""


# Questions, and what each is answered with.


class Explain(Message, frozen=True):
    """list[tuple[Story, float]]"""

    request_id: str
    tenant: str | None


class GetSnapshot(Message, frozen=True):
    """Snapshot"""

    requests: bool


class GetRates(Message, frozen=True):
    """tuple[RateLeft, ...]"""

    tenant: str


class GetStats(Message, frozen=True):
    """Stats"""


class GetMetrics(Message, frozen=True):
    """bytes: the page."""


class Drain(Message, frozen=True):
    """None"""

    worker_id: str


class SetRole(Message, frozen=True):
    """None"""

    worker_id: str
    role: Role


class LookAgain(Message, frozen=True):
    """None, when the files of tenants and keys are in force as they are now: in the asked process and, asked of the
    core, in all."""


class GetRefused(Message, frozen=True):
    """dict[str, int]: of an edge, how many credentials were refused, by reason."""


Question = Explain | GetSnapshot | GetRates | GetStats | GetMetrics | Drain | SetRole | LookAgain | GetRefused
FromEdge = Serving | Submit | Cancel | StopMatched | Overrun | Ask | Told
FromCore = Now | Turn | Draining | Stop | Ask | Told


class Malformed(Exception):
    """Not what the other end would say."""


class _Fault(Struct, array_like=True, frozen=True):
    """A TandemError: its class, its message and what else it says."""

    kind: str
    message: str
    facts: dict[str, str | float | None]
    quota: QuotaFacts | None


_ERRORS: dict[str, type[TandemError]] = {
    kind.__name__: kind
    for kind in (*vars(errors).values(), OverQuota)
    if isinstance(kind, type) and issubclass(kind, TandemError)
}


def _from_ours(value: object) -> object:
    match value:
        case TandemError():
            kind = next(kind for kind in type(value).__mro__ if kind.__name__ in _ERRORS)
            facts = {name: fact for name, fact in vars(value).items() if fact is None or type(fact) in (str, float)}
            return _Fault(kind.__name__, value.message, facts, getattr(value, "quota", None))
        case Histogram():
            return value.bounds, value.counts, value.sum
    raise NotImplementedError(f"{type(value).__name__} does not cross")


def _to_ours(kind: type, said: Any) -> object:
    if kind is TandemError:
        fault = msgspec.convert(said, _Fault)
        error = _ERRORS[fault.kind].__new__(_ERRORS[fault.kind], fault.message)
        vars(error).update(fault.facts)
        if fault.quota is not None:
            vars(error)["quota"] = fault.quota
        return error
    if kind is Histogram:
        histogram = Histogram(said[0])
        histogram.counts, histogram.sum = list(said[1]), said[2]
        return histogram
    raise NotImplementedError(f"{kind.__name__} does not cross")


_encoder = msgspec.msgpack.Encoder(enc_hook=_from_ours)


def frame(message: Message) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES) + body


@cache
def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind, dec_hook=_to_ours)


def messages(unread: bytearray, kind: Any) -> Iterator[Any]:
    """Takes the whole frames from what was read. Raises Malformed."""
    at = 0
    decode = decoder(kind).decode
    try:
        while len(unread) >= at + _LENGTH_BYTES:
            begin = at + _LENGTH_BYTES
            size = int.from_bytes(unread[at:begin])
            if size > FRAME_BYTES_MAX:
                raise Malformed(f"a frame of {size} bytes")
            if len(unread) < begin + size:
                break
            at = begin + size
            try:
                message = decode(bytes(unread[begin:at]))
            except (msgspec.DecodeError, KeyError) as error:
                raise Malformed(str(error)) from None
            yield message
    finally:
        del unread[:at]


def answer(number: int, value: object) -> Told:
    return Told(number, msgspec.Raw(_encoder.encode(value)))


def read_answer(told: Told, kind: Any) -> Any:
    """Raises the error that came instead, Malformed."""
    if told.error is not None:
        raise told.error
    try:
        return decoder(kind).decode(told.answer)
    except msgspec.DecodeError as error:
        raise Malformed(str(error)) from None
