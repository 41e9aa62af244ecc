"""Who serves a request: a pair of workers, or one worker for all of it. Decides only; `core.py` carries it out.

1. A **pair**: of the prefill workers with a free leg and KV room, the one with the fewest prompt tokens before it; of
   the decode workers with a free slot and KV room for the answer, the one with the most room, unless the two are known
   not to reach each other. A request that is run again keeps its decode slot and avoids the prefill worker that
   failed it.
2. A **whole engine** (role BOTH): the one with the most room serves alone.
3. A decode worker serves alone when no prefill worker could, now or later, or when the transfer has failed too often;
   within a budget, because the prompts it computes delay those it is decoding for.

None means: wait. Costs O(workers of the pool).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router.core.limits import CoreLimits
from router.core.state import OpenRequest, Pool, Worker
from router.core.worker import Role


@dataclass(frozen=True, slots=True)
class Pair:
    prefill: Worker
    decode: Worker


@dataclass(frozen=True, slots=True)
class Whole:
    worker: Worker


def place(now: float, pool: Pool, opened: OpenRequest, limits: CoreLimits) -> Pair | Whole | None:
    ready = [worker for worker in pool.workers.values() if _serves(worker, now)]
    decoders = _decoders(ready, opened, limits)
    if not opened.local_only and (pair := _pair(ready, decoders, opened)) is not None:
        return pair
    if opened.slot_at is None and (whole := _whole_engine(ready, opened, limits)) is not None:
        return whole
    if not opened.local_only and _prefill_may_come(pool, decoders, opened):
        return None
    return _local(decoders, opened, limits)


def has_path(pool: Pool) -> bool:
    """True when some worker can decode: then every request is served, be it slowly."""
    return any(decodes(worker) for worker in pool.workers.values())


def decodes(worker: Worker) -> bool:
    """True when it takes decode legs, now or once it has room."""
    return worker.role is not Role.PREFILL and not (worker.draining or worker.gone)


def fits_somewhere(pool: Pool, opened: OpenRequest) -> bool:
    """True unless every worker that can decode is too small for this request even when empty."""
    tokens = len(opened.request.prompt) + opened.request.sampling.max_tokens
    return any(
        worker.blocks_for(tokens) <= worker.facts.capacity.kv_blocks
        for worker in pool.workers.values()
        if decodes(worker)
    )


def slot_blocks(worker: Worker, opened: OpenRequest, limits: CoreLimits) -> int:
    """KV blocks to promise to its decode leg."""
    request = opened.request
    expected = max(len(opened.generated), min(request.sampling.max_tokens, limits.reserve_tokens_max))
    return worker.blocks_for(len(request.prompt) + expected)


def prompt_blocks(worker: Worker, opened: OpenRequest) -> int:
    """KV blocks that its prefill leg pins."""
    return worker.blocks_for(len(opened.request.prompt) + len(opened.generated))


def _serves(worker: Worker, now: float) -> bool:
    return not (worker.draining or worker.gone) and worker.rest_until <= now


def _decoders(ready: Iterable[Worker], opened: OpenRequest, limits: CoreLimits) -> list[Worker]:
    """Decode workers that have, or have room for, its slot; the roomiest first."""
    if opened.slot_at is not None:
        return [worker for worker in ready if worker.worker_id == opened.slot_at]
    able = [worker for worker in ready if worker.role is Role.DECODE and _can_take_slot(worker, opened, limits)]
    return sorted(able, key=lambda worker: (-worker.kv_room, worker.chosen))


def _can_take_slot(worker: Worker, opened: OpenRequest, limits: CoreLimits) -> bool:
    return len(worker.slots) < worker.facts.capacity.decode_legs and (
        slot_blocks(worker, opened, limits) <= worker.kv_room
    )


def _pair(ready: Iterable[Worker], decoders: list[Worker], opened: OpenRequest) -> Pair | None:
    if not decoders:
        return None
    able = [worker for worker in ready if worker.role is Role.PREFILL and _can_prefill(worker, opened)]
    able.sort(key=lambda worker: (worker.worker_id == opened.avoid, worker.prefilling.total, worker.chosen))
    return next((Pair(p, d) for p in able for d in decoders if _may_meet(d, p)), None)


def _can_prefill(worker: Worker, opened: OpenRequest) -> bool:
    return len(worker.prefilling) < worker.facts.capacity.prefill_legs and (
        prompt_blocks(worker, opened) <= worker.kv_room
    )


def _may_meet(reader: Worker, owner: Worker) -> bool:
    """A lane not measured yet is given the benefit of the doubt: the first fetch wires it up."""
    lane = reader.lanes.get(owner.worker_id)
    return lane is None or not lane.refusal


def _whole_engine(ready: Iterable[Worker], opened: OpenRequest, limits: CoreLimits) -> Whole | None:
    able = [
        worker
        for worker in ready
        if worker.role is Role.BOTH
        and len(worker.prefilling) < worker.facts.capacity.prefill_legs
        and _can_take_slot(worker, opened, limits)
    ]
    best = min(able, key=lambda worker: (len(worker.slots), -worker.kv_room, worker.chosen), default=None)
    return None if best is None else Whole(best)


def _prefill_may_come(pool: Pool, decoders: list[Worker], opened: OpenRequest) -> bool:
    """True when waiting is worth it: a prefill worker is merely busy or resting, and can be read from."""
    able = [
        worker
        for worker in pool.workers.values()
        if worker.role is Role.PREFILL
        and not (worker.draining or worker.gone)
        and prompt_blocks(worker, opened) <= worker.facts.capacity.kv_blocks
    ]
    return bool(able) and (not decoders or any(_may_meet(d, p) for p in able for d in decoders))


def _local(decoders: list[Worker], opened: OpenRequest, limits: CoreLimits) -> Whole | None:
    prompt = len(opened.request.prompt) + len(opened.generated)
    for worker in decoders:
        before = worker.prefilling.total
        if before == 0 or before + prompt <= limits.local_prefill_tokens_max:
            return Whole(worker)
    return None
