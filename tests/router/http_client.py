"""HTTP as it is on the wire: nothing between a test and the bytes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

WAIT_S = 60.0


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        said = self.json
        assert said.keys() == {"error"}
        assert said["error"].keys() == {"message", "type", "param", "code"}
        return said["error"]

    @property
    def events(self) -> list[Any]:
        """What came before `[DONE]`."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str | None
    ) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [
            f"{name}: {value}"
            for name, value in {"content-length": str(len(data)), **named}.items()
            if value is not None
        ]
        head = "\r\n".join([f"{method} {path} HTTP/1.1", "host: test", *lines, "", ""])
        self.writer.write(head.encode() + data)
        await self.writer.drain()

    async def head(self) -> Response:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return Response(int(lines[0].split()[1]), headers, b"")

    async def chunk(self) -> bytes:
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def response(self, *, without_body: bool = False) -> Response:
        async with asyncio.timeout(WAIT_S):
            response = await self.head()
            if without_body:
                return response
            if "content-length" in response.headers:
                response.body = await self.reader.readexactly(int(response.headers["content-length"]))
            else:
                while chunk := await self.chunk():
                    response.body += chunk
            return response


@asynccontextmanager
async def connected(port: int, *, receive_bytes: int = 0) -> AsyncIterator[Connection]:
    """`receive_bytes` limits what the kernel takes in for a test that does not read."""
    ours = socket.socket()
    try:
        ours.setblocking(False)
        if receive_bytes:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(ours, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
    except BaseException:
        ours.close()
        raise
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def call(
    port: int, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str | None
) -> Response:
    async with connected(port) as connection:
        await connection.send(method, path, body, **headers)
        return await connection.response(without_body=method == "HEAD")
