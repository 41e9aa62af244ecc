"""A whole worker in the test's own event loop: everything but the process and its signals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from decode.admission import DecodeLimits
from engine.base import Engine, EngineOptions
from prefill.admission import PrefillLimits
from worker.config import LinkSettings, Role, WorkerConfig
from worker.process import ExitCode, serve

PREFILL_LIMITS = PrefillLimits(running=2, queued=2, lease_ttl_s=5)
DECODE_LIMITS = DecodeLimits(legs=4, fetches=1, fetch_timeout_s=5)


def worker_config(
    *routers: str,
    role: Role = Role.BOTH,
    name: str = "w0",
    prefill: PrefillLimits = PREFILL_LIMITS,
    decode: DecodeLimits = DECODE_LIMITS,
    outbox_max: int = 4096,
    drain_grace_s: float = 60,
    stop_timeout_s: float = 5,
    health_address: str = "",
    metrics_address: str = "",
) -> WorkerConfig:
    return WorkerConfig(
        role=role,
        routers=routers,
        engine="scripted",
        engine_options=EngineOptions(name=name, model="/m", served_model_name="m", cluster_secret=b"secret"),
        labels={"zone": "a"},
        prefill=prefill,
        decode=decode,
        link=LinkSettings(retry_first_s=0.01, retry_max_s=0.05, outbox_max=outbox_max),
        drain_grace_s=drain_grace_s,
        stop_timeout_s=stop_timeout_s,
        health_address=health_address,
        metrics_address=metrics_address,
    )


@dataclass
class RunningWorker:
    task: asyncio.Task[ExitCode]
    #: What the first signal sets.
    stop: asyncio.Event
    #: How it said that it would end.
    endings: list[ExitCode] = field(default_factory=list)

    async def exit_code(self) -> ExitCode:
        async with asyncio.timeout(20):
            return await self.task


@asynccontextmanager
async def running_worker(config: WorkerConfig, engine: Engine) -> AsyncIterator[RunningWorker]:
    """Ends it, if the test has not, without grace for what is still open."""
    stop = asyncio.Event()
    endings: list[ExitCode] = []
    task = asyncio.create_task(serve(config, engine, stop, endings.append))
    worker = RunningWorker(task, stop, endings)
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def lines(text: Sequence[str], *beginnings: str) -> list[str]:
    return [line for line in text if line.startswith(beginnings)]
