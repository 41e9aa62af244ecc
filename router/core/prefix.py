"""Which worker probably holds the KV of which prompt prefix.

Learned from what was dispatched. A guess: engines evict as they like, so nothing depends on it but the choice of a
worker and what a dispatch is first charged. Prompts are cut into chunks of `chunk_tokens`; a chunk's key depends on the
salt and on all tokens before it, so tenants that don't share a salt never meet here.

Bounded: `chunks_max` leading chunks of a prompt, `holders_max` workers per chunk (who got it last), and per worker as
many chunks as its KV memory has room for, oldest use first out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

#: Keys of a prompt's leading chunks, in order.
Prefix = tuple[int, ...]

_NOBODY: Mapping[str, None] = {}


class PrefixIndex:
    def __init__(self, *, chunk_tokens: int = 64, chunks_max: int = 128, holders_max: int = 8) -> None:
        self.chunk_tokens = chunk_tokens
        self._chunks_max = chunks_max
        self._holders_max = holders_max
        #: Workers that hold a chunk, latest last.
        self._holders: dict[int, OrderedDict[str, None]] = {}
        #: Chunks that a worker holds, latest use last.
        self._held: dict[str, OrderedDict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def prefix(self, salt: bytes, prompt: tuple[int, ...]) -> Prefix:
        """Whole chunks only. Python hashes tuples of ints the same in every process; two prompts that collide on
        purpose share a worker, not their KV."""
        size = self.chunk_tokens
        key, keys = hash((int.from_bytes(salt, "big"), len(salt))), []
        for start in range(0, min(len(prompt) // size, self._chunks_max) * size, size):
            key = hash((key, prompt[start : start + size]))
            keys.append(key)
        return tuple(keys)

    def holders(self, prefix: Prefix) -> dict[str, int]:
        """Workers that hold the beginning of it, with how many tokens of it, at most `holders_max` of them."""
        first = self._holders.get(prefix[0], _NOBODY) if prefix else _NOBODY
        found, alive = dict.fromkeys(first, len(prefix) * self.chunk_tokens), set(first)
        for count, key in enumerate(prefix):
            here = self._holders.get(key, _NOBODY).keys()
            if not alive <= here:  # most hold all of it, and this is asked for every chunk
                found.update(dict.fromkeys(alive - here, count * self.chunk_tokens))
                alive &= here
                if not alive:
                    break
        return found

    def learn(self, prefix: Prefix, worker_id: str, kv_tokens: int) -> None:
        """The worker computes or fetches this prompt; it has memory for `kv_tokens`."""
        if not prefix:
            return
        held = self._held.setdefault(worker_id, OrderedDict())
        for key in prefix:
            held[key] = None
            held.move_to_end(key)
            holders = self._holders.setdefault(key, OrderedDict())
            holders[worker_id] = None
            holders.move_to_end(worker_id)
            if len(holders) > self._holders_max:
                other, _ = holders.popitem(last=False)
                del self._held[other][key]
        while len(held) > kv_tokens // self.chunk_tokens:
            key, _ = held.popitem(last=False)
            self._drop(key, worker_id)

    def forget(self, worker_id: str) -> None:
        for key in self._held.pop(worker_id, ()):
            self._drop(key, worker_id)

    def check_integrity(self) -> None:
        assert {(key, worker) for worker, keys in self._held.items() for key in keys} == set(self._pairs())
        assert all(0 < len(holders) <= self._holders_max for holders in self._holders.values())

    def _drop(self, key: int, worker_id: str) -> None:
        holders = self._holders[key]
        del holders[worker_id]
        if not holders:
            del self._holders[key]

    def _pairs(self) -> Iterator[tuple[int, str]]:
        return ((key, worker) for key, holders in self._holders.items() for worker in holders)
