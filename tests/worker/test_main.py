"""The worker as a process: its configuration, its signals, its end."""

import asyncio
import os
import signal
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.worker.scripted_router import Link, ScriptedRouter, sampling, scripted_router
from tests.worker.test_sim import sim_config
from worker.config import Role, WorkerConfig, to_json
from worker.main import descendants
from worker.process import ExitCode

ROOT = Path(__file__).parents[2]


def config(address: str, **options: Any) -> WorkerConfig:
    return sim_config(address, "w0", Role.BOTH, transports=("nixl",), **options)


class Worker:
    def __init__(self, process: Process) -> None:
        self.process = process
        self.log = ""

    async def until_logged(self, text: str) -> None:
        assert self.process.stderr
        async with asyncio.timeout(60):
            while text not in self.log:
                line = (await self.process.stderr.readline()).decode()
                assert line, f"the worker ended before it said {text!r}:\n{self.log}"
                self.log += line

    async def exit_code(self) -> int:
        assert self.process.stderr
        async with asyncio.timeout(60):
            self.log += (await self.process.stderr.read()).decode()
            return await self.process.wait()


@asynccontextmanager
async def process(told: WorkerConfig | bytes, argv: Sequence[str] = ("-m", "worker", "-")) -> AsyncIterator[Worker]:
    started = await asyncio.create_subprocess_exec(
        sys.executable, *argv, stdin=PIPE, stdout=DEVNULL, stderr=PIPE, cwd=ROOT
    )
    try:
        assert started.stdin
        started.stdin.write(to_json(told) if isinstance(told, WorkerConfig) else told)
        started.stdin.close()
        yield Worker(started)
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[Worker, Link, ScriptedRouter]]:
    async with scripted_router() as router, process(config(router.address, **options)) as worker:
        link = await router.link()
        assert link.hello.pid == worker.process.pid
        yield worker, link, router


async def begin_decoding(link: Link, tokens: int) -> None:
    link.decode("a/1/d", sampling=sampling(max_tokens=tokens, ignore_eos=True))
    assert (await link.next()).HasField("step")


async def test_sigterm_drains_and_ends_well() -> None:
    async with serving(speedup=2.0) as (worker, link, _):
        await begin_decoding(link, 50)
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.exit_code() == ExitCode.LEFT
        assert "drained" in worker.log
        await asyncio.wait_for(link.over.wait(), 60)
        assert any(message.HasField("draining") for message in link.received)
        assert link.terminals("a/1/d") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(number: signal.Signals) -> None:
    async with serving(speedup=0.1) as (worker, link, _):
        await begin_decoding(link, 1000)
        worker.process.send_signal(number)
        while not (await link.next()).HasField("draining"):
            pass
        worker.process.send_signal(number)
        assert await worker.exit_code() == 128 + number
        await asyncio.wait_for(link.over.wait(), 60)


async def test_a_killed_worker_is_lost_to_its_router_at_once() -> None:
    async with serving(speedup=0.1) as (worker, link, _):
        await begin_decoding(link, 1000)
        worker.process.kill()
        await asyncio.wait_for(link.over.wait(), 60)


async def test_it_says_what_it_does() -> None:
    async with serving() as (worker, _, _):
        await worker.until_logged("loading sim")
        await worker.until_logged("ready as both: sim m,")
        await worker.until_logged("(scripted): linked")


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (b"", "configuration: Input data was truncated"),
        (to_json(config("localhost:1")).replace(b'"both"', b'"neither"'), "Invalid enum value 'neither'"),
        (to_json(replace(config("localhost:1"), engine="abacus")), "there is no 'abacus'"),
    ],
)
async def test_a_wrong_configuration_is_told_from_other_failures(told: bytes, says: str) -> None:
    async with process(told) as worker:
        assert await worker.exit_code() == ExitCode.BAD_CONFIG
        assert says in worker.log


async def test_a_model_that_is_not_there_ends_it(tmp_path: Path) -> None:
    told = config("127.0.0.1:1")
    told = replace(told, engine_options=replace(told.engine_options, model=str(tmp_path)))
    async with process(told) as worker:
        assert await worker.exit_code() == ExitCode.ENGINE_DID_NOT_START
        assert f"{tmp_path}/config.json" in worker.log


STUCK = """
import subprocess, sys, threading, time
from dataclasses import replace
from engine.sim import SimEngine
from kv_transfer.inproc import InprocHub
from worker import main
from worker.config import from_json

class Stuck(SimEngine):
    "An engine with a process of its own, which blocks the event loop and then does not stop."
    async def start(self):
        child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
                                 stdout=subprocess.PIPE)
        child.stdout.readline()
        print("child", child.pid, file=sys.stderr, flush=True)
        if sys.argv[1] == "loading":
            time.sleep(60)
        return await super().start()
    async def stop(self):
        await super().stop()
        threading.Thread(target=time.sleep, args=(60,)).start()
        time.sleep(60)

class Telling(main._Signals):
    def _asked_to_stop(self, number, frame):
        super()._asked_to_stop(number, frame)
        print("asked to stop", file=sys.stderr, flush=True)

main._Signals = Telling
main.build_engine = lambda kind, options: Stuck(replace(options, transports=('inproc',)), InprocHub())
sys.exit(main.run(from_json(sys.stdin.buffer.read())))
"""


async def test_a_second_signal_is_heard_even_by_a_blocked_loop_and_takes_the_engines_processes_along() -> None:
    async with process(config("127.0.0.1:1"), ["-c", STUCK, "loading"]) as worker:
        child = await child_of(worker)
        worker.process.terminate()
        await worker.until_logged("asked to stop")
        worker.process.terminate()
        assert await worker.exit_code() == 128 + signal.SIGTERM
        await gone(child)


async def test_an_engine_that_blocks_everything_as_it_stops_cannot_keep_the_process() -> None:
    told = config("127.0.0.1:1")
    told = replace(told, stop_timeout_s=0.2, link=replace(told.link, close_timeout_s=0.1))
    async with process(told, ["-c", STUCK, "stopping"]) as worker:
        child = await child_of(worker)
        await worker.until_logged("ready")
        worker.process.terminate()
        assert await worker.exit_code() == ExitCode.LEFT
        await gone(child)


async def child_of(worker: Worker) -> int:
    await worker.until_logged("child ")
    return int(worker.log.split("child ")[1].split()[0])


async def gone(pid: int) -> None:
    """Once it is: that it was killed is known before it has ended."""
    async with asyncio.timeout(60):
        while not has_ended(pid):  # noqa: ASYNC110  another process
            await asyncio.sleep(0.01)


def has_ended(pid: int) -> bool:
    """It may wait to be reaped by whoever inherited it."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_descendants_are_found_at_every_depth() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        found = descendants(os.getpid())
        assert child.pid in found
        assert len(descendants(child.pid)) == 1
        assert set(descendants(child.pid)) < set(found)
        child.communicate()
