"""Two real engines and the legs of a request through them, as the workers and the router would run them."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from tokenizers import Tokenizer

from engine.base import (
    DecodeLeg,
    EngineInfo,
    EngineLoad,
    EngineOptions,
    FinishReason,
    PrefillLeg,
    PrefillResult,
    Sampling,
    Staged,
    StepOutput,
    TokenLogprobs,
)
from engine.vllm import VllmEngine

MODEL = Path(__file__).parents[2] / "models" / "tandem-nano"
BLOCK_TOKENS = 32
#: 159 blocks: enough for one prompt of the longest length, and too few for what the tests ask for at once.
KV_CACHE_BYTES = 160 * BLOCK_TOKENS * 4096


def options(name: str, **changes: object) -> EngineOptions:
    plain = EngineOptions(
        name=name,
        model=str(MODEL),
        served_model_name="tandem-nano",
        cluster_secret=b"a secret of the tests, 32 bytes.",
        block_tokens=BLOCK_TOKENS,
        kv_cache_bytes=KV_CACHE_BYTES,
        staging_bytes=KV_CACHE_BYTES,
        max_running=16,
        max_batched_tokens=512,
        dtype="float32",
        kv_verify=True,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


_TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
NEWLINE: int = _TOKENIZER.encode("\n").ids[0]
#: A long piece of text like the model's training text, on which its logits have a clear winner.
_TEXT: tuple[int, ...] = tuple(_TOKENIZER.encode(Path(os.__file__).read_text()).ids)


def prompt(tokens: int, start: int = 0) -> tuple[int, ...]:
    """So many tokens of real text; another start gives another prompt."""
    start %= len(_TEXT) - tokens
    return _TEXT[start : start + tokens]


@dataclass
class Answer:
    token_ids: list[int]
    finish_reason: FinishReason | None
    cached_tokens: int = 0
    staged_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class Pair:
    prefill: VllmEngine
    decode: VllmEngine
    infos: tuple[EngineInfo, EngineInfo]
    numbers: Iterator[int] = field(default_factory=count)

    def number(self) -> str:
        return str(next(self.numbers))

    async def whole(self, prompt: tuple[int, ...], sampling: Sampling, engine: VllmEngine | None = None) -> Answer:
        """What one engine answers by itself, its prefix cache kept out."""
        number = self.number()
        leg = DecodeLeg(
            leg_id=f"whole-{number}",
            tenant="t",
            token_ids=prompt,
            prompt_tokens=len(prompt),
            sampling=sampling,
            cache_salt=number,
        )
        return await collect((engine or self.prefill).decode(leg))

    async def split(
        self, prompt: tuple[int, ...], sampling: Sampling, *, resample: bool = False, cache_salt: str | None = None
    ) -> Answer:
        """What the two engines answer together."""
        number = self.number()
        salt = number if cache_salt is None else cache_salt
        first = await self.prefill.prefill(
            PrefillLeg(
                leg_id=f"split-{number}/p",
                tenant="t",
                token_ids=prompt,
                sampling=sampling,
                cache_salt=salt,
                hand_off=True,
                reader="decode",
                resample=resample,
            )
        )
        if first.finish_reason and not resample:
            return Answer([first.token_id], first.finish_reason)
        assert first.handle is not None
        try:
            staged = await self.decode.fetch(first.handle, 60.0)
        except BaseException:
            await asyncio.shield(self.prefill.release(first.handle))
            raise
        reused = () if resample else (first.token_id,)
        left = (
            sampling
            if resample
            else replace(sampling, max_tokens=sampling.max_tokens - 1, min_tokens=max(0, sampling.min_tokens - 1))
        )
        leg = DecodeLeg(
            leg_id=f"split-{number}/d",
            tenant="t",
            token_ids=prompt + reused,
            prompt_tokens=len(prompt),
            sampling=left,
            cache_salt=salt,
            staged=staged,
        )
        answer = await collect(self.decode.decode(leg))
        answer.token_ids[:0] = reused
        if first.logprobs and reused:
            answer.logprobs.insert(0, first.logprobs)
        answer.staged_tokens = staged.tokens
        return answer


async def collect(outputs: AsyncIterator[StepOutput]) -> Answer:
    answer = Answer([], None)
    async for output in outputs:
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs
        answer.cached_tokens += output.cached_tokens
        answer.finish_reason = output.finish_reason
    return answer


GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def prefill_leg(pair: Pair, tokens: int, start: int) -> PrefillLeg:
    return PrefillLeg(
        leg_id=f"overlap-{pair.number()}",
        tenant="t",
        token_ids=prompt(tokens, start),
        sampling=GREEDY,
        cache_salt=pair.number(),
        hand_off=True,
        reader="decode",
    )


class Ahead:
    """The prefill of a leg, and the fetch that begins when its first chunk is offered."""

    def __init__(self, pair: Pair, leg: PrefillLeg) -> None:
        self._pair = pair
        self.handles: list[bytes] = []
        self.offered = asyncio.Event()
        self.fetch: asyncio.Task[Staged] | None = None
        self.prefill: asyncio.Task[PrefillResult] = asyncio.create_task(pair.prefill.prefill(leg, self._offered))

    def _offered(self, handle: bytes) -> None:
        assert not self.prefill.done()
        self.handles.append(handle)
        self.fetch = asyncio.create_task(self._pair.decode.fetch(handle, 60.0, ahead=True))
        self.offered.set()


async def decoded(pair: Pair, leg: PrefillLeg, first: int, staged: Staged) -> list[int]:
    order = DecodeLeg(
        leg_id=leg.leg_id,
        tenant="t",
        token_ids=(*leg.token_ids, first),
        prompt_tokens=len(leg.token_ids),
        sampling=Sampling(max_tokens=11, temperature=0.0, ignore_eos=True),
        cache_salt=leg.cache_salt,
        staged=staged,
    )
    return [first, *(await collect(pair.decode.decode(order))).token_ids]


def is_idle(load: EngineLoad) -> bool:
    return (
        load.running + load.waiting + load.leases_held + load.leased_blocks + load.staged_pages == 0
        and load.kv_blocks_free == load.kv_blocks_total > 0
    )


async def becomes_idle(engine: VllmEngine, within_s: float = 20.0) -> EngineLoad:
    """The engine's load once nothing is held any more, or as it is after `within_s`: less than a lease lives."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while not is_idle(await engine.load()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    return await engine.load()


def core_pid(engine: VllmEngine) -> int:
    assert engine._process is not None
    return engine._process.pid
