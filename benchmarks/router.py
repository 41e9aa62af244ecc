"""What the router costs: its CPU for each request and token, and the time it adds, beside NVIDIA Dynamo's frontend.

Every server gets the same prompts from the same load generator (benchmarks/load.py) in one run on one machine: 512
tokens in as text, 64 out, streamed. Engines take no time, or 25 ms for every step; Dynamo's is its own mock engine,
told the same. CPU is what the serving process used, user and system, while the load ran: all of its threads, the idle
ones too. What the engine takes by itself is measured without any router, under the same closed loop, and subtracted
from what clients see: that is the time added by router, link and worker process.

Paced, the requests of a closed loop begin over the time that an answer takes, so that as many run in every part of it.
What it is like when all begin within one step is measured apart ("at once").

    make bench-router
    make bench-router ARGS=--quick
    make bench-router ARGS="--edges 1 2 3 --engines unpaced --levels 64 256 --no-dynamo"
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from benchmarks.cluster import MODEL, cluster, wait_ready
from benchmarks.dynamo import VERSION as DYNAMO_VERSION
from benchmarks.dynamo import DidNotStart, NotInstalled, dynamo
from benchmarks.dynamo import environment as dynamo_environment
from benchmarks.load import Job, LoadGenerator, Result
from benchmarks.report import Check, Row, at_most, environment, percentile, report
from engine.base import DecodeLeg, EngineOptions, Sampling
from engine.sim import SimEngine
from prefill.admission import PrefillLimits
from protos import inference_pb2
from protos.compat import kserve_pb2
from router.config import RouterConfig
from router.core.limits import CoreLimits
from router.edge.text import ModelText
from worker.config import Role

PROMPT_TOKENS, ANSWER_TOKENS = 512, 64
STEP_MS = {"unpaced": 0.0, "paced": 25.0}
LEVELS = (1, 16, 64, 256)
AT_ONCE = 64
RUNNING_MAX = 512
START_TIMEOUT_S = 60.0
NAME = "bench"
NATIVE, KSERVE, OPENAI = "tandem gRPC", "tandem KServe", "tandem OpenAI"
OURS = (NATIVE, KSERVE, OPENAI)
DYNAMO = "dynamo OpenAI"


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    #: Of all processes that serve.
    pids: Sequence[int]
    #: Without load and duration.
    job: Job


@dataclass(frozen=True, slots=True)
class Cell:
    target: str
    pacing: str
    in_flight: int
    at_once: bool
    result: Result
    cpu_s: float


def prompts(count: int) -> list[str]:
    """Texts of exactly so many tokens, all different."""
    text, rng = ModelText(MODEL), random.Random(0)
    words = [word for word in (text.decode((token_id,)) for token_id in range(300, 4000)) if word.strip().isalpha()]
    return [_prompt(text, rng, words) for _ in range(count)]


def _prompt(text: ModelText, rng: random.Random, words: Sequence[str]) -> str:
    said = ""
    while len(text.encode(said)) < PROMPT_TOKENS:
        said += " " + rng.choice(words).strip()
    while len(text.encode(said)) > PROMPT_TOKENS:
        said = said[:-1]
    while len(text.encode(said)) < PROMPT_TOKENS:
        said += " a"
    return said


def native_job(address: str, texts: Sequence[str]) -> Job:
    sampling = inference_pb2.Sampling(max_tokens=ANSWER_TOKENS, ignore_eos=True, temperature=0)
    host, _, port = address.partition(":")
    usage = inference_pb2.Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=ANSWER_TOKENS)
    return Job(
        protocol="grpc",
        host=host,
        port=int(port),
        path="/tandem.v1.Inference/Generate",
        bodies=[inference_pb2.GenerateRequest(text=text, sampling=sampling).SerializeToString() for text in texts],
        in_flight=1,
        duration_s=1,
        proof=usage.SerializeToString(),
    )


def openai_job(port: int, texts: Sequence[str]) -> Job:
    def body(text: str) -> bytes:
        said = {
            "model": NAME,
            "prompt": text,
            "max_tokens": ANSWER_TOKENS,
            "min_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(said)

    return Job(
        protocol="http",
        host="127.0.0.1",
        port=port,
        path="/v1/completions",
        bodies=[body(text) for text in texts],
        in_flight=1,
        duration_s=1,
        proof=b'"completion_tokens":%d' % ANSWER_TOKENS,
    )


def kserve_job(address: str, texts: Sequence[str]) -> Job:
    """As Triton's clients stream. Dynamo's KServe frontend takes no number of tokens, without which its mock engine
    refuses, so it is not measured."""
    tensor = kserve_pb2.ModelInferRequest.InferInputTensor
    inputs = [
        tensor(name="text_input", datatype="BYTES", shape=[1]),
        tensor(name="stream", datatype="BOOL", shape=[1]),
        tensor(name="max_tokens", datatype="INT32", shape=[1]),
    ]
    parameters = {"ignore_eos": kserve_pb2.InferParameter(bool_param=True)}

    def body(text: str) -> bytes:
        data = text.encode()
        raw = [len(data).to_bytes(4, "little") + data, b"\1", ANSWER_TOKENS.to_bytes(4, "little")]
        request = kserve_pb2.ModelInferRequest(
            model_name=NAME, id="0", inputs=inputs, raw_input_contents=raw, parameters=parameters
        )
        return request.SerializeToString()

    host, _, port = address.partition(":")
    return Job(
        protocol="grpc",
        host=host,
        port=int(port),
        path="/inference.GRPCInferenceService/ModelStreamInfer",
        bodies=[body(text) for text in texts],
        in_flight=1,
        duration_s=1,
    )


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time of all of some processes' threads, to the nanosecond."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)  # what clock_getcpuclockid(3) makes of an id


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@dataclass(frozen=True, slots=True)
class Plan:
    levels: Sequence[int]
    #: Of each cell, by pacing.
    duration_s: Mapping[str, float]

    def loads(self, pacing: str) -> list[tuple[int, bool]]:
        """How many in flight, and whether all begin at once."""
        at_once = [(AT_ONCE, True)] if pacing == "paced" and AT_ONCE in self.levels else []
        return [*((level, False) for level in self.levels), *at_once]

    def measure(self, load: LoadGenerator, targets: Sequence[Target], pacing: str) -> list[Cell]:
        """All targets under one load, then all under the next: the machine's speed changes within a run."""
        for target in targets:
            load.run(loaded(target.job, pacing, 16, at_once=True, duration_s=0.3))
        return [
            self._cell(load, target, pacing, in_flight, at_once)
            for in_flight, at_once in self.loads(pacing)
            for target in targets
        ]

    def _cell(self, load: LoadGenerator, target: Target, pacing: str, in_flight: int, at_once: bool) -> Cell:
        job = loaded(target.job, pacing, in_flight, at_once=at_once, duration_s=self.duration_s[pacing])
        before = cpu_s(target.pids)
        result = load.run(job)
        cell = Cell(target.name, pacing, in_flight, at_once, result, cpu_s(target.pids) - before)
        print(
            f"{pacing} {target.name} at {in_flight}: {result.requests} requests, {cell.cpu_s:.2f} s of CPU", flush=True
        )
        for error in result.errors[:1]:
            print(f"  {len(result.errors)} failed: {error}")
        return cell


def loaded(job: Job, pacing: str, in_flight: int, *, at_once: bool, duration_s: float) -> Job:
    return msgspec.structs.replace(
        job, in_flight=in_flight, duration_s=duration_s, think_s=STEP_MS[pacing] / 1e3, ramp_s=ramp_s(pacing, at_once)
    )


def ramp_s(pacing: str, at_once: bool) -> float:
    return 0.0 if at_once else ANSWER_TOKENS * STEP_MS[pacing] / 1e3


def options(pacing: str) -> EngineOptions:
    step_ms = STEP_MS[pacing]
    return EngineOptions(
        name="engine",
        model=str(MODEL),
        served_model_name=NAME,
        cluster_secret=bytes(32),
        transports=("shm", "tcp"),
        kv_bytes_per_token=16,
        kv_cache_bytes=16 * 600 * 2 * RUNNING_MAX,
        staging_bytes=16 * 600 * RUNNING_MAX,
        max_running=RUNNING_MAX,
        max_batched_tokens=8192,
        prefix_caching=False,
        step_time=f"flat-{step_ms:g}ms" if step_ms else "h200-llama-3.1-8b",
        speedup=1 if step_ms else 0,
    )


@contextmanager
def tandem_targets(pacing: str, edges: int, texts: Sequence[str], logs: Path, *, split: bool) -> Iterator[list[Target]]:
    roles = (Role.PREFILL, Role.DECODE) if split else (Role.BOTH,)
    config = RouterConfig(
        model_dir=str(MODEL),
        model_name=NAME,
        port=0,
        http_port=0,
        log_level="WARNING",
        edges=edges,
        worker_listen="127.0.0.1:0" if edges > 1 else "",
        limits=CoreLimits(local_prefill_tokens_max=PROMPT_TOKENS * RUNNING_MAX),
    )
    with cluster(
        f"{pacing}-{edges}",
        roles,
        options(pacing),
        engine="sim",
        logs=logs,
        router=config,
        prefill=PrefillLimits(running=64),
        legs=RUNNING_MAX,
    ) as found:
        wait_ready(found, len(roles), START_TIMEOUT_S)
        assert found.http_port is not None
        pids = [found.pids["router"], *children(found.pids["router"])]
        more = f", {edges} edges" if edges > 1 else ""
        yield [
            Target(NATIVE + more, pids, native_job(found.address, texts)),
            Target(KSERVE + more, pids, kserve_job(found.address, texts)),
            Target(OPENAI + more, pids, openai_job(found.http_port, texts)),
        ]


@contextmanager
def dynamo_targets(python: Path | None, pacing: str, texts: Sequence[str], logs: Path) -> Iterator[list[Target]]:
    """None where it does not run."""
    with ExitStack() as stack:
        targets = []
        if python is not None:
            folder = logs / f"dynamo-{pacing}"
            running = dynamo(python, MODEL, NAME, folder, step_ms=STEP_MS[pacing], running_max=RUNNING_MAX)
            try:
                found = stack.enter_context(running)
                targets = [Target(DYNAMO, [found.pids["frontend"]], openai_job(found.http_port, texts))]
            except DidNotStart as error:
                print(error)
        yield targets


async def engine_alone(pacing: str, in_flight: int, *, at_once: bool, duration_s: float) -> Result:
    """The engine by itself, under the load generator's closed loop: one leg at a time for each in flight."""
    engine = SimEngine(options(pacing))
    await engine.start()
    result, rng, think_s = Result(), random.Random(0), STEP_MS[pacing] / 1e3
    began = time.perf_counter()

    async def client_loop(number: int, turns: int = sys.maxsize) -> None:
        turn = 0
        await asyncio.sleep(rng.uniform(0, ramp_s(pacing, at_once)))
        while turn < turns and time.perf_counter() - began < duration_s:
            await asyncio.sleep(rng.uniform(0, think_s))
            leg = DecodeLeg(
                leg_id=f"{number}/{turn}",
                tenant="",
                token_ids=tuple(rng.randrange(16, 4000) for _ in range(PROMPT_TOKENS)),
                prompt_tokens=PROMPT_TOKENS,
                sampling=Sampling(max_tokens=ANSWER_TOKENS, ignore_eos=True, temperature=0),
            )
            turn += 1
            last = time.perf_counter()
            first = True
            async for _ in engine.decode(leg):
                now = time.perf_counter()
                (result.ttft_s if first else result.itl_s).append(now - last)
                first, last = False, now
            result.requests += 1

    try:
        await client_loop(-1, turns=1)  # faults its memory in
        result, began = Result(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(in_flight):
                group.create_task(client_loop(number))
    finally:
        await engine.stop()
    return result


def _ms(values: Sequence[float], share: float, own: Sequence[float] = ()) -> float | None:
    found, less = percentile(values, share), percentile(own, share)
    return None if found is None else (found - (less or 0.0)) * 1e3


def as_row(cell: Cell, own: Mapping[tuple[str, int, bool], Result]) -> Row:
    result, alone = cell.result, own[cell.pacing, cell.in_flight, cell.at_once]
    requests = result.requests or None
    return {
        "what": cell.target,
        "engine": f"{cell.pacing}, at once" if cell.at_once else cell.pacing,
        "in_flight": cell.in_flight,
        "requests": result.requests,
        "errors": len(result.errors),
        "requests_per_s": result.requests / result.wall_s,
        "cpu_ms_per_request": requests and cell.cpu_s / requests * 1e3,
        "cpu_us_per_token": requests and cell.cpu_s / requests / ANSWER_TOKENS * 1e6,
        "messages_per_request": requests and result.messages / requests,
        "ttft_ms_p50": _ms(result.ttft_s, 0.5),
        "added_ttft_ms_p50": _ms(result.ttft_s, 0.5, alone.ttft_s),
        "added_ttft_ms_p99": _ms(result.ttft_s, 0.99, alone.ttft_s),
        "added_itl_ms_p50": _ms(result.itl_s, 0.5, alone.itl_s),
        "added_itl_ms_p99": _ms(result.itl_s, 0.99, alone.itl_s),
        "load_cpu_ms_per_request": requests and result.cpu_s / requests * 1e3,
    }


def checks(rows: Sequence[Row], levels: Sequence[int]) -> list[Check]:
    by = {(row["what"], row.get("engine"), row.get("in_flight")): row for row in rows}

    def value(what: str, pacing: str, in_flight: int, figure: str) -> float | None:
        found = by.get((what, pacing, in_flight), {}).get(figure)
        return found if isinstance(found, float) else None

    def beside(what: str, pacing: str, in_flight: int) -> float | None:
        ours = value(what, pacing, in_flight, "cpu_ms_per_request")
        theirs = value(DYNAMO, pacing, in_flight, "cpu_ms_per_request")
        return ours / theirs if ours and theirs else None

    return [
        *(
            at_most(f"{what}, {pacing}, at {level}: CPU per request over Dynamo's", beside(what, pacing, level), most)
            for pacing, most in (("paced", 0.7), ("unpaced", 1.0))
            for what in OURS
            for level in levels
        ),
        *(
            at_most(
                f"{what}, paced, at {level}: TTFT added, p50 ms", value(what, "paced", level, "added_ttft_ms_p50"), 3
            )
            for what in OURS
            for level in levels
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two levels, two seconds each")
    parser.add_argument("--split", action="store_true", help="a prefill and a decode worker instead of a whole one")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="requests in flight")
    parser.add_argument("--engines", choices=STEP_MS, nargs="+", default=list(STEP_MS))
    parser.add_argument("--edges", type=int, nargs="+", default=[1], help="processes that speak with clients")
    parser.add_argument("--no-dynamo", action="store_true")
    arguments = parser.parse_args()
    env = environment()
    plan = Plan(arguments.levels, {"unpaced": 3.0, "paced": 6.0})
    if arguments.quick:
        plan = Plan((1, 16), {"unpaced": 1.0, "paced": 2.5})
    logs = Path(tempfile.mkdtemp(prefix="bench-router-"))
    print(f"logs in {logs}")
    texts, own, cells = prompts(64), {}, list[Cell]()
    python = None
    if not arguments.no_dynamo:
        try:
            python = dynamo_environment()
        except NotInstalled as error:
            print(error)
    for pacing in arguments.engines:
        for level, at_once in plan.loads(pacing):
            duration_s = plan.duration_s[pacing] / 2
            alone = engine_alone(pacing, level, at_once=at_once, duration_s=duration_s)
            own[pacing, level, at_once] = uvloop.run(alone)
        with LoadGenerator() as load, ExitStack() as stack:
            targets: list[Target] = []
            for edges in arguments.edges:
                running = tandem_targets(pacing, edges, texts, logs, split=arguments.split)
                targets += stack.enter_context(running)
            targets += stack.enter_context(dynamo_targets(python, pacing, texts, logs))
            cells += plan.measure(load, targets, pacing)
    rows = [as_row(cell, own) for cell in cells]
    if not any(row["what"] == DYNAMO for row in rows):
        rows.append({"what": f"dynamo {DYNAMO_VERSION} could not be run"})
    report("router" if arguments.edges == [1] else "router_edges", rows, checks(rows, plan.levels), env)


if __name__ == "__main__":
    main()
