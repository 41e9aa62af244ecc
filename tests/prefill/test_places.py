import asyncio
from collections.abc import Awaitable, Callable

from prefill.admission import Places, PrefillLimits

LIMITS = PrefillLimits(running=3, running_tokens=100)


class Legs:
    """Legs that keep their place until they are told to go."""

    def __init__(self) -> None:
        self.places = Places(LIMITS)
        self.inside: list[int] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._leave: dict[int, asyncio.Event] = {}

    async def come(self, *tokens: int) -> None:
        for count in tokens:
            self._leave[count] = asyncio.Event()
            self._tasks[count] = asyncio.create_task(self._leg(count))
        await self._settle()

    async def _leg(self, tokens: int) -> None:
        async with self.places.take(tokens):
            self.inside.append(tokens)
            try:
                await self._leave[tokens].wait()
            finally:
                self.inside.remove(tokens)

    async def leave(self, tokens: int) -> None:
        self._leave[tokens].set()
        await self._settle()

    async def give_up(self, *tokens: int) -> None:
        for count in tokens:
            self._tasks[count].cancel()
        await self._settle()

    async def _settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def go(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        assert self.inside == []


def with_legs(test: Callable[[Legs], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        legs = Legs()
        try:
            await test(legs)
        finally:
            await legs.go()

    return run


@with_legs
async def test_short_prompts_share_a_step_and_are_as_many_as_fit(legs: Legs) -> None:
    await legs.come(50, 30, 21, 5)
    assert legs.inside == [50, 30]  # the 5 tokens wait their turn
    await legs.leave(30)
    assert legs.inside == [50, 21, 5]


@with_legs
async def test_a_prompt_of_any_length_runs_alone(legs: Legs) -> None:
    await legs.come(5000, 6)
    assert legs.inside == [5000]
    await legs.leave(5000)
    assert legs.inside == [6]


@with_legs
async def test_there_are_never_more_legs_than_the_limit(legs: Legs) -> None:
    await legs.come(1, 2, 3, 4)
    assert legs.inside == [1, 2, 3]


@with_legs
async def test_who_gives_up_leaves_no_gap_in_the_queue(legs: Legs) -> None:
    await legs.come(90, 80, 70, 60)
    await legs.give_up(80, 90)  # one that waits, and the one that has the place, in one turn of the loop
    assert legs.inside == [70]
    await legs.leave(70)
    assert legs.inside == [60]
