"""What is settled is what was used, to the token and the millionth, whatever happens to the router."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from router.core.budget import Budgets
from router.core.tenant import Period
from router.metering import ledger
from router.metering.journal import Journal
from router.tenants import read_book
from tandem import Client, TandemError
from tandem.values import Result
from tests.cluster.harness import cluster

CONFIG = """
[router]
tenants_file = "tenants.toml"
budget_journal = "kept/budgets.journal"
usage_ledger = "kept/usage"
[engine]
speedup = 1.0
"""
TENANTS = """
[tenants.default]
price_plan = "list"
budgets = [{ period = "total", tokens = 100_000_000, money_micros = 1_000_000_000 }]
[plans.list]
prompt_micros = 500_000
cached_prompt_micros = 50_000
completion_micros = 1_500_000
"""


def test_settled_is_the_sum_of_usage_after_kill_9_too(tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text(CONFIG)
    (tmp_path / "tenants.toml").write_text(TENANTS)
    with cluster(tmp_path, "sim", "--decode", "2") as up, ThreadPoolExecutor(16) as threads:
        up.wait_ready()

        def ask(number: int, tokens: int) -> Result | None:
            with Client(up.address, retries=0) as client:
                try:
                    prompt = range(5, 105 + number)
                    return client.generate(
                        prompt, max_tokens=tokens, request_id=f"r{number}", timeout_s=60.0, ignore_eos=True
                    ).result()
                except TandemError:
                    return None

        done = list(threads.map(ask, range(20), [20] * 20))
        assert all(done)
        open_ones = [threads.submit(ask, 100 + number, 3000) for number in range(8)]
        up.wait_until(lambda: up.status().requests_running == 8)
        os.kill(up.pid("router"), signal.SIGKILL)
        assert not any(future.result() for future in open_ones), "they were to be open when the router died"
        up.wait_until(lambda: up.times_ready("router") == 2)
        up.wait_until(lambda: ask(200, 5) is not None)
        done += list(threads.map(ask, range(201, 221), [20] * 20))
        assert up.stop() == 0

    lines = list(ledger.read(tmp_path / "kept" / "usage"))
    by_request = {line.request_id: line for line in lines}
    for result in filter(None, done):
        line, used = by_request[result.request_id], result.finished.usage
        assert (line.prompt_tokens, line.completion_tokens) == (used.prompt_tokens, used.completion_tokens)
    lost = [line for line in lines if line.estimated]
    assert {line.request_id for line in lost} == {f"r{100 + number}" for number in range(8)}

    journal = Journal(tmp_path / "kept" / "budgets.journal")
    budgets = Budgets(records=journal.records())
    assert not list(budgets.open)
    tenant = read_book(tmp_path / "tenants.toml").tenants["default"]
    (balance,) = budgets.balances(0.0, tenant)
    assert balance.budget.period is Period.TOTAL
    assert balance.tokens == sum(line.tokens for line in lines)
    assert balance.money_micros == sum(line.money_micros for line in lines)

    folder = str(tmp_path / "kept" / "usage")
    totals = json.loads(up.tandem("usage", "--file", folder, "--json").stdout)
    assert sum(total["requests"] for total in totals) == len(lines)
    assert sum(total["money_micros"] for total in totals) == balance.money_micros
    assert sum(total["estimated_tokens"] for total in totals) == sum(line.tokens for line in lost)
    assert json.loads(up.tandem("usage", "--file", folder, "--tenant", "other", "--json").stdout) == []
    assert json.loads(up.tandem("usage", "--file", folder, "--since", "2990-01-01", "--json").stdout) == []


def test_what_was_open_when_a_router_was_killed_is_billed_once_without_budgets_too(tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text(CONFIG.replace('budget_journal = "kept/budgets.journal"\n', ""))
    (tmp_path / "tenants.toml").write_text("[tenants.default]\n")
    given: dict[str, int] = {}
    with cluster(tmp_path, "sim") as up, ThreadPoolExecutor(4) as threads:
        up.wait_ready()

        def stream(name: str) -> None:
            options = {"max_tokens": 2000, "request_id": name, "ignore_eos": True, "return_token_ids": True}
            with Client(up.address, retries=0) as client, suppress(TandemError):
                for delta in client.generate(range(5, 55), **options):  # type: ignore[arg-type]
                    given[name] = given.get(name, 0) + len(delta.token_ids)

        def stream_and_kill(names: set[str], ready: int) -> None:
            streams = [threads.submit(stream, name) for name in names]
            up.wait_until(lambda: names <= given.keys())
            os.kill(up.pid("router"), signal.SIGKILL)
            for one in streams:
                one.result()
            up.wait_until(lambda: up.times_ready("router") == ready)
            up.wait_until(lambda: len(up.status().workers) == 2)

        stream_and_kill({"a", "b", "c"}, 2)
        stream_and_kill({"d", "e", "f"}, 3)
        assert up.stop() == 0

    lines = list(ledger.read(tmp_path / "kept" / "usage"))
    assert sorted(line.request_id for line in lines) == sorted(given), "each once"
    for line in lines:
        assert (line.model, line.outcome, line.estimated, line.prompt_tokens) == ("tandem-nano", "failed", True, 50)
        assert given[line.request_id] <= line.completion_tokens <= 2000
