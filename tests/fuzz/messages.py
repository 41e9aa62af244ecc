"""Protobuf messages that nobody would send: of the right shape with wild values, and bytes that are hardly any."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from random import Random
from typing import cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

_DEPTH_MAX = 6
_HUGE_BYTES = 1 << 20

_FD = FieldDescriptor
_RANGES = {
    _FD.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _FD.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _FD.CPPTYPE_UINT32: (0, 2**32 - 1),
    _FD.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 2.0, 1e-30, 3e38, -3e38, math.inf, -math.inf, math.nan)
_TEXTS = ("", "x", "a/b", "\0", "\n", "😀" * 3, "\u202e", "../../etc/passwd", "{}", "[", "%s%n", "a" * 300, " ")


class Messages:
    """Makes messages; the same from the same random source. `words` are texts that mean something to the server."""

    def __init__(self, random: Random, words: Sequence[str]) -> None:
        self._random = random
        self._words = words

    def make(self, kind: Descriptor, good: Sequence[Message] = ()) -> bytes:
        """One message, whole or broken; often one of the good ones with little changed."""
        random = self._random
        if good and random.random() < 0.7:
            message = type(chosen := random.choice(good))()
            message.CopyFrom(chosen)
            for _ in range(random.choice((0, 0, 0, 1, 2))):
                self._alter(message)
        else:
            message = self.message(kind)
        data = message.SerializeToString()
        match random.randrange(10):
            case 0 | 1 | 2:
                return self._mutated(data)
            case 3:
                return random.randbytes(random.randrange(200))
            case 4:
                return self._mutated(self._mutated(data)) + self._stray_field()
            case _:
                return data

    def message(self, kind: Descriptor, depth: int = 0) -> Message:
        made = GetMessageClass(kind)()
        often = self._random.random()
        for field in kind.fields:
            if self._random.random() < often and depth < _DEPTH_MAX:
                self._fill(made, field, depth)
        return made

    def _alter(self, message: Message) -> None:
        """One field, at any depth, gets another value or none."""
        if not message.DESCRIPTOR.fields:
            return
        field = cast(FieldDescriptor, self._random.choice(message.DESCRIPTOR.fields))
        is_single = field.message_type and not field.is_repeated
        if is_single and message.HasField(field.name) and self._random.random() < 0.8:
            self._alter(getattr(message, field.name))
            return
        message.ClearField(field.name)
        if self._random.random() < 0.8:
            self._fill(message, field, depth=_DEPTH_MAX - 2)

    def _fill(self, made: Message, field: FieldDescriptor, depth: int) -> None:
        random = self._random
        into = getattr(made, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            for _ in range(random.randrange(4)):
                if value.message_type:
                    into[self._value(key)].CopyFrom(self.message(value.message_type, depth + 1))
                else:
                    into[self._value(key)] = self._value(value)
        elif field.is_repeated:
            count = random.choice((0, 1, 1, 2, 3, 5, 40))
            for _ in range(count):
                if field.message_type:
                    into.add().CopyFrom(self.message(field.message_type, depth + 1))
                else:
                    into.append(self._value(field))
        elif field.message_type:
            into.CopyFrom(self.message(field.message_type, depth + 1))
        else:
            setattr(made, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> object:
        random = self._random
        kind = field.cpp_type
        if kind in _RANGES:
            low, high = _RANGES[kind]
            small = random.randint(0, 20)
            return random.choice((small, small, 1, 0, max(low, -1), low, high, random.randint(low, high)))
        if kind in (_FD.CPPTYPE_FLOAT, _FD.CPPTYPE_DOUBLE):
            return random.choice((*_FLOATS, random.random()))
        if kind == _FD.CPPTYPE_BOOL:
            return random.random() < 0.5
        if kind == _FD.CPPTYPE_ENUM:
            assert field.enum_type is not None
            return random.choice((*(value.number for value in field.enum_type.values), 77))
        if field.type == _FD.TYPE_BYTES:
            return random.choice((b"", random.randbytes(8), self._elements(), struct.pack("<I", 2**32 - 1) + b"x"))
        if random.random() < 0.002:
            return "x " * (_HUGE_BYTES // 2)
        return random.choice(self._words) if random.random() < 0.6 else random.choice(_TEXTS)

    def _elements(self) -> bytes:
        """Texts with their lengths before them, as some protocols put them into bytes."""
        texts = [self._random.choice((*self._words, *_TEXTS)).encode() for _ in range(self._random.randrange(3))]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)

    def _mutated(self, data: bytes) -> bytes:
        random, found = self._random, bytearray(data)
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(found) + 1)
            match random.randrange(5):
                case 0 if found:
                    found[at % len(found)] ^= 1 << random.randrange(8)
                case 1:
                    found[at:at] = random.randbytes(random.randint(1, 8))
                case 2:
                    del found[at : at + random.randint(1, 8)]
                case 3:
                    found[at:at] = found[: random.randrange(len(found) + 1)][:4096]
                case _:
                    del found[at:]
        return bytes(found)

    def _stray_field(self) -> bytes:
        """A field with a number and a wire type of its own."""
        random = self._random
        tag = random.randint(1, 40) << 3 | random.randrange(8)
        return bytes([tag & 0x7F | 0x80, tag >> 7]) + random.randbytes(random.randrange(12))
