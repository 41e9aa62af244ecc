import asyncio
from collections.abc import AsyncIterator

import pytest

from engine.base import PeerLane
from tests.loop import settle
from tests.worker.scripted_engine import ScriptedEngine
from worker.messages import Peer
from worker.peers import PeerBook


class Heard:
    def __init__(self) -> None:
        self.lanes: list[PeerLane] = []

    def peer_lane(self, lane: PeerLane) -> None:
        self.lanes.append(lane)


def peer(worker_id: str, incarnation: str = "1") -> Peer:
    return Peer(worker_id=worker_id, address=f"{worker_id}:1", incarnation=incarnation)


LANE = PeerLane(peer="p0", transport="scripted", gigabytes_per_s=1.5)


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def scope() -> AsyncIterator[asyncio.TaskGroup]:
    async with asyncio.TaskGroup() as scope:
        yield scope


async def test_a_peer_is_met_once_and_its_lane_told_to_every_router(
    engine: ScriptedEngine, scope: asyncio.TaskGroup
) -> None:
    book = PeerBook(engine, "w0", scope, at_once=2)
    one, two = Heard(), Heard()
    engine.held.add("connect")
    book.introduce(one, peer("p0"))
    book.introduce(two, peer("p0"))
    await engine.let_go("connect")
    await engine.until("done connect p0")
    await settle()
    book.introduce(two, peer("p0"))
    assert (one.lanes, two.lanes) == ([LANE], [LANE, LANE])
    assert engine.met == [("p0", "p0:1")]


async def test_a_worker_is_no_peer_of_its_own(engine: ScriptedEngine, scope: asyncio.TaskGroup) -> None:
    book = PeerBook(engine, "w0", scope, at_once=2)
    book.introduce(Heard(), peer("w0"))
    book.introduce(Heard(), Peer(worker_id="p0", address="", incarnation="1"))
    await settle()
    assert engine.met == []


async def test_a_peer_that_started_anew_is_met_anew(engine: ScriptedEngine, scope: asyncio.TaskGroup) -> None:
    book = PeerBook(engine, "w0", scope, at_once=2)
    book.introduce(Heard(), peer("p0", "1"))
    book.introduce(Heard(), peer("p0", "2"))
    await settle()
    assert engine.met == [("p0", "p0:1")] * 2


async def test_a_peer_that_could_not_be_met_is_tried_again(engine: ScriptedEngine, scope: asyncio.TaskGroup) -> None:
    book = PeerBook(engine, "w0", scope, at_once=2)
    heard = Heard()
    engine.failing["connect"] = OSError("no route")
    book.introduce(heard, peer("p0"))
    await settle()
    del engine.failing["connect"]
    book.introduce(heard, peer("p0"))
    await settle()
    assert heard.lanes == [PeerLane(peer="p0", refusal="OSError: no route"), LANE]


async def test_introductions_are_made_a_few_at_a_time(engine: ScriptedEngine, scope: asyncio.TaskGroup) -> None:
    book = PeerBook(engine, "w0", scope, at_once=2)
    engine.held.add("connect")
    for number in range(5):
        book.introduce(Heard(), peer(f"p{number}"))
    await engine.until("begun connect p1")
    await settle()
    assert len(engine.met) == 2
    await engine.let_go("connect")
    await engine.until("done connect p4")


async def test_the_book_is_bounded(engine: ScriptedEngine, scope: asyncio.TaskGroup) -> None:
    book = PeerBook(engine, "w0", scope, at_once=1, peers_max=2)
    for name in ("p0", "p1", "p2", "p0"):
        book.introduce(Heard(), peer(name))
        await settle()
    assert [met for met, _ in engine.met] == ["p0", "p1", "p2", "p0"]
