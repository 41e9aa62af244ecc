"""What of a transfer is left when the prefill ends: a long prompt of a large model, read while it is computed or after.

A router, a prefill and a decode worker, each in a process of its own, with the simulated engine at the speed of Llama 3
70B on four H100s: steps take the time they take there, the lane between the workers takes the time 25 GB/s take. All
of it is the production code, from the native edge to the lease word; what is simulated is the computing and the lane's
speed. Scaled is the size of memory: a token has 5 KiB of KV instead of 320, and the lane moves 64 times fewer bytes in
a second, so that every read takes as long as the real one.

*Exposed* is the time from the moment in which the prefill engine has the first token to the one in which the decode
worker has all bytes, confirmed. Requests come one at a time, with overlap and without in turns.

    make bench-overlap
    make bench-overlap ARGS="--requests 20"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import uvloop

from benchmarks.cluster import MODEL, cluster
from benchmarks.report import Check, Row, at_most, environment, percentile, report
from decode.admission import DecodeLimits
from engine.base import DecodeLeg, EngineOptions, Offered, PrefillLeg, PrefillResult, Staged, StepOutput, Take
from engine.sim import SimEngine
from engine.step_time import step_time
from tandem import AsyncClient
from worker.config import LogSettings, Role, WorkerConfig
from worker.process import serve

PROMPT_TOKENS = 8192
LANE_BYTES_PER_S = 25e9
STEP_TIME = "h100-llama-3-70b-tp4"
SCALE = 64
ANSWER_TOKENS = 4
#: Tokens that one step computes. The first is what the promise is about: an eighth of ten percent of the prompt.
CHUNKS = (512, 2048)
EXPOSED_SHARE_MAX = 0.10

KV_BYTES_PER_TOKEN = step_time(STEP_TIME).kv_bytes_per_token
FULL_S = PROMPT_TOKENS * KV_BYTES_PER_TOKEN / LANE_BYTES_PER_S


class TimedEngine(SimEngine):
    """Tells when a prompt was computed, when it was fetched, and, before an answer ends, whether what was fetched was
    what had been computed: zero, or how often it was not."""

    def __init__(self, options: EngineOptions, told: Connection) -> None:
        super().__init__(options, bytes_per_s=LANE_BYTES_PER_S / SCALE)
        self._told = told

    async def prefill(self, leg: PrefillLeg, offered: Offered | None = None) -> PrefillResult:
        result = await super().prefill(leg, offered)
        self._told.send(time.monotonic())
        return result

    async def fetch(self, handle: bytes, timeout_s: float, *, ahead: bool = False) -> Staged:
        staged = await super().fetch(handle, timeout_s, ahead=ahead)
        self._told.send(time.monotonic())
        return staged

    async def decode(self, leg: DecodeLeg, take: Take | None = None) -> AsyncIterator[StepOutput]:
        async for output in super().decode(leg, take):
            if output.finish_reason:
                self._told.send((await self.load()).extra["kv_mismatches_total"])
            yield output


def work(config: WorkerConfig, told: Connection) -> None:
    """A worker process, until it is terminated."""

    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await serve(config, TimedEngine(config.engine_options, told), stop, lambda code: None)

    uvloop.run(run())


@dataclass(frozen=True, slots=True)
class Case:
    chunk_tokens: int
    overlap: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    exposed_s: float
    prefill_s: float
    handoff_s: float


@dataclass(frozen=True, slots=True)
class Pair:
    client: AsyncClient
    prefill: Connection
    decode: Connection

    async def request(self, prompt: Sequence[int]) -> Request:
        """Runs one; its tokens are right, or the simulated engine has found other bytes than it should."""
        stream = self.client.generate(list(prompt), max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
        timings = (await stream.result()).finished.timings
        computed_at, fetched_at, mismatches = self.prefill.recv(), self.decode.recv(), self.decode.recv()
        assert not mismatches, "the bytes that arrived are not those that were computed"
        exposed_s = fetched_at - computed_at
        return Request(exposed_s=exposed_s, prefill_s=timings.prefill_s, handoff_s=timings.handoff_s)


@asynccontextmanager
async def running(address: str, options: EngineOptions, case: Case) -> AsyncIterator[Pair]:
    """A prefill and a decode worker of this router."""
    spawn = get_context("spawn")
    told, workers = [], []
    for role in (Role.PREFILL, Role.DECODE):
        config = WorkerConfig(
            role=role,
            routers=(address,),
            engine="sim",
            engine_options=replace(options, name=role.value, max_batched_tokens=case.chunk_tokens),
            decode=DecodeLimits() if case.overlap else DecodeLimits(fetches_ahead=0),
            log=LogSettings(level="WARNING"),
        )
        here, there = spawn.Pipe(duplex=False)
        told.append(here)
        workers.append(spawn.Process(target=work, args=(config, there), daemon=True))
        workers[-1].start()
        there.close()
    try:
        async with AsyncClient(address) as client:
            while len((await client.status()).workers) < len(workers):  # noqa: ASYNC110  it tells only when asked
                await asyncio.sleep(0.05)
            yield Pair(client, *told)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


async def measure(address: str, options: EngineOptions, case: Case, requests: int) -> list[Request]:
    draw = random.Random(0)
    prompts = [[draw.randrange(16, 4000) for _ in range(PROMPT_TOKENS)] for _ in range(requests + 1)]
    async with running(address, options, case) as pair:
        return [await pair.request(prompt) for prompt in prompts][1:]  # the first wires the lane up


def as_row(case: Case, requests: Sequence[Request]) -> Row:
    exposed = [request.exposed_s for request in requests]
    return {
        "chunk_tokens": case.chunk_tokens,
        "overlap": "on" if case.overlap else "off",
        "requests": len(requests),
        "prefill_ms": median(request.prefill_s for request in requests) * 1e3,
        "full_transfer_ms": FULL_S * 1e3,
        "one_chunk_ms": FULL_S * 1e3 * case.chunk_tokens / PROMPT_TOKENS,
        "exposed_ms_p50": median(exposed) * 1e3,
        "exposed_ms_p90": (percentile(exposed, 0.9) or 0.0) * 1e3,
        "exposed_over_full": median(exposed) / FULL_S,
        "handoff_ms_p50": median(request.handoff_s for request in requests) * 1e3,
    }


def checks(rows: Sequence[Row]) -> list[Check]:
    name = f"exposed over full transfer, chunks of {CHUNKS[0]}, overlap on"
    found = [row["exposed_over_full"] for row in rows if (row["chunk_tokens"], row["overlap"]) == (CHUNKS[0], "on")]
    return [at_most(name, value if isinstance(value, float) else None, EXPOSED_SHARE_MAX) for value in found]


def long_model(folder: Path) -> Path:
    """The shipped model, as far as the simulated engine and the router look at it, with room for the prompt."""
    model = folder / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 2 * PROMPT_TOKENS
    (model / "config.json").write_text(json.dumps(config))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10, help="of each kind")
    arguments = parser.parse_args()
    env = environment()
    folder = Path(tempfile.mkdtemp(prefix="bench-overlap-"))
    print(f"logs in {folder}")
    bytes_per_token = KV_BYTES_PER_TOKEN // SCALE
    options = EngineOptions(
        name="",
        model=str(long_model(folder)),
        served_model_name="nano",
        cluster_secret=random.Random(0).randbytes(32),
        transports=("shm", "tcp"),
        kv_cache_bytes=4 * PROMPT_TOKENS * bytes_per_token,
        staging_bytes=4 * PROMPT_TOKENS * bytes_per_token,
        kv_bytes_per_token=bytes_per_token,
        prefix_caching=False,
        step_time=STEP_TIME,
        speedup=1.0,
    )
    rows = []
    for case in (Case(chunk, overlap) for chunk in CHUNKS for overlap in (True, False)):
        with cluster(f"{case.chunk_tokens}-{case.overlap}", (), options, engine="sim", logs=folder) as found:
            rows.append(as_row(case, uvloop.run(measure(found.address, options, case, arguments.requests))))
        print(f"{case} done", flush=True)
    report("overlap", rows, checks(rows), env)


if __name__ == "__main__":
    main()
