"""The disaggregated answer is the one engine's answer, token by token.

In float32, where the shape of a batch does not reach the tokens; on text, where the model's logits have a clear winner.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from engine.base import FinishReason, Sampling
from tests.vllm.harness import BLOCK_TOKENS, Answer, Pair, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

#: Around every block border that matters, and the ends of the range.
LENGTHS = (
    *(blocks * BLOCK_TOKENS + off for blocks in (1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 64) for off in (-1, 0, 1)),
    *(1, 2, 3, 5, 10, 16, 20, 48, 50, 77, 100, 150, 200, 300, 333, 400, 450, 500, 600, 700, 777, 900, 1100, 1300, 1500),
    *(1777, 2000, 2500, 2999, 3000),
)


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    sampling: Sampling
    #: The decode engine samples the first token again: the router's policy where feeding it back would change things.
    resample: bool


def greedy(number: int, tokens: int) -> Case:
    return Case(prompt(tokens, 101 * number), Sampling(max_tokens=12, temperature=0.0, ignore_eos=True), False)


def seeded(number: int, tokens: int) -> Case:
    sampling = Sampling(max_tokens=12, temperature=0.9, top_p=0.95, seed=1000 + number, ignore_eos=True)
    return Case(prompt(tokens, 211 * number), sampling, True)


def other_sampling() -> list[Case]:
    """Everything else that the sampler is told, each with the policy it needs."""
    text = prompt(70, 4000)
    return [
        Case(text, Sampling(max_tokens=12, temperature=0.0, presence_penalty=1.5, ignore_eos=True), True),
        Case(text, Sampling(max_tokens=12, temperature=0.0, frequency_penalty=0.7, ignore_eos=True), True),
        Case(text, Sampling(max_tokens=12, temperature=0.0, repetition_penalty=1.3, ignore_eos=True), False),
        Case(text, Sampling(max_tokens=12, temperature=1.2, top_k=20, seed=5, ignore_eos=True), True),
        Case(text, Sampling(max_tokens=12, temperature=1.0, min_p=0.05, seed=6, ignore_eos=True), True),
        Case(text, Sampling(max_tokens=40, temperature=0.0), False),
        Case(text, Sampling(max_tokens=40, temperature=0.0, min_tokens=20), False),
        Case(text, Sampling(max_tokens=40, temperature=0.0, stop_token_ids=(text[5], text[9]), ignore_eos=True), False),
        Case(text, Sampling(max_tokens=1, temperature=0.0, ignore_eos=True), False),
        Case(text, Sampling(max_tokens=2, temperature=0.0, ignore_eos=True), False),
    ]


CASES = [
    *(greedy(number, tokens) for number, tokens in enumerate(LENGTHS)),
    *(seeded(number, tokens) for number, tokens in enumerate(LENGTHS[::2])),
    *other_sampling(),
]


@pytest.fixture(scope="module")
def references() -> dict[Case, Answer]:
    return {}


async def one_by_one(pair: Pair, references: dict[Case, Answer]) -> dict[Case, Answer]:
    """The one engine's answers, computed once."""
    for case in CASES:
        if case not in references:
            references[case] = await pair.whole(case.prompt, case.sampling)
    return references


def differences(answers: dict[Case, Answer], references: dict[Case, Answer]) -> list[str]:
    return [
        f"{len(case.prompt)} tokens, {case.sampling}: {answer.token_ids} {answer.finish_reason}, "
        f"alone {references[case].token_ids} {references[case].finish_reason}"
        for case, answer in answers.items()
        if (answer.token_ids, answer.finish_reason) != (references[case].token_ids, references[case].finish_reason)
    ]


async def test_one_in_flight(pair: Pair, references: dict[Case, Answer]) -> None:
    assert len(CASES) >= 100
    alone = await one_by_one(pair, references)
    answers = {case: await pair.split(case.prompt, case.sampling, resample=case.resample) for case in CASES}
    assert differences(answers, alone) == []
    handed_over = [case for case in CASES if answers[case].staged_tokens == len(case.prompt)]
    assert len(handed_over) >= 100


async def test_eight_in_flight(pair: Pair, references: dict[Case, Answer]) -> None:
    """Also more than the engines' memory holds at once: prefills wait for leases to end, decodes are preempted."""
    alone = await one_by_one(pair, references)
    answers: dict[Case, Answer] = {}
    places = asyncio.Semaphore(8)

    async def run(case: Case) -> None:
        async with places:
            answers[case] = await pair.split(case.prompt, case.sampling, resample=case.resample)

    async with asyncio.TaskGroup() as group:
        for case in CASES:
            group.create_task(run(case))
    assert differences(answers, alone) == []


async def test_a_corrupted_block_changes_the_answer(
    pair: Pair, corrupted: Callable[[], AbstractContextManager[None]]
) -> None:
    """The tests above can fail: one block broken in transit and they do."""
    cases = [greedy(number, tokens) for number, tokens in enumerate((40, 64, 200, 500))]
    alone = {case: await pair.whole(case.prompt, case.sampling) for case in cases}
    with corrupted():
        answers = {case: await pair.split(case.prompt, case.sampling) for case in cases}
    assert len(differences(answers, alone)) == len(cases)
    answers = {case: await pair.split(case.prompt, case.sampling) for case in cases}
    assert differences(answers, alone) == []


async def test_decodes_that_are_preempted_compute_again_what_was_handed_over(pair: Pair) -> None:
    sampling = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)
    prompts = [prompt(480, 600 * number) for number in range(10)]  # 150 blocks of 159, growing to 220
    alone = [await pair.whole(text, sampling) for text in prompts]
    together = await asyncio.gather(*(pair.split(text, sampling) for text in prompts))
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


async def test_blocks_in_the_decode_engines_own_prefix_cache_are_not_taken_from_staging(pair: Pair) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    common, salt = prompt(320, 7000), pair.number()
    texts = [common, common, common + prompt(70, 9000), common[:200], common[:320]]
    alone = [await pair.whole(text, sampling) for text in texts]
    split = [await pair.split(text, sampling, cache_salt=salt) for text in texts]
    assert [answer.token_ids for answer in split] == [answer.token_ids for answer in alone]


async def test_first_tokens_that_end_the_answer_need_no_decode_engine(pair: Pair) -> None:
    text = prompt(90, 2000)
    (first, *_) = (await pair.whole(text, Sampling(max_tokens=1, temperature=0.0, ignore_eos=True))).token_ids
    stopped = await pair.split(text, Sampling(max_tokens=9, temperature=0.0, stop_token_ids=(first,), ignore_eos=True))
    assert (stopped.token_ids, stopped.finish_reason) == ([first], FinishReason.STOP)
    short = await pair.split(text, Sampling(max_tokens=1, temperature=0.0, ignore_eos=True))
    assert (short.token_ids, short.finish_reason) == ([first], FinishReason.LENGTH)
