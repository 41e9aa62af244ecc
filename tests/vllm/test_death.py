"""What is left when one of an engine's two processes ends: typed errors at once, and no process."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine.base import DecodeLeg, FailureKind, LegError, PrefillLeg, Sampling, StepOutput
from engine.vllm import VllmEngine
from tests.vllm.harness import core_pid, options, prompt

pytestmark = pytest.mark.vllm

LONG = Sampling(max_tokens=3000, temperature=0.0, ignore_eos=True)


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(options("mortal"))
    await engine.start()
    yield engine
    await engine.stop()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def prefill_leg(leg_id: str) -> PrefillLeg:
    return PrefillLeg(leg_id=leg_id, tenant="t", token_ids=prompt(100), sampling=LONG, hand_off=True)


def decode_leg(leg_id: str) -> DecodeLeg:
    return DecodeLeg(leg_id=leg_id, tenant="t", token_ids=prompt(100), prompt_tokens=100, sampling=LONG)


async def drain(outputs: AsyncIterator[StepOutput]) -> None:
    async for _ in outputs:
        pass


async def running_leg(engine: VllmEngine) -> asyncio.Task[None]:
    """A decode leg that has given its first tokens and has many more to give."""
    outputs = engine.decode(decode_leg("running"))
    await anext(outputs)
    return asyncio.create_task(drain(outputs))


async def test_a_killed_engine_process_fails_every_leg_and_says_so(engine: VllmEngine) -> None:
    running = await running_leg(engine)
    pinned = await engine.prefill(prefill_leg("pinned"))
    assert pinned.handle is not None
    os.kill(core_pid(engine), signal.SIGKILL)

    async with asyncio.timeout(60.0):
        reason = await engine.wait_dead()
        assert reason == "vLLM's process was killed by SIGKILL"
        with pytest.raises(LegError) as failed:
            await running
        assert failed.value.kind is FailureKind.ENGINE
        for call in (
            engine.prefill(prefill_leg("late")),
            drain(engine.decode(decode_leg("late"))),
            engine.fetch(pinned.handle, 1.0),
            engine.release(pinned.handle),
            engine.connect("somebody", "127.0.0.1:1"),
            engine.load(),
        ):
            with pytest.raises(LegError) as failed:
                await call
            assert failed.value.kind is FailureKind.ENGINE


async def test_stop_fails_the_running_legs_and_does_not_wait_for_pinned_blocks(engine: VllmEngine) -> None:
    running = await running_leg(engine)
    await engine.prefill(prefill_leg("pinned"))
    core = core_pid(engine)
    await engine.stop()
    with pytest.raises(LegError) as failed:
        await running
    assert failed.value.kind is FailureKind.ENGINE
    assert not is_running(core)
    assert await engine.wait_dead() == "the engine was stopped"
    await engine.stop()


async def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    engine = VllmEngine(options("impossible", model=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        await engine.start()
    assert engine._process is None


WORKER = """
import asyncio
import uvloop
from engine.vllm import VllmEngine
from tests.vllm.harness import core_pid, options

async def main() -> None:
    engine = VllmEngine(options("orphan"))
    await engine.start()
    print("core", core_pid(engine), flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    uvloop.run(main())  # as workers do
"""


def test_the_engine_process_ends_with_its_worker(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    ) as worker:
        try:
            assert worker.stdout is not None
            word, pid = worker.stdout.readline().split()
            assert word == "core"
            core = int(pid)
            assert is_running(core)
        finally:
            worker.kill()
    deadline = time.monotonic() + 60
    while is_running(core) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(core)
