"""A load generator that takes little: raw HTTP/1.1 and HTTP/2 on uvloop, one process, every answer's arrivals kept.

It reads one JSON job a line from standard input and answers each with one line on standard output. It is the same for
every server measured: the OpenAI frontends get the same bytes, and so do the KServe ones. A closed loop keeps so many
requests in flight; each may pause for a random time before the next, so that arrivals don't fall in step with an engine
whose steps have a fixed length.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, cast

import msgspec
import uvloop

ROOT = Path(__file__).resolve().parents[1]
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_WINDOW_MAX = 2**31 - 1
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    protocol: Literal["http", "grpc"]
    host: str
    port: int
    #: HTTP's path, or gRPC's method.
    path: str
    #: Bodies, or gRPC messages, sent in turn.
    bodies: list[bytes]
    in_flight: int
    #: Requests are begun for so long, at least one by each in flight, and all of them are ended.
    duration_s: float
    #: The longest pause before a request.
    think_s: float = 0.0
    #: The first of each in flight begin over so long.
    ramp_s: float = 0.0
    #: What the end of every whole answer contains.
    proof: bytes = b""
    #: Of a whole answer.
    messages_min: int = 1
    timeout_s: float = 120.0
    #: Of one HTTP/2 connection; some servers allow no more than 100.
    streams_per_connection: int = 32
    #: Keep each answer's span and longest gap, in place of all its gaps.
    long_answers: bool = False


class Result(msgspec.Struct, kw_only=True):
    wall_s: float = 0.0
    requests: int = 0
    #: Messages or events that arrived.
    messages: int = 0
    bytes_in: int = 0
    cpu_s: float = 0.0
    ttft_s: list[float] = msgspec.field(default_factory=list)
    #: Between two arrivals of one answer; messages that arrive in one read count once.
    itl_s: list[float] = msgspec.field(default_factory=list)
    #: Of each long answer: from its first arrival to its last, and the longest time without one.
    span_s: list[float] = msgspec.field(default_factory=list)
    longest_gap_s: list[float] = msgspec.field(default_factory=list)
    errors: list[str] = msgspec.field(default_factory=list)

    def took(self, answer: Answer, job: Job) -> None:
        arrivals = answer.arrivals
        self.requests += 1
        self.messages += answer.messages
        self.ttft_s.append(arrivals[0] - answer.sent)
        gaps = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
        if job.long_answers:
            self.span_s.append(arrivals[-1] - arrivals[0])
            self.longest_gap_s.append(max(gaps))
        else:
            self.itl_s += gaps


class Answer:
    """What arrives of one request."""

    __slots__ = ("arrivals", "done", "messages", "sent", "tail")

    def __init__(self, done: asyncio.Future[str]) -> None:
        self.sent = time.perf_counter()
        self.arrivals: list[float] = []
        self.messages = 0
        #: The last bytes.
        self.tail = b""
        #: Empty, or what went wrong.
        self.done = done

    def arrived(self, messages: int) -> None:
        self.arrivals.append(time.perf_counter())
        self.messages += messages

    def end(self, error: str = "") -> None:
        if not self.done.done():
            self.done.set_result(error)


class Slot(Protocol):
    """Takes one request at a time."""

    def send(self, body: bytes) -> Answer: ...

    def close(self) -> None: ...


class HttpSlot(asyncio.Protocol):
    """One keep-alive connection. Answers are server-sent events in chunks."""

    def __init__(self, job: Job, count: Callable[[int], None]) -> None:
        self._head = f"POST {job.path} HTTP/1.1\r\nhost: {job.host}\r\ncontent-type: application/json\r\n".encode()
        self._count = count
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._began = False
        self._lost = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, body: bytes) -> Answer:
        assert self._transport is not None
        self._began = False
        self._answer = Answer(asyncio.get_running_loop().create_future())
        if self._lost:
            self._answer.end(self._lost)
        self._transport.write(b"%scontent-length: %d\r\n\r\n%s" % (self._head, len(body), body))
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._count(len(data))
        answer = self._answer
        if answer is None:
            return
        if not self._began:
            data = answer.tail + data
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                answer.tail = data
                return
            if b" 200 " not in head[:20]:
                answer.end(data[:300].decode(errors="replace"))
                return
            self._began, data, answer.tail = True, rest, b""
        if events := data.count(b"\n\n"):  # texts have their line ends escaped
            answer.arrived(events)
        tail = answer.tail = (answer.tail + data)[-600:]
        if tail.endswith(b"\r\n0\r\n\r\n"):
            answer.end("" if b"data: [DONE]" in tail else "the stream broke off")

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = f"the connection was lost: {error}"
        if self._answer is not None:
            self._answer.end(self._lost)

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


class GrpcConnection(asyncio.Protocol):
    """HTTP/2 as far as gRPC servers that send answers need it. It gives them all the window there is."""

    def __init__(self, job: Job, count: Callable[[int], None]) -> None:
        self._headers = _headers(job)
        self._count = count
        self._transport: asyncio.Transport | None = None
        self._next_stream = 1
        self._answers: dict[int, Answer] = {}
        #: A message of which only a part arrived, by stream.
        self._parts: dict[int, bytes] = {}
        self._rest = b""
        self._window = 65_535
        #: Each with its headers and its stream.
        self._unsent: list[tuple[bytes, bytes, int]] = []
        self._lost = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # No header table, so that nothing has to be remembered; no push; all the window.
        settings = b"".join(n.to_bytes(2) + v.to_bytes(4) for n, v in ((1, 0), (2, 0), (4, _WINDOW_MAX)))
        more = (_WINDOW_MAX - 65_535).to_bytes(4)
        self._transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, more))

    def send(self, body: bytes) -> Answer:
        assert self._transport is not None
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        answer = self._answers[stream] = Answer(asyncio.get_running_loop().create_future())
        if self._lost:
            answer.end(self._lost)
        message = b"\0" + len(body).to_bytes(4) + body
        assert len(message) <= 16_384, "longer than one frame"
        self._unsent.append((_frame(_HEADERS, _END_HEADERS, stream, self._headers), message, stream))
        self._headers = _SAME_HEADERS
        self._flush()
        return answer

    def _flush(self) -> None:
        """Each request in one write, as gRPC's clients do."""
        assert self._transport is not None
        while self._unsent and len(self._unsent[0][1]) <= self._window:
            headers, message, stream = self._unsent.pop(0)
            self._window -= len(message)
            self._transport.write(headers + _frame(_DATA, _END_STREAM, stream, message))

    def data_received(self, data: bytes) -> None:
        self._count(len(data))
        data = self._rest + data
        at, size = 0, len(data)
        came: dict[int, int] = {}
        ended: list[tuple[int, str]] = []
        while size - at >= 9:
            length = int.from_bytes(data[at : at + 3])
            if size - at - 9 < length:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9])
            payload = data[at + 9 : at + 9 + length]
            at += 9 + length
            if kind == _DATA:
                if messages := self._messages(stream, payload):
                    came[stream] = came.get(stream, 0) + messages
                if flags & _END_STREAM:
                    ended.append((stream, "the stream broke off"))
            elif kind == _HEADERS:
                if flags & _END_STREAM:
                    ended.append((stream, ""))
            elif kind == _RST_STREAM:
                ended.append((stream, f"reset: {int.from_bytes(payload)}"))
            else:
                self._control(kind, flags, stream, payload)
        self._rest = data[at:]
        for stream, messages in came.items():
            if (answer := self._answers.get(stream)) is not None:
                answer.arrived(messages)
        for stream, error in ended:
            self._parts.pop(stream, None)
            if (answer := self._answers.pop(stream, None)) is not None:
                answer.end(error)

    def _messages(self, stream: int, payload: bytes) -> int:
        """How many became whole."""
        data = self._parts.pop(stream, b"") + payload
        count = at = 0
        while len(data) - at >= 5:
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5])
            if end > len(data):
                break
            count += 1
            if (answer := self._answers.get(stream)) is not None:
                answer.tail = data[at + 5 : end]
            at = end
        if at < len(data):
            self._parts[stream] = data[at:]
        return count

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert self._transport is not None
        if kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload)
            self._flush()
        elif kind == _GOAWAY:
            self.connection_lost(ConnectionError(f"GOAWAY {payload[8:].decode(errors='replace')}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = self._lost or f"the connection was lost: {error}"
        for answer in self._answers.values():
            answer.end(self._lost)
        self._answers.clear()

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def _headers(job: Job) -> bytes:
    """HPACK: `:method POST` and `:scheme http` have numbers, the others are put into the table."""

    def text(value: str) -> bytes:
        assert len(value) < 127
        return bytes((len(value),)) + value.encode()

    return b"".join(
        (
            b"\x83\x86",
            b"\x44" + text(job.path),
            b"\x41" + text(f"{job.host}:{job.port}"),
            b"\x40" + text("content-type") + text("application/grpc"),
            b"\x40" + text("te") + text("trailers"),
        )
    )


#: The same, from the second time on: what the table has.
_SAME_HEADERS = b"\x83\x86\xc1\xc0\xbf\xbe"


async def connect(job: Job, count: Callable[[int], None]) -> list[Slot]:
    """One for each request in flight."""
    loop = asyncio.get_running_loop()
    slots: list[Slot] = []
    while len(slots) < job.in_flight:
        if job.protocol == "http":
            slots.append((await loop.create_connection(lambda: HttpSlot(job, count), job.host, job.port))[1])
            continue
        _, connection = await loop.create_connection(lambda: GrpcConnection(job, count), job.host, job.port)
        slots += [connection] * min(job.streams_per_connection, job.in_flight - len(slots))
    return slots


async def run(job: Job) -> Result:
    result = Result()

    def count(size: int) -> None:
        result.bytes_in += size

    rng = random.Random(0)
    numbers = iter(range(sys.maxsize))
    slots = await connect(job, count)
    began = time.perf_counter()

    async def client_loop(slot: Slot) -> None:
        await asyncio.sleep(rng.uniform(0, job.ramp_s))
        while True:
            if job.think_s:
                await asyncio.sleep(rng.uniform(0, job.think_s))
            answer = slot.send(job.bodies[next(numbers) % len(job.bodies)])
            try:
                error = await asyncio.wait_for(answer.done, job.timeout_s)
            except TimeoutError:
                error = f"no end within {job.timeout_s:g} s"
            if not error and (answer.messages < job.messages_min or job.proof not in answer.tail):
                error = f"not a whole answer, {answer.messages} messages: {answer.tail[-200:]!r}"
            if error:
                result.errors.append(error)
                return
            result.took(answer, job)
            if time.perf_counter() - began >= job.duration_s:
                return

    cpu = time.process_time()
    async with asyncio.TaskGroup() as group:
        for slot in slots:
            group.create_task(client_loop(slot))
    result.wall_s = time.perf_counter() - began
    result.cpu_s = time.process_time() - cpu
    for slot in slots:
        slot.close()
    return result


class LoadGenerator:
    """The process, from the bench's side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, job: Job) -> Result:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(msgspec.json.encode(job) + b"\n")
        stdin.flush()
        return msgspec.json.decode(stdout.readline(), type=Result)

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    for line in sys.stdin.buffer:
        result = uvloop.run(run(msgspec.json.decode(line, type=Job)))
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
