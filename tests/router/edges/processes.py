"""Which process is at the other end: the kernel chooses an edge for each connection, and tells which it was."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.router.http_client import Connection, connected

WAIT_S = 60.0
#: Connections tried for one at a given edge of two.
_TRIES = 64


def edges_of(pid: int) -> list[int]:
    """The edges' processes of a router's."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread that has ended
            for child in map(int, children.read_text().split()):
                with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                    if b"router.edges" in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(child)
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(holds: Callable[[], object]) -> None:
    """What is watched happens in another process."""
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def listens(pid: int, port: int) -> bool:
    return bool(_sockets(pid, port, "0A"))


def _connections(pid: int, port: int) -> set[str]:
    """Of a process, those that came to this port."""
    return _sockets(pid, port, "01")


def _sockets(pid: int, port: int, state: str) -> set[str]:
    in_state = {
        fields[9]
        for table in ("tcp", "tcp6")  # gRPC's own server takes IPv4 on IPv6's sockets
        for fields in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:])
        if fields[3] == state and int(fields[1].split(":")[1], 16) == port
    }
    held = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            held.add(os.readlink(f"/proc/{pid}/fd/{number}").removeprefix("socket:[").removesuffix("]"))
    return in_state & held


@asynccontextmanager
async def channel_to(pid: int, port: int) -> AsyncIterator[grpc.aio.Channel]:
    for _ in range(_TRIES):
        before = _connections(pid, port)
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            if _connections(pid, port) - before:
                watching = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
                while (await watching.read()).status != health_pb2.HealthCheckResponse.SERVING:
                    pass  # it has not heard of the workers yet
                watching.cancel()
                yield channel
                return
    raise AssertionError(f"{_TRIES} connections, and none came to process {pid}")


@asynccontextmanager
async def http_to(pid: int, port: int) -> AsyncIterator[Connection]:
    for _ in range(_TRIES):
        before = _connections(pid, port)
        async with connected(port) as connection:
            await connection.send("GET", "/version")
            await connection.response()
            if _connections(pid, port) - before:
                yield connection
                return
    raise AssertionError(f"{_TRIES} connections, and none came to process {pid}")
