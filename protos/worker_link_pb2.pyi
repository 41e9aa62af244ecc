from protos import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_BOTH: _ClassVar[Role]

class Failure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_UNSPECIFIED: _ClassVar[Failure]
    FAILURE_REJECTED: _ClassVar[Failure]
    FAILURE_TRANSFER: _ClassVar[Failure]
    FAILURE_INVALID: _ClassVar[Failure]
    FAILURE_ENGINE: _ClassVar[Failure]
    FAILURE_EXPIRED: _ClassVar[Failure]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_BOTH: Role
FAILURE_UNSPECIFIED: Failure
FAILURE_REJECTED: Failure
FAILURE_TRANSFER: Failure
FAILURE_INVALID: Failure
FAILURE_ENGINE: Failure
FAILURE_EXPIRED: Failure

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "step", "prefill_done", "fetched", "leg_failed", "load", "role_changed", "draining", "peer_lane", "offered", "introduction")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DONE_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    LEG_FAILED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ROLE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PEER_LANE_FIELD_NUMBER: _ClassVar[int]
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    INTRODUCTION_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    step: StepOutputs
    prefill_done: PrefillDone
    fetched: Fetched
    leg_failed: LegFailed
    load: LoadReport
    role_changed: RoleChanged
    draining: Draining
    peer_lane: PeerLane
    offered: Offered
    introduction: Introduction
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., step: _Optional[_Union[StepOutputs, _Mapping]] = ..., prefill_done: _Optional[_Union[PrefillDone, _Mapping]] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ..., leg_failed: _Optional[_Union[LegFailed, _Mapping]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., role_changed: _Optional[_Union[RoleChanged, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., peer_lane: _Optional[_Union[PeerLane, _Mapping]] = ..., offered: _Optional[_Union[Offered, _Mapping]] = ..., introduction: _Optional[_Union[Introduction, _Mapping]] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("welcome", "prefill", "decode", "cancel", "release", "drain", "set_role", "peers", "challenge", "fetch_ahead")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    SET_ROLE_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    FETCH_AHEAD_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    prefill: PrefillOrder
    decode: DecodeOrder
    cancel: CancelLeg
    release: ReleaseLease
    drain: Drain
    set_role: SetRole
    peers: Peers
    challenge: Challenge
    fetch_ahead: FetchAhead
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., prefill: _Optional[_Union[PrefillOrder, _Mapping]] = ..., decode: _Optional[_Union[DecodeOrder, _Mapping]] = ..., cancel: _Optional[_Union[CancelLeg, _Mapping]] = ..., release: _Optional[_Union[ReleaseLease, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., set_role: _Optional[_Union[SetRole, _Mapping]] = ..., peers: _Optional[_Union[Peers, _Mapping]] = ..., challenge: _Optional[_Union[Challenge, _Mapping]] = ..., fetch_ahead: _Optional[_Union[FetchAhead, _Mapping]] = ...) -> None: ...

class Introduction(_message.Message):
    __slots__ = ("worker_id", "incarnation", "nonce")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    nonce: bytes
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("router_id", "nonce", "proof")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    nonce: bytes
    proof: bytes
    def __init__(self, router_id: _Optional[str] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "labels", "model", "capacity", "kv", "engine", "engine_version", "pid", "proof")
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
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    role: Role
    labels: _containers.ScalarMap[str, str]
    model: ModelInfo
    capacity: Capacity
    kv: KvEndpoint
    engine: str
    engine_version: str
    pid: int
    proof: bytes
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., capacity: _Optional[_Union[Capacity, _Mapping]] = ..., kv: _Optional[_Union[KvEndpoint, _Mapping]] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., pid: _Optional[int] = ..., proof: _Optional[bytes] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "revision", "max_model_len", "vocab_size", "eos_token_ids", "features")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., features: _Optional[_Iterable[str]] = ...) -> None: ...

class Capacity(_message.Message):
    __slots__ = ("prefill_legs", "decode_legs", "kv_blocks", "block_tokens")
    PREFILL_LEGS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LEGS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prefill_legs: int
    decode_legs: int
    kv_blocks: int
    block_tokens: int
    def __init__(self, prefill_legs: _Optional[int] = ..., decode_legs: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., block_tokens: _Optional[int] = ...) -> None: ...

class KvEndpoint(_message.Message):
    __slots__ = ("address", "incarnation", "layout")
    class LayoutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    address: str
    incarnation: str
    layout: _containers.ScalarMap[str, str]
    def __init__(self, address: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("router_id", "load_report_interval_s")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    LOAD_REPORT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    load_report_interval_s: float
    def __init__(self, router_id: _Optional[str] = ..., load_report_interval_s: _Optional[float] = ...) -> None: ...

class PrefillOrder(_message.Message):
    __slots__ = ("leg_id", "tenant", "token_ids", "sampling", "cache_salt", "timeout_s", "hand_off", "reader", "resample")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    RESAMPLE_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    tenant: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.Sampling
    cache_salt: bytes
    timeout_s: float
    hand_off: bool
    reader: str
    resample: bool
    def __init__(self, leg_id: _Optional[str] = ..., tenant: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., cache_salt: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., hand_off: _Optional[bool] = ..., reader: _Optional[str] = ..., resample: _Optional[bool] = ...) -> None: ...

class DecodeOrder(_message.Message):
    __slots__ = ("leg_id", "tenant", "token_ids", "prompt_tokens", "sampling", "cache_salt", "timeout_s", "handle")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    tenant: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    sampling: _inference_pb2.Sampling
    cache_salt: bytes
    timeout_s: float
    handle: bytes
    def __init__(self, leg_id: _Optional[str] = ..., tenant: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., cache_salt: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., handle: _Optional[bytes] = ...) -> None: ...

class FetchAhead(_message.Message):
    __slots__ = ("leg_id", "handle", "timeout_s")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    handle: bytes
    timeout_s: float
    def __init__(self, leg_id: _Optional[str] = ..., handle: _Optional[bytes] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class CancelLeg(_message.Message):
    __slots__ = ("leg_id",)
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    def __init__(self, leg_id: _Optional[str] = ...) -> None: ...

class ReleaseLease(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: bytes
    def __init__(self, handle: _Optional[bytes] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetRole(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: Role
    def __init__(self, role: _Optional[_Union[Role, str]] = ...) -> None: ...

class Peers(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    def __init__(self, peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("worker_id", "kv")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    kv: KvEndpoint
    def __init__(self, worker_id: _Optional[str] = ..., kv: _Optional[_Union[KvEndpoint, _Mapping]] = ...) -> None: ...

class StepOutputs(_message.Message):
    __slots__ = ("outputs", "firsts")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    FIRSTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[StepOutput]
    firsts: int
    def __init__(self, outputs: _Optional[_Iterable[_Union[StepOutput, _Mapping]]] = ..., firsts: _Optional[int] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("leg_id", "token_ids", "finish_reason", "logprobs", "cached_tokens")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: _inference_pb2.FinishReason
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    cached_tokens: int
    def __init__(self, leg_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Offered(_message.Message):
    __slots__ = ("leg_id", "handle")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    handle: bytes
    def __init__(self, leg_id: _Optional[str] = ..., handle: _Optional[bytes] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("leg_id", "token_id", "logprobs", "finish_reason", "handle", "cached_tokens", "queue_s", "prefill_s")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    token_id: int
    logprobs: _inference_pb2.TokenLogprobs
    finish_reason: _inference_pb2.FinishReason
    handle: bytes
    cached_tokens: int
    queue_s: float
    prefill_s: float
    def __init__(self, leg_id: _Optional[str] = ..., token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_inference_pb2.TokenLogprobs, _Mapping]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., handle: _Optional[bytes] = ..., cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class Fetched(_message.Message):
    __slots__ = ("leg_id", "transport", "bytes", "fetch_s")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    transport: str
    bytes: int
    fetch_s: float
    def __init__(self, leg_id: _Optional[str] = ..., transport: _Optional[str] = ..., bytes: _Optional[int] = ..., fetch_s: _Optional[float] = ...) -> None: ...

class LegFailed(_message.Message):
    __slots__ = ("leg_id", "failure", "detail")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    failure: Failure
    detail: str
    def __init__(self, leg_id: _Optional[str] = ..., failure: _Optional[_Union[Failure, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("prefill_running", "decode_running", "kv_blocks_free", "kv_blocks_total", "leases_held", "leased_blocks", "staged_pages", "transfer_bytes_total", "transfer_failures_total", "leases_expired_total")
    PREFILL_RUNNING_FIELD_NUMBER: _ClassVar[int]
    DECODE_RUNNING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LEASES_HELD_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STAGED_PAGES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FAILURES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LEASES_EXPIRED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    prefill_running: int
    decode_running: int
    kv_blocks_free: int
    kv_blocks_total: int
    leases_held: int
    leased_blocks: int
    staged_pages: int
    transfer_bytes_total: int
    transfer_failures_total: int
    leases_expired_total: int
    def __init__(self, prefill_running: _Optional[int] = ..., decode_running: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., leases_held: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., staged_pages: _Optional[int] = ..., transfer_bytes_total: _Optional[int] = ..., transfer_failures_total: _Optional[int] = ..., leases_expired_total: _Optional[int] = ...) -> None: ...

class RoleChanged(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: Role
    def __init__(self, role: _Optional[_Union[Role, str]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PeerLane(_message.Message):
    __slots__ = ("peer", "transport", "gigabytes_per_s", "refusal")
    PEER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    GIGABYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    peer: str
    transport: str
    gigabytes_per_s: float
    refusal: str
    def __init__(self, peer: _Optional[str] = ..., transport: _Optional[str] = ..., gigabytes_per_s: _Optional[float] = ..., refusal: _Optional[str] = ...) -> None: ...
