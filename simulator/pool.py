"""A pool of workers and its clients in virtual time, around the production core of the router.

Nothing is decided here. Workers compute what they are ordered, a step at a time, and a step takes what the step-time
model says: a prefill worker up to `step_tokens` prompt tokens a step, first come first served; a decode worker one
token for each of its requests, and prompts that it was told to compute itself. Links take `link_s` each way. Two runs
of one seed are the same.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from engine.step_time import StepTime, StepWork
from router.core import effects as fx
from router.core import events as ev
from router.core.budget import Record
from router.core.core import Core
from router.core.errors import TandemError
from router.core.request import FinishReason, GenerationRequest, Lane
from router.core.tenant import TenantBook
from router.core.usage import UsageFacts
from router.core.worker import Capacity, KvEndpoint, Load, ModelFacts, Role, WorkerFacts

MODEL = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShape:
    step_time: StepTime
    prefill_legs: int = 2
    decode_legs: int = 64
    kv_tokens: int = 400_000
    step_tokens: int = 8192
    link_s: float = 0.0005
    transfer_bytes_per_s: float = 40e9
    #: Prompt tokens whose KV it keeps after a request, for the next with the same beginning.
    cache_tokens: int = 0


@dataclass(slots=True)
class Served:
    """What a client saw, and what the pool did for it."""

    request: GenerationRequest
    output_tokens: int
    first_token_at: float | None = None
    tokens: int = 0
    ended_at: float | None = None
    error: TandemError | None = None
    dispatched_at: float | None = None
    #: The router died while it was open.
    lost: bool = False
    #: Workers that were given any of it.
    workers: set[str] = field(default_factory=set)

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.request.arrival


@dataclass(slots=True)
class _Leg:
    order: fx.SendPrefill | fx.SendDecode
    #: Prompt tokens left to compute, and already there.
    left: int = 0
    reached: int = 0
    cached: int = 0
    made: int = 0


class _Worker:
    def __init__(self, pool: SimulatedPool, facts: WorkerFacts, shape: WorkerShape) -> None:
        self.pool = pool
        self.facts = facts
        self.shape = shape
        self.computing: OrderedDict[str, _Leg] = OrderedDict()
        self.decoding: dict[str, _Leg] = {}
        self.cancelled: set[str] = set()
        self.stepping = False
        self.dead = False
        #: Leading blocks of prompts in its cache, oldest use first.
        self.cache: OrderedDict[int, None] = OrderedDict()

    def receive(self, effect: fx.Effect) -> None:
        if self.dead:
            return
        match effect:
            case fx.SendPrefill():
                self._compute(effect)
            case fx.SendDecode(handle=b""):
                self._compute(effect)
            case fx.SendDecode():
                moved = len(effect.token_ids) * self.shape.step_time.kv_bytes_per_token
                seconds = moved / self.shape.transfer_bytes_per_s
                self.pool.after(seconds, lambda: self._fetched(effect, moved, seconds))
            case fx.CancelLeg(_, leg_id):
                self.computing.pop(leg_id, None)
                self.decoding.pop(leg_id, None)
                self.cancelled.add(leg_id)

    def _compute(self, order: fx.SendPrefill | fx.SendDecode) -> None:
        cached = self._cached(order)
        self.computing[order.leg_id] = _Leg(order, left=len(order.token_ids) - cached, reached=cached, cached=cached)
        self._step()

    def _fetched(self, order: fx.SendDecode, moved: int, seconds: float) -> None:
        if self.dead or order.leg_id in self.cancelled:
            return
        self._tell(
            ev.Fetched(
                worker_id=self.facts.worker_id,
                leg_id=order.leg_id,
                transport="simulated",
                nbytes=moved,
                fetch_s=seconds,
            )
        )
        self.decoding[order.leg_id] = _Leg(order, reached=len(order.token_ids))
        self._step()

    def _step(self) -> None:
        """Begins a step if none is under way and there is something to do."""
        if self.stepping or self.dead or not (self.computing or self.decoding):
            return
        self.stepping = True
        budget, chunks, pairs = self.shape.step_tokens, [], 0
        for leg in self.computing.values():
            take = min(leg.left, budget)
            chunks.append((leg, take))
            pairs += (leg.reached + take) ** 2 - leg.reached**2
            budget -= take
            if not budget:
                break
        decodes = tuple(self.decoding.values())
        work = StepWork(
            prefill_tokens=self.shape.step_tokens - budget,
            prefill_pairs=pairs,
            decodes=len(decodes),
            context_tokens=sum(leg.reached for leg in decodes),
        )
        seconds = self.shape.step_time.step_s(work)
        self.pool.busy(self.facts.worker_id, seconds)
        self.pool.after(seconds, lambda: self._stepped(chunks, decodes))

    def _stepped(self, chunks: list[tuple[_Leg, int]], decodes: tuple[_Leg, ...]) -> None:
        if self.dead:
            return
        self.stepping = False
        outputs = [self._decoded(leg) for leg in decodes if leg.order.leg_id in self.decoding]
        for leg, take in chunks:
            leg.left -= take
            leg.reached += take
            if not leg.left and self.computing.pop(leg.order.leg_id, None) is not None:
                outputs += self._computed(leg)
        if outputs:
            self._tell(ev.StepOutputs(self.facts.worker_id, tuple(outputs)))
        self._step()

    def _computed(self, leg: _Leg) -> Iterator[ev.StepOutput]:
        order = leg.order
        self._keep(order)
        self.pool.computed(order.leg_id, len(order.token_ids) - leg.cached)
        if isinstance(order, fx.SendDecode):
            self.decoding[order.leg_id] = leg
            yield self._decoded(leg)
            return
        finish = self.pool.finish(order.leg_id, order.sampling.max_tokens, 1)
        self._tell(
            ev.PrefillDone(
                worker_id=self.facts.worker_id,
                leg_id=order.leg_id,
                token_id=1,
                finish_reason=finish,
                handle=b"" if finish is not None or not order.hand_off else order.leg_id.encode(),
                cached_tokens=leg.cached,
            )
        )

    def _decoded(self, leg: _Leg) -> ev.StepOutput:
        order = leg.order
        leg.made += 1
        leg.reached += 1
        finish = self.pool.finish(order.leg_id, order.sampling.max_tokens, leg.made)
        if finish is not None:
            del self.decoding[order.leg_id]
        return ev.StepOutput(order.leg_id, (1,), finish, (), leg.cached if leg.made == 1 else 0)

    def _tell(self, event: ev.Event) -> None:
        self.pool.after(self.shape.link_s, lambda: None if self.dead else self.pool.post(event))

    # Its prefix cache: whole blocks, by a hash over everything before and the salt.

    def _cached(self, order: fx.SendPrefill | fx.SendDecode) -> int:
        if not self.shape.cache_tokens:
            return 0
        found = 0
        for key in self._blocks(order):
            if key not in self.cache:
                break
            self.cache.move_to_end(key)
            found += _BLOCK
        return min(found, len(order.token_ids) - 1)

    def _keep(self, order: fx.SendPrefill | fx.SendDecode) -> None:
        if self.shape.cache_tokens:
            for key in self._blocks(order):
                self.cache[key] = None
                self.cache.move_to_end(key)
            while len(self.cache) > self.shape.cache_tokens // _BLOCK:
                self.cache.popitem(last=False)

    def _blocks(self, order: fx.SendPrefill | fx.SendDecode) -> Iterator[int]:
        key = hash(int.from_bytes(order.cache_salt, "big"))
        for start in range(0, len(order.token_ids) - _BLOCK + 1, _BLOCK):
            key = hash((key, order.token_ids[start : start + _BLOCK]))
            yield key


_BLOCK = 16


class SimulatedPool:
    """Time, the core, its workers, and everybody who waits for an answer."""

    def __init__(self, new_core: Callable[[float, tuple[Record, ...]], Core]) -> None:
        self.now = 0.0
        self._new_core = new_core
        self.core = new_core(0.0, ())
        self.workers: dict[str, _Worker] = {}
        self.open: dict[str, Served] = {}
        self.records: list[Record] = []
        self.usage: list[UsageFacts] = []
        self.busy_s: dict[str, float] = {}
        #: Told of everything that happens to a request: (what, request, amount).
        self.on_work: Callable[[str, Served, int], None] = lambda what, served, amount: None
        self.on_end: Callable[[Served], None] = lambda served: None
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._ever = 0
        self._wake_at: float | None = None

    # Time.

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._ever += 1
        heappush(self._agenda, (when, self._ever, do))

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        self.at(self.now + seconds, do)

    def run(self, until: float) -> None:
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, do = heappop(self._agenda)
            do()
        self.now = until

    # The core.

    def post(self, event: ev.Event) -> None:
        todo = deque(self.core.handle(self.now, event))
        while todo:
            self._do(todo.popleft())
        at = self.core.next_deadline()
        if at is not None and (self._wake_at is None or at < self._wake_at):
            self._wake_at = at
            self.at(max(at, self.now), self._tick)

    def _tick(self) -> None:
        self._wake_at = None
        self.post(ev.Tick())

    def _do(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Emit(key, event):
                self._told(self.open.get(key), event)
            case fx.Journal(record):
                self.records.append(record)
            case fx.UsageRecorded(usage):
                self.usage.append(usage)
            case fx.CloseLink():
                pass
            case _:
                if isinstance(effect, fx.SendPrefill | fx.SendDecode):
                    self._dispatched(effect)
                worker = self.workers.get(effect.worker_id)
                if worker is not None:
                    self.after(worker.shape.link_s, lambda: worker.receive(effect))

    def _dispatched(self, order: fx.SendPrefill | fx.SendDecode) -> None:
        served = self._served(order.leg_id)
        if served is not None:
            served.workers.add(order.worker_id)
            if served.dispatched_at is None:
                served.dispatched_at = self.now
                self.on_work("dispatched", served, len(served.request.prompt) + served.output_tokens)

    def _told(self, served: Served | None, event: fx.ClientEvent) -> None:
        if served is None:
            return
        if isinstance(event, fx.Tokens):
            if served.first_token_at is None:
                served.first_token_at = self.now
            served.tokens += len(event.token_ids)
            self.on_work("generated", served, len(event.token_ids))
            return
        del self.open[served.request.key]
        served.ended_at = self.now
        served.error = event.error if isinstance(event, fx.Failed) else None
        self.on_end(served)

    # What workers ask and tell.

    def busy(self, worker_id: str, seconds: float) -> None:
        self.busy_s[worker_id] = self.busy_s.get(worker_id, 0.0) + seconds

    def computed(self, leg_id: str, tokens: int) -> None:
        if (served := self._served(leg_id)) is not None:
            self.on_work("computed", served, tokens)

    def finish(self, leg_id: str, max_tokens: int, made: int) -> FinishReason | None:
        """Whether the answer ends with this token of the leg. What the answer is, only the client's model knows."""
        served = self._served(leg_id)
        if served is None or served.tokens + 1 >= served.output_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if made >= max_tokens else None

    def _served(self, leg_id: str) -> Served | None:
        return self.open.get(leg_id.rsplit("/", 2)[0])

    # Who comes and goes.

    def join(self, worker_id: str, role: Role, shape: WorkerShape, labels: dict[str, str]) -> None:
        facts = WorkerFacts(
            worker_id=worker_id,
            incarnation=f"{worker_id}@{self.now}",
            role=role,
            model=ModelFacts(name=MODEL, revision="1", max_model_len=131_072, vocab_size=128_000),
            capacity=Capacity(
                prefill_legs=shape.prefill_legs,
                decode_legs=shape.decode_legs,
                kv_blocks=shape.kv_tokens // _BLOCK,
                block_tokens=_BLOCK,
            ),
            kv=KvEndpoint(address=f"{worker_id}:1", incarnation=worker_id),
            labels=labels,
        )
        worker = self.workers[worker_id] = _Worker(self, facts, shape)
        self.post(ev.WorkerJoined(facts))
        self.after(10.0, lambda: self._report(worker))

    def _report(self, worker: _Worker) -> None:
        if not worker.dead:
            self.post(ev.LoadReported(worker.facts.worker_id, Load()))
            self.after(10.0, lambda: self._report(worker))

    def lose(self, worker_id: str) -> None:
        self.workers.pop(worker_id).dead = True
        self.post(ev.WorkerLost(worker_id))

    def restart_router(self) -> None:
        """`kill -9`: what was open is lost to its clients, workers come back with empty hands, records are replayed."""
        lost, self.open = tuple(self.open.values()), {}
        self.core = self._new_core(self.now, tuple(self.records))
        self._wake_at = None
        workers = tuple(self.workers.values())
        for worker in workers:
            worker.dead = True
            self.join(worker.facts.worker_id, worker.facts.role, worker.shape, dict(worker.facts.labels))
        for served in lost:
            served.ended_at, served.lost = self.now, True
            self.on_end(served)

    def send(self, served: Served) -> None:
        self.open[served.request.key] = served
        self.post(ev.Submit(served.request))

    def cancel(self, served: Served) -> None:
        if served.request.key in self.open:
            self.post(ev.Cancel(served.request.key))

    def configure(self, book: TenantBook) -> None:
        self.post(ev.TenantsChanged(book))


def lane_of(book: TenantBook, tenant: str, asked: Lane | None) -> Lane:
    """As every edge does it: the credential's tenant decides, what is asked can only lower."""
    known = book.tenant(tenant)
    return asked or Lane.STANDARD if known is None else known.lane_for(asked)
