"""`make bench-core`: how long the router's core takes to decide, and how that grows.

100,000 requests wait. Workers that compute in no time end what runs, one event at a time, and for each request that
ends a new one comes, so the queue stays as long. Every call of `Core.handle` is timed; an event that frees something
also decides who is served next, where, and makes the orders. A decision is an order, or an event that leads to none;
the time of an event that leads to several is divided among them, and events are given beside.

Times are of this thread's CPU, because a shared machine takes the CPU away for milliseconds at a time; wall time stands
beside them. Python's cycle collector runs, but seldom (`GC`): the core makes no cycles that end with a request, and
with the default thresholds each hundredth decision waits for milliseconds. Each size has a process of its own.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random

from benchmarks.report import Check, Row, at_most, environment, percentile, report
from router.core import effects as fx
from router.core import events as ev
from router.core.core import Core
from router.core.estimate import StepModel
from router.core.limits import CoreLimits
from router.core.request import FinishReason, GenerationRequest, Lane, Sampling
from router.core.tenant import Tenant, TenantBook
from router.core.worker import Capacity, KvEndpoint, ModelFacts, Role, WorkerFacts

WORKERS = (10, 100, 1_000)
TENANTS = (10, 1_000, 10_000)
QUEUED = 100_000
#: Measured after so many to warm up.
EVENTS, WARM_UP = 20_000, 2_000
P99_US_MAX = 200.0
GC = (100_000, 20, 100)

PROMPTS = [tuple(range(first, first + 512)) for first in range(0, 50_000, 512)]
STEP = StepModel(
    prefill_s=0.0006, prefill_s_per_token=2e-5, kv_bytes_per_token=131_072, transfer_s=0.001, stall_s_max=0.002
)


class Machine:
    """A core, workers without substance, and a queue that stays full."""

    def __init__(self, workers: int, tenants: int) -> None:
        self.random = Random(f"{workers}/{tenants}")
        self.names = [f"tenant-{number}" for number in range(tenants)]
        self.now = 0.0
        self.asked = 0
        self.running: deque[ev.Event] = deque()
        #: By kind of event, seconds of CPU. And of all events, by the clock.
        self.took: dict[str, list[float]] = {}
        self.wall: list[float] = []
        self.decisions: list[float] = []
        book = TenantBook(
            tenants={
                name: Tenant(
                    id=name,
                    weight=self.random.randint(1, 8),
                    tokens_in_flight_max=200_000,
                    requests_per_minute=1e6,
                    tokens_per_minute=1e9,
                    guaranteed_tokens_per_s=100 if number % 10 == 0 else 0,
                )
                for number, name in enumerate(self.names)
            }
        )
        limits = CoreLimits(queue_requests_max=2 * QUEUED, queue_tokens_max=10**12)
        self.core = Core(now=0.0, limits=limits, models=("m",), book=book, step=STEP, cache_secret=b"s")
        for number in range(workers):
            self.do(ev.WorkerJoined(_worker(number)))
        before = _memory()
        for _ in range(QUEUED):
            self.do(self.next_request())
        #: Without its prompt, which is shared here.
        self.bytes_per_request = (_memory() - before) / QUEUED

    def next_request(self) -> ev.Submit:
        self.asked += 1
        return ev.Submit(
            GenerationRequest(
                request_id=f"request-{self.asked}",
                model="m",
                prompt=self.random.choice(PROMPTS),
                sampling=Sampling(max_tokens=128, temperature=0.0),
                arrival=self.now,
                deadline=self.now + 3600.0,
                tenant=self.random.choice(self.names),
                lane=self.random.choice((Lane.REALTIME, Lane.STANDARD, Lane.STANDARD, Lane.BATCH)),
            )
        )

    def run(self, events: int) -> None:
        for _ in range(events):
            event = self.running.popleft() if self.running else self.next_request()
            ended = self.do(event)
            for _ in range(ended):
                self.do(self.next_request())

    def do(self, event: ev.Event) -> int:
        """Returns how many requests ended."""
        self.now += 1e-5
        clock, cpu = time.perf_counter(), time.thread_time()
        effects = self.core.handle(self.now, event)
        seconds = time.thread_time() - cpu
        self.wall.append(time.perf_counter() - clock)
        self.took.setdefault(type(event).__name__, []).append(seconds)
        orders = max(1, sum(isinstance(effect, fx.SendPrefill | fx.SendDecode) for effect in effects))
        self.decisions += [seconds / orders] * orders
        ended = 0
        for effect in effects:
            if isinstance(effect, fx.SendPrefill):
                handle = effect.leg_id.encode()
                done = ev.PrefillDone(worker_id=effect.worker_id, leg_id=effect.leg_id, token_id=1, handle=handle)
                self.running.append(done)
            elif isinstance(effect, fx.SendDecode):
                if effect.handle:
                    worker_id, leg_id = effect.worker_id, effect.leg_id
                    self.running.append(
                        ev.Fetched(worker_id=worker_id, leg_id=leg_id, transport="none", nbytes=1, fetch_s=0.001)
                    )
                tokens = (1,) * self.random.randint(10, 100)
                output = ev.StepOutput(effect.leg_id, tokens, FinishReason.STOP)
                self.running.append(ev.StepOutputs(effect.worker_id, (output,)))
            elif isinstance(effect, fx.Emit) and isinstance(effect.event, fx.Finished | fx.Failed):
                ended += 1
        return ended


def _worker(number: int) -> WorkerFacts:
    return WorkerFacts(
        worker_id=f"worker-{number}",
        incarnation="1",
        role=(Role.PREFILL, Role.DECODE)[number % 2],
        model=ModelFacts(name="m", revision="1", max_model_len=131_072, vocab_size=128_000),
        capacity=Capacity(prefill_legs=2, decode_legs=16, kv_blocks=25_000, block_tokens=16),
        kv=KvEndpoint(),
    )


def _memory() -> int:
    """Resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(workers: int, tenants: int) -> Row:
    gc.set_threshold(*GC)
    machine = Machine(workers, tenants)
    machine.run(WARM_UP)
    gc.collect()
    gc.freeze()
    for measured in (machine.took, machine.wall, machine.decisions):
        measured.clear()
    machine.run(EVENTS)
    assert len(machine.core.state.pools["m"].queue) > QUEUED * 0.9
    every = [seconds for took in machine.took.values() for seconds in took]
    row: dict[str, str | int | float | bool | None] = {
        "workers": workers,
        "tenants": tenants,
        "decisions_per_s": round(len(machine.decisions) / sum(every)),
        "p50_us": _us(machine.decisions, 0.5),
        "p99_us": _us(machine.decisions, 0.99),
        "event_p99_us": _us(every, 0.99),
        "event_wall_p99_us": _us(machine.wall, 0.99),
    }
    for name in ("Submit", "StepOutputs"):
        row[f"{name}_p99_us"] = _us(machine.took.get(name, []), 0.99)
    row["bytes_per_queued"] = round(machine.bytes_per_request)
    return row


def _us(took: list[float], share: float) -> float | None:
    seconds = percentile(took, share)
    return None if seconds is None else round(seconds * 1e6, 1)


def main() -> None:
    env = environment()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        sizes = [(workers, tenants) for workers in WORKERS for tenants in TENANTS]
        rows = [processes.submit(measure, *size).result() for size in sizes]
    first, last = rows[0], rows[-1]
    growth = _ratio(last["p50_us"], first["p50_us"])
    checks = [
        at_most("p99_us at the largest", _number(last["p99_us"]), P99_US_MAX),
        Check("p50 at the largest over p50 at the smallest", growth, "for information", True),
    ]
    report("core", rows, checks, env)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _ratio(one: object, other: object) -> float | None:
    ours, theirs = _number(one), _number(other)
    return round(ours / theirs, 2) if ours and theirs else None


if __name__ == "__main__":
    main()
