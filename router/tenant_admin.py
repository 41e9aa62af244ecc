"""Operators' calls about tenants and keys: changes to this router's files, in force before the call is answered.

The files stay the truth, so what is changed here outlives the router and other routers of the same files follow. A
router without such a file, or that may not write it (a mounted ConfigMap), refuses: then tenants are managed elsewhere.
"""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from router.core.errors import AlreadyExists, Invalid, ManagedElsewhere, NotFound
from router.core.request import Lane
from router.core.tenant import BookRefused, Tenant, TenantBook
from router.edge import keys
from router.edge.identity import Scope
from router.edge.keys import KeysRefused, KeyStore, StoredKey
from router.tenants import FileWatch
from router.tenants_edit import NoTenant, Refused, TenantExists, add, change, parsed, remove

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeyFiles:
    watch: FileWatch[KeyStore]
    pepper: Path


async def nobody_else() -> None:
    """There is one process."""


class TenantAdmin:
    """Belongs to one event loop; files are changed in a thread, one call at a time."""

    def __init__(
        self,
        book: Callable[[], TenantBook],
        tenants: FileWatch[TenantBook] | None,
        keys: KeyFiles | None,
        everywhere: Callable[[], Awaitable[None]] = nobody_else,
    ) -> None:
        """`everywhere` returns when what changed is in force in this router's other processes."""
        #: The book in force.
        self._book = book
        self._tenants = tenants
        self._keys = keys
        self._everywhere = everywhere
        self._one = asyncio.Lock()

    def tenants(self) -> tuple[Tenant, ...]:
        return tuple(self._book().tenants.values())

    async def add(self, name: str, fields: Mapping[str, str]) -> Tenant:
        await self._edit(name, lambda path: add(path, name, parsed(fields)))
        return self._book().tenants[name]

    async def change(self, name: str, fields: Mapping[str, str]) -> Tenant:
        await self._edit(name, lambda path: change(path, name, parsed(fields)))
        return self._book().tenants[name]

    async def remove(self, name: str) -> None:
        await self._edit(name, lambda path: remove(path, name))

    async def keys(self, tenant: str) -> tuple[StoredKey, ...]:
        files = self._key_files()
        store = await self._do(lambda: keys.read_store(files.watch.path))
        return store.of(tenant) if tenant else store.keys

    async def create_key(
        self, tenant: str, now: float, *, scopes: frozenset[Scope], lane_max: Lane, expires: float | None, env: str
    ) -> tuple[StoredKey, str]:
        """The key as it is kept, and what its user has to know."""
        files = self._key_files()

        def create() -> tuple[StoredKey, str]:
            with keys.editing(files.watch.path, files.pepper) as editor:
                store, stored, secret = editor.store.create(
                    editor.pepper, tenant, now, env=env, scopes=scopes, lane_max=lane_max, expires=expires
                )
                editor.save(store)
            return stored, secret

        made = await self._do(create)
        await files.watch.look()
        await self._everywhere()
        return made

    async def revoke_key(self, key_id: str, now: float) -> None:
        files = self._key_files()

        def revoke() -> None:
            with keys.editing(files.watch.path, files.pepper) as editor:
                if editor.store.get(key_id) is None:
                    raise NotFound("key", key_id, f"there is no key {key_id!r}")
                editor.save(editor.store.revoke(key_id, now))

        await self._do(revoke)
        await files.watch.look()
        await self._everywhere()

    async def _edit(self, name: str, edit: Callable[[Path], Any]) -> None:
        if self._tenants is None:
            raise ManagedElsewhere("this router has no tenants file (router.tenants_file)")
        path = self._tenants.path
        try:
            await self._do(lambda: edit(path))
        except NoTenant as refused:
            raise NotFound("tenant", name, str(refused)) from None
        except TenantExists as refused:
            raise AlreadyExists(str(refused), reason="TENANT_EXISTS") from None
        await self._tenants.look()
        await self._everywhere()

    def _key_files(self) -> KeyFiles:
        if self._keys is None:
            raise ManagedElsewhere("this router has no key file (router.auth.keys_file)")
        return self._keys

    async def _do(self, work: Callable[[], T]) -> T:
        async with self._one:
            try:
                return await asyncio.to_thread(work)
            except (NoTenant, TenantExists):
                raise
            except BookRefused as refused:
                raise Invalid("tenant", "\n".join(map(str, refused.problems))) from None
            except (Refused, KeysRefused, tomllib.TOMLDecodeError) as refused:
                raise Invalid("tenant", str(refused)) from None
            except OSError as error:
                raise ManagedElsewhere(f"{error.filename}: {error.strerror}") from None
