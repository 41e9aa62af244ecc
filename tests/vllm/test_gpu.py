"""The same on a GPU: only the device's name differs."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.base import Sampling
from engine.vllm import VllmEngine
from tests.vllm.harness import GREEDY, Ahead, Pair, becomes_idle, decoded, is_idle, options, prefill_leg, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]


@asynccontextmanager
async def pair_on_one_gpu() -> AsyncIterator[Pair]:
    # bfloat16: what attention backends on GPUs have in common. Short answers, as a batch's shape can reach the tokens.
    # No digests, for they are of host memory.
    changes: dict[str, object] = {"device": "cuda", "dtype": "bfloat16", "kv_verify": False}
    changes |= {"kv_cache_bytes": 1 << 30, "staging_bytes": 256 << 20}
    prefill, decode = VllmEngine(options("prefill", **changes)), VllmEngine(options("decode", **changes))
    try:
        # One after the other: each measures the GPU's free memory when it starts.
        info = await prefill.start()
        pair = Pair(prefill, decode, (info, await decode.start()))
        lane = await decode.connect("prefill", info.kv_address)
        assert not lane.refusal
        yield pair
        for engine in (prefill, decode):
            load = await becomes_idle(engine)
            assert is_idle(load), load
    finally:
        await asyncio.gather(prefill.stop(), decode.stop())


@pytest.mark.timeout(600)
async def test_hand_over_between_two_engines_on_one_gpu() -> None:
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    async with pair_on_one_gpu() as pair:
        for number, tokens in enumerate((1, 31, 32, 33, 500, 3000)):
            text = prompt(tokens, 300 * number)
            for plain in (sampling, dataclasses.replace(sampling, temperature=0.8, seed=number)):
                resample = plain.seed is not None
                split = await pair.split(text, plain, resample=resample)
                assert split.token_ids == (await pair.whole(text, plain)).token_ids


@pytest.mark.timeout(600)
async def test_prompts_are_read_while_a_gpu_computes_them() -> None:
    """vLLM schedules asynchronously here, unless told otherwise."""
    async with pair_on_one_gpu() as pair:
        for tokens in (513, 1000, 2000, 2500, 3000):
            leg = prefill_leg(pair, tokens, 37 * tokens)
            ahead = Ahead(pair, leg)
            result = await ahead.prefill
            assert ahead.handles == [result.handle]
            assert ahead.fetch is not None
            answer = await decoded(pair, leg, result.token_id, await ahead.fetch)
            assert answer == (await pair.whole(leg.token_ids, GREEDY)).token_ids
