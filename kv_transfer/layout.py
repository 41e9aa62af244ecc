"""What lies in KV memory and where: the facts two workers must agree on before they exchange a byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Fingerprint of a worker's KV memory. Two workers exchange blocks only when every field is equal.

    A *block* is the KV of `block_tokens` tokens in all layers. It lies in `segments_per_block` contiguous *segments*
    of `segment_bytes` each: one segment when blocks are outermost, one per layer when layers are.
    """

    engine: str
    model: str
    revision: str
    dtype: str
    block_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    tensor_parallel: int
    #: Order of the dimensions, in vLLM's letters (Layer, Block, Head, tokeN, Content), or "chain" for the sim engine.
    order: str
    #: How the CPU attention kernel packs a page ("amx", "vec", ...); empty elsewhere.
    isa: str
    segment_bytes: int
    segments_per_block: int

    @property
    def block_bytes(self) -> int:
        return self.segment_bytes * self.segments_per_block

    def as_dict(self) -> dict[str, str]:
        return {f.name: str(getattr(self, f.name)) for f in fields(self)}

    @property
    def digest(self) -> str:
        text = "\n".join(f"{name}={value}" for name, value in sorted(self.as_dict().items()))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def layout_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Names every field two fingerprints differ in; empty when they may exchange blocks."""
    names = sorted(set(ours) | set(theirs))
    return "; ".join(
        f"{name}: {ours.get(name, 'absent')} here, {theirs.get(name, 'absent')} there"
        for name in names
        if ours.get(name) != theirs.get(name)
    )
