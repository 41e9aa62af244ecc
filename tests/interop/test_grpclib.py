"""grpclib, a client in Python over the h2 library, against the gRPC server and a router: another HTTP/2 than gRPC's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest
from grpclib.client import Channel, StreamStreamMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.exceptions import GRPCError
from multidict import MultiDict

from protos import inference_pb2
from protos.compat import kserve_pb2
from tests.router.running import GENERATE, MODEL, WAIT_S, Router
from tests.router.running import running as router_running
from tests.router.test_grpc_server import MESSAGE_BYTES_MAX, SERVICE, Echo, running, until

ANSWER = tuple(range(5, 45))
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"


class Plain(CodecBase):
    """Messages are bytes."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


def dialled(port: int, window: int = 4 << 20) -> Channel:
    """Windows: what it lets a server send before it has read."""
    config = Configuration(http2_connection_window_size=window, http2_stream_window_size=window)
    details = ProtoStatusDetailsCodec()
    return Channel("127.0.0.1", port, codec=Plain(), config=config, status_details_codec=details)


@asynccontextmanager
async def echoing(window: int = 4 << 20) -> AsyncIterator[tuple[Echo, Channel]]:
    async with running() as (_, echo, port), dialled(port, window) as channel:
        yield echo, channel


def unary(channel: Channel, method: str) -> Any:
    return UnaryUnaryMethod(channel, f"/{SERVICE}/{method}", bytes, bytes)


def stream(channel: Channel, method: str) -> Any:
    return UnaryStreamMethod(channel, f"/{SERVICE}/{method}", bytes, bytes)


def both_ways(channel: Channel, path: str = f"/{SERVICE}/Each") -> Any:
    return StreamStreamMethod(channel, path, bytes, bytes)


@pytest.mark.parametrize("size", [0, 1, 16_380, 65_536, MESSAGE_BYTES_MAX])
async def test_messages_of_every_size(size: int) -> None:
    async with echoing() as (_, channel):
        assert await unary(channel, "Same")(b"x" * size) == b"x" * size
        assert await stream(channel, "Thrice")(b"y" * size) == [b"y" * size] * 3


async def test_both_ways_at_once() -> None:
    async with echoing() as (_, channel), both_ways(channel).open() as call:
        for number in range(100):
            await call.send_message(b"%d" % number, end=number == 99)
            assert await call.recv_message() == b"%d" % number
        assert await call.recv_message() is None


async def test_a_refusal_with_its_message_and_metadata() -> None:
    async with echoing() as (_, channel):
        with pytest.raises(GRPCError) as refused:
            await unary(channel, "Refuse")(b"")
        assert (refused.value.status, refused.value.message) == (Status.NOT_FOUND, "nichts da: 100 % ü")
        call = unary(channel, "Refuse").open()
        with suppress(GRPCError):
            async with call:
                await call.send_message(b"", end=True)
                await call.recv_message()
        metadata = cast(MultiDict[Any], call.trailing_metadata or call.initial_metadata)
        assert (metadata["why"], metadata["why-bin"]) == ("so", b"\0\xff")


async def test_metadata_and_deadlines() -> None:
    async with echoing() as (echo, channel):
        await unary(channel, "Same")(b"", metadata={"a": "b", "c-bin": b"\0\xff\1"}, timeout=60)
        metadata, remaining, _ = echo.seen[0]
        assert {("a", "b"), ("c-bin", b"\0\xff\1")} <= set(metadata)
        assert 0 < remaining <= 60
        with pytest.raises((asyncio.TimeoutError, GRPCError)):
            await stream(channel, "Wait")(b"", timeout=0.2)
        await until(lambda: echo.running == 0)


async def test_unknown_methods_and_too_large_messages_leave_the_connection_as_it_was() -> None:
    async with echoing() as (_, channel):
        with pytest.raises(GRPCError) as refused:
            await unary(channel, "Nothing")(b"")
        assert refused.value.status is Status.UNIMPLEMENTED
        with pytest.raises(GRPCError) as refused:
            await unary(channel, "Same")(bytes(MESSAGE_BYTES_MAX + 1))
        assert refused.value.status is Status.RESOURCE_EXHAUSTED
        assert await unary(channel, "Same")(b"x") == b"x"


async def test_a_client_that_leaves() -> None:
    async with echoing() as (echo, channel):
        async with stream(channel, "Wait").open() as call:
            await call.send_message(b"", end=True)
            assert await call.recv_message() == b"begun"
            await call.cancel()
        await until(lambda: echo.cancelled == 1)


@pytest.mark.parametrize("window", [65_535, 4 << 20])
async def test_two_hundred_streams_on_one_connection(window: int) -> None:
    async with echoing(window) as (_, channel):

        async def one(number: int) -> None:
            message = bytes([number]) * (number * 151)
            assert await stream(channel, "Thrice")(message) == [message] * 3

        await asyncio.gather(*map(one, range(200)))


async def test_a_slow_reader() -> None:
    async with echoing(65_535) as (_, channel), stream(channel, "Thrice").open() as call:
        message = bytes(range(256)) * 4_000
        await call.send_message(message, end=True)
        for _ in range(3):
            await asyncio.sleep(0.05)
            assert await call.recv_message() == message
        assert await call.recv_message() is None


async def test_who_is_asked_to_leave_comes_back_by_another_connection() -> None:
    async with running() as (server, _, port), dialled(port) as channel:
        assert await unary(channel, "Same")(b"x") == b"x"
        (old,) = server._connections.open
        old.go_away("old")
        await until(lambda: old not in server._connections.open)
        assert await unary(channel, "Same")(b"y") == b"y"


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Router, Channel]]:
    async with router_running() as router, dialled(router.bound.port) as channel:
        worker = await router.worker("w", answer=ANSWER)
        yield router, channel
        await router.leave(worker)


def generate_request() -> bytes:
    sampling = inference_pb2.Sampling(max_tokens=len(ANSWER))
    return inference_pb2.GenerateRequest(text="x", sampling=sampling, return_token_ids=True).SerializeToString()


async def test_a_routers_streams() -> None:
    async with serving() as (_, channel):
        method = UnaryStreamMethod[bytes, bytes](channel, GENERATE, bytes, bytes)

        async def one() -> None:
            replies = await method(generate_request(), timeout=WAIT_S)
            parsed = [inference_pb2.GenerateResponse.FromString(reply) for reply in replies]
            assert tuple(token for reply in parsed for token in reply.delta.token_ids) == ANSWER

        await asyncio.gather(*(one() for _ in range(20)))


async def test_a_routers_refusals_have_their_details() -> None:
    async with serving() as (_, channel):
        method = UnaryStreamMethod[bytes, bytes](channel, GENERATE, bytes, bytes)
        with pytest.raises(GRPCError) as refused:
            await method(inference_pb2.GenerateRequest().SerializeToString(), timeout=WAIT_S)
        assert refused.value.status is Status.INVALID_ARGUMENT
        assert refused.value.details


async def test_kserve_both_ways() -> None:
    async with serving() as (_, channel):
        request = kserve_pb2.ModelInferRequest(model_name=MODEL, id="7")
        request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x=1")
        number = request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
        number.contents.int_contents.append(len(ANSWER))
        async with both_ways(channel, STREAM_INFER).open(timeout=WAIT_S) as call:
            await call.send_message(request.SerializeToString(), end=True)
            reply = kserve_pb2.ModelStreamInferResponse.FromString(await call.recv_message() or b"")
            assert not reply.error_message
            assert reply.infer_response.id == "7"
