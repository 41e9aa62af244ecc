"""TLS from files that may change while a process runs.

    files = TlsFiles(cert="node.pem", key="node.key", ca="ca.pem")
    tls = Tls(files)                        raises TlsRefused for what can't be used
    server.add_secure_port(address, tls.server_credentials())
    grpc.aio.secure_channel(address, tls.channel_credentials(), options=tls.channel_options())

New connections use what the files hold at that time: gRPC servers look by themselves, others call `refresh` and make
new contexts. Files that can't be used (half written, a key of another certificate, expired) are refused with the reason
in the log, once, and what was read before stays in force.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from trust.files import Signature, signature

_FILE_BYTES_MAX = 1 << 20
#: Files are looked at no more often.
_LOOK_INTERVAL_S = 1.0

_INSTEAD = (
    "Whoever is on the way could read and change everything. Set them (docs/security.md tells how), or insecure = true "
    "where the network itself is trusted"
)

_log = logging.getLogger(__name__)


class TlsRefused(ValueError):
    """These files can't be used; says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files, and what is asked of the other side. Empty: no TLS."""

    #: What this process shows: its certificate, then those that lead from it to its authority.
    cert: str = ""
    #: Of that certificate. For its owner only (0600), or a group (0640).
    key: str = ""
    #: Certificates of the authorities believed when others show theirs. Empty: the system's for servers that are
    #: dialled, none for clients.
    ca: str = ""
    #: Of who connects: a certificate that `ca` vouches for. Without it, a router with a `ca` still asks for one, and
    #: goes on without.
    require_client_cert: bool = False
    #: A name that servers' certificates must carry, in place of the address dialled.
    server_name: str = ""
    #: Plaintext where other machines can listen in.
    insecure: bool = False

    @property
    def serves(self) -> bool:
        """Servers speak TLS."""
        return bool(self.cert)

    @property
    def dials(self) -> bool:
        """Clients speak TLS."""
        return bool(self.cert or self.ca)

    def problems(self) -> list[str]:
        """One line each, beginning with the key."""
        found = []
        if bool(self.cert) != bool(self.key):
            found.append(f"{'key' if self.cert else 'cert'}: must be given, too: a certificate and its key go together")
        if self.require_client_cert and not (self.ca and self.cert):
            found.append("require_client_cert: needs cert, key and ca")
        if self.insecure and self.cert:
            found.append("insecure: is true, yet there is a cert: take one of them away")
        if not found:
            try:
                load(self)
            except TlsRefused as refused:
                found.append(str(refused))
        return found

    def listen_problems(self, host: str) -> list[str]:
        """Why a server on this address may not speak plaintext."""
        if self.serves or self.insecure or is_loopback(host):
            return []
        return [f"cert: is not set, and {host} can be reached from other machines. {_INSTEAD}"]

    def dial_problems(self, host: str) -> list[str]:
        """Why a client may not speak plaintext to it."""
        if self.dials or self.insecure or is_loopback(host):
            return []
        return [f"ca: is not set, nor cert, and {host} is another machine. {_INSTEAD}"]

    def absolute(self) -> TlsFiles:
        """For a process that will run in another folder."""
        paths = {name: str(Path(path).absolute()) for name in ("cert", "key", "ca") if (path := getattr(self, name))}
        return replace(self, **paths)  # type: ignore[arg-type]  # paths only


PLAINTEXT = TlsFiles()


@dataclass(frozen=True, slots=True)
class Material:
    """What the files held at one time; it fits together."""

    cert: bytes
    key: bytes
    #: None: the system's.
    ca: bytes | None
    #: When the certificate ends, in seconds since 1970; None without one.
    expires: float | None


def load(files: TlsFiles) -> Material:
    """Raises TlsRefused, its text beginning with the key of the file at fault."""
    ca = _read("ca", files.ca) if files.ca else None
    if ca is not None:
        _check_ca(files.ca)
    if not files.cert:
        return Material(b"", b"", ca, None)
    cert, key = _read("cert", files.cert), _read("key", files.key, private=True)
    return Material(cert, key, ca, _check_pair(files, cert, key))


def _read(name: str, path: str, *, private: bool = False) -> bytes:
    try:
        with Path(path).open("rb") as file:
            if private and os.fstat(file.fileno()).st_mode & 0o007:
                raise TlsRefused(f"{name}: {path} may be used by everybody on this machine; chmod 600 it")
            content = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise TlsRefused(f"{name}: {path} cannot be read: {error.strerror}") from None
    if len(content) > _FILE_BYTES_MAX:
        raise TlsRefused(f"{name}: {path} is larger than {_FILE_BYTES_MAX} bytes")
    return content


def _check_ca(path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:
        raise TlsRefused(f"ca: {path} holds no certificates in PEM: {error}") from None


def _check_pair(files: TlsFiles, cert: bytes, key: bytes) -> float:
    """When the certificate ends."""
    # Here, as only processes with TLS need it.
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        chain = x509.load_pem_x509_certificates(cert)
    except ValueError:
        raise TlsRefused(f"cert: {files.cert} holds no certificate in PEM") from None
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError):  # the latter for one with a password
        raise TlsRefused(f"key: {files.key} holds no private key in PEM, or one with a password") from None
    public = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*public) != chain[0].public_key().public_bytes(*public):
        raise TlsRefused(f"key: {files.key} is not the key of the certificate in {files.cert}")
    begins, ends = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
    if not begins <= datetime.now(UTC) < ends:
        raise TlsRefused(f"cert: {files.cert} is valid from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC only")
    return ends.timestamp()


class Tls:
    """One process's TLS, as its files are now. Thread-safe: gRPC asks from threads of its own."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises TlsRefused."""
        self.files = files
        self._lock = threading.Lock()
        self._seen = _signature(files)
        self._looked_at = time.monotonic()
        self._material = load(files)
        #: By the protocols that they speak, and of which material they are.
        self._contexts: dict[tuple[str, ...], tuple[Material, ssl.SSLContext]] = {}

    @property
    def material(self) -> Material:
        """What is in force."""
        return self._material

    def refresh(self) -> Material:
        """Looks at the files, unless somebody did within the last second; what is in force now."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked_at >= _LOOK_INTERVAL_S:
                self._looked_at = now
                self._look()
            return self._material

    def _look(self) -> None:
        found = _signature(self.files)
        if found == self._seen:
            return
        self._seen = found
        try:
            material = load(self.files)
        except TlsRefused as refused:
            _log.error("TLS: %s; what was read before stays in force", refused)
            return
        if material != self._material:
            _log.info("TLS: certificates read again from %s", self.files.cert or self.files.ca)
            self._material = material

    # gRPC.

    def server_credentials(self, *, require_client_cert: bool | None = None) -> grpc.ServerCredentials:
        """New connections get what the files hold then. None: as the files' owner asks."""
        requires = self.files.require_client_cert if require_client_cert is None else require_client_cert
        given = self._material
        lock = threading.Lock()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            material = self.refresh()
            with lock:
                if material is given:
                    return None
                given = material
            return _configuration(material)

        first = _configuration(given)
        return grpc.dynamic_ssl_server_credentials(first, changed, requires)  # type: ignore[arg-type]  # None: no change

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For one channel: make new ones when dialling anew."""
        material = self.refresh()
        return grpc.ssl_channel_credentials(material.ca, material.key or None, material.cert or None)

    def channel_options(self) -> list[tuple[str, str]]:
        name = self.files.server_name
        return [("grpc.ssl_target_name_override", name)] if name else []

    # Sockets. The same context until the files change; ask again for each connection.

    def server_context(self, *protocols: str) -> ssl.SSLContext:
        """For servers that offer these protocols (ALPN). Asks for clients' certificates where there is an authority for
        them."""
        self.refresh()
        with self._lock:
            return self._context(protocols)

    def renewing_context(self, *protocols: str) -> ssl.SSLContext:
        """The same for asyncio's servers, which run long: each connection gets what is newest by then."""
        self.server_context(*protocols)  # raises what it raises now rather than then
        renewing = _Renewing(ssl.PROTOCOL_TLS_SERVER)
        renewing.newest = lambda: self.server_context(*protocols)
        return renewing

    def client_context(self) -> ssl.SSLContext:
        """Check against `files.server_name` where it is set."""
        self.refresh()
        with self._lock:
            return self._context(_CLIENT)

    def _context(self, protocols: tuple[str, ...]) -> ssl.SSLContext:
        made = self._contexts.get(protocols)
        if made is None or made[0] is not self._material:
            try:
                made = self._material, _made(self.files, protocols)
            except TlsRefused:
                # The files have changed again since they were read. The next look tells of it, and asks again.
                if made is None:
                    raise
                return made[1]
            self._contexts[protocols] = made
        return made[1]


class _Renewing(ssl.SSLContext):
    """Of another context for each connection. One that was changed for another in mid-handshake would still resume
    sessions (of TLS 1.2, by their id) of clients whose authority is not believed any more."""

    newest: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        return self.newest().wrap_bio(*arguments, **named)


#: Stands for what clients speak.
_CLIENT = ("client",)


def _made(files: TlsFiles, protocols: tuple[str, ...]) -> ssl.SSLContext:
    if protocols is _CLIENT:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not files.ca:
            context.load_default_certs()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if files.ca:
            context.verify_mode = ssl.CERT_REQUIRED if files.require_client_cert else ssl.CERT_OPTIONAL
        # A resumed session would be of the certificates of long ago.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        if protocols:
            context.set_alpn_protocols(list(protocols))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if files.ca:
            context.load_verify_locations(files.ca)
        if files.cert:
            context.load_cert_chain(files.cert, files.key)
    except (OSError, ssl.SSLError) as error:
        raise TlsRefused(f"{files.cert}, {files.ca}: {error}") from None
    return context


def expires(tls: Tls | None) -> float | None:
    """When the certificate in force ends, in seconds since 1970."""
    return None if tls is None else tls.material.expires


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca)


def _signature(files: TlsFiles) -> tuple[Signature, ...]:
    return tuple(signature(Path(path)) for path in (files.cert, files.key, files.ca) if path)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def certificate_names(auth_context: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """Of a verified certificate, from gRPC's `auth_context()`: the URIs (SPIFFE ids) and DNS names that it is for."""
    found = (*auth_context.get("peer_uri", ()), *(name.lower() for name in auth_context.get("peer_dns", ())))
    return tuple(name.decode(errors="replace") for name in found)
