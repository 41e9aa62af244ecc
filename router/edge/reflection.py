"""Reflection over Tandem's own protocols and those that others define, which are in a descriptor pool of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor

from protos.compat import pool

T = TypeVar("T")


class EveryPool:
    """What grpcio-reflection asks of a pool. Others' names are looked for in our own files first: a client's library,
    loaded into the same process, may have brought its own."""

    def FindFileByName(self, name: str) -> FileDescriptor:
        return _first(lambda one: one.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        return _first(lambda one: one.FindFileContainingSymbol(symbol))

    def FindMessageTypeByName(self, name: str) -> Descriptor:
        return _first(lambda one: one.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Descriptor, number: int) -> FieldDescriptor:
        return _first(lambda one: one.FindExtensionByNumber(message, number))

    def FindAllExtensions(self, message: Descriptor) -> Sequence[FieldDescriptor]:
        return _first(lambda one: one.FindAllExtensions(message))


def _first(look: Callable[[descriptor_pool.DescriptorPool], T]) -> T:
    """Raises KeyError."""
    try:
        return look(pool.Default())
    except KeyError:
        return look(descriptor_pool.Default())
