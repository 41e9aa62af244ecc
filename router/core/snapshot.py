"""The core's state as values, for status pages and exporters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.core.lifecycle import State as Life
from router.core.linked import Worker
from router.core.state import OpenRequest, State
from router.core.worker import Load, PeerLane, Role, WorkerFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    facts: WorkerFacts
    role: Role
    draining: bool
    load: Load
    prefill_legs: int
    decode_legs: int
    lanes: tuple[PeerLane, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    request_id: str
    tenant: str
    state: Life
    age_s: float
    #: Where its legs are open now.
    prefill_worker: str
    decode_worker: str
    prompt_tokens: int
    completion_tokens: int
    #: How its blocks were moved, last.
    transport: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    workers: tuple[WorkerView, ...]
    queued: int
    running: int
    queued_tokens: int
    #: Empty unless asked for.
    requests: tuple[RequestView, ...]
    outcomes: Mapping[Life, int]


def snapshot(now: float, state: State, outcomes: Mapping[Life, int], *, requests: bool = False) -> Snapshot:
    queued = state.queued
    return Snapshot(
        workers=tuple(_worker(worker) for worker in state.workers.values()),
        queued=queued,
        running=len(state.requests) - queued,
        queued_tokens=state.queued_tokens,
        requests=tuple(_request(now, opened) for opened in state.requests.values()) if requests else (),
        outcomes=dict(outcomes),
    )


def _worker(worker: Worker) -> WorkerView:
    decode_legs = sum(1 for leg_id in worker.legs if leg_id.endswith("/d"))
    return WorkerView(
        facts=worker.facts,
        role=worker.role,
        draining=worker.draining,
        load=worker.load,
        prefill_legs=len(worker.legs) - decode_legs,
        decode_legs=decode_legs,
        lanes=tuple(worker.lanes.values()),
    )


def _request(now: float, opened: OpenRequest) -> RequestView:
    return RequestView(
        request_id=opened.request.request_id,
        tenant=opened.request.tenant,
        state=opened.state,
        age_s=now - opened.request.arrival,
        prefill_worker=opened.prefill_leg.worker_id if opened.prefill_leg is not None else "",
        decode_worker=opened.slot_at or "",
        prompt_tokens=len(opened.request.prompt),
        completion_tokens=len(opened.generated),
        transport=opened.transport,
    )
