"""The brain: events in, effects out.

`Core.handle(now, event)` changes the state and returns what is to be done, in order. It is synchronous and
deterministic: it reads no clock, draws no random number and does no I/O, so tests and the simulator run what production
runs. `now` is seconds on a monotonic clock and never goes back. `next_deadline()` says when to call with `Tick`.

Four rules hold everywhere below:

1. Every open request has a deadline in `_timers`, so every request ends, whatever workers do.
2. A leg that is closed here is cancelled there. What a worker says about it later finds no leg and is ignored.
3. A handle that nobody will read is given back to its owner.
4. Whatever frees capacity or fills a queue marks the pool, and marked pools are dispatched before `handle` returns.
   A step that only brings tokens marks nothing, so its cost does not depend on how many wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from router.core import effects as fx
from router.core import events as ev
from router.core.admission import Admission
from router.core.billing import usage_of, usage_of_lost
from router.core.budget import Budgets, Record
from router.core.effects import Effect, Emit, Failed, Finished, Tokens
from router.core.errors import (
    Cancelled,
    Expired,
    Invalid,
    Lost,
    NotFound,
    Rejected,
    TandemError,
    Unavailable,
)
from router.core.estimate import UNKNOWN, StepModel
from router.core.fair import Ahead, FairLimits
from router.core.handoff import leg_sampling, resamples, resume_base
from router.core.lifecycle import State as Life
from router.core.lifecycle import Trigger
from router.core.limits import CoreLimits
from router.core.linked import Worker
from router.core.placement import (
    Ask,
    Pair,
    Whole,
    Why,
    ask,
    decodes,
    fits_somewhere,
    giving_way,
    place,
    prompt_blocks,
    slot_blocks,
)
from router.core.request import FinishReason, GenerationRequest, Lane, Route, Timings, TokenLogprobs, Usage
from router.core.salt import cache_salt
from router.core.state import Leg, OpenRequest, Pool, State
from router.core.stats import Stats
from router.core.story import Placed, Story
from router.core.tenant import SELECTORS_MAX, Selector, Tenant, TenantBook
from router.core.timers import Kind, Timer, Timers
from router.core.usage import UsageFacts, Used
from router.core.worker import Role, WorkerFacts, misfit


class Core:
    def __init__(
        self,
        *,
        now: float,
        limits: CoreLimits,
        models: Iterable[str],
        book: TenantBook | None = None,
        fair: FairLimits | None = None,
        step: StepModel = UNKNOWN,
        cache_secret: bytes = b"",
        wall_offset_s: float = 0.0,
        records: Iterable[Record] = (),
        recorded: Mapping[str, Used] | None = None,
    ) -> None:
        """`cache_secret`: cache salts are derived from it and no request's own is used. `wall_offset_s`: added to `now`
        it gives seconds since 1970. `records`: what a core before this one had journaled; the first `handle` also
        returns what follows from it. `recorded`: of the reservations that they leave open, by record id, those whose
        usage was recorded already. Without it usage is not recorded, and nothing but budgets' use is journaled."""
        self.limits = limits
        self.stats = Stats()
        book = book or TenantBook.open()
        budgets = Budgets(wall_offset_s=wall_offset_s, records=records)
        self.admission = Admission(book, budgets, reserves_all=recorded is not None)
        self.state = State(
            history_max=limits.history_max,
            story_lines_max=limits.story_lines_max,
            preemptions_max=limits.preemptions_max,
            book=book,
            fair=fair or FairLimits(),
        )
        self._step = UNKNOWN if step == UNKNOWN else step
        self._cache_secret = cache_secret
        self._effects: list[Effect] = []
        #: Of the event that is handled.
        self._now = now
        #: Pools to dispatch before `handle` returns, in the order they were marked.
        self._marked: dict[str, None] = {}
        self._timers = Timers(self._is_live)
        #: A SILENCE timer is set.
        self._listening = False
        self._shutting_down = False
        self._handlers: dict[type, Callable[[float, Any], None]] = {
            ev.Submit: self._submit,
            ev.Cancel: self._cancel,
            ev.Overrun: self._overrun,
            ev.StopMatched: self._stop_matched,
            ev.WorkerJoined: self._worker_joined,
            ev.WorkerLost: self._worker_lost,
            ev.LoadReported: self._load_reported,
            ev.Offered: self._offered,
            ev.PrefillDone: self._prefill_done,
            ev.Fetched: self._fetched,
            ev.StepOutputs: self._step_outputs,
            ev.LegFailed: self._leg_failed,
            ev.RoleChanged: self._role_changed,
            ev.DrainingAnnounced: self._draining_announced,
            ev.PeerLaneReported: self._peer_lane_reported,
            ev.DrainRequested: self._drain_requested,
            ev.SetRoleRequested: self._set_role_requested,
            ev.TenantsChanged: self._tenants_changed,
            ev.ShutdownRequested: self._shutdown_requested,
            ev.Tick: self._tick,
        }
        for model in models:
            self.state.pool(now, model)
            self._timers.set(now + limits.path_wait_s, Kind.PATIENCE, model)
        self._settle_lost(recorded or {})

    # The contract.

    def handle(self, now: float, event: ev.Event) -> list[Effect]:
        self._now = now
        self._handlers[type(event)](now, event)
        while self._marked:
            self._dispatch(now, self.state.pools[self._marked.popitem()[0]])
        done, self._effects = self._effects, []
        return done

    def next_deadline(self) -> float | None:
        return self._timers.next_at()

    def misfit(self, facts: WorkerFacts) -> str:
        """Why this worker can't join its pool; empty when it can. Its own former incarnation has no say."""
        if facts.model.name not in self.state.pools:
            known = ", ".join(sorted(self.state.pools))
            return f"model.name: {facts.model.name!r} offered, this router serves {known}"
        pool = self.state.pools[facts.model.name]
        others = (worker for worker in pool.workers.values() if worker.worker_id != facts.worker_id)
        example = next(others, None)
        return "" if example is None else misfit(example.facts, facts)

    def is_open(self, key: str) -> bool:
        return key in self.state.requests

    def serves(self, model: str) -> bool:
        """True when a request for the model could be dispatched, now or once capacity is free."""
        pool = self.state.pools.get(model)
        return pool is not None and len(pool.pathless_since) < len(self.state.selectors) and not self._shutting_down

    def explain(self, request_id: str, tenant: str | None = None) -> list[Story]:
        """Stories of requests of this id that are open, or ended not long ago: of each tenant one, the latest first.
        Given a tenant, only of that tenant's."""
        open_ones = (one for one in self.state.requests.values() if one.request.request_id == request_id)
        told = {one.request.tenant: self.state.tell(one) for one in open_ones}
        stories = ({story.tenant: story for story in self.state.history.find(request_id)} | told).values()
        return sorted(
            (story for story in stories if tenant in (None, story.tenant)),
            key=lambda story: story.arrival,
            reverse=True,
        )

    def rewritten_journal(self) -> tuple[Record, ...]:
        """Records to rewrite the journal with; those returned by later calls of `handle` continue it."""
        return self.admission.budgets.rewritten()

    def check_integrity(self) -> None:
        self.state.check_integrity(self._now)
        held = [opened.admitted for opened in self.state.requests.values()]
        self.admission.check_integrity(admitted for admitted in held if admitted is not None)
        assert not self._marked
        assert not self._effects
        waited_for = {timer.key for timer in self._timers if timer.kind is Kind.DEADLINE}
        assert waited_for == self.state.requests.keys()
        # Only a request that was admitted before, and runs again, may exceed the bound.
        again = sum(1 for opened in self.state.requests.values() if opened.dispatched_at is not None)
        assert self.state.queued <= self.limits.queue_requests_max + again

    # Clients.

    def _submit(self, now: float, event: ev.Submit) -> None:
        request = event.request
        assert request.key not in self.state.requests, "two open requests of one id and tenant"
        opened = OpenRequest(request)
        error, opened.ahead = self._why_not(now, request)
        if error is not None:
            self.state.move(opened, Trigger.EXPIRE if isinstance(error, Expired) else Trigger.REFUSE)
            self.state.note(now, opened, f"{opened.state.value}: {error}")
            self.state.history.add(self.state.tell(opened, error))
            self.stats.outcomes[opened.state] += 1
            self._emit(request.key, Failed(error))
            return
        opened.admitted, record = self.admission.admit(now, request)
        self._journal(record)
        tenant = opened.admitted.account.tenant
        opened.salt = cache_salt(self._cache_secret, tenant) if self._cache_secret else request.cache_salt
        self.state.open(now, opened)
        self.state.note(now, opened, _arrival_note(request, opened.ahead))
        self._timers.set(request.deadline, Kind.DEADLINE, request.key)
        self._mark(request.model)

    def _why_not(self, now: float, request: GenerationRequest) -> tuple[TandemError | None, Ahead | None]:
        """And what it would find before it."""
        pool = self.state.pools.get(request.model)
        if pool is None:
            return NotFound("model", request.model, f"model {request.model!r} is not served here"), None
        tenant = self.admission.book.tenant(request.tenant)
        error = self._why_not_now(now, request, pool, tenant)
        if error is not None or tenant is None:
            return error, None
        ahead = pool.queue.ahead(now, request.tenant, request.lane)
        return self._why_not_for_its_tenant(now, request, ahead), ahead

    def _why_not_now(
        self, now: float, request: GenerationRequest, pool: Pool, tenant: Tenant | None
    ) -> TandemError | None:
        limits = self.limits
        if self._shutting_down:
            return Unavailable("SHUTTING_DOWN", "this router is shutting down", retry_after_s=limits.retry_after_s)
        if request.deadline <= now:
            return Expired("the deadline had passed on arrival")
        if tenant is None:
            return NotFound("tenant", request.tenant, "the credential's tenant does not exist")
        if self._gave_up(now, pool, tenant.pool):
            return self._no_workers(pool, tenant.pool)
        if self.state.queued >= limits.queue_requests_max:
            return Rejected(
                "QUEUE_REQUESTS",
                f"{limits.queue_requests_max} requests are waiting, which is the limit",
                retry_after_s=limits.retry_after_s,
            )
        if self.state.queued and self.state.queued_tokens + len(request.prompt) > limits.queue_tokens_max:
            return Rejected(
                "QUEUE_TOKENS",
                f"prompts of {limits.queue_tokens_max} tokens are waiting, which is the limit",
                retry_after_s=limits.retry_after_s,
            )
        return None

    def _why_not_for_its_tenant(self, now: float, request: GenerationRequest, ahead: Ahead) -> TandemError | None:
        one_by_one = ahead.wait_s / max(1, ahead.own_requests)
        error = self.admission.why_not(now, request, queue_wait_s=max(self.limits.retry_after_s, one_by_one))
        if error is not None:
            return error
        first_token_s = ahead.wait_s
        if self._step is not UNKNOWN:
            # Something may be cached, so only what surely has to be computed counts.
            first_token_s += self._step.compute_s(1, len(request.prompt))
        late_s = now + first_token_s - request.deadline
        if late_s <= 0:
            return None
        self.stats.refused_early += 1
        return Rejected(
            "DEADLINE_TOO_SOON",
            f"the first token is predicted in {first_token_s:.1f} s, the deadline is in {request.deadline - now:.1f} s",
            retry_after_s=max(self.limits.retry_after_s, late_s),
        )

    def _cancel(self, now: float, event: ev.Cancel) -> None:
        opened = self.state.requests.get(event.key)
        if opened is None:
            return
        if opened.request.deadline <= now:  # the client's own clock ended it, a moment before ours did
            self._expire(now, opened)
        else:
            self._end(now, opened, Trigger.CANCEL, Cancelled("cancelled by the client"))

    def _overrun(self, now: float, event: ev.Overrun) -> None:
        if (opened := self.state.requests.get(event.key)) is not None:
            error = Rejected("STREAM_BUFFER", "the client reads too slowly: its stream's buffer is full")
            self._end(now, opened, Trigger.FAIL, error)

    def _stop_matched(self, now: float, event: ev.StopMatched) -> None:
        if (opened := self.state.requests.get(event.key)) is not None:
            self._finish(now, opened, FinishReason.STOP, completion_tokens=event.completion_tokens)

    # Tenants.

    def _tenants_changed(self, now: float, event: ev.TenantsChanged) -> None:
        self.admission.configure(now, event.book)
        self.state.configure(now, event.book)
        for pool in self.state.pools.values():
            self._look_for_paths(now, pool)
        for opened in tuple(self.state.requests.values()):
            # Legs that run go on where they are; from now on nothing of it is sent where it may not be.
            if opened.slot_at is not None and opened.decode_leg is None:
                pool = self.state.pools[opened.request.model]
                if not pool.roster.is_open_to(self.state.workers[opened.slot_at], _selector(opened)):
                    self._lose_slot(now, opened, f"{opened.slot_at} is not open to its tenant any more")

    # Workers come and go.

    def _worker_joined(self, now: float, event: ev.WorkerJoined) -> None:
        facts = event.facts
        assert not self.misfit(facts), self.misfit(facts)
        if facts.worker_id in self.state.workers:
            self._lose(now, self.state.workers[facts.worker_id], "a new incarnation joined")
        worker = self.state.add_worker(now, facts)
        if not self._listening:
            self._listen(now)
        self._introduce(worker)
        self._workers_changed(now, facts.model.name)

    def _worker_lost(self, now: float, event: ev.WorkerLost) -> None:
        if (worker := self.state.workers.get(event.worker_id)) is not None:
            self._lose(now, worker, event.why)

    def _lose(self, now: float, worker: Worker, why: str) -> None:
        """Whatever it held is gone; each request there goes on elsewhere."""
        worker.gone = True
        self.state.touch(worker)
        self.stats.workers_lost += 1
        blame = f"{worker.worker_id} was lost ({why})"
        for opened in self.state.requests_at(worker):
            if opened.slot_at == worker.worker_id and opened.decode_leg is not None:
                self._retry_decode(now, opened, blame)
            elif opened.slot_at == worker.worker_id:
                self._lose_slot(now, opened, blame)
            else:
                # Computing there, or pinned there and being fetched. A fetch might just have succeeded, but if it has
                # not it can hang until its timeout; computing the prompt again is the shorter wait.
                self._retry_prefill(now, opened, blame)
        self.state.drop_worker(worker)
        for other in self.state.pools[worker.facts.model.name].workers.values():
            other.lanes.pop(worker.worker_id, None)
        self._workers_changed(now, worker.facts.model.name)

    def _role_changed(self, now: float, event: ev.RoleChanged) -> None:
        worker = self._heard(now, event.worker_id)
        if worker is None or worker.role is event.role:
            return
        worker.role = event.role
        self.state.touch(worker)
        if worker.role is Role.PREFILL:
            self._lose_unused_slots(now, worker, f"{worker.worker_id} decodes no more")
        self._introduce(worker)
        self._workers_changed(now, worker.facts.model.name)

    def _draining_announced(self, now: float, event: ev.DrainingAnnounced) -> None:
        if (worker := self._heard(now, event.worker_id)) is not None:
            self._drain(now, worker)

    def _drain_requested(self, now: float, event: ev.DrainRequested) -> None:
        if (worker := self.state.workers.get(event.worker_id)) is not None:
            self._effects.append(fx.SendDrain(worker.worker_id))
            self._drain(now, worker)

    def _set_role_requested(self, now: float, event: ev.SetRoleRequested) -> None:
        """Takes effect when the worker says so."""
        if event.worker_id in self.state.workers:
            self._effects.append(fx.SendSetRole(event.worker_id, event.role))

    def _drain(self, now: float, worker: Worker) -> None:
        """Legs that run there go on; nothing new is sent."""
        if worker.draining:
            return
        worker.draining = True
        self.state.touch(worker)
        self._lose_unused_slots(now, worker, f"{worker.worker_id} is draining")
        self._workers_changed(now, worker.facts.model.name)

    def _lose_unused_slots(self, now: float, worker: Worker, why: str) -> None:
        for opened in self.state.requests_at(worker):
            if opened.slot_at == worker.worker_id and opened.decode_leg is None:
                self._lose_slot(now, opened, why)

    def _introduce(self, worker: Worker) -> None:
        """Decode workers read from prefill workers, so each decode worker hears of each prefill worker."""
        others = [
            other
            for other in self.state.pools[worker.facts.model.name].workers.values()
            if other is not worker and not other.gone and other.facts.kv.address
        ]
        if worker.role is Role.DECODE:
            peers = tuple(other.facts for other in others if other.role is Role.PREFILL)
            if peers:
                self._effects.append(fx.SendPeers(worker.worker_id, peers))
        elif worker.role is Role.PREFILL and worker.facts.kv.address:
            for other in others:
                if other.role is Role.DECODE:
                    self._effects.append(fx.SendPeers(other.worker_id, (worker.facts,)))

    def _workers_changed(self, now: float, model: str) -> None:
        self._look_for_paths(now, self.state.pools[model])

    def _look_for_paths(self, now: float, pool: Pool) -> None:
        """Selectors that nobody serves lose patience; those that somebody serves again get it back."""
        was, pool.pathless_since = pool.pathless_since, {}
        for selector in self.state.selectors:
            if not pool.roster.has_path(now, selector):
                pool.pathless_since[selector] = was.get(selector, now)
                if selector not in was:
                    self._timers.set(now + self.limits.path_wait_s, Kind.PATIENCE, pool.model)
        self._mark(pool.model)

    def _gave_up(self, now: float, pool: Pool, selector: Selector) -> bool:
        since = pool.pathless_since.get(selector)
        return since is not None and now >= since + self.limits.path_wait_s

    def _no_workers(self, pool: Pool, selector: Selector) -> Unavailable:
        where = ", ".join(f"{name}={value}" for name, value in sorted(selector))
        return Unavailable(
            "NO_WORKERS",
            f"no worker {f'with {where} ' if where else ''}can decode for model {pool.model!r}",
            retry_after_s=max(self.limits.retry_after_s, self.limits.path_wait_s / 4),
        )

    # Workers report.

    def _heard(self, now: float, worker_id: str) -> Worker | None:
        worker = self.state.workers.get(worker_id)
        if worker is not None:
            worker.heard_at = now
        return worker

    def _load_reported(self, now: float, event: ev.LoadReported) -> None:
        if (worker := self._heard(now, event.worker_id)) is not None:
            worker.load = event.load

    def _peer_lane_reported(self, now: float, event: ev.PeerLaneReported) -> None:
        worker = self._heard(now, event.worker_id)
        if worker is not None and event.lane.peer in self.state.workers:
            worker.lanes[event.lane.peer] = event.lane
            self.state.touch(worker)
            self._mark(worker.facts.model.name)

    def _offered(self, now: float, event: ev.Offered) -> None:
        self._heard(now, event.worker_id)
        opened = self._leg_owner(event.worker_id, event.leg_id)
        if opened is None or opened.prefill_leg is None or opened.slot_at is None:
            return
        opened.handle = event.handle
        opened.hint = Leg(event.leg_id, opened.slot_at)
        self.state.note(now, opened, f"blocks offered by {event.worker_id}, to be fetched ahead by {opened.slot_at}")
        self._effects.append(
            fx.FetchAhead(
                worker_id=opened.slot_at,
                leg_id=event.leg_id,
                handle=event.handle,
                timeout_s=opened.request.deadline - now,
            )
        )

    def _prefill_done(self, now: float, event: ev.PrefillDone) -> None:
        worker = self._heard(now, event.worker_id)
        opened = self._leg_owner(event.worker_id, event.leg_id)
        if worker is None or opened is None or opened.prefill_leg is None:
            return
        worker.strikes = 0
        self._mark(worker.facts.model.name)
        self.state.close_prefill_leg(opened)
        self._computed(opened, opened.leg_tokens - event.cached_tokens)
        opened.prompt_done = True
        if event.handle:
            opened.handle = event.handle
        if opened.prefilled_at is None:
            opened.cached_tokens = event.cached_tokens
        opened.prefilled_at = now
        opened.prefill_s += now - opened.ordered_at
        self.stats.prefill_s.observe(now - opened.ordered_at)
        self.state.note(now, opened, f"prefilled at {worker.worker_id}, {event.cached_tokens} tokens cached")
        if not resamples(opened.request.sampling, opened.base):
            opened.position = opened.base
            logprobs = (event.logprobs,) if event.logprobs is not None else ()
            if self._take(now, opened, (event.token_id,), logprobs, event.finish_reason):
                return
        if not opened.handle:
            self._retry_prefill(now, opened, f"{worker.worker_id} gave no handle")
            return
        self._order_decode(now, opened)

    def _fetched(self, now: float, event: ev.Fetched) -> None:
        self._heard(now, event.worker_id)
        opened = self._leg_owner(event.worker_id, event.leg_id)
        if opened is None or opened.state is not Life.HANDING_OFF:
            return
        opened.transport, opened.transfer_bytes, opened.transfer_s = event.transport, event.nbytes, event.fetch_s
        self.stats.transfers += 1
        self.stats.transfer_bytes += event.nbytes
        self.stats.transfer_s.observe(event.fetch_s)
        self._handed_off(now, opened)

    def _handed_off(self, now: float, opened: OpenRequest) -> None:
        """The decode worker has the blocks and has released their lease."""
        self.state.note(now, opened, f"blocks fetched by {opened.slot_at} over {opened.transport or 'unknown'}")
        self.state.move(opened, Trigger.FETCHED)
        self.state.unpin(opened)
        opened.hint = None
        self._mark(opened.request.model)

    def _step_outputs(self, now: float, event: ev.StepOutputs) -> None:
        worker = self._heard(now, event.worker_id)
        if worker is None:
            return
        legs = self.state.legs
        for leg_id, token_ids, finish_reason, logprobs, cached_tokens in event.outputs:
            opened = legs.get(leg_id)
            if opened is None or opened.slot_at != event.worker_id or opened.decode_leg is None:
                continue
            if opened.position == opened.base and token_ids:
                self._first_step(now, opened, worker, cached_tokens)
            self._take(now, opened, token_ids, logprobs, finish_reason)

    def _first_step(self, now: float, opened: OpenRequest, worker: Worker, cached_tokens: int) -> None:
        """A decode leg's first tokens say that its prompt is there."""
        worker.strikes = 0
        if opened.state is Life.HANDING_OFF:  # its Fetched is missing, but it cannot decode without the blocks
            self._handed_off(now, opened)
        if opened.prefilling_at is not None:
            self.state.computed(opened)
            self._computed(opened, opened.leg_tokens - cached_tokens)
            opened.prompt_done = True
            self._mark(opened.request.model)
            opened.cached_tokens = max(opened.cached_tokens, cached_tokens)
            opened.prefill_s += now - opened.ordered_at
            self.stats.prefill_s.observe(now - opened.ordered_at)
        elif opened.prefilled_at is not None:
            opened.handoff_s = now - opened.prefilled_at
            self.stats.handoff_s.observe(opened.handoff_s)
        self.state.note(now, opened, f"first step at {worker.worker_id}")

    def _leg_failed(self, now: float, event: ev.LegFailed) -> None:
        worker = self._heard(now, event.worker_id)
        opened = self._leg_owner(event.worker_id, event.leg_id)
        if worker is None or opened is None:
            return
        why = f"{worker.worker_id} failed it: {event.failure.value}: {event.detail[:200]}"
        self._mark(worker.facts.model.name)
        if event.failure in (ev.Failure.REJECTED, ev.Failure.ENGINE):
            self._rest(now, worker)
        transfer_failed = event.failure is ev.Failure.TRANSFER and opened.state is Life.HANDING_OFF
        again = self._retry_prefill if opened.prefill_leg is not None or transfer_failed else self._retry_decode
        self._close_ended_leg(opened)
        if event.failure is ev.Failure.EXPIRED:
            self._expire(now, opened)
        elif event.failure is ev.Failure.INVALID:
            self.state.note(now, opened, why)
            refused = Invalid("request", "the engine refused it")
            if opened.request.sampling.structure is not None:
                refused = Invalid("sampling.structure", "the engine cannot follow it")
            self._end(now, opened, Trigger.FAIL, refused)
        else:
            again(now, opened, why)

    def _close_ended_leg(self, opened: OpenRequest) -> None:
        """The worker ended it, so there is nothing to cancel. Blocks may still be pinned at a prefill worker."""
        self._computed_in_part(opened)
        if opened.prefill_leg is not None:
            self.state.close_prefill_leg(opened)
        elif opened.decode_leg is not None:
            self.state.close_decode_leg(opened)

    def _leg_owner(self, worker_id: str, leg_id: str) -> OpenRequest | None:
        """None for a leg that is closed, or that this worker was never given."""
        opened = self.state.legs.get(leg_id)
        if opened is None or Leg(leg_id, worker_id) not in (opened.prefill_leg, opened.decode_leg):
            return None
        return opened

    def _rest(self, now: float, worker: Worker) -> None:
        pause = min(self.limits.rest_s_min * 2 ** min(worker.strikes, 16), self.limits.rest_s_max)
        worker.strikes += 1
        worker.rest_until = now + pause
        self.state.touch(worker)
        self._timers.set(worker.rest_until, Kind.REST, worker.worker_id)

    # Tokens.

    def _take(
        self,
        now: float,
        opened: OpenRequest,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        finish_reason: FinishReason | None,
    ) -> bool:
        """Adds a leg's tokens to the answer; True when that ended the leg.

        A replayed leg gives the first tokens once more: they are compared, not sent.
        """
        generated, count = opened.generated, len(token_ids)
        ended_there = finish_reason is not None
        again = min(len(generated) - opened.position, count)
        if again:
            if tuple(generated[opened.position : opened.position + again]) != token_ids[:again]:
                opened.replay_failed = True
                self._retry_decode(now, opened, "replaying it gave other tokens")
                return True
            token_ids, logprobs = token_ids[again:], logprobs[again:]
        room = opened.request.sampling.max_tokens - len(generated)
        if len(token_ids) >= room:
            token_ids, logprobs = token_ids[:room], logprobs[:room]
            finish_reason = finish_reason or FinishReason.LENGTH
        if ended_there and opened.position + count < len(generated):
            self._close_ended_leg(opened)
            opened.replay_failed = True
            self._retry_decode(now, opened, "replaying it ended earlier")
            return True
        opened.position += count
        opened.replayed_tokens += again
        if token_ids:
            self._grant(opened, len(generated) + len(token_ids))
            generated.extend(token_ids)
            if len(generated) > opened.charged_tokens:
                queue = self.state.pools[opened.request.model].queue
                opened.charged_tokens = queue.grow(now, opened.key, len(generated))
            if opened.first_token_at is None:
                opened.first_token_at = now
                self.stats.ttft_s.observe(now - opened.request.arrival)
            else:
                self.stats.itl_s.observe((now - opened.last_token_at) / len(token_ids), len(token_ids))
            opened.last_token_at = now
            self._emit(opened.key, Tokens(token_ids, logprobs))
        if finish_reason is None:
            return False
        if ended_there:
            self._close_ended_leg(opened)
        self._finish(now, opened, finish_reason)
        return True

    # Dispatch.

    def _mark(self, model: str) -> None:
        self._marked[model] = None

    def _dispatch(self, now: float, pool: Pool) -> None:
        queue = pool.queue
        queue.unpark()
        while (key := queue.peek(now)) is not None:
            opened = self.state.requests[key]
            if opened.request.deadline <= now:
                self._expire(now, opened)
                continue
            among = (pool.roster.version, queue.parked)
            if pool.stuck.get(key) == among and not queue.is_guaranteed:
                queue.park()  # nothing changed for it since it was looked at last
                continue
            what = ask(now, pool, opened, _selector(opened), self.limits, self._step)
            placement = place(what)
            if isinstance(placement, Pair):
                self._order_prefill(now, opened, placement)
            elif isinstance(placement, Whole):
                self._order_whole(now, opened, placement)
            elif pool.roster.has_path(now, what.selector) and not fits_somewhere(what):
                self._refuse(now, opened, self._too_large(opened))
            elif not self._make_way(now, what):
                if len(pool.stuck) > SELECTORS_MAX:
                    pool.stuck.clear()
                pool.stuck[key] = among
                if opened.stuck_at is None:
                    opened.stuck_at = now
                queue.park()

    def _make_way(self, now: float, what: Ask) -> bool:
        """True when batch work was stopped, so that guaranteed realtime work can be placed. It keeps its tokens."""
        if not what.pool.queue.is_guaranteed or what.opened.request.lane is not Lane.REALTIME:
            return False
        victims = giving_way(what, self.state.requests)
        for opened in victims:
            opened.preemptions += 1
            self.stats.preemptions += 1
            self._let_go(opened)
            self.state.drop_slot(opened)
            opened.forgiven = True
            self._again(now, opened, "it gave way to guaranteed realtime work")
        return bool(victims)

    def _too_large(self, opened: OpenRequest) -> TandemError:
        sampling = opened.request.sampling
        return Unavailable(
            "KV_ROOM",
            f"{len(opened.request.prompt)} prompt tokens and {sampling.max_tokens} to generate need more KV memory "
            "than any worker has",
        )

    def _begin(self, now: float, opened: OpenRequest) -> None:
        if opened.dispatched_at is None:
            opened.dispatched_at = now
            self.stats.queue_wait_s.observe(now - opened.request.arrival)
        if opened.stuck_at is not None:
            opened.stuck_s += now - opened.stuck_at
            opened.stuck_at = None
        opened.ordered_at = now
        if opened.admitted is not None:
            self.admission.dispatched(opened.admitted)
        self._grant(opened, len(opened.generated))
        opened.base = resume_base(opened.request.sampling, len(opened.generated), replay_failed=opened.replay_failed)

    def _placed(self, now: float, opened: OpenRequest, placement: Pair | Whole, trigger: Trigger) -> None:
        self.state.leave_queue(now, opened, trigger, cached_tokens=placement.figures.cached_tokens)
        self._begin(now, opened)
        opened.placed = Placed(placement.why.value, placement.figures, placement.runner_up)

    def _learn(self, opened: OpenRequest, worker: Worker) -> None:
        """Both workers of a pair will hold the prompt's KV."""
        if opened.prefix:
            capacity = worker.facts.capacity
            prefixes = self.state.pools[opened.request.model].prefixes
            prefixes.learn(opened.prefix, worker.worker_id, capacity.kv_blocks * capacity.block_tokens)

    def _will_compute(self, opened: OpenRequest, worker: Worker, tokens: int) -> None:
        opened.queued_before, opened.leg_tokens = worker.prefilling.total, tokens

    def _computed(self, opened: OpenRequest, tokens: int) -> None:
        opened.computed_tokens += tokens
        if not opened.forgiven:
            opened.charged_prompt_tokens += tokens
        opened.forgiven = False

    def _computed_in_part(self, opened: OpenRequest) -> None:
        """Its prompt was being computed and will not be to the end. Nobody says how far it got: by the step-time
        model to the end of the step that runs, or all of it where there is none."""
        if opened.prefilling_at is None:
            return
        tokens = opened.leg_tokens
        if self._step is not UNKNOWN:
            a_token_s = self._step.prefill_s_per_token
            reached = max(0.0, (self._now - opened.ordered_at) / a_token_s - opened.queued_before)
            tokens = self._step.begun_tokens(reached, tokens)
            worker = self.state.workers[opened.prefilling_at]
            worker.busy_until = max(worker.busy_until, self._now + max(0.0, tokens - reached) * a_token_s)
        self._computed(opened, tokens)

    def _order_prefill(self, now: float, opened: OpenRequest, pair: Pair) -> None:
        self._placed(now, opened, pair, Trigger.ORDER_PREFILL)
        if pair.why is Why.PREFIX:
            self.stats.prefix_choices += 1
            self.stats.prefix_tokens += pair.figures.cached_tokens
        if opened.slot_at is None:
            self.state.take_slot(opened, pair.decode, slot_blocks(pair.decode, opened, self.limits))
        request = opened.request
        tokens = request.prompt + tuple(opened.generated[: opened.base])
        self._will_compute(opened, pair.prefill, len(tokens))
        self._learn(opened, pair.prefill)
        self._learn(opened, pair.decode)
        leg = self.state.open_prefill_leg(
            opened, pair.prefill, tokens=len(tokens), blocks=prompt_blocks(pair.prefill, opened)
        )
        opened.prefill_worker, opened.decode_worker = pair.prefill.worker_id, pair.decode.worker_id
        opened.local_prefill = False
        sampling = leg_sampling(request.sampling, opened.base)
        self.state.note(now, opened, f"prefill ordered at {leg.worker_id}, to be decoded at {pair.decode.worker_id}")
        self._effects.append(
            fx.SendPrefill(
                worker_id=leg.worker_id,
                leg_id=leg.leg_id,
                tenant=request.tenant,
                token_ids=tokens,
                sampling=sampling,
                cache_salt=opened.salt,
                timeout_s=request.deadline - now,
                hand_off=sampling.max_tokens > 1,
                reader=pair.decode.worker_id,
                resample=resamples(request.sampling, opened.base),
            )
        )

    def _order_whole(self, now: float, opened: OpenRequest, whole: Whole) -> None:
        """Its decode worker computes the prompt itself."""
        self._placed(now, opened, whole, Trigger.ORDER_WHOLE)
        if opened.slot_at is None:
            self.state.take_slot(opened, whole.worker, slot_blocks(whole.worker, opened, self.limits))
        opened.prefill_worker = opened.decode_worker = whole.worker.worker_id
        opened.transport, opened.transfer_bytes, opened.transfer_s = "", 0, 0.0
        opened.local_prefill = True
        self.stats.local_prefills += 1
        self.stats.local_short += whole.why is Why.SHORT
        self.stats.local_cached += whole.why is Why.CACHED
        self.stats.local_overflow += whole.why is Why.OVERFLOW
        self._send_decode(now, opened, handle=b"")

    def _order_decode(self, now: float, opened: OpenRequest) -> None:
        """Its prompt is pinned at the prefill worker; the decode worker fetches it."""
        if not resamples(opened.request.sampling, opened.base):
            opened.base = len(opened.generated)
        self.state.move(opened, Trigger.PREFILLED)
        self._send_decode(now, opened, handle=opened.handle)

    def _send_decode(self, now: float, opened: OpenRequest, *, handle: bytes) -> None:
        request = opened.request
        tokens = request.prompt + tuple(opened.generated[: opened.base])
        if not handle:
            worker = self.state.workers[opened.slot_at or ""]
            self._will_compute(opened, worker, len(tokens))
            self._learn(opened, worker)
        leg = self.state.open_decode_leg(opened, prompt_tokens=0 if handle else len(tokens))
        opened.position = opened.base
        self.state.note(now, opened, f"decode ordered at {leg.worker_id}" + ("" if handle else ", prompt and all"))
        self._effects.append(
            fx.SendDecode(
                worker_id=leg.worker_id,
                leg_id=leg.leg_id,
                tenant=request.tenant,
                token_ids=tokens,
                prompt_tokens=len(request.prompt),
                sampling=leg_sampling(request.sampling, opened.base),
                cache_salt=opened.salt,
                timeout_s=request.deadline - now,
                handle=handle,
            )
        )

    # Again, elsewhere.

    def _retry_prefill(self, now: float, opened: OpenRequest, why: str) -> None:
        """The prompt has to be computed again; the decode slot is kept if its worker would still take a leg."""
        opened.prefill_failures += 1
        self.stats.prefill_retries += 1
        opened.avoid = opened.pinned_at or opened.avoid
        if opened.prefill_failures >= self.limits.prefill_attempts_max:
            opened.local_only = True
        self._let_go(opened)
        if opened.slot_at is not None and not decodes(self.state.workers[opened.slot_at]):
            self.state.drop_slot(opened)
        self._again(now, opened, why)

    def _retry_decode(self, now: float, opened: OpenRequest, why: str) -> None:
        """Everything is done again, at another decode worker if there is one."""
        opened.decode_failures += 1
        self.stats.decode_retries += 1
        self._let_go(opened)
        self.state.drop_slot(opened)
        is_lost = opened.replay_failed and opened.request.sampling.structure is not None
        if is_lost or opened.decode_failures >= self.limits.decode_attempts_max:
            self.state.note(now, opened, why)
            message = f"workers failed it {opened.retries} times"
            self._end(now, opened, Trigger.FAIL, Lost(message, retry_after_s=self.limits.retry_after_s))
        else:
            self._again(now, opened, why)

    def _lose_slot(self, now: float, opened: OpenRequest, why: str) -> None:
        """Its decode worker goes before the decode leg began. A prefill under way is for that reader only."""
        self._let_go(opened)
        self.state.drop_slot(opened)
        if opened.state is Life.QUEUED:
            self.state.note(now, opened, why)
            self._mark(opened.request.model)
        else:
            self._again(now, opened, why)

    def _again(self, now: float, opened: OpenRequest, why: str) -> None:
        self.state.note(now, opened, f"again: {why}")
        self.state.rejoin_queue(now, opened)
        self._mark(opened.request.model)

    def _let_go(self, opened: OpenRequest) -> None:
        """Cancels its legs and gives its lease back, at workers that can still be told."""
        self._computed_in_part(opened)
        workers = self.state.workers
        handle, pinned_at = opened.handle, opened.pinned_at
        legs, opened.hint = (opened.prefill_leg, opened.decode_leg, opened.hint), None
        for leg in dict.fromkeys(legs):
            if leg is not None and leg.worker_id in workers and not workers[leg.worker_id].gone:
                self._effects.append(fx.CancelLeg(leg.worker_id, leg.leg_id))
        if opened.prefill_leg is not None:
            self.state.close_prefill_leg(opened)
        if opened.decode_leg is not None:
            self.state.close_decode_leg(opened)
        self.state.unpin(opened)
        if handle and pinned_at is not None and not workers[pinned_at].gone:
            self._effects.append(fx.ReleaseLease(pinned_at, handle))

    # Ends.

    def _finish(
        self, now: float, opened: OpenRequest, reason: FinishReason, *, completion_tokens: int | None = None
    ) -> None:
        known = len(opened.generated)
        usage = Usage(
            prompt_tokens=len(opened.request.prompt),
            cached_prompt_tokens=min(opened.cached_tokens, len(opened.request.prompt)),
            completion_tokens=known if completion_tokens is None else min(completion_tokens, known),
        )
        timings, route = self._timings(now, opened), _route(opened)
        self._close(now, opened, Trigger.FINISH, None, completion_tokens=usage.completion_tokens)
        self._emit(opened.key, Finished(reason=reason, usage=usage, timings=timings, route=route))

    def _refuse(self, now: float, opened: OpenRequest, error: TandemError) -> None:
        """For one that waits; if it had begun before, it failed instead."""
        self._end(now, opened, Trigger.REFUSE if opened.dispatched_at is None else Trigger.FAIL, error)

    def _expire(self, now: float, opened: OpenRequest) -> None:
        error = Expired(f"the deadline passed while it was {opened.state.value.replace('_', ' ')}")
        self._end(now, opened, Trigger.EXPIRE, error)

    def _end(self, now: float, opened: OpenRequest, trigger: Trigger, error: TandemError) -> None:
        self._close(now, opened, trigger, error)
        self._emit(opened.key, Failed(error))

    def _close(
        self,
        now: float,
        opened: OpenRequest,
        trigger: Trigger,
        error: TandemError | None,
        *,
        completion_tokens: int | None = None,
    ) -> None:
        self._let_go(opened)
        self.state.drop_slot(opened)
        cost = self.state.end(now, opened, trigger, error)
        if completion_tokens is None:
            completion_tokens = len(opened.generated)
        usage = self._settle(now, opened, cost, completion_tokens)
        self.state.history.add(self.state.tell(opened, error, usage))
        self._mark(opened.request.model)
        stats = self.stats
        stats.outcomes[opened.state] += 1
        stats.total_s.observe(now - opened.request.arrival)
        if opened.dispatched_at is not None:
            stats.prompt_tokens += len(opened.request.prompt)
            stats.cached_prompt_tokens += opened.cached_tokens
            stats.completion_tokens += len(opened.generated)

    def _settle(self, now: float, opened: OpenRequest, cost: float, completion_tokens: int) -> UsageFacts | None:
        admitted = opened.admitted
        assert admitted is not None
        usage = usage_of(now, opened, cost, completion_tokens, self.admission.budgets.wall_s(now))
        record = self.admission.settle(
            admitted,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            money_micros=usage.money_micros,
        )
        begun = opened.dispatched_at is not None
        if begun:
            # Before the budget knows: whoever finds a reservation open and its usage recorded settles it by that.
            self._effects.append(fx.UsageRecorded(usage))
        self._journal(record)
        return usage if begun else None

    def _grant(self, opened: OpenRequest, output_tokens: int) -> None:
        if opened.admitted is not None and opened.admitted.reservation:
            self._journal(self.admission.grant(opened.admitted, output_tokens))

    def _journal(self, record: Record | None) -> None:
        if record is not None:
            self._effects.append(fx.Journal(record))

    def _settle_lost(self, recorded: Mapping[str, Used]) -> None:
        """What the core before this one had open has ended with it. It is charged what was recorded of it, else what
        it may have used at most."""
        budgets = self.admission.budgets
        for held in budgets.open:
            used = recorded.get(held.record_id)
            if used is None:
                used = Used(held.granted_tokens, held.granted_micros)
                if held.granted_tokens:
                    self._effects.append(fx.UsageRecorded(usage_of_lost(held, budgets.wall_s(self._now))))
            self._journal(budgets.settle(held.number, tokens=used.tokens, money_micros=used.money_micros))

    def _timings(self, now: float, opened: OpenRequest) -> Timings:
        arrival = opened.request.arrival
        return Timings(
            queue_s=0.0 if opened.dispatched_at is None else opened.dispatched_at - arrival,
            prefill_s=opened.prefill_s,
            ttft_s=0.0 if opened.first_token_at is None else opened.first_token_at - arrival,
            handoff_s=opened.handoff_s,
            transfer_s=opened.transfer_s,
            total_s=now - arrival,
        )

    def _emit(self, key: str, event: fx.ClientEvent) -> None:
        self._effects.append(Emit(key, event))

    # Time.

    def _tick(self, now: float, event: ev.Tick) -> None:
        while (timer := self._timers.pop_due(now)) is not None:
            if timer.kind is Kind.DEADLINE:
                self._expire(now, self.state.requests[timer.key])
            elif timer.kind is Kind.PATIENCE:
                self._fail_waiting(now, self.state.pools[timer.key])
            elif timer.kind is Kind.REST:
                worker = self.state.workers[timer.key]
                self.state.touch(worker)
                self._mark(worker.facts.model.name)
            else:
                self._look_for_silence(now)

    def _is_live(self, timer: Timer) -> bool:
        if timer.kind is Kind.DEADLINE:
            opened = self.state.requests.get(timer.key)
            return opened is not None and opened.request.deadline == timer.at
        if timer.kind is Kind.PATIENCE:
            since = self.state.pools[timer.key].pathless_since.values()
            return any(at + self.limits.path_wait_s == timer.at for at in since)
        if timer.kind is Kind.REST:
            worker = self.state.workers.get(timer.key)
            return worker is not None and worker.rest_until == timer.at
        return True

    def _fail_waiting(self, now: float, pool: Pool) -> None:
        for selector in tuple(pool.pathless_since):
            if self._gave_up(now, pool, selector):
                for key in pool.queue.waiting_of(selector):
                    self._refuse(now, self.state.requests[key], self._no_workers(pool, selector))

    def _look_for_silence(self, now: float) -> None:
        for worker in tuple(self.state.workers.values()):
            if now - worker.heard_at >= self.limits.silence_s_max:
                why = f"silent for {now - worker.heard_at:.1f} s"
                self._lose(now, worker, why)
                self._effects.append(fx.CloseLink(worker.worker_id, why))
        self._listening = False
        if self.state.workers:
            self._listen(now)

    def _listen(self, now: float) -> None:
        self._listening = True
        self._timers.set(now + self.limits.silence_s_max / 2, Kind.SILENCE, "")

    def _shutdown_requested(self, now: float, event: ev.ShutdownRequested) -> None:
        self._shutting_down = True
        if event.final:
            for opened in tuple(self.state.requests.values()):
                error = Unavailable(
                    "SHUTTING_DOWN", "this router is shutting down", retry_after_s=self.limits.retry_after_s
                )
                self._refuse(now, opened, error)


def _route(opened: OpenRequest) -> Route:
    return Route(
        prefill_worker=opened.prefill_worker,
        decode_worker=opened.decode_worker,
        transport=opened.transport,
        transfer_bytes=opened.transfer_bytes,
        retries=opened.retries,
        local_prefill=opened.local_prefill,
    )


def _selector(opened: OpenRequest) -> Selector:
    assert opened.admitted is not None
    return opened.admitted.account.tenant.pool


def _arrival_note(request: GenerationRequest, ahead: Ahead | None) -> str:
    text = f"queued: {len(request.prompt)} prompt tokens, tenant {request.tenant}, lane {request.lane.value}"
    if ahead is None or not (ahead.own_requests or ahead.others_requests):
        return text
    return (
        f"{text}; before it {ahead.own_requests} of its own (cost {ahead.own_cost:.0f}) and {ahead.others_requests} of "
        f"others (cost {ahead.others_cost:.0f}); predicted wait {ahead.wait_s:.2f} s"
    )
