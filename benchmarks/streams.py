"""Thousands of answers at once on one router, for minutes: half over native gRPC on a few connections, half over
OpenAI's HTTP protocol on a connection each. Two simulated engines give each stream a token per interval.

    make bench-streams                                             # 5,000 for five minutes
    make bench-streams ARGS="--streams 500 --seconds 20"
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.cluster import MODEL, Cluster, cluster, wait_ready
from benchmarks.load import Job, LoadGenerator, Result
from benchmarks.report import Check, Row, at_least, at_most, environment, percentile, report
from benchmarks.router import NAME, cpu_s
from engine.base import EngineOptions
from prefill.admission import PrefillLimits
from protos import inference_pb2
from router.config import RouterConfig
from tandem import Client
from worker.config import Role

#: Streams begin over so long.
RAMP_S = 20.0
PROMPT = "def fibonacci(n):"
PAGE_BYTES = resource.getpagesize()
SAMPLE_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class Shape:
    streams: int
    seconds: float
    interval_s: float

    @property
    def tokens(self) -> int:
        """The first stream to begin still runs when the last has run for `seconds`."""
        return int((RAMP_S + self.seconds) / self.interval_s) + 2


def native_job(address: str, shape: Shape, streams: int) -> Job:
    host, _, port = address.partition(":")
    sampling = inference_pb2.Sampling(max_tokens=shape.tokens, ignore_eos=True, temperature=0)
    return Job(
        protocol="grpc",
        host=host,
        port=int(port),
        path="/tandem.v1.Inference/Generate",
        bodies=[inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling).SerializeToString()],
        in_flight=streams,
        duration_s=0,  # one request each
        think_s=RAMP_S,
        timeout_s=3 * (RAMP_S + shape.seconds),
        messages_min=shape.tokens // 4,
        streams_per_connection=500,
        long_answers=True,
    )


def openai_job(port: int, shape: Shape, streams: int) -> Job:
    said = {
        "prompt": PROMPT,
        "max_tokens": shape.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.structs.replace(
        native_job(f"127.0.0.1:{port}", shape, streams),
        protocol="http",
        path="/v1/completions",
        bodies=[msgspec.json.encode(said)],
        proof=b'"completion_tokens":%d' % shape.tokens,
    )


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def run(found: Cluster, shape: Shape) -> tuple[list[Row], list[Check]]:
    assert found.http_port is not None
    over_grpc = shape.streams // 2
    jobs = {
        "native gRPC": native_job(found.address, shape, over_grpc),
        "OpenAI HTTP": openai_job(found.http_port, shape, shape.streams - over_grpc),
    }
    results: dict[str, Result] = {}
    router = found.pids["router"]

    def load(name: str) -> None:
        with LoadGenerator() as generator:
            results[name] = generator.run(jobs[name])

    with Client(found.address) as client:
        client.generate(PROMPT, max_tokens=2).result()
        before, cpu_before, began = rss_bytes(router), cpu_s([router]), time.monotonic()
        threads = [threading.Thread(target=load, args=(name,)) for name in jobs]
        for thread in threads:
            thread.start()
        held, rss = watch(client, router, began, shape, threads)
        for thread in threads:
            thread.join()
        outcomes = client.status().outcomes
        cpu, wall = cpu_s([router]) - cpu_before, time.monotonic() - began
    rows = [as_row(name, result, shape) for name, result in results.items()]
    tokens = shape.streams * shape.tokens
    memory_kib = (rss - before) / shape.streams / 1024
    rows.append(
        {
            "what": "router",
            "held_at_least": held,
            "held_s": shape.seconds,
            "memory_kib_per_stream": memory_kib,
            "router_cores": cpu / wall,
            "router_cpu_us_per_token": cpu / tokens * 1e6,
            "finished": outcomes.get("finished", 0),
        }
    )
    errors = [error for result in results.values() for error in result.errors]
    for error in sorted(set(errors))[:5]:
        print(f"failed: {error}")
    paces = [
        (shape.tokens - 1) * shape.interval_s / span for result in results.values() for span in result.span_s if span
    ]
    checks = [
        at_most("errors", len(errors) if results else None, 0),
        at_least("streams held, at every look", held, shape.streams),
        at_least("the slowest stream's pace, of its engine's", min(paces, default=None), 0.97),
    ]
    return rows, checks


def watch(
    client: Client, router: int, began: float, shape: Shape, threads: Sequence[threading.Thread]
) -> tuple[int | None, int]:
    """How many requests ran at every look once all had begun, and the most memory seen."""
    held: int | None = None
    rss = 0
    while any(thread.is_alive() for thread in threads):
        at = time.monotonic() - began
        if RAMP_S + 2 < at < RAMP_S + shape.seconds:
            running = client.status().requests_running
            held = running if held is None else min(held, running)
            rss = max(rss, rss_bytes(router))
        time.sleep(SAMPLE_INTERVAL_S)
    return held, rss


def as_row(what: str, result: Result, shape: Shape) -> Row:
    return {
        "what": what,
        "streams": result.requests,
        "errors": len(result.errors),
        "tokens_each": shape.tokens,
        "interval_ms": shape.interval_s * 1e3,
        "ttft_ms_p50": _ms(percentile(result.ttft_s, 0.5)),
        "ttft_ms_p99": _ms(percentile(result.ttft_s, 0.99)),
        "longest_gap_ms_p50": _ms(percentile(result.longest_gap_s, 0.5)),
        "longest_gap_ms_max": _ms(max(result.longest_gap_s, default=None)),
        "client_cores": result.cpu_s / result.wall_s,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def allow_files(count: int) -> None:
    """Children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=300.0, help="that all of them are held")
    parser.add_argument("--interval-ms", type=float, default=1_000.0, help="between two tokens of a stream")
    arguments = parser.parse_args()
    shape = Shape(arguments.streams, arguments.seconds, arguments.interval_ms / 1e3)
    env = environment()
    allow_files(2 * shape.streams + 1_000)
    legs = shape.streams  # either worker could take all
    kv_tokens = (shape.tokens + 64) * legs
    options = EngineOptions(
        name="",
        model=str(MODEL),
        served_model_name=NAME,
        cluster_secret=bytes(32),
        transports=("shm", "tcp"),
        kv_bytes_per_token=8,
        kv_cache_bytes=8 * kv_tokens,
        staging_bytes=1 << 20,
        max_running=legs,
        max_batched_tokens=8192,
        prefix_caching=False,
        step_time=f"flat-{arguments.interval_ms:g}ms",
        speedup=1,
    )
    config = RouterConfig(model_dir=str(MODEL), model_name=NAME, port=0, http_port=0, log_level="WARNING")
    logs = Path(tempfile.mkdtemp(prefix="bench-streams-"))
    print(f"logs in {logs}")
    roles = (Role.BOTH, Role.BOTH)
    prefill = PrefillLimits(running=legs)  # a step takes long here, and takes any number of prompts
    with cluster(
        "streams", roles, options, engine="sim", logs=logs, router=config, prefill=prefill, legs=legs
    ) as found:
        wait_ready(found, len(roles), 60)
        rows, checks = run(found, shape)
    report("streams", rows, checks, env)


if __name__ == "__main__":
    main()
