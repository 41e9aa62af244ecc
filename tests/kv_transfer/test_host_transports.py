"""What is particular to `shm` and `tcp`, and hand-offs between two processes through each of them."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from kv_transfer import tcp
from kv_transfer.api import FetchError, NodeLimits, Outcome
from kv_transfer.registry import make_transports
from kv_transfer.segments import one_segment
from kv_transfer.served import Exported
from kv_transfer.shm import ShmTransport, _after
from kv_transfer.tcp import _ANSWER, _REQUEST, TcpTransport, _dial
from kv_transfer.transport import ARENA, STAGING, PeerGone, ReadTimedOut, Region, Segments, TransportError
from tests.kv_transfer.memory import Bytes
from tests.kv_transfer.nodes import Party, eventually, open_party
from tests.kv_transfer.processes import (
    CHURN_LAYOUT,
    STAGING_BYTES,
    PeerProcess,
    in_another_namespace,
    memory_regions,
    peer_process,
)

WHOLE = one_segment(ARENA, 0, STAGING, 0, STAGING_BYTES)


#: An owner, a reader connected to it as "p", and the memory of each.
Both = tuple[TcpTransport, TcpTransport, dict[str, Bytes], dict[str, Bytes]]


@pytest.fixture
def both() -> Iterator[Both]:
    """An owner and a reader over TCP in this process, and their memory."""
    owner, reader = TcpTransport(), TcpTransport()
    regions, theirs = memory_regions(1)
    owner.register(regions)
    regions, ours = memory_regions(7)
    reader.register(regions)
    reader.connect("p", "i1", owner.export())
    yield owner, reader, theirs, ours
    reader.close()
    owner.close()


# -- both


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_memory_of_a_device_is_refused_by_name_when_two_meet_so_that_they_can_try_what_comes_next(name: str) -> None:
    (on_host,), (on_device,) = make_transports([name]), make_transports([name])
    regions, _memory = memory_regions(1)
    on_host.register(regions)
    on_device.register(regions | {ARENA: Region(ARENA, 4096, 4096, "cuda:0")})
    with pytest.raises(TransportError, match="host memory only, not arena on cuda:0 there"):
        on_host.connect("p", "i1", on_device.export())
    with pytest.raises(TransportError, match="host memory only, not arena on cuda:0 here"):
        on_device.connect("p", "i1", on_host.export())
    on_device.close()
    on_host.close()


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_an_idle_transport_sleeps(name: str) -> None:
    with peer_process("transport", name) as owner:
        (transport,) = make_transports([name])
        regions, _memory = memory_regions(7)
        transport.register(regions)
        transport.connect("p", "i1", bytes.fromhex(owner.hello))
        transport.read("p", WHOLE, 20.0)
        ours, theirs = time.process_time(), owner.cpu_s()
        time.sleep(1.0)
        assert time.process_time() - ours < 0.5, "what does not sleep takes a core"
        assert owner.cpu_s() - theirs < 0.5
        transport.close()


# -- shm


@pytest.fixture
def shm() -> Iterator[ShmTransport]:
    transport = ShmTransport()
    regions, memory = memory_regions(7)
    transport.register(regions)
    yield transport
    transport.close()
    memory.clear()


def _claim(transport: ShmTransport, **changes: object) -> bytes:
    """What the transport exports, with something wrong in it."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(transport.export()) | changes)


def test_another_process_of_that_number_is_not_the_peer(shm: ShmTransport) -> None:
    with pytest.raises(TransportError, match="is not p"):
        shm.connect("p", "i1", _claim(shm, pid=1))
    with pytest.raises(TransportError, match="is not p"):
        shm.connect("p", "i1", _claim(shm, started=1))
    with pytest.raises(TransportError, match="can't be found here"):
        shm.connect("p", "i1", _claim(shm, pid=1 << 30))
    with pytest.raises(TransportError, match="does not hold the nonce"):
        shm.connect("p", "i1", _claim(shm, nonce=os.urandom(32)))
    with pytest.raises(TransportError, match="can't be read"):
        shm.connect("p", "i1", _claim(shm, nonce_address=4096))
    with pytest.raises(PeerGone):
        shm.read("p", WHOLE, 1.0)


def test_a_transport_that_has_closed_meets_nobody(shm: ShmTransport) -> None:
    owner = ShmTransport()
    regions, _memory = memory_regions(1)
    owner.register(regions)
    exported = owner.export()
    shm.connect("p", "i1", exported)
    owner.close()
    with pytest.raises(TransportError, match="or closed"):
        shm.connect("p", "i1", exported)


def test_without_the_right_to_ptrace_the_reason_is_named(shm: ShmTransport) -> None:
    """A reader of another user, without capabilities."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    program = (
        "import os, sys\n"
        "from kv_transfer.shm import ShmTransport\n"
        "from kv_transfer.transport import TransportError\n"
        "transport = ShmTransport()  # imported by now: nobody may not read our files\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: transport.connect('p', 'i1', bytes.fromhex(sys.argv[1]))\n"
        "except TransportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, shm.export().hex()], capture_output=True, text=True)
    assert "ptrace" in done.stdout, done.stderr


def test_descriptors_are_closed_with_their_peers(shm: ShmTransport) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(20):
        shm.connect("p", "i1", shm.export())
        with pytest.raises(TransportError):
            shm.connect("q", "i1", _claim(shm, started=1))
    shm.disconnect("p")
    assert descriptors() <= before


def test_what_is_left_after_a_partial_copy() -> None:
    vectors = np.array([[100, 10], [200, 5], [300, 7]], np.uint64)
    assert _after(vectors, 3).tolist() == [[103, 7], [200, 5], [300, 7]]
    assert _after(vectors, 10).tolist() == [[200, 5], [300, 7]]
    assert _after(vectors, 16).tolist() == [[301, 6]]
    assert vectors[0].tolist() == [100, 10]


def test_a_read_of_memory_that_the_owner_has_unmapped_fails(shm: ShmTransport) -> None:
    regions = msgspec.msgpack.decode(shm.export())["regions"]
    regions["arena"]["address"] = 1 << 46
    shm.connect("p", "i1", _claim(shm, regions=regions))
    with pytest.raises(PeerGone, match="Bad address"):
        shm.read("p", WHOLE, 20.0)


def test_a_deadline_that_has_passed_is_noticed_before_a_byte_moves(shm: ShmTransport) -> None:
    shm.connect("p", "i1", shm.export())
    with pytest.raises(ReadTimedOut):
        shm.read("p", WHOLE, -1.0)
    shm.read("p", WHOLE, 20.0)


# -- tcp


def _dial_past_the_checks(owner: TcpTransport) -> tuple[socket.socket, dict[str, int]]:
    theirs = msgspec.msgpack.decode(owner.export(), type=Exported)
    connection = _dial(theirs, None, time.monotonic() + 20)
    connection.settimeout(20)
    return connection, theirs.regions


@pytest.mark.parametrize(
    ("region", "offset", "size"),
    [(0, 0, (4 << 20) + 1), (0, 4 << 20, 1), (0, 2**64 - 8, 16), (0, 2**63, 2**63), (1, 1 << 16, 8), (9, 0, 8)],
)
def test_the_owner_checks_bounds_itself(both: Both, region: int, offset: int, size: int) -> None:
    owner, *_ = both
    connection, _regions = _dial_past_the_checks(owner)
    with connection:
        connection.sendall(_REQUEST.pack(region, 1) + np.array([offset, size], np.uint64).tobytes())
        (refusal,) = _ANSWER.unpack(connection.recv(8, socket.MSG_WAITALL))
        assert refusal
        connection.recv(refusal, socket.MSG_WAITALL)
        connection.sendall(_REQUEST.pack(0, 1) + np.array([0, 8], np.uint64).tobytes())
        assert connection.recv(16, socket.MSG_WAITALL)[:8] == bytes(8), "it is served again"


@pytest.mark.parametrize("count", [0, 1 << 17])
def test_a_request_that_makes_no_sense_ends_the_connection(both: Both, count: int) -> None:
    owner, *_ = both
    connection, _regions = _dial_past_the_checks(owner)
    with connection:
        connection.sendall(_REQUEST.pack(0, count))
        assert connection.recv(1) == b""


def test_who_does_not_hold_the_token_reads_nothing(both: Both) -> None:
    owner, reader, *_ = both
    exported = msgspec.msgpack.decode(owner.export()) | {"token": b"guessed"}
    with pytest.raises(TransportError, match="can't be dialled"):
        reader.connect("q", "i1", msgspec.msgpack.encode(exported))


def test_an_owner_that_does_not_hold_the_token_is_refused(both: Both) -> None:
    """A peer that has restarted, and something else listens on its port."""
    owner, reader, *_ = both
    exported = msgspec.msgpack.decode(owner.export())
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def greet() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(b"tandem kv tcp 1\n" + bytes(16))
                connection.recv(48, socket.MSG_WAITALL)
                connection.sendall(bytes(32))

        thread = threading.Thread(target=greet)
        thread.start()
        exported["port"] = impostor.getsockname()[1]
        with pytest.raises(TransportError, match="another node"):
            reader.connect("q", "i1", msgspec.msgpack.encode(exported))
        thread.join()


def test_adjacent_and_empty_segments_arrive_in_place(both: Both) -> None:
    _owner, reader, theirs, ours = both
    ours[STAGING][:] = 0xA5
    remote = np.array([0, 100, 100, 5000, 100], np.uint64)
    local = np.array([10, 110, 5, 210, 1000], np.uint64)
    sizes = np.array([100, 100, 0, 50, 0], np.uint64)
    reader.read("p", Segments(ARENA, STAGING, remote, local, sizes), 20.0)
    want = np.full(STAGING_BYTES, 0xA5, np.uint8)
    want[10:210], want[210:260] = theirs[ARENA][:200], theirs[ARENA][5000:5050]
    assert np.array_equal(ours[STAGING], want)


def test_a_request_of_very_many_segments_is_cut(both: Both) -> None:
    _owner, reader, theirs, ours = both
    remote = np.arange((1 << 16) + 5, dtype=np.uint64)
    reader.read("p", Segments(ARENA, STAGING, remote, remote[::-1].copy(), np.ones_like(remote)), 20.0)
    assert np.array_equal(ours[STAGING][: remote.size], theirs[ARENA][: remote.size][::-1])


def test_a_read_that_timed_out_writes_nothing_afterwards_and_the_next_one_dials_again() -> None:
    reader = TcpTransport()
    regions, memory = memory_regions(7)
    reader.register(regions)
    with peer_process("transport", "tcp") as owner:
        reader.connect("p", "i1", bytes.fromhex(owner.hello))
        owner.stop()
        with pytest.raises(ReadTimedOut):
            reader.read("p", WHOLE, 0.1)
        memory[STAGING][:] = 0xA5
        with pytest.raises(ReadTimedOut):
            reader.read("p", WHOLE, 0.1)
        owner.resume()
        time.sleep(0.2)
        assert (memory[STAGING] == 0xA5).all()
        reader.read("p", WHOLE, 20.0)
        assert not (memory[STAGING] == 0xA5).all()
        reader.close()


def test_closing_ends_a_read_that_hangs() -> None:
    reader = TcpTransport()
    regions, memory = memory_regions(7)
    reader.register(regions)
    with peer_process("transport", "tcp") as owner:
        reader.connect("p", "i1", bytes.fromhex(owner.hello))
        owner.stop()
        failures: list[Exception] = []

        def read() -> None:
            try:
                reader.read("p", WHOLE, 60.0)
            except TransportError as error:
                failures.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.1)
        reader.close()
        thread.join(10)
        assert isinstance(failures[0], PeerGone)
        memory[STAGING][:] = 0xA5
        owner.resume()
        time.sleep(0.1)
        assert (memory[STAGING] == 0xA5).all()


def test_an_owner_closes_under_readers_that_take_nothing(both: Both) -> None:
    """Its memory may be unmapped afterwards, so no thread may still be sending from it."""
    owner, *_ = both
    connection, _regions = _dial_past_the_checks(owner)
    with connection:
        for _ in range(8):
            connection.sendall(_REQUEST.pack(0, 1) + np.array([0, 4 << 20], np.uint64).tobytes())
        time.sleep(0.1)
        owner.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "kv-tcp-serve" and thread.is_alive()]


def test_readers_that_die_in_mid_read_do_not_hurt_the_owner(both: Both) -> None:
    owner, reader, theirs, ours = both
    for _ in range(20):
        connection, _regions = _dial_past_the_checks(owner)
        connection.sendall(_REQUEST.pack(0, 1) + np.array([0, 4 << 20], np.uint64).tobytes())
        connection.recv(1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()  # with a reset, as the kernel does it for a process that was killed
    reader.read("p", WHOLE, 20.0)
    assert np.array_equal(ours[STAGING], theirs[ARENA])
    eventually(lambda: len([thread for thread in threading.enumerate() if thread.name == "kv-tcp-serve"]) == 1)


def test_a_stranger_that_says_nothing_is_cut_off(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, *_ = both
    monkeypatch.setattr(tcp, "_DIAL_S", 0.5)
    port = msgspec.msgpack.decode(owner.export(), type=Exported).port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
        greeting = b"".join(iter(lambda: stranger.recv(64), b""))
        assert greeting.startswith(b"tandem kv tcp 1")


# -- hand-offs between two processes


@pytest.fixture(params=["shm", "tcp"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reader(name: str) -> Iterator[Party]:
    party = open_party("d", make_transports([name]), limits=NodeLimits(piece_bytes=4096))
    yield party
    party.node.check_integrity()
    party.node.close()


def _offer(owner: PeerProcess, transfer_id: str, blocks: list[int], **more: object) -> bytes:
    return bytes.fromhex(owner.call(do="offer", transfer_id=transfer_id, blocks=blocks, **more))


def _expected(owner: PeerProcess, blocks: list[int]) -> list[bytes]:
    return [bytes.fromhex(owner.hello["blocks"][block]) for block in blocks]


def _fetch_and_compare(reader: Party, owner: PeerProcess, transfer_id: str, blocks: list[int]) -> str:
    """The transport that brought them."""
    fetched = reader.node.fetch(_offer(owner, transfer_id, blocks), 20.0)
    assert reader.staged(fetched.staged_id) == _expected(owner, blocks)
    reader.node.discard(fetched.staged_id)
    return fetched.transport


def test_blocks_cross_processes_byte_by_byte(name: str, reader: Party) -> None:
    with peer_process("node", name) as owner:
        lane = reader.node.connect(peer="p1", address=owner.hello["address"])
        assert (lane.transport, lane.refusal) == (name, "")
        assert lane.gigabytes_per_s > 0
        random = np.random.default_rng(5)
        for number in range(30):
            blocks = [int(b) for b in random.permutation(32)[: 1 + number % 16]]
            assert _fetch_and_compare(reader, owner, f"t{number}", blocks) == name
        ended: list[str] = []

        def all_ended() -> bool:
            ended.extend(owner.call(do="take_ended"))
            return len(ended) == 30

        eventually(all_ended)
        assert len(set(ended)) == 30


def test_a_lease_reused_in_mid_read_is_stale(name: str, reader: Party) -> None:
    with peer_process("node", name) as owner:
        reader.node.connect(peer="p1", address=owner.hello["address"])
        handle = _offer(owner, "t", [1, 2, 3])
        read = reader.transports[0].read
        done: list[object] = []

        def reuse_after_first(peer: str, segments: Segments, timeout_s: float) -> None:
            read(peer, segments, timeout_s)
            if not done:
                done.append(owner.call(do="reuse", transfer_id="t", blocks=[1, 2, 3]))

        reader.transports[0].read = reuse_after_first  # type: ignore[method-assign]
        with pytest.raises(FetchError) as raised:
            reader.node.fetch(handle, 20.0)
        assert raised.value.outcome is Outcome.STALE


def test_reads_that_race_with_reuse_are_stale_or_right(name: str) -> None:
    random = np.random.default_rng(6)
    outcomes: Counter[Outcome] = Counter()
    reader = open_party("d", make_transports([name]), lay=CHURN_LAYOUT, limits=NodeLimits(piece_bytes=1 << 18))
    with peer_process("churn", name) as owner:
        assert not reader.node.connect(peer="p1", address=owner.hello).refusal
        for number in range(1000, 1000 + 1000, 10):
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


def test_a_killed_owner_fails_the_fetch_and_its_successor_serves_the_next(name: str, reader: Party) -> None:
    with peer_process("node", name) as owner:
        _fetch_and_compare(reader, owner, "t0", [1, 2])
        handle = _offer(owner, "t1", [1, 2])
        owner.kill()
        with pytest.raises(FetchError) as raised:
            reader.node.fetch(handle, 20.0)
        assert raised.value.outcome is Outcome.FAILED
    assert reader.node.stats().staging_pages_free == 16
    with peer_process("node", name) as successor:
        _fetch_and_compare(reader, successor, "t0", [4])


def test_an_owner_that_hangs_costs_the_fetch_at_most_and_no_pages(name: str, reader: Party) -> None:
    with peer_process("node", name) as owner:
        reader.node.connect(peer="p1", address=owner.hello["address"])
        handle = _offer(owner, "t", [1, 2, 3])
        owner.stop()
        if name == "shm":  # the owner has no part in it
            fetched = reader.node.fetch(handle, 20.0)
            assert reader.staged(fetched.staged_id) == _expected(owner, [1, 2, 3])
            reader.node.discard(fetched.staged_id)
        else:
            with pytest.raises(FetchError) as raised:
                reader.node.fetch(handle, 0.2)
            assert raised.value.outcome is Outcome.FAILED
        stats = reader.node.stats()
        assert (stats.staging_pages_free, stats.quarantined_pages) == (16, 0)
        owner.resume()
        _fetch_and_compare(reader, owner, "u", [5])


# -- the choice


def test_a_pair_in_two_pid_namespaces_falls_through_to_tcp() -> None:
    reader = open_party("d", make_transports(["shm", "tcp"]))
    with peer_process("node", "shm,tcp", launcher=in_another_namespace()) as owner:
        lane = reader.node.connect(peer="p1", address=owner.hello["address"])
        assert (lane.transport, lane.refusal) == ("tcp", "")
        assert _fetch_and_compare(reader, owner, "t", [1, 2, 3]) == "tcp"
    reader.node.close()


def test_a_pair_that_can_use_none_says_why_for_each() -> None:
    reader = open_party("d", make_transports(["shm"]))
    with peer_process("node", "shm,tcp", launcher=in_another_namespace()) as owner:
        refusal = reader.node.connect(peer="p1", address=owner.hello["address"]).refusal
        assert "p1 can't be read: shm: " in refusal
    reader.node.close()


def test_the_reader_prefers_in_its_own_order() -> None:
    with peer_process("node", "shm,tcp") as owner:
        for names in (["tcp", "shm"], ["shm", "tcp"]):
            reader = open_party("d", make_transports(names))
            assert reader.node.connect(peer="p1", address=owner.hello["address"]).transport == names[0]
            reader.node.close()
