"""A worker drives the node of the process beside it: the same outcomes, and nothing left when it stops listening."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kv_transfer.api import FetchError, NodeLimits, Outcome
from kv_transfer.local import AsyncKvClient, EngineProcessLost, KvLocalServer
from tests.kv_transfer.nodes import Party, World, eventually


@dataclass
class Beside:
    """The engine process's end, here in the same process."""

    reader: Party
    owner: Party
    socket: Path
    server: KvLocalServer


@pytest.fixture
def beside(world: World, tmp_path: Path) -> Iterator[Beside]:
    tmp_path.chmod(0o700)
    owner, reader = world.open("p"), world.open("d", limits=NodeLimits(piece_bytes=4096))
    socket = tmp_path / "kv.sock"
    server = KvLocalServer(reader.node, socket, lambda: (30, 32))
    reader.node.connect(peer="p", address=owner.node.address)
    yield Beside(reader, owner, socket, server)
    server.close()


def pages_free(beside: Beside) -> bool:
    return beside.reader.node.stats().staging_pages_free == 16


async def test_a_fetch_is_staged_and_discarded(beside: Beside) -> None:
    client = AsyncKvClient(beside.socket)
    fetched = await client.fetch(beside.owner.offer(blocks=(3, 4), tokens=20), 5.0)
    assert beside.reader.staged(fetched.staged_id) == [beside.owner.block(3), beside.owner.block(4)]
    assert (fetched.tokens, fetched.transport) == (20, "inproc")
    assert fetched.nbytes == 2 * beside.owner.layout.block_bytes
    stats = await client.stats()
    assert (stats.staged_pages, stats.kv_blocks_free, stats.kv_blocks_total) == (2, 30, 32)
    await client.discard(fetched.staged_id)
    assert pages_free(beside)
    await client.close()


@pytest.mark.parametrize(
    ("order", "outcome"),
    [({"reader": "other"}, Outcome.REFUSED), ({"blocks": range(17)}, Outcome.FULL), ({"ttl_s": 0.0}, Outcome.STALE)],
)
async def test_outcomes_cross_the_socket_with_their_reason(
    beside: Beside, order: dict[str, object], outcome: Outcome
) -> None:
    client = AsyncKvClient(beside.socket)
    with pytest.raises(FetchError) as raised:
        await client.fetch(beside.owner.offer(**order), 5.0)  # type: ignore[arg-type]
    assert raised.value.outcome is outcome
    assert raised.value.detail
    await client.close()


async def test_a_handle_that_does_not_parse_is_refused_without_asking(beside: Beside) -> None:
    client = AsyncKvClient(beside.socket)
    with pytest.raises(FetchError) as raised:
        await client.fetch(b"\xff\xff", 5.0)
    assert raised.value.outcome is Outcome.REFUSED
    assert not await client.release(b"\xff\xff")
    await client.close()


async def test_cancelling_stops_the_read_and_leaves_nothing(beside: Beside) -> None:
    client = AsyncKvClient(beside.socket)
    reading, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        loop.call_soon_threadsafe(reading.set)
        go_on.wait(10)

    beside.reader.during_read(wait)
    fetch = asyncio.create_task(client.fetch(beside.owner.offer(), 5.0))
    await reading.wait()
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    (job,) = beside.reader.node._jobs.values()
    await asyncio.to_thread(eventually, job.cancel.is_set)
    go_on.set()
    await asyncio.to_thread(eventually, lambda: pages_free(beside))
    await asyncio.to_thread(eventually, lambda: beside.owner.node.take_ended() == ["t"])
    await asyncio.to_thread(eventually, lambda: beside.reader.node.stats().fetch_outcomes == {Outcome.FAILED: 1})
    await client.close()


async def test_cancels_at_any_moment_leave_nothing(beside: Beside) -> None:
    client = AsyncKvClient(beside.socket)
    for number in range(60):
        fetch = asyncio.create_task(client.fetch(beside.owner.offer(f"t{number}", ttl_s=2.0), 5.0))
        await asyncio.sleep(number * 0.0001)
        fetch.cancel()
        try:
            fetched = await fetch
        except asyncio.CancelledError:
            continue
        await client.discard(fetched.staged_id)
    await client.close()
    await asyncio.to_thread(eventually, lambda: pages_free(beside))
    ended: list[str] = []

    def all_ended() -> bool:
        ended.extend(beside.owner.node.take_ended())
        return len(ended) == 60

    await asyncio.to_thread(eventually, all_ended)
    assert len(set(ended)) == 60


async def test_release_and_connect_reach_the_node(beside: Beside) -> None:
    client = AsyncKvClient(beside.socket)
    mine = beside.reader.offer("mine")
    assert await client.release(mine)
    assert not await client.release(mine)
    lane = await client.connect("p", beside.owner.node.address)
    assert (lane.peer, lane.transport) == ("p", "inproc")
    refused = await client.connect("p2", beside.owner.node.address)
    assert "not 'p2'" in refused.refusal
    await client.close()


async def test_an_engine_process_that_is_gone_is_an_error_in_time(beside: Beside) -> None:
    client = AsyncKvClient(beside.socket)
    await client.stats()
    await asyncio.to_thread(beside.server.close)
    with pytest.raises(FetchError) as raised:
        await client.fetch(beside.owner.offer(), 5.0)
    assert raised.value.outcome is Outcome.FAILED
    for call in (client.stats(), client.discard("x"), client.connect("p", "127.0.0.1:9"), client.release(b"")):
        with pytest.raises(EngineProcessLost):
            await call
    await client.close()


async def test_closing_the_server_ends_fetches_under_way(beside: Beside) -> None:
    client = AsyncKvClient(beside.socket)
    closing = threading.Thread(target=beside.server.close)

    def close() -> None:
        closing.start()
        closing.join(0.2)

    beside.reader.during_read(close)
    with pytest.raises(FetchError) as raised:
        await client.fetch(beside.owner.offer(), 5.0)
    assert raised.value.outcome is Outcome.FAILED
    await client.close()
    await asyncio.to_thread(closing.join)
    assert pages_free(beside)


def test_a_socket_that_others_can_reach_is_refused(world: World, tmp_path: Path) -> None:
    reader = world.open("d")
    tmp_path.chmod(0o755)
    with pytest.raises(ValueError, match="must be private"):
        KvLocalServer(reader.node, tmp_path / "kv.sock", lambda: (0, 0))
    with pytest.raises(ValueError, match="at most 107 bytes"):
        KvLocalServer(reader.node, tmp_path / ("x" * 107), lambda: (0, 0))
