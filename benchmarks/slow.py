"""What clients that stop reading cost others: inter-token latency of those that read, and memory of the router.

    make bench-slow ARGS="--seconds 60"

Beside the clients that are measured, as many calls run again: first they read, then they stop reading after their first
message, then they read again. So all that differs is whether they read: the simulated engine's steps take the same time
however long the answers have become.
"""

from __future__ import annotations

import argparse
import asyncio
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
TOKENS_MAX = 4_000
_WARM_UP_S = 3.0
_CALLS: tuple[tuple[str, int], ...] = (("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 1024))


class Client:
    """One answer that never ends, over either protocol, in a connection of its own. Times of what comes are kept while
    it reads."""

    def __init__(self, protocol: str, address: str) -> None:
        self._protocol = protocol
        self._address = address
        self._may_read = asyncio.Event()
        self._may_read.set()
        self.began = asyncio.Event()
        self.gaps_s: list[float] = []
        self._task = asyncio.create_task(self._run())

    def stop_reading(self) -> None:
        self._may_read.clear()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await (self._grpc() if self._protocol == "grpc" else self._http())

    async def _grpc(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=_CALLS) as channel:
            sampling = inference_pb2.Sampling(max_tokens=TOKENS_MAX, temperature=0.0, ignore_eos=True)
            request = inference_pb2.GenerateRequest(text="x = 1", sampling=sampling)
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


async def opened(protocol: str, address: str, count: int) -> list[Client]:
    clients = [Client(protocol, address) for _ in range(count)]
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
    readers = await opened(protocol, address, READERS)
    found: dict[str, list[float]] = {"read": [], "stopped": []}
    for others, part in (("read", seconds / 2), ("stopped", seconds), ("read", seconds / 2)):
        beside = await opened(protocol, address, OTHERS)
        if others == "stopped":
            for client in beside:
                client.stop_reading()
        found[others] += await gaps_s(readers, part)
        await closed(beside)
    await closed(readers)
    rows: list[Row] = []
    p99s = {}
    for others, gaps in found.items():
        p50, p99 = percentile(gaps, 0.5), percentile(gaps, 0.99)
        p99s[others] = p99
        rows.append(
            {
                "protocol": protocol,
                "others": others,
                "readers": READERS,
                "messages": len(gaps),
                "itl_ms_p50": p50 and p50 * 1000,
                "itl_ms_p99": p99 and p99 * 1000,
            }
        )
    ratio = p99s["stopped"] / p99s["read"] if p99s["stopped"] and p99s["read"] else None
    return rows, at_most(f"{protocol}: ITL p99 beside who stopped / beside who reads", ratio, 1.1)


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
