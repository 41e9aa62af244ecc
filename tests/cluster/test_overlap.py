"""Prompts of several chunks through a whole cluster: their blocks are fetched while they are computed."""

import asyncio
import random

import pytest

from tandem import AsyncClient
from tandem.client import AsyncGeneration
from tests.cluster.harness import ON_SIM, Cluster, wait_idle

pytestmark = ON_SIM

PROMPTS = 8


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(16, 4000) for _ in range(draw.randrange(2100, 3900))] for _ in range(PROMPTS)]


def ask(client: AsyncClient, prompt: list[int]) -> AsyncGeneration:
    return client.generate(prompt, max_tokens=8, temperature=0.0, ignore_eos=True, return_token_ids=True)


async def test_long_prompts_are_fetched_ahead_and_answered_right(shared: Cluster, prompts: list[list[int]]) -> None:
    async with shared.async_client() as client:
        streams = [ask(client, prompt) for prompt in prompts]
        answers = [await stream.result() for stream in streams]
        again = [await ask(client, prompt).result() for prompt in prompts]  # from the prefix cache
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in again]
        for answer in answers:
            assert answer.finished.route.retries == 0
            story = await client.explain(answer.request_id)
            assert any("to be fetched ahead by decode-0" in what for _, what in story.lines), story
        await wait_idle(client)


async def test_long_prompts_given_up_at_any_time_leave_nothing(shared: Cluster, prompts: list[list[int]]) -> None:
    async with shared.async_client() as client:
        for prompt in prompts:
            stream = client.generate(prompt[::-1], max_tokens=200, ignore_eos=True)
            await asyncio.sleep(len(prompt) % 9 / 100)
            stream.close()
        await wait_idle(client)
