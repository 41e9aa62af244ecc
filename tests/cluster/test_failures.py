"""Any one process may be killed: every client gets its whole answer or a typed error in time, the death is reported,
the process is started again, and service goes on with nothing left behind."""

import asyncio
import os
import random
import re
import signal
import time

import pytest

from tandem import AsyncClient, DeadlineExceeded, Result, TandemError, Unavailable
from tests.cluster.harness import (
    ON_SIM,
    ON_VLLM,
    READY_TIMEOUT_S,
    Cluster,
    command_line,
    descendants,
    is_running,
    wait_idle,
)

CLIENTS = 24
#: Clients come over so many seconds, and the process is killed in their midst: some wait, some prefill, some decode.
ARRIVALS_S = 1.0
ANSWER_TOKENS = 300
#: Long enough for the process to come back.
DEADLINE_S = {"sim": 60.0, "vllm": 240.0}
#: What a client may wait past its deadline, on a machine that does too much at once.
SLACK_S = 5.0


def _prompt(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(2, 1000) for _ in range(rng.randrange(1, 1500))]


async def _ask(cluster: Cluster, number: int, after_s: float = 0.0) -> Result | TandemError:
    """One client's answer or error, which must come in time."""
    await asyncio.sleep(after_s)
    started = time.monotonic()
    try:
        async with cluster.async_client() as client:
            return await client.generate(
                _prompt(number),
                max_tokens=ANSWER_TOKENS,
                temperature=0.0,
                ignore_eos=True,
                return_token_ids=True,
                timeout_s=DEADLINE_S[cluster.engine],
            ).result()
    except TandemError as error:
        return error
    finally:
        assert time.monotonic() - started < DEADLINE_S[cluster.engine] + SLACK_S


def _told(end: Result | TandemError) -> str:
    if isinstance(end, TandemError):
        return f"{end.code}: {end.message}"
    return f"answered, {end.finished.route.retries} legs run again"


async def _kill_amid_requests(cluster: Cluster, name: str, pid: int) -> None:
    """Kills the process, or one of its children, while clients come, wait, prefill and decode."""
    ready_before, pid_before = cluster.times_ready(name), cluster.pid(name)
    undisturbed = await asyncio.gather(*(_ask(cluster, number) for number in range(CLIENTS)))

    clients = [asyncio.create_task(_ask(cluster, number, ARRIVALS_S * number / CLIENTS)) for number in range(CLIENTS)]
    await asyncio.sleep(ARRIVALS_S / 2)
    os.kill(pid, signal.SIGKILL)
    ends = await asyncio.gather(*clients)

    print("\n".join(map(_told, ends)))
    for end, expected in zip(ends, undisturbed, strict=True):
        assert isinstance(expected, Result)
        if isinstance(end, TandemError):
            assert isinstance(end, Unavailable | DeadlineExceeded), repr(end)
        elif cluster.engine == "sim":
            assert end.token_ids == expected.token_ids, "no token is missing, repeated or other than without the death"
        else:  # a real engine's numerics depend on what it computes together
            assert len(end.token_ids) == ANSWER_TOKENS
    if name != "router":
        assert all(isinstance(end, Result) for end in ends), "a worker's death is for the router to make good"

    await asyncio.to_thread(
        cluster.wait_until, lambda: cluster.times_ready(name) == ready_before + 1, READY_TIMEOUT_S[cluster.engine]
    )
    assert re.search(rf"^{name} +died: (killed by SIGKILL|exited with code)", cluster.output, re.MULTILINE)
    assert cluster.pid(name) != pid_before
    assert not is_running(pid_before)
    async with cluster.async_client() as client:
        await _wait_served(client)
        status = await wait_idle(client)
    assert {worker.worker_id: worker.state for worker in status.workers} == {"prefill-0": "ready", "decode-0": "ready"}


@ON_SIM
@pytest.mark.slow
@pytest.mark.parametrize("name", ["router", "prefill-0", "decode-0"])
async def test_killing_a_process_costs_no_client_more_than_a_typed_error(shared: Cluster, name: str) -> None:
    await _kill_amid_requests(shared, name, shared.pid(name))


@ON_VLLM
async def test_killing_processes_around_real_engines_costs_no_client_more_than_a_typed_error(shared: Cluster) -> None:
    await _kill_amid_requests(shared, "router", shared.pid("router"))
    await _kill_amid_requests(shared, "prefill-0", shared.pid("prefill-0"))
    (engine,) = [pid for pid in descendants(shared.pid("decode-0")) if "engine.vllm_process" in command_line(pid)]
    await _kill_amid_requests(shared, "decode-0", engine)


async def _wait_served(client: AsyncClient) -> None:
    """Links reconnect and workers meet again before the next prompt can go through both pools."""
    deadline = time.monotonic() + 30
    while True:
        try:
            await client.generate("x", max_tokens=4, timeout_s=30.0).result()
        except Unavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        else:
            return
