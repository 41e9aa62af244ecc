"""What clients that stop reading cost others: inter-token latency of those that read, and memory of the router.

    make bench-slow ARGS="--seconds 60"

Beside the clients that are measured, as many others run: first they read, then they stop reading after their first
message, then others read again. What was measured beside those that stopped is compared with both times that others
read, as long together. All that differs is whether they read: every part begins with new answers, none of which ends in
it, and the simulated engine's steps take the same time however long they have become.

Who is measured asks for token ids, or over HTTP for log probabilities, so that every token is a message of its own.
Text alone would not do: one in eighty of the simulated engine's tokens begins a character whose rest comes later, or
never. Nothing is said for it, and the next message comes two steps after the one before. That is one gap in eighty, of
twice the length, just where the 99th percentile is looked for, and all readers meet it at once, for they get the same
answer: on which side of it the percentile falls is chance.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from benchmarks.cluster import MODEL, Cluster, cluster, wait_ready
from benchmarks.report import Check, Row, at_most, environment, percentile, report
from engine.base import EngineOptions
from protos import inference_pb2, inference_pb2_grpc
from router.config import RouterConfig
from worker.config import Role

NAME = "tandem-nano"
STEP_TIME = "flat-25ms"
READERS, OTHERS, STALLED = 16, 16, 64
#: 100 s of steps, nearly the longest that the model allows.
TOKENS_MAX = 4_000
SECONDS_MAX = 90.0
_WARM_UP_S = 3.0
_CALLS: tuple[tuple[str, int], ...] = (("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 1024))


class Client:
    """One answer that does not end, over either protocol, in a connection of its own. Times of what comes are kept
    while it reads. With `every_token` it gets a message also for tokens that make no text yet."""

    def __init__(self, protocol: str, address: str, *, every_token: bool) -> None:
        self._protocol = protocol
        self._address = address
        self._every_token = every_token
        self._may_read = asyncio.Event()
        self._may_read.set()
        self.began = asyncio.Event()
        self.gaps_s: list[float] = []
        self._task = asyncio.create_task(self._run())

    def stop_reading(self) -> None:
        self._may_read.clear()

    async def close(self) -> None:
        """Raises what went wrong, if its answer ended before."""
        if self._task.done():
            self._task.result()
            raise RuntimeError("an answer ended while it was measured")
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        await (self._grpc() if self._protocol == "grpc" else self._http())

    async def _grpc(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=_CALLS) as channel:
            sampling = inference_pb2.Sampling(max_tokens=TOKENS_MAX, temperature=0.0, ignore_eos=True)
            request = inference_pb2.GenerateRequest(text="x = 1", sampling=sampling, return_token_ids=self._every_token)
            last = None
            async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request):
                last = await self._came(last)

    async def _http(self) -> None:
        host, _, port = self._address.rpartition(":")
        ours = socket.socket()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(ours, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=ours, limit=4096)
        try:
            asked = {"prompt": "x = 1", "max_tokens": TOKENS_MAX, "temperature": 0, "ignore_eos": True, "stream": True}
            if self._every_token:
                asked["logprobs"] = 0
            body = json.dumps(asked).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            last = None
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    last = await self._came(last)
        finally:
            writer.close()

    async def _came(self, last: float | None) -> float | None:
        """Returns when the next message may be read."""
        now = time.monotonic()
        if last is not None:
            self.gaps_s.append(now - last)
        self.began.set()
        if self._may_read.is_set():
            return now
        await self._may_read.wait()
        return None


async def opened(protocol: str, address: str, count: int, *, every_token: bool = False) -> list[Client]:
    clients = [Client(protocol, address, every_token=every_token) for _ in range(count)]
    await asyncio.gather(*(client.began.wait() for client in clients))
    return clients


async def closed(clients: Sequence[Client]) -> None:
    await asyncio.gather(*(client.close() for client in clients))


async def gaps_s(readers: Sequence[Client], seconds: float) -> list[float]:
    await asyncio.sleep(_WARM_UP_S)
    for reader in readers:
        reader.gaps_s.clear()
    await asyncio.sleep(seconds)
    return [gap for reader in readers for gap in reader.gaps_s]


async def latency(protocol: str, address: str, seconds: float) -> tuple[list[Row], Check]:
    found: dict[str, list[float]] = {"read": [], "stopped": []}
    rows: list[Row] = []
    for others, part_s in (("read", seconds / 2), ("stopped", seconds), ("read", seconds / 2)):
        readers = await opened(protocol, address, READERS, every_token=True)
        beside = await opened(protocol, address, OTHERS)
        if others == "stopped":
            for client in beside:
                client.stop_reading()
        gaps = await gaps_s(readers, part_s)
        found[others] += gaps
        rows.append({"protocol": protocol, "others": others, "seconds": part_s, "readers": READERS, **_summary(gaps)})
        await closed([*readers, *beside])
    # As much before as after: what the machine's speed changes meanwhile falls on both alike.
    read, stopped = percentile(found["read"], 0.99), percentile(found["stopped"], 0.99)
    ratio = stopped / read if stopped and read else None
    return rows, at_most(f"{protocol}: ITL p99 beside who stopped / beside who reads", ratio, 1.1)


def _summary(gaps: Sequence[float]) -> Row:
    row: dict[str, float | None] = {"messages": len(gaps)}
    for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
        gap = percentile(gaps, share)
        row[f"itl_ms_{name}"] = gap and gap * 1000
    return row


async def memory(protocol: str, address: str, pid: int, seconds: float) -> tuple[Row, Check]:
    """Of streams that nobody reads, beyond what the same streams took when they had just begun."""
    clients = await opened(protocol, address, STALLED)
    before = resident_bytes(pid)
    for client in clients:
        client.stop_reading()
    await asyncio.sleep(seconds)
    per_stream = (resident_bytes(pid) - before) / STALLED / 1024
    await closed(clients)
    row: Row = {"protocol": protocol, "others": "stopped", "stalled": STALLED, "kib_per_stalled_stream": per_stream}
    return row, at_most(f"{protocol}: KiB buffered per stream that nobody reads", per_stream, 64.0)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def measure(running: Cluster, http_address: str, seconds: float) -> tuple[list[Row], list[Check]]:
    rows: list[Row] = []
    checks: list[Check] = []
    for protocol, address in (("grpc", running.address), ("http", http_address)):
        found, check = await latency(protocol, address, seconds)
        row, bound = await memory(protocol, address, running.pids["router"], seconds)
        rows += [*found, row]
        checks += [check, bound]
    return rows, checks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="that clients do not read, for each protocol")
    asked = parser.parse_args()
    if asked.seconds > SECONDS_MAX:
        parser.error(f"--seconds: answers end after 100 s, so {SECONDS_MAX:g} at most")
    gc.disable()  # a pause here would be taken for the router's
    env = environment()
    options = EngineOptions(
        name="",
        model=str(MODEL),
        served_model_name=NAME,
        cluster_secret=os.urandom(32),
        max_running=READERS + STALLED + OTHERS,
        step_time=STEP_TIME,
        speedup=1,
    )
    port = free_port()
    router = RouterConfig(model_dir=str(MODEL), model_name=NAME, port=0, http_port=port, log_level="WARNING")
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(
            "slow", (Role.PREFILL, Role.DECODE), options, engine="sim", logs=Path(folder), router=router
        ) as running,
    ):
        wait_ready(running, 2)
        rows, checks = asyncio.run(measure(running, f"127.0.0.1:{port}", asked.seconds))
    report("slow", rows, checks, env)


if __name__ == "__main__":
    main()
