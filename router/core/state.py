"""The one owner of requests, workers and queues.

Only `State` changes where a request is and what a worker holds for it, always on both sides at once, so that the two
can be checked against each other (`check_integrity`). It decides nothing.

    request ---- prefill_leg, decode_leg ----> worker.legs         an order is out
            ---- prefilling_at --------------> worker.prefilling   prompt tokens not computed yet
            ---- pinned_at ------------------> worker.pinned       KV blocks that the prompt holds, until fetched
            ---- slot_at --------------------> worker.slots        KV blocks promised to its decode leg
            ---- QUEUED ---------------------> pool.queue

Whatever changes what a worker could take also tells its pool's roster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from router.core.admission import Admitted
from router.core.errors import TandemError
from router.core.fair import Ahead, FairLimits, FairQueue, Waiting
from router.core.lifecycle import OPEN, Trigger, next_state
from router.core.lifecycle import State as Life
from router.core.linked import Worker
from router.core.prefix import Prefix, PrefixIndex
from router.core.request import GenerationRequest, Lane
from router.core.roster import Roster
from router.core.story import History, Placed, Reserved, Story
from router.core.tenant import ANYWHERE, Selector, TenantBook
from router.core.usage import UsageFacts
from router.core.worker import WorkerFacts


class Leg(NamedTuple):
    leg_id: str
    worker_id: str


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request that has not ended."""

    request: GenerationRequest
    key: str = field(init=False)
    #: What it holds of its tenant's limits; None for one that was refused.
    admitted: Admitted | None = None
    #: Part of every prefix key, here and in engines.
    salt: bytes = b""
    state: Life = Life.QUEUED
    #: Every token known, in order. All of them have been emitted.
    generated: list[int] = field(default_factory=list)

    prefill_leg: Leg | None = None
    decode_leg: Leg | None = None
    prefilling_at: str | None = None
    pinned_at: str | None = None
    slot_at: str | None = None
    #: To the blocks pinned at `pinned_at`; empty before they are offered.
    handle: bytes = b""
    #: The prefill leg, and who was told to fetch its blocks ahead, until they are fetched.
    hint: Leg | None = None

    #: Generated tokens that the open leg was given as prompt.
    base: int = 0
    #: Index of the token that the open decode leg gives next; less than len(generated) while replaying.
    position: int = 0

    prefill_failures: int = 0
    decode_failures: int = 0
    #: From now on only its decode worker may compute the prompt.
    local_only: bool = False
    #: Replaying gave other tokens than before; never replay again.
    replay_failed: bool = False
    #: Where the last prefill leg failed.
    avoid: str = ""

    dispatched_at: float | None = None
    #: When the open leg's order went out.
    ordered_at: float = 0.0
    prefilled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    transfer_s: float = 0.0
    cached_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    transport: str = ""
    transfer_bytes: int = 0
    local_prefill: bool = False

    #: What it found before it, and for how long its tenant's cap kept its flow back until then.
    ahead: Ahead | None = None
    capped_s: float = 0.0
    #: The prompt's leading chunks; None until somebody asks.
    prefix: Prefix | None = None
    #: Times it gave way to others.
    preemptions: int = 0
    #: Output that its flow was charged for.
    charged_tokens: int = 0
    #: Of the open order: prompt tokens of others before it, and its own; the order makes up for giving way.
    queued_before: int = 0
    leg_tokens: int = 0
    forgiven: bool = False
    #: Prompt tokens computed for it, over all attempts; of those, its own doing; and the prompt is complete.
    computed_tokens: int = 0
    charged_prompt_tokens: int = 0
    prompt_done: bool = False
    #: Output tokens generated once more.
    replayed_tokens: int = 0
    #: Where it was placed and why, last.
    placed: Placed | None = None
    #: When it was first the next in line and no worker had room, and for how long it stood there.
    stuck_at: float | None = None
    stuck_s: float = 0.0

    #: (when, what), for `tandem why` and for faults.
    story: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.key = self.request.key

    @property
    def retries(self) -> int:
        return self.prefill_failures + self.decode_failures

    @property
    def waiting(self) -> Waiting:
        request = self.request
        return Waiting(self.key, request.tenant, request.lane, len(request.prompt), request.sampling.max_tokens)


@dataclass(slots=True, eq=False)
class Pool:
    """The workers of one model, and who waits for them."""

    model: str
    queue: FairQueue
    workers: dict[str, Worker] = field(default_factory=dict)
    roster: Roster = field(default_factory=Roster)
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    #: By selector, since when no worker open to it could serve anything. Selectors that are served are not here.
    pathless_since: dict[Selector, float] = field(default_factory=dict)
    #: Heads that could not be placed, each with what it was among: the roster's version and what was parked.
    stuck: dict[str, tuple[int, frozenset[Selector]]] = field(default_factory=dict)
    #: Dispatched requests that may be made to wait for others, latest begun last.
    may_yield: dict[str, None] = field(default_factory=dict)


class State:
    def __init__(
        self,
        *,
        history_max: int,
        story_lines_max: int,
        preemptions_max: int,
        book: TenantBook,
        fair: FairLimits,
    ) -> None:
        self._story_lines_max = story_lines_max
        self._preemptions_max = preemptions_max
        self._book = book
        self._fair = fair
        #: Every selector that a tenant has.
        self.selectors = _selectors(book)
        self._legs_ever = 0
        self._chosen_ever = 0
        self.pools: dict[str, Pool] = {}
        self.workers: dict[str, Worker] = {}
        self.requests: dict[str, OpenRequest] = {}
        #: Every open leg, and whose it is.
        self.legs: dict[str, OpenRequest] = {}
        self.history = History(history_max)

    # Pools and workers.

    def pool(self, now: float, model: str) -> Pool:
        pool = self.pools.get(model)
        if pool is None:
            pool = self.pools[model] = Pool(model, FairQueue(self._book, self._fair))
            pool.roster.configure(self.selectors, self._book.dedicated, ())
            pool.pathless_since = dict.fromkeys(self.selectors, now)
        return pool

    def configure(self, now: float, book: TenantBook) -> None:
        """Another book. Requests stay where they are."""
        self._book, self.selectors = book, _selectors(book)
        for pool in self.pools.values():
            pool.queue.configure(now, book)
            pool.roster.configure(self.selectors, book.dedicated, pool.workers.values())

    def add_worker(self, now: float, facts: WorkerFacts) -> Worker:
        assert facts.worker_id not in self.workers
        worker = Worker(facts, facts.role, heard_at=now)
        self.workers[facts.worker_id] = worker
        self.pool(now, facts.model.name).workers[facts.worker_id] = worker
        self.touch(worker)
        return worker

    def touch(self, worker: Worker) -> None:
        """To be called after every change to what a worker could take."""
        self.pools[worker.facts.model.name].roster.touch(worker)

    def drop_worker(self, worker: Worker) -> None:
        """For a worker that holds nothing any more."""
        assert not self.requests_at(worker)
        pool = self.pools[worker.facts.model.name]
        del self.workers[worker.worker_id]
        del pool.workers[worker.worker_id]
        pool.roster.forget(worker)
        pool.prefixes.forget(worker.worker_id)

    def requests_at(self, worker: Worker) -> tuple[OpenRequest, ...]:
        """All that have a leg, a slot or a lease there, in order of arrival at the worker."""
        ids = dict.fromkeys((*worker.legs.values(), *worker.slots, *worker.pinned))
        return tuple(self.requests[key] for key in ids)

    @property
    def queued(self) -> int:
        return sum(len(pool.queue) for pool in self.pools.values())

    @property
    def queued_tokens(self) -> int:
        return sum(pool.queue.tokens for pool in self.pools.values())

    # A request's life.

    def open(self, now: float, opened: OpenRequest) -> None:
        """An admitted request joins its pool's queue."""
        assert opened.key not in self.requests
        self.requests[opened.key] = opened
        request = opened.request
        queue = self.pool(now, request.model).queue
        opened.capped_s = queue.capped_s(now, request.tenant, request.lane)
        queue.push(now, opened.waiting)

    def leave_queue(self, now: float, opened: OpenRequest, trigger: Trigger, *, cached_tokens: int) -> None:
        """What was peeked at is dispatched."""
        pool, request = self.pools[opened.request.model], opened.request
        popped = pool.queue.pop(now, cached_tokens=cached_tokens)
        assert popped == opened.key
        if opened.dispatched_at is None:
            opened.capped_s = pool.queue.capped_s(now, request.tenant, request.lane) - opened.capped_s
        if request.lane is Lane.BATCH and opened.preemptions < self._preemptions_max:
            pool.may_yield[opened.key] = None
        self.move(opened, trigger)

    def rejoin_queue(self, now: float, opened: OpenRequest) -> None:
        """To be dispatched again. It has no leg; it may have its slot."""
        assert opened.prefill_leg is None
        assert opened.decode_leg is None
        pool = self.pools[opened.request.model]
        pool.may_yield.pop(opened.key, None)
        self.move(opened, Trigger.RETRY)
        pool.queue.push(now, opened.waiting, again=True)

    def end(self, now: float, opened: OpenRequest, trigger: Trigger, error: TandemError | None) -> float:
        """It has no leg, no slot and no lease any more. Returns what its flow was charged."""
        pool, cost = self.pools[opened.request.model], 0.0
        if opened.state is Life.QUEUED:
            pool.queue.remove(now, opened.key)
        if opened.dispatched_at is not None:
            output = len(opened.generated) + opened.replayed_tokens
            cost = pool.queue.settle(now, opened.key, opened.charged_prompt_tokens, output)
        pool.may_yield.pop(opened.key, None)
        pool.stuck.pop(opened.key, None)
        self.move(opened, trigger)
        self.note(now, opened, opened.state.value if error is None else f"{opened.state.value}: {error}")
        del self.requests[opened.key]
        return cost

    def move(self, opened: OpenRequest, trigger: Trigger) -> None:
        opened.state = next_state(opened.state, trigger, _told(opened))

    def note(self, now: float, opened: OpenRequest, what: str) -> None:
        story = opened.story
        if len(story) < self._story_lines_max - 1:
            story.append((now, what))
        elif len(story) == self._story_lines_max - 1:
            story.append((now, "... (no more lines are kept)"))

    def tell(self, opened: OpenRequest, error: TandemError | None = None, usage: UsageFacts | None = None) -> Story:
        request, begun, admitted = opened.request, opened.dispatched_at, opened.admitted
        reserved = None
        if admitted is not None:
            reserved = Reserved(admitted.prompt_tokens + admitted.output_tokens, admitted.money_micros_max)
        return Story(
            request_id=request.request_id,
            trace_id=request.trace_id,
            tenant=request.tenant,
            model=request.model,
            lane=request.lane,
            state=opened.state,
            arrival=request.arrival,
            error=error,
            ahead=opened.ahead,
            queue_s=None if begun is None else begun - request.arrival,
            capped_s=0.0 if begun is None else opened.capped_s,
            stuck_s=opened.stuck_s,
            placed=opened.placed,
            prefill_worker=opened.prefill_worker,
            decode_worker=opened.decode_worker,
            transport=opened.transport,
            transfer_bytes=opened.transfer_bytes,
            transfer_s=opened.transfer_s,
            local_prefill=opened.local_prefill,
            ttft_s=None if opened.first_token_at is None else opened.first_token_at - request.arrival,
            preemptions=opened.preemptions,
            retries=opened.retries,
            reserved=reserved,
            usage=usage,
            lines=tuple((when - request.arrival, what) for when, what in opened.story),
        )

    # What a request holds at workers.

    def open_prefill_leg(self, opened: OpenRequest, worker: Worker, *, tokens: int, blocks: int) -> Leg:
        leg = self._open_leg(opened, worker, "p")
        self._compute(opened, worker, tokens)
        worker.pinned.add(opened.key, blocks)
        self.touch(worker)
        opened.prefill_leg = leg
        opened.pinned_at = worker.worker_id
        return leg

    def close_prefill_leg(self, opened: OpenRequest) -> Leg:
        """The blocks stay pinned."""
        assert opened.prefill_leg is not None
        leg, opened.prefill_leg = opened.prefill_leg, None
        self._close_leg(leg)
        self.computed(opened)
        return leg

    def unpin(self, opened: OpenRequest) -> None:
        if opened.pinned_at is not None:
            worker = self.workers[opened.pinned_at]
            worker.pinned.drop(opened.key)
            self.touch(worker)
            opened.pinned_at = None
            opened.handle = b""

    def take_slot(self, opened: OpenRequest, worker: Worker, blocks: int) -> None:
        assert opened.slot_at is None
        worker.slots.add(opened.key, blocks)
        self.touch(worker)
        opened.slot_at = worker.worker_id

    def drop_slot(self, opened: OpenRequest) -> None:
        assert opened.decode_leg is None
        if opened.slot_at is not None:
            worker = self.workers[opened.slot_at]
            worker.slots.drop(opened.key)
            self.touch(worker)
            opened.slot_at = None

    def open_decode_leg(self, opened: OpenRequest, *, prompt_tokens: int) -> Leg:
        """At its slot. `prompt_tokens` are those that the worker has to compute itself."""
        assert opened.slot_at is not None
        worker = self.workers[opened.slot_at]
        leg = self._open_leg(opened, worker, "d")
        if prompt_tokens:
            self._compute(opened, worker, prompt_tokens)
        opened.decode_leg = leg
        return leg

    def close_decode_leg(self, opened: OpenRequest) -> Leg:
        """The slot stays taken."""
        assert opened.decode_leg is not None
        leg, opened.decode_leg = opened.decode_leg, None
        self._close_leg(leg)
        self.computed(opened)
        return leg

    def _compute(self, opened: OpenRequest, worker: Worker, tokens: int) -> None:
        worker.prefilling.add(opened.key, tokens)
        self.pools[opened.request.model].queue.computing += tokens
        opened.prefilling_at = worker.worker_id

    def computed(self, opened: OpenRequest) -> None:
        """Nobody is computing its prompt any more."""
        if opened.prefilling_at is not None:
            worker = self.workers[opened.prefilling_at]
            self.pools[opened.request.model].queue.computing -= worker.prefilling.get(opened.key)
            worker.prefilling.drop(opened.key)
            self.touch(worker)
            opened.prefilling_at = None

    def _open_leg(self, opened: OpenRequest, worker: Worker, kind: str) -> Leg:
        # The number is unique in this core, so a late message can't meet a namesake's leg.
        self._legs_ever += 1
        self._chosen_ever += 1
        worker.chosen = self._chosen_ever
        self.touch(worker)
        leg = Leg(f"{opened.key}/{self._legs_ever}/{kind}", worker.worker_id)
        worker.legs[leg.leg_id] = opened.key
        self.legs[leg.leg_id] = opened
        return leg

    def _close_leg(self, leg: Leg) -> None:
        del self.workers[leg.worker_id].legs[leg.leg_id]
        del self.legs[leg.leg_id]

    # What must stay true.

    def check_integrity(self, now: float) -> None:
        """Costs O(everything); for tests and for whoever suspects a fault."""
        for pool in self.pools.values():
            pool.queue.check_integrity()
            assert pool.queue.computing == sum(worker.prefilling.total for worker in pool.workers.values())
            pool.prefixes.check_integrity()
            pool.roster.check_integrity(now, pool.workers.values())
            for key in pool.may_yield:
                assert self.requests[key].state is not Life.QUEUED
                assert self.requests[key].request.lane is Lane.BATCH
            for worker_id, worker in pool.workers.items():
                assert self.workers[worker_id] is worker
        assert len(self.workers) == sum(len(pool.workers) for pool in self.pools.values())
        for worker in self.workers.values():
            self._check_worker(worker)
        for key, opened in self.requests.items():
            assert opened.key == opened.request.key == key
            self._check_request(opened)
        queued = [opened for opened in self.requests.values() if opened.state is Life.QUEUED]
        assert len(queued) == self.queued
        assert sum(len(opened.request.prompt) for opened in queued) == self.queued_tokens
        assert len(self.legs) == sum(len(worker.legs) for worker in self.workers.values())
        self.history.check_integrity()

    def _check_worker(self, worker: Worker) -> None:
        assert not worker.gone
        for leg_id, key in worker.legs.items():
            opened = self.requests[key]
            assert self.legs[leg_id] is opened
            assert Leg(leg_id, worker.worker_id) in (opened.prefill_leg, opened.decode_leg)
        for holdings, place in (
            (worker.prefilling, "prefilling_at"),
            (worker.pinned, "pinned_at"),
            (worker.slots, "slot_at"),
        ):
            holdings.check()
            assert all(getattr(self.requests[key], place) == worker.worker_id for key in holdings)

    def _check_request(self, opened: OpenRequest) -> None:
        story = _told(opened)
        assert opened.state in OPEN, story
        assert (opened.key in self.pools[opened.request.model].queue) == (opened.state is Life.QUEUED), story
        assert (opened.prefill_leg is not None) == (opened.state is Life.PREFILLING), story
        assert (opened.decode_leg is not None) == (opened.state in (Life.HANDING_OFF, Life.DECODING)), story
        assert (opened.pinned_at is not None) == (opened.state in (Life.PREFILLING, Life.HANDING_OFF)), story
        assert opened.slot_at is not None or opened.state is Life.QUEUED, story
        for leg in (opened.prefill_leg, opened.decode_leg):
            assert leg is None or self.legs[leg.leg_id] is opened, story
        if opened.decode_leg is not None:
            assert opened.decode_leg.worker_id == opened.slot_at, story
        for place, held in (
            (opened.prefilling_at, "prefilling"),
            (opened.pinned_at, "pinned"),
            (opened.slot_at, "slots"),
        ):
            assert place is None or opened.key in getattr(self.workers[place], held), story
        assert len(opened.generated) <= opened.request.sampling.max_tokens, story
        charged = self.pools[opened.request.model].queue.is_charged(opened.key)
        assert charged == (opened.dispatched_at is not None), story
        assert opened.base <= opened.position or opened.decode_leg is None, story


def _selectors(book: TenantBook) -> tuple[Selector, ...]:
    return tuple(dict.fromkeys(tenant.pool for tenant in book.everyone())) or (ANYWHERE,)


def _told(opened: OpenRequest) -> str:
    return "\n".join(f"{when:.6f} {opened.key} {what}" for when, what in opened.story)
