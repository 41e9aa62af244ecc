"""What was appended is there after the process was killed; what is damaged is not believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from router.core.budget import Budgets, Record, Terms
from router.metering.journal import Journal, JournalError

ROOT = Path(__file__).parents[3]

WRITER = """
import sys
from pathlib import Path
from router.core.budget import Budgets
from router.metering.journal import Journal

journal, budgets = Journal(Path(sys.argv[1])), Budgets()
for number in range(10**9):
    journal.append([budgets.reserve(0.0, "t", f"r{number}", tokens=7, money_micros=0)])
    print(number, flush=True)  # only now may anybody act on it
"""


def some_records() -> list[Record]:
    budgets = Budgets(wall_offset_s=1.7e9)
    terms = Terms(60, "m", "batch", "k", "list", "2")
    records = [budgets.reserve(float(n), "é t", f"r{n}", tokens=100, money_micros=9, terms=terms) for n in range(5)]
    records.append(budgets.grant(1, tokens=50, money_micros=3))
    records.append(budgets.settle(1, tokens=40, money_micros=2))
    return records


def reopened(path: Path) -> list[Record]:
    journal = Journal(path)
    journal.close()
    return list(journal.records())


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    journal, records = Journal(tmp_path / "deep" / "journal"), some_records()
    journal.append(records[:3])
    journal.append(records[3:])
    journal.close()
    assert reopened(journal.path) == records


def test_after_kill_9_every_record_that_was_acted_on_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 200:
                writer.send_signal(signal.SIGKILL)
                break
        acted_on = max([200, *map(int, writer.stdout.read().split("\n")[:-1])])
    records = reopened(path)
    assert len(records) >= acted_on + 1
    assert Budgets(records=records).rewritten()[0].tokens == 0
    assert sum(held.tokens for held in Budgets(records=records).open) == 7 * len(records)


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_last_line_cut_short_is_dropped(tmp_path: Path, lost: int) -> None:
    journal, records = Journal(tmp_path / "journal"), some_records()
    journal.append(records)
    journal.close()
    os.truncate(journal.path, journal.size - lost)
    assert reopened(journal.path) == records[:-1]
    journal = Journal(journal.path)
    journal.append(records[-1:])
    journal.close()
    assert reopened(journal.path) == records


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(some_records())
    journal.close()
    data = bytearray(journal.path.read_bytes())
    data[100] ^= 1
    journal.path.write_bytes(data)
    with pytest.raises(JournalError, match="damaged"):
        Journal(journal.path)


def test_two_routers_cannot_own_one_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(JournalError, match="another router"):
        Journal(tmp_path / "journal")
    journal.close()
    reopened(journal.path)


def test_rewriting_replaces_everything(tmp_path: Path) -> None:
    journal, records = Journal(tmp_path / "journal"), some_records()
    journal.append(records)
    size = journal.size
    budgets = Budgets(records=records)
    journal.rewrite(rewritten := budgets.rewritten())
    journal.append([later := budgets.settle(2, tokens=1, money_micros=1)])
    assert journal.size < size + 600
    journal.close()
    assert reopened(journal.path) == [*rewritten, later]
    assert list(Budgets(records=[*rewritten, later]).open)[0].number == 3
