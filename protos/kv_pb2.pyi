from google.protobuf.internal import containers as _containers
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
