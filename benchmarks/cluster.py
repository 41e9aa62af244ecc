"""A router and its workers as processes of their own, for as long as a benchmark needs them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import msgspec

from decode.admission import DecodeLimits
from engine.base import EngineOptions
from prefill.admission import PrefillLimits
from router import config as router_config
from router.config import RouterConfig
from tandem import Client, TandemError
from trust.join import join_key
from worker import config as worker_config
from worker.config import LinkSettings, LogSettings, Role, WorkerConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "tandem-nano"
START_TIMEOUT_S = 300.0


class DidNotStart(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Cluster:
    address: str
    #: By name, "router" among them.
    pids: Mapping[str, int]
    #: OpenAI's protocol, if the router's configuration asks for it.
    http_port: int | None = None


@contextmanager
def cluster(
    name: str,
    roles: Sequence[Role],
    options: EngineOptions,
    *,
    engine: str,
    logs: Path,
    router: RouterConfig | None = None,
    prefill: PrefillLimits | None = None,
    decode_options: EngineOptions | None = None,
    legs: int = 64,
) -> Iterator[Cluster]:
    """Worker i has role i, and takes so many decode legs; decode workers may have options of their own. Returns at
    once; `wait_ready` waits, so that several clusters can load side by side."""
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    config = router or RouterConfig(
        model_dir=options.model, model_name=options.served_model_name, port=0, log_level="WARNING"
    )
    try:
        config = replace(config, join_key=join_key(options.cluster_secret))
        running["router"] = _start("router", router_config.to_json(config), logs / f"{name}-router.log")
        ports = _ports(running["router"])
        address = f"127.0.0.1:{ports['port']}"
        workers_address = f"127.0.0.1:{ports['worker_port'] or ports['port']}"
        for number, role in enumerate(roles):
            worker_id = f"{name}-{role.value}-{number}"
            its_options = decode_options if decode_options and role is Role.DECODE else options
            told = WorkerConfig(
                role=role,
                routers=(workers_address,),
                engine=engine,
                engine_options=replace(its_options, name=worker_id),
                prefill=prefill or PrefillLimits(),
                decode=DecodeLimits(legs=legs),
                link=LinkSettings(outbox_max=max(4096, 4 * legs)),
                log=LogSettings(level="WARNING"),
            )
            running[worker_id] = _start("worker", worker_config.to_json(told), logs / f"{worker_id}.log")
        yield Cluster(address, {name: process.pid for name, process in running.items()}, ports["http_port"])
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def wait_ready(found: Cluster, workers: int, timeout_s: float = START_TIMEOUT_S, *, api_key: str | None = None) -> None:
    """Until so many workers are linked. The key is an operator's."""
    give_up = time.monotonic() + timeout_s
    with Client(found.address, api_key=api_key) as client:
        while time.monotonic() < give_up:
            with suppress(TandemError):
                if len(client.status().workers) >= workers:
                    return
            time.sleep(0.2)
    raise DidNotStart(f"{workers} workers did not link within {timeout_s:g} s; see the logs")


def _start(module: str, config: bytes, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "-"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output
        )
    assert process.stdin is not None
    process.stdin.write(config)
    process.stdin.close()
    return process


def _ports(router: subprocess.Popen[bytes]) -> dict[str, Any]:
    stdout: IO[bytes] | None = router.stdout
    line = stdout.readline() if stdout is not None else b""
    if not line:
        raise DidNotStart("the router did not start; see its log")
    return dict(msgspec.json.decode(line))
