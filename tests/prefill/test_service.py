import asyncio
from collections.abc import AsyncIterator

import pytest

from engine.base import PrefillLeg, Sampling
from prefill.admission import PrefillLimits
from prefill.service import PrefillOrder, PrefillService
from tests.worker.scripted_engine import ScriptedEngine

LIMITS = PrefillLimits(running=1, queued=2, lease_ttl_s=30)


def order(leg_id: str, timeout_s: float = 60, hand_off: bool = True) -> PrefillOrder:
    leg = PrefillLeg(leg_id=leg_id, tenant="t", token_ids=(1, 2, 3), sampling=Sampling(max_tokens=8), hand_off=hand_off)
    return PrefillOrder(leg=leg, timeout_s=timeout_s)


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def service(engine: ScriptedEngine) -> AsyncIterator[PrefillService]:
    service = PrefillService(engine, LIMITS)
    async with asyncio.TaskGroup() as scope:
        housekeeping = scope.create_task(service.run())
        yield service
        housekeeping.cancel()


def test_one_leg_more_than_running_and_queued_is_refused() -> None:
    assert LIMITS.refusal(2) == ""
    assert LIMITS.refusal(3) == "prefill is full: 3 of 3 legs"


async def test_legs_reach_the_engine_in_order_and_the_wait_is_told(
    engine: ScriptedEngine, service: PrefillService
) -> None:
    engine.held.add("prefill")
    async with asyncio.TaskGroup() as scope:
        legs = [scope.create_task(service.serve("r", order(name), f"{name}~1")) for name in "abc"]
        await engine.until("begun prefill a")
        await asyncio.sleep(0.01)
        assert engine.begun == ["prefill a"]
        await engine.let_go("prefill")
    assert engine.begun == ["prefill a", "prefill b", "prefill c"]
    engines_own = 0.25
    first, *rest = (leg.result().queue_s for leg in legs)
    assert engines_own <= first < min(rest)  # those waited for it; of each other they are a breath apart


async def test_a_leg_cancelled_in_the_queue_never_reaches_the_engine(
    engine: ScriptedEngine, service: PrefillService
) -> None:
    engine.held.add("prefill")
    async with asyncio.TaskGroup() as scope:
        scope.create_task(service.serve("r", order("a"), "a~1"))
        waiting = scope.create_task(service.serve("r", order("b"), "b~1"))
        await engine.until("begun prefill a")
        waiting.cancel()
        scope.create_task(service.serve("r", order("c"), "c~1"))
        await engine.let_go("prefill")
    assert engine.begun == ["prefill a", "prefill c"]


async def test_a_lease_lasts_no_longer_than_its_request(engine: ScriptedEngine, service: PrefillService) -> None:
    await service.serve("r", order("a", timeout_s=4), "a~1")
    await service.serve("r", order("b", timeout_s=400), "b~1")
    legs = [leg for leg in engine.legs.values() if isinstance(leg, PrefillLeg)]
    assert [leg.lease_ttl_s for leg in legs] == [4, 30]


async def test_a_lease_that_its_customer_gave_up_is_released(engine: ScriptedEngine, service: PrefillService) -> None:
    for name in "abc":
        await service.serve("r", order(name), f"{name}~1")
    await service.serve("other", order("d"), "d~1")
    service.leg_gone("r", "a")
    service.leg_gone("r", "unknown")
    await engine_released(engine, 1)
    assert engine.released == [b"handle of a~1"]
    service.customer_gone("r")
    await engine_released(engine, 3)
    assert engine.leases == {b"handle of d~1"}


async def test_a_release_that_fails_does_not_stop_the_next(engine: ScriptedEngine, service: PrefillService) -> None:
    async def broken(handle: bytes) -> None:
        engine.release = whole  # type: ignore[method-assign]
        raise OSError("no engine")

    whole = engine.release
    engine.release = broken  # type: ignore[method-assign]
    service.release(b"one")
    service.release(b"two")
    await engine_released(engine, 1)
    assert engine.released == [b"two"]


async def engine_released(engine: ScriptedEngine, count: int) -> None:
    async with asyncio.timeout(60):
        while len(engine.released) < count:  # noqa: ASYNC110
            await asyncio.sleep(0)
