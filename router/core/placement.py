"""Who serves a request: a pair of workers, or one worker for all of it. Decides only; `core.py` carries it out.

Only workers open to the tenant's selector are looked at, of those only the best ranked and the few that probably hold
the prompt's beginning (`roster.py`, `prefix.py`), so a choice costs O(log n).

1. **At its decode worker**, where splitting would lose: what is left to compute there is so short that the step-time
   model lets it delay the others, because the prompt is short or because the worker holds its beginning.
2. A **pair**: the prefill worker with the earliest predicted first token (prompts before it + what is not cached there
   + the move), and the decode worker with the most KV room, unless the two are known not to reach each other. A request
   that is run again keeps its decode slot and avoids the prefill worker that failed it.
3. **At a decode worker, because prefill workers are far behind**, if the operator lets prompts overflow: the pools are
   sized for a mixture of prompts and answers, and the load has another one now.
4. A **whole engine** (role BOTH) serves alone; chosen like a prefill worker, but first by how many it serves.
5. A decode worker serves alone when no prefill worker could, now or later, or when the transfer has failed too often;
   within a budget, because the prompts it computes delay those it is decoding for.

None means: wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from router.core.estimate import UNKNOWN, StepModel
from router.core.limits import CoreLimits
from router.core.linked import Worker
from router.core.roster import Group, Ranking
from router.core.state import OpenRequest, Pool
from router.core.story import Figures
from router.core.tenant import Selector
from router.core.worker import Role

#: How many of the best ranked are looked at where the best may not do.
_LOOK = 4
#: A prompt overflows when the pair's first token is predicted so many times as late as the decode worker's. At 1 the
#: decode workers get half of the prompts on top of all decoding, and prefill workers run dry between bursts; at 5 too
#: few to matter when little is in flight (benchmarks/handoff.py: 1 to 5 were tried).
_FAR_BEHIND = 3.0


class Why(Enum):
    """What decided."""

    LEAST_LOADED = "the earliest predicted first token"
    PREFIX = "the earliest predicted first token, since it holds the prompt's beginning"
    WHOLE = "one engine for all"
    SHORT = "the prompt is short enough to be computed where it is decoded"
    CACHED = "its decode worker holds the prompt's beginning"
    OVERFLOW = "prefill workers are so far behind that its decode worker computes it sooner"
    NO_PREFILL = "no prefill worker can serve it"


@dataclass(frozen=True, slots=True)
class Pair:
    prefill: Worker
    decode: Worker
    why: Why
    figures: Figures
    #: The best of those that were not taken.
    runner_up: Figures | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    worker: Worker
    why: Why
    figures: Figures
    runner_up: Figures | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be placed, and what is the same for all workers."""

    now: float
    pool: Pool
    opened: OpenRequest
    selector: Selector
    limits: CoreLimits
    step: StepModel
    #: Open to it and not waited for by others.
    groups: tuple[Group, ...]
    #: Workers that probably hold the prompt's beginning, with how many tokens of it.
    holders: Mapping[str, int]
    #: Prompt tokens, with those that were generated before.
    tokens: int
    #: KV blocks for its prefill leg and for its decode leg; a pool's workers have blocks of one size.
    prompt_blocks: int
    slot_blocks: int

    def uncached(self, worker: Worker) -> int:
        # The last token is always computed: it gives the first one of the answer.
        return max(1, self.tokens - self.holders.get(worker.worker_id, 0))

    def ttft_s(self, worker: Worker) -> float:
        busy_s = max(0.0, worker.busy_until - self.now)
        queue_s = self.step.queue_s(worker.prefilling.total)
        return busy_s + queue_s + self.step.compute_s(self.uncached(worker), self.tokens)

    def figures(self, worker: Worker, move_s: float = 0.0) -> Figures:
        uncached = self.uncached(worker)
        ttft_s = None if self.step is UNKNOWN else self.ttft_s(worker) + move_s
        return Figures(worker.worker_id, self.tokens - uncached, worker.prefilling.total + uncached, ttft_s)


def ask(now: float, pool: Pool, opened: OpenRequest, selector: Selector, limits: CoreLimits, step: StepModel) -> Ask:
    if opened.prefix is None:
        opened.prefix = pool.prefixes.prefix(opened.salt, opened.request.prompt)
    any_worker = next(iter(pool.workers.values()), None)
    return Ask(
        now,
        pool,
        opened,
        selector,
        limits,
        step,
        groups=pool.roster.groups(now, selector, pool.queue.parked),
        holders=pool.prefixes.holders(opened.prefix),
        tokens=len(opened.request.prompt) + len(opened.generated),
        prompt_blocks=0 if any_worker is None else prompt_blocks(any_worker, opened),
        slot_blocks=0 if any_worker is None else slot_blocks(any_worker, opened, limits),
    )


def place(what: Ask) -> Pair | Whole | None:
    opened = what.opened
    decoders = _decoders(what)
    if not opened.local_only:
        if (here := _where_it_is_decoded(what, decoders)) is not None:
            return here
        if (pair := _pair(what, decoders)) is not None:
            return _overflow(what, decoders, pair) or pair
    if opened.slot_at is None and (whole := _whole_engine(what)) is not None:
        return whole
    if not opened.local_only and _prefill_may_come(what, decoders):
        return _overflow(what, decoders)
    return _local(what)


def fits_somewhere(what: Ask) -> bool:
    """True unless every worker that can decode is too small for this request even when empty."""
    request = what.opened.request
    tokens = len(request.prompt) + request.sampling.max_tokens
    largest = (group.decoders.first() for group in what.pool.roster.groups(what.now, what.selector))
    return any(
        worker is not None and worker.blocks_for(tokens) <= worker.facts.capacity.kv_blocks for worker in largest
    )


def decodes(worker: Worker) -> bool:
    """True when it takes decode legs, now or once it has room."""
    return worker.role is not Role.PREFILL and not (worker.draining or worker.gone)


def slot_blocks(worker: Worker, opened: OpenRequest, limits: CoreLimits) -> int:
    """KV blocks to promise to its decode leg."""
    request = opened.request
    expected = max(len(opened.generated), min(request.sampling.max_tokens, limits.reserve_tokens_max))
    return worker.blocks_for(len(request.prompt) + expected)


def prompt_blocks(worker: Worker, opened: OpenRequest) -> int:
    """KV blocks that its prefill leg pins."""
    return worker.blocks_for(len(opened.request.prompt) + len(opened.generated))


# Decode workers.


def _decoders(what: Ask) -> list[Worker]:
    """A few that have, or have room for, its slot; the roomiest first."""
    opened = what.opened
    if opened.slot_at is not None:
        worker = what.pool.workers[opened.slot_at]
        return [worker] if _serves(worker, what.now) else []
    able = [worker for group in what.groups for worker in islice(group.decode, _LOOK) if _can_take_slot(what, worker)]
    if len(what.groups) > 1:
        able.sort(key=lambda worker: (-worker.kv_room, worker.chosen))
    return able[:_LOOK]


def _serves(worker: Worker, now: float) -> bool:
    return not (worker.draining or worker.gone) and worker.rest_until <= now


def _can_take_slot(what: Ask, worker: Worker) -> bool:
    return what.slot_blocks <= worker.kv_room and len(worker.slots) < worker.facts.capacity.decode_legs


def _where_it_is_decoded(what: Ask, decoders: list[Worker]) -> Whole | None:
    """Where the rest of the prompt is short enough to be computed between the decodes' steps."""
    if not what.step.stall_s_max or not decoders:
        return None
    candidates = decoders[:1]
    if what.opened.slot_at is None:
        candidates += [worker for worker in _holding(what, lambda group: group.decode) if _can_take_slot(what, worker)]
    best = min(candidates, key=lambda worker: (what.ttft_s(worker), worker.chosen))
    uncached = what.uncached(best)
    if not what.step.may_stall(uncached + best.prefilling.total, what.tokens + best.prefilling.total):
        return None
    short = what.step.may_stall(what.tokens + best.prefilling.total, what.tokens + best.prefilling.total)
    why = Why.SHORT if short else Why.CACHED
    return Whole(best, why, what.figures(best), _elsewhere(what, best) if what.opened.slot_at is None else None)


def _elsewhere(what: Ask, decode: Worker) -> Figures | None:
    """What splitting would have given, by the least loaded prefill worker."""
    worker = next((worker for group in what.groups if (worker := group.prefill.first()) is not None), None)
    return None if worker is None else what.figures(worker, _move_s(what, worker, decode))


def _overflow(what: Ask, decoders: list[Worker], pair: Pair | None = None) -> Whole | None:
    """At a decode worker that computes no other. `pair` is what it would be otherwise; without one it would wait."""
    if what.tokens > what.limits.overflow_tokens_max:
        return None
    best = next((worker for worker in decoders if not worker.prefilling), None)
    if best is None:
        return None
    if pair is not None:
        elsewhere_s = what.ttft_s(pair.prefill) + _move_s(what, pair.prefill, pair.decode)
        if elsewhere_s < _FAR_BEHIND * what.ttft_s(best):
            return None
    return Whole(best, Why.OVERFLOW, what.figures(best), None if pair is None else pair.figures)


def _local(what: Ask) -> Whole | None:
    if what.opened.slot_at is not None:
        workers: Iterable[Worker] = _decoders(what)
    else:
        workers = (w for group in what.groups for w in group.decode if _can_take_slot(what, w))
    for worker in workers:
        before = worker.prefilling.total
        if before == 0 or before + what.tokens <= what.limits.local_prefill_tokens_max:
            return Whole(worker, Why.NO_PREFILL, what.figures(worker))
    return None


# Prefill workers.


def _pair(what: Ask, decoders: list[Worker]) -> Pair | None:
    if not decoders:
        return None
    able = _prefillers(what)
    found = _first_that_meet(what, able, decoders)
    if found is None and able:
        # Lanes that are refused are rare; then all are looked at.
        every_p = [w for group in what.groups for w in group.prefill if _can_prefill(what, w)]
        every_d = [w for group in what.groups for w in group.decode if _can_take_slot(what, w)]
        found = _first_that_meet(what, every_p, decoders if what.opened.slot_at is not None else every_d)
    return found


def _prefillers(what: Ask) -> list[Worker]:
    """The least loaded, a few of them, and those that hold the prompt's beginning."""
    found: dict[str, Worker] = {}
    for group in what.groups:
        able = [worker for worker in islice(group.prefill, _LOOK) if _can_prefill(what, worker)]
        roomiest = group.prefill_room.first()
        if not able and roomiest is not None and _can_prefill(what, roomiest):
            able = [roomiest]
        found.update((worker.worker_id, worker) for worker in able)
    for worker in _holding(what, lambda group: group.prefill):
        if _can_prefill(what, worker):
            found[worker.worker_id] = worker
    return list(found.values())


def _first_that_meet(what: Ask, able: list[Worker], decoders: list[Worker]) -> Pair | None:
    if not able or not decoders:
        return None
    times = {worker.worker_id: what.ttft_s(worker) + _move_s(what, worker, decoders[0]) for worker in able}
    able.sort(key=lambda w: (w.worker_id == what.opened.avoid, times[w.worker_id], w.prefilling.total, w.chosen))
    for prefill in able:
        for decode in decoders:
            if _may_meet(decode, prefill):
                chosen = what.figures(prefill, _move_s(what, prefill, decode))
                other = next((worker for worker in able if worker is not prefill), None)
                return Pair(
                    prefill,
                    decode,
                    Why.PREFIX if chosen.cached_tokens else Why.LEAST_LOADED,
                    chosen,
                    None if other is None else what.figures(other, _move_s(what, other, decode)),
                )
    return None


def _move_s(what: Ask, owner: Worker, reader: Worker) -> float:
    lane = reader.lanes.get(owner.worker_id)
    return what.step.move_s(what.tokens, 0.0 if lane is None else lane.gigabytes_per_s)


def _can_prefill(what: Ask, worker: Worker) -> bool:
    return what.prompt_blocks <= worker.kv_room and len(worker.prefilling) < worker.facts.capacity.prefill_legs


def _may_meet(reader: Worker, owner: Worker) -> bool:
    """A lane not measured yet is given the benefit of the doubt: the first fetch wires it up."""
    lane = reader.lanes.get(owner.worker_id)
    return lane is None or not lane.refusal


def _prefill_may_come(what: Ask, decoders: list[Worker]) -> bool:
    """True when waiting is worth it: a prefill worker is merely busy or resting, and can be read from."""
    for group in what.pool.roster.groups(what.now, what.selector):
        for worker in group.prefillers:
            if what.prompt_blocks > worker.facts.capacity.kv_blocks:
                break  # the largest come first
            if not decoders or any(_may_meet(decoder, worker) for decoder in decoders):
                return True
    return False


# Whole engines.


def _whole_engine(what: Ask) -> Whole | None:
    able: list[Worker] = []
    for group in what.groups:
        here = [worker for worker in islice(group.whole, _LOOK) if _can_take_slot(what, worker)]
        roomiest = group.whole_room.first()
        if not here and roomiest is not None and _can_take_slot(what, roomiest):
            here = [roomiest]
        able += here
    able += [worker for worker in _holding(what, lambda group: group.whole) if _can_take_slot(what, worker)]
    if not able:
        return None
    able.sort(key=lambda worker: _whole_rank(what, worker))
    other = next((worker for worker in able if worker is not able[0]), None)
    return Whole(able[0], Why.WHOLE, what.figures(able[0]), None if other is None else what.figures(other))


def _whole_rank(what: Ask, worker: Worker) -> tuple[float, int, int, int]:
    first_token = what.ttft_s(worker) if what.holders else 0.0
    return first_token, len(worker.slots), -worker.kv_room, worker.chosen


def _holding(what: Ask, ranking: Callable[[Group], Ranking]) -> Iterator[Worker]:
    """Of the workers in these rankings, those that hold the prompt's beginning."""
    rankings = [ranked for group in what.groups if (ranked := ranking(group))]
    for worker_id in what.holders if rankings else ():
        for ranked in rankings:
            if worker_id in ranked:
                yield what.pool.workers[worker_id]
                break


# Giving way.


def giving_way(what: Ask, running: Mapping[str, OpenRequest]) -> list[OpenRequest]:
    """Requests whose end would make room for this one: all at one worker, the latest begun first, and none if that
    would not be enough. Of those that may be made to wait, so many are looked at and no more."""
    lacks_slot = not _decoders(what)
    if what.opened.slot_at is not None and lacks_slot:
        return []
    found: dict[str, list[OpenRequest]] = {}
    for key in islice(reversed(what.pool.may_yield), 8 * _LOOK):
        victim = running[key]
        worker_id = victim.slot_at if lacks_slot else victim.prefilling_at
        worker = what.pool.workers.get(worker_id or "")
        if worker is None or not _serves(worker, what.now) or not _is_open(what, worker):
            continue
        there = found.setdefault(worker.worker_id, [])
        there.append(victim)
        if _room_without(what, worker, there, decode=lacks_slot):
            return there
    return []


def _is_open(what: Ask, worker: Worker) -> bool:
    return what.pool.roster.is_open_to(worker, what.selector, what.pool.queue.parked)


def _room_without(what: Ask, worker: Worker, victims: list[OpenRequest], *, decode: bool) -> bool:
    keys = [victim.key for victim in victims]
    capacity = worker.facts.capacity
    room = worker.kv_room + sum(worker.slots.get(one) + worker.pinned.get(one) for one in keys)
    slots = len(worker.slots) - sum(1 for one in keys if one in worker.slots)
    computing = len(worker.prefilling) - sum(1 for one in keys if one in worker.prefilling)
    if not decode:
        return worker.role is Role.PREFILL and computing < capacity.prefill_legs and what.prompt_blocks <= room
    return (
        worker.role is not Role.PREFILL
        and slots < capacity.decode_legs
        and (worker.role is Role.DECODE or computing < capacity.prefill_legs)
        and what.slot_blocks <= room
    )
