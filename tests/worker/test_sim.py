"""Two workers with the simulated engine, real leases and real reads, and a router that does what the test says. The
simulated engine's tokens follow from the KV bytes it reads back, so a token that is right came over the right bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from decode.admission import DecodeLimits
from engine.base import EngineLoad, EngineOptions
from engine.sim import SimEngine
from engine.step_time import StepWork
from kv_transfer.api import Outcome
from kv_transfer.inproc import InprocHub
from prefill.admission import PrefillLimits
from protos import worker_link_pb2 as pb
from tests.worker.running import RunningWorker, running_worker, worker_config
from tests.worker.scripted_router import Link, sampling, scripted_router
from worker.config import Role, WorkerConfig
from worker.process import ExitCode

GREEDY_ANSWER = sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
MODEL = Path(__file__).parents[2] / "models" / "tandem-nano"


def sim_config(address: str, name: str, role: Role, **options: Any) -> WorkerConfig:
    config = worker_config(
        address,
        name=name,
        role=role,
        prefill=PrefillLimits(running=16, queued=256, lease_ttl_s=30),
        decode=DecodeLimits(legs=256, fetches=4, fetch_timeout_s=5),
        drain_grace_s=30,
    )
    engine_options = replace(
        config.engine_options,
        model=str(MODEL),
        transports=("inproc",),
        block_tokens=16,
        kv_cache_bytes=8 << 20,
        staging_bytes=2 << 20,
        kv_bytes_per_token=64,
    )
    engine_options = replace(engine_options, **options)
    return replace(config, engine="sim", engine_options=engine_options)


class Stepwise(SimEngine):
    """Takes a step only when it is told to, once it is `held`."""

    def __init__(self, options: EngineOptions, hub: InprocHub) -> None:
        super().__init__(options, hub)
        self._leave: asyncio.Semaphore | None = None

    def hold(self, *, after_steps: int) -> None:
        self._leave = asyncio.Semaphore(after_steps)

    def go_on(self) -> None:
        assert self._leave is not None
        leave, self._leave = self._leave, None
        leave.release()

    async def _pace(self, started: Any, work: StepWork) -> None:
        if self._leave is not None:
            await self._leave.acquire()
        await super()._pace(started, work)


@dataclass
class Pair:
    prefill: RunningWorker
    decode: RunningWorker
    p: Link
    d: Link
    engines: tuple[Stepwise, SimEngine]

    async def hand_over(self, leg: str, prompt: list[int]) -> bytes:
        self.p.prefill(f"{leg}/p", token_ids=prompt, hand_off=True, reader="d0", resample=True)
        done = (await self.p.next()).prefill_done
        assert done.leg_id == f"{leg}/p", done
        return done.handle

    async def decoded(self, leg: str, prompt: list[int], handle: bytes = b"") -> list[int]:
        self.d.decode(
            f"{leg}/d",
            token_ids=prompt,
            prompt_tokens=len(prompt),
            handle=handle,
            sampling=GREEDY_ANSWER,
        )
        if handle:
            fetched = (await self.d.next()).fetched
            assert fetched.transport == "inproc"
        return await self.d.outputs(f"{leg}/d")

    async def at_rest(self) -> None:
        """Nothing is open, pinned or staged, and every block is free, at both ends, before leases end by themselves."""
        for link in (self.p, self.d):
            async with asyncio.timeout(20):
                while True:
                    load = await link.next_load()
                    held = (
                        load.prefill_running + load.decode_running,
                        load.leases_held,
                        load.leased_blocks,
                        load.staged_pages,
                        load.kv_blocks_total - load.kv_blocks_free,
                    )
                    if not any(held):
                        break
        for engine in self.engines:
            engine.check_integrity(read_memory=True)


@asynccontextmanager
async def pair(**options: object) -> AsyncIterator[Pair]:
    hub = InprocHub()
    async with scripted_router() as router:
        p0 = sim_config(router.address, "p0", Role.PREFILL, **options)
        d0 = sim_config(router.address, "d0", Role.DECODE, **options)
        engines = Stepwise(p0.engine_options, hub), SimEngine(d0.engine_options, hub)
        async with running_worker(p0, engines[0]) as prefill, running_worker(d0, engines[1]) as decode:
            links = {link.hello.worker_id: link for link in [await router.link(), await router.link()]}
            yield Pair(prefill, decode, links["p0"], links["d0"], engines)


async def test_peers_meet_before_the_first_request() -> None:
    async with pair() as at:
        at.d.send(peers=pb.Peers(peers=[pb.Peer(worker_id="p0", kv=at.p.hello.kv)]))
        lane = (await at.d.next()).peer_lane
        assert (lane.peer, lane.transport, lane.refusal) == ("p0", "inproc", "")


async def test_peers_that_cannot_exchange_blocks_find_out_when_they_meet() -> None:
    hub = InprocHub()
    async with scripted_router() as router:
        here = sim_config(router.address, "p0", Role.PREFILL)
        there = sim_config(router.address, "d0", Role.DECODE)
        there = replace(there, engine_options=replace(there.engine_options, block_tokens=32))
        async with (
            running_worker(here, SimEngine(here.engine_options, hub)),
            running_worker(there, SimEngine(there.engine_options, hub)),
        ):
            links = {link.hello.worker_id: link for link in [await router.link(), await router.link()]}
            links["d0"].send(peers=pb.Peers(peers=[pb.Peer(worker_id="p0", kv=links["p0"].hello.kv)]))
            lane = (await links["d0"].next()).peer_lane
            assert "block_tokens: 32 here, 16 there" in lane.refusal


async def test_handed_over_and_computed_here_give_the_same_tokens() -> None:
    random = Random(7)
    async with pair() as at:
        for n in range(20):
            prompt = [random.randrange(3, 400) for _ in range(random.randint(1, 200))]
            alone = await at.decoded(f"alone-{n}/1", prompt)
            handle = await at.hand_over(f"pair-{n}/1", prompt)
            assert await at.decoded(f"pair-{n}/1", prompt, handle) == alone
        await at.at_rest()


async def test_a_handle_serves_once() -> None:
    async with pair() as at:
        handle = await at.hand_over("a/1", [5] * 40)
        await at.decoded("a/1", [5] * 40, handle)
        at.d.decode("a/2/d", token_ids=[5] * 40, prompt_tokens=40, handle=handle)
        assert (await at.d.next()).leg_failed.failure == pb.FAILURE_INVALID
        await at.at_rest()


async def test_a_lease_that_ended_is_a_failed_transfer_and_no_wrong_token() -> None:
    async with pair() as at:
        handle = await at.hand_over("a/1", [5] * 40)
        at.p.send(release=pb.ReleaseLease(handle=handle))
        await at.at_rest()
        at.d.decode("a/1/d", token_ids=[5] * 40, prompt_tokens=40, handle=handle)
        assert (await at.d.next()).leg_failed.failure == pb.FAILURE_TRANSFER
        await at.at_rest()


async def test_nothing_is_left_of_two_hundred_requests_cancelled_anywhere() -> None:
    """Each leg is cancelled at a random moment of its life, or runs to its end."""
    random = Random(11)
    async with pair(max_running=8) as at:
        orders: dict[str, list[int]] = {}
        for n in range(200):
            orders[f"{n}/1"] = [random.randrange(3, 400) for _ in range(random.randint(1, 300))]
        cancelled: set[str] = set()

        def cancel(link: Link, leg: str) -> None:
            link.cancel(leg)
            cancelled.add(leg)

        for leg, prompt in orders.items():
            at.p.prefill(f"{leg}/p", token_ids=prompt, hand_off=True, reader="d0", resample=True)
            if random.random() < 0.3:
                cancel(at.p, f"{leg}/p")
            if random.random() < 0.3:
                await asyncio.sleep(random.choice([0, 0.001]))
        await at.p.settled()
        while (await at.p.next_load()).prefill_running:
            pass
        handles = {
            message.prefill_done.leg_id.removesuffix("/p"): message.prefill_done.handle
            for message in at.p.received
            if message.HasField("prefill_done")
        }
        for leg, handle in handles.items():
            if f"{leg}/p" in cancelled:
                continue
            at.d.decode(f"{leg}/d", token_ids=orders[leg], prompt_tokens=len(orders[leg]), handle=handle)
            if random.random() < 0.5:
                await asyncio.sleep(random.choice([0, 0.001, 0.003]))
                cancel(at.d, f"{leg}/d")
                at.p.send(release=pb.ReleaseLease(handle=handle))  # as a router does: the fetch may not have begun
        await at.at_rest()
        legs = [f"{leg}/p" for leg in orders] + [f"{leg}/d" for leg in handles]
        for leg in legs:
            ends = at.p.terminals(leg) + at.d.terminals(leg)
            # A cancel may come after the end.
            assert ends <= 1 if leg in cancelled or leg.removesuffix("d") + "p" in cancelled else ends == 1, leg
        assert sum(at.d.terminals(f"{leg}/d") for leg in handles) > 20


CHUNKS = {"max_batched_tokens": 256}
LONG_PROMPT = [token % 900 + 5 for token in range(1500)]


async def offered(at: Pair, leg: str, *, resample: bool = True) -> bytes:
    """A prompt that is being computed, whose first chunk is there. Those after the second wait for leave."""
    at.engines[0].hold(after_steps=2)
    at.p.prefill(f"{leg}/p", token_ids=LONG_PROMPT, hand_off=True, reader="d0", resample=resample)
    message = await at.p.next()
    assert message.offered.leg_id == f"{leg}/p", message
    return message.offered.handle


async def test_blocks_move_while_later_ones_are_computed() -> None:
    async with pair(**CHUNKS) as at:
        alone = await at.decoded("alone/1", LONG_PROMPT)
        handle = await offered(at, "a/1")
        at.d.send(fetch_ahead=pb.FetchAhead(leg_id="a/1/p", handle=handle, timeout_s=30))
        while (await at.engines[1].load()).staged_pages < 94:  # noqa: ASYNC110  it tells only when asked
            await asyncio.sleep(0.001)
        assert at.p.terminals("a/1/p") == 0, "its prompt is still being computed"
        at.engines[0].go_on()
        done = (await at.p.next()).prefill_done
        assert done.handle == handle
        assert await at.decoded("a/1", LONG_PROMPT, handle) == alone
        state = at.engines[1]._state
        assert state is not None
        assert state.node.stats().fetch_outcomes == {Outcome.STAGED: 1}, "the order joined what the hint began"
        await at.at_rest()


async def test_without_the_hint_the_order_reads_what_was_offered_early() -> None:
    async with pair(**CHUNKS) as at:
        alone = await at.decoded("alone/1", LONG_PROMPT)
        handle = await offered(at, "a/1")
        at.engines[0].go_on()
        assert (await at.p.next()).prefill_done.handle == handle
        assert await at.decoded("a/1", LONG_PROMPT, handle) == alone
        await at.at_rest()


async def test_a_prompt_of_one_chunk_is_offered_when_it_is_done() -> None:
    async with pair(**CHUNKS) as at:
        assert await at.hand_over("a/1", [5] * 200)


async def test_a_prefill_cancelled_while_it_is_read_frees_everything_at_once() -> None:
    async with pair(**CHUNKS) as at:
        handle = await offered(at, "a/1")
        at.d.send(fetch_ahead=pb.FetchAhead(leg_id="a/1/p", handle=handle, timeout_s=30))
        while not (await at.engines[1].load()).staged_pages:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        at.p.cancel("a/1/p")  # and whoever reads is not told
        await at.p.settled()
        at.engines[0].go_on()
        await at.at_rest()


async def test_a_hint_that_is_given_up_leaves_the_prefill_alone() -> None:
    async with pair(**CHUNKS) as at:
        alone = await at.decoded("alone/1", LONG_PROMPT)
        handle = await offered(at, "a/1")
        at.d.send(fetch_ahead=pb.FetchAhead(leg_id="a/1/p", handle=handle, timeout_s=30))
        while not (await at.engines[1].load()).staged_pages:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        at.d.cancel("a/1/p")
        await at.d.settled()
        at.engines[0].go_on()
        assert (await at.p.next()).prefill_done.handle == handle
        assert await at.decoded("a/1", LONG_PROMPT, handle) == alone
        await at.at_rest()


@dataclass
class CarelessRouter:
    """Does what a router does, but loses or doubles hints, gives some up, and has clients that leave at any time."""

    at: Pair
    prompts: dict[str, list[int]]
    answers: dict[str, list[int]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    #: What was fetched ahead of them and confirmed may have been thrown away.
    may_be_stale: set[str] = field(default_factory=set)

    async def serve(self) -> None:
        for leg, prompt in self.prompts.items():
            self.at.p.prefill(f"{leg}/p", token_ids=prompt, hand_off=True, reader="d0", resample=True)
        seen = {link: len(link.received) for link in (self.at.d, self.at.p)}
        async with asyncio.timeout(60):
            while len(self.ended | self.left) < len(self.prompts):
                for link in seen:
                    new, seen[link] = link.received[seen[link] :], len(link.received)
                    for message in new:
                        self.heard(message)
                await asyncio.sleep(0.001)

    def heard(self, message: pb.WorkerMessage) -> None:
        if message.HasField("offered"):
            self.offered(message.offered.leg_id.removesuffix("/p"), message.offered)
        elif message.HasField("prefill_done"):
            self.prefilled(message.prefill_done.leg_id.removesuffix("/p"), message.prefill_done.handle)
        elif message.HasField("leg_failed"):
            leg = message.leg_failed.leg_id.removesuffix("/d")
            assert message.leg_failed.failure == pb.FAILURE_TRANSFER, message
            assert leg in self.may_be_stale | self.left, message
            self.left.add(leg)
        for output in message.step.outputs:
            leg = output.leg_id.removesuffix("/d")
            self.answers.setdefault(leg, []).extend(output.token_ids)
            if output.finish_reason and leg not in self.left:
                self.ended.add(leg)

    def offered(self, leg: str, hint: pb.Offered) -> None:
        random = Random(f"{leg} offered")  # its own, in whatever order they come
        for _ in range(random.choice([0, 1, 1, 1, 2])):
            self.at.d.send(fetch_ahead=pb.FetchAhead(leg_id=hint.leg_id, handle=hint.handle, timeout_s=30))
        if random.random() < 0.2:
            self.may_be_stale.add(leg)
            self.at.d.cancel(hint.leg_id)
        if random.random() < 0.3:
            self.left.add(leg)
            for link in random.sample([self.at.p, self.at.d], 2):
                link.cancel(hint.leg_id)

    def prefilled(self, leg: str, handle: bytes) -> None:
        if leg in self.left:
            self.at.p.send(release=pb.ReleaseLease(handle=handle))
            return
        prompt = self.prompts[leg]
        self.at.d.decode(f"{leg}/d", token_ids=prompt, prompt_tokens=len(prompt), handle=handle, sampling=GREEDY_ANSWER)
        if Random(f"{leg} prefilled").random() < 0.2:
            self.left.add(leg)
            for leg_id in (f"{leg}/d", f"{leg}/p"):
                self.at.d.cancel(leg_id)
            self.at.p.send(release=pb.ReleaseLease(handle=handle))


async def test_hints_that_are_lost_doubled_or_given_up_anywhere_leave_nothing_and_no_wrong_token() -> None:
    random = Random(5)
    async with pair(max_batched_tokens=128, step_time="h200-llama-3.1-8b", speedup=8.0, max_running=8) as at:
        prompts = {f"{n}/1": [random.randrange(3, 400) for _ in range(random.randint(100, 900))] for n in range(40)}
        alone = {leg: await at.decoded(f"alone-{leg}", prompt) for leg, prompt in prompts.items()}
        router = CarelessRouter(at, prompts)
        await router.serve()
        await at.at_rest()
        assert len(router.ended) > 15
        assert {leg: router.answers[leg] for leg in router.ended} == {leg: alone[leg] for leg in router.ended}


async def test_a_draining_prefill_worker_waits_for_the_reader_of_its_blocks() -> None:
    async with pair() as at:
        handle = await at.hand_over("a/1", [5] * 40)
        at.prefill.stop.set()
        assert (await at.p.next()).HasField("draining")
        alone = await at.decoded("alone/1", [5] * 40)
        assert not at.prefill.task.done()
        assert await at.decoded("a/1", [5] * 40, handle) == alone
        assert await at.prefill.exit_code() is ExitCode.LEFT


async def test_a_draining_prefill_worker_does_not_wait_past_the_lease() -> None:
    async with pair() as at:
        at.p.prefill("a/1/p", token_ids=[5] * 40, hand_off=True, reader="d0", timeout_s=0.3)
        assert (await at.p.next()).HasField("prefill_done")
        at.prefill.stop.set()
        assert await at.prefill.exit_code() is ExitCode.LEFT


async def test_a_lost_router_frees_every_block() -> None:
    async with pair(speedup=1.0) as at:
        handles = [await at.hand_over(f"{n}/1", [n + 5] * 100) for n in range(4)]
        for n in range(2):
            at.d.decode(f"{n}/1/d", token_ids=[n + 5] * 100, prompt_tokens=100, handle=handles[n], sampling=LONG)
        while {str((await at.d.next()).WhichOneof("message")) for _ in range(3)} != {"step"}:
            pass
        for link in (at.p, at.d):
            link.close()
        async with asyncio.timeout(20):
            for engine in at.engines:
                while holds_blocks(await engine.load()):  # noqa: ASYNC110  it tells only when asked
                    await asyncio.sleep(0.01)


def holds_blocks(load: EngineLoad) -> bool:
    return load.kv_blocks_free < load.kv_blocks_total or load.leases_held > 0


LONG = sampling(max_tokens=3000, ignore_eos=True)
