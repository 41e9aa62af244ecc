"""A prompt that is read while it is computed, in four chunks: the same answer, and nothing of it if it is given up.

All of it with vLLM's two schedulers: one that waits for every step, and one that is a step ahead."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import pytest_asyncio

from engine.base import FailureKind, LegError, PrefillLeg
from engine.vllm import VllmEngine
from tests.loop import settle
from tests.vllm.harness import GREEDY, Ahead, Pair, becomes_idle, decoded, is_idle, options, prefill_leg

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]


class LateEngine(VllmEngine):
    connector = ("tests.vllm.late", "LateConnector")


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["synchronous", "asynchronous"])
async def engines(request: pytest.FixtureRequest, engines: Pair, model: Path) -> AsyncIterator[Pair]:
    if request.param == "synchronous":
        yield engines
        return
    prefill = LateEngine(options("late", model=str(model)))
    try:
        info = await prefill.start()
        lane = await engines.decode.connect("late", info.kv_address)
        assert not lane.refusal
        yield Pair(prefill, engines.decode, (info, engines.infos[1]))
    finally:
        await prefill.stop()


@pytest.mark.parametrize("tokens", [513, 1000, 1024, 1025, 2000, 2047, 2500])
async def test_the_answer_is_the_one_engines(pair: Pair, tokens: int) -> None:
    leg = prefill_leg(pair, tokens, 37 * tokens)
    ahead = Ahead(pair, leg)
    result = await ahead.prefill
    assert ahead.handles == [result.handle]
    assert ahead.fetch is not None
    staged = await ahead.fetch
    assert staged.tokens == tokens
    alone = await pair.whole(leg.token_ids, GREEDY)
    assert await decoded(pair, leg, result.token_id, staged) == alone.token_ids


async def test_many_at_once(pair: Pair) -> None:
    legs = [prefill_leg(pair, 700 + 90 * number, 500 * number) for number in range(6)]
    alone = [(await pair.whole(leg.token_ids, GREEDY)).token_ids for leg in legs]

    async def split(leg: PrefillLeg) -> list[int]:
        ahead = Ahead(pair, leg)
        result = await ahead.prefill
        assert result.handle is not None
        try:
            staged = await ahead.fetch if ahead.fetch and ahead.handles == [result.handle] else None
        except LegError:  # no room ahead of time, or the stream was withdrawn
            staged = None
        staged = staged or await pair.decode.fetch(result.handle, 60.0)
        return await decoded(pair, leg, result.token_id, staged)

    assert await asyncio.gather(*(split(leg) for leg in legs)) == alone


async def test_a_prompt_of_one_chunk_is_not_offered_before_it_is_done(pair: Pair) -> None:
    ahead = Ahead(pair, prefill_leg(pair, 300, 1234))
    result = await ahead.prefill
    assert ahead.handles == []
    assert result.handle is not None
    await pair.prefill.release(result.handle)


@pytest.mark.parametrize("give_up", ["prefill", "fetch"])
async def test_given_up_between_two_chunks(
    pair: Pair, give_up: str, held: Callable[[], AbstractContextManager[None]]
) -> None:
    with held():
        ahead = Ahead(pair, prefill_leg(pair, 2500, 4321))
        await ahead.offered.wait()
        assert ahead.fetch is not None
        await settle()
        (ahead.prefill if give_up == "prefill" else ahead.fetch).cancel()
        await settle()
    if give_up == "prefill":
        with pytest.raises(LegError) as stale:
            await ahead.fetch
        assert stale.value.kind is FailureKind.TRANSFER
        await asyncio.gather(ahead.prefill, return_exceptions=True)
        assert ahead.prefill.cancelled()
    else:
        await asyncio.gather(ahead.fetch, return_exceptions=True)
        result = await ahead.prefill
        assert result.handle is not None
        staged = await pair.decode.fetch(result.handle, 60.0)  # as good as if nobody had begun
        await pair.decode.discard(staged)
    for engine in (pair.prefill, pair.decode):
        load = await becomes_idle(engine)
        assert is_idle(load), load
