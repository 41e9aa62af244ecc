"""A worker that is linked, and what it holds. Changed by `state.py` alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from router.core.worker import Load, PeerLane, Role, WorkerFacts


class Holdings:
    """Amounts by request, and their sum."""

    __slots__ = ("_held", "total")

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        #: == sum(self._held.values())
        self.total = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def get(self, key: str) -> int:
        return self._held.get(key, 0)

    def add(self, key: str, amount: int) -> None:
        assert key not in self._held
        self._held[key] = amount
        self.total += amount

    def drop(self, key: str) -> None:
        self.total -= self._held.pop(key)

    def check(self) -> None:
        assert self.total == sum(self._held.values())


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that is linked now."""

    facts: WorkerFacts
    role: Role
    heard_at: float
    worker_id: str = field(init=False)
    draining: bool = False
    #: Set while its loss is being handled: it is still in the books, and nothing can be sent to it.
    gone: bool = False
    load: Load = field(default_factory=Load)
    lanes: dict[str, PeerLane] = field(default_factory=dict)
    #: Open legs of either kind, and whose they are.
    legs: dict[str, str] = field(default_factory=dict)
    prefilling: Holdings = field(default_factory=Holdings)
    pinned: Holdings = field(default_factory=Holdings)
    slots: Holdings = field(default_factory=Holdings)
    #: Legs in a row that it refused or failed; it gets none before `rest_until`.
    strikes: int = 0
    rest_until: float = 0.0
    #: Until when, at the least, it still computes for requests that are gone: a step that runs is not interrupted.
    busy_until: float = 0.0
    #: When it was last chosen, counted in dispatches: of two workers as good, the one chosen longer ago serves.
    chosen: int = 0

    def __post_init__(self) -> None:
        self.worker_id = self.facts.worker_id

    @property
    def kv_room(self) -> int:
        """KV blocks that nobody has been promised."""
        return self.facts.capacity.kv_blocks - self.slots.total - self.pinned.total

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.facts.capacity.block_tokens)
