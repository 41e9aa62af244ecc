"""KV between nodes over TLS: the control side, and the bytes by `tcp`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kv_transfer.peer import PeerClient, PeerUnreachable
from kv_transfer.registry import make_transports
from kv_transfer.segments import one_segment
from kv_transfer.tcp import TcpTransport
from kv_transfer.transport import ARENA, STAGING, PeerGone, Segments, TransportError
from tests.certificates import Authority
from tests.kv_transfer.memory import Bytes
from tests.kv_transfer.nodes import SECRET, Party, World, eventually, open_party
from tests.kv_transfer.processes import STAGING_BYTES, memory_regions
from trust.tls import Tls, TlsFiles

WHOLE = one_segment(ARENA, 0, STAGING, 0, STAGING_BYTES)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Tls:
    return Tls(authority.issue("worker", require_client_cert=True))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """Of another authority."""
    return Tls(Authority(tmp_path_factory.mktemp("theirs")).issue("worker", require_client_cert=True))


# -- whole nodes


def over_tcp(name: str, tls: Tls | None) -> Party:
    return open_party(name, make_transports(["tcp"], tls=tls), tls=tls)


@pytest.fixture
def owner(tls: Tls) -> Iterator[Party]:
    party = over_tcp("p", tls)
    yield party
    party.node.close()


def test_nodes_meet_hand_off_and_release_over_tls(owner: Party, tls: Tls) -> None:
    reader = over_tcp("d", tls)
    assert reader.node.connect(peer="p", address=owner.node.address).transport == "tcp/tls"
    fetched = reader.node.fetch(owner.offer(), 10.0)
    assert fetched.transport == "tcp/tls"
    reader.node.discard(fetched.staged_id)
    eventually(lambda: owner.node.take_ended() == ["t"])
    reader.node.close()


def test_a_node_without_certificate_or_with_one_of_another_authority_meets_nobody(owner: Party, others: Tls) -> None:
    for name, tls in (("d1", None), ("d2", others)):
        reader = over_tcp(name, tls)
        assert "can't be reached" in reader.node.connect(peer="p", address=owner.node.address).refusal
        reader.node.close()


def test_who_shows_no_certificate_is_told_nothing_where_one_is_required(owner: Party, authority: Authority) -> None:
    believer = PeerClient(owner.node.address, secret=SECRET, tls=Tls(TlsFiles(ca=str(authority.ca))))
    with pytest.raises(PeerUnreachable):
        believer.describe("d", 20.0)
    believer.close()


def test_the_control_side_is_over_tls_whatever_moves_the_bytes(world: World, tls: Tls) -> None:
    owner, reader, plain = world.open("p", tls=tls), world.open("d", tls=tls), world.open("e")
    reader.node.discard(reader.node.fetch(owner.offer(), 10.0).staged_id)
    eventually(lambda: owner.node.take_ended() == ["t"])
    assert "can't be reached" in plain.node.connect(peer="p", address=owner.node.address).refusal


# -- the transport alone, for who holds its export


class End:
    def __init__(self, tls: Tls | None, seed: int) -> None:
        self.transport = TcpTransport(tls=tls)
        regions, self.memory = memory_regions(seed)
        self.transport.register(regions)

    @property
    def staging(self) -> Bytes:
        return self.memory[STAGING]


def test_reads_over_tls_bring_the_bytes(tls: Tls) -> None:
    owner, reader = End(tls, 1), End(tls, 7)
    reader.transport.connect("p", "i1", owner.transport.export())
    reader.transport.read("p", WHOLE, 20.0)
    assert np.array_equal(reader.staging, owner.memory[ARENA])
    every_second = np.arange(0, STAGING_BYTES, 32768, dtype=np.uint64)
    segments = Segments(ARENA, STAGING, every_second, every_second[::-1].copy(), np.full_like(every_second, 16384))
    reader.transport.read("p", segments, 20.0)
    for remote, local in zip(every_second.tolist(), every_second[::-1].tolist(), strict=True):
        assert np.array_equal(reader.staging[local : local + 16384], owner.memory[ARENA][remote : remote + 16384])
    owner.transport.close()
    with pytest.raises(PeerGone):
        reader.transport.read("p", WHOLE, 20.0)
    reader.transport.close()


def test_tls_and_none_do_not_meet_and_strangers_get_no_handshake(tls: Tls, others: Tls, authority: Authority) -> None:
    owner, plain, stranger = End(tls, 1), End(None, 2), End(others, 3)
    renamed = End(Tls(authority.issue("elsewhere", ips=(), dns=["elsewhere.example"])), 4)
    with pytest.raises(TransportError, match="serves TLS only"):
        plain.transport.connect("p", "i1", owner.transport.export())
    with pytest.raises(TransportError, match="no TLS, which is wanted here"):
        owner.transport.connect("p", "i1", plain.transport.export())
    with pytest.raises(TransportError, match="can't be dialled"):
        stranger.transport.connect("p", "i1", owner.transport.export())
    with pytest.raises(TransportError, match="can't be dialled"):  # it is another host's certificate
        owner.transport.connect("p", "i1", renamed.transport.export())
    for end in (owner, plain, stranger, renamed):
        end.transport.close()


def test_a_servers_name_may_be_other_than_its_address(authority: Authority) -> None:
    files = authority.issue("named", ips=(), dns=["worker.example"], server_name="worker.example")
    owner, reader = End(Tls(files), 1), End(Tls(files), 7)
    reader.transport.connect("p", "i1", owner.transport.export())
    reader.transport.read("p", WHOLE, 20.0)
    assert np.array_equal(reader.staging, owner.memory[ARENA])
    reader.transport.close()
    owner.transport.close()
