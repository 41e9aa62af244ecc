"""The workers of a pool, ranked by what placement asks for, so that a choice does not look at all of them.

Workers are grouped by those of their labels that some tenant's selector, or a dedication, is about. Selectors are few
(`SELECTORS_MAX`), so groups are few, and a choice looks at the top of each group that is open to the tenant.

A `Ranking` is a sorted list: finding a place in it costs O(log n) comparisons. The move of what lies behind is one
memmove of 8 bytes each, 8 KB for a thousand workers, which is less than a comparison.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from router.core.linked import Worker
from router.core.tenant import Selector, selects
from router.core.worker import Role

Labels = frozenset[tuple[str, str]]
Key = tuple[int, ...]


class Ranking:
    """Workers by key, smallest first."""

    __slots__ = ("_entries", "_keys")

    def __init__(self) -> None:
        self._entries: list[tuple[Key, str, Worker]] = []
        self._keys: dict[str, Key] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, worker_id: object) -> bool:
        return worker_id in self._keys

    def __iter__(self) -> Iterator[Worker]:
        return (worker for _, _, worker in self._entries)

    def first(self) -> Worker | None:
        return self._entries[0][2] if self._entries else None

    def set(self, worker: Worker, key: Key | None) -> None:
        """None takes it out."""
        worker_id = worker.worker_id
        old = self._keys.get(worker_id)
        if old == key:
            return
        if old is not None:
            del self._entries[bisect_left(self._entries, (old, worker_id))]
        if key is None:
            del self._keys[worker_id]
        else:
            self._keys[worker_id] = key
            insort(self._entries, (key, worker_id, worker))


@dataclass(slots=True, eq=False)
class Group:
    labels: Labels
    #: Can be given a prefill leg now: by prompt tokens before it, then who was chosen longest ago. And by KV room.
    prefill: Ranking = field(default_factory=Ranking)
    prefill_room: Ranking = field(default_factory=Ranking)
    #: Can be given a decode leg now: by KV room.
    decode: Ranking = field(default_factory=Ranking)
    #: Serve whole requests: by requests there.
    whole: Ranking = field(default_factory=Ranking)
    whole_room: Ranking = field(default_factory=Ranking)
    #: Will be able, if only later: by all their KV memory, largest first.
    prefillers: Ranking = field(default_factory=Ranking)
    decoders: Ranking = field(default_factory=Ranking)

    def rankings(self) -> tuple[Ranking, ...]:
        return (
            self.prefill,
            self.prefill_room,
            self.decode,
            self.whole,
            self.whole_room,
            self.prefillers,
            self.decoders,
        )

    def set(self, worker: Worker, *, resting: bool) -> None:
        here = not (worker.draining or worker.gone)
        able, role, room = here and not resting, worker.role, worker.kv_room
        capacity = worker.facts.capacity
        computes = able and len(worker.prefilling) < capacity.prefill_legs
        decodes = able and len(worker.slots) < capacity.decode_legs
        chosen = worker.chosen
        self.prefill.set(worker, (worker.prefilling.total, chosen) if computes and role is Role.PREFILL else None)
        self.prefill_room.set(worker, (-room,) if computes and role is Role.PREFILL else None)
        self.decode.set(worker, (-room, chosen) if decodes and role is Role.DECODE else None)
        whole = computes and decodes and role is Role.BOTH
        self.whole.set(worker, (len(worker.slots), -room, chosen) if whole else None)
        self.whole_room.set(worker, (-room,) if whole else None)
        size = (-capacity.kv_blocks,)
        self.prefillers.set(worker, size if here and role is Role.PREFILL else None)
        self.decoders.set(worker, size if here and role is not Role.PREFILL else None)


class Roster:
    def __init__(self) -> None:
        self._relevant: frozenset[str] = frozenset()
        self._dedicated: frozenset[str] = frozenset()
        self._groups: dict[Labels, Group] = {}
        self._group_of: dict[str, Group] = {}
        #: Workers that changed since they were ranked.
        self._changed: dict[str, Worker] = {}
        self._open_to: dict[tuple[Selector, frozenset[Selector]], tuple[Group, ...]] = {}
        #: Changes so far.
        self.version = 0

    def touch(self, worker: Worker) -> None:
        """Something about it changed. Ranked again before the next choice, once for any number of changes."""
        self._changed[worker.worker_id] = worker
        self.version += 1

    def forget(self, worker: Worker) -> None:
        self.version += 1
        self._changed.pop(worker.worker_id, None)
        group = self._group_of.pop(worker.worker_id, None)
        if group is not None:
            for ranking in group.rankings():
                ranking.set(worker, None)

    def configure(self, selectors: Iterable[Selector], dedicated: frozenset[str], workers: Iterable[Worker]) -> None:
        """Group by the labels that matter from now on."""
        self._relevant = frozenset(name for selector in selectors for name, _ in selector) | dedicated
        self._dedicated = dedicated
        self._groups, self._group_of, self._open_to = {}, {}, {}
        self.version += 1
        for worker in workers:
            self.touch(worker)

    def groups(self, now: float, selector: Selector, closed: frozenset[Selector] = frozenset()) -> tuple[Group, ...]:
        """Groups open to a selector and to none of the `closed` ones, up to date."""
        if self._changed:
            self._rank(now)
        found = self._open_to.get((selector, closed))
        if found is None:
            found = tuple(
                group
                for labels, group in self._groups.items()
                if selects(selector, labels, self._dedicated)
                and not any(selects(other, labels, self._dedicated) for other in closed)
            )
            if len(self._open_to) > 256:
                self._open_to.clear()
            self._open_to[selector, closed] = found
        return found

    def has_path(self, now: float, selector: Selector) -> bool:
        """True when some worker open to the selector can decode: then its requests are served, be it slowly."""
        return any(group.decoders for group in self.groups(now, selector))

    def is_open_to(self, worker: Worker, selector: Selector, closed: frozenset[Selector] = frozenset()) -> bool:
        labels = self._labels(worker)
        return selects(selector, labels, self._dedicated) and not any(
            selects(other, labels, self._dedicated) for other in closed
        )

    def check_integrity(self, now: float, workers: Iterable[Worker]) -> None:
        self.groups(now, frozenset())
        ids = {worker.worker_id for worker in workers}
        assert self._group_of.keys() == ids
        for group in self._groups.values():
            for ranking in group.rankings():
                keys = [entry[:2] for entry in ranking._entries]
                assert keys == sorted(keys)
                assert {worker.worker_id for worker in ranking} == ranking._keys.keys() <= ids

    def _rank(self, now: float) -> None:
        changed, self._changed = self._changed, {}
        for worker in changed.values():
            group = self._group_of.get(worker.worker_id)
            if group is None:
                labels = self._labels(worker)
                group = self._groups.get(labels)
                if group is None:
                    group = self._groups[labels] = Group(labels)
                    self._open_to.clear()
                self._group_of[worker.worker_id] = group
            group.set(worker, resting=worker.rest_until > now)

    def _labels(self, worker: Worker) -> Labels:
        return frozenset(item for item in worker.facts.labels.items() if item[0] in self._relevant)
