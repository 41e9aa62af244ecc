"""Protobuf stops here: what clients and operators say as values, what they are told as messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from protos import control_pb2, inference_pb2, worker_link_pb2
from router.core.effects import Finished
from router.core.errors import Invalid
from router.core.request import FinishReason, Structure, StructureKind, TokenLogprobs
from router.core.snapshot import RequestView, Snapshot, WorkerView
from router.core.story import Figures, Story
from router.core.tenant import Tenant
from router.core.worker import Role
from router.edge.admit import Asked
from router.edge.keys import StoredKey
from router.port import ModelView
from router.tenants_edit import facts as tenant_facts
from router.toml import to_toml

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_ROLES = {
    Role.PREFILL: worker_link_pb2.ROLE_PREFILL,
    Role.DECODE: worker_link_pb2.ROLE_DECODE,
    Role.BOTH: worker_link_pb2.ROLE_BOTH,
}
_ROLE_BY_NUMBER: dict[int, Role] = {number: role for role, number in _ROLES.items()}


M = TypeVar("M", bound=Message)

#: Of a text whose length in UTF-8, four bytes each at most, is one byte on the wire.
_SHORT_CHARS = 31

_OPTIONAL = tuple(
    field.name for field in inference_pb2.Sampling.DESCRIPTOR.fields if field.has_presence and not field.message_type
)


# From clients.


def generate_request(data: bytes) -> inference_pb2.GenerateRequest:
    return parse(inference_pb2.GenerateRequest, data)


def list_models_request(data: bytes) -> inference_pb2.ListModelsRequest:
    return parse(inference_pb2.ListModelsRequest, data)


def status_request(data: bytes) -> control_pb2.GetStatusRequest:
    return parse(control_pb2.GetStatusRequest, data)


def drain_request(data: bytes) -> control_pb2.DrainWorkerRequest:
    return parse(control_pb2.DrainWorkerRequest, data)


def role_request(data: bytes) -> control_pb2.SetWorkerRoleRequest:
    return parse(control_pb2.SetWorkerRoleRequest, data)


def explain_request(data: bytes) -> control_pb2.ExplainRequest:
    return parse(control_pb2.ExplainRequest, data)


def list_tenants_request(data: bytes) -> control_pb2.ListTenantsRequest:
    return parse(control_pb2.ListTenantsRequest, data)


def add_tenant_request(data: bytes) -> control_pb2.AddTenantRequest:
    return parse(control_pb2.AddTenantRequest, data)


def set_tenant_request(data: bytes) -> control_pb2.SetTenantRequest:
    return parse(control_pb2.SetTenantRequest, data)


def remove_tenant_request(data: bytes) -> control_pb2.RemoveTenantRequest:
    return parse(control_pb2.RemoveTenantRequest, data)


def list_keys_request(data: bytes) -> control_pb2.ListKeysRequest:
    return parse(control_pb2.ListKeysRequest, data)


def create_key_request(data: bytes) -> control_pb2.CreateKeyRequest:
    return parse(control_pb2.CreateKeyRequest, data)


def revoke_key_request(data: bytes) -> control_pb2.RevokeKeyRequest:
    return parse(control_pb2.RevokeKeyRequest, data)


def parse(kind: type[M], data: bytes) -> M:
    """Raises Invalid. gRPC's own deserializer would answer INTERNAL and name nothing."""
    try:
        return kind.FromString(data)
    except DecodeError:
        pass
    try:
        for field in _not_utf8(_with_bytes_for_strings(kind.DESCRIPTOR).FromString(data)):
            raise Invalid(field, "is not valid UTF-8")
    except DecodeError:
        pass
    raise Invalid("request", f"is not a {kind.DESCRIPTOR.full_name} message")


@cache
def _with_bytes_for_strings(described: Any) -> type[Message]:
    """The message as it would be if its text fields were bytes: it parses what the real one refuses."""
    pool = descriptor_pool.DescriptorPool()
    _add(pool, described.file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(described.full_name))


def _add(pool: descriptor_pool.DescriptorPool, original: Any) -> None:
    file = descriptor_pb2.FileDescriptorProto()
    original.CopyToProto(file)
    for dependency in original.dependencies:
        _add(pool, dependency)
    for message in file.message_type:
        for field in message.field:
            if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    pool.Add(file)


def _not_utf8(message: Message, prefix: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        for at, item in enumerate(value if field.is_repeated else [value]):
            name = f"{prefix}{field.name}[{at}]" if field.is_repeated else f"{prefix}{field.name}"
            if isinstance(item, Message):
                yield from _not_utf8(item, f"{name}.")
            elif isinstance(item, bytes) and not _is_utf8(item):
                yield name


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def asked(message: inference_pb2.Sampling) -> Asked:
    def given(name: str) -> Any:
        return getattr(message, name) if message.HasField(name) else None

    return Asked(
        **{name: given(name) for name in _OPTIONAL},
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        structure=_structure(message.structure),
        logit_bias=tuple(message.logit_bias.items()),
    )


def _structure(message: inference_pb2.Structure) -> Structure | None:
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    return Structure(StructureKind(kind), "" if kind == "json_object" else getattr(message, kind))


# To clients.


class Deltas:
    """Writes one answer's deltas. Most are a piece of text, in an envelope that is the same every time."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._head = inference_pb2.GenerateResponse(request_id=request_id).SerializeToString()

    def write(self, text: str, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> bytes:
        if token_ids or logprobs or len(text) > _SHORT_CHARS:
            return self._whole(text, token_ids, logprobs)
        data = text.encode()
        # Field 2, the delta, with its field 1, the text. Lengths this small are one byte.
        return b"%s\x12%c\x0a%c%s" % (self._head, len(data) + 2, len(data), data)

    def _whole(self, text: str, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> bytes:
        delta = inference_pb2.Delta(text=text, token_ids=token_ids, logprobs=map(_logprobs, logprobs))
        return inference_pb2.GenerateResponse(request_id=self._request_id, delta=delta).SerializeToString()


def _logprobs(entry: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        sampled=inference_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob),
        top=[inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
    )


def finished(request_id: str, event: Finished, stop_match: str) -> inference_pb2.GenerateResponse:
    usage, timings, route = event.usage, event.timings, event.route
    reason = FinishReason.STOP if stop_match else event.reason
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        finished=inference_pb2.Finished(
            reason=_FINISH_REASONS[reason],
            stop_match=stop_match,
            usage=inference_pb2.Usage(
                prompt_tokens=usage.prompt_tokens,
                cached_prompt_tokens=usage.cached_prompt_tokens,
                completion_tokens=usage.completion_tokens,
            ),
            timings=inference_pb2.Timings(
                queue_s=timings.queue_s,
                prefill_s=timings.prefill_s,
                ttft_s=timings.ttft_s,
                handoff_s=timings.handoff_s,
                transfer_s=timings.transfer_s,
                total_s=timings.total_s,
            ),
            route=inference_pb2.Route(
                prefill_worker=route.prefill_worker,
                decode_worker=route.decode_worker,
                transport=route.transport,
                transfer_bytes=route.transfer_bytes,
                retries=route.retries,
                local_prefill=route.local_prefill,
            ),
        ),
    )


def models(views: list[ModelView]) -> inference_pb2.ListModelsResponse:
    return inference_pb2.ListModelsResponse(
        models=[
            inference_pb2.Model(
                name=view.name,
                max_model_len=view.facts.max_model_len if view.facts else 0,
                vocab_size=view.facts.vocab_size if view.facts else 0,
                ready=view.ready,
            )
            for view in views
        ]
    )


# Operators.


def role(number: int) -> Role:
    if number not in _ROLE_BY_NUMBER:
        raise Invalid("role", f"must be ROLE_PREFILL, ROLE_DECODE or ROLE_BOTH, is {number}")
    return _ROLE_BY_NUMBER[number]


def drained() -> control_pb2.DrainWorkerResponse:
    return control_pb2.DrainWorkerResponse()


def role_set() -> control_pb2.SetWorkerRoleResponse:
    return control_pb2.SetWorkerRoleResponse()


def status(router_id: str, uptime_s: float, snapshot: Snapshot, *, unauthenticated: bool = False) -> control_pb2.Status:
    return control_pb2.Status(
        router_id=router_id,
        uptime_s=uptime_s,
        workers=[_worker_status(view) for view in snapshot.workers],
        requests_queued=snapshot.queued,
        requests_running=snapshot.running,
        requests=[_request_status(view) for view in snapshot.requests],
        outcomes={outcome.value: count for outcome, count in snapshot.outcomes.items()},
        unauthenticated=unauthenticated,
    )


def _worker_status(view: WorkerView) -> control_pb2.WorkerStatus:
    facts, load = view.facts, view.load
    return control_pb2.WorkerStatus(
        worker_id=facts.worker_id,
        incarnation=facts.incarnation,
        role=_ROLES[view.role],
        state="draining" if view.draining else "ready",
        model=facts.model.name,
        engine=f"{facts.engine} {facts.engine_version}".strip(),
        load=worker_link_pb2.LoadReport(
            prefill_running=load.prefill_running,
            decode_running=load.decode_running,
            kv_blocks_free=load.kv_blocks_free,
            kv_blocks_total=load.kv_blocks_total,
            leases_held=load.leases_held,
            leased_blocks=load.leased_blocks,
            staged_pages=load.staged_pages,
            transfer_bytes_total=load.transfer_bytes_total,
            transfer_failures_total=load.transfer_failures_total,
            leases_expired_total=load.leases_expired_total,
        ),
        prefill_legs=view.prefill_legs,
        decode_legs=view.decode_legs,
        lanes=[
            worker_link_pb2.PeerLane(
                peer=lane.peer,
                transport=lane.transport,
                gigabytes_per_s=lane.gigabytes_per_s,
                refusal=lane.refusal,
            )
            for lane in view.lanes
        ],
        capacity=worker_link_pb2.Capacity(
            prefill_legs=facts.capacity.prefill_legs,
            decode_legs=facts.capacity.decode_legs,
            kv_blocks=facts.capacity.kv_blocks,
            block_tokens=facts.capacity.block_tokens,
        ),
        pid=facts.pid,
        labels=dict(facts.labels),
    )


def _request_status(view: RequestView) -> control_pb2.RequestStatus:
    return control_pb2.RequestStatus(
        request_id=view.request_id,
        tenant=view.tenant,
        state=view.state.value,
        age_s=view.age_s,
        prefill_worker=view.prefill_worker,
        decode_worker=view.decode_worker,
        prompt_tokens=view.prompt_tokens,
        completion_tokens=view.completion_tokens,
        transport=view.transport,
    )


def story(told: Story, arrived_at: float, other_tenants: Sequence[str]) -> control_pb2.RequestStory:
    error, usage, reserved = told.error, told.usage, told.reserved
    message = control_pb2.RequestStory(
        request_id=told.request_id,
        tenant=told.tenant,
        model=told.model,
        lane=told.lane.value,
        state=told.state.value,
        arrived_at=arrived_at,
        other_tenants=other_tenants,
        reason="" if error is None else error.reason,
        error="" if error is None else error.message,
        retry_after_s=None if error is None else error.retry_after_s,
        waited=_waited(told),
        ttft_s=told.ttft_s,
        preemptions=told.preemptions,
        retries=told.retries,
        lines=[control_pb2.StoryLine(at_s=at_s, what=what) for at_s, what in told.lines],
        trace_id=told.trace_id,
    )
    if told.placed is not None:
        other = told.placed.runner_up
        message.placement.MergeFrom(
            control_pb2.Placement(
                why=told.placed.why,
                decode_worker=told.decode_worker,
                chosen=_figures(told.placed.chosen),
                runner_up=None if other is None else _figures(other),
                local_prefill=told.local_prefill,
            )
        )
    if told.transport:
        message.handoff.MergeFrom(
            control_pb2.Handoff(
                prefill_worker=told.prefill_worker,
                decode_worker=told.decode_worker,
                transport=told.transport,
                bytes=told.transfer_bytes,
                transfer_s=told.transfer_s,
            )
        )
    if reserved is not None:
        message.charge.reserved_tokens, message.charge.reserved_money_micros = reserved
    if usage is not None:
        message.charge.MergeFrom(
            control_pb2.Charge(
                settled=True,
                prompt_tokens=usage.prompt_tokens,
                cached_prompt_tokens=usage.cached_prompt_tokens,
                completion_tokens=usage.completion_tokens,
                money_micros=usage.money_micros,
                price_plan=usage.price_plan,
                cost=usage.cost,
            )
        )
    return message


def _waited(told: Story) -> control_pb2.Waited:
    waited = control_pb2.Waited(queue_s=told.queue_s, capped_s=told.capped_s, stuck_s=told.stuck_s)
    if (ahead := told.ahead) is not None:
        waited.own_requests, waited.own_cost = ahead.own_requests, ahead.own_cost
        waited.others_requests, waited.others_cost = ahead.others_requests, ahead.others_cost
        waited.predicted_s = ahead.wait_s
    return waited


def _figures(figures: Figures) -> control_pb2.Figures:
    return control_pb2.Figures(
        worker_id=figures.worker_id,
        cached_tokens=figures.cached_tokens,
        tokens=figures.tokens,
        ttft_s=figures.ttft_s,
    )


# Tenants and keys.


def tenant(found: Tenant) -> control_pb2.Tenant:
    fields = {name: to_toml(value) for name, value in tenant_facts(found).items() if name != "id" and value is not None}
    return control_pb2.Tenant(name=found.id, fields=fields)


def tenants(found: Iterable[Tenant]) -> control_pb2.ListTenantsResponse:
    return control_pb2.ListTenantsResponse(tenants=[tenant(one) for one in found])


def tenant_removed() -> control_pb2.RemoveTenantResponse:
    return control_pb2.RemoveTenantResponse()


def _key(found: StoredKey, now: float) -> control_pb2.Key:
    return control_pb2.Key(
        id=found.id,
        env=found.env,
        tenant=found.tenant,
        state=found.state(now),
        scopes=sorted(scope.value for scope in found.scopes),
        lane_max=found.lane_max.value,
        created=found.created,
        expires=found.expires,
        revoked=found.revoked,
    )


def keys(found: Iterable[StoredKey], now: float) -> control_pb2.ListKeysResponse:
    return control_pb2.ListKeysResponse(keys=[_key(one, now) for one in found])


def key_created(found: StoredKey, secret: str, now: float) -> control_pb2.CreateKeyResponse:
    return control_pb2.CreateKeyResponse(key=_key(found, now), secret=secret)


def key_revoked() -> control_pb2.RevokeKeyResponse:
    return control_pb2.RevokeKeyResponse()
