"""What splitting costs and what it gives: one prefill and one decode worker beside whole engines, in one run.

All topologies stand behind the same router and native gRPC edge, on the same cores, started before the first
measurement. Rounds are interleaved, so that a busy minute of the machine hurts all of them alike. Prompts are random
and new, so no prefix cache helps; sampling is greedy and EOS is ignored, so every answer has its full length.

The pair's engines compute 512 tokens a step at most, the whole ones 2,048, as vLLM does by default. On a CPU a prompt
costs a tenth more in the smaller steps. The pair buys with it that prompts which come together are handed over one by
one. Its decode worker computes a prompt itself while the prefill worker is far behind
(`router.limits.overflow_tokens_max`), 128 tokens a step at most, so that it delays the answers there by no more. In
whole engines small steps would shorten what a prompt delays the answers beside it, which is not measured here. What the
pair does without any overflow: `--overflow 0`.

vLLM's own pair with NixlConnector (nixl_pair.py) is measured last, when the others have gone: each of its engines keeps
a core busy while it has nothing to do. It is so slow that it gets few requests. A pair that fails is started once more;
if that fails, too, its checks are missed, and its rows say why.

    make bench-handoff                     # vLLM and the shipped model
    make bench-handoff ARGS="--engine sim --rounds 1"
    make bench-handoff ARGS="--overflow 0"
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import uvloop

from benchmarks.cluster import MODEL, Cluster, DidNotStart, cluster, wait_ready
from benchmarks.nixl_pair import (
    REQUEST_TIMEOUT_S,
    STARTS,
    CannotInstall,
    NixlPair,
    PairFailed,
    nixl_pair,
    wire_up,
)
from benchmarks.nixl_pair import wait_ready as wait_pair_ready
from benchmarks.report import Check, Row, at_least, at_most, environment, percentile, report
from engine.base import EngineOptions
from prefill.admission import PrefillLimits
from router.config import RouterConfig
from router.core.limits import CoreLimits
from tandem import AsyncClient
from worker.config import Role

TOPOLOGIES: Mapping[str, Sequence[Role]] = {
    "1P+1D": (Role.PREFILL, Role.DECODE),
    "one whole": (Role.BOTH,),
    "two whole": (Role.BOTH, Role.BOTH),
}
#: Of the pair: tokens in one step, and prompts at once for two of those, so that one waits in the engine for the next.
STEP_TOKENS = 512
PREFILL_LIMITS = PrefillLimits(running_tokens=2 * STEP_TOKENS)
#: Of the pair's decode worker: the longest prompt that it computes itself, and how much of it in a step.
OVERFLOW_TOKENS, OVERFLOW_STEP_TOKENS = 4096, 128


@dataclass(frozen=True, slots=True)
class Shape:
    """A load: tokens in, tokens out, requests in flight, requests in a round."""

    prompt_tokens: int
    answer_tokens: int
    in_flight: int
    requests: int


SHAPES = (
    Shape(512, 64, 1, 12),
    Shape(512, 64, 4, 32),
    Shape(512, 64, 8, 48),
    Shape(2048, 64, 4, 16),
    Shape(2048, 64, 8, 24),
)

NIXL_PAIR = "NixlConnector pair"
NIXL_SHAPES = (Shape(512, 64, 4, 8), Shape(512, 64, 8, 8))
#: The pair's, from its start, both times together, and from when it is ready; slower is as good as failed.
NIXL_TIMEOUT_S, NIXL_ROUNDS_TIMEOUT_S = 240.0, 100.0


@dataclass(slots=True)
class Measured:
    """Of one topology under one load; seconds. Throughput is the median over rounds."""

    ttft_s: list[float] = field(default_factory=list)
    #: Between two messages of one answer, pooled.
    itl_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    #: First token sent to the client until the second one, of requests that were handed over.
    handoff_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


async def run_round(address: str, shape: Shape, seed: int, into: Measured) -> None:
    """A closed loop: a request that ends is followed by the next at once."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(16, 4000) for _ in range(shape.prompt_tokens)] for _ in range(shape.requests)]
    tokens = 0

    async def client_loop(client: AsyncClient) -> None:
        nonlocal tokens
        while prompts:
            generated = await one_request(client, prompts.pop(), shape.answer_tokens, into)
            tokens += generated  # in a statement of its own: `+=` across an await loses what others add meanwhile

    async with AsyncClient(address) as client:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as scope:
            for _ in range(shape.in_flight):
                scope.create_task(client_loop(client))
        into.tokens_per_s.append(tokens / (time.perf_counter() - began))


async def one_request(client: AsyncClient, prompt: list[int], answer_tokens: int, into: Measured) -> int:
    sent = time.perf_counter()
    came: list[float] = []
    tokens = 0
    stream = client.generate(
        prompt, max_tokens=answer_tokens, temperature=0, ignore_eos=True, return_token_ids=True, timeout_s=120
    )
    async for delta in stream:
        came.append(time.perf_counter())
        tokens += len(delta.token_ids)
    result = await stream.result()
    assert tokens == answer_tokens == result.finished.usage.completion_tokens
    gaps = [later - earlier for earlier, later in zip(came, came[1:], strict=False)]
    into.ttft_s.append(came[0] - sent)
    if not result.finished.route.local_prefill:
        into.handoff_s.append(gaps[0])
    into.itl_s += gaps
    into.prefill_s.append(result.finished.timings.prefill_s)
    return tokens


def failed_row(shape: Shape, why: str) -> Row:
    load = f"{shape.prompt_tokens}/{shape.answer_tokens}"
    return {"what": NIXL_PAIR, "in/out": load, "in_flight": shape.in_flight, "failed": why}


def as_row(what: str, shape: Shape, measured: Measured) -> Row:
    def ms(values: list[float], share: float) -> float | None:
        found = percentile(values, share)
        return None if found is None else found * 1000

    return {
        "what": what,
        "in/out": f"{shape.prompt_tokens}/{shape.answer_tokens}",
        "in_flight": shape.in_flight,
        "tokens_per_s": percentile(measured.tokens_per_s, 0.5),
        "ttft_ms_p50": ms(measured.ttft_s, 0.5),
        "ttft_ms_p99": ms(measured.ttft_s, 0.99),
        "prefill_ms_p50": ms(measured.prefill_s, 0.5),
        "handoff_ms_p50": ms(measured.handoff_s, 0.5) if what == "1P+1D" else None,
        "handoff_ms_p99": ms(measured.handoff_s, 0.99) if what == "1P+1D" else None,
        "overflowed": 1 - len(measured.handoff_s) / len(measured.ttft_s) if what == "1P+1D" else None,
        "itl_ms_p50": ms(measured.itl_s, 0.5),
        "itl_ms_p99": ms(measured.itl_s, 0.99),
    }


def checks(rows: Sequence[Row]) -> list[Check]:
    by = {(row["what"], row["in/out"], row["in_flight"]): row for row in rows}

    def value(what: str, load: str, in_flight: int, figure: str) -> float | None:
        found = by.get((what, load, in_flight), {}).get(figure)
        return found if isinstance(found, float) else None

    def ratio(load: str, in_flight: int, figure: str, other: str) -> float | None:
        ours, theirs = value("1P+1D", load, in_flight, figure), value(other, load, in_flight, figure)
        return ours / theirs if ours and theirs else None

    short, long = "512/64", "2048/64"
    return [
        at_most("handoff_ms_p50 512/64 at 1", value("1P+1D", short, 1, "handoff_ms_p50"), 12),
        at_most("handoff_ms_p50 512/64 at 8", value("1P+1D", short, 8, "handoff_ms_p50"), 18),
        at_most("ttft_p50 over one whole, 512/64 at 1", ratio(short, 1, "ttft_ms_p50", "one whole"), 1.15),
        *(
            at_least(f"tokens_per_s over two whole, {load} at {n}", ratio(load, n, "tokens_per_s", "two whole"), least)
            for load, least in ((short, 1.1), (long, 1.0))
            for n in (4, 8)
        ),
        *(
            at_least(
                f"tokens_per_s over the {NIXL_PAIR}, {short} at {n}", ratio(short, n, "tokens_per_s", NIXL_PAIR), 10
            )
            for n in (4, 8)
        ),
        at_most("itl_p99 over two whole, 2048/64 at 4", ratio(long, 4, "itl_ms_p99", "two whole"), 0.25),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "sim"), default="vllm")
    parser.add_argument("--rounds", type=int, default=3, help="of every topology under every load, interleaved")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--overflow", type=int, default=OVERFLOW_TOKENS, help="the pair's router.limits.overflow_tokens_max"
    )
    arguments = parser.parse_args()
    env = environment()
    options = EngineOptions(
        name="",
        model=str(arguments.model),
        served_model_name=arguments.model.name,
        cluster_secret=random.Random(0).randbytes(32),
        kv_cache_bytes=128 << 20,
        staging_bytes=32 << 20,
        max_model_len=4096,
        prefix_caching=False,
        dtype=arguments.dtype,
    )
    logs = Path(tempfile.mkdtemp(prefix="bench-handoff-"))
    print(f"logs in {logs}")
    with ExitStack() as stack:
        found = {
            name: stack.enter_context(start(name, roles, options, arguments.engine, arguments.overflow, logs))
            for name, roles in TOPOLOGIES.items()
        }
        for name, roles in TOPOLOGIES.items():
            wait_ready(found[name], len(roles))
            print(f"{name}: ready", flush=True)
        measured = uvloop.run(measure(found, arguments.rounds))
    why = ""
    if arguments.engine == "vllm":
        of_pair, why = measure_nixl_pair(options, logs)
        measured |= of_pair
    rows = [as_row(what, shape, result) for (shape, what), result in measured.items()]
    if why:
        rows += [failed_row(shape, why) for shape in NIXL_SHAPES]
    report("handoff", rows, checks(rows), env)


def start(
    name: str, roles: Sequence[Role], options: EngineOptions, engine: str, overflow: int, logs: Path
) -> AbstractContextManager[Cluster]:
    if Role.PREFILL not in roles:
        return cluster(name.replace(" ", "-"), roles, options, engine=engine, logs=logs)
    options = replace(options, max_batched_tokens=STEP_TOKENS)
    return cluster(
        name,
        roles,
        options,
        engine=engine,
        logs=logs,
        router=RouterConfig(
            model_dir=options.model,
            model_name=options.served_model_name,
            port=0,
            log_level="WARNING",
            limits=CoreLimits(overflow_tokens_max=overflow),
        ),
        prefill=PREFILL_LIMITS,
        decode_options=replace(options, long_prefill_token_threshold=OVERFLOW_STEP_TOKENS),
    )


async def measure(found: Mapping[str, Cluster], rounds: int) -> dict[tuple[Shape, str], Measured]:
    measured = {(shape, what): Measured() for shape in SHAPES for what in found}
    for what in found:  # first requests wire transports up and fault memory in
        await run_round(found[what].address, Shape(512, 8, 2, 6), seed=1, into=Measured())
    for number in range(rounds):
        for shape in SHAPES:
            for what in found:
                await run_round(found[what].address, shape, seed=number, into=measured[shape, what])
                print(f"round {number + 1}/{rounds} {shape} {what}", flush=True)
    return measured


def measure_nixl_pair(options: EngineOptions, logs: Path) -> tuple[dict[tuple[Shape, str], Measured], str]:
    """What was measured, or why nothing was."""
    give_up = time.monotonic() + NIXL_TIMEOUT_S
    why = ""
    for start in range(STARTS):
        try:
            folder = logs / f"nixl-{start}"
            with nixl_pair(Path(options.model), folder, options.kv_cache_bytes, options.max_model_len or 4096) as pair:
                wait_pair_ready(pair, give_up)
                return uvloop.run(nixl_rounds(pair, min(NIXL_ROUNDS_TIMEOUT_S, give_up - time.monotonic()))), ""
        except CannotInstall as error:
            return {}, repr(error)
        except (DidNotStart, PairFailed, TimeoutError, httpx.HTTPError) as error:
            why = repr(error)
            print(f"{NIXL_PAIR}, start {start + 1} of {STARTS}: {why}", file=sys.stderr, flush=True)
    return {}, why


async def nixl_rounds(pair: NixlPair, timeout_s: float) -> dict[tuple[Shape, str], Measured]:
    measured = {(shape, NIXL_PAIR): Measured() for shape in NIXL_SHAPES}
    async with asyncio.timeout(timeout_s):
        await wire_up(pair)
        for (shape, what), into in measured.items():
            await nixl_round(pair, shape, into)
            print(f"{shape} {what}", flush=True)
    return measured


async def nixl_round(pair: NixlPair, shape: Shape, into: Measured) -> None:
    rng = random.Random(shape.in_flight)
    prompts = [[rng.randrange(16, 4000) for _ in range(shape.prompt_tokens)] for _ in range(shape.requests)]

    async def client_loop(client: httpx.AsyncClient) -> None:
        while prompts:
            sent, came, tokens = time.perf_counter(), [], 0
            async for count in pair.stream(client, prompts.pop(), shape.answer_tokens):
                came.append(time.perf_counter())
                tokens += count
            if tokens != shape.answer_tokens:
                raise PairFailed(f"{tokens} tokens of {shape.answer_tokens}")
            into.ttft_s.append(came[0] - sent)
            into.itl_s += [later - earlier for earlier, later in zip(came, came[1:], strict=False)]

    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
        began = time.perf_counter()
        await asyncio.gather(*(client_loop(client) for _ in range(shape.in_flight)))
        into.tokens_per_s.append(shape.requests * shape.answer_tokens / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
