"""The budgets' records on disk: what was written before the process died is there when it starts again.

`append` hands records to the operating system before it returns, so they outlive the process, `kill -9` included;
`sync` makes them outlive the machine. Callers append before they act and sync every so often: a power cut loses at
most what was admitted since the last sync, a crash of the router loses nothing.

One line per record: the CRC-32 of the rest in hexadecimal, a space, the record as JSON. A line that was cut short by a
crash can only be the last; it is dropped, since nobody acted on it. Any other damage is an error, because going on
would spend money twice. The file is locked: two routers can't own one journal.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from router.core.budget import Record, Step, Terms
from router.core.tenant import Period


class JournalError(Exception):
    """The journal can't be trusted, or another router has it."""


class Journal:
    def __init__(self, path: Path) -> None:
        """Opens or creates it. Blocking, like everything here; records come from `records`."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path.with_suffix(path.suffix + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise JournalError(f"{path}: another router has it open") from error
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0
        self._synced = True
        try:
            self._records, whole = _parse(path.read_bytes(), path)
            os.ftruncate(self._file, whole)
            self.size, self._synced = whole, False
            self.sync()
            _sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def records(self) -> tuple[Record, ...]:
        """What the file held when it was opened. Can be asked once, so that they don't stay in memory."""
        records, self._records = self._records, []
        return tuple(records)

    def append(self, records: Iterable[Record]) -> None:
        data = b"".join(map(_line, records))
        self._synced = False
        self.size += _write(self._file, data)

    def sync(self) -> None:
        """May take milliseconds; may run in another thread than `append`."""
        if not self._synced:
            self._synced = True
            os.fdatasync(self._file)

    def rewrite(self, records: Iterable[Record]) -> None:
        """Replaces everything by these, all or nothing."""
        beside = self.path.with_suffix(self.path.suffix + ".new")
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size = _write(file, b"".join(map(_line, records)))
        os.fsync(file)
        os.replace(beside, self.path)
        _sync_folder(self.path.parent)
        os.close(self._file)
        self._file, self.size, self._synced = file, size, True

    def close(self) -> None:
        self.sync()
        os.close(self._file)
        os.close(self._lock)


def _write(file: int, data: bytes) -> int:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    return len(data)


def _line(record: Record) -> bytes:
    facts = [
        record.number,
        record.step.value,
        record.tenant,
        record.wall_s,
        record.tokens,
        record.money_micros,
        record.reservation,
        record.request_id,
        record.period.value if record.period is not None else None,
        *(record.terms or ()),
    ]
    text = msgspec.json.encode(facts)
    return b"%08x %s\n" % (crc32(text), text)


def _parse(data: bytes, path: Path) -> tuple[list[Record], int]:
    """The records, and how many bytes they take."""
    records: list[Record] = []
    whole = 0
    while whole < len(data):
        end = data.find(b"\n", whole)
        if end < 0:
            break  # cut short by a crash
        line = data[whole:end]
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % crc32(text):
            if end + 1 == len(data):
                break
            raise JournalError(f"{path}: damaged at byte {whole}, after record {len(records)}")
        records.append(_record(msgspec.json.decode(text)))
        whole = end + 1
    return records, whole


def _record(facts: list[Any]) -> Record:
    number, step, tenant, wall_s, tokens, money, reservation, request_id, period, *terms = facts
    return Record(
        number=int(number),
        step=Step(step),
        tenant=tenant,
        wall_s=float(wall_s),
        tokens=int(tokens),
        money_micros=int(money),
        reservation=int(reservation),
        request_id=request_id,
        period=None if period is None else Period(period),
        terms=Terms(*terms) if terms else None,
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
