"""What every transport must do. A new transport adds a line to `HARNESSES`, and nothing else here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from kv_transfer.inproc import InprocHub
from kv_transfer.registry import make_transports
from kv_transfer.segments import one_segment
from kv_transfer.transport import ARENA, BOARD, STAGING, PeerGone, Segments, Transport, TransportError
from tests.kv_transfer.memory import Bytes
from tests.kv_transfer.processes import STAGING_BYTES, PeerProcess, exported_memory, memory_regions


class Owner:
    """Who is read from. `arena` and `board` are what must arrive."""

    def __init__(self, exported: bytes, seed: int, kill: Callable[[], None]) -> None:
        self.exported = exported
        self.arena, self.board = exported_memory(seed)
        self.kill = kill


class InprocHarness:
    """Both ends in this process."""

    def __init__(self, cleanup: ExitStack) -> None:
        self.cleanup = cleanup
        self.hub = InprocHub()

    def make(self) -> Transport:
        return make_transports(["inproc"], hub=self.hub)[0]

    def owner(self, seed: int) -> Owner:
        transport = self.make()
        regions, memory = memory_regions(seed)
        transport.register(regions)
        self.cleanup.callback(memory.clear)
        return Owner(transport.export(), seed, transport.close)


class ProcessHarness:
    """The owner is another process."""

    def __init__(self, cleanup: ExitStack, name: str) -> None:
        self.cleanup = cleanup
        self.name = name

    def make(self) -> Transport:
        return make_transports([self.name])[0]

    def owner(self, seed: int) -> Owner:
        process = PeerProcess("transport", self.name, seed)
        self.cleanup.callback(process.close)
        return Owner(bytes.fromhex(process.hello), seed, process.kill)


HARNESSES: dict[str, Callable[[ExitStack], InprocHarness | ProcessHarness]] = {
    "inproc": InprocHarness,
    "nixl": lambda cleanup: ProcessHarness(cleanup, "nixl"),
    "shm": lambda cleanup: ProcessHarness(cleanup, "shm"),
    "tcp": lambda cleanup: ProcessHarness(cleanup, "tcp"),
}
if "ucxx" in sys.modules:  # not beside NIXL: test_ucx.py runs these in a process of its own
    HARNESSES = {"ucx": lambda cleanup: ProcessHarness(cleanup, "ucx")}
_NEEDS = {"nixl": "nixl_cu12"}


class Reader:
    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        regions, memory = memory_regions(7)
        transport.register(regions)
        self.memory = memory

    @property
    def staging(self) -> Bytes:
        return self.memory[STAGING]

    def read(self, segments: Segments, peer: str = "p", timeout_s: float = 20.0) -> None:
        self.transport.read(peer, segments, timeout_s)


@pytest.fixture(params=HARNESSES, scope="module")
def harness(request: pytest.FixtureRequest) -> Iterator[InprocHarness | ProcessHarness]:
    name = request.param
    if name in _NEEDS and importlib.util.find_spec(_NEEDS[name]) is None:
        pytest.skip(f"{_NEEDS[name]} is not installed")
    with ExitStack() as cleanup:
        yield HARNESSES[name](cleanup)


@pytest.fixture
def reader(harness: InprocHarness | ProcessHarness) -> Iterator[Reader]:
    reader = Reader(harness.make())
    yield reader
    reader.transport.close()


@pytest.fixture(scope="module")
def lasting(harness: InprocHarness | ProcessHarness) -> Owner:
    return harness.owner(1)


@pytest.fixture
def owner(reader: Reader, lasting: Owner) -> Owner:
    """Connected as "p". Not to be killed: others read from it too."""
    reader.transport.connect("p", "i1", lasting.exported)
    return lasting


@pytest.fixture
def mortal(harness: InprocHarness | ProcessHarness, reader: Reader) -> Owner:
    """Connected as "p"."""
    owner = harness.owner(2)
    reader.transport.connect("p", "i1", owner.exported)
    return owner


def scattered(seed: int, count: int, size: int) -> Segments:
    """`count` reads of up to `size` bytes from anywhere in the arena into staging, never overlapping there."""
    random = np.random.default_rng(seed)
    slots = random.permutation(STAGING_BYTES // size)[:count].astype(np.uint64)
    sources = random.integers(0, STAGING_BYTES // size, count, dtype=np.uint64)
    sizes = random.integers(1, size + 1, count, dtype=np.uint64)
    return Segments(ARENA, STAGING, sources * np.uint64(size), slots * np.uint64(size), sizes)


def expected(segments: Segments, source: Bytes, before: Bytes) -> Bytes:
    after = before.copy()
    for remote, local, size in zip(
        segments.remote.tolist(), segments.local.tolist(), segments.sizes.tolist(), strict=True
    ):
        after[local : local + size] = source[remote : remote + size]
    return after


@pytest.mark.parametrize(("count", "size"), [(1, 8), (1, 1 << 22), (300, 4096), (7, 65536), (64, 1)])
def test_scattered_reads_bring_those_bytes_and_touch_no_others(
    reader: Reader, owner: Owner, count: int, size: int
) -> None:
    reader.staging[:] = 0xA5
    segments = scattered(count, count, size)
    want = expected(segments, owner.arena, reader.staging)
    reader.read(segments)
    assert np.array_equal(reader.staging, want)


def test_the_board_is_read_like_the_arena_and_lands_where_asked(reader: Reader, owner: Owner) -> None:
    reader.read(one_segment(BOARD, 4096, BOARD, 128, 16))
    assert np.array_equal(reader.memory[BOARD][128:144], owner.board[4096:4112])
    reader.read(one_segment(BOARD, 0, STAGING, 0, 100))
    assert np.array_equal(reader.staging[:100], owner.board[:100])


def test_a_read_of_nothing_is_no_error(reader: Reader, owner: Owner) -> None:
    nothing = np.empty(0, np.uint64)
    reader.read(Segments(ARENA, STAGING, nothing, nothing, nothing))


@pytest.mark.parametrize(
    "segments",
    [
        one_segment(ARENA, (4 << 20) - 7, STAGING, 0, 8),
        one_segment(ARENA, 0, STAGING, STAGING_BYTES - 7, 8),
        one_segment(ARENA, 2**64 - 8, STAGING, 0, 16),
        one_segment(BOARD, 1 << 16, STAGING, 0, 1),
        one_segment("attic", 0, STAGING, 0, 8),
        one_segment(ARENA, 0, "attic", 0, 8),
    ],
)
def test_reads_out_of_bounds_are_refused_before_a_byte_moves(reader: Reader, owner: Owner, segments: Segments) -> None:
    reader.staging[:] = 0xA5
    with pytest.raises(TransportError):
        reader.read(segments)
    assert (reader.staging == 0xA5).all()
    reader.read(one_segment(ARENA, 0, STAGING, 0, 8))


def test_a_peer_nobody_connected_is_gone(reader: Reader) -> None:
    with pytest.raises(PeerGone):
        reader.read(one_segment(ARENA, 0, STAGING, 0, 8), peer="stranger")
    reader.transport.disconnect("stranger")


def test_a_disconnected_peer_is_gone_and_can_be_connected_again(reader: Reader, owner: Owner) -> None:
    for _ in range(3):
        reader.transport.disconnect("p")
        with pytest.raises(PeerGone):
            reader.read(one_segment(ARENA, 0, STAGING, 0, 8))
        reader.transport.connect("p", "i1", owner.exported)
        reader.staging[:8] = 0
        reader.read(one_segment(ARENA, 0, STAGING, 0, 8))
        assert np.array_equal(reader.staging[:8], owner.arena[:8])


@pytest.mark.parametrize("exported", [b"", b"\0" * 40, b"what is this"])
def test_what_no_peer_exported_is_refused(reader: Reader, exported: bytes) -> None:
    with pytest.raises(TransportError):
        reader.transport.connect("p", "i1", exported)
    with pytest.raises(PeerGone):
        reader.read(one_segment(ARENA, 0, STAGING, 0, 8))


def test_reads_from_a_killed_peer_fail_and_keep_failing(reader: Reader, mortal: Owner) -> None:
    reader.read(one_segment(ARENA, 0, STAGING, 0, 8))
    mortal.kill()
    for _ in range(3):
        with pytest.raises(PeerGone):
            reader.read(scattered(3, 8, 4096))
    reader.transport.disconnect("p")


def test_a_second_incarnation_replaces_the_first(
    harness: InprocHarness | ProcessHarness, reader: Reader, mortal: Owner
) -> None:
    reader.read(one_segment(ARENA, 0, STAGING, 0, 4096))
    mortal.kill()
    with pytest.raises(PeerGone):
        reader.read(one_segment(ARENA, 0, STAGING, 0, 4096))
    again = harness.owner(3)
    reader.transport.connect("p", "i2", again.exported)
    reader.read(one_segment(ARENA, 0, STAGING, 0, 4096))
    assert np.array_equal(reader.staging[:4096], again.arena[:4096])


def test_peers_do_not_get_mixed_up(harness: InprocHarness | ProcessHarness, reader: Reader, owner: Owner) -> None:
    other = harness.owner(2)
    reader.transport.connect("q", "i1", other.exported)
    reader.read(one_segment(ARENA, 0, STAGING, 0, 4096), peer="p")
    reader.read(one_segment(ARENA, 0, STAGING, 4096, 4096), peer="q")
    assert np.array_equal(reader.staging[:4096], owner.arena[:4096])
    assert np.array_equal(reader.staging[4096:8192], other.arena[:4096])
    other.kill()
    reader.read(one_segment(ARENA, 0, STAGING, 0, 8), peer="p")


def test_several_threads_read_at_once(reader: Reader, owner: Owner) -> None:
    reader.staging[:] = 0
    lanes = [
        Segments(
            ARENA,
            STAGING,
            np.arange(64, dtype=np.uint64) * np.uint64(4096),
            (np.arange(64, dtype=np.uint64) + np.uint64(64 * lane)) * np.uint64(4096),
            np.full(64, 4096, np.uint64),
        )
        for lane in range(4)
    ]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(reader.read, lanes * 5))
    for lane in range(4):
        start = lane * 64 * 4096
        assert np.array_equal(reader.staging[start : start + 64 * 4096], owner.arena[: 64 * 4096])


def test_a_process_can_read_from_itself(reader: Reader) -> None:
    reader.transport.connect("me", "i1", reader.transport.export())
    reader.read(one_segment(ARENA, 4096, STAGING, 0, 4096), peer="me")
    assert np.array_equal(reader.staging[:4096], reader.memory[ARENA][4096:8192])
    reader.transport.disconnect("me")


def test_closing_may_come_twice_and_with_peers(harness: InprocHarness | ProcessHarness, owner: Owner) -> None:
    reader = Reader(harness.make())
    reader.transport.connect("p", "i1", owner.exported)
    reader.transport.close()
    reader.transport.close()
