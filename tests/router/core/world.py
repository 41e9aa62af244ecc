"""A world of dumb workers around the production core, on virtual time.

Links keep order and take time: what either side sends waits until `step` delivers it, so every race between an order,
its cancellation and the worker's answer can happen. Workers compute tokens from what they are given, such that feeding
tokens back where it is not allowed, a missing token or a repeated one changes what follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from router.core import effects as fx
from router.core import events as ev
from router.core.budget import Record
from router.core.core import Core
from router.core.estimate import UNKNOWN, StepModel
from router.core.handoff import may_feed_back
from router.core.limits import CoreLimits
from router.core.request import FinishReason, GenerationRequest, Lane, Sampling
from router.core.story import Story
from router.core.tenant import TenantBook
from router.core.usage import UsageFacts, Used
from router.core.worker import Capacity, KvEndpoint, Load, ModelFacts, PeerLane, Role, WorkerFacts

MODEL = "tiny"
VOCAB = 50
EOS = 0


def facts(
    worker_id: str, role: Role, *, incarnation: str = "i0", labels: Mapping[str, str] | None = None, **capacity: int
) -> WorkerFacts:
    return WorkerFacts(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role,
        model=ModelFacts(name=MODEL, revision="r", max_model_len=512, vocab_size=VOCAB, eos_token_ids=(EOS,)),
        capacity=Capacity(**{"prefill_legs": 2, "decode_legs": 4, "kv_blocks": 64, "block_tokens": 4, **capacity}),
        kv=KvEndpoint(address=f"{worker_id}:1", incarnation=incarnation, layout={"dtype": "f32"}),
        labels=labels or {},
    )


def next_token(tokens: tuple[int, ...], outputs: int, sampling: Sampling) -> int:
    """A stateful sampler also depends on how many tokens its own leg has drawn."""
    drawn = "" if may_feed_back(sampling) else f"|{sampling.seed}|{outputs}"
    token = crc32(f"{tokens}{drawn}".encode()) % VOCAB
    if token == EOS and (outputs < sampling.min_tokens or sampling.ignore_eos):
        return 1
    return token


def undisturbed(request: GenerationRequest) -> tuple[int, ...]:
    """What one engine alone would answer."""
    tokens, sampling = request.prompt, request.sampling
    for outputs in range(sampling.max_tokens):
        token = next_token(tokens, outputs, sampling)
        tokens += (token,)
        if token == EOS:
            break
    return tokens[len(request.prompt) :]


#: Prompts that are longer take two steps: after the first their blocks are offered.
CHUNK_TOKENS = 8


@dataclass
class RunningLeg:
    order: fx.SendPrefill | fx.SendDecode
    outputs: list[int] = field(default_factory=list)
    fetched: bool = False
    offered: bool = False


@dataclass
class FakeWorker:
    facts: WorkerFacts
    role: Role
    draining: bool = False
    legs: dict[str, RunningLeg] = field(default_factory=dict)
    #: By handle: the tokens whose KV it holds, and who may read it.
    leases: dict[bytes, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    #: What is being fetched ahead, by prefill leg: the handle.
    ahead: dict[str, bytes] = field(default_factory=dict)
    inbox: deque[fx.Effect] = field(default_factory=deque)
    outbox: deque[ev.Event] = field(default_factory=deque)


@dataclass
class Client:
    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    end: fx.Finished | fx.Failed | None = None
    stopped_after: int | None = None


class World:
    def __init__(
        self,
        *,
        book: TenantBook | None = None,
        step: StepModel = UNKNOWN,
        recorded: Mapping[str, Used] | None = None,
        **limits: Any,
    ) -> None:
        self.now = 0.0
        self.core = Core(
            now=0.0,
            limits=CoreLimits(**limits),
            models=(MODEL,),
            book=book,
            step=step,
            recorded=recorded,
        )
        self.workers: dict[str, FakeWorker] = {}
        self.clients: dict[str, Client] = {}
        self.legs_ever: set[str] = set()
        self.usage: dict[str, UsageFacts] = {}
        self.records: list[Record] = []
        #: Of the last event.
        self.effects: list[fx.Effect] = []

    # What happens.

    def post(self, event: ev.Event) -> list[fx.Effect]:
        effects = self.effects = self.core.handle(self.now, event)
        for effect in effects:
            self._apply(effect)
        self.core.check_integrity()
        return effects

    def join(
        self,
        worker_id: str,
        role: Role,
        *,
        incarnation: str = "i0",
        labels: Mapping[str, str] | None = None,
        **capacity: int,
    ) -> FakeWorker:
        joined = facts(worker_id, role, incarnation=incarnation, labels=labels, **capacity)
        assert not self.core.misfit(joined)
        self.workers[worker_id] = FakeWorker(joined, role)
        self.post(ev.WorkerJoined(joined))
        return self.workers[worker_id]

    def lose(self, worker_id: str) -> None:
        del self.workers[worker_id]
        self.post(ev.WorkerLost(worker_id))

    def submit(
        self,
        request_id: str,
        prompt: tuple[int, ...] = (7, 8, 9, 10, 11),
        *,
        timeout_s: float = 60.0,
        sampling: Sampling | None = None,
        model: str = MODEL,
        tenant: str = "default",
        lane: Lane = Lane.STANDARD,
    ) -> Client:
        request = GenerationRequest(
            request_id=request_id,
            model=model,
            prompt=prompt,
            sampling=sampling or Sampling(max_tokens=8, temperature=0.0),
            arrival=self.now,
            deadline=self.now + timeout_s,
            tenant=tenant,
            lane=lane,
        )
        client = self.clients[request.key] = Client(request)
        self.post(ev.Submit(request))
        return client

    def story(self, request_id: str, tenant: str | None = None) -> Story | None:
        return next(iter(self.core.explain(request_id, tenant)), None)

    def advance(self, seconds: float) -> None:
        """Lets time pass, ticking whenever the core asks for it."""
        until = self.now + seconds
        while (at := self.core.next_deadline()) is not None and at <= until:
            self.now = max(self.now, at)
            self.post(ev.Tick())
        self.now = until

    def step(self, worker: FakeWorker) -> bool:
        """Delivers what waits on a worker's link, and lets each of its legs do one thing."""
        moved = bool(worker.inbox or worker.outbox or worker.legs)
        while worker.inbox:
            self.deliver(worker)
        for leg_id in tuple(worker.legs):
            self.compute(worker, leg_id)
        while worker.outbox and self.is_linked(worker):
            self.report(worker)
        return moved

    def settle(self) -> None:
        """Runs until nothing moves without time."""
        for _ in range(10_000):
            moved = [self.step(worker) for worker in tuple(self.workers.values())]
            if not any(moved):
                return
        raise AssertionError("it never settles")

    def is_linked(self, worker: FakeWorker) -> bool:
        return self.workers.get(worker.facts.worker_id) is worker

    # The workers' side.

    def deliver(self, worker: FakeWorker) -> None:
        order = worker.inbox.popleft()
        match order:
            case fx.SendPrefill() | fx.SendDecode():
                if worker.draining:
                    self._fail(worker, order.leg_id, ev.Failure.REJECTED)
                else:
                    worker.legs[order.leg_id] = RunningLeg(order)
            case fx.FetchAhead():
                assert order.timeout_s > 0
                worker.ahead[order.leg_id] = order.handle
            case fx.CancelLeg(_, leg_id):
                worker.ahead.pop(leg_id, None)
                worker.legs.pop(leg_id, None)
                for handle in [handle for handle in worker.leases if handle.startswith(leg_id.encode() + b"#")]:
                    del worker.leases[handle]
            case fx.ReleaseLease(_, handle):
                worker.leases.pop(handle, None)
            case fx.SendDrain():
                self.announce_drain(worker)
            case fx.SendSetRole(_, role):
                self.change_role(worker, role)

    def compute(self, worker: FakeWorker, leg_id: str) -> None:
        leg = worker.legs[leg_id]
        if isinstance(leg.order, fx.SendPrefill):
            if self._is_to_be_offered(leg, leg.order):
                self._offer(worker, leg, leg.order)
            else:
                self._prefill(worker, leg.order)
        elif leg.order.handle and not leg.fetched:
            self._fetch(worker, leg, leg.order)
        else:
            self._decode(worker, leg, leg.order)

    def report(self, worker: FakeWorker) -> None:
        self.post(worker.outbox.popleft())

    def fail(self, worker: FakeWorker, leg_id: str, failure: ev.Failure) -> None:
        del worker.legs[leg_id]
        worker.leases.pop(leg_id.encode() + b"#", None)
        self._fail(worker, leg_id, failure)

    def announce_drain(self, worker: FakeWorker) -> None:
        worker.draining = True
        worker.outbox.append(ev.DrainingAnnounced(worker.facts.worker_id))

    def change_role(self, worker: FakeWorker, role: Role) -> None:
        worker.role = role
        worker.outbox.append(ev.RoleChanged(worker.facts.worker_id, role))

    def say_load(self, worker: FakeWorker) -> None:
        worker.outbox.append(ev.LoadReported(worker.facts.worker_id, Load()))

    def say_lane(self, worker: FakeWorker, peer: str, refusal: str = "") -> None:
        worker.outbox.append(ev.PeerLaneReported(worker.facts.worker_id, PeerLane(peer=peer, refusal=refusal)))

    def _fail(self, worker: FakeWorker, leg_id: str, failure: ev.Failure) -> None:
        worker.outbox.append(ev.LegFailed(worker.facts.worker_id, leg_id, failure, "as asked"))

    def _is_to_be_offered(self, leg: RunningLeg, order: fx.SendPrefill) -> bool:
        return order.hand_off and len(order.token_ids) > CHUNK_TOKENS and not leg.offered

    def _offer(self, worker: FakeWorker, leg: RunningLeg, order: fx.SendPrefill) -> None:
        leg.offered = True
        handle = order.leg_id.encode() + b"#"
        worker.leases[handle] = (order.token_ids, order.reader)
        worker.outbox.append(ev.Offered(worker.facts.worker_id, order.leg_id, handle))

    def _prefill(self, worker: FakeWorker, order: fx.SendPrefill) -> None:
        del worker.legs[order.leg_id]
        token = next_token(order.token_ids, 0, order.sampling)
        finish = _finish_reason(token, 1, order.sampling)
        handle = order.leg_id.encode() + b"#"
        if order.hand_off and (finish is None or order.resample):
            worker.leases[handle] = (order.token_ids, order.reader)
        else:
            worker.leases.pop(handle, None)  # withdrawn
            handle = b""
        worker.outbox.append(
            ev.PrefillDone(
                worker_id=worker.facts.worker_id,
                leg_id=order.leg_id,
                token_id=token,
                finish_reason=finish,
                handle=handle,
            )
        )

    def _fetch(self, worker: FakeWorker, leg: RunningLeg, order: fx.SendDecode) -> None:
        worker.ahead = {ahead: handle for ahead, handle in worker.ahead.items() if handle != order.handle}
        for owner in self.workers.values():
            if order.handle in owner.leases:
                tokens, reader = owner.leases.pop(order.handle)
                assert reader == worker.facts.worker_id
                assert order.token_ids[: len(tokens)] == tokens
                assert len(order.token_ids) - len(tokens) <= 1
                leg.fetched = True
                worker.outbox.append(
                    ev.Fetched(
                        worker_id=worker.facts.worker_id,
                        leg_id=order.leg_id,
                        transport="memory",
                        nbytes=len(tokens),
                        fetch_s=0.001,
                    )
                )
                return
        self.fail(worker, order.leg_id, ev.Failure.TRANSFER)

    def _decode(self, worker: FakeWorker, leg: RunningLeg, order: fx.SendDecode) -> None:
        token = next_token(order.token_ids + tuple(leg.outputs), len(leg.outputs), order.sampling)
        leg.outputs.append(token)
        finish = _finish_reason(token, len(leg.outputs), order.sampling)
        if finish is not None:
            del worker.legs[order.leg_id]
        worker.outbox.append(ev.StepOutputs(worker.facts.worker_id, (ev.StepOutput(order.leg_id, (token,), finish),)))

    # The core's effects.

    def _apply(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Emit(key, event):
                self._receive(self.clients[key], event)
            case fx.UsageRecorded(usage):
                assert usage.record_id not in {one.record_id for one in self.usage.values()}
                self.usage[usage.request_id] = usage
            case fx.Journal(record):
                self.records.append(record)
            case fx.CloseLink(worker_id, _):
                self.workers.pop(worker_id, None)
            case fx.SendPrefill() | fx.SendDecode():
                self._check_order(effect)
                self.workers[effect.worker_id].inbox.append(effect)
            case _:
                self.workers[effect.worker_id].inbox.append(effect)

    def _check_order(self, order: fx.SendPrefill | fx.SendDecode) -> None:
        worker = self.core.state.workers[order.worker_id]
        assert not worker.draining
        assert order.leg_id not in self.legs_ever
        self.legs_ever.add(order.leg_id)
        assert order.timeout_s > 0
        assert order.sampling.max_tokens > 0
        if isinstance(order, fx.SendPrefill):
            assert worker.role is Role.PREFILL
            assert len(worker.prefilling) <= worker.facts.capacity.prefill_legs
        else:
            assert worker.role is not Role.PREFILL
            assert len(worker.slots) <= worker.facts.capacity.decode_legs
        assert worker.kv_room >= 0

    def _receive(self, client: Client, event: fx.ClientEvent) -> None:
        assert client.end is None
        if isinstance(event, fx.Tokens):
            assert event.token_ids
            client.tokens.extend(event.token_ids)
        else:
            client.end = event
        self._check_answer(client)

    def _check_answer(self, client: Client) -> None:
        """At every moment the stream is a part of the undisturbed answer; finished, it is all of it."""
        request = client.request
        predictable = may_feed_back(request.sampling) or (
            request.sampling.temperature == 0 or request.sampling.seed is not None
        )
        if not predictable:
            assert len(client.tokens) <= request.sampling.max_tokens
            return
        answer = undisturbed(request)
        assert tuple(client.tokens) == answer[: len(client.tokens)]
        if isinstance(client.end, fx.Finished):
            assert client.end.usage.prompt_tokens == len(request.prompt)
            if client.stopped_after is None:
                assert tuple(client.tokens) == answer
                assert client.end.usage.completion_tokens == len(answer)
                assert client.end.reason is (FinishReason.STOP if answer[-1] == EOS else FinishReason.LENGTH)

    def check_agreement(self) -> None:
        """Reads every link out, computing nothing: then workers hold what the core thinks they hold, and no more."""
        while any(worker.inbox or worker.outbox for worker in self.workers.values()):
            for worker in tuple(self.workers.values()):
                while worker.inbox and self.is_linked(worker):
                    self.deliver(worker)
                while worker.outbox and self.is_linked(worker):
                    self.report(worker)
        handles = {opened.handle for opened in self.core.state.requests.values()}
        for worker_id, worker in self.workers.items():
            assert set(worker.legs) == set(self.core.state.workers[worker_id].legs)
            assert set(worker.leases) <= handles

    def check_nothing_left(self) -> None:
        self.check_agreement()
        assert not self.core.state.requests
        for worker_id, worker in self.workers.items():
            assert not worker.leases
            assert not worker.ahead
            held = self.core.state.workers[worker_id]
            assert len(held.slots) == len(held.pinned) == len(held.prefilling) == 0


def _finish_reason(token: int, outputs: int, sampling: Sampling) -> FinishReason | None:
    if token == EOS:
        return FinishReason.STOP
    return FinishReason.LENGTH if outputs == sampling.max_tokens else None
