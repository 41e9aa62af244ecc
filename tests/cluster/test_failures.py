"""Any one process may be killed: every client gets its answer or a typed error in time, the death is reported, the
process is started again, and service goes on with nothing left behind."""

import asyncio
import time

import pytest

from tandem import AsyncClient, DeadlineExceeded, Result, TandemError, Unavailable
from tests.cluster.harness import Cluster, is_running, wait_idle

CLIENTS = 12
DEADLINE_S = 30.0
#: What a client may wait past its deadline, on a machine that does too much at once.
SLACK_S = 5.0


async def _ask(cluster: Cluster, number: int) -> Result | TandemError:
    """One client's answer or error, which must come in time."""
    started = time.monotonic()
    try:
        async with cluster.async_client() as client:
            prompt = [number + 2] * (100 * (1 + number % 4))
            return await client.generate(prompt, max_tokens=400, ignore_eos=True, timeout_s=DEADLINE_S).result()
    except TandemError as error:
        return error
    finally:
        assert time.monotonic() - started < DEADLINE_S + SLACK_S


@pytest.mark.slow
@pytest.mark.parametrize("name", ["router", "prefill-0", "decode-0"])
async def test_killing_a_process_costs_no_client_more_than_a_typed_error(fresh: Cluster, name: str) -> None:
    pid = fresh.pid(name)
    clients = [asyncio.create_task(_ask(fresh, number)) for number in range(CLIENTS)]
    await asyncio.sleep(0.5)
    fresh.kill(name)
    ends = await asyncio.gather(*clients)

    print([end if isinstance(end, TandemError) else end.finished.route for end in ends])
    for end in ends:
        if isinstance(end, Result):
            assert end.finished.usage.completion_tokens == 400
        else:
            assert type(end) is not TandemError, "an error of no known class"
            assert isinstance(end, Unavailable | DeadlineExceeded), repr(end)
    if name == "prefill-0":
        assert any(isinstance(end, Result) for end in ends), "what was decoding needed nothing of the prefill worker"

    await asyncio.to_thread(fresh.wait_until, lambda: fresh.times_ready(name) == 2)
    assert f"{name}" in fresh.output
    assert "died: killed by SIGKILL" in fresh.output
    assert fresh.pid(name) != pid
    assert not is_running(pid)
    async with fresh.async_client() as client:
        await _wait_served(client)
        status = await wait_idle(client)
    assert {worker.worker_id: worker.state for worker in status.workers} == {"prefill-0": "ready", "decode-0": "ready"}
    assert fresh.stop() == 0


async def _wait_served(client: AsyncClient) -> None:
    """Links reconnect and workers meet again before the next prompt can go through both pools."""
    deadline = time.monotonic() + 30
    while True:
        try:
            await client.generate("x", max_tokens=4, timeout_s=DEADLINE_S).result()
        except Unavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        else:
            return
