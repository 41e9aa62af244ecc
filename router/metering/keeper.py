"""What the core wants kept, kept: budgets' records and usage, appended before what follows from them is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from asyncio_throttle import Throttler

from router.core.budget import Budgets, Record
from router.core.usage import UsageFacts, Used
from router.metering.journal import Journal
from router.metering.ledger import Ledger

#: Between syncs at least. The first after a pause is at once, so a lone record is soon safe; under load each brings
#: what has gathered, and the disk is left to others in between. Nothing but this background task waits for it.
_SYNC_PAUSE_S = 0.02
#: A longer journal is rewritten to what is still open or spent.
_JOURNAL_BYTES_MAX = 64 << 20


class Keeper:
    """Belongs to one event loop. Either path may be empty: then that is not kept.

    A ledger needs a journal, of what is open: without one of its own it has it beside its lines.
    """

    def __init__(self, journal: str, ledger: str) -> None:
        """Blocking. Raises JournalError, LedgerError, OSError."""
        self._ledger = Ledger(Path(ledger)) if ledger else None
        if ledger and not journal:
            journal = str(Path(ledger) / "open.journal")
        self._journal = Journal(Path(journal)) if journal else None
        #: What a core before this one journaled; and of what that leaves open, what was recorded as used. None without
        #: a ledger.
        self.records = self._journal.records() if self._journal is not None else ()
        self.recorded = self._recorded()
        self._appended = asyncio.Event()

    def _recorded(self) -> dict[str, Used] | None:
        if self._ledger is None:
            return None
        held = list(Budgets(records=self.records).open)
        if not held:
            return {}
        return self._ledger.recorded([one.record_id for one in held], min(one.wall_s for one in held))

    def on_record(self, record: Record) -> None:
        if self._journal is not None:
            self._journal.append((record,))
            self._appended.set()

    def on_usage(self, usage: UsageFacts) -> None:
        if self._ledger is not None:
            self._ledger.append(usage)
            self._appended.set()

    async def run(self, rewritten: Callable[[], tuple[Record, ...]]) -> None:
        """Until cancelled. `rewritten`: what the journal may be replaced by."""
        pace = Throttler(rate_limit=1, period=_SYNC_PAUSE_S)
        while True:
            await self._appended.wait()
            async with pace:
                self._appended.clear()
                await asyncio.to_thread(self._sync)
            if self._journal is not None and self._journal.size > _JOURNAL_BYTES_MAX:
                self._journal.rewrite(rewritten())

    def _sync(self) -> None:
        # In the order in which they were appended: usage, then the settlement that follows from it.
        if self._ledger is not None:
            self._ledger.sync()
        if self._journal is not None:
            self._journal.sync()

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        if self._journal is not None:
            self._journal.close()
