"""Certificates for tests: an authority, and what it vouches for."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from trust.tls import TlsFiles

_ALWAYS = timedelta(days=1)


class Authority:
    """Writes what it makes into a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = folder / f"{name}.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"tests' {name} of {folder.name}")])
        own = self._builder(self._name, self._key.public_key(), -_ALWAYS, _ALWAYS)
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        self.ca.write_bytes(_pem(own.sign(self._key, hashes.SHA256())))

    def issue(
        self,
        name: str,
        *uris: str,
        dns: Sequence[str] = (),
        ips: Sequence[str] = ("127.0.0.1",),
        begins: timedelta = -_ALWAYS,
        ends: timedelta = _ALWAYS,
        **changes: object,
    ) -> TlsFiles:
        """Files of a new certificate and its key. Written anew for a name that was there."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName(one) for one in dns]
        names += [x509.IPAddress(ipaddress.ip_address(one)) for one in ips]
        builder = self._builder(subject, key.public_key(), begins, ends)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        cert, private = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        private.touch(0o600)
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        cert.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))
        files = {"cert": str(cert), "key": str(private), "ca": str(self.ca), **changes}
        return TlsFiles(**files)  # type: ignore[arg-type]

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, begins: timedelta, ends: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
