"""Reflection over Tandem's own protocols and those that others define, which are in a descriptor pool of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos.compat import pool

T = TypeVar("T")

SERVICE = reflection.SERVICE_NAME
#: The same messages under a newer name, which some clients know alone. grpcio has no code for it yet.
_NEWER = "grpc.reflection.v1.ServerReflection"


class _Server(Protocol):
    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None: ...


def add_to(server: _Server, services: Iterable[str]) -> None:
    """Under both names; the older one is listed."""
    behaviour = reflection.aio.ReflectionServicer((*services, SERVICE), pool=EveryPool()).ServerReflectionInfo
    method = grpc.stream_stream_rpc_method_handler(
        behaviour,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = [
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in (SERVICE, _NEWER)
    ]
    server.add_generic_rpc_handlers(handlers)


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
