import asyncio

from engine.base import EngineLoad, FailureKind, FinishReason, PrefillResult, Staged, StepOutput
from worker.config import Role
from worker.outbox import Outbox

STAGED = Staged(staged_id="s", tokens=3, transport="t", transfer_bytes=48, fetch_s=0.1)


def output(*tokens: int, end: bool = False) -> StepOutput:
    return StepOutput(leg_id="engine's", token_ids=tokens, finish_reason=FinishReason.STOP if end else None)


def kinds(outbox: Outbox) -> list[str]:
    return [str(message.WhichOneof("message")) for message in outbox.take()]


def test_what_a_step_gave_all_legs_is_one_message() -> None:
    outbox = Outbox(100)
    for leg in range(64):
        outbox.step(f"{leg}/1/d", output(leg))
    [message] = outbox.take()
    assert [(out.leg_id, list(out.token_ids)) for out in message.step.outputs] == [
        (f"{leg}/1/d", [leg]) for leg in range(64)
    ]
    assert outbox.take() == []


def test_what_came_while_the_stream_was_slow_is_joined() -> None:
    outbox = Outbox(100)
    for step in range(3):
        outbox.step("a", output(step))
        outbox.step("b", output(10 + step, end=step == 2))
    [message] = outbox.take()
    assert [list(out.token_ids) for out in message.step.outputs] == [[0, 1, 2], [10, 11, 12]]
    assert [out.finish_reason for out in message.step.outputs] == [0, 1]


def test_what_legs_begin_with_is_in_front() -> None:
    outbox = Outbox(100)
    outbox.step("old", output(1))
    outbox.step("new", output(2), first=True)
    outbox.step("older", output(3))
    outbox.step("new", output(4, end=True))
    outbox.step("newer", output(5), first=True)
    [message] = outbox.take()
    assert message.step.firsts == 2
    assert [(out.leg_id, list(out.token_ids)) for out in message.step.outputs] == [
        ("new", [2, 4]),
        ("newer", [5]),
        ("old", [1]),
        ("older", [3]),
    ]
    outbox.step("new", output(6))
    [message] = outbox.take()
    assert message.step.firsts == 0


def test_a_legs_messages_keep_their_order() -> None:
    outbox = Outbox(100)
    outbox.step("b", output(1))
    outbox.fetched("a", STAGED)
    outbox.step("a", output(1))
    outbox.failed("a", FailureKind.ENGINE, "gone")
    outbox.step("b", output(2))
    outbox.prefill_done("c", PrefillResult(token_id=1))
    assert kinds(outbox) == ["fetched", "prefill_done", "step", "leg_failed"]


def test_only_the_latest_load_waits() -> None:
    outbox = Outbox(100)
    for free in (1, 2, 3):
        outbox.load(EngineLoad(kv_blocks_free=free), prefill_running=0, decode_running=0)
    [message] = outbox.take()
    assert message.load.kv_blocks_free == 3


async def test_a_full_outbox_takes_no_more() -> None:
    outbox = Outbox(3)
    outbox.draining()
    outbox.step("a", output(1))
    outbox.failed("b", FailureKind.ENGINE, "gone")
    assert not outbox.overflowed.is_set()
    outbox.role_changed(Role.BOTH)
    async with asyncio.timeout(60):
        await outbox.overflowed.wait()
    assert kinds(outbox) == ["draining", "step", "leg_failed"]


async def test_wait_ends_when_something_comes() -> None:
    outbox = Outbox(3)
    waiting = asyncio.create_task(outbox.wait())
    await asyncio.sleep(0)
    outbox.step("a", output(1))
    async with asyncio.timeout(60):
        await waiting
