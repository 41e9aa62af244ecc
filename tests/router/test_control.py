"""What operators ask and order, over the wire: stories, tenants, keys. The cluster under them is real but for its
workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from router.config import AuthConfig
from router.edge import keys
from router.edge.identity import Scope
from tandem import AsyncClient, Client, TandemError, show
from tandem.cli import app
from tandem.client import API_KEY_VARIABLE
from tandem.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from tandem.values import RequestStory
from tests.router.running import Router, running

TENANTS = """\
# Who pays.
[tenants.acme]
requests_per_minute = 3   # few
[tenants.other]
"""
ANSWER = (5, 6, 7)
PROMPT = tuple(range(1, 41))


@dataclass(frozen=True)
class Cluster:
    router: Router
    tenants: Path
    #: By whose it is.
    keys: dict[str, str]

    def client(self, whose: str) -> Client:
        return Client(f"127.0.0.1:{self.router.bound.port}", api_key=self.keys[whose], retries=0)

    async def ask(self, whose: str, request_id: str, traceparent: str = "") -> None:
        async with AsyncClient(f"127.0.0.1:{self.router.bound.port}", api_key=self.keys[whose], retries=0) as client:
            options = {"max_tokens": len(ANSWER), "temperature": 0.0, "traceparent": traceparent}
            await client.generate(PROMPT, request_id=request_id, **options).result()  # type: ignore[arg-type]

    async def story(self, whose: str, request_id: str, tenant: str = "") -> RequestStory:
        with self.client(whose) as client:
            return await asyncio.to_thread(client.explain, request_id, tenant)


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    tenants, store = tmp_path / "tenants.toml", tmp_path / "auth" / "keys.json"
    tenants.write_text(TENANTS)
    made = {}
    for tenant, scope in (("acme", Scope.INFERENCE), ("other", Scope.INFERENCE), ("ops", Scope.ADMIN)):
        with keys.editing(store, store.with_name("pepper")) as editor:
            changed, _, made[tenant] = editor.store.create(editor.pepper, tenant, 0.0, scopes=frozenset({scope}))
            editor.save(changed)
    auth = AuthConfig(mode="keys", keys_file=str(store))
    async with running(tenants_file=str(tenants), auth=auth) as router:
        await router.pair(ANSWER)
        yield Cluster(router, tenants, made)


@contextmanager
def refused(kind: type[TandemError], *words: str) -> Iterator[None]:
    with pytest.raises(kind) as error:
        yield
    assert all(word in str(error.value) for word in words), error.value


class TestStories:
    async def test_a_story_says_what_was_waited_for_where_it_was_placed_and_what_it_cost(
        self, cluster: Cluster
    ) -> None:
        await cluster.ask("acme", "mine")
        for whose in ("acme", "ops"):
            story = await cluster.story(whose, "mine")
            assert (story.tenant, story.state, story.lane) == ("acme", "finished", "standard")
            assert story.waited.queue_s is not None
            assert story.placement is not None
            assert (story.placement.chosen.worker_id, story.placement.decode_worker) == ("p", "d")
            assert story.placement.chosen.tokens == len(PROMPT)
            assert story.handoff is not None
            assert (story.handoff.transport, story.handoff.nbytes) == ("memory", 64)
            charge = story.charge
            assert (charge.settled, charge.prompt_tokens, charge.completion_tokens) == (True, len(PROMPT), len(ANSWER))
            assert charge.reserved_tokens == len(PROMPT) + len(ANSWER)
            assert story.lines[0][1].startswith("queued")

    async def test_tenants_are_told_of_their_own_requests_only(self, cluster: Cluster) -> None:
        await cluster.ask("acme", "mine")
        messages = []
        for request_id in ("mine", "never-was"):
            with pytest.raises(NotFound) as error:
                await cluster.story("other", request_id)
            messages.append(str(error.value).replace(request_id, "ID"))
        assert messages[0] == messages[1], "whether another's request exists can't be told"

    async def test_an_id_that_several_tenants_use_is_each_ones_own(self, cluster: Cluster) -> None:
        for whose in ("acme", "other"):
            await cluster.ask(whose, "same")
        for whose in ("acme", "other"):
            story = await cluster.story(whose, "same")
            assert (story.tenant, story.other_tenants) == (whose, ())
        story = await cluster.story("ops", "same")
        assert (story.tenant, story.other_tenants) == ("other", ("acme",))
        assert "also of      acme (--tenant NAME" in show.request_story(story)
        assert (await cluster.story("ops", "same", "acme")).tenant == "acme"
        assert (await cluster.story("other", "same", "other")).tenant == "other"
        with pytest.raises(NotFound):
            await cluster.story("other", "same", "acme")

    async def test_a_refused_request_is_explained_by_the_limit_that_refused_it(self, cluster: Cluster) -> None:
        for number in range(4):
            with suppress(TandemError):
                await cluster.ask("acme", f"r{number}")
        story = await cluster.story("acme", "r3")
        assert (story.state, story.reason) == ("refused", "REQUESTS_PER_MINUTE")
        assert story.retry_after_s is not None
        assert 0 < story.retry_after_s <= 20
        assert (story.placement, story.charge.settled, story.charge.reserved_tokens) == (None, False, 0)

    @pytest.mark.parametrize(
        ("traceparent", "trace_id"),
        [
            (f"00-{'ab' * 16}-{'12' * 8}-01", "ab" * 16),
            (f"01-{'ab' * 16}-{'12' * 8}-01-of-a-later-version", "ab" * 16),
            (f"00-{'00' * 16}-{'12' * 8}-01", ""),
            (f"ff-{'ab' * 16}-{'12' * 8}-01", ""),
            (f"00-{'ab' * 15}-{'12' * 8}-01", ""),
            ("x" * 1000, ""),
        ],
    )
    async def test_a_story_names_the_callers_trace(self, cluster: Cluster, traceparent: str, trace_id: str) -> None:
        await cluster.ask("other", "traced", traceparent)
        assert (await cluster.story("other", "traced")).trace_id == trace_id

    async def test_one_that_waits_says_so(self, cluster: Cluster) -> None:
        worker = await cluster.router.worker("slow", answer=None)
        await worker.wait_for("welcome")
        async with AsyncClient(
            f"127.0.0.1:{cluster.router.bound.port}", api_key=cluster.keys["acme"], retries=0
        ) as client:
            for held in ("p", "d"):
                with cluster.client("ops") as operator:
                    await asyncio.to_thread(operator.drain, held)
            generation = client.generate(PROMPT, request_id="open", max_tokens=3)
            await worker.wait_for("decode")
            story = await cluster.story("acme", "open")
            assert (story.state, story.charge.settled) == ("decoding", False)
            assert story.placement is not None
            assert story.placement.local_prefill
            generation.close()


class TestTenants:
    async def test_what_is_changed_is_in_force_at_once_and_in_the_file(self, cluster: Cluster) -> None:
        with cluster.client("ops") as client:
            budgets = '[{ "period" = "day", "tokens" = 1000 }]'
            fields = {"weight": "2", "lanes": "batch,standard", "budgets": budgets, "pool": ""}
            added = await asyncio.to_thread(client.add_tenant, "new", fields)
            assert (added.fields["budgets"], added.fields["lanes"]) == (budgets, '["standard", "batch"]')
            key, secret = await asyncio.to_thread(client.create_key, "new", expires_in_s=3600.0)
            cluster.keys["new"] = secret
            await cluster.ask("new", "r")
            assert (await cluster.story("new", "r")).state == "finished"

            changed = await asyncio.to_thread(client.set_tenant, "acme", {"requests_per_minute": "1"})
            assert changed.fields["requests_per_minute"] == "1.0"
            await cluster.ask("acme", "first")
            with pytest.raises(TandemError, match="1 requests per minute"):
                await cluster.ask("acme", "second")
            assert "# Who pays." in cluster.tenants.read_text()
            assert "requests_per_minute = 1" in cluster.tenants.read_text()

            names = [tenant.name for tenant in await asyncio.to_thread(client.tenants)]
            assert names == ["acme", "other", "new"]
            listed = await asyncio.to_thread(client.keys, "new")
            assert [(found.id, found.state) for found in listed] == [(key.id, "live")]

            await asyncio.to_thread(client.revoke_key, key.id)
            with pytest.raises(TandemError, match="revoked"):
                await cluster.ask("new", "r2")
            await asyncio.to_thread(client.remove_tenant, "new")
            assert [tenant.name for tenant in await asyncio.to_thread(client.tenants)] == ["acme", "other"]

    async def test_what_the_file_would_refuse_is_refused_with_every_reason_and_changes_nothing(
        self, cluster: Cluster
    ) -> None:
        with cluster.client("ops") as client:
            before = await asyncio.to_thread(client.tenants)
            with refused(InvalidArgument, "WEIGHT", "UNKNOWN_PLAN"):
                await asyncio.to_thread(client.set_tenant, "acme", {"weight": "-1", "price_plan": "none"})
            with refused(InvalidArgument, "UNKNOWN_KEY", "weight"):
                await asyncio.to_thread(client.add_tenant, "x", {"wieght": "1"})
            with pytest.raises(AlreadyExists) as there:
                await asyncio.to_thread(client.add_tenant, "acme", {})
            assert there.value.reason == "TENANT_EXISTS"
            with refused(NotFound, "nobody"):
                await asyncio.to_thread(client.remove_tenant, "nobody")
            with refused(NotFound, "nokey"):
                await asyncio.to_thread(client.revoke_key, "nokey")
            with refused(InvalidArgument, "scopes", "root"):
                await asyncio.to_thread(client.create_key, "acme", scopes=("root",))
            assert await asyncio.to_thread(client.tenants) == before
        assert cluster.tenants.read_text() == TENANTS

    async def test_they_are_for_operators(self, cluster: Cluster) -> None:
        with cluster.client("acme") as client:
            for call in (
                client.tenants,
                client.keys,
                lambda: client.set_tenant("acme", {"weight": "1000"}),
                lambda: client.create_key("acme", scopes=("admin",)),
            ):
                with pytest.raises(PermissionDenied):
                    await asyncio.to_thread(call)

    async def test_a_router_without_the_files_says_that_tenants_are_managed_elsewhere(self) -> None:
        async with running() as router:
            with Client(f"127.0.0.1:{router.bound.port}") as client:
                for call in (lambda: client.add_tenant("x", {}), lambda: client.create_key("x")):
                    with pytest.raises(FailedPrecondition) as error:
                        await asyncio.to_thread(call)
                    assert error.value.reason == "MANAGED_ELSEWHERE"

    async def test_under_load_changes_drop_no_request(self, cluster: Cluster) -> None:
        """Answers go on while weights, caps and tenants change around them."""
        stop = asyncio.Event()
        asked = 0

        async def keep_asking(number: int) -> None:
            nonlocal asked
            while not stop.is_set():
                await cluster.ask("other", f"{number}-{asked}")
                asked += 1

        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(keep_asking(number))
            with cluster.client("ops") as client:
                for round_ in range(10):
                    fields = {"weight": str(1 + round_), "tokens_in_flight_max": str(50 + round_)}
                    await asyncio.to_thread(client.set_tenant, "other", fields)
                    await asyncio.to_thread(client.add_tenant, f"t{round_}", {})
                    before = asked
                    while asked < before + 2:  # noqa: ASYNC110  answers go on
                        await asyncio.sleep(0.001)
                stop.set()
        with cluster.client("ops") as client:
            status = await asyncio.to_thread(client.status)
        assert status.outcomes["finished"] == asked
        assert sum(status.outcomes.values()) == asked

    async def test_the_commands_for_files_do_the_same_by_a_router(self, cluster: Cluster, tmp_path: Path) -> None:
        address = f"127.0.0.1:{cluster.router.bound.port}"

        async def tandem(*arguments: str) -> str:
            environ = {API_KEY_VARIABLE: cluster.keys["ops"], "TANDEM_STATE_DIR": str(tmp_path / "none")}
            command = [*arguments, "--address", address]
            result = await asyncio.to_thread(CliRunner().invoke, app, command, env=environ)
            assert result.exit_code == 0, result.output
            return result.stdout

        await tandem("tenant", "add", "new", "weight=2", "lanes=batch")
        await tandem("tenant", "set", "new", "weight=3")
        assert json.loads(await tandem("tenant", "show", "new", "--json"))["lanes"] == ["batch"]
        assert "new     3       batch" in await tandem("tenant", "list")
        cluster.keys["new"] = (await tandem("key", "create", "new")).strip().splitlines()[0]
        await cluster.ask("new", "r")
        assert "finished" in await tandem("why", "r")
        (key,) = json.loads(await tandem("key", "list", "--tenant", "new", "--json"))
        await tandem("key", "revoke", key["id"])
        await tandem("tenant", "remove", "new")
        assert "new" not in await tandem("tenant", "list")
        assert cluster.tenants.read_text().strip() == TENANTS.strip()
