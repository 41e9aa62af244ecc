"""The simulated engine's scheduler: legs in, step plans out, tokens back. Synchronous and deterministic.

One step is `begin`, which plans it and gives its legs their blocks, and `finish`, which computes its tokens. Time may
pass between the two; legs may be added, aborted or their leases ended meanwhile. A leg is in one place:

                 begin                      finish: the last token
    waiting  ------------->  running  ------------------------------>  gone
       ^                      |   |
       |  no block for the    |   |  finish: a prefill leg that hands off
       +----------------------+   +---------------------------------->  leased  --end_lease-->  gone
          next token: preempted

and `abort` takes it out of the first two. Its blocks are held while it runs or is leased, and never while it waits.

The budget of a step (`max_batched_tokens`) goes to running decodes first, then to running prefills, then to waiting
legs in the order of arrival. A leg is admitted when all blocks of the tokens it has so far fit, so that prefills never
run out of blocks half-way; decodes that do preempt the leg admitted last, whose tokens are then computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.base import (
    DecodeLeg,
    FailureKind,
    FinishReason,
    LegError,
    PrefillLeg,
    PrefillResult,
    Sampling,
    StepOutput,
    TokenLogprobs,
)
from engine.sim_blocks import BlockOwner, BlockPool, extend_digests, root_digest
from engine.sim_memory import U64, Chain, ChainMemory, mix, mix_int
from engine.step_time import StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreLimits:
    max_running: int
    max_batched_tokens: int
    #: Of one prompt in one step; 0: as many as fit.
    long_prefill_token_threshold: int = 0
    max_waiting: int
    max_model_len: int

    def __post_init__(self) -> None:
        if self.max_batched_tokens < self.max_running:
            raise ValueError(
                f"max_batched_tokens ({self.max_batched_tokens}) must not be below max_running ({self.max_running}): "
                "some decodes would never get their turn"
            )


@dataclass(frozen=True, slots=True)
class StagedPages:
    """KV of a sequence's first `tokens` tokens, in pages of staging memory."""

    staged_id: str
    tokens: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lease:
    """Blocks kept as they are for a reader elsewhere."""

    leg: PrefillLeg
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillDone:
    leg: PrefillLeg
    #: Its handle is still None.
    result: PrefillResult
    #: Set when the leg's blocks are held until `end_lease`.
    lease: Lease | None


@dataclass(frozen=True, slots=True)
class Readable:
    """A leg that hands off is computed in part. What is there stays as it is until the leg's blocks are withdrawn."""

    leg: PrefillLeg
    blocks: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class StepResult:
    prefills: tuple[PrefillDone, ...] = ()
    outputs: tuple[StepOutput, ...] = ()
    readable: tuple[Readable, ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """A leg's state; changed by SimCore only."""

    leg: PrefillLeg | DecodeLeg
    #: The first `length` are known; room for all that may come.
    tokens: NDArray[np.uint32]
    length: int
    length_max: int
    owner: BlockOwner
    chain_seed: int
    #: Zero samples greedily.
    sampling_seed: int
    arrived_s: float
    staged: StagedPages | None
    digests: list[bytes] = field(default_factory=list)
    digest_root: bytes = b""
    stop_token_ids: frozenset[int] = frozenset()
    #: Row of the block tables while running, else -1.
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    #: Tokens whose KV is in `blocks`; less than `length` except within `finish`.
    computed: int = 0
    published_blocks: int = 0
    generated: int = 0
    #: Zero unless staged memory was not what its tokens make.
    taint: int = 0
    #: Its blocks may be being read while they are computed. Not any more once they were withdrawn.
    readable: bool = False
    withdrawn: bool = False
    cached_tokens: int = 0
    started_s: float | None = None

    @property
    def sampling(self) -> Sampling:
        return self.leg.sampling


@dataclass(frozen=True, slots=True)
class StepPlan:
    #: Sequences and how many tokens of each.
    chunks: tuple[tuple[Sequence, int], ...]
    work: StepWork
    #: Staging that was copied and can be discarded.
    consumed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.chunks)


@dataclass(slots=True)
class CoreTotals:
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    #: Decode legs whose staged memory was not what its tokens make.
    mismatches: int = 0


class SimCore:
    def __init__(
        self,
        limits: CoreLimits,
        memory: ChainMemory,
        pool: BlockPool,
        chain: Chain,
        usable_tokens: NDArray[np.uint32],
        staging: U64 | None = None,
        prefix_caching: bool = True,
        withdraw: Callable[[str], object] = lambda leg_id: None,
    ) -> None:
        """`usable_tokens`: what may be sampled. `staging`: `memory.stamps_of` the staging region. `withdraw` is called
        with a leg's id before blocks of it that were said to be `Readable` change."""
        if limits.max_model_len > pool.total * memory.block_tokens:
            raise ValueError(f"{pool.total} blocks cannot hold one sequence of {limits.max_model_len} tokens")
        self._limits = limits
        self._memory = memory
        self._pool = pool
        self._chain = chain
        self._usable_tokens = usable_tokens
        self._staging = staging
        self._prefix_caching = prefix_caching
        self._withdraw = withdraw
        self._block_tokens = memory.block_tokens
        self._waiting: deque[Sequence] = deque()
        #: In the order of admission. Each has a row of its own.
        self._running: list[Sequence] = []
        self._leases: dict[str, Lease] = {}
        #: Waiting and running sequences by leg id.
        self._sequences: dict[str, Sequence] = {}
        self._rows = list(range(limits.max_running - 1, -1, -1))
        #: Row by row the running sequences' blocks; what stands after them means nothing.
        self._tables = np.zeros((limits.max_running, -(-limits.max_model_len // self._block_tokens)), dtype=np.int32)
        self.totals = CoreTotals()

    # Events

    def add_prefill(self, now: float, leg: PrefillLeg) -> None:
        self._add(now, leg, None)

    def add_decode(self, now: float, leg: DecodeLeg, staged: StagedPages | None) -> None:
        if staged and staged.tokens > len(leg.token_ids):
            raise LegError(
                FailureKind.INVALID, f"staged {staged.tokens} tokens of a sequence of {len(leg.token_ids)} tokens"
            )
        self._add(now, leg, staged)

    def abort(self, leg_id: str) -> None:
        """Ends a leg and frees its blocks now. Unknown legs are ignored."""
        sequence = self._sequences.pop(leg_id, None)
        if sequence is None:
            return
        if sequence.row < 0:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._end_reading(sequence)
            self._pool.give_back(self._leave_row(sequence))

    def end_lease(self, leg_id: str) -> None:
        """The blocks of a leased leg may be reused. Unknown legs are ignored."""
        lease = self._leases.pop(leg_id, None)
        if lease is not None:
            self._pool.give_back(lease.blocks)

    # Queries

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def leases(self) -> int:
        return len(self._leases)

    @property
    def leased_blocks(self) -> int:
        return sum(len(lease.blocks) for lease in self._leases.values())

    @property
    def pool(self) -> BlockPool:
        return self._pool

    # A leg's way in

    def _add(self, now: float, leg: PrefillLeg | DecodeLeg, staged: StagedPages | None) -> None:
        count = len(leg.token_ids)
        if not 0 < count < self._limits.max_model_len:
            raise LegError(FailureKind.INVALID, f"{count} tokens: must be 1 to {self._limits.max_model_len - 1}")
        if leg.leg_id in self._sequences or leg.leg_id in self._leases:
            raise LegError(FailureKind.INVALID, f"leg {leg.leg_id} is known already")
        if len(self._waiting) >= self._limits.max_waiting:
            raise LegError(FailureKind.REJECTED, f"{len(self._waiting)} legs are waiting, the most there may be")
        length_max = min(count + max(1, leg.sampling.max_tokens), self._limits.max_model_len)
        tokens = np.zeros(length_max, dtype=np.uint32)
        try:
            tokens[:count] = leg.token_ids
            self._chain.check_tokens(tokens[:count])
        except (OverflowError, ValueError) as error:
            raise LegError(FailureKind.INVALID, f"token id outside the vocabulary: {error}") from None
        sampling = leg.sampling
        greedy = sampling.seed is None or sampling.temperature == 0
        sequence = Sequence(
            leg=leg,
            tokens=tokens,
            length=count,
            length_max=length_max,
            owner=BlockOwner(leg.tenant, leg.cache_salt),
            chain_seed=self._chain.seed(leg.cache_salt),
            sampling_seed=0 if greedy else mix_int((sampling.seed or 0) + 1) | 1,
            arrived_s=now,
            staged=staged,
            digest_root=root_digest(leg.cache_salt),
            stop_token_ids=frozenset(sampling.stop_token_ids),
        )
        self._sequences[leg.leg_id] = sequence
        self._waiting.append(sequence)

    # Planning

    def begin(self, now: float) -> StepPlan:
        """Plans a step. An empty plan means that nothing can be computed before the next event."""
        chunks: list[tuple[Sequence, int]] = []
        consumed: list[str] = []
        self._plan_decodes(chunks)
        budget = self._limits.max_batched_tokens - len(chunks)
        budget = self._plan_prefills(chunks, budget)
        while budget > 0 and self._can_admit():
            sequence = self._admit(now, consumed)
            budget -= self._plan_chunk(sequence, chunks, budget)
        return StepPlan(tuple(chunks), self._work(chunks), tuple(consumed))

    def _plan_decodes(self, chunks: list[tuple[Sequence, int]]) -> None:
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            if sequence.computed + 1 == sequence.length and self._make_room(sequence):
                chunks.append((sequence, 1))
            index += 1

    def _make_room(self, sequence: Sequence) -> bool:
        """Sees that the next token has a block; False when `sequence` itself had to be preempted for want of one."""
        if sequence.computed < len(sequence.blocks) * self._block_tokens:
            return True
        while not self._pool.can_take(1):
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        self._take_blocks(sequence, 1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.totals.preemptions += 1
        self._end_reading(sequence)
        self._pool.give_back(self._leave_row(sequence))
        sequence.computed = sequence.taint = 0
        self._waiting.appendleft(sequence)

    def _plan_prefills(self, chunks: list[tuple[Sequence, int]], budget: int) -> int:
        for sequence in self._running:
            if budget <= 0:
                break
            if sequence.computed + 1 < sequence.length:
                budget -= self._plan_chunk(sequence, chunks, budget)
        return budget

    def _plan_chunk(self, sequence: Sequence, chunks: list[tuple[Sequence, int]], budget: int) -> int:
        count = min(budget, sequence.length - sequence.computed, self._limits.long_prefill_token_threshold or budget)
        chunks.append((sequence, count))
        return count

    def _can_admit(self) -> bool:
        if not self._waiting or not self._rows:
            return False
        sequence = self._waiting[0]
        hits = self._cached_prefix(sequence)
        return self._pool.can_take(self._blocks_for(sequence.length) - len(hits), beside=hits)

    def _admit(self, now: float, consumed: list[str]) -> Sequence:
        sequence = self._waiting.popleft()
        hits = self._cached_prefix(sequence)
        self._pool.hold(hits)
        sequence.row = self._rows.pop()
        sequence.blocks = hits
        self._tables[sequence.row, : len(hits)] = hits
        sequence.computed = len(hits) * self._block_tokens
        sequence.published_blocks = len(hits)
        self._take_blocks(sequence, self._blocks_for(sequence.length) - len(hits))
        if sequence.started_s is None:
            sequence.started_s = now
            sequence.cached_tokens = sequence.computed
            self.totals.prompt_tokens += sequence.length
            self.totals.cached_tokens += sequence.computed
        if sequence.staged is not None:
            self._copy_staged(sequence, sequence.staged)
            consumed.append(sequence.staged.staged_id)
            sequence.staged = None
        self._running.append(sequence)
        return sequence

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks to begin with; at least one token is always left to compute."""
        if not self._prefix_caching:
            return []
        known = sequence.tokens[: sequence.length]
        extend_digests(sequence.digests, sequence.digest_root, known, self._block_tokens)
        return self._pool.match(sequence.digests[: (sequence.length - 1) // self._block_tokens])

    def _copy_staged(self, sequence: Sequence, staged: StagedPages) -> None:
        """Copies the staged blocks that are not cached here, and compares every byte with what its tokens make."""
        start = sequence.computed
        if staged.tokens <= start:
            return
        assert self._staging is not None
        first = start // self._block_tokens
        last = self._blocks_for(staged.tokens)
        self._memory.copy_in(sequence.blocks[first:last], self._staging, staged.pages[first:last])
        expected = self._chain.run(sequence.chain_seed, sequence.tokens[: staged.tokens])
        sequence.taint = self._memory.difference(sequence.blocks, start, expected[start:])
        self.totals.mismatches += sequence.taint != 0
        sequence.computed = min(staged.tokens, sequence.length - 1)

    def _take_blocks(self, sequence: Sequence, count: int) -> None:
        taken, strangers = self._pool.take(count, sequence.owner)
        self._memory.scrub(strangers)
        held = len(sequence.blocks)
        self._tables[sequence.row, held : held + count] = taken
        sequence.blocks.extend(taken)

    def _leave_row(self, sequence: Sequence) -> list[int]:
        """Returns the blocks, for the caller to keep or give back."""
        blocks = sequence.blocks
        self._rows.append(sequence.row)
        sequence.row = -1
        sequence.blocks = []
        return blocks

    def _end_reading(self, sequence: Sequence) -> None:
        if sequence.readable:
            sequence.readable, sequence.withdrawn = False, True
            self._withdraw(sequence.leg.leg_id)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _work(self, chunks: Seq[tuple[Sequence, int]]) -> StepWork:
        decodes = [sequence for sequence, count in chunks if _is_decode(sequence, count)]
        prefills = [(s.computed, s.computed + count) for s, count in chunks if not _is_decode(s, count)]
        return StepWork(
            prefill_tokens=sum(end - start for start, end in prefills),
            prefill_pairs=sum(end * end - start * start for start, end in prefills),
            decodes=len(decodes),
            context_tokens=sum(sequence.length for sequence in decodes),
        )

    # Computing

    def finish(self, now: float, plan: StepPlan) -> StepResult:
        """Computes a plan's tokens, but for legs that were aborted since it was made."""
        self.totals.steps += 1
        chunks = [(sequence, count) for sequence, count in plan.chunks if sequence.row >= 0]
        singles = [sequence for sequence, count in chunks if _is_decode(sequence, count)]
        if singles:
            self._compute_singles(singles)
        for sequence, count in chunks:
            if not _is_decode(sequence, count):
                self._compute_chunk(sequence, count)
            sequence.computed += count
            if sequence.computed >= (sequence.published_blocks + 1) * self._block_tokens:
                self._publish(sequence)
        readable = tuple(self._readable(chunks))
        sampled = [sequence for sequence, _ in chunks if sequence.computed == sequence.length]
        if not sampled:
            return StepResult(readable=readable)
        prefills: list[PrefillDone] = []
        outputs: list[StepOutput] = []
        for sequence, state in zip(sampled, self._attend(sampled), strict=True):
            token, reason = self._sample(sequence, state)
            logprobs = _logprobs(sequence, token, state, self._usable_tokens)
            if isinstance(sequence.leg, PrefillLeg):
                prefills.append(self._finish_prefill(now, sequence, sequence.leg, token, reason, logprobs))
            else:
                outputs.append(self._finish_decode(sequence, token, reason, logprobs))
        if prefills or any(output.finish_reason for output in outputs):
            self._running = [sequence for sequence in self._running if sequence.row >= 0]
        return StepResult(tuple(prefills), tuple(outputs), readable)

    def _readable(self, chunks: Seq[tuple[Sequence, int]]) -> Iterator[Readable]:
        for sequence, _ in chunks:
            leg = sequence.leg
            if not isinstance(leg, PrefillLeg) or not leg.hand_off or sequence.withdrawn:
                continue
            if sequence.computed < sequence.length:
                sequence.readable = True
                yield Readable(leg, tuple(sequence.blocks), sequence.computed)

    def _compute_chunk(self, sequence: Sequence, count: int) -> None:
        start = sequence.computed
        before = self._memory.read(sequence.blocks, start - 1) if start else sequence.chain_seed
        values = self._chain.run(before, sequence.tokens[start : start + count])
        self._memory.write(sequence.blocks, start, values)

    def _compute_singles(self, sequences: Seq[Sequence]) -> None:
        rows = np.array([sequence.row for sequence in sequences])
        positions = np.array([sequence.computed for sequence in sequences])
        before = self._memory.read_each(*self._place(rows, positions - 1))
        values = self._chain.next(before, np.array([s.tokens.item(s.computed) for s in sequences]))
        self._memory.write_each(*self._place(rows, positions), values)

    def _place(
        self, rows: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        index = positions // self._block_tokens
        return self._tables[rows, index].astype(np.int64), positions - index * self._block_tokens

    def _publish(self, sequence: Sequence) -> None:
        """Lets others find the blocks that became full. What came in tainted stays with the leg it came for."""
        full = sequence.computed // self._block_tokens
        if self._prefix_caching and not sequence.taint:
            known = sequence.tokens[: full * self._block_tokens]
            extend_digests(sequence.digests, sequence.digest_root, known, self._block_tokens)
            for index in range(sequence.published_blocks, full):
                self._pool.publish(sequence.blocks[index], sequence.digests[index])
        sequence.published_blocks = full

    def _attend(self, sequences: Seq[Sequence]) -> list[int]:
        """Random bits for each sequence's next token, made of what its memory holds."""
        rows = np.array([sequence.row for sequence in sequences])
        positions = np.array([sequence.length - 1 for sequence in sequences])
        state = self._memory.attend(self._tables, rows, positions)
        state ^= np.array([sequence.taint for sequence in sequences], dtype=np.uint64)
        seeds = np.array([sequence.sampling_seed for sequence in sequences], dtype=np.uint64)
        state += seeds * (positions + 1).astype(np.uint64)
        bits: list[int] = mix(state).tolist()
        return bits

    def _sample(self, sequence: Sequence, state: int) -> tuple[int, FinishReason | None]:
        """End-of-sequence tokens are never sampled: an answer's length is what was asked for, unless it meets one of
        the request's stop tokens. Penalties, top_p, top_k and min_p change nothing."""
        usable = self._usable_tokens
        token = int(usable[state % len(usable)])
        if sequence.stop_token_ids:
            may_stop = sequence.generated + 1 > sequence.sampling.min_tokens
            while not may_stop and token in sequence.stop_token_ids and len(sequence.stop_token_ids) < len(usable):
                state = mix_int(state + 1)
                token = int(usable[state % len(usable)])
            if token in sequence.stop_token_ids:
                return token, FinishReason.STOP
        if sequence.length + 1 >= sequence.length_max:
            return token, FinishReason.LENGTH
        return token, None

    def _finish_prefill(
        self,
        now: float,
        sequence: Sequence,
        leg: PrefillLeg,
        token: int,
        reason: FinishReason | None,
        logprobs: TokenLogprobs | None,
    ) -> PrefillDone:
        started_s = sequence.arrived_s if sequence.started_s is None else sequence.started_s
        result = PrefillResult(
            token_id=token,
            logprobs=logprobs,
            finish_reason=reason,
            cached_tokens=sequence.cached_tokens,
            queue_s=started_s - sequence.arrived_s,
            prefill_s=now - started_s,
        )
        self.totals.output_tokens += 1
        del self._sequences[leg.leg_id]
        blocks = self._leave_row(sequence)
        if not leg.hand_off or (reason is not None and not leg.resample):
            self._end_reading(sequence)
            self._pool.give_back(blocks)
            return PrefillDone(leg, result, None)
        lease = self._leases[leg.leg_id] = Lease(leg, tuple(blocks))
        return PrefillDone(leg, result, lease)

    def _finish_decode(
        self, sequence: Sequence, token: int, reason: FinishReason | None, logprobs: TokenLogprobs | None
    ) -> StepOutput:
        first = not sequence.generated
        self.totals.output_tokens += 1
        sequence.generated += 1
        leg_id = sequence.leg.leg_id
        if reason is None:
            sequence.tokens[sequence.length] = token
            sequence.length += 1
        else:
            del self._sequences[leg_id]
            self._pool.give_back(self._leave_row(sequence))
        return StepOutput(
            leg_id=leg_id,
            token_ids=(token,),
            finish_reason=reason,
            logprobs=(logprobs,) if logprobs else (),
            cached_tokens=sequence.cached_tokens if first else 0,
        )

    # For tests and debugging

    def check_integrity(self, *, read_memory: bool = False) -> None:
        """Raises AssertionError where state contradicts itself; with `read_memory`, also where any token's bytes are
        not those its sequence should have."""
        leases = self._leases.values()
        self._pool.check_integrity([*(s.blocks for s in self._running), *(lease.blocks for lease in leases)])
        assert set(self._sequences.values()) == {*self._waiting, *self._running}
        assert all(not s.blocks and s.row < 0 and not s.computed for s in self._waiting)
        rows = [s.row for s in self._running]
        assert sorted(rows + self._rows) == list(range(self._limits.max_running))
        for sequence in self._running:
            held = len(sequence.blocks)
            assert sequence.computed < sequence.length <= sequence.length_max
            assert sequence.computed <= held * self._block_tokens
            assert self._tables[sequence.row, :held].tolist() == sequence.blocks
            self._check_blocks(sequence.owner, sequence.blocks)
            if read_memory and not sequence.taint:
                expected = self._chain.run(sequence.chain_seed, sequence.tokens[: sequence.computed])
                assert not self._memory.difference(sequence.blocks, 0, expected)
        for lease in leases:
            tokens = np.array(lease.leg.token_ids, dtype=np.uint32)
            assert len(lease.blocks) == self._blocks_for(len(tokens))
            self._check_blocks(BlockOwner(lease.leg.tenant, lease.leg.cache_salt), lease.blocks)
            if read_memory:
                expected = self._chain.run(self._chain.seed(lease.leg.cache_salt), tokens)
                assert not self._memory.difference(lease.blocks, 0, expected)

    def _check_blocks(self, owner: BlockOwner, blocks: Seq[int]) -> None:
        """No block of another cache salt; the last, which is never shared, was made for this very tenant."""
        owners = [self._pool.owner(block) for block in blocks]
        assert all(o is not None and o.cache_salt == owner.cache_salt for o in owners), "a block of another salt"
        assert owners[-1] == owner, "a block of another tenant"


def _is_decode(sequence: Sequence, count: int) -> bool:
    """One token on top of others: batched, and timed, as a decode, whatever the leg is."""
    return count == 1 and sequence.computed > 0


def _logprobs(sequence: Sequence, token: int, state: int, usable: NDArray[np.uint32]) -> TokenLogprobs | None:
    """Numbers of the right shape, the same for the same memory; they follow no model."""
    wanted = sequence.sampling.logprobs
    if wanted is None:
        return None
    share = 0.5 + (state >> 40) / (1 << 26)
    candidates = dict.fromkeys([token])
    for step in range(1, 4 * wanted):
        candidates[int(usable[mix_int(state + step) % len(usable)])] = None
    ranked = list(candidates)[:wanted]
    top = tuple((t, float(np.log(share if not i else (1 - share) * 0.5**i))) for i, t in enumerate(ranked))
    return TokenLogprobs(token, float(np.log(share)), top)
