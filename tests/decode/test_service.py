import asyncio
from collections.abc import AsyncIterator

import pytest

from decode.admission import DecodeLimits
from decode.ahead import FetchesAhead
from decode.service import DecodeOrder, DecodeService
from engine.base import DecodeLeg, FailureKind, LegError, Sampling, Staged, StepOutput
from tests.loop import settle
from tests.worker.scripted_engine import ScriptedEngine, transfer_failed

LIMITS = DecodeLimits(legs=4, fetches=1, fetch_timeout_s=5)


class Heard:
    """What a leg said."""

    def __init__(self) -> None:
        self.said: list[Staged | StepOutput] = []

    def fetched(self, staged: Staged) -> None:
        self.said.append(staged)

    def step(self, output: StepOutput) -> None:
        self.said.append(output)

    @property
    def tokens(self) -> list[int]:
        return [token for said in self.said if isinstance(said, StepOutput) for token in said.token_ids]


def order(leg_id: str, handle: bytes = b"", timeout_s: float = 60) -> DecodeOrder:
    leg = DecodeLeg(leg_id=leg_id, tenant="t", token_ids=(1, 2, 3), prompt_tokens=3, sampling=Sampling(max_tokens=8))
    return DecodeOrder(leg=leg, timeout_s=timeout_s, handle=handle)


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def service(engine: ScriptedEngine) -> AsyncIterator[DecodeService]:
    async with asyncio.TaskGroup() as scope:
        yield DecodeService(engine, LIMITS, FetchesAhead(engine, LIMITS, scope))


def test_one_leg_more_than_the_limit_is_refused() -> None:
    assert LIMITS.refusal(3) == ""
    assert LIMITS.refusal(4) == "decode is full: 4 of 4 legs"


async def test_what_was_fetched_is_told_and_decoded(engine: ScriptedEngine, service: DecodeService) -> None:
    heard = Heard()
    async with asyncio.TaskGroup() as scope:
        scope.create_task(service.serve(order("a", b"h", timeout_s=3), "a~1", heard))
        await engine.until("begun decode a")
        engine.push("a", 8, 9)
        engine.push("a", 10, end=True)
    staged = heard.said[0]
    assert isinstance(staged, Staged)
    assert staged.fetch_s == 3, "a fetch may not take longer than its leg"
    assert engine.legs["a"] == DecodeLeg(
        leg_id="a~1",
        tenant="t",
        token_ids=(1, 2, 3),
        prompt_tokens=3,
        sampling=Sampling(max_tokens=8),
        staged=staged,
    )
    assert heard.tokens == [8, 9, 10]
    assert engine.done == ["fetch h", "decode a"]


async def test_without_a_handle_the_engine_computes_the_prompt(engine: ScriptedEngine, service: DecodeService) -> None:
    heard = Heard()
    async with asyncio.TaskGroup() as scope:
        scope.create_task(service.serve(order("a"), "a~1", heard))
        await engine.until("begun decode a")
        engine.push("a", 8, end=True)
    assert engine.begun == ["decode a"]
    assert heard.tokens == [8]


async def test_a_failed_transfer_never_reaches_the_scheduler(engine: ScriptedEngine, service: DecodeService) -> None:
    engine.failing["fetch"] = transfer_failed()
    with pytest.raises(LegError) as error:
        await service.serve(order("a", b"h"), "a~1", Heard())
    assert error.value.kind is FailureKind.TRANSFER
    assert engine.begun == ["fetch h"]


async def test_fetches_wait_for_each_other(engine: ScriptedEngine, service: DecodeService) -> None:
    engine.held.add("fetch")
    async with asyncio.TaskGroup() as scope:
        legs = [scope.create_task(service.serve(order(leg, leg.encode()), f"{leg}~1", Heard())) for leg in "abc"]
        await engine.until("begun fetch a")
        legs[0].cancel()
        await engine.until("begun fetch b")
        assert "fetch c" not in engine.begun
        for leg in legs:
            leg.cancel()
    assert engine.aborted == ["fetch a", "fetch b"]


async def test_cancel_while_decoding_aborts_the_engines_leg(engine: ScriptedEngine, service: DecodeService) -> None:
    heard = Heard()
    leg = asyncio.create_task(service.serve(order("a", b"h"), "a~1", heard))
    await engine.until("begun decode a")
    engine.push("a", 8)
    await settle()
    leg.cancel()
    await asyncio.wait([leg])
    assert heard.tokens == [8]
    assert engine.aborted == ["decode a"]
    assert engine.discarded == [], "from the first step on, staged bytes are the engine's"


async def test_staged_bytes_that_the_engine_will_not_take_are_discarded(
    engine: ScriptedEngine, service: DecodeService
) -> None:
    engine.failing["decode"] = LegError(FailureKind.INVALID, "too long")
    with pytest.raises(LegError, match="too long"):
        await service.serve(order("a", b"h"), "a~1", Heard())
    assert engine.discarded == ["h"]


async def test_bytes_of_another_request_never_reach_the_scheduler(
    engine: ScriptedEngine, service: DecodeService
) -> None:
    """Of whichever tenant: what the router mixed up must not be decoded."""
    with pytest.raises(LegError, match=r"of transfer b/4/p~7, this is leg a/1/d") as error:
        await service.serve(order("a/1/d", b"b/4/p~7#0f"), "a/1/d~1", Heard())
    assert error.value.kind is FailureKind.TRANSFER
    assert (engine.begun, engine.discarded) == (["fetch b/4/p~7#0f"], ["b/4/p~7#0f"])


async def test_bytes_of_an_earlier_attempt_at_the_request_are_its_own(
    engine: ScriptedEngine, service: DecodeService
) -> None:
    heard = Heard()
    async with asyncio.TaskGroup() as scope:
        scope.create_task(service.serve(order("a/b/2/d", b"a/b/1/p~7#0f"), "a/b/2/d~1", heard))
        await engine.until("begun decode a/b/2/d")
        engine.push("a/b/2/d", 8, end=True)
    assert heard.tokens == [8]


async def test_an_answer_without_an_end_is_the_engines_failure(engine: ScriptedEngine, service: DecodeService) -> None:
    class Stopping(ScriptedEngine):
        async def _decode(self, leg: DecodeLeg):  # type: ignore[no-untyped-def]
            yield StepOutput(leg_id=leg.leg_id, token_ids=(8,))

    heard = Heard()
    async with asyncio.TaskGroup() as scope:
        ahead = FetchesAhead(Stopping(), LIMITS, scope)
    with pytest.raises(LegError) as error:
        await DecodeService(Stopping(), LIMITS, ahead).serve(order("a"), "a~1", heard)
    assert error.value.kind is FailureKind.ENGINE
    assert heard.tokens == [8]
