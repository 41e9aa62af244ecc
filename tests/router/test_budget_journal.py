"""What was spent of a budget stays spent when the router starts again."""

from pathlib import Path

import grpc
import pytest

from router.front import PortTaken
from router.metering.journal import JournalError
from tests.router.running import Router, running

TENANTS = """
[tenants.default]
budgets = [{ period = "total", tokens = 10 }]
"""


async def spend(router: Router, prompt: list[int]) -> None:
    async for _ in router.generate(token_ids={"ids": prompt}, sampling={"max_tokens": 2}):
        pass


async def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    (tmp_path / "tenants.toml").write_text(TENANTS)
    tenants, journal = str(tmp_path / "tenants.toml"), str(tmp_path / "budgets.journal")
    async with running(tenants_file=tenants, budget_journal=journal) as router:
        await router.worker("w", answer=(5, 6))
        await spend(router, [1, 2, 3, 4])  # 6 of 10
    async with running(tenants_file=tenants, budget_journal=journal) as router:
        await router.worker("w", answer=(5, 6))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await spend(router, [1, 2, 3, 4])
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "budget" in (refused.value.details() or "")
        await spend(router, [1, 2])  # the 4 that are left


async def test_two_routers_cannot_own_one_journal(tmp_path: Path) -> None:
    journal = str(tmp_path / "budgets.journal")
    async with running(budget_journal=journal):
        with pytest.raises(JournalError, match="another router"):
            async with running(budget_journal=journal):
                pass


@pytest.mark.parametrize("edges", [1, 2])
async def test_a_router_that_could_not_start_owns_none(tmp_path: Path, edges: int) -> None:
    journal = str(tmp_path / "budgets.journal")
    async with running(http_port=0) as router:
        with pytest.raises(PortTaken, match="http_port"):
            async with running(edges=edges, http_port=router.bound.http_port, budget_journal=journal):
                pass
    async with running(budget_journal=journal):
        pass


async def test_one_that_is_damaged_is_not_kept_open(tmp_path: Path) -> None:
    journal = tmp_path / "budgets.journal"
    journal.write_text("no record\nno record\n")
    with pytest.raises(JournalError, match="damaged"):
        async with running(budget_journal=str(journal)):
            pass
    journal.unlink()
    async with running(budget_journal=str(journal)):
        pass
