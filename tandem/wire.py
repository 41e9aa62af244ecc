"""Protobuf stops here: messages to values and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from protos import control_pb2, inference_pb2, worker_link_pb2
from tandem.errors import FieldViolation, InvalidArgument
from tandem.values import (
    Charge,
    ClusterStatus,
    Delta,
    Figures,
    Finished,
    FinishReason,
    Handoff,
    KeyFacts,
    Lane,
    Load,
    Model,
    Placement,
    RequestStatus,
    RequestStory,
    Role,
    Route,
    SamplingOptions,
    TenantFields,
    Timings,
    TokenLogprobs,
    Usage,
    Waited,
    WorkerStatus,
)

#: For signatures elsewhere.
GenerateRequest = inference_pb2.GenerateRequest
GenerateResponse = inference_pb2.GenerateResponse

_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_ROLES = {
    worker_link_pb2.ROLE_PREFILL: Role.PREFILL,
    worker_link_pb2.ROLE_DECODE: Role.DECODE,
    worker_link_pb2.ROLE_BOTH: Role.BOTH,
}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}


def generate_request(
    prompt: str | Sequence[int],
    sampling: SamplingOptions,
    *,
    model: str,
    request_id: str,
    lane: str,
    return_token_ids: bool,
) -> inference_pb2.GenerateRequest:
    """Raises InvalidArgument for what protobuf cannot carry, for example a negative token id. All else is the
    server's to judge."""
    unknown = sampling.keys() - SamplingOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"generate() got unknown options: {', '.join(sorted(unknown))}")
    request = inference_pb2.GenerateRequest(return_token_ids=return_token_ids)
    with _naming("request_id"):
        request.request_id = request_id
    with _naming("model"):
        request.model = model
    with _naming("lane"):
        request.lane = lane
    for name, value in sampling.items():
        with _naming(f"sampling.{name}"):
            _set(request.sampling, name, value)
    if isinstance(prompt, str):
        with _naming("text"):
            request.text = prompt
    else:
        request.token_ids.SetInParent()  # an empty list of tokens is a prompt too, for the server to refuse
        with _naming("token_ids"):
            request.token_ids.ids.extend(prompt)
    return request


def _set(message: inference_pb2.Sampling, name: str, value: object) -> None:
    if isinstance(value, list | tuple):
        getattr(message, name).extend(value)
    elif value is not None:
        setattr(message, name, value)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Protobuf's own errors (out of range, wrong type, not Unicode) do not say which field."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{field}: {error}", violations=(FieldViolation(field, str(error)),)) from None


def list_models_request() -> inference_pb2.ListModelsRequest:
    return inference_pb2.ListModelsRequest()


def get_status_request(*, requests: bool) -> control_pb2.GetStatusRequest:
    return control_pb2.GetStatusRequest(requests=requests)


def drain_worker_request(worker_id: str) -> control_pb2.DrainWorkerRequest:
    return control_pb2.DrainWorkerRequest(worker_id=worker_id)


def set_worker_role_request(worker_id: str, role: Role) -> control_pb2.SetWorkerRoleRequest:
    return control_pb2.SetWorkerRoleRequest(worker_id=worker_id, role=_ROLE_NUMBERS[role])


def event(message: inference_pb2.GenerateResponse) -> Delta | Finished | None:
    """None for an event of a newer server."""
    match message.WhichOneof("event"):
        case "delta":
            return _delta(message.delta)
        case "finished":
            return _finished(message.finished)
    return None


def models(message: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    return tuple(
        Model(name=model.name, max_model_len=model.max_model_len, vocab_size=model.vocab_size, ready=model.ready)
        for model in message.models
    )


def _delta(message: inference_pb2.Delta) -> Delta:
    return Delta(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(
            TokenLogprobs(
                lp.sampled.token_id, lp.sampled.logprob, tuple((other.token_id, other.logprob) for other in lp.top)
            )
            for lp in message.logprobs
        ),
    )


def _finished(message: inference_pb2.Finished) -> Finished:
    usage, timings, route = message.usage, message.timings, message.route
    return Finished(
        reason=_FINISH_REASONS[message.reason],
        stop_match=message.stop_match,
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            completion_tokens=usage.completion_tokens,
        ),
        timings=Timings(
            queue_s=timings.queue_s,
            prefill_s=timings.prefill_s,
            ttft_s=timings.ttft_s,
            handoff_s=timings.handoff_s,
            transfer_s=timings.transfer_s,
            total_s=timings.total_s,
        ),
        route=Route(
            prefill_worker=route.prefill_worker,
            decode_worker=route.decode_worker,
            transport=route.transport,
            transfer_bytes=route.transfer_bytes,
            retries=route.retries,
            local_prefill=route.local_prefill,
        ),
    )


def cluster_status(message: control_pb2.Status) -> ClusterStatus:
    return ClusterStatus(
        router_id=message.router_id,
        uptime_s=message.uptime_s,
        workers=tuple(_worker_status(worker) for worker in message.workers),
        requests_queued=message.requests_queued,
        requests_running=message.requests_running,
        requests=tuple(_request_status(request) for request in message.requests),
        outcomes=dict(message.outcomes),
        unauthenticated=message.unauthenticated,
    )


def _worker_status(message: control_pb2.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        role=_ROLES.get(message.role),
        state=message.state,
        model=message.model,
        engine=message.engine,
        pid=message.pid,
        load=_load(message.load),
        prefill_legs=message.prefill_legs,
        decode_legs=message.decode_legs,
        prefill_legs_max=message.capacity.prefill_legs,
        decode_legs_max=message.capacity.decode_legs,
        lanes=tuple(
            Lane(peer=lane.peer, transport=lane.transport, gigabytes_per_s=lane.gigabytes_per_s, refusal=lane.refusal)
            for lane in message.lanes
        ),
        labels=dict(message.labels),
    )


def _load(message: worker_link_pb2.LoadReport) -> Load:
    return Load(
        prefill_running=message.prefill_running,
        decode_running=message.decode_running,
        kv_blocks_free=message.kv_blocks_free,
        kv_blocks_total=message.kv_blocks_total,
        leases_held=message.leases_held,
        leased_blocks=message.leased_blocks,
        staged_pages=message.staged_pages,
        transfer_bytes_total=message.transfer_bytes_total,
        transfer_failures_total=message.transfer_failures_total,
        leases_expired_total=message.leases_expired_total,
    )


def _request_status(message: control_pb2.RequestStatus) -> RequestStatus:
    return RequestStatus(
        request_id=message.request_id,
        tenant=message.tenant,
        state=message.state,
        age_s=message.age_s,
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        transport=message.transport,
    )


def explain_request(request_id: str, tenant: str) -> control_pb2.ExplainRequest:
    request = control_pb2.ExplainRequest()
    with _naming("request_id"):
        request.request_id = request_id
    with _naming("tenant"):
        request.tenant = tenant
    return request


def request_story(message: control_pb2.RequestStory) -> RequestStory:
    waited, charge, handoff = message.waited, message.charge, message.handoff
    return RequestStory(
        request_id=message.request_id,
        tenant=message.tenant,
        model=message.model,
        lane=message.lane,
        state=message.state,
        arrived_at=message.arrived_at,
        reason=message.reason,
        error=message.error,
        retry_after_s=message.retry_after_s if message.HasField("retry_after_s") else None,
        waited=Waited(
            queue_s=waited.queue_s if waited.HasField("queue_s") else None,
            capped_s=waited.capped_s,
            stuck_s=waited.stuck_s,
            own_requests=waited.own_requests,
            own_cost=waited.own_cost,
            others_requests=waited.others_requests,
            others_cost=waited.others_cost,
            predicted_s=waited.predicted_s,
        ),
        placement=_placement(message.placement) if message.HasField("placement") else None,
        handoff=Handoff(
            prefill_worker=handoff.prefill_worker,
            decode_worker=handoff.decode_worker,
            transport=handoff.transport,
            nbytes=handoff.bytes,
            transfer_s=handoff.transfer_s,
        )
        if message.HasField("handoff")
        else None,
        ttft_s=message.ttft_s if message.HasField("ttft_s") else None,
        preemptions=message.preemptions,
        retries=message.retries,
        charge=Charge(
            reserved_tokens=charge.reserved_tokens,
            reserved_money_micros=charge.reserved_money_micros,
            settled=charge.settled,
            prompt_tokens=charge.prompt_tokens,
            cached_prompt_tokens=charge.cached_prompt_tokens,
            completion_tokens=charge.completion_tokens,
            money_micros=charge.money_micros,
            price_plan=charge.price_plan,
            cost=charge.cost,
        ),
        lines=tuple((line.at_s, line.what) for line in message.lines),
        trace_id=message.trace_id,
        other_tenants=tuple(message.other_tenants),
    )


def _placement(message: control_pb2.Placement) -> Placement:
    return Placement(
        why=message.why,
        decode_worker=message.decode_worker,
        chosen=_figures(message.chosen),
        runner_up=_figures(message.runner_up) if message.HasField("runner_up") else None,
        local_prefill=message.local_prefill,
    )


def _figures(message: control_pb2.Figures) -> Figures:
    return Figures(
        worker_id=message.worker_id,
        cached_tokens=message.cached_tokens,
        tokens=message.tokens,
        ttft_s=message.ttft_s if message.HasField("ttft_s") else None,
    )


def list_tenants_request() -> control_pb2.ListTenantsRequest:
    return control_pb2.ListTenantsRequest()


def add_tenant_request(name: str, fields: Mapping[str, str]) -> control_pb2.AddTenantRequest:
    return control_pb2.AddTenantRequest(name=name, fields=fields)


def set_tenant_request(name: str, fields: Mapping[str, str]) -> control_pb2.SetTenantRequest:
    return control_pb2.SetTenantRequest(name=name, fields=fields)


def remove_tenant_request(name: str) -> control_pb2.RemoveTenantRequest:
    return control_pb2.RemoveTenantRequest(name=name)


def tenant_fields(message: control_pb2.Tenant) -> TenantFields:
    return TenantFields(name=message.name, fields=dict(message.fields))


def list_keys_request(tenant: str) -> control_pb2.ListKeysRequest:
    return control_pb2.ListKeysRequest(tenant=tenant)


def create_key_request(
    tenant: str, scopes: Sequence[str], lane_max: str, expires_in_s: float | None, env: str
) -> control_pb2.CreateKeyRequest:
    return control_pb2.CreateKeyRequest(
        tenant=tenant, scopes=scopes, lane_max=lane_max, expires_in_s=expires_in_s, env=env
    )


def revoke_key_request(key_id: str) -> control_pb2.RevokeKeyRequest:
    return control_pb2.RevokeKeyRequest(id=key_id)


def key_facts(message: control_pb2.Key) -> KeyFacts:
    return KeyFacts(
        id=message.id,
        env=message.env,
        tenant=message.tenant,
        state=message.state,
        scopes=tuple(message.scopes),
        lane_max=message.lane_max,
        created=message.created,
        expires=message.expires if message.HasField("expires") else None,
        revoked=message.revoked if message.HasField("revoked") else None,
    )
