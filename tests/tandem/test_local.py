import asyncio
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.local import ROUTER, LocalCluster, PortRefused, Ready, State, choose_port
from tandem.supervisor import ChildSpec, Event, Left, Outcome, RestartPolicy, Started
from tests.tandem.scripted_server import Script, serving

SLEEP = "import time; time.sleep(600)"
POLICY = RestartPolicy(backoff_first_s=0.01, first_restarts_max=0)


@pytest.fixture
def router() -> Iterator[Script]:
    """What the clusters under test ask who is ready; their own router process only sleeps."""
    with serving(Script(workers={})) as script:
        yield script


class Local:
    def __init__(self, folder: Path, router: Script, **codes: str) -> None:
        self.events: list[Event | Ready] = []
        specs = [
            ChildSpec(
                name=name,
                argv=(sys.executable, "-I", "-S", "-c", code),
                log=folder / f"{name}.log",
                group=name.split("_")[0],
            )
            for name, code in {ROUTER: SLEEP, **codes}.items()
        ]
        self._router = router
        self.cluster = LocalCluster(specs, POLICY, router.address, self._on_event)
        self.run = asyncio.create_task(self.cluster.run())
        #: Processes that join the router as soon as they are started.
        self.join = set(codes)

    def _on_event(self, event: Event | Ready) -> None:
        self.events.append(event)
        if isinstance(event, Started) and event.name in self.join:
            self._router.workers[event.name] = event.pid

    async def stop(self) -> Outcome:
        self.cluster.kill()
        async with asyncio.timeout(60):
            return await self.run

    def names_ready(self) -> set[str]:
        return {event.name for event in self.events if isinstance(event, Ready)}


async def test_a_process_is_ready_when_the_router_says_so(tmp_path: Path, router: Script) -> None:
    local = Local(tmp_path, router, p_0=SLEEP, d_0=SLEEP)
    async with asyncio.timeout(60):
        await local.cluster.wait_ready()
    assert local.names_ready() == {ROUTER, "p_0", "d_0"}
    assert {member.state for member in local.cluster.members.values()} == {State.READY}
    await local.stop()


async def test_an_earlier_process_of_the_same_name_does_not_count(tmp_path: Path, router: Script) -> None:
    router.workers["p_0"] = 1
    local = Local(tmp_path, router, p_0=SLEEP)
    local.join = set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await local.cluster.wait_ready()
    assert local.names_ready() <= {ROUTER}
    await local.stop()


async def test_who_was_given_up_or_has_left_is_not_waited_for(tmp_path: Path, router: Script) -> None:
    local = Local(tmp_path, router, p_0=SLEEP, p_1="raise SystemExit(1)", d_0=SLEEP, d_1="pass")
    local.join = {"p_0", "d_0"}
    async with asyncio.timeout(60):
        await local.cluster.wait_ready()
    assert local.cluster.members["p_1"].state is State.GIVEN_UP
    assert Left(name="d_1") in local.events
    assert local.names_ready() == {ROUTER, "p_0", "d_0"}
    assert await local.stop() is Outcome.STOPPED


def test_a_port_that_is_taken_is_not_chosen() -> None:
    port = choose_port("127.0.0.1", 0)  # where no outgoing connection takes it
    with socket.create_server(("127.0.0.1", port)), pytest.raises(PortRefused, match=str(port)):
        choose_port("127.0.0.1", port)
    assert choose_port("127.0.0.1", port) == port


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 20_001), ("192.0.2.1", 0), ("no such host", 0)])
def test_where_nobody_can_listen_is_said_to_be_so(host: str, port: int) -> None:
    with pytest.raises(PortRefused, match=rf"{host}:\d+ cannot be listened on \("):
        choose_port(host, port)


def test_any_free_port_lies_where_no_outgoing_connection_takes_it() -> None:
    with socket.create_server(("127.0.0.1", choose_port("127.0.0.1", 0))) as free:
        assert 20_000 <= free.getsockname()[1] < 30_000
