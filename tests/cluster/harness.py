"""A whole cluster of real processes, started and stopped the way people do it: by `tandem up`."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem import AsyncClient, Client, TandemError, rundir
from tandem.values import ClusterStatus

ROOT = Path(__file__).parents[2]
TANDEM = (sys.executable, "-c", "from tandem.cli import main; main()")

#: Long enough for two real engines to load on two busy cores.
READY_TIMEOUT_S = {"sim": 120.0, "vllm": 300.0}

#: Flags for a cluster to test on. Simulated engine steps take a moment, as real ones do: else every answer is done
#: before anything can happen to it. A real engine that died is waited for.
PACE = {
    "sim": ("--set", "engine.speedup=5"),
    "vllm": ("--set", f"router.limits.path_wait_s={READY_TIMEOUT_S['vllm']}"),
}

#: Marks for modules and tests: which engines the shared cluster runs.
ON_SIM = pytest.mark.parametrize("shared", ["sim"], indirect=True)
ON_VLLM = pytest.mark.parametrize(
    "shared", [pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])], indirect=True
)
ON_BOTH = pytest.mark.parametrize(
    "shared", ["sim", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])], indirect=True
)

#: Workers report their load so often, see RouterConfig.
LOAD_REPORT_INTERVAL_S = 1.0


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}


class Cluster:
    """A running `tandem up` and what a test may do to it."""

    def __init__(self, process: subprocess.Popen[bytes], engine: str, state: Path, output: Path) -> None:
        self.process = process
        self.engine = engine
        self.state = state
        self._output = output

    @property
    def output(self) -> str:
        """What `tandem up` has printed."""
        return self._output.read_text()

    @property
    def address(self) -> str:
        running = rundir.running(self.state)
        assert running is not None, self.output
        return running.address

    def client(self) -> Client:
        return Client(self.address, retries=0)

    def async_client(self) -> AsyncClient:
        return AsyncClient(self.address, retries=0)

    def status(self) -> ClusterStatus:
        with self.client() as client:
            return client.status(requests=True)

    def tandem(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environ = clean_environment() | {"TANDEM_STATE_DIR": str(self.state)}
        return subprocess.run([*TANDEM, *arguments], input=stdin, capture_output=True, env=environ, timeout=120)

    def pid(self, name: str) -> int:
        """The process now running under this name, from what `tandem up` said last."""
        return int(re.findall(rf"^{name} +started.*, process (\d+)$", self.output, re.MULTILINE)[-1])

    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"^\S+ +started.*, process (\d+)$", self.output, re.MULTILINE)]

    def times_ready(self, name: str) -> int:
        return len(re.findall(rf"^{name} +ready after", self.output, re.MULTILINE))

    def wait_ready(self) -> None:
        self.wait_until(lambda: "\nserving on" in self.output, READY_TIMEOUT_S[self.engine])

    def wait_until(self, enough: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not enough():
            assert self.process.poll() is None, f"tandem up ended:\n{self.output}"
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain:\n{self.output}"
            time.sleep(0.05)

    def stop(self) -> int:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@contextmanager
def cluster(folder: Path, engine: str, *arguments: str) -> Iterator[Cluster]:
    """Runs `tandem up`; at the end, whatever the test did, nothing of it is left."""
    state, output = folder / "state", folder / "up.out"
    command = [*TANDEM, "up", "--engine", engine, "--port", "0", "--no-prompt", "--state-dir", str(state), *arguments]
    with output.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=clean_environment(), cwd=folder)
    cluster = Cluster(process, engine, state, output)
    try:
        yield cluster
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            print(cluster.output)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        return []
    return children + [below for child in children for below in descendants(child)]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def busy(status: ClusterStatus) -> list[str]:
    """What is not as it is when nothing runs; each line names one thing."""
    found = [f"request {request.request_id} is {request.state}" for request in status.requests]
    if status.requests_queued or status.requests_running:
        found.append(f"{status.requests_queued} requests queued, {status.requests_running} running")
    for worker in status.workers:
        load = worker.load
        used = {
            "prefill legs": worker.prefill_legs,
            "decode legs": worker.decode_legs,
            "prefills running": load.prefill_running,
            "decodes running": load.decode_running,
            "leases held": load.leases_held,
            "leased blocks": load.leased_blocks,
            "staged pages": load.staged_pages,
            "KV blocks in use": load.kv_blocks_total - load.kv_blocks_free,
        }
        found += [f"{worker.worker_id}: {count} {what}" for what, count in used.items() if count]
    return found


async def wait_idle(client: AsyncClient, timeout_s: float = 20.0) -> ClusterStatus:
    """Shorter than a lease lives by default: what is idle by then was freed, not forgotten until it expired. It must
    stay so for longer than workers' reports of their load are apart."""
    deadline = time.monotonic() + timeout_s
    idle_since: float | None = None
    while True:
        try:
            status = await client.status(requests=True)
            left = busy(status)
        except TandemError as error:
            left = [str(error)]
        now = time.monotonic()
        if left:
            idle_since = None
            assert now < deadline, "\n".join(left)
        elif idle_since is None:
            idle_since = now
        elif now - idle_since > 1.5 * LOAD_REPORT_INTERVAL_S:
            return status
        await asyncio.sleep(0.1)
