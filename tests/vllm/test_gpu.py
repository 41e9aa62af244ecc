"""The same on a GPU: only the device's name differs."""

import asyncio
import dataclasses

import pytest

from engine.base import Sampling
from engine.vllm import VllmEngine
from tests.vllm.harness import Pair, becomes_idle, is_idle, options, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]


@pytest.mark.timeout(600)
async def test_hand_over_between_two_engines_on_one_gpu() -> None:
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
        sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
        for number, tokens in enumerate((1, 31, 32, 33, 500, 3000)):
            text = prompt(tokens, 300 * number)
            for plain in (sampling, dataclasses.replace(sampling, temperature=0.8, seed=number)):
                resample = plain.seed is not None
                split = await pair.split(text, plain, resample=resample)
                assert split.token_ids == (await pair.whole(text, plain)).token_ids
        for engine in (prefill, decode):
            load = await becomes_idle(engine)
            assert is_idle(load), load
    finally:
        await asyncio.gather(prefill.stop(), decode.stop())
