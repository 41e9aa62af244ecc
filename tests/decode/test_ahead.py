"""What is begun on a hint is taken over by the order or given up, and never in an order's way."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from decode.admission import DecodeLimits
from decode.ahead import AheadOutcome, FetchesAhead, Hint
from decode.service import DecodeOrder, DecodeService
from engine.base import DecodeLeg, FailureKind, LegError, Sampling, Staged, StepOutput
from tests.loop import settle
from tests.worker.scripted_engine import ScriptedEngine, transfer_failed

LIMITS = DecodeLimits(legs=4, fetches=1, fetch_timeout_s=5, fetches_ahead=2)


class Decoding:
    """A decode service with one customer, and what it says of its legs."""

    def __init__(self, engine: ScriptedEngine, scope: asyncio.TaskGroup, limits: DecodeLimits = LIMITS) -> None:
        self.engine = engine
        self.ended: list[AheadOutcome] = []
        self.ahead = FetchesAhead(engine, limits, scope, self.ended.append)
        self.service = DecodeService(engine, limits, self.ahead)
        self.staged: list[Staged] = []

    def hint(self, handle: str = "h", leg_id: str = "a/1/p") -> None:
        self.ahead.begin("router", Hint(leg_id=leg_id, handle=handle.encode(), timeout_s=60))

    def order(self, handle: str = "h", leg_id: str = "a/2/d", timeout_s: float = 60) -> "asyncio.Task[None]":
        leg = DecodeLeg(
            leg_id=leg_id, tenant="t", token_ids=(1, 2, 3), prompt_tokens=3, sampling=Sampling(max_tokens=8)
        )
        order = DecodeOrder(leg=leg, timeout_s=timeout_s, handle=handle.encode())
        return asyncio.create_task(self.service.serve(order, f"{leg_id}~1", self))

    async def finish(self, order: "asyncio.Task[None]", leg_id: str = "a/2/d") -> None:
        await self.engine.until(f"begun decode {leg_id}")
        self.engine.push(leg_id, 9, end=True)
        await order

    # What a leg says.

    def fetched(self, staged: Staged) -> None:
        self.staged.append(staged)

    def step(self, output: StepOutput) -> None:
        pass


@pytest.fixture
async def at() -> AsyncIterator[Decoding]:
    async with asyncio.TaskGroup() as scope:
        at = Decoding(ScriptedEngine(), scope)
        yield at
        assert len(at.ahead) == 0, "nothing is left"


async def test_an_order_takes_what_was_fetched_ahead_of_it(at: Decoding) -> None:
    at.hint()
    await at.engine.until("done fetch ahead h")
    await at.finish(at.order())
    assert at.engine.begun == ["fetch ahead h", "decode a/2/d"]
    assert at.engine.discarded == []
    assert [staged.staged_id for staged in at.staged] == ["h"]
    assert at.staged[0].fetch_s < 5, "what is told is how long the order waited"
    assert at.ended == [AheadOutcome.TAKEN]


async def test_an_order_joins_a_fetch_that_is_under_way(at: Decoding) -> None:
    at.engine.held.add("fetch ahead")
    at.hint()
    order = at.order()
    await at.engine.until("begun fetch ahead h")
    await settle()
    assert at.staged == []
    await at.engine.let_go("fetch ahead")
    await at.finish(order)
    assert at.engine.begun == ["fetch ahead h", "decode a/2/d"]


async def test_without_a_hint_or_with_another_handles_the_order_fetches(at: Decoding) -> None:
    at.hint("other")
    await at.finish(at.order("h"))
    assert at.engine.done == ["fetch ahead other", "fetch h", "decode a/2/d"]
    at.ahead.drop("router", "a/1/p")


async def test_when_fetching_ahead_failed_the_order_fetches(at: Decoding) -> None:
    at.engine.failing["fetch ahead"] = transfer_failed()
    at.hint()
    await at.engine.until("begun fetch ahead h")
    await at.finish(at.order())
    assert at.engine.done == ["fetch h", "decode a/2/d"]
    assert at.ended == [AheadOutcome.FAILED]


async def test_one_that_fails_while_the_order_waits_for_it_is_done_again_by_the_order(at: Decoding) -> None:
    at.engine.held.add("fetch ahead")
    at.engine.failing["fetch ahead"] = transfer_failed()
    at.hint()
    order = at.order()
    await at.engine.until("begun fetch ahead h")
    await at.engine.let_go("fetch ahead")
    await at.finish(order)
    assert at.engine.done == ["fetch h", "decode a/2/d"]


async def test_hints_are_bounded_and_doubled_ones_are_one(at: Decoding) -> None:
    at.engine.held.add("fetch ahead")
    for handle in ("h", "h", "i", "j"):
        at.hint(handle)
    await at.engine.until("begun fetch ahead i")
    assert at.engine.begun == ["fetch ahead h", "fetch ahead i"]
    at.ahead.drop_all("router")


async def test_no_hint_is_taken_where_there_may_be_none() -> None:
    async with asyncio.TaskGroup() as scope:
        at = Decoding(ScriptedEngine(), scope, DecodeLimits(fetches_ahead=0))
        at.hint()
        assert len(at.ahead) == 0


async def test_a_cancelled_hint_stops_the_read(at: Decoding) -> None:
    at.engine.held.add("fetch ahead")
    at.hint()
    await at.engine.until("begun fetch ahead h")
    at.ahead.drop("another router", "a/1/p")
    at.ahead.drop("router", "another leg")
    assert len(at.ahead) == 1
    at.ahead.drop("router", "a/1/p")
    await at.engine.until("aborted fetch ahead h")
    assert at.ended == [AheadOutcome.DROPPED]


async def test_what_is_held_for_a_leg_that_is_cancelled_is_discarded(at: Decoding) -> None:
    at.hint()
    await at.engine.until("done fetch ahead h")
    await settle()
    at.ahead.drop_all("router")
    await settle()
    assert at.engine.discarded == ["h"]


async def test_what_nobody_comes_for_is_discarded() -> None:
    async with asyncio.TaskGroup() as scope:
        at = Decoding(ScriptedEngine(), scope, DecodeLimits(fetch_timeout_s=0.05))
        at.hint()
        await at.engine.until("done fetch ahead h")
        async with asyncio.timeout(60):
            while not at.engine.discarded:  # noqa: ASYNC110  a timer's doing
                await asyncio.sleep(0.01)
        assert len(at.ahead) == 0


async def test_a_cancelled_order_gives_up_what_it_joined(at: Decoding) -> None:
    at.engine.held.add("fetch ahead")
    at.hint()
    order = at.order()
    await at.engine.until("begun fetch ahead h")
    order.cancel()
    await at.engine.until("aborted fetch ahead h")
    with pytest.raises(asyncio.CancelledError):
        await order


async def test_an_order_cancelled_in_the_moment_in_which_the_fetch_ends_leaves_nothing_staged(at: Decoding) -> None:
    at.engine.held.add("fetch ahead")
    at.hint()
    await at.engine.until("begun fetch ahead h")
    fetch = next(task for task in asyncio.all_tasks() if task.get_name() == "ahead of a/1/p")
    fetch.add_done_callback(lambda _: order.cancel())
    order = at.order()
    await settle()
    await at.engine.let_go("fetch ahead")
    with pytest.raises(asyncio.CancelledError):
        await order
    await settle()
    assert at.engine.discarded == ["h"]


async def test_an_order_does_not_wait_for_ever_for_what_was_begun(at: Decoding) -> None:
    at.engine.held.add("fetch ahead")
    at.hint()
    with pytest.raises(LegError) as raised:
        await at.order(timeout_s=0.05)
    assert raised.value.kind is FailureKind.TRANSFER
    await at.engine.until("aborted fetch ahead h")


async def test_an_order_that_finds_no_room_gets_that_of_the_hints(at: Decoding) -> None:
    at.engine.held.add("fetch ahead")
    at.hint("i", "b/1/p")
    at.hint("j", "c/1/p")
    await at.engine.until("begun fetch ahead j")
    at.engine.failing["fetch"] = LegError(FailureKind.REJECTED, "no room")
    order = at.order("h")
    await at.engine.until("aborted fetch ahead i")
    del at.engine.failing["fetch"]
    await at.finish(order)
    assert at.engine.begun.count("fetch h") == 2


async def test_an_order_that_finds_no_room_fails_when_no_hint_has_any(at: Decoding) -> None:
    at.engine.failing["fetch"] = LegError(FailureKind.REJECTED, "no room")
    with pytest.raises(LegError) as raised:
        await at.order()
    assert raised.value.kind is FailureKind.REJECTED
    assert at.engine.begun == ["fetch h"]
