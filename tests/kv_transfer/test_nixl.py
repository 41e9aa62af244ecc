"""What is particular to NIXL: hung reads, idle CPU, the environment. And hand-offs between two processes through it."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from kv_transfer.api import FetchError, NodeLimits, Outcome
from kv_transfer.registry import make_transports
from kv_transfer.segments import one_segment
from kv_transfer.transport import ARENA, STAGING, Region, TransportError, Unquiesced
from tests.kv_transfer.nodes import Party, eventually, open_party
from tests.kv_transfer.processes import (
    CHURN_LAYOUT,
    PeerProcess,
    exported_memory,
    in_another_namespace,
    memory_regions,
    peer_process,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="nixl_cu12 is not installed")

#: The lane on which the owner's process takes part, so that a stopped owner stops the read.
TCP = {"UCX_TLS": "tcp"}


@pytest.mark.parametrize("end", ["resume", "kill"])
def test_a_hung_read_says_when_it_is_over_and_writes_nothing_afterwards(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    (transport,) = make_transports(["nixl"])
    regions, memory = memory_regions(7)
    transport.register(regions)
    whole = one_segment(ARENA, 0, STAGING, 0, 1 << 20)
    with peer_process("transport", "nixl", environment=TCP) as owner:
        transport.connect("p", "i1", bytes.fromhex(owner.hello))
        transport.read("p", whole, 20.0)
        owner.stop()
        memory[STAGING][:] = 0
        with pytest.raises(Unquiesced) as raised:
            transport.read("p", whole, 0.05)
        transport.disconnect("p")
        assert not raised.value.is_quiet()
        if end == "resume":
            owner.resume()
        else:
            owner.kill()
        eventually(raised.value.is_quiet)
        memory[STAGING][:] = 0xA5
        time.sleep(0.2)
        assert (memory[STAGING] == 0xA5).all()
        assert raised.value.is_quiet()
        if end == "resume":
            transport.connect("p", "i1", bytes.fromhex(owner.hello))
            transport.read("p", whole, 20.0)
        transport.close()


def test_closing_ends_a_hung_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    (transport,) = make_transports(["nixl"])
    regions, memory = memory_regions(7)
    transport.register(regions)
    with peer_process("transport", "nixl", environment=TCP) as owner:
        transport.connect("p", "i1", bytes.fromhex(owner.hello))
        owner.stop()
        with pytest.raises(Unquiesced) as raised:
            transport.read("p", one_segment(ARENA, 0, STAGING, 0, 1 << 20), 0.05)
        transport.close()
        assert raised.value.is_quiet()
        memory[STAGING][:] = 0xA5
        owner.resume()
        time.sleep(0.2)
        assert (memory[STAGING] == 0xA5).all()


def test_where_the_lane_is_cma_a_stopped_owner_is_read_all_the_same() -> None:
    """That the lane is what it is called: over TCP this read would hang."""
    (transport,) = make_transports(["nixl"])
    regions, memory = memory_regions(7)
    transport.register(regions)
    with peer_process("transport", "nixl") as owner:
        transport.connect("p", "i1", bytes.fromhex(owner.hello))
        assert transport.lane("p") == "nixl/cma"
        transport.read("p", one_segment(ARENA, 0, STAGING, 0, 8), 20.0)  # the first one wires up, with the owner's help
        owner.stop()
        transport.read("p", one_segment(ARENA, 0, STAGING, 0, 1 << 20), 20.0)
        assert np.array_equal(memory[STAGING][: 1 << 20], exported_memory(1)[0][: 1 << 20])
        transport.close()


@pytest.mark.parametrize("apart_by", ["namespace", "environment"])
@pytest.mark.parametrize(("names", "lane"), [("nixl,shm,tcp", ""), ("nixl,tcp", "tcp"), ("nixl", "nixl/tcp")])
def test_peers_that_ucx_would_reach_over_tcp_are_left_to_our_own_where_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, apart_by: str, names: str, lane: str
) -> None:
    if apart_by == "environment":
        monkeypatch.setenv("UCX_TLS", "tcp")
        launcher, lane = [], lane or "shm"
    else:
        launcher, lane = in_another_namespace(), lane or "tcp"
    reader = open_party("d", make_transports(names.split(",")))
    with peer_process("node", names, launcher=launcher) as owner:
        found = reader.node.connect(peer="p1", address=owner.hello["address"])
        assert (found.transport, found.refusal) == (lane, "")
        fetched = reader.node.fetch(_offer(owner, "t", [3, 1]), 20.0)
        assert fetched.transport == lane
        assert reader.staged(fetched.staged_id) == _expected(owner, [3, 1])
        reader.node.discard(fetched.staged_id)
        reader.node.close()


def test_an_idle_agent_sleeps() -> None:
    with peer_process("transport", "nixl") as owner:
        (transport,) = make_transports(["nixl"])
        regions, _memory = memory_regions(7)
        transport.register(regions)
        transport.connect("p", "i1", bytes.fromhex(owner.hello))
        transport.read("p", one_segment(ARENA, 0, STAGING, 0, 1 << 20), 20.0)
        ours, theirs = time.process_time(), owner.cpu_s()
        time.sleep(1.0)
        assert time.process_time() - ours < 0.5, "what does not sleep takes a core"
        assert owner.cpu_s() - theirs < 0.5
        transport.close()


def test_the_stock_configuration_is_left_as_it_was() -> None:
    from nixl_cu12 import _api

    stock = _api.nixlBind.nixlAgentConfig
    (transport,) = make_transports(["nixl"])
    regions, _memory = memory_regions(7)
    transport.register(regions)
    assert _api.nixlBind.nixlAgentConfig is stock
    transport.close()


def test_another_version_of_nixl_is_refused_before_its_metadata_is_read() -> None:
    import msgspec

    (transport,) = make_transports(["nixl"])
    regions, _memory = memory_regions(7)
    transport.register(regions)
    exported = msgspec.msgpack.decode(transport.export())
    exported["nixl"] = "0.1"
    with pytest.raises(TransportError, match=r"NIXL .* here, 0\.1 at p"):
        transport.connect("p", "i1", msgspec.msgpack.encode(exported))
    transport.close()


def test_memory_on_an_unknown_device_is_refused_by_name() -> None:
    (transport,) = make_transports(["nixl"])
    with pytest.raises(TransportError, match="'arena' is on 'tpu:0'"):
        transport.register({ARENA: Region(ARENA, 4096, 4096, "tpu:0")})


def test_two_ucx_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx", ModuleType("ucxx"))
    (transport,) = make_transports(["nixl"])
    regions, _memory = memory_regions(7)
    with pytest.raises(TransportError, match="ucxx is loaded"):
        transport.register(regions)


# -- hand-offs between two processes


@pytest.fixture
def reader() -> Iterator[Party]:
    party = open_party("d", make_transports(["nixl"]), limits=NodeLimits(piece_bytes=4096))
    yield party
    party.node.check_integrity()
    party.node.close()


def _offer(owner: PeerProcess, transfer_id: str, blocks: list[int], **more: object) -> bytes:
    return bytes.fromhex(owner.call(do="offer", transfer_id=transfer_id, blocks=blocks, **more))


def _expected(owner: PeerProcess, blocks: list[int]) -> list[bytes]:
    return [bytes.fromhex(owner.hello["blocks"][block]) for block in blocks]


def test_blocks_cross_processes_byte_by_byte(reader: Party) -> None:
    with peer_process("node", "nixl") as owner:
        lane = reader.node.connect(peer="p1", address=owner.hello["address"])
        assert (lane.transport, lane.refusal) == ("nixl/cma", "")
        random = np.random.default_rng(5)
        for number in range(30):
            blocks = [int(b) for b in random.permutation(32)[: 1 + number % 16]]
            fetched = reader.node.fetch(_offer(owner, f"t{number}", blocks), 20.0)
            assert reader.staged(fetched.staged_id) == _expected(owner, blocks)
            reader.node.discard(fetched.staged_id)
        ended: list[str] = []

        def all_ended() -> bool:
            ended.extend(owner.call(do="take_ended"))
            return len(ended) == 30

        eventually(all_ended)
        assert len(set(ended)) == 30


def test_a_lease_reused_in_mid_read_is_stale_across_processes(reader: Party) -> None:
    with peer_process("node", "nixl") as owner:
        reader.node.connect(peer="p1", address=owner.hello["address"])
        handle = _offer(owner, "t", [1, 2, 3])
        read = reader.transports[0].read
        done: list[object] = []

        def reuse_after_first(peer: str, segments: object, timeout_s: float) -> None:
            read(peer, segments, timeout_s)  # type: ignore[arg-type]
            if not done:
                done.append(owner.call(do="reuse", transfer_id="t", blocks=[1, 2, 3]))

        reader.transports[0].read = reuse_after_first  # type: ignore[method-assign]
        with pytest.raises(FetchError) as raised:
            reader.node.fetch(handle, 20.0)
        assert raised.value.outcome is Outcome.STALE


def test_reads_that_race_with_reuse_are_stale_or_right() -> None:
    """Two processes, no locks between them: the owner's thread writes into what is being read."""
    random = np.random.default_rng(6)
    outcomes: Counter[Outcome] = Counter()
    reader = open_party("d", make_transports(["nixl"]), lay=CHURN_LAYOUT, limits=NodeLimits(piece_bytes=1 << 18))
    with peer_process("churn", "nixl") as owner:
        assert not reader.node.connect(peer="p1", address=owner.hello).refusal
        for number in range(1000, 1000 + 1500, 10):
            count, ttl_s = int(random.integers(1, 8)), float(random.choice([0.0005, 0.002, 5.0]))
            late = number % 250 == 0
            handle = bytes.fromhex(owner.call(offer=[number, count, 0.0005 if late else ttl_s]))
            if late:
                time.sleep(0.02)
            try:
                fetched = reader.node.fetch(handle, 20.0)
            except FetchError as error:
                outcomes[error.outcome] += 1
                continue
            outcomes[Outcome.STAGED] += 1
            for i, block in enumerate(reader.staged(fetched.staged_id)):
                assert (np.frombuffer(block, np.uint64) == number + i).all()
            reader.node.discard(fetched.staged_id)
    reader.node.check_integrity()
    reader.node.close()
    assert set(outcomes) == {Outcome.STAGED, Outcome.STALE}, outcomes


def test_a_killed_owner_fails_the_fetch_and_its_successor_serves_the_next(reader: Party) -> None:
    with peer_process("node", "nixl") as owner:
        handles = [_offer(owner, f"t{number}", [1, 2]) for number in range(2)]
        reader.node.discard(reader.node.fetch(handles[0], 20.0).staged_id)
        owner.kill()
        with pytest.raises(FetchError) as raised:
            reader.node.fetch(handles[1], 20.0)
        assert raised.value.outcome is Outcome.FAILED
    assert reader.node.stats().staging_pages_free == 16
    with peer_process("node", "nixl") as successor:
        fetched = reader.node.fetch(_offer(successor, "t0", [4]), 20.0)
        assert reader.staged(fetched.staged_id) == _expected(successor, [4])
        reader.node.discard(fetched.staged_id)


def test_an_owner_that_hangs_keeps_the_pages_until_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    reader = open_party("d", make_transports(["nixl"]))
    with peer_process("node", "nixl", environment=TCP) as owner:
        reader.node.connect(peer="p1", address=owner.hello["address"])
        handle = _offer(owner, "t", [1, 2, 3])
        owner.stop()
        with pytest.raises(FetchError) as raised:
            reader.node.fetch(handle, 0.1)
        assert raised.value.outcome is Outcome.FAILED
        assert reader.node.stats().quarantined_pages == 3
        owner.resume()
        eventually(lambda: reader.node.stats().staging_pages_free == 16)
        fetched = reader.node.fetch(_offer(owner, "u", [5]), 20.0)
        assert reader.staged(fetched.staged_id) == _expected(owner, [5])
        reader.node.discard(fetched.staged_id)
        reader.node.check_integrity()
        reader.node.close()


def test_a_process_that_crashes_with_an_open_node_exits_while_peers_call_it(reader: Party) -> None:
    with peer_process("node", "nixl") as owner:
        exited = threading.Event()

        def call_on() -> None:
            while not exited.is_set():
                reader.node.connect(peer="p1", address=owner.hello["address"])

        caller = threading.Thread(target=call_on)
        caller.start()
        owner.send(do="crash")
        try:
            assert owner.process.wait(20) == 1
        finally:
            exited.set()
            caller.join()
