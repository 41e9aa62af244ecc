"""The right to read one request's KV blocks, once, while its lease word stands: a signed value.

A handle is made by the owner and travels through routers, which can neither read memory with it nor change it. The MAC
is HMAC-SHA256 with the cluster's secret over everything else in it, so a handle proves that a worker of this cluster
made it; `reader` says for whom. Possession of a valid handle is also what ends or extends its lease at the owner.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

MAC_BYTES = 32


class HandleRefused(Exception):
    """Says why; the text is safe to show to whoever presented the handle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """Fields are those of `KvHandle` in protos/kv.proto."""

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
    #: Empty when the blocks were still being computed: the reader finds the ids on the board, as they become whole.
    block_ids: tuple[int, ...]
    layout_digest: str
    #: 0 when the lease's time has not begun.
    deadline_ms: int

    @property
    def staged_id(self) -> str:
        """What a fetch of this handle is known by, before, while and after it runs. Two handles never share it."""
        return f"{self.transfer_id}#{self.word:016x}"


def sign(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """MAC of `parts` for one purpose; parts can't run into one another."""
    mac = hmac.new(secret, purpose.encode(), hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "little"))
        mac.update(part)
    return mac.digest()


def verify(mac: bytes, secret: bytes, purpose: str, *parts: bytes) -> bool:
    """In time that does not depend on where they differ."""
    return hmac.compare_digest(mac, sign(secret, purpose, *parts))


def check_reader(handle: Handle, *, reader: str, model: str, layout_digest: str, block_tokens: int) -> None:
    """Raises HandleRefused unless this node may, and can, fetch the handle's blocks."""
    if handle.reader and handle.reader != reader:
        raise HandleRefused(f"the handle was made for {handle.reader!r}, this is {reader!r}")
    if handle.model != model:
        raise HandleRefused(f"the handle is for model {handle.model!r}, this node holds {model!r}")
    if handle.layout_digest != layout_digest:
        raise HandleRefused(f"layout {handle.layout_digest} there, {layout_digest} here")
    if not handle.word:
        raise HandleRefused("the handle names no lease word: every empty row would confirm it")
    blocks = -(-handle.tokens // block_tokens)
    if not blocks or (handle.block_ids and len(handle.block_ids) != blocks):
        raise HandleRefused(f"{handle.tokens} tokens are {blocks} blocks, the handle names {len(handle.block_ids)}")


def check_owner(handle: Handle, *, owner: str, incarnation: str) -> None:
    """Raises HandleRefused unless this node made the handle in this life."""
    if handle.owner != owner:
        raise HandleRefused(f"the handle is of {handle.owner!r}, this is {owner!r}")
    if handle.owner_incarnation != incarnation:
        raise HandleRefused(f"the handle is of incarnation {handle.owner_incarnation}, this is {incarnation}")
