from protos import worker_link_pb2 as _worker_link_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: bool
    def __init__(self, requests: _Optional[bool] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("router_id", "uptime_s", "workers", "requests_queued", "requests_running", "requests", "outcomes", "unauthenticated")
    class OutcomesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_QUEUED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    UNAUTHENTICATED_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    uptime_s: float
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    requests_queued: int
    requests_running: int
    requests: _containers.RepeatedCompositeFieldContainer[RequestStatus]
    outcomes: _containers.ScalarMap[str, int]
    unauthenticated: bool
    def __init__(self, router_id: _Optional[str] = ..., uptime_s: _Optional[float] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., requests_queued: _Optional[int] = ..., requests_running: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[RequestStatus, _Mapping]]] = ..., outcomes: _Optional[_Mapping[str, int]] = ..., unauthenticated: _Optional[bool] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "state", "model", "engine", "load", "prefill_legs", "decode_legs", "lanes", "capacity", "pid", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LEGS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LEGS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    role: _worker_link_pb2.Role
    state: str
    model: str
    engine: str
    load: _worker_link_pb2.LoadReport
    prefill_legs: int
    decode_legs: int
    lanes: _containers.RepeatedCompositeFieldContainer[_worker_link_pb2.PeerLane]
    capacity: _worker_link_pb2.Capacity
    pid: int
    labels: _containers.ScalarMap[str, str]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[_Union[_worker_link_pb2.Role, str]] = ..., state: _Optional[str] = ..., model: _Optional[str] = ..., engine: _Optional[str] = ..., load: _Optional[_Union[_worker_link_pb2.LoadReport, _Mapping]] = ..., prefill_legs: _Optional[int] = ..., decode_legs: _Optional[int] = ..., lanes: _Optional[_Iterable[_Union[_worker_link_pb2.PeerLane, _Mapping]]] = ..., capacity: _Optional[_Union[_worker_link_pb2.Capacity, _Mapping]] = ..., pid: _Optional[int] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RequestStatus(_message.Message):
    __slots__ = ("request_id", "tenant", "state", "age_s", "prefill_worker", "decode_worker", "prompt_tokens", "completion_tokens", "transport")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    state: str
    age_s: float
    prefill_worker: str
    decode_worker: str
    prompt_tokens: int
    completion_tokens: int
    transport: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., state: _Optional[str] = ..., age_s: _Optional[float] = ..., prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetWorkerRoleRequest(_message.Message):
    __slots__ = ("worker_id", "role")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _worker_link_pb2.Role
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_worker_link_pb2.Role, str]] = ...) -> None: ...

class SetWorkerRoleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class RequestStory(_message.Message):
    __slots__ = ("request_id", "tenant", "model", "lane", "state", "arrived_at", "reason", "error", "retry_after_s", "waited", "placement", "handoff", "ttft_s", "preemptions", "retries", "charge", "lines", "trace_id", "other_tenants")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_AT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    CHARGE_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    OTHER_TENANTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    model: str
    lane: str
    state: str
    arrived_at: float
    reason: str
    error: str
    retry_after_s: float
    waited: Waited
    placement: Placement
    handoff: Handoff
    ttft_s: float
    preemptions: int
    retries: int
    charge: Charge
    lines: _containers.RepeatedCompositeFieldContainer[StoryLine]
    trace_id: str
    other_tenants: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., lane: _Optional[str] = ..., state: _Optional[str] = ..., arrived_at: _Optional[float] = ..., reason: _Optional[str] = ..., error: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., waited: _Optional[_Union[Waited, _Mapping]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ..., ttft_s: _Optional[float] = ..., preemptions: _Optional[int] = ..., retries: _Optional[int] = ..., charge: _Optional[_Union[Charge, _Mapping]] = ..., lines: _Optional[_Iterable[_Union[StoryLine, _Mapping]]] = ..., trace_id: _Optional[str] = ..., other_tenants: _Optional[_Iterable[str]] = ...) -> None: ...

class Waited(_message.Message):
    __slots__ = ("queue_s", "capped_s", "stuck_s", "own_requests", "own_cost", "others_requests", "others_cost", "predicted_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    CAPPED_S_FIELD_NUMBER: _ClassVar[int]
    STUCK_S_FIELD_NUMBER: _ClassVar[int]
    OWN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OWN_COST_FIELD_NUMBER: _ClassVar[int]
    OTHERS_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_COST_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    capped_s: float
    stuck_s: float
    own_requests: int
    own_cost: float
    others_requests: int
    others_cost: float
    predicted_s: float
    def __init__(self, queue_s: _Optional[float] = ..., capped_s: _Optional[float] = ..., stuck_s: _Optional[float] = ..., own_requests: _Optional[int] = ..., own_cost: _Optional[float] = ..., others_requests: _Optional[int] = ..., others_cost: _Optional[float] = ..., predicted_s: _Optional[float] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("why", "decode_worker", "chosen", "runner_up", "local_prefill")
    WHY_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    RUNNER_UP_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    why: str
    decode_worker: str
    chosen: Figures
    runner_up: Figures
    local_prefill: bool
    def __init__(self, why: _Optional[str] = ..., decode_worker: _Optional[str] = ..., chosen: _Optional[_Union[Figures, _Mapping]] = ..., runner_up: _Optional[_Union[Figures, _Mapping]] = ..., local_prefill: _Optional[bool] = ...) -> None: ...

class Figures(_message.Message):
    __slots__ = ("worker_id", "cached_tokens", "tokens", "ttft_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    cached_tokens: int
    tokens: int
    ttft_s: float
    def __init__(self, worker_id: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., tokens: _Optional[int] = ..., ttft_s: _Optional[float] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("prefill_worker", "decode_worker", "transport", "bytes", "transfer_s")
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    prefill_worker: str
    decode_worker: str
    transport: str
    bytes: int
    transfer_s: float
    def __init__(self, prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., transport: _Optional[str] = ..., bytes: _Optional[int] = ..., transfer_s: _Optional[float] = ...) -> None: ...

class Charge(_message.Message):
    __slots__ = ("reserved_tokens", "reserved_money_micros", "settled", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "money_micros", "price_plan", "cost")
    RESERVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_MONEY_MICROS_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MONEY_MICROS_FIELD_NUMBER: _ClassVar[int]
    PRICE_PLAN_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    reserved_tokens: int
    reserved_money_micros: int
    settled: bool
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    money_micros: int
    price_plan: str
    cost: float
    def __init__(self, reserved_tokens: _Optional[int] = ..., reserved_money_micros: _Optional[int] = ..., settled: _Optional[bool] = ..., prompt_tokens: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., money_micros: _Optional[int] = ..., price_plan: _Optional[str] = ..., cost: _Optional[float] = ...) -> None: ...

class StoryLine(_message.Message):
    __slots__ = ("at_s", "what")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    what: str
    def __init__(self, at_s: _Optional[float] = ..., what: _Optional[str] = ...) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("name", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ListTenantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTenantsResponse(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    def __init__(self, tenants: _Optional[_Iterable[_Union[Tenant, _Mapping]]] = ...) -> None: ...

class AddTenantRequest(_message.Message):
    __slots__ = ("name", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SetTenantRequest(_message.Message):
    __slots__ = ("name", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RemoveTenantRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveTenantResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Key(_message.Message):
    __slots__ = ("id", "env", "tenant", "state", "scopes", "lane_max", "created", "expires", "revoked")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    LANE_MAX_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    id: str
    env: str
    tenant: str
    state: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    lane_max: str
    created: float
    expires: float
    revoked: float
    def __init__(self, id: _Optional[str] = ..., env: _Optional[str] = ..., tenant: _Optional[str] = ..., state: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., lane_max: _Optional[str] = ..., created: _Optional[float] = ..., expires: _Optional[float] = ..., revoked: _Optional[float] = ...) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    def __init__(self, keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ...) -> None: ...

class CreateKeyRequest(_message.Message):
    __slots__ = ("tenant", "scopes", "lane_max", "expires_in_s", "env")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    LANE_MAX_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    lane_max: str
    expires_in_s: float
    env: str
    def __init__(self, tenant: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., lane_max: _Optional[str] = ..., expires_in_s: _Optional[float] = ..., env: _Optional[str] = ...) -> None: ...

class CreateKeyResponse(_message.Message):
    __slots__ = ("key", "secret")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    key: Key
    secret: str
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., secret: _Optional[str] = ...) -> None: ...

class RevokeKeyRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class RevokeKeyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
