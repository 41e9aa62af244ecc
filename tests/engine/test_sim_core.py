"""The simulated engine's scheduler: events in, tokens out. No clock, no event loop."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from engine.base import DecodeLeg, FailureKind, FinishReason, LegError, PrefillLeg, Sampling
from engine.sim_blocks import BlockPool
from engine.sim_core import CoreLimits, PrefillDone, Readable, SimCore, StagedPages
from engine.sim_memory import POISON, Chain, ChainMemory
from tests.engine.reference import answer

VOCAB = 500
USABLE = np.arange(3, VOCAB, dtype=np.uint32)
CHAIN = Chain("revision", VOCAB)
GREEDY = Sampling(max_tokens=8, temperature=0)


@dataclass
class World:
    """A core with what it runs on, and a driver."""

    blocks: int = 64
    block_tokens: int = 4
    bytes_per_token: int = 16
    max_running: int = 8
    max_batched_tokens: int = 64
    long_prefill_token_threshold: int = 0
    max_waiting: int = 1000
    max_model_len: int = 200
    prefix_caching: bool = True
    answers: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    prefilled: dict[str, PrefillDone] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    #: What a reader elsewhere may be reading of legs that go on, and whose blocks were taken back.
    readable: dict[str, Readable] = field(default_factory=dict)
    withdrawn: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = ChainMemory(
            blocks=self.blocks, block_tokens=self.block_tokens, bytes_per_token=self.bytes_per_token
        )
        self.staging = self.memory.pages(self.blocks)
        limits = CoreLimits(
            max_running=self.max_running,
            max_batched_tokens=self.max_batched_tokens,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            max_waiting=self.max_waiting,
            max_model_len=min(self.max_model_len, self.blocks * self.block_tokens),
        )
        self.pool = BlockPool(self.blocks)
        self.core = SimCore(
            limits,
            self.memory,
            self.pool,
            CHAIN,
            USABLE,
            staging=self.memory.stamps_of(self.staging),
            prefix_caching=self.prefix_caching,
            withdraw=self.withdraw,
        )

    def withdraw(self, leg_id: str) -> None:
        self.check_readable()
        del self.readable[leg_id]
        self.withdrawn.append(leg_id)

    def check_readable(self) -> None:
        """What was said to be there is there, unchanged, until it is withdrawn."""
        for readable in self.readable.values():
            tokens = np.array(readable.leg.token_ids[: readable.tokens], dtype=np.uint32)
            right = CHAIN.run(CHAIN.seed(readable.leg.cache_salt), tokens)
            assert not self.memory.difference(readable.blocks, 0, right)

    def decode(self, leg_id: str, prompt: tuple[int, ...], sampling: Sampling = GREEDY, **more: Any) -> None:
        staged = more.pop("staged", None)
        leg = DecodeLeg(leg_id=leg_id, tenant="t", token_ids=prompt, prompt_tokens=len(prompt), sampling=sampling)
        self.core.add_decode(0.0, replace(leg, **more), staged)

    def prefill(self, leg_id: str, prompt: tuple[int, ...], sampling: Sampling = GREEDY, **more: Any) -> None:
        leg = PrefillLeg(leg_id=leg_id, tenant="t", token_ids=prompt, sampling=sampling, hand_off=True)
        self.core.add_prefill(0.0, replace(leg, **more))

    def step(self, now: float = 0.0) -> int:
        """How many tokens the step computed."""
        plan = self.core.begin(now)
        self.finish(plan, now)
        return plan.work.prefill_tokens + plan.work.decodes

    def finish(self, plan: Any, now: float = 0.0) -> None:
        result = self.core.finish(now, plan)
        for readable in result.readable:
            before = self.readable.get(readable.leg.leg_id)
            assert before is None or (before.blocks == readable.blocks and before.tokens < readable.tokens)
            self.readable[readable.leg.leg_id] = readable
        for done in result.prefills:
            self.prefilled[done.leg.leg_id] = done
            streamed = self.readable.pop(done.leg.leg_id, None)
            assert streamed is None or (done.lease and done.lease.blocks == streamed.blocks)
        self.check_readable()
        for output in result.outputs:
            self.cached.setdefault(output.leg_id, output.cached_tokens)
            self.answers.setdefault(output.leg_id, []).extend(output.token_ids)
            if output.finish_reason:
                self.reasons[output.leg_id] = output.finish_reason
        self.core.check_integrity(read_memory=True)

    def run(self) -> None:
        while self.core.running or self.core.waiting:
            assert self.step() > 0
        assert self.core.leases or self.pool.free == self.pool.total

    def stage(self, leg_id: str, first_page: int = 0) -> StagedPages:
        """Moves a leased leg's blocks into this world's own staging, as a transport would."""
        lease = self.prefilled[leg_id].lease
        assert lease is not None
        size = self.memory.block_bytes
        pages = tuple(range(first_page, first_page + len(lease.blocks)))
        for block, page in zip(lease.blocks, pages, strict=True):
            self.staging[page * size : (page + 1) * size] = self.memory.arena[block * size : (block + 1) * size]
        return StagedPages(leg_id, len(lease.leg.token_ids), pages)


def prompt_of(count: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(VOCAB) for _ in range(count))


def expected(prompt: tuple[int, ...], count: int = 8, salt: str = "", seed: int | None = None) -> list[int]:
    return answer(CHAIN, USABLE.tolist(), salt, prompt, count, seed)


def seeded(seed: int, count: int = 8) -> Sampling:
    return Sampling(max_tokens=count, temperature=1.0, seed=seed)


def test_a_long_prompt_leaves_room_in_its_steps_where_it_is_told_to() -> None:
    for threshold in 0, 8:
        world = World(max_batched_tokens=16, long_prefill_token_threshold=threshold)
        world.decode("long", prompt_of(48))
        world.step()
        world.decode("short", prompt_of(4))
        steps = 0
        while not world.answers.get("short"):
            world.step()
            steps += 1
        assert steps == (3 if threshold == 0 else 1)
        world.run()


# Reading while it is computed


def test_a_prompt_of_several_chunks_can_be_read_before_it_is_done() -> None:
    world = World(max_batched_tokens=16)
    world.prefill("a", prompt_of(40))
    world.step()
    assert world.readable["a"].tokens == 16
    assert len(world.readable["a"].blocks) == 10
    world.step()
    assert world.readable["a"].tokens == 32
    world.step()
    assert world.prefilled["a"].lease is not None
    world.core.end_lease("a")


def test_a_prompt_of_one_chunk_and_one_that_is_not_handed_over_are_not_read_early() -> None:
    world = World(max_batched_tokens=16)
    world.prefill("a", prompt_of(16))
    world.prefill("b", prompt_of(40), hand_off=False)
    world.decode("c", prompt_of(40))
    world.run()
    world.core.end_lease("a")
    assert not world.readable
    assert not world.withdrawn


def test_an_aborted_leg_is_withdrawn_before_its_blocks_are_anothers() -> None:
    world = World(max_batched_tokens=16, blocks=12)
    world.prefill("a", prompt_of(40))
    world.prefill("b", prompt_of(40, seed=1), tenant="another")
    world.step()
    world.core.abort("a")
    assert world.withdrawn == ["a"]
    world.run()
    world.core.end_lease("b")


def test_a_preempted_leg_is_withdrawn_and_not_read_early_again() -> None:
    world = World(max_batched_tokens=8, blocks=14, prefix_caching=False, max_running=2)
    world.decode("d", prompt_of(4), Sampling(max_tokens=30, temperature=0))
    world.step()
    world.prefill("a", prompt_of(48))
    while not world.withdrawn:
        world.step()
    world.run()
    assert world.withdrawn == ["a"]
    assert world.prefilled["a"].lease is not None
    world.core.end_lease("a")


def test_a_leg_that_ends_with_its_first_token_is_withdrawn() -> None:
    world = World(max_batched_tokens=16)
    prompt = prompt_of(40)
    world.prefill("a", prompt, replace(GREEDY, stop_token_ids=tuple(expected(prompt, 1))))
    world.run()
    assert world.prefilled["a"].lease is None
    assert world.withdrawn == ["a"]


# Tokens


@pytest.mark.parametrize("chunk", [8, 9, 13, 64, 1000])
@pytest.mark.parametrize("block_tokens", [1, 4, 32])
def test_answers_do_not_depend_on_chunks_batches_or_block_size(chunk: int, block_tokens: int) -> None:
    world = World(block_tokens=block_tokens, blocks=3200 // block_tokens, max_batched_tokens=chunk)
    prompts = [prompt_of(count, seed=count) for count in (1, 2, 3, 4, 5, 31, 32, 33, 64, 100, 150)]
    for prompt in prompts:
        world.decode(str(len(prompt)), prompt)
    world.run()
    assert world.answers == {str(len(prompt)): expected(prompt) for prompt in prompts}
    assert set(world.reasons.values()) == {FinishReason.LENGTH}


def test_preemption_computes_again_and_changes_no_token() -> None:
    world = World(blocks=12, prefix_caching=False)
    prompts = [prompt_of(9, seed=i) for i in range(4)]
    for index, prompt in enumerate(prompts):
        world.decode(str(index), prompt, replace(GREEDY, max_tokens=20))
    world.run()
    assert world.core.totals.preemptions > 0
    assert world.answers == {str(index): expected(prompt, 20) for index, prompt in enumerate(prompts)}


def test_a_preempted_leg_goes_on_before_those_that_came_later() -> None:
    world = World(blocks=12, max_running=2, prefix_caching=False)
    for leg_id in ("first", "second", "third"):
        world.decode(leg_id, prompt_of(9), replace(GREEDY, max_tokens=24))
    while not world.core.totals.preemptions:
        world.step()
    assert world.core.running == 1
    world.run()
    assert list(world.reasons) == ["first", "second", "third"]


def test_cached_prefixes_change_no_token() -> None:
    shared = prompt_of(40)
    prompts = {str(cut): shared[:cut] + prompt_of(5, seed=100 + cut) for cut in (0, 3, 4, 16, 39, 40)}
    for caching in (False, True):
        world = World(prefix_caching=caching)
        world.decode("first", shared)
        world.run()
        for leg_id, prompt in prompts.items():
            world.decode(leg_id, prompt)
        world.run()
        assert all(world.answers[leg_id] == expected(prompt) for leg_id, prompt in prompts.items())
        hits = {leg_id: world.cached[leg_id] for leg_id in prompts}
        assert hits == ({"0": 0, "3": 0, "4": 4, "16": 16, "39": 36, "40": 40} if caching else dict.fromkeys(hits, 0))


def test_a_repeated_prompt_computes_at_least_its_last_token() -> None:
    world = World()
    prompt = prompt_of(40)
    for leg_id in ("first", "again"):
        world.decode(leg_id, prompt)
        world.run()
    assert world.cached == {"first": 0, "again": 36}
    assert world.answers["again"] == world.answers["first"]


def test_an_answer_is_cached_for_the_next_turn_of_a_conversation() -> None:
    world = World()
    prompt = prompt_of(10)
    world.decode("first", prompt)
    world.run()
    world.decode("next", prompt + tuple(world.answers["first"]) + (7,))
    world.run()
    assert world.cached["next"] == 16  # of 19: the last token was never computed, and only whole blocks count


def test_salts_separate_caches_and_answers() -> None:
    world = World()
    prompt = prompt_of(40)
    for salt in ("", "a", "b"):
        world.decode(salt or "none", prompt, cache_salt=salt, tenant=salt)
        world.run()
    assert set(world.cached.values()) == {0}
    assert world.answers == {salt or "none": expected(prompt, salt=salt) for salt in ("", "a", "b")}
    assert len(set(map(tuple, world.answers.values()))) == 3
    world.decode("another tenant of a", prompt, cache_salt="a", tenant="c")
    world.run()
    assert world.cached["another tenant of a"] == 36


def test_seeds_decide_what_is_sampled_unless_the_temperature_is_zero() -> None:
    world = World()
    prompt = prompt_of(10)
    samplings = {"1": seeded(1), "again": seeded(1), "2": seeded(2), "-3": seeded(-3), "greedy": GREEDY}
    samplings |= {"cold": replace(seeded(1), temperature=0.0), "unseeded": replace(GREEDY, temperature=1.0)}
    for leg_id, sampling in samplings.items():
        world.decode(leg_id, prompt, sampling)
    world.run()
    answers = world.answers
    assert answers["1"] == answers["again"] == expected(prompt, seed=1)
    assert answers["greedy"] == answers["cold"] == answers["unseeded"] == expected(prompt)
    assert len({tuple(answers[leg_id]) for leg_id in ("1", "2", "-3", "greedy")}) == 4


def test_special_tokens_are_never_sampled_and_lengths_are_exact() -> None:
    world = World(blocks=200, max_model_len=800)
    world.decode("long", prompt_of(3), replace(GREEDY, max_tokens=700))
    world.run()
    assert len(world.answers["long"]) == 700
    assert min(world.answers["long"]) >= 3


def test_an_answer_ends_at_the_end_of_the_context() -> None:
    world = World(max_model_len=20)
    world.decode("a", prompt_of(15), replace(GREEDY, max_tokens=1000))
    world.run()
    assert len(world.answers["a"]) == 5
    assert world.reasons["a"] is FinishReason.LENGTH


def test_stop_tokens_end_an_answer_but_not_before_min_tokens() -> None:
    prompt = prompt_of(10)
    first, second, third = expected(prompt, 3)
    world = World()
    world.decode("second", prompt, replace(GREEDY, stop_token_ids=(second,)))
    world.decode("kept back", prompt, replace(GREEDY, stop_token_ids=(first,), min_tokens=3))
    world.prefill("first", prompt, replace(GREEDY, stop_token_ids=(first,)))
    world.prefill("resampled", prompt, replace(GREEDY, stop_token_ids=(first,)), resample=True)
    world.run()
    assert world.answers["second"] == [first, second]
    assert world.reasons["second"] is FinishReason.STOP
    assert len(world.answers["kept back"]) == 8 or world.answers["kept back"].index(first) >= 2
    assert first not in world.answers["kept back"][:2]
    assert world.prefilled["first"].result.finish_reason is FinishReason.STOP
    assert world.prefilled["first"].lease is None
    assert world.prefilled["resampled"].lease is not None


def test_logprobs_have_the_shape_that_was_asked_for() -> None:
    world = World()
    seen = []
    for wanted in (None, 0, 3):
        world.decode(str(wanted), prompt_of(10), replace(GREEDY, logprobs=wanted))
        while world.core.running or world.core.waiting:
            outputs = world.core.finish(0.0, world.core.begin(0.0)).outputs
            seen += [(wanted, output) for output in outputs]
    for wanted, output in seen:
        if wanted is None:
            assert output.logprobs == ()
            continue
        (entry,) = output.logprobs
        assert (entry.token_id,) == output.token_ids
        assert len(entry.top) == wanted
        assert [logprob for _, logprob in entry.top] == sorted((p for _, p in entry.top), reverse=True)
        assert not wanted or entry.top[0] == (entry.token_id, entry.logprob)


# The hand-off


@pytest.mark.parametrize("count", [1, 3, 4, 5, 31, 32, 100])
@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, seeded(5)])
def test_a_staged_prompt_continues_as_if_computed_here(count: int, resample: bool, sampling: Sampling) -> None:
    world, owner = World(), World(max_batched_tokens=17)
    prompt = prompt_of(count)
    right = expected(prompt, seed=sampling.seed)
    owner.prefill("p", prompt, sampling)
    owner.run()
    assert owner.prefilled["p"].result.token_id == right[0]
    world.staging[:] = owner.staging
    staged = owner.stage("p", first_page=3)
    world.staging[:] = owner.staging
    if resample:
        world.decode("d", prompt, sampling, staged=staged)
    else:
        world.decode("d", (*prompt, right[0]), replace(sampling, max_tokens=7), staged=staged)
    assert world.core.begin(0.0).consumed == ("p",)
    world.core.abort("d")
    world.decode("d", prompt, sampling, staged=staged)
    assert world.step() == 1  # nothing but the last token is computed
    world.run()
    assert world.answers["d"] == right
    assert world.core.totals.mismatches == 0


@pytest.mark.parametrize("block", range(8))
def test_one_wrong_byte_in_staging_makes_every_token_wrong(block: int) -> None:
    world = World()
    prompt = prompt_of(32)
    world.prefill("p", prompt)
    world.run()
    staged = world.stage("p")
    world.core.end_lease("p")
    draw = random.Random(block)
    world.staging[block * world.memory.block_bytes + draw.randrange(world.memory.block_bytes)] ^= 1 << draw.randrange(8)
    fresh = World()
    fresh.staging[:] = world.staging
    fresh.decode("d", prompt, staged=staged)
    fresh.run()
    assert fresh.core.totals.mismatches == 1
    assert len(fresh.answers["d"]) == 8
    assert not any(got == right for got, right in zip(fresh.answers["d"], expected(prompt), strict=True))
    # What came in wrong is not found by others.
    fresh.decode("later", prompt)
    fresh.run()
    assert fresh.answers["later"] == expected(prompt)


def test_blocks_of_another_prompt_or_salt_in_staging_make_wrong_tokens() -> None:
    world = World()
    prompt, other = prompt_of(32), prompt_of(32, seed=9)
    world.prefill("other", other)
    world.prefill("salted", prompt, cache_salt="salt")
    world.run()
    for leg_id, salt in (("other", ""), ("salted", ""), ("salted", "another")):
        fresh = World()
        staged = world.stage(leg_id)
        fresh.staging[:] = world.staging
        fresh.decode("d", prompt, cache_salt=salt, staged=staged)
        fresh.run()
        assert fresh.answers["d"] != expected(prompt, salt=salt)


def test_staged_blocks_that_are_cached_here_are_not_copied() -> None:
    world = World()
    prompt = prompt_of(40)
    world.prefill("p", prompt)
    world.run()
    staged = world.stage("p")
    world.staging[: 9 * world.memory.block_bytes] = 0
    world.decode("d", prompt, staged=staged)
    world.run()
    assert world.cached["d"] == 36
    assert world.answers["d"] == expected(prompt)


def test_leased_blocks_stay_as_they_are_until_the_lease_ends() -> None:
    world = World(blocks=10)
    prompt = prompt_of(20)
    world.prefill("p", prompt)
    world.run()
    assert (world.core.leases, world.core.leased_blocks, world.pool.free) == (1, 5, 5)
    world.decode("waits", prompt_of(21, seed=1))
    assert world.step() == 0
    assert world.core.waiting == 1
    world.decode("also waits, behind it", prompt_of(1))
    assert world.step() == 0
    world.core.end_lease("p")
    world.core.end_lease("p")
    world.run()
    assert world.answers["waits"] == expected(prompt_of(21, seed=1))
    assert world.pool.free == 10


def test_no_byte_of_a_former_owner_is_left_in_what_a_lease_shows() -> None:
    world = World(blocks=10, prefix_caching=False)
    world.decode("a", prompt_of(30), tenant="a")
    world.run()
    world.prefill("b", prompt_of(1), tenant="b")
    world.run()
    lease = world.prefilled["b"].lease
    assert lease is not None
    (block,) = lease.blocks
    words = world.memory.arena.view(np.uint64).reshape(10, 4, 2)[block]
    assert (words[1:] == POISON).all()
    assert (words[0] != POISON).all()


# Limits and refusals


def test_a_step_computes_no_more_than_its_budget_and_decodes_come_first() -> None:
    world = World(max_batched_tokens=16, max_running=4)
    world.decode("short", prompt_of(2), replace(GREEDY, max_tokens=30))
    world.step()
    world.decode("long", prompt_of(100))
    world.decode("behind", prompt_of(20))
    plan = world.core.begin(0.0)
    assert (plan.work.prefill_tokens, plan.work.decodes, plan.work.context_tokens) == (15, 1, 3)
    assert plan.work.prefill_pairs == 15**2
    world.finish(plan)
    plan = world.core.begin(0.0)
    assert plan.work.prefill_pairs == 30**2 - 15**2
    world.finish(plan)
    assert world.core.running == 2
    while len(world.answers.get("long", ())) < 2:
        assert 0 < world.step() <= 16
    world.run()
    assert world.answers["long"] == expected(prompt_of(100))


def test_no_more_legs_run_than_may() -> None:
    world = World(max_running=3)
    for index in range(7):
        world.decode(str(index), prompt_of(5, seed=index))
    while world.core.running or world.core.waiting:
        world.step()
        assert world.core.running <= 3
    assert len(world.reasons) == 7


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ((), "0 tokens"),
        (prompt_of(200), "200 tokens: must be 1 to 199"),
        ((1, VOCAB), f"outside the vocabulary: {VOCAB}"),
        ((1, -1), "outside the vocabulary"),
        ((1, 1 << 40), "outside the vocabulary"),
    ],
)
def test_bad_prompts_are_refused_by_name(prompt: tuple[int, ...], why: str) -> None:
    world = World()
    with pytest.raises(LegError, match=why) as caught:
        world.decode("bad", prompt)
    assert caught.value.kind is FailureKind.INVALID
    world.core.check_integrity()


def test_a_leg_is_known_once() -> None:
    world = World()
    world.prefill("p", prompt_of(5))
    with pytest.raises(LegError, match="known already"):
        world.prefill("p", prompt_of(5))
    world.run()
    with pytest.raises(LegError, match="known already"):
        world.prefill("p", prompt_of(5))


def test_staging_longer_than_the_sequence_is_refused() -> None:
    world = World()
    with pytest.raises(LegError, match="staged 9 tokens of a sequence of 8 tokens"):
        world.decode("d", prompt_of(8), staged=StagedPages("s", 9, (0, 1, 2)))


def test_the_waiting_queue_has_an_end() -> None:
    world = World(max_waiting=2)
    for leg_id in ("a", "b"):
        world.decode(leg_id, prompt_of(5))
    with pytest.raises(LegError, match="2 legs are waiting") as caught:
        world.decode("c", prompt_of(5))
    assert caught.value.kind is FailureKind.REJECTED


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    memory = ChainMemory(blocks=2, block_tokens=4, bytes_per_token=8)
    limits = CoreLimits(max_running=1, max_batched_tokens=1, max_waiting=1, max_model_len=9)
    with pytest.raises(ValueError, match="cannot hold one sequence of 9 tokens"):
        SimCore(limits, memory, BlockPool(2), CHAIN, USABLE)
    with pytest.raises(ValueError, match="never get their turn"):
        CoreLimits(max_running=8, max_batched_tokens=7, max_waiting=1, max_model_len=8)


# Anything, in any order


class Driver(RuleBasedStateMachine):
    """Random legs on few blocks, of tenants that share salts and have several: nothing contradicts itself, and every
    answer is the dumb model's."""

    legs: Bundle[str] = Bundle("legs")
    leases: Bundle[str] = Bundle("leases")

    @initialize(
        pool_tokens=st.integers(20, 80),
        block_tokens=st.sampled_from([1, 4, 5]),
        chunk=st.sampled_from([4, 7, 64]),
        caching=st.booleans(),
    )
    def start(self, pool_tokens: int, block_tokens: int, chunk: int, caching: bool) -> None:
        self.world = World(
            blocks=pool_tokens // block_tokens,
            block_tokens=block_tokens,
            max_batched_tokens=chunk,
            max_running=4,
            max_model_len=48,
            prefix_caching=caching,
        )
        self.count = 0
        self.wanted: dict[str, tuple[tuple[int, ...], Sampling, str]] = {}

    def prompt(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        family, shared, own = shape
        longest = min(48, self.world.blocks * self.world.block_tokens) - 1
        return (prompt_of(24, seed=family)[:shared] + prompt_of(own, seed=self.count))[:longest]

    def new_leg(self, prompt: tuple[int, ...], sampling: Sampling, salt: str) -> str:
        self.count += 1
        leg_id = f"leg {self.count}"
        self.wanted[leg_id] = prompt, sampling, salt
        return leg_id

    def tenant(self) -> str:
        return "xy"[self.count % 2]

    #: Family, tokens shared with it, tokens of its own.
    shapes = st.tuples(st.integers(0, 1), st.integers(0, 24), st.integers(1, 12))
    salts = st.sampled_from(["", "a", "b"])
    samplings = st.builds(
        Sampling, max_tokens=st.integers(1, 24), temperature=st.just(1.0), seed=st.sampled_from([None, 4])
    )

    @rule(target=legs, count=st.integers(1, 4), sampling=samplings, salt=salts, shape=shapes)
    def add_decodes(
        self, shape: tuple[int, int, int], count: int, sampling: Sampling, salt: str
    ) -> MultipleResults[str]:
        return multiple(*(self.add_decode(self.prompt(shape), sampling, salt) for _ in range(count)))

    def add_decode(self, prompt: tuple[int, ...], sampling: Sampling, salt: str) -> str:
        leg_id = self.new_leg(prompt, sampling, salt)
        self.world.decode(leg_id, prompt, sampling, cache_salt=salt, tenant=self.tenant())
        return leg_id

    @rule(
        target=leases, hand_off=st.sampled_from([True, True, True, False]), sampling=samplings, salt=salts, shape=shapes
    )
    def add_prefill(self, shape: tuple[int, int, int], hand_off: bool, sampling: Sampling, salt: str) -> str:
        prompt = self.prompt(shape)
        leg_id = self.new_leg(prompt, sampling, salt)
        more = {"cache_salt": salt, "tenant": self.tenant(), "hand_off": hand_off, "resample": hand_off}
        self.world.prefill(leg_id, prompt, sampling, **more)
        return leg_id

    @rule(target=legs, lease=leases)
    def decode_from_lease(self, lease: str) -> Any:
        while lease in self.world.core._sequences and self.world.step():
            pass
        if lease not in self.world.core._leases:
            return multiple()
        staged = self.world.stage(lease)
        prompt, sampling, salt = self.wanted[lease]
        leg_id = self.new_leg(prompt, sampling, salt)
        self.world.decode(leg_id, prompt, sampling, cache_salt=salt, tenant=self.tenant(), staged=staged)
        # Its pages are used again by the next one: let it be admitted first.
        while self.world.core.waiting and self.world.step():
            pass
        if self.world.core.waiting:
            self.world.core.abort(leg_id)
        return leg_id

    @rule(leg_id=consumes(legs))
    def abort(self, leg_id: str) -> None:
        self.world.core.abort(leg_id)

    @rule(leg_id=consumes(leases))
    def end_lease(self, leg_id: str) -> None:
        self.world.core.abort(leg_id)
        self.world.core.end_lease(leg_id)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @rule(leg_id=consumes(legs))
    def abort_within_a_step(self, leg_id: str) -> None:
        plan = self.world.core.begin(0.0)
        self.world.core.abort(leg_id)
        self.world.finish(plan)

    @invariant()
    def answers_are_right(self) -> None:
        if not hasattr(self, "world"):
            return
        for leg_id in list(self.world.reasons):
            prompt, sampling, salt = self.wanted.pop(leg_id)
            del self.world.reasons[leg_id]
            got = self.world.answers.pop(leg_id)
            assert got == expected(prompt, len(got), salt, sampling.seed)
            room = min(48, self.world.blocks * self.world.block_tokens) - len(prompt)
            assert len(got) == min(sampling.max_tokens, room)
        assert self.world.core.totals.mismatches == 0

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        core = self.world.core
        for lease in list(core._leases):
            core.end_lease(lease)
        while core.running or core.waiting:
            assert self.world.step() > 0
            for lease in list(core._leases):
                core.end_lease(lease)
        self.answers_are_right()
        core.check_integrity()
        assert self.world.pool.free == self.world.pool.total


TestDriver = Driver.TestCase
TestDriver.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
