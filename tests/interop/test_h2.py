"""The h2 library as a client that accepts no frame that HTTP/2 does not allow, in histories made at random."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import FlowControlError, StreamClosedError
from h2.settings import SettingCodes

from router.grpc_server.connection import ConnectionLimits
from tests.router.test_grpc_server import SERVICE, running, until

STEPS = 150
#: Requests' bytes; answers are up to three times as much.
BYTES_MAX = 150_000


@dataclass
class Call:
    method: str
    #: What is yet to be sent of the request.
    unsent: bytes
    expected: bytes
    got: bytearray = field(default_factory=bytearray)
    status: str = ""
    over: bool = False
    unacknowledged: int = 0


class Client:
    """Does what is allowed, in an order that nobody would choose. h2 raises for what the server may not say."""

    def __init__(self, seed: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dice = random.Random(seed)
        self.reader = reader
        self.writer = writer
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.calls: dict[int, Call] = {}
        self.unacknowledged = 0
        self.gone: ConnectionTerminated | None = None
        self.h2.initiate_connection()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: self.dice.choice([0, 1, 100, 65_535, 1 << 20])})

    async def run(self) -> None:
        await self.read(WAIT)
        for _ in range(STEPS):
            step = self.dice.choices([self.open, self.say, self.settle, self.reset, self.change, self.ping], _WEIGHTS)
            step[0]()
            await self.flush()
            await self.read(0.0)
        await self.finish()

    async def flush(self) -> None:
        data = self.h2.data_to_send()
        while data:  # in pieces, as networks do
            cut = self.dice.choice([1, 7, 100, 70_000])
            self.writer.write(data[:cut])
            data = data[cut:]
            if cut < 100:
                await asyncio.sleep(0)
        await self.writer.drain()

    async def read(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                data = await self.reader.read(1 << 16)
        except TimeoutError:
            return
        assert data, "the server closed the connection"
        for event in self.h2.receive_data(data):
            self.handle(event)
        await self.flush()

    def handle(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            self.gone = event
            return
        call = self.calls.get(getattr(event, "stream_id", 0) or 0)
        if call is None or call.over:
            return
        if isinstance(event, DataReceived):
            call.got += event.data
            call.unacknowledged += event.flow_controlled_length
            self.unacknowledged += event.flow_controlled_length
        elif isinstance(event, ResponseReceived | TrailersReceived):
            call.status = str({str(name): value for name, value in event.headers}.get("grpc-status", call.status))
        elif isinstance(event, StreamEnded):
            call.over = True
        elif isinstance(event, StreamReset):
            assert event.error_code in (ErrorCodes.NO_ERROR, ErrorCodes.REFUSED_STREAM)
            call.over = True

    # Steps.

    def open(self) -> None:
        if (
            len([call for call in self.calls.values() if not call.over])
            >= self.h2.remote_settings.max_concurrent_streams
        ):
            return
        method = self.dice.choice(["Same", "Thrice", "Each", "Each", "Nothing", "Refuse"])
        messages = [self.dice.randbytes(self.dice.choice([0, 3, 900, 20_000, BYTES_MAX // 3]))]
        if method == "Each":
            messages *= self.dice.randint(0, 3)
        framed = b"".join(b"\0" + len(one).to_bytes(4) + one for one in messages)
        stream = self.h2.get_next_available_stream_id()
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{SERVICE}/{method}"),
            (":authority", "x"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        if self.dice.random() < 0.3:  # over several frames
            fields += [(f"x-{number}", "y" * 900) for number in range(25)]
        self.h2.send_headers(stream, fields)
        expected = {"Thrice": framed * 3, "Nothing": b"", "Refuse": b""}.get(method, framed)
        self.calls[stream] = Call(method, framed, expected)

    def say(self) -> None:
        stream = self.one()
        if stream is None:
            return
        call = self.calls[stream]
        try:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            size = min(room, len(call.unsent), self.dice.choice([0, 1, 5, 10_000, 16_000]))
            padding = self.dice.choice([None, None, 0, 9]) if size + 10 < room else None
            self.h2.send_data(stream, call.unsent[:size], end_stream=size == len(call.unsent), pad_length=padding)
            call.unsent = call.unsent[size:] if size < len(call.unsent) else b""
            if self.h2.streams[stream].state_machine.state.name == "HALF_CLOSED_LOCAL":
                call.unsent = b""
        except (StreamClosedError, FlowControlError):
            pass

    def one(self) -> int | None:
        """That may say more."""
        able = [
            number
            for number, call in self.calls.items()
            if not call.over and self.h2.streams[number].state_machine.state.name == "OPEN"
        ]
        return self.dice.choice(able) if able else None

    def settle(self) -> None:
        """Gives leave for a part of what came."""
        if self.unacknowledged:
            some = self.dice.randint(1, self.unacknowledged)
            self.h2.increment_flow_control_window(some)
            self.unacknowledged -= some
        for number, call in self.calls.items():
            if not call.over and self.dice.random() < 0.5:
                some = self.dice.choice([1, 50, 5_000, call.unacknowledged + 1])
                self.h2.increment_flow_control_window(some, number)
                call.unacknowledged = max(0, call.unacknowledged - some)

    def reset(self) -> None:
        running = [number for number, call in self.calls.items() if not call.over]
        if running:
            number = self.dice.choice(running)
            self.h2.reset_stream(number, ErrorCodes.CANCEL)
            self.calls[number].over = True
            self.calls[number].status = "reset"

    def change(self) -> None:
        self.h2.update_settings(
            {
                SettingCodes.INITIAL_WINDOW_SIZE: self.dice.choice([0, 10, 65_535, 1 << 20]),
                SettingCodes.MAX_FRAME_SIZE: self.dice.choice([16_384, 1 << 20]),
                SettingCodes.HEADER_TABLE_SIZE: self.dice.choice([0, 4_096]),
            }
        )

    def ping(self) -> None:
        self.h2.ping(b"12345678")

    async def finish(self) -> None:
        """All that still runs comes to its end."""
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
        self.h2.increment_flow_control_window(1 << 28)
        await self.flush()
        async with asyncio.timeout(WAIT):
            while any(not call.over for call in self.calls.values()):
                for _ in range(20):
                    self.say()
                await self.flush()
                await self.read(0.01)
        for call in self.calls.values():
            if call.status == "reset":
                continue
            assert call.status == {"Nothing": "12", "Refuse": "5"}.get(call.method, "0")
            assert bytes(call.got) == call.expected


WAIT = 20.0
_WEIGHTS = (20, 50, 20, 5, 3, 2)


@pytest.mark.parametrize("seed", range(25))
async def test_whatever_is_allowed_is_served_with_nothing_that_is_not(seed: int) -> None:
    async with running(ConnectionLimits(streams_max=20, stream_window=65_535)) as (server, echo, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(seed, reader, writer)
        try:
            await client.run()
            assert client.gone is None
        finally:
            writer.close()
        await until(lambda: not server._connections.open)
        assert echo.running == 0
