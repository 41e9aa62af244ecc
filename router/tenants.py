"""The tenants' file: TOML to `TenantBook`, and the watch over files that may change while a router runs.

    [tenants.acme]
    weight = 4
    lanes = ["realtime", "standard"]
    tokens_per_minute = 600000
    budgets = [{ period = "day", tokens = 50000000 }]
    pool = { trust = "regulated" }

Keys are the fields of `router.core.tenant.Tenant`, `PricePlan` ([plans.NAME]) and `PoolCapacity` ([pools.NAME]);
[unknown] is a tenant, too. The book checks itself as a whole. docs/tenancy.md has all of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import logging
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from router.core.tenant import BookRefused, PoolCapacity, PricePlan, Problem, Tenant, TenantBook
from trust.files import Signature, signature

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Content = TypeVar("Content")

_FILE_BYTES_MAX = 64 * 1024 * 1024
#: Tables, not fields, at the top of the file.
_TABLES = ("tenants", "plans", "pools", "unknown")
_BOOK_FIELDS = ("dedicated", "lane_floors", "guarantee_share_max")
#: In the file a table, here pairs.
_LABELS = {(Tenant, "pool"), (PoolCapacity, "labels")}

_log = logging.getLogger(__name__)


def read_book(path: Path) -> TenantBook:
    """Raises BookRefused with everything found, OSError."""
    with path.open("rb") as file:
        content = file.read(_FILE_BYTES_MAX + 1)
    if len(content) > _FILE_BYTES_MAX:
        raise BookRefused((Problem("FILE_TOO_LARGE", str(path), f"is larger than {_FILE_BYTES_MAX} bytes"),))
    try:
        table = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BookRefused((Problem("NOT_TOML", str(path), str(error)),)) from None
    return book(table)


def book(table: Mapping[str, Any]) -> TenantBook:
    """Raises BookRefused."""
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(TenantBook)
    for name, raw in table.items():
        if name in _BOOK_FIELDS:
            _take(values, name, raw, hints[name], name, problems)
        elif name not in _TABLES:
            problems.append(_unknown(name, name, (*_TABLES, *_BOOK_FIELDS)))
        elif not isinstance(raw, dict):
            problems.append(Problem("NOT_A_TABLE", name, "must be a table"))
    tenants = _entries(Tenant, "id", "tenants", table, problems)
    plans = _entries(PricePlan, "name", "plans", table, problems)
    pools = _entries(PoolCapacity, "name", "pools", table, problems)
    if isinstance(raw := table.get("unknown"), dict):
        values["unknown"] = _entry(Tenant, {"id": "unknown", **raw}, "unknown", problems)
    if problems:
        # What the whole is like is said of what could be read, too: everything at once.
        problems += _problems_of_the_whole(values, tenants, plans, pools)
        raise BookRefused(tuple(problems))
    return TenantBook(tenants=tenants, plans=plans, pools=tuple(pools.values()), **values)


def _problems_of_the_whole(
    values: Mapping[str, Any],
    tenants: Mapping[str, Tenant],
    plans: Mapping[str, PricePlan],
    pools: Mapping[str, PoolCapacity],
) -> tuple[Problem, ...]:
    try:
        TenantBook(tenants=tenants, plans=plans, pools=tuple(pools.values()), **values)
    except BookRefused as refused:
        return refused.problems
    return ()


def _entries(
    cls: type[T], name_field: str, section: str, table: Mapping[str, Any], problems: list[Problem]
) -> dict[str, T]:
    entries = table.get(section, {})
    found: dict[str, T] = {}
    for name, raw in entries.items() if isinstance(entries, dict) else ():
        where = f"{section}.{name}"
        if not isinstance(raw, dict):
            problems.append(Problem("NOT_A_TABLE", where, "must be a table"))
        elif name_field in raw:
            problems.append(Problem("NAMED_TWICE", f"{where}.{name_field}", "the table's name is its name"))
        elif (entry := _entry(cls, {**raw, name_field: name}, where, problems)) is not None:
            found[name] = entry
    return found


def _entry(cls: type[T], raw: Mapping[str, Any], where: str, problems: list[Problem]) -> T | None:
    """None when there are problems with it."""
    before = len(problems)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in hints:
            problems.append(_unknown(name, f"{where}.{name}", hints))
        elif (cls, name) in _LABELS:
            _take(values, name, value, dict[str, str], f"{where}.{name}", problems)
            values[name] = frozenset(values.get(name, {}).items())
        else:
            _take(values, name, value, hints[name], f"{where}.{name}", problems)
    for field in dataclasses.fields(cls):
        is_needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_needed and field.name not in raw:
            problems.append(Problem("MISSING", f"{where}.{field.name}", "must be given"))
    return cls(**values) if len(problems) == before else None


def _take(values: dict[str, Any], name: str, raw: object, hint: object, where: str, problems: list[Problem]) -> None:
    try:
        values[name] = msgspec.convert(raw, hint)
    except msgspec.ValidationError as error:
        problems.append(Problem("WRONG_TYPE", where, str(error)))


def _unknown(name: str, where: str, known: Iterable[str]) -> Problem:
    close = difflib.get_close_matches(name, tuple(known), n=1)
    return Problem("UNKNOWN_KEY", where, "unknown key" + (f"; did you mean {close[0]}?" if close else ""))


class FileWatch(typing.Generic[Content]):
    """Reads a file again when it changes. What can't be read is refused with the reason in the log, once, and what
    was read before stays in force."""

    def __init__(
        self, path: Path, read: Callable[[Path], Content], on_change: Callable[[Content], None], *, poll_s: float = 1.0
    ) -> None:
        """`read` runs in a thread and raises OSError or ValueError for what it refuses; `on_change` is called on the
        loop."""
        self.path = path
        self._read = read
        self._on_change = on_change
        self._poll_s = poll_s
        #: Two looks at once could put the older content in force.
        self._one = asyncio.Lock()
        #: None: whatever is there is to be read at the next look.
        self._seen: Signature | None = signature(path)
        #: In force, once it was loaded.
        self.content: Content | None = None

    def load(self, before: Content | None = None) -> Content:
        """The first time, when there is nothing to stay in force: raises what `read` raises. Given what another process
        read `before`, that is in force until the file is looked at, and stays if it can't be read."""
        self._seen = None if before is not None else signature(self.path)
        self.content = self._read(self.path) if before is None else before
        return self.content

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._poll_s)
            await self.look()

    async def look(self) -> None:
        """Once, now. When it returns, what the file held when it was called is in force, or was refused."""
        async with self._one:
            found = await asyncio.to_thread(signature, self.path)
            if found == self._seen:
                return
            self._seen = found
            try:
                content = await asyncio.to_thread(self._read, self.path)
            except (OSError, ValueError) as error:
                _log.error("%s: refused, what was read before stays in force: %s", self.path, error)
                return
            _log.info("%s: read again", self.path)
            self.content = content
            self._on_change(content)
