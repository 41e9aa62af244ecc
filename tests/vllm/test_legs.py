"""What one leg is given and gives, beside the tokens' being right."""

import asyncio
import dataclasses
from collections.abc import Awaitable

import pytest

from engine.base import DecodeLeg, FailureKind, FinishReason, LegError, PrefillLeg, Sampling, Staged, StepOutput
from tests.vllm.harness import NEWLINE, Answer, Pair, becomes_idle, collect, is_idle, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)


def prefill_leg(pair: Pair, token_ids: tuple[int, ...], sampling: Sampling = GREEDY, **changes: object) -> PrefillLeg:
    leg = PrefillLeg(
        leg_id=f"leg-{pair.number()}",
        tenant="t",
        token_ids=token_ids,
        sampling=sampling,
        hand_off=True,
        reader="decode",
    )
    return dataclasses.replace(leg, **changes)  # type: ignore[arg-type]


def decode_leg(pair: Pair, token_ids: tuple[int, ...], sampling: Sampling = GREEDY, **changes: object) -> DecodeLeg:
    leg = DecodeLeg(
        leg_id=f"leg-{pair.number()}", tenant="t", token_ids=token_ids, prompt_tokens=len(token_ids), sampling=sampling
    )
    return dataclasses.replace(leg, **changes)  # type: ignore[arg-type]


async def test_the_engine_says_what_it_serves(pair: Pair) -> None:
    info, other = pair.infos
    assert info.model == other.model
    assert info.model.eos_token_ids == (0, NEWLINE)
    assert info.kv_layout == other.kv_layout
    assert info.kv_layout["dtype"] == "float32"
    assert info.kv_incarnation != other.kv_incarnation
    assert (await pair.prefill.load()).kv_blocks_total == info.kv_blocks == 159


async def test_the_end_of_sequence_is_the_answers_last_token(pair: Pair) -> None:
    sampling = Sampling(max_tokens=60, temperature=0.0)
    answers = [await pair.whole(prompt(50, start), sampling) for start in range(0, 6000, 300)]
    ended = [answer for answer in answers if answer.finish_reason is FinishReason.STOP]
    assert len(ended) > 5
    assert all(answer.token_ids[-1] in (0, NEWLINE) for answer in ended)
    assert not any({0, NEWLINE} & set(answer.token_ids[:-1]) for answer in answers)


async def test_what_is_taken_at_once_is_the_same_answer(pair: Pair) -> None:
    sampling = dataclasses.replace(GREEDY, logprobs=2)
    leg = decode_leg(pair, prompt(50), sampling)
    yielded = await collect(pair.decode.decode(leg))
    taken: list[StepOutput] = []
    again = decode_leg(pair, prompt(50), sampling)
    last = await collect(pair.decode.decode(again, taken.append))
    assert taken
    assert {output.leg_id for output in taken} == {again.leg_id}
    assert [token for output in taken for token in output.token_ids] + last.token_ids == yielded.token_ids
    assert [entry for output in taken for entry in output.logprobs] + last.logprobs == yielded.logprobs


async def test_minimum_tokens_hold_the_end_back(pair: Pair) -> None:
    answer = await pair.split(prompt(50), Sampling(max_tokens=60, min_tokens=30, temperature=0.0))
    assert len(answer.token_ids) >= 30
    assert not {0, NEWLINE} & set(answer.token_ids[:29])


async def test_log_probabilities_are_reported_on_both_legs(pair: Pair) -> None:
    sampling = dataclasses.replace(GREEDY, logprobs=3)
    alone, split = await pair.whole(prompt(80), sampling), await pair.split(prompt(80), sampling)
    assert [entry.token_id for entry in split.logprobs] == split.token_ids == alone.token_ids
    for ours, theirs in zip(split.logprobs, alone.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert len(ours.top) == 3
        assert ours.top[0][0] == ours.token_id  # greedy: the likeliest was taken
        assert list(ours.top) == sorted(ours.top, key=lambda entry: -entry[1])


async def test_prefill_tells_its_times_and_its_prefix_hits(pair: Pair) -> None:
    text, salt = prompt(200, 5000), pair.number()
    cold = await pair.prefill.prefill(prefill_leg(pair, text, cache_salt=salt, hand_off=False))
    warm = await pair.prefill.prefill(prefill_leg(pair, text, cache_salt=salt, hand_off=False))
    other = await pair.prefill.prefill(prefill_leg(pair, text, cache_salt=pair.number(), hand_off=False))
    assert (cold.cached_tokens, warm.cached_tokens, other.cached_tokens) == (0, 192, 0)
    assert cold.prefill_s > 0
    assert cold.queue_s >= 0
    assert cold.handle is None


@pytest.mark.parametrize(
    "token_ids", [(), (4096,), (5, -1, 5), (1 << 31,), (7,) * 4096, (7,) * 5000], ids=lambda ids: f"{len(ids)} tokens"
)
async def test_a_prompt_that_cannot_be_computed_is_refused_and_the_engine_lives(
    pair: Pair, token_ids: tuple[int, ...]
) -> None:
    with pytest.raises(LegError) as refused:
        await pair.prefill.prefill(prefill_leg(pair, token_ids))
    assert refused.value.kind is FailureKind.INVALID
    with pytest.raises(LegError) as refused:
        await collect(pair.decode.decode(decode_leg(pair, token_ids)))
    assert refused.value.kind is FailureKind.INVALID
    assert len((await pair.whole(prompt(40), GREEDY)).token_ids) == 8


async def test_a_prompt_that_fills_the_context_but_for_one_token_ends_there(pair: Pair) -> None:
    text = prompt(4095)
    result = await pair.prefill.prefill(prefill_leg(pair, text))
    assert result.finish_reason is FinishReason.LENGTH
    if result.handle:
        await pair.prefill.release(result.handle)


async def test_a_handle_is_for_one_reader_once(pair: Pair) -> None:
    result = await pair.prefill.prefill(prefill_leg(pair, prompt(100), reader="somebody else"))
    assert result.handle is not None
    with pytest.raises(LegError) as refused:
        await pair.decode.fetch(result.handle, 5.0)
    assert refused.value.kind is FailureKind.INVALID
    await pair.prefill.release(result.handle)

    result = await pair.prefill.prefill(prefill_leg(pair, prompt(100)))
    assert result.handle is not None
    staged = await pair.decode.fetch(result.handle, 5.0)
    with pytest.raises(LegError) as refused:
        await pair.decode.fetch(result.handle, 5.0)
    assert refused.value.kind is FailureKind.INVALID
    await pair.decode.discard(staged)
    await pair.decode.discard(staged)


async def test_pinned_blocks_are_free_when_their_lease_is_released(pair: Pair) -> None:
    result = await pair.prefill.prefill(prefill_leg(pair, prompt(100)))
    assert result.handle is not None
    load = await pair.prefill.load()
    assert (load.leases_held, load.leased_blocks) == (1, 4)
    assert load.kv_blocks_total - load.kv_blocks_free == 4
    await pair.prefill.release(result.handle)
    assert is_idle(await becomes_idle(pair.prefill))
    await pair.prefill.release(result.handle)


async def test_a_lease_that_nobody_reads_expires_and_its_handle_is_stale(pair: Pair) -> None:
    expired = (await pair.prefill.load()).leases_expired_total
    result = await pair.prefill.prefill(prefill_leg(pair, prompt(100), lease_ttl_s=0.05))
    assert result.handle is not None
    load = await becomes_idle(pair.prefill)
    assert is_idle(load), load
    assert load.leases_expired_total == expired + 1
    with pytest.raises(LegError) as stale:
        await pair.decode.fetch(result.handle, 5.0)
    assert stale.value.kind is FailureKind.TRANSFER


async def test_a_full_lease_board_refuses_the_hand_off_and_no_more(pair: Pair) -> None:
    held = [await pair.prefill.prefill(prefill_leg(pair, prompt(20, number))) for number in range(24)]
    with pytest.raises(LegError) as refused:
        await pair.prefill.prefill(prefill_leg(pair, prompt(20, 500)))
    assert refused.value.kind is FailureKind.REJECTED
    assert (await pair.prefill.prefill(prefill_leg(pair, prompt(20, 600), hand_off=False))).handle is None
    for result in held:
        assert result.handle is not None
        await pair.prefill.release(result.handle)
    result = await pair.prefill.prefill(prefill_leg(pair, prompt(20, 700)))
    assert result.handle is not None
    await pair.prefill.release(result.handle)


async def outcome(leg: Awaitable[Answer]) -> FailureKind | None:
    try:
        await leg
    except LegError as error:
        return error.kind
    return None


async def test_extreme_sampling_ends_no_engine(pair: Pair) -> None:
    """What a router should have refused, or need not know to be special."""
    far = 1 << 30
    plain = Sampling(max_tokens=3, temperature=1.0)
    changes: list[dict[str, object]] = [
        {"seed": -(1 << 63)},
        {"seed": (1 << 63) - 1},
        {"seed": 7, "temperature": 0.0},
        {"seed": 7, "logprobs": 5, "presence_penalty": 2.0, "frequency_penalty": -2.0},
        {"stop_token_ids": (far, -1), "min_tokens": 2},
        {"top_k": far},
        {"top_k": 1, "top_p": 1e-9, "min_p": 1.0},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"top_p": float("nan")},
        {"repetition_penalty": 1e-9},
        {"repetition_penalty": 1e9},
        {"logprobs": 10_000},
        {"max_tokens": 10_000_000, "temperature": 0.0, "stop_token_ids": tuple(range(4096))},
        {"max_tokens": 0},
        {"max_tokens": 2, "min_tokens": 5},
    ]
    for change in changes:
        sampling = dataclasses.replace(plain, **change)  # type: ignore[arg-type]
        # 1,200 tokens are computed in three steps, of which two end within the prompt.
        for text in (prompt(40), prompt(1200)):
            assert await outcome(pair.whole(text, sampling)) in (None, FailureKind.INVALID), sampling
    assert len((await pair.whole(prompt(40), GREEDY)).token_ids) == 8


async def test_what_was_staged_and_is_gone_is_computed_again(pair: Pair) -> None:
    text = prompt(150, 800)
    nothing = Staged(staged_id="never was", tokens=150, transport="", transfer_bytes=0, fetch_s=0.0)
    answer = await collect(pair.decode.decode(decode_leg(pair, text, staged=nothing, cache_salt=pair.number())))
    assert answer.token_ids == (await pair.whole(text, GREEDY)).token_ids


async def test_more_prefills_than_memory_wait_for_leases_to_end(pair: Pair) -> None:
    """Six prompts of 63 blocks, of which the engine holds two."""
    legs = [prefill_leg(pair, prompt(2000, 900 * number), lease_ttl_s=0.2) for number in range(6)]
    results = await asyncio.gather(*(pair.prefill.prefill(leg) for leg in legs))
    assert all(result.handle for result in results)


async def test_the_seed_of_an_engine_does_not_reach_this_process(pair: Pair) -> None:
    import random

    assert random.random() != random.Random(0).random()
