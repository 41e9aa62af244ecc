"""Tensors of the Open Inference Protocol and their elements: what a shape, a datatype and bytes say, checked.

An element of BYTES is bytes; raw, four bytes of its length (little endian) come before it. All other datatypes are
numbers of a fixed size, little endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from router.core.errors import Invalid

Element = bool | int | float | bytes

#: Elements of one tensor; the longest are prompts.
ELEMENTS_MAX = 1 << 22

_NUMBERS = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}


class Tensor(NamedTuple):
    """An input: its elements in order, whatever its shape."""

    name: str
    elements: Sequence[Element]


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """Raises Invalid, which names the tensor."""
    count = elements(name, shape)
    if datatype == "BYTES":
        texts = list(_texts(name, raw, count))
        if len(texts) != count:
            raise _miscounted(name, shape, count, len(texts))
        return Tensor(name, texts)
    if datatype not in _NUMBERS:
        raise Invalid(name, f"datatype {datatype!r} is none of BYTES, {', '.join(_NUMBERS)}")
    kind = np.dtype(_NUMBERS[datatype])
    if len(raw) != count * kind.itemsize:
        raise Invalid(
            name, f"{count} elements of {datatype} are {count * kind.itemsize} bytes, has {len(raw)}", limit=str(count)
        )
    return Tensor(name, np.frombuffer(raw, kind).tolist())


def from_elements(name: str, shape: Sequence[int], found: Sequence[Element]) -> Tensor:
    """Raises Invalid, which names the tensor."""
    count = elements(name, shape)
    if len(found) != count:
        raise _miscounted(name, shape, count, len(found))
    return Tensor(name, found)


def elements(name: str, shape: Sequence[int]) -> int:
    """How many a tensor of this shape has. Raises Invalid."""
    if any(dim < 0 for dim in shape):
        raise Invalid(name, f"shape {list(shape)}: no dimension may be negative")
    count = math.prod(shape)
    if count > ELEMENTS_MAX:
        raise Invalid(name, f"shape {list(shape)}: at most {ELEMENTS_MAX} elements", limit=str(ELEMENTS_MAX))
    return count


def to_raw(datatype: str, values: Sequence[Element]) -> bytes:
    if datatype != "BYTES":
        return np.array(values, _NUMBERS[datatype]).tobytes()
    return b"".join(len(value).to_bytes(4, "little") + value for value in values if isinstance(value, bytes))


def _texts(name: str, raw: bytes, count: int) -> Iterator[bytes]:
    """At most one more than `count`."""
    at = 0
    for _ in range(count + 1):
        if at == len(raw):
            return
        begin = at + 4
        at = begin + int.from_bytes(raw[at:begin], "little")
        if begin > len(raw) or at > len(raw):
            raise Invalid(name, "an element of BYTES is its length in 4 bytes, little endian, and then so many bytes")
        yield raw[begin:at]


def _miscounted(name: str, shape: Sequence[int], count: int, found: int) -> Invalid:
    return Invalid(name, f"shape {list(shape)} is {count} elements, has {found}", limit=str(count))
