"""API keys: `tdm_<env>_<key id>_<secret>_<checksum>`.

The prefix lets scanners of secrets find leaked ones, the id finds a key without trying all of them, the checksum tells
a typing error from a wrong key without asking anyone. Of the secret, 256 random bits, only HMAC-SHA256(pepper, secret)
is kept, in a file; the pepper is in another. A key is shown once, when it is made.

The file is written by `tandem key`, whole and by renaming, under a lock; routers read it again when it changes. It is
small: everything here reads and writes all of it.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import re
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import msgspec

from router.core.errors import Unauthenticated
from router.core.request import Lane
from router.edge.identity import Identity, Presented, Scope

PREFIX = "tdm_"
DEFAULT_ENV = "live"
#: For rotation: make the new one, move callers over, revoke the old one.
LIVE_KEYS_MAX = 2
#: Revoked and expired keys are kept, so that who still uses one is told so; of each tenant so many.
DEAD_KEYS_KEPT = 16

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_CHARS, _SECRET_CHARS, _CHECK_CHARS = 12, 43, 6
_KEY = re.compile(
    rf"tdm_([a-z0-9]{{1,16}})_([0-9A-Za-z]{{{_ID_CHARS}}})_([0-9A-Za-z]{{{_SECRET_CHARS}}})_([0-9A-Za-z]{{{_CHECK_CHARS}}})"
)
_ENV = re.compile(r"[a-z0-9]{1,16}")
_PEPPER_BYTES = 32
_FILE_BYTES_MAX = 64 * 1024 * 1024


class KeysRefused(ValueError):
    """What was asked of the key file cannot be done, or the file cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """Times are seconds since 1970."""

    id: str
    env: str
    tenant: str
    #: HMAC-SHA256(pepper, secret), in hex.
    hash: str
    scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})
    lane_max: Lane = Lane.REALTIME
    created: float
    expires: float | None = None
    revoked: float | None = None

    def state(self, now: float) -> str:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "live"


@dataclass(frozen=True, slots=True)
class Parts:
    env: str
    id: str
    secret: str


def checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECK_CHARS)


def parse(key: str) -> Parts | None:
    """None for what is not a whole key: something is missing, too much or mistyped."""
    match = _KEY.fullmatch(key)
    if match is None or checksum(key.rpartition("_")[0]) != match[4]:
        return None
    return Parts(match[1], match[2], match[3])


def keyed_hash(pepper: bytes, secret: str) -> str:
    return hmac.digest(pepper, secret.encode(), "sha256").hex()


# Not slotted: it remembers its index.
@dataclass(frozen=True)
class KeyStore:
    """All keys, as a value: changes give another one."""

    keys: tuple[StoredKey, ...] = ()

    @cached_property
    def _by_id(self) -> dict[str, StoredKey]:
        return {key.id: key for key in self.keys}

    def get(self, key_id: str) -> StoredKey | None:
        return self._by_id.get(key_id)

    def of(self, tenant: str) -> tuple[StoredKey, ...]:
        return tuple(key for key in self.keys if key.tenant == tenant)

    def create(
        self,
        pepper: bytes,
        tenant: str,
        now: float,
        *,
        env: str = DEFAULT_ENV,
        scopes: frozenset[Scope] = frozenset({Scope.INFERENCE}),
        lane_max: Lane = Lane.REALTIME,
        expires: float | None = None,
    ) -> tuple[KeyStore, StoredKey, str]:
        """The store with the new key, the new key, and what its user has to know. Raises KeysRefused."""
        if not tenant or not tenant.isprintable():
            raise KeysRefused("a key needs a tenant")
        if not _ENV.fullmatch(env):
            raise KeysRefused(f"env: must be 1 to 16 of a-z and 0-9, is {env!r}")
        if not scopes:
            raise KeysRefused("a key without a scope could do nothing")
        if expires is not None and expires <= now:
            raise KeysRefused("the key would have expired already")
        live = [key.id for key in self.of(tenant) if key.state(now) == "live"]
        if len(live) >= LIVE_KEYS_MAX:
            raise KeysRefused(
                f"tenant {tenant!r} has {len(live)} live keys, which is the most it may have: {', '.join(live)}; "
                "revoke one first"
            )
        key_id = _random(_ID_CHARS)
        secret = _random(_SECRET_CHARS)
        stored = StoredKey(
            id=key_id,
            env=env,
            tenant=tenant,
            hash=keyed_hash(pepper, secret),
            scopes=scopes,
            lane_max=lane_max,
            created=now,
            expires=expires,
        )
        body = f"{PREFIX}{env}_{key_id}_{secret}"
        return KeyStore((*self._without_the_oldest_dead(tenant, now), stored)), stored, f"{body}_{checksum(body)}"

    def revoke(self, key_id: str, now: float) -> KeyStore:
        """Idempotent. Raises KeysRefused for an id that is not here."""
        if self.get(key_id) is None:
            raise KeysRefused(f"there is no key {key_id!r}")
        return KeyStore(
            tuple(replace(key, revoked=now) if key.id == key_id and key.revoked is None else key for key in self.keys)
        )

    def _without_the_oldest_dead(self, tenant: str, now: float) -> Iterator[StoredKey]:
        dead = [key.id for key in self.of(tenant) if key.state(now) != "live"]
        forgotten = set(dead[: max(0, len(dead) - DEAD_KEYS_KEPT)])
        return (key for key in self.keys if key.id not in forgotten)


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def _base62(number: int, length: int) -> str:
    digits = ""
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits


class KeyVerifier:
    """Who presents a key of this store. Belongs to one event loop, as its edges do."""

    def __init__(self, store: KeyStore, pepper: bytes) -> None:
        #: Replaced when the file changes.
        self.store = store
        self._pepper = pepper

    async def identify(self, presented: Presented, now: float) -> Identity | None:
        if not presented.token.startswith(PREFIX):
            return None
        parts = parse(presented.token)
        if parts is None:
            raise Unauthenticated("KEY_MALFORMED", "the API key is not whole: a character is missing or mistyped")
        stored = self.store.get(parts.id)
        # Hashed whether the id is known or not, so that the time it takes says nothing.
        matches = hmac.compare_digest(keyed_hash(self._pepper, parts.secret), stored.hash if stored else "")
        if stored is None or not matches or stored.env != parts.env:
            raise Unauthenticated("KEY_UNKNOWN", "the API key is not one of this cluster's")
        state = stored.state(now)
        if state != "live":
            raise Unauthenticated(f"KEY_{state.upper()}", f"the API key {stored.id} is {state}")
        return Identity(tenant=stored.tenant, lane_max=stored.lane_max, scopes=stored.scopes, key_id=stored.id)


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    version: int = 1
    keys: list[StoredKey] = field(default_factory=list)


def read_store(path: Path) -> KeyStore:
    """Raises KeysRefused, OSError."""
    try:
        file = msgspec.json.decode(_read_private(path), type=_File)
    except msgspec.DecodeError as error:
        raise KeysRefused(f"{path}: {error}") from None
    if file.version != 1:
        raise KeysRefused(f"{path}: is of version {file.version}, this reads version 1")
    if len({key.id for key in file.keys}) < len(file.keys):
        raise KeysRefused(f"{path}: two keys have one id")
    return KeyStore(tuple(file.keys))


def read_pepper(path: Path) -> bytes:
    """Raises KeysRefused, OSError."""
    pepper = _read_private(path).strip()
    if len(pepper) < _PEPPER_BYTES:
        raise KeysRefused(f"{path}: must hold at least {_PEPPER_BYTES} bytes, has {len(pepper)}")
    return pepper


@contextmanager
def editing(store: Path, pepper: Path) -> Iterator[Editor]:
    """The key file, to be changed by nobody else meanwhile. Makes it, its folder and the pepper where there are none.
    Raises KeysRefused, OSError."""
    for path in (store, pepper):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(store.with_name(f".{store.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not pepper.exists():
            if store.exists():
                raise KeysRefused(f"{pepper} is missing, without which the keys in {store} are worth nothing")
            write_private(pepper, secrets.token_hex(_PEPPER_BYTES).encode() + b"\n")
        yield Editor(store, read_store(store) if store.exists() else KeyStore(), read_pepper(pepper))


@dataclass(slots=True)
class Editor:
    path: Path
    store: KeyStore
    pepper: bytes

    def save(self, store: KeyStore) -> None:
        self.store = store
        file = _File(keys=list(store.keys))
        write_private(self.path, msgspec.json.format(msgspec.json.encode(file)) + b"\n")


def write_private(path: Path, content: bytes) -> None:
    """Whole or not at all, and for the user alone."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_mode & 0o007:
            raise KeysRefused(f"{path}: everybody on this machine may use it; chmod 600 it")
        if status.st_size > _FILE_BYTES_MAX:
            raise KeysRefused(f"{path}: is larger than {_FILE_BYTES_MAX} bytes")
        return file.read()
