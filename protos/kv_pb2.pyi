from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvHandle(_message.Message):
    __slots__ = ("transfer_id", "tenant", "model", "reader", "owner", "owner_incarnation", "owner_address", "row", "word", "tokens", "block_ids", "layout_digest", "deadline_ms", "mac")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    OWNER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OWNER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    tenant: str
    model: str
    reader: str
    owner: str
    owner_incarnation: str
    owner_address: str
    row: int
    word: int
    tokens: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    layout_digest: str
    deadline_ms: int
    mac: bytes
    def __init__(self, transfer_id: _Optional[str] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., reader: _Optional[str] = ..., owner: _Optional[str] = ..., owner_incarnation: _Optional[str] = ..., owner_address: _Optional[str] = ..., row: _Optional[int] = ..., word: _Optional[int] = ..., tokens: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., layout_digest: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., mac: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("caller", "nonce", "mac")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    caller: str
    nonce: bytes
    mac: bytes
    def __init__(self, caller: _Optional[str] = ..., nonce: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class PeerDescription(_message.Message):
    __slots__ = ("name", "incarnation", "layout", "transports", "arena_offset", "segment_stride", "block_stride", "blocks", "board_rows", "board_row_bytes", "model", "board_digests_offset", "mac")
    class LayoutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class TransportsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    ARENA_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_STRIDE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_STRIDE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BOARD_ROWS_FIELD_NUMBER: _ClassVar[int]
    BOARD_ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BOARD_DIGESTS_OFFSET_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    layout: _containers.ScalarMap[str, str]
    transports: _containers.ScalarMap[str, bytes]
    arena_offset: int
    segment_stride: int
    block_stride: int
    blocks: int
    board_rows: int
    board_row_bytes: int
    model: str
    board_digests_offset: int
    mac: bytes
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout: _Optional[_Mapping[str, str]] = ..., transports: _Optional[_Mapping[str, bytes]] = ..., arena_offset: _Optional[int] = ..., segment_stride: _Optional[int] = ..., block_stride: _Optional[int] = ..., blocks: _Optional[int] = ..., board_rows: _Optional[int] = ..., board_row_bytes: _Optional[int] = ..., model: _Optional[str] = ..., board_digests_offset: _Optional[int] = ..., mac: _Optional[bytes] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: KvHandle
    def __init__(self, handle: _Optional[_Union[KvHandle, _Mapping]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: bool
    def __init__(self, held: _Optional[bool] = ...) -> None: ...

class ExtendRequest(_message.Message):
    __slots__ = ("handle", "ttl_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    handle: KvHandle
    ttl_s: float
    def __init__(self, handle: _Optional[_Union[KvHandle, _Mapping]] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class ExtendResponse(_message.Message):
    __slots__ = ("held", "deadline_ms")
    HELD_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    held: bool
    deadline_ms: int
    def __init__(self, held: _Optional[bool] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("handle", "timeout_s", "ahead")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    handle: bytes
    timeout_s: float
    ahead: bool
    def __init__(self, handle: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., ahead: _Optional[bool] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("outcome", "detail", "staged_id", "tokens", "transport", "bytes", "fetch_s")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[FetchResponse.Outcome]
        STAGED: _ClassVar[FetchResponse.Outcome]
        STALE: _ClassVar[FetchResponse.Outcome]
        FAILED: _ClassVar[FetchResponse.Outcome]
        REFUSED: _ClassVar[FetchResponse.Outcome]
        FULL: _ClassVar[FetchResponse.Outcome]
        CORRUPT: _ClassVar[FetchResponse.Outcome]
    OUTCOME_UNSPECIFIED: FetchResponse.Outcome
    STAGED: FetchResponse.Outcome
    STALE: FetchResponse.Outcome
    FAILED: FetchResponse.Outcome
    REFUSED: FetchResponse.Outcome
    FULL: FetchResponse.Outcome
    CORRUPT: FetchResponse.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    STAGED_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    outcome: FetchResponse.Outcome
    detail: str
    staged_id: str
    tokens: int
    transport: str
    bytes: int
    fetch_s: float
    def __init__(self, outcome: _Optional[_Union[FetchResponse.Outcome, str]] = ..., detail: _Optional[str] = ..., staged_id: _Optional[str] = ..., tokens: _Optional[int] = ..., transport: _Optional[str] = ..., bytes: _Optional[int] = ..., fetch_s: _Optional[float] = ...) -> None: ...

class DiscardRequest(_message.Message):
    __slots__ = ("staged_id",)
    STAGED_ID_FIELD_NUMBER: _ClassVar[int]
    staged_id: str
    def __init__(self, staged_id: _Optional[str] = ...) -> None: ...

class DiscardResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("peer", "address")
    PEER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    peer: str
    address: str
    def __init__(self, peer: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("transport", "gigabytes_per_s", "refusal")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    GIGABYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    transport: str
    gigabytes_per_s: float
    refusal: str
    def __init__(self, transport: _Optional[str] = ..., gigabytes_per_s: _Optional[float] = ..., refusal: _Optional[str] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("kv_blocks_free", "kv_blocks_total", "leases_held", "leased_blocks", "staged_pages", "transfer_bytes_total", "transfer_failures_total", "leases_expired_total", "transfers_corrupt_total")
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LEASES_HELD_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STAGED_PAGES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FAILURES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LEASES_EXPIRED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_CORRUPT_TOTAL_FIELD_NUMBER: _ClassVar[int]
    kv_blocks_free: int
    kv_blocks_total: int
    leases_held: int
    leased_blocks: int
    staged_pages: int
    transfer_bytes_total: int
    transfer_failures_total: int
    leases_expired_total: int
    transfers_corrupt_total: int
    def __init__(self, kv_blocks_free: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., leases_held: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., staged_pages: _Optional[int] = ..., transfer_bytes_total: _Optional[int] = ..., transfer_failures_total: _Optional[int] = ..., leases_expired_total: _Optional[int] = ..., transfers_corrupt_total: _Optional[int] = ...) -> None: ...
