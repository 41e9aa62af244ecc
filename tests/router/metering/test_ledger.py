"""Usage on disk: each ended request once, whatever happens to the router in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.core.lifecycle import State
from router.core.request import Lane
from router.core.usage import UsageFacts, Used
from router.metering.ledger import Ledger, LedgerError, read, totals

DAY = 86_400.0
NOON = 1_800_000_000.0 // DAY * DAY + DAY / 2


def usage(record_id: str, *, tenant: str = "a", ended: float = NOON, tokens: int = 10, micros: int = 7) -> UsageFacts:
    return UsageFacts(
        record_id=record_id,
        request_id=record_id,
        tenant=tenant,
        key_id="k",
        model="m",
        lane=Lane.BATCH,
        outcome=State.FINISHED,
        ended_wall_s=ended,
        prompt_tokens=tokens,
        cached_prompt_tokens=4,
        completion_tokens=5,
        money_micros=micros,
        price_plan="list",
    )


def write(folder: Path, *records: UsageFacts) -> None:
    ledger = Ledger(folder)
    for record in records:
        ledger.append(record)
    ledger.close()


def test_lines_are_days_files_and_sum_by_tenant(tmp_path: Path) -> None:
    write(tmp_path, usage("1"), usage("2", tenant="b"), usage("3", ended=NOON + DAY))
    assert len(list(tmp_path.glob("usage-*.jsonl"))) == 2
    assert [line.id for line in read(tmp_path)] == ["1", "2", "3"]
    assert [line.id for line in read(tmp_path, since=NOON + 1)] == ["3"]
    (total,) = totals(read(tmp_path), "a")
    assert (total.requests, total.prompt_tokens, total.completion_tokens, total.money_micros) == (2, 20, 10, 14)


def test_a_record_that_is_written_again_counts_once(tmp_path: Path) -> None:
    write(tmp_path, usage("1"))
    write(tmp_path, usage("1"), usage("2"))
    assert [line.id for line in read(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("lost", [1, 5, 100])
def test_a_last_line_cut_short_is_dropped_and_written_over(tmp_path: Path, lost: int) -> None:
    write(tmp_path, usage("1"), usage("2"))
    (file,) = tmp_path.glob("usage-*.jsonl")
    with file.open("rb+") as cut:
        cut.truncate(file.stat().st_size - lost)
    assert [line.id for line in read(tmp_path)] == ["1"]
    write(tmp_path, usage("3"))
    assert [line.id for line in read(tmp_path)] == ["1", "3"]


def test_what_was_recorded_of_reservations_is_found(tmp_path: Path) -> None:
    write(tmp_path, usage("1"), usage("2", ended=NOON + DAY))
    ledger = Ledger(tmp_path)
    assert ledger.recorded(["2", "none"], NOON) == {"2": Used(15, 7)}
    ledger.close()


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    write(tmp_path, usage("1"))
    (file,) = tmp_path.glob("usage-*.jsonl")
    with file.open("a") as more:
        more.write("{}\n")
    with pytest.raises(LedgerError, match=rf"{file.name}:2"):
        list(read(tmp_path))


def test_two_routers_cannot_own_one_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(LedgerError, match="another router"):
        Ledger(tmp_path)
    ledger.close()
