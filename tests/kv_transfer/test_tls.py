"""The control side between nodes over TLS."""

from __future__ import annotations

import datetime
import ipaddress

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kv_transfer.peer import PeerCredentials
from tests.kv_transfer.nodes import World, eventually


@pytest.fixture(scope="module")
def credentials() -> PeerCredentials:
    """One certificate for 127.0.0.1 that everyone has and trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tandem test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return PeerCredentials(
        server=grpc.ssl_server_credentials([(private, certificate)], certificate, require_client_auth=True),
        channel=grpc.ssl_channel_credentials(certificate, private, certificate),
    )


def test_nodes_meet_and_release_over_tls(world: World, credentials: PeerCredentials) -> None:
    owner = world.open("p", credentials=credentials)
    reader = world.open("d", credentials=credentials)
    reader.node.discard(reader.node.fetch(owner.offer(), 10.0).staged_id)
    eventually(lambda: owner.node.take_ended() == ["t"])


def test_a_node_without_certificate_meets_nobody(world: World, credentials: PeerCredentials) -> None:
    owner = world.open("p", credentials=credentials)
    plain = world.open("d")
    assert "can't be reached" in plain.node.connect(peer="p", address=owner.node.address).refusal
