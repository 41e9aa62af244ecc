"""A leg that is cancelled, at whatever moment, leaves nothing behind."""

import asyncio
import random
import time
from collections import Counter

import pytest

from engine.base import DecodeLeg, LegError, PrefillLeg, Sampling
from tests.vllm.harness import Pair, becomes_idle, is_idle, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

LONG = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)


async def cancel(task: asyncio.Task[object]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13])
async def test_a_prefill_cancelled_within_its_first_moments(pair: Pair, steps: int) -> None:
    """So many turns of the event loop: before, while and after it is sent to the engine process."""
    leg = PrefillLeg(
        leg_id="early", tenant="t", token_ids=prompt(300), sampling=LONG, cache_salt=pair.number(), hand_off=True
    )
    task: asyncio.Task[object] = asyncio.create_task(pair.prefill.prefill(leg))
    for _ in range(steps):
        await asyncio.sleep(0)
    await cancel(task)
    load = await becomes_idle(pair.prefill)
    assert is_idle(load), load


async def test_a_prefill_cancelled_when_its_blocks_are_pinned_already(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM ignores an abort by then, and the lease has half a minute to go."""
    expired = (await pair.prefill.load()).leases_expired_total
    leg = PrefillLeg(leg_id="late", tenant="t", token_ids=prompt(300), sampling=LONG, hand_off=True)
    sent: list[object] = []
    send = pair.prefill._send

    def send_and_wait(message: object) -> None:
        """While this process sees nothing, the engine computes, pins and answers."""
        send(message)  # type: ignore[arg-type]
        sent.append(message)
        time.sleep(0.5)

    with monkeypatch.context() as patched:
        patched.setattr(pair.prefill, "_send", send_and_wait)
        task: asyncio.Task[object] = asyncio.create_task(pair.prefill.prefill(leg))
        while not sent:  # noqa: ASYNC110  one turn of the loop, or two
            await asyncio.sleep(0)
    await cancel(task)
    assert task.cancelled()
    load = await becomes_idle(pair.prefill)
    assert is_idle(load), load
    assert load.leases_expired_total == expired


async def test_a_fetch_given_up_in_the_moment_its_answer_comes_frees_its_pages(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    leg = PrefillLeg(
        leg_id="crossed",
        tenant="t",
        token_ids=prompt(300),
        sampling=LONG,
        cache_salt=pair.number(),
        hand_off=True,
        reader="decode",
    )
    handle = (await pair.prefill.prefill(leg)).handle
    assert handle is not None
    task: asyncio.Task[object] = asyncio.create_task(pair.decode.fetch(handle, 20.0))
    take = pair.decode._answered

    def answered(answer: object) -> None:
        take(answer)  # type: ignore[arg-type]
        task.cancel()

    monkeypatch.setattr(pair.decode, "_answered", answered)
    await asyncio.gather(task, return_exceptions=True)
    monkeypatch.undo()
    assert task.cancelled()
    for engine in (pair.prefill, pair.decode):
        load = await becomes_idle(engine)
        assert is_idle(load), load


async def test_a_decode_that_is_closed_frees_its_blocks(pair: Pair) -> None:
    leg = DecodeLeg(leg_id="closed", tenant="t", token_ids=prompt(300), prompt_tokens=300, sampling=LONG)
    outputs = pair.decode.decode(leg)
    await anext(outputs)
    assert (await pair.decode.load()).running == 1
    await outputs.aclose()
    load = await becomes_idle(pair.decode)
    assert is_idle(load), load


async def test_a_storm_of_cancels(pair: Pair) -> None:
    """Every fourth is let be; the others are cancelled some time before so much could be done at once."""
    rng = random.Random(20)
    sampling = Sampling(max_tokens=60, temperature=0.0, ignore_eos=True)
    ends = Counter[str]()
    alone_s = 0.0
    for _ in range(2):  # the first one may be slow
        began = time.monotonic()
        await pair.split(prompt(1200), sampling)
        alone_s = time.monotonic() - began

    async def one(number: int) -> str:
        text, salt = prompt(rng.choice((20, 100, 500, 1200)), 97 * number), pair.number()
        try:
            async with asyncio.timeout(None if number % 4 == 0 else rng.random() ** 2 * 4 * alone_s):
                await pair.split(text, sampling, cache_salt=salt)
        except TimeoutError:
            return "cancelled"
        except LegError as failed:
            return str(failed)
        return "finished"

    async def keep_on(first: int) -> None:
        for number in range(first, 400, 12):
            if ends["cancelled"] < 60:
                ends[await one(number)] += 1

    await asyncio.gather(*(keep_on(first) for first in range(12)))
    assert set(ends) == {"cancelled", "finished"}
    assert ends["cancelled"] >= 60
    for engine in (pair.prefill, pair.decode):
        load = await becomes_idle(engine)
        assert is_idle(load), load
    text = prompt(333, 44)
    assert (await pair.split(text, sampling)).token_ids == (await pair.whole(text, sampling)).token_ids
