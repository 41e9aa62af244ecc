"""gRPC's interoperability test service on our server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from router.grpc_server.server import GrpcServer
from trust.tls import Tls

PROTO = Path(__file__).with_name("testing.proto")

_ECHOED, _ECHOED_TRAILER = "x-grpc-test-echo-initial", "x-grpc-test-echo-trailing-bin"


class Service:
    """Its methods' messages are made when it is: nothing that a checker could know."""

    def __init__(self) -> None:
        self.messages: Any = grpc.protos("tests/interop/testing.proto")

    async def empty(self, request: Any, context: Any) -> Any:
        return self.messages.Empty()

    async def unary(self, request: Any, context: Any) -> Any:
        await self._echo(request, context)
        return self.messages.SimpleResponse(payload={"body": bytes(request.response_size)})

    async def output(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for wanted in request.response_parameters:
            yield self.messages.StreamingOutputCallResponse(payload={"body": bytes(wanted.size)})

    async def input(self, requests: Any, context: Any) -> Any:
        size = 0
        async for request in requests:
            size += len(request.payload.body)
        return self.messages.StreamingInputCallResponse(aggregated_payload_size=size)

    async def duplex(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            await self._echo(request, context)
            async for answer in self.output(request, context):
                yield answer

    async def _echo(self, request: Any, context: Any) -> None:
        said = dict(context.invocation_metadata())
        if _ECHOED in said:
            await context.send_initial_metadata(((_ECHOED, said[_ECHOED]),))
        if _ECHOED_TRAILER in said:
            context.set_trailing_metadata(((_ECHOED_TRAILER, said[_ECHOED_TRAILER]),))
        if code := request.response_status.code:
            status = next((one for one in grpc.StatusCode if one.value[0] == code), grpc.StatusCode.UNKNOWN)
            await context.abort(status, request.response_status.message)

    def handlers(self) -> grpc.GenericRpcHandler:
        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        behaviours = {
            "EmptyCall": self.empty,
            "UnaryCall": self.unary,
            "StreamingOutputCall": self.output,
            "StreamingInputCall": self.input,
            "FullDuplexCall": self.duplex,
        }
        service = self.messages.DESCRIPTOR.services_by_name["TestService"]
        return grpc.method_handlers_generic_handler(
            service.full_name,
            {
                one.name: kinds[one.client_streaming, one.server_streaming](
                    behaviours[one.name],
                    request_deserializer=getattr(self.messages, one.input_type.name).FromString,
                    response_serializer=getattr(self.messages, one.output_type.name).SerializeToString,
                )
                for one in service.methods
                if one.name in behaviours
            },
        )


@asynccontextmanager
async def serving(tls: Tls | None = None) -> AsyncIterator[int]:
    """The port."""
    server = GrpcServer(message_bytes_max=4 << 20)
    server.add_generic_rpc_handlers((Service().handlers(),))
    port = server.bind("127.0.0.1", 0, tls)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)
