"""Usage on disk: one line of JSON per request that ended, one file per UTC day, appended and never changed.

A line's `id` is the record's own and the same if it is written again after a crash, so whoever reads twice counts once.
`append` hands a line to the operating system before the request's reservation is settled (the core's effects come in
that order): after `kill -9` a reservation without a line was never billed, and one with a line is settled by it.
`sync` makes lines outlive the machine; a power cut loses at most what was appended since. A line cut short by a crash
can only be a file's last; it is dropped when the file is opened next, since nobody acted on it.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from router.core.usage import UsageFacts, Used
from router.metering.journal import JournalError

_NAME = "usage-%Y-%m-%d.jsonl"


class LedgerError(JournalError):
    """The folder is another router's, or holds a line that is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A request's use. Times are in seconds since 1970, money in millionths of the plan's currency."""

    id: str
    request_id: str
    tenant: str
    key_id: str
    model: str
    lane: str
    #: How it ended: finished, cancelled, expired, failed.
    outcome: str
    ended: float
    prompt_tokens: int
    #: Of these, found in a cache.
    cached_prompt_tokens: int
    completion_tokens: int
    money_micros: int
    price_plan: str
    price_plan_version: str
    #: In the units of fair shares.
    cost: float
    total_s: float
    #: The router died while it ran: an upper bound.
    estimated: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Ledger:
    """Blocking, like everything here. One router's alone."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise LedgerError(f"{folder}: another router has it open") from error
        self._name = ""
        self._file: int | None = None
        self._synced = True
        #: The day's file may change while another thread syncs it.
        self._swap = threading.Lock()

    def recorded(self, record_ids: Collection[str], since: float) -> dict[str, Used]:
        """Of these records, those that are here. None of them was written before `since`."""
        wanted = set(record_ids)
        if not wanted:
            return {}
        found = (line for line in read(self.folder, since=since) if line.id in wanted)
        return {line.id: Used(line.tokens, line.money_micros) for line in found}

    def append(self, usage: UsageFacts) -> None:
        data = memoryview(msgspec.json.encode(asdict(_line(usage))) + b"\n")
        file = self._open(datetime.fromtimestamp(usage.ended_wall_s, UTC).strftime(_NAME))
        self._synced = False
        while data:
            data = data[os.write(file, data) :]

    def sync(self) -> None:
        """May run in another thread than `append`."""
        with self._swap:
            if not self._synced and self._file is not None:
                self._synced = True
                os.fdatasync(self._file)

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            os.close(self._file)
        os.close(self._lock)

    def _open(self, name: str) -> int:
        """The day's file. Days change once a day, so syncing the last one here delays nobody."""
        if self._file is None or name != self._name:
            path = self.folder / name
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.ftruncate(file, _whole(path))
            self.sync()
            with self._swap:
                if self._file is not None:
                    os.close(self._file)
                self._name, self._file = name, file
        return self._file


def read(folder: Path, *, since: float = 0.0) -> Iterator[Line]:
    """Every record once that ended at or after `since`, in order. Raises LedgerError, OSError."""
    first = (datetime.fromtimestamp(since, UTC) - timedelta(days=1)).strftime(_NAME) if since > 86_400 else ""
    seen: set[str] = set()
    for path in sorted(folder.glob("usage-*.jsonl")):
        if path.name < first:
            continue
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if not text.endswith(b"\n"):
                    break  # being written, or cut short by a crash
                try:
                    line = msgspec.json.decode(text, type=Line)
                except msgspec.DecodeError as error:
                    raise LedgerError(f"{path}:{number}: {error}") from None
                if line.ended >= since and line.id not in seen:
                    seen.add(line.id)
                    yield line


def _whole(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = size
        while end:
            start = max(0, end - 65_536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0


def _line(usage: UsageFacts) -> Line:
    return Line(
        id=usage.record_id,
        request_id=usage.request_id,
        tenant=usage.tenant,
        key_id=usage.key_id,
        model=usage.model,
        lane=usage.lane.value,
        outcome=usage.outcome.value,
        ended=usage.ended_wall_s,
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        money_micros=usage.money_micros,
        price_plan=usage.price_plan,
        price_plan_version=usage.price_plan_version,
        cost=usage.cost,
        total_s=usage.total_s,
        estimated=usage.estimated,
    )


@dataclass(slots=True)
class Total:
    """What one tenant used under one price plan."""

    tenant: str
    price_plan: str
    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    money_micros: int = 0
    cost: float = 0.0
    #: Of the tokens, those that are upper bounds.
    estimated_tokens: int = 0


def totals(lines: Iterator[Line], tenant: str = "") -> list[Total]:
    """By tenant and price plan; of one tenant if it is named."""
    found: dict[tuple[str, str], Total] = {}
    for line in lines:
        if tenant and line.tenant != tenant:
            continue
        total = found.setdefault((line.tenant, line.price_plan), Total(line.tenant, line.price_plan))
        total.requests += 1
        total.prompt_tokens += line.prompt_tokens
        total.cached_prompt_tokens += line.cached_prompt_tokens
        total.completion_tokens += line.completion_tokens
        total.money_micros += line.money_micros
        total.cost += line.cost
        total.estimated_tokens += line.tokens if line.estimated else 0
    return [found[key] for key in sorted(found)]
