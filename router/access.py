"""Who may call this router, as its configuration says: the tenants' book, the credentials, and the watch over the
files both come from."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from router.config import RouterConfig
from router.core.tenant import Tenant, TenantBook
from router.edge.identity import Anyone, Authenticator, Certificates, Operator, Verifier
from router.edge.jwt import JwtVerifier
from router.edge.keys import KeyStore, KeyVerifier, read_pepper, read_store
from router.tenant_admin import KeyFiles, TenantAdmin, nobody_else
from router.tenants import FileWatch, read_book
from trust.tls import Tls

_LOOK_INTERVAL_S = 1.0
_log = logging.getLogger(__name__)


class AccessRefused(Exception):
    """A file that says who may call cannot be used."""


@dataclass(frozen=True, slots=True)
class InForce:
    """What the files hold, or held when they could last be read: for a process that starts while they can't be."""

    tenants: TenantBook | None
    keys: KeyStore | None


@dataclass(slots=True)
class Access:
    authenticator: Authenticator
    #: Cache salts are derived from it.
    cache_secret: bytes
    #: Called when the book changed.
    on_book: Callable[[TenantBook], None]
    #: Of the ports for clients, and of that for workers; None: plaintext.
    tls: Tls | None = None
    worker_tls: Tls | None = None
    _tenants: FileWatch[TenantBook] | None = None
    _keys: KeyFiles | None = None

    @property
    def book(self) -> TenantBook:
        return self.authenticator.book

    def admin(self, everywhere: Callable[[], Awaitable[None]] = nobody_else) -> TenantAdmin:
        """`everywhere` returns when what changed is in force in other processes, too."""
        return TenantAdmin(lambda: self.book, self._tenants, self._keys, everywhere)

    def in_force(self) -> InForce:
        return InForce(
            tenants=None if self._tenants is None else self._tenants.content,
            keys=None if self._keys is None else self._keys.watch.content,
        )

    async def look(self) -> None:
        """When it returns, tenants and keys are in force as the files had them when it was called."""
        if self._tenants is not None:
            await self._tenants.look()
        if self._keys is not None:
            await self._keys.watch.look()

    async def watch(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._tenants is not None:
                tasks.create_task(self._tenants.run())
            if self._keys is not None:
                tasks.create_task(self._keys.watch.run())
            tasks.create_task(self._watch_certificates())

    async def _watch_certificates(self) -> None:
        """Servers look for themselves; this tells of files that can't be used before somebody connects."""
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            for tls in filter(None, (self.tls, self.worker_tls)):
                await asyncio.to_thread(tls.refresh)


def open_access(config: RouterConfig, before: InForce | None = None) -> Access:
    """Reads the files, but for those whose content was read `before`, by another process. Raises AccessRefused."""
    try:
        return _open_access(config, before or InForce(None, None))
    except (OSError, ValueError) as error:
        raise AccessRefused(str(error)) from None


def _open_access(config: RouterConfig, before: InForce) -> Access:
    auth = config.auth
    verifiers: list[Verifier] = [Operator(config.operator_key_hash)] if config.operator_key_hash else []
    book = TenantBook.open()
    access = Access(
        Authenticator(verifiers, book),
        secrets.token_bytes(32),
        lambda book: None,
        tls=Tls(config.tls) if config.tls.serves else None,
        worker_tls=Tls(config.worker_tls) if config.worker_tls.serves else None,
    )
    if auth.mode != "none" and auth.keys_file:
        pepper = read_pepper(auth.pepper_path)
        # The same for every router of these keys, so that what is cached for one is cached for all.
        access.cache_secret = hmac.digest(pepper, b"cache salts", "sha256")
        keys = KeyVerifier(KeyStore(), pepper)
        verifiers.append(keys)

        def put_keys(store: KeyStore) -> None:
            keys.store = store

        key_watch = FileWatch(Path(auth.keys_file), read_store, put_keys)
        put_keys(key_watch.load(before.keys))
        access._keys = KeyFiles(key_watch, auth.pepper_path)
    if auth.mode == "jwt":
        verifiers.append(JwtVerifier(auth.jwt))
    if auth.mode != "none":
        verifiers.append(Certificates(lambda: access.book))
    else:
        verifiers.append(Anyone())
        _log.warning(
            "UNAUTHENTICATED: whoever reaches %s may use this cluster, steer it and see all of its requests; "
            "auth.mode = keys, jwt or certificates changes that",
            config.host,
        )
    if config.tenants_file:
        read = read_book if auth.mode != "none" else _read_open_book

        def put_book(book: TenantBook) -> None:
            access.authenticator.book = book
            access.on_book(book)

        book_watch = FileWatch(Path(config.tenants_file), read, put_book)
        access.authenticator.book = book_watch.load(before.tenants)
        access._tenants = book_watch
    return access


def _read_open_book(path: Path) -> TenantBook:
    """Where nobody is asked who they are, everybody is somebody."""
    book = read_book(path)
    return book if book.unknown or "default" in book.tenants else replace(book, unknown=Tenant(id="default"))
