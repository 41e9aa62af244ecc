"""The tenants' file: what it may say, what it is refused for, and what happens when it changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from router.core.request import Lane
from router.core.tenant import BookRefused, Budget, Period, TenantBook
from router.tenants import FileWatch, read_book

EVERYTHING = """
guarantee_share_max = 0.5
dedicated = ["trust", "gpu"]
lane_floors = { standard = 0.2, batch = 0.1 }

[tenants.acme]
weight = 4
lanes = ["realtime", "standard"]
default_lane = "standard"
requests_per_minute = 600
tokens_in_flight_max = 100000
guaranteed_tokens_per_s = 1000
budgets = [{ period = "day", tokens = 5000000, money_micros = 25000000 }]
pool = { trust = "regulated" }
sharing_group = "org"
models = ["llama"]
price_plan = "plain"

[tenants."acme.batch"]
weight = 0.5

[unknown]
weight = 0.1
lanes = ["batch"]

[plans.plain]
prompt_micros = 100

[pools.regulated]
labels = { trust = "regulated" }
tokens_per_s = 20000

[pools.rest]
tokens_per_s = 1000
"""


def read(tmp_path: Path, text: str) -> TenantBook:
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    return read_book(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(BookRefused) as caught:
        read(tmp_path, text)
    return [str(problem) for problem in caught.value.problems]


def test_the_file_says_everything_that_a_book_has(tmp_path: Path) -> None:
    book = read(tmp_path, EVERYTHING)
    acme = book.tenants["acme"]
    assert (acme.id, acme.weight, acme.lanes) == ("acme", 4.0, {Lane.REALTIME, Lane.STANDARD})
    assert acme.budgets == (Budget(period=Period.DAY, tokens=5_000_000, money_micros=25_000_000),)
    assert acme.pool == {("trust", "regulated")}
    assert acme.models == {"llama"}
    assert book.tenants["acme.batch"].weight == 0.5
    assert book.unknown is not None
    assert book.unknown.lanes == {Lane.BATCH}
    assert book.lane_floors == {Lane.STANDARD: 0.2, Lane.BATCH: 0.1}
    assert (book.dedicated, book.guarantee_share_max) == ({"trust", "gpu"}, 0.5)
    assert [(pool.name, pool.tokens_per_s) for pool in book.pools] == [("regulated", 20000.0), ("rest", 1000.0)]
    assert book.plans["plain"].prompt_micros == 100


def test_an_empty_file_is_a_book_without_tenants(tmp_path: Path) -> None:
    assert read(tmp_path, "") == TenantBook()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tenants.a]\nwieght = 1", "tenants.a.wieght: unknown key; did you mean weight? (UNKNOWN_KEY)"),
        ("[tenant.a]\nweight = 1", "tenant: unknown key; did you mean tenants? (UNKNOWN_KEY)"),
        ("[tenants.a]\nweight = 'much'", "tenants.a.weight: Expected `float`, got `str` (WRONG_TYPE)"),
        ("[tenants.a]\nweight = 0", "tenants.a.weight: must be positive"),
        ("[tenants.a]\nid = 'b'", "tenants.a.id: the table's name is its name (NAMED_TWICE)"),
        ("[tenants.a]\nlanes = ['fast']", "tenants.a.lanes: Invalid enum value 'fast'"),
        ("[tenants.a]\npool = { trust = 1 }", "tenants.a.pool: Expected `str`, got `int`"),
        ("[tenants.a]\nprice_plan = 'x'", "tenants.a.price_plan: there is no plan 'x' (UNKNOWN_PLAN)"),
        ("[tenants.a]\nbudgets = [{ tokens = 1 }]", "tenants.a.budgets: Object missing required field `period`"),
        ("[pools.p]", "pools.p.tokens_per_s: must be given (MISSING)"),
        ("tenants = 1", "tenants: must be a table (NOT_A_TABLE)"),
        ("tenants.a = 1", "tenants.a: must be a table (NOT_A_TABLE)"),
        ("[tenants", "(NOT_TOML)"),
        (
            "[pools.p]\ntokens_per_s = 100\n[tenants.a]\nguaranteed_tokens_per_s = 81",
            "81 tokens/s are guaranteed, 80 may be",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert words in problem


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "[tenants.a]\nwieght = 1\n[tenants.b]\nweight = -1\n[plans.p]\nprompt_micros = 1.5")
    assert [line.partition(":")[0] for line in found] == [
        "tenants.a.wieght",
        "plans.p.prompt_micros",
        "tenants.b.weight",
    ]


async def test_a_changed_file_is_read_and_a_refused_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text("[tenants.a]\n")
    books: asyncio.Queue[TenantBook] = asyncio.Queue()
    watch = FileWatch(path, read_book, books.put_nowait, poll_s=0.01)
    assert set(watch.load().tenants) == {"a"}
    running = asyncio.create_task(watch.run())

    def write(text: str) -> None:
        """At once: it is read at any time."""
        (tmp_path / "next").write_text(text)
        (tmp_path / "next").rename(path)

    write("[tenants.a]\nweight = 0\n")
    async with asyncio.timeout(60):
        while "tenants.a.weight: must be positive" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # what is watched is a log
    assert books.empty()
    write("[tenants.a]\n[tenants.b]\n")
    async with asyncio.timeout(60):
        assert set((await books.get()).tenants) == {"a", "b"}
    path.unlink()
    async with asyncio.timeout(60):
        while "No such file" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    running.cancel()
    assert caplog.text.count("must be positive") == 1


def test_the_example_of_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tenancy.md").read_text()
    section = page.partition("## The tenants' file")[2]
    lines = section.partition("Everything has a default")[0].splitlines()
    book = read(tmp_path, "\n".join(line.removeprefix("    ") for line in lines))
    assert book.tenants["acme"].guaranteed_tokens_per_s == 1000
    assert book.unknown is not None
