import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from random import Random

import pytest

from engine.base import FailureKind, FinishReason, LegError, PrefillResult, Staged, StepOutput
from tests.loop import settle
from worker.config import Role
from worker.legs import Leg, LegTable
from worker.metrics import WorkerMetrics

END = StepOutput(leg_id="engine's", token_ids=(9,), finish_reason=FinishReason.STOP)
STEP = StepOutput(leg_id="engine's", token_ids=(8,))


class Heard:
    """What a router would hear, as "<what> <leg>"."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ends: Counter[str] = Counter()

    def offered(self, leg_id: str, handle: bytes) -> None:
        self.said.append(f"offered {leg_id}")

    def prefill_done(self, leg_id: str, result: PrefillResult) -> None:
        self.ends[leg_id] += 1
        self.said.append(f"done {leg_id}")

    def fetched(self, leg_id: str, staged: Staged) -> None:
        self.said.append(f"fetched {leg_id}")

    def step(self, leg_id: str, output: StepOutput, *, first: bool = False) -> None:
        self.ends[leg_id] += output.finish_reason is not None
        self.said.append(f"{'first ' if first else ''}{'end' if output.finish_reason else 'step'} {leg_id}")

    def failed(self, leg_id: str, kind: FailureKind, detail: str) -> None:
        self.ends[leg_id] += 1
        self.said.append(f"{kind.name} {leg_id}: {detail}")


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def legs() -> AsyncIterator[LegTable]:
    """Ends with every leg gone and the table whole."""
    async with asyncio.TaskGroup() as scope:
        legs = LegTable(scope, WorkerMetrics("w"))
        yield legs
        legs.fail_all(FailureKind.ENGINE, "the test is over")
        legs.check_integrity()
    async with asyncio.timeout(60):
        await legs.empty()
    legs.check_integrity()
    assert legs.count(Role.PREFILL) == legs.count(Role.DECODE) == 0


async def forever(leg: Leg) -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_leg_says_its_end_and_is_gone(heard: Heard, legs: LegTable) -> None:
    async def work(leg: Leg) -> None:
        leg.step(STEP)
        leg.step(END)
        leg.step(STEP)
        leg.fail(FailureKind.ENGINE, "too late")

    legs.open(heard, "a", Role.DECODE, 60, work)
    assert legs.count(Role.DECODE) == 1
    assert legs.has(heard, "a")
    await legs.empty()
    assert heard.said == ["first step a", "end a"]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
async def test_a_leg_that_comes_too_late_never_starts(heard: Heard, legs: LegTable, timeout_s: float) -> None:
    async def work(leg: Leg) -> None:
        pytest.fail("started")

    legs.open(heard, "a", Role.PREFILL, timeout_s, work)
    await legs.empty()
    assert heard.said == ["EXPIRED a: the deadline had passed when the order came"]


async def test_a_leg_expires_while_it_works(heard: Heard, legs: LegTable) -> None:
    legs.open(heard, "a", Role.PREFILL, 0.01, forever)
    await legs.empty()
    assert heard.said == ["EXPIRED a: not done within its 0.010 s"]


async def test_no_deadline_is_too_far(heard: Heard, legs: LegTable) -> None:
    legs.open(heard, "a", Role.PREFILL, float("inf"), forever)
    await settle()
    assert heard.said == []


@pytest.mark.parametrize("kind", FailureKind)
async def test_a_leg_error_is_told_as_it_is(heard: Heard, legs: LegTable, kind: FailureKind) -> None:
    async def work(leg: Leg) -> None:
        raise LegError(kind, "because")

    legs.open(heard, "a", Role.DECODE, 60, work)
    await legs.empty()
    assert heard.said == [f"{kind.name} a: because"]


@pytest.mark.parametrize("error", [KeyError("x"), TimeoutError("not the leg's own")])
async def test_a_fault_ends_its_own_leg_only(heard: Heard, legs: LegTable, error: Exception) -> None:
    async def work(leg: Leg) -> None:
        raise error

    legs.open(heard, "other", Role.DECODE, 60, forever)
    legs.open(heard, "a", Role.DECODE, 60, work)
    await settle()
    assert heard.said == [f"ENGINE a: {type(error).__name__}: {error}"]
    assert legs.has(heard, "other")


async def test_an_engine_that_cancels_our_task_still_gives_the_leg_an_end(heard: Heard, legs: LegTable) -> None:
    async def work(leg: Leg) -> None:
        raise asyncio.CancelledError

    legs.open(heard, "a", Role.DECODE, 60, work)
    await legs.empty()
    assert heard.said == ["ENGINE a: the engine gave no answer"]


async def test_what_a_leg_offers_is_said_while_it_goes_on_and_not_after_its_end(heard: Heard, legs: LegTable) -> None:
    async def work(leg: Leg) -> None:
        leg.offered(b"handle")
        leg.fail(FailureKind.ENGINE, "because")
        leg.offered(b"handle")

    legs.open(heard, "a", Role.PREFILL, 60, work)
    await legs.empty()
    assert heard.said == ["offered a", "ENGINE a: because"]


async def test_a_cancelled_leg_says_nothing_more(heard: Heard, legs: LegTable) -> None:
    async def work(leg: Leg) -> None:
        try:
            await forever(leg)
        finally:
            leg.step(STEP)
            leg.step(END)

    legs.open(heard, "a", Role.DECODE, 60, work)
    await asyncio.sleep(0)
    assert legs.cancel(heard, "a")
    assert not legs.cancel(heard, "a")
    assert legs.count_open(Role.DECODE) == 0
    assert legs.count(Role.DECODE) == 1, "the engine has not let go"
    await legs.empty()
    assert heard.said == []


async def test_a_leg_can_be_cancelled_before_its_first_step(heard: Heard, legs: LegTable) -> None:
    async def work(leg: Leg) -> None:
        pytest.fail("started")

    legs.open(heard, "a", Role.DECODE, 60, work)
    assert legs.cancel(heard, "a")
    await legs.empty()
    assert heard.said == []


async def test_a_name_is_free_as_soon_as_its_leg_has_ended(heard: Heard, legs: LegTable) -> None:
    """Leg ids begin with what a client chose, so one may come back while the engine still lets go of the first."""
    ids: list[str] = []

    async def work(leg: Leg) -> None:
        ids.append(leg.engine_leg_id)
        await forever(leg)

    legs.open(heard, "a", Role.DECODE, 60, work)
    await asyncio.sleep(0)
    legs.cancel(heard, "a")
    legs.open(heard, "a", Role.DECODE, 60, work)
    await asyncio.sleep(0)
    assert ids == ["a~1", "a~2"]
    assert legs.has(heard, "a")


async def test_two_routers_may_use_one_name(heard: Heard, legs: LegTable) -> None:
    other = Heard()
    legs.open(heard, "a", Role.DECODE, 60, forever)
    legs.open(other, "a", Role.DECODE, 60, forever)
    assert legs.cancel_all(heard) == 1
    assert not legs.has(heard, "a")
    assert legs.has(other, "a")


async def test_fail_all_ends_every_leg_once(heard: Heard, legs: LegTable) -> None:
    legs.open(heard, "a", Role.DECODE, 60, forever)
    legs.open(heard, "b", Role.PREFILL, 60, forever)
    legs.fail_all(FailureKind.ENGINE, "dead")
    legs.fail_all(FailureKind.ENGINE, "dead again")
    await legs.empty()
    assert heard.said == ["ENGINE a: dead", "ENGINE b: dead"]


async def test_every_leg_has_at_most_one_end_whatever_happens_when(heard: Heard, legs: LegTable) -> None:
    for seed in range(200):
        random = Random(seed)

        async def work(leg: Leg, random: Random = random) -> None:
            for _ in range(random.randrange(4)):
                leg.step(STEP)
                await asyncio.sleep(random.choice([0, 0, 0.0001]))
            match random.randrange(4):
                case 0:
                    leg.step(END)
                case 1:
                    raise LegError(FailureKind.TRANSFER, "lost")
                case 2:
                    raise OSError("fault")
                case 3:
                    await forever(leg)

        names = [f"{seed}/{n}" for n in range(6)]
        cancelled = set()
        for name in names:
            legs.open(heard, name, Role.DECODE, random.choice([0.0, 0.0002, 0.001, 60]), work)
        while legs.count(Role.DECODE):
            legs.check_integrity()
            name = random.choice(names)
            if legs.cancel(heard, name):
                cancelled.add(name)
            await asyncio.sleep(0)
        assert {name: heard.ends[name] for name in names} == {name: int(name not in cancelled) for name in names}, seed
