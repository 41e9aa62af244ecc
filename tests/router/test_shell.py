"""Streams to readers, and what happens when the core itself is at fault."""

from __future__ import annotations

import asyncio
import time

import pytest

from router.core import effects as fx
from router.core import events as ev
from router.core.core import Core
from router.core.effects import Finished, Tokens
from router.core.errors import AlreadyExists
from router.core.limits import CoreLimits
from router.core.request import FinishReason, Route, Timings, TokenLogprobs, Usage
from router.core.worker import Role
from router.links import hand_on
from router.port import RequestStream
from router.shell import Shell, WorkerEffect
from tests.router.core.world import MODEL, World, facts

END = Finished(
    reason=FinishReason.STOP,
    usage=Usage(prompt_tokens=1, cached_prompt_tokens=0, completion_tokens=3),
    timings=Timings(),
    route=Route(),
)


class Sent:
    """Links that keep what they are given."""

    def __init__(self) -> None:
        self.effects: list[WorkerEffect] = []
        self.closed: list[str] = []

    def send(self, effect: WorkerEffect) -> None:
        self.effects.append(effect)

    def close(self, worker_id: str, why: str) -> None:
        self.closed.append(worker_id)


def shell() -> tuple[Shell, Sent]:
    made = Shell(Core(now=time.monotonic(), limits=CoreLimits(), models=(MODEL,)), stream_tokens_max=100)
    links = Sent()
    made.attach(links)
    return made, links


def request(made: Shell, request_id: str = "r", timeout_s: float = 60.0) -> RequestStream:
    world = World()
    world.now = made.now()
    return made.submit(world.submit(request_id, timeout_s=timeout_s).request)


def stream(tokens_max: int = 100) -> tuple[RequestStream, list[str]]:
    said: list[str] = []
    made = RequestStream(
        "r",
        tokens_max=tokens_max,
        cancel=lambda _: said.append("cancel"),
        stop_matched=lambda _, count: said.append(f"stop {count}"),
        overrun=lambda _: said.append("overrun"),
    )
    return made, said


async def test_answers_begin_before_others_go_on_unless_the_router_lags() -> None:
    made, links = shell()
    made.handle(ev.WorkerJoined(facts("w", Role.BOTH)))
    streams = [request(made, name) for name in "ab"]
    legs = [effect.leg_id for effect in links.effects if isinstance(effect, fx.SendDecode)]

    def step(index: int, *token_ids: int) -> ev.StepOutputs:
        return ev.StepOutputs("w", (ev.StepOutput(legs[index], token_ids, None),))

    told: list[tuple[int, tuple[int, ...]]] = []

    def tell() -> None:
        for index, one in enumerate(streams):
            if token_ids := one.take().token_ids:
                told.append((index, token_ids))
        made.deliver()

    hand_on(made, [step(0, 1), step(1, 2)], tell)
    assert told == [(0, (1,))]
    hand_on(made, [step(0, 3), step(1, 4)], tell)  # b has not been told yet
    assert told == [(0, (1,))]
    tell()
    assert told[1:] == [(0, (3,)), (1, (2, 4))]


async def test_tokens_merge_while_the_reader_lags() -> None:
    made, said = stream()
    made.put(Tokens((1,), (TokenLogprobs(1, -0.1),)))
    made.put(Tokens((2, 3), (TokenLogprobs(2, -0.2), TokenLogprobs(3, -0.3))))
    made.put(END)
    merged, end = [event async for event in made]
    assert isinstance(merged, Tokens)
    assert merged.token_ids == (1, 2, 3)
    assert [entry.token_id for entry in merged.logprobs] == [1, 2, 3]
    assert end is END
    made.close()
    assert said == []


async def test_a_reader_that_waits_is_woken() -> None:
    made, _ = stream()
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(anext(made))
        await asyncio.sleep(0)
        made.put(Tokens((7,)))
        made.arrived()
    assert first.result() == Tokens((7,), ())


async def test_a_waiting_readers_tokens_are_taken_at_once_and_the_end_is_its_own() -> None:
    made, _ = stream()
    taken: list[Tokens] = []

    def take() -> bool:
        taken.append(made.take())
        return True

    made.at_once(take)
    made.put(Tokens((1,)))
    made.arrived()
    assert taken == []  # nobody waits yet: the reader will look by itself
    assert await anext(made) == Tokens((1,), ())
    async with asyncio.TaskGroup() as tasks:
        last = tasks.create_task(anext(made))
        await asyncio.sleep(0)
        for token_id in (2, 3):
            made.put(Tokens((token_id,)))
            made.arrived()
        assert taken == [Tokens((2,), ()), Tokens((3,), ())]
        made.put(END)
        made.arrived()
    assert last.result() is END


async def test_what_is_not_taken_at_once_wakes_the_reader() -> None:
    made, _ = stream()
    made.at_once(lambda: False)
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(anext(made))
        await asyncio.sleep(0)
        made.put(Tokens((7,)))
        made.arrived()
    assert first.result() == Tokens((7,), ())


async def test_a_full_stream_tells_the_core_and_closing_an_open_one_cancels() -> None:
    made, said = stream(tokens_max=2)
    made.put(Tokens((1, 2)))
    assert said == []
    made.put(Tokens((3,)))
    made.close()
    assert said == ["overrun", "cancel"]


async def test_effects_reach_links_and_streams_in_order() -> None:
    made, links = shell()
    made.joined(facts("b", Role.BOTH))
    reader = request(made)
    (order,) = links.effects
    assert isinstance(order, fx.SendDecode)
    made.handle(ev.StepOutputs("b", (ev.StepOutput(order.leg_id, (4, 5)),)))
    assert await anext(reader) == Tokens((4, 5), ())
    reader.close()
    assert links.effects[-1] == fx.CancelLeg("b", order.leg_id)
    made.stop()


async def test_the_shell_wakes_the_core_at_its_deadline() -> None:
    made, _ = shell()
    reader = request(made, timeout_s=0.02)
    (end,) = [event async for event in reader]
    assert isinstance(end, fx.Failed)
    assert end.error.reason == "DEADLINE_EXCEEDED"
    made.stop()


async def test_an_id_in_use_is_refused_before_the_core_hears_of_it() -> None:
    made, _ = shell()
    request(made)
    with pytest.raises(AlreadyExists, match="'r'"):
        request(made)
    made.stop()


@pytest.mark.parametrize("where", ["deciding", "doing"])
async def test_after_a_fault_nothing_is_handled_any_more(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, links = shell()
    made.joined(facts("b", Role.BOTH))
    told: list[bool] = []
    made.on_fault = lambda: told.append(True)

    def broken(*arguments: object) -> None:
        raise AssertionError("a fault of ours")

    with monkeypatch.context() as patched:
        patched.setattr(*{"deciding": (made._core, "handle"), "doing": (links, "send")}[where], broken)
        with pytest.raises(AssertionError):
            request(made)
    assert told == [True]
    request(made, "later")
    assert links.effects == []
    made.stop()


async def test_a_reader_at_fault_keeps_nothing_from_others(caplog: pytest.LogCaptureFixture) -> None:
    made, links = shell()
    made.joined(facts("b", Role.BOTH))
    readers = [request(made, name) for name in "xy"]
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(anext(reader)) for reader in readers]
        await asyncio.sleep(0)

        def take() -> bool:
            raise AssertionError("a fault of this reader's")

        readers[0].at_once(take)
        legs = [effect.leg_id for effect in links.effects if isinstance(effect, fx.SendDecode)]
        made.handle(ev.StepOutputs("b", tuple(ev.StepOutput(leg_id, (4,)) for leg_id in legs)))
        made.deliver()
        assert "a fault of this reader's" in caplog.text
        waiting[0].cancel()
    assert waiting[1].result() == Tokens((4,), ())
    made.stop()
