"""The simulated engine behind the seam: alone, and two of them handing prompts over through the real node."""

import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import engine.sim
from engine.base import (
    DecodeLeg,
    EngineInfo,
    EngineLoad,
    EngineOptions,
    FailureKind,
    FinishReason,
    LegError,
    PeerLane,
    PrefillLeg,
    PrefillResult,
    Sampling,
    Staged,
    StepOutput,
)
from engine.sim import SimEngine, end_of_step
from engine.step_time import StepWork, step_time
from kv_transfer import registry
from kv_transfer.inproc import InprocHub, InprocTransport, ReadEvent
from kv_transfer.transport import STAGING, Segments, TransportError

VOCAB = 800
CONFIG = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "bos_token_id": 0,
    "eos_token_id": [0, 2],
    "pad_token_id": 1,
}
GREEDY = Sampling(max_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def options(model: Path, name: str = "engine", **more: Any) -> EngineOptions:
    plain = EngineOptions(
        name=name,
        model=str(model),
        served_model_name="nano",
        cluster_secret=b"secret" * 6,
        transports=("inproc",),
        kv_bytes_per_token=64,
        kv_cache_bytes=64 * 32 * 1000,
        staging_bytes=64 * 32 * 800,
    )
    return replace(plain, **more)


@asynccontextmanager
async def running(*engines: SimEngine) -> AsyncIterator[None]:
    """Stops them at the end, when they must be empty."""
    try:
        for sim in engines:
            await sim.start()
        yield
        for sim in engines:
            await becomes_idle(sim)
            sim.check_integrity()
    finally:
        for sim in engines:
            await sim.stop()


async def becomes_idle(sim: SimEngine) -> None:
    """Waits for what was released to have arrived: less than leases live, which end by themselves then."""
    async with asyncio.timeout(20):
        while not is_idle(await sim.load()):  # noqa: ASYNC110 - there is no event of it: it is what tests look at
            await asyncio.sleep(0.005)


def is_idle(load: EngineLoad) -> bool:
    busy = load.running, load.waiting, load.leases_held, load.leased_blocks, load.staged_pages
    return not any(busy) and load.kv_blocks_free == load.kv_blocks_total


@pytest.fixture
async def sim(model: Path) -> AsyncIterator[SimEngine]:
    started = SimEngine(options(model), InprocHub())
    async with running(started):
        yield started


@dataclass
class Pair:
    prefill: SimEngine
    decode: SimEngine

    async def answer(self, leg_id: str, prompt: tuple[int, ...], sampling: Sampling) -> list[int]:
        """As the router does it: the first token is reused, or sampled again where a seed makes that differ."""
        resample = sampling.seed is not None
        prefilled = await self.prefill.prefill(prefill_leg(f"{leg_id}/p", prompt, sampling, resample=resample))
        first = [] if resample else [prefilled.token_id]
        if prefilled.handle is None:
            assert prefilled.finish_reason
            return [prefilled.token_id]
        staged = await self.decode.fetch(prefilled.handle, 60)
        rest = replace(sampling, max_tokens=sampling.max_tokens - len(first))
        leg = decode_leg(f"{leg_id}/d", (*prompt, *first), rest, prompt_tokens=len(prompt), staged=staged)
        return first + await collect(self.decode, leg)


@asynccontextmanager
async def pair_of(prefill: EngineOptions, decode: EngineOptions) -> AsyncIterator[Pair]:
    hub = InprocHub()
    pair = Pair(SimEngine(prefill, hub), SimEngine(decode, hub))
    async with running(pair.prefill, pair.decode):
        yield pair


async def meet(pair: Pair) -> PeerLane:
    """As workers do before the first request."""
    return await pair.decode.connect("p", address_of(pair.prefill))


def address_of(sim: SimEngine) -> str:
    assert sim._state is not None
    return sim._state.info.kv_address


@pytest.fixture
async def pair(model: Path) -> AsyncIterator[Pair]:
    async with pair_of(options(model, "p"), options(model, "d")) as started:
        yield started


def prefill_leg(leg_id: str, prompt: tuple[int, ...], sampling: Sampling = GREEDY, **more: Any) -> PrefillLeg:
    leg = PrefillLeg(leg_id=leg_id, tenant="t", token_ids=prompt, sampling=sampling, hand_off=True, reader="d")
    return replace(leg, **more)


def decode_leg(leg_id: str, token_ids: tuple[int, ...], sampling: Sampling = GREEDY, **more: Any) -> DecodeLeg:
    leg = DecodeLeg(leg_id=leg_id, tenant="t", token_ids=token_ids, prompt_tokens=len(token_ids), sampling=sampling)
    return replace(leg, **more)


async def collect(sim: SimEngine, leg: DecodeLeg) -> list[int]:
    tokens: list[int] = []
    reasons = []
    async for output in sim.decode(leg):
        assert output.leg_id == leg.leg_id
        tokens += output.token_ids
        reasons.append(output.finish_reason)
    assert reasons[-1] is not None
    assert not any(reasons[:-1])
    return tokens


def prompt_of(count: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.choices(range(VOCAB), k=count))


async def take(sim: SimEngine, leg: DecodeLeg) -> list[int]:
    """`collect`, of outputs that are taken as they come but for the last."""
    taken: list[StepOutput] = []
    yielded = [output async for output in sim.decode(leg, taken.append)]
    assert [output.finish_reason is None for output in yielded] == [False]
    assert not any(output.finish_reason for output in taken)
    return [token for output in (*taken, *yielded) for token in output.token_ids]


async def failure(awaitable: Awaitable[object]) -> LegError:
    with pytest.raises(LegError) as caught:
        await awaitable
    return caught.value


# Answers


async def test_what_is_taken_at_once_is_the_same_answer(pair: Pair) -> None:
    for count in (1, 2, 24):
        sampling = replace(GREEDY, max_tokens=count)
        asked = [decode_leg(f"{count}/{seed}", prompt_of(100, seed), sampling) for seed in range(4)]
        yielded = await asyncio.gather(*(collect(pair.decode, leg) for leg in asked))
        again = [replace(leg, leg_id=f"{leg.leg_id} again") for leg in asked]
        assert await asyncio.gather(*(take(pair.decode, leg) for leg in again)) == yielded


async def test_a_leg_that_takes_its_outputs_is_aborted_like_any_other(pair: Pair) -> None:
    taken = asyncio.Event()
    outputs = pair.decode.decode(
        decode_leg("a", prompt_of(100), replace(GREEDY, max_tokens=2000)), lambda output: taken.set()
    )
    reading = asyncio.ensure_future(anext(outputs))
    await taken.wait()
    reading.cancel()
    await asyncio.wait([reading])
    load = await pair.decode.load()
    assert (load.running, load.waiting, load.kv_blocks_free) == (0, 0, load.kv_blocks_total)


async def test_a_thousand_prompts_through_two_engines_are_answered_as_by_one(model: Path) -> None:
    """1 to 3,000 tokens, greedy and seeded, eight in flight, half of them with a prefix of others. Every engine has
    chunks of its own size, and the one has other blocks, too."""
    draw = random.Random(1)
    prefixes = [prompt_of(1500, seed=i) for i in range(8)]

    def draw_prompt(index: int) -> tuple[int, ...]:
        count = draw.randint(1, 3000)
        own = prompt_of(count, seed=1000 + index)
        shared = draw.randrange(count) if draw.random() < 0.5 else 0
        return (prefixes[index % 8][:shared] + own)[:count]

    def draw_sampling(index: int) -> Sampling:
        count = draw.randint(1, 24)
        return (
            Sampling(max_tokens=count, temperature=1.0, seed=index) if index % 2 else replace(GREEDY, max_tokens=count)
        )

    requests = [(str(index), draw_prompt(index), draw_sampling(index)) for index in range(1000)]
    in_flight = asyncio.Semaphore(8)

    async def ask(answer: Callable[..., Awaitable[list[int]]], *request: Any) -> list[int]:
        async with in_flight:
            return await answer(*request)

    whole = SimEngine(options(model, "whole", block_tokens=48), InprocHub())
    async with running(whole):
        asked = (ask(lambda i, p, s: collect(whole, decode_leg(i, p, s)), *request) for request in requests)
        right = await asyncio.gather(*asked)
    assert [len(answer) for answer in right] == [sampling.max_tokens for _, _, sampling in requests]

    for share in range(5):
        chunks = [draw.randint(16, 600), draw.randint(16, 600)]
        sizes = [
            replace(options(model, n, max_running=16), max_batched_tokens=c) for n, c in zip("pd", chunks, strict=True)
        ]
        async with pair_of(*sizes) as pair:
            await meet(pair)
            mine = requests[share::5]
            got = await asyncio.gather(*(ask(pair.answer, *request) for request in mine))
            assert got == right[share::5]
            moved = await pair.decode.load()
            assert moved.transfer_bytes_total > 0
            assert moved.extra["kv_mismatches_total"] == 0


class Corruptor:
    """Breaks one byte of the n-th block that a read brings in, for reads of KV bytes only."""

    def __init__(self) -> None:
        self.block: int | None = None
        self.broken = 0
        self._draw = random.Random(0)

    def __call__(self, event: ReadEvent) -> None:
        if self.block is None or not event.done or event.segments.local_region != STAGING:
            return
        block_bytes = 64 * 32
        sizes = [int(size) for size in event.segments.sizes]
        assert sum(sizes) % block_bytes == 0
        target = self.block * block_bytes + self._draw.randrange(block_bytes)
        for index, size in enumerate(sizes):
            if target < size:
                event.destination(index)[target] ^= 1 << self._draw.randrange(8)
                self.broken += 1
                return
            target -= size


@pytest.fixture
def corruptor(monkeypatch: pytest.MonkeyPatch) -> Corruptor:
    """Reads of engines started from here on go through it."""
    hook = Corruptor()
    make = registry.make_transports

    def make_with_hook(*args: Any, **kwargs: Any) -> list[Any]:
        made = make(*args, **kwargs)
        for transport in made:
            assert isinstance(transport, InprocTransport)
            transport.hook = hook
        return made

    monkeypatch.setattr(engine.sim, "make_transports", make_with_hook)
    return hook


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_tokens=16, temperature=1.0, seed=3)])
async def test_one_wrong_byte_in_transit_makes_wrong_tokens(
    corruptor: Corruptor, model: Path, sampling: Sampling
) -> None:
    """The exactness test can fail."""
    prompt = prompt_of(32 * 6)
    plain = replace(options(model), prefix_caching=False)
    async with pair_of(replace(plain, name="p"), replace(plain, name="d")) as pair:
        right = await pair.answer("right", prompt, sampling)
        assert await collect(pair.prefill, decode_leg("whole", prompt, sampling)) == right
        for block in range(6):
            corruptor.block = block
            wrong = await pair.answer(f"wrong {block}", prompt, sampling)
            assert corruptor.broken == block + 1
            fed_back = 0 if sampling.seed is not None else 1
            assert not any(w == r for w, r in zip(wrong[fed_back:], right[fed_back:], strict=True))
        corruptor.block = None
        assert await pair.answer("right again", prompt, sampling) == right
        assert (await pair.decode.load()).extra["kv_mismatches_total"] == 6


async def test_every_token_is_streamed_and_the_last_output_says_why_it_is_the_last(sim: SimEngine) -> None:
    outputs = [output async for output in sim.decode(decode_leg("a", prompt_of(40)))]
    assert sum(len(output.token_ids) for output in outputs) == 16
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + [FinishReason.LENGTH]
    assert len(outputs) > 1
    again = [output async for output in sim.decode(decode_leg("b", prompt_of(40), replace(GREEDY, logprobs=2)))]
    assert again[0].cached_tokens == 32
    assert {output.cached_tokens for output in again[1:]} == {0}
    assert all(len(output.logprobs) == len(output.token_ids) for output in again)


async def test_a_reader_that_lags_gets_its_outputs_joined(sim: SimEngine) -> None:
    async with aclosing(stream(sim, decode_leg("slow", prompt_of(5), replace(GREEDY, logprobs=0)))) as outputs:
        first = await anext(outputs)
        await collect(sim, decode_leg("fast", prompt_of(5), replace(GREEDY, max_tokens=50)))
        second = await anext(outputs)
    assert len(first.token_ids) + len(second.token_ids) == 16
    assert len(second.logprobs) == len(second.token_ids)
    assert second.finish_reason is FinishReason.LENGTH


def stream(sim: SimEngine, leg: DecodeLeg) -> Any:
    return sim.decode(leg)


# The hand-off


async def test_the_first_token_of_an_answer_of_one_ends_it_without_a_hand_off(pair: Pair) -> None:
    one = replace(GREEDY, max_tokens=1)
    result = await pair.prefill.prefill(prefill_leg("a", prompt_of(5), one))
    assert result.finish_reason is FinishReason.LENGTH
    assert result.handle is None


async def test_leased_blocks_count_as_used_until_released(pair: Pair) -> None:
    result = await pair.prefill.prefill(prefill_leg("a", prompt_of(100)))
    assert result.handle is not None
    load = await pair.prefill.load()
    assert (load.leases_held, load.leased_blocks) == (1, 4)
    assert load.kv_blocks_free == load.kv_blocks_total - 4
    await pair.prefill.release(result.handle)
    await becomes_idle(pair.prefill)
    error = await failure(pair.decode.fetch(result.handle, 5))
    assert error.kind is FailureKind.TRANSFER
    await pair.prefill.release(result.handle)


@pytest.mark.parametrize("tokens", [100, 2000], ids=["at once", "while it is computed"])
async def test_a_bit_that_flips_in_leased_memory_is_found_before_anything_attends_to_it(
    model: Path, tokens: int
) -> None:
    verified = options(model, kv_verify=True, max_batched_tokens=512)
    async with pair_of(replace(verified, name="p"), replace(verified, name="d")) as pair:
        prompt, state = prompt_of(tokens), pair.prefill._state
        assert state is not None
        offered: list[bytes] = []
        result = await pair.prefill.prefill(prefill_leg("a", prompt), offered.append)
        assert offered == ([result.handle] if tokens > 512 else [])
        assert result.handle is not None
        block = state.core._leases["a"].blocks[2]
        state.core._memory.arena[block * state.core._memory.block_bytes + 9] ^= 4
        error = await failure(pair.decode.fetch(result.handle, 5))
        assert error.kind is FailureKind.TRANSFER, "its prefill is done again"
        assert "1 of" in error.detail
        load = await pair.decode.load()
        assert (load.transfers_corrupt_total, load.transfer_failures_total, load.staged_pages) == (1, 1, 0)
        await becomes_idle(pair.prefill)
        assert await pair.answer("b", prompt_of(tokens, seed=1), GREEDY)


async def test_an_idle_engine_learns_that_a_lease_has_run_out(pair: Pair) -> None:
    await pair.prefill.prefill(prefill_leg("a", prompt_of(100), lease_ttl_s=0.05))
    await becomes_idle(pair.prefill)
    assert (await pair.prefill.load()).leases_expired_total == 1


async def test_legs_wait_for_leased_blocks_and_go_on_when_a_lease_ends(model: Path) -> None:
    small = options(model, kv_cache_bytes=64 * 32 * 10)
    async with pair_of(replace(small, name="p"), replace(small, name="d")) as pair:
        first = await pair.prefill.prefill(prefill_leg("first", prompt_of(200)))
        assert first.handle is not None
        waiting = asyncio.create_task(pair.prefill.prefill(prefill_leg("second", prompt_of(200, seed=1))))
        await asyncio.sleep(0.02)
        assert (await pair.prefill.load()).waiting == 1
        await pair.decode.discard(await pair.decode.fetch(first.handle, 5))
        second = await waiting
        assert second.queue_s > 0
        assert second.handle is not None
        await pair.prefill.release(second.handle)


async def test_staged_bytes_serve_one_leg_or_none(pair: Pair) -> None:
    prompt = prompt_of(70)
    staged = await fetched(pair, "a", prompt)
    assert (await pair.decode.load()).staged_pages == 3
    await pair.decode.discard(staged)
    await pair.decode.discard(staged)
    error = await failure(collect(pair.decode, decode_leg("a", prompt, staged=staged)))
    assert error.kind is FailureKind.TRANSFER
    staged = await fetched(pair, "b", prompt)
    await collect(pair.decode, decode_leg("b", prompt, staged=staged))
    error = await failure(collect(pair.decode, decode_leg("c", prompt, staged=staged)))
    assert error.kind is FailureKind.TRANSFER


async def fetched(pair: Pair, leg_id: str, prompt: tuple[int, ...]) -> Staged:
    result = await pair.prefill.prefill(prefill_leg(leg_id, prompt))
    assert result.handle is not None
    staged = await pair.decode.fetch(result.handle, 5)
    assert staged.tokens == len(prompt)
    assert staged.transfer_bytes == -(-len(prompt) // 32) * 64 * 32
    return staged


async def test_handles_are_refused_when_used_twice_or_by_another(pair: Pair) -> None:
    result = await pair.prefill.prefill(prefill_leg("a", prompt_of(70)))
    assert result.handle is not None
    assert (await failure(pair.prefill.fetch(result.handle, 5))).kind is FailureKind.INVALID
    assert (await failure(pair.decode.fetch(result.handle[:-1], 5))).kind is FailureKind.INVALID
    staged = await pair.decode.fetch(result.handle, 5)
    assert (await failure(pair.decode.fetch(result.handle, 5))).kind is FailureKind.INVALID
    await pair.decode.discard(staged)


async def test_no_staging_room_is_a_refusal_that_leaves_the_handle_good(model: Path) -> None:
    async with pair_of(options(model, "p"), options(model, "d", staging_bytes=64 * 32 * 4)) as pair:
        in_the_way = await fetched(pair, "in the way", prompt_of(100))
        result = await pair.prefill.prefill(prefill_leg("a", prompt_of(100)))
        assert result.handle is not None
        assert (await failure(pair.decode.fetch(result.handle, 5))).kind is FailureKind.REJECTED
        await pair.decode.discard(in_the_way)
        await pair.decode.discard(await pair.decode.fetch(result.handle, 5))


async def test_different_models_do_not_exchange_blocks(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5}))
    async with pair_of(options(model, "p"), options(tmp_path, "d")) as pair:
        assert "revision" in (await meet(pair)).refusal


async def test_engines_that_agree_are_connected(pair: Pair) -> None:
    lane = await meet(pair)
    assert (lane.transport, lane.refusal) == ("inproc", "")


# Cancelling


async def test_a_cancelled_prefill_leaves_nothing_wherever_it_was(model: Path) -> None:
    """Paced, so that legs are cancelled waiting, computing, and just when their lease has been offered."""
    async with pair_of(
        options(model, "p", max_running=4, speedup=50, max_batched_tokens=128), options(model, "d")
    ) as pair:
        for round_ in range(6):
            legs = [prefill_leg(f"{round_}/{i}", prompt_of(300, seed=i), lease_ttl_s=600) for i in range(12)]
            tasks = [asyncio.create_task(pair.prefill.prefill(leg)) for leg in legs]
            await asyncio.sleep(0.001 * round_)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, PrefillResult) and result.handle:
                    await pair.prefill.release(result.handle)
            await becomes_idle(pair.prefill)
            pair.prefill.check_integrity(read_memory=True)


async def test_a_prefill_cancelled_after_its_lease_was_offered_ends_the_lease(pair: Pair) -> None:
    task = asyncio.create_task(pair.prefill.prefill(prefill_leg("a", prompt_of(100), lease_ttl_s=600)))
    prefill = None
    while prefill is None or not prefill.result.done():
        await asyncio.sleep(0)
        prefill = pair.prefill._prefills.get("a", prefill)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await becomes_idle(pair.prefill)


async def test_a_closed_stream_aborts_its_leg(pair: Pair) -> None:
    staged = await fetched(pair, "a", prompt_of(100))
    leg = decode_leg("a", prompt_of(100), replace(GREEDY, max_tokens=3000), staged=staged)
    async with aclosing(stream(pair.decode, leg)) as outputs:
        await anext(outputs)
        load = await pair.decode.load()
        assert (load.running, load.staged_pages) == (1, 0)
    load = await pair.decode.load()
    assert (load.running, load.kv_blocks_free) == (0, load.kv_blocks_total)


async def test_a_reader_cancelled_before_its_leg_was_admitted_gives_staging_back(model: Path) -> None:
    async with pair_of(options(model, "p"), options(model, "d", max_running=1)) as pair:
        staged = await fetched(pair, "a", prompt_of(100))
        busy = asyncio.create_task(
            collect(pair.decode, decode_leg("busy", prompt_of(5), replace(GREEDY, max_tokens=3000)))
        )
        while (await pair.decode.load()).running == 0:  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0)
        waiting = asyncio.create_task(collect(pair.decode, decode_leg("a", prompt_of(100), staged=staged)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (await pair.decode.load()).staged_pages == 4
        waiting.cancel()
        await asyncio.wait([waiting])
        load = await pair.decode.load()
        assert (load.running, load.waiting, load.staged_pages) == (1, 0, 0)
        busy.cancel()
        await asyncio.wait([busy])


async def test_a_cancelled_fetch_leaves_no_page_taken(corruptor: Corruptor, model: Path) -> None:
    async with pair_of(options(model, "p"), options(model, "d")) as pair:
        for delay in (0, 0.0005, 0.001, 0.002, 0.004):
            result = await pair.prefill.prefill(prefill_leg(f"a{delay}", prompt_of(3000), lease_ttl_s=600))
            assert result.handle is not None
            task = asyncio.create_task(pair.decode.fetch(result.handle, 5))
            await asyncio.sleep(delay)
            if not task.cancel():
                await pair.decode.discard(task.result())
            await asyncio.gather(task, return_exceptions=True)
            await pair.prefill.release(result.handle)
            await becomes_idle(pair.decode)


async def test_a_cancelled_fetch_stops_reading(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces long; cancelled after the first."""
    sizes = {"kv_bytes_per_token": 4096, "kv_cache_bytes": 32 << 20, "staging_bytes": 32 << 20}
    async with pair_of(options(model, "p", **sizes), options(model, "d", **sizes)) as pair:
        await meet(pair)
        result = await pair.prefill.prefill(prefill_leg("a", prompt_of(3000)))
        assert result.handle is not None
        reads: list[Segments] = []
        reading, go_on = threading.Event(), threading.Event()
        read = InprocTransport.read

        def slow_read(self: InprocTransport, peer: str, segments: Segments, timeout_s: float) -> None:
            read(self, peer, segments, timeout_s)
            reads.append(segments)
            reading.set()
            go_on.wait(60)

        monkeypatch.setattr(InprocTransport, "read", slow_read)
        task = asyncio.create_task(pair.decode.fetch(result.handle, 5))
        await asyncio.to_thread(reading.wait, 60)
        task.cancel()
        await asyncio.wait([task])
        go_on.set()
        await becomes_idle(pair.decode)
        assert [segments.local_region for segments in reads] == [STAGING]


async def test_a_failed_read_is_a_failed_transfer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair_of(options(model, "p"), options(model, "d")) as pair:

        def cut(*args: object) -> None:
            raise TransportError("cut")

        result = await pair.prefill.prefill(prefill_leg("a", prompt_of(100)))
        assert result.handle is not None
        with monkeypatch.context() as patched:
            patched.setattr(InprocTransport, "read", cut)
            error = await failure(pair.decode.fetch(result.handle, 5))
        assert error.kind is FailureKind.TRANSFER
        assert (await pair.decode.load()).transfer_failures_total == 1
        await pair.prefill.release(result.handle)


async def test_two_hundred_mixed_requests_with_random_cancels_leave_nothing(pair: Pair) -> None:
    draw = random.Random(4)
    in_flight = asyncio.Semaphore(16)

    async def ask(index: int) -> None:
        prompt = prompt_of(draw.randint(1, 1500), seed=index)
        sampling = Sampling(max_tokens=draw.randint(1, 40), temperature=1.0, seed=index if index % 2 else None)
        async with in_flight:
            try:
                async with asyncio.timeout(draw.choice([0, 0.001, 0.005, 0.02, 10])):
                    await pair.answer(str(index), prompt, sampling)
            except TimeoutError:
                released = pair.prefill._state
                assert released is not None
                released.node.cancel(f"{index}/p")  # as a router does for a handle that nobody will read
                pair.prefill._woken.set()

    await asyncio.gather(*(ask(index) for index in range(200)))
    await becomes_idle(pair.prefill)
    await becomes_idle(pair.decode)


# Life and death


async def test_bad_legs_are_refused_and_the_engine_serves_on(sim: SimEngine) -> None:
    for prompt in ((), (VOCAB,), prompt_of(4096)):
        assert (await failure(sim.prefill(prefill_leg("bad", prompt)))).kind is FailureKind.INVALID
        assert (await failure(collect(sim, decode_leg("bad", prompt)))).kind is FailureKind.INVALID
    assert len(await collect(sim, decode_leg("good", prompt_of(5)))) == 16


async def test_legs_of_a_stopped_engine_fail_and_it_says_why_it_died(model: Path) -> None:
    sim = SimEngine(options(model, speedup=0.001), InprocHub())
    assert (await failure(sim.prefill(prefill_leg("early", prompt_of(5))))).kind is FailureKind.ENGINE
    await sim.start()
    dead = asyncio.create_task(sim.wait_dead())
    prefill = asyncio.create_task(failure(sim.prefill(prefill_leg("p", prompt_of(5)))))
    decode = asyncio.create_task(failure(collect(sim, decode_leg("d", prompt_of(5)))))
    await asyncio.sleep(0.01)
    assert not dead.done()
    await sim.stop()
    assert [(await task).kind for task in (prefill, decode)] == [FailureKind.ENGINE] * 2
    assert await dead == "the engine was stopped"
    assert (await failure(sim.prefill(prefill_leg("late", prompt_of(5))))).kind is FailureKind.ENGINE
    assert (await failure(sim.fetch(b"", 1))).kind is FailureKind.ENGINE
    await sim.stop()


async def test_a_defect_in_a_step_ends_the_engine_for_everyone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = SimEngine(options(model), InprocHub())
    await sim.start()
    assert sim._state is not None

    def broken(*args: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(sim._state.core, "finish", broken)
    error = await failure(collect(sim, decode_leg("d", prompt_of(5))))
    assert error.kind is FailureKind.ENGINE
    assert "a defect" in await sim.wait_dead()
    await sim.stop()


async def test_a_stopped_owner_fails_its_readers_transfer(model: Path) -> None:
    hub = InprocHub()
    owner, reader = SimEngine(options(model, "p"), hub), SimEngine(options(model, "d"), hub)
    await owner.start()
    async with running(reader):
        result = await owner.prefill(prefill_leg("a", prompt_of(100)))
        assert result.handle is not None
        await owner.stop()
        assert (await failure(reader.fetch(result.handle, 5))).kind is FailureKind.TRANSFER


async def test_it_starts_at_once_also_with_memory_for_a_real_model(model: Path) -> None:
    real = options(
        model, kv_bytes_per_token=step_time("h200-llama-3-70b-tp4").kv_bytes_per_token, kv_cache_bytes=400 * 10**9
    )
    sim = SimEngine(real, InprocHub())
    began = time.perf_counter()
    async with running(sim):
        print(f"started in {time.perf_counter() - began:.3f} s")
        assert len(await collect(sim, decode_leg("a", prompt_of(200)))) == 16


async def test_a_paced_engine_takes_the_time_of_its_model(model: Path) -> None:
    sim = SimEngine(options(model, speedup=2, step_time="h100-llama-3-70b-tp4", prefix_caching=False), InprocHub())
    row = step_time("h100-llama-3-70b-tp4")
    async with running(sim):
        result = await sim.prefill(prefill_leg("a", prompt_of(1000), hand_off=False))
        assert result.prefill_s >= row.step_s(StepWork(prefill_tokens=1000, prefill_pairs=1000**2)) / 2 - 0.001


def test_steps_of_a_paced_engine_follow_each_other_but_do_not_make_up_for_a_standstill() -> None:
    assert end_of_step(last_end=10.0, now=10.001, step_s=0.02) == pytest.approx(10.02)
    assert end_of_step(last_end=10.0, now=15.0, step_s=0.02) == pytest.approx(14.92)


# Configuration


async def test_it_says_what_it_is(model: Path) -> None:
    sim = SimEngine(options(model), InprocHub())
    info: EngineInfo = await sim.start()
    await sim.stop()
    assert (info.kind, info.block_tokens, info.kv_blocks, info.max_running) == ("sim", 32, 1000, 64)
    assert (info.model.max_model_len, info.model.vocab_size, info.model.eos_token_ids) == (4096, VOCAB, (0, 2))
    assert info.kv_layout["engine"] == "sim"
    assert info.kv_layout["segment_bytes"] == str(64 * 32)


async def test_bytes_per_token_are_the_models_unless_given(model: Path) -> None:
    sim = SimEngine(replace(options(model), kv_bytes_per_token=None), InprocHub())
    info = await sim.start()
    await sim.stop()
    assert info.kv_layout["segment_bytes"] == str(32 * 4 * 2 * 2 * 64 * 2)


async def test_the_budget_of_a_step_has_room_for_every_running_leg(model: Path) -> None:
    sim = SimEngine(options(model, max_batched_tokens=8, max_running=16), InprocHub())
    async with running(sim):
        legs = [decode_leg(str(index), prompt_of(5, seed=index)) for index in range(16)]
        assert {len(tokens) for tokens in await asyncio.gather(*(collect(sim, leg) for leg in legs))} == {16}


async def test_the_context_is_no_longer_than_its_memory(model: Path) -> None:
    sim = SimEngine(options(model, kv_cache_bytes=64 * 32 * 5), InprocHub())
    info = await sim.start()
    assert info.model.max_model_len == 160
    await sim.stop()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"model": "/nowhere"}, "config.json is missing"),
        ({"kv_cache_bytes": 100}, "kv_cache_bytes: 100 bytes hold no block"),
        ({"kv_cache_bytes": 64 * 32 * 5, "max_model_len": 500}, "max_model_len: 500 tokens do not fit"),
        ({"max_model_len": 5000}, "more than the model's 4096"),
        ({"kv_bytes_per_token": 12}, "multiple of 8"),
        ({"dtype": "int3", "kv_bytes_per_token": None}, "dtype: 'int3'"),
    ],
)
async def test_wrong_options_are_named(model: Path, wrong: dict[str, Any], why: str) -> None:
    sim = SimEngine(replace(options(model), **wrong), InprocHub())
    with pytest.raises(ValueError, match=why):
        await sim.start()
    await sim.stop()


def test_an_unknown_step_time_is_refused_before_anything_starts(model: Path) -> None:
    with pytest.raises(ValueError, match="step_time: no row 'x'"):
        SimEngine(options(model, step_time="x"))
