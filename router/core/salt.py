"""Who shares a prefix cache with whom. The salt is part of every prefix key, in the engines and in the index here."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from hmac import digest

from router.core.tenant import Tenant


def cache_salt(secret: bytes, tenant: Tenant) -> bytes:
    """Equal for tenants of one sharing group, different for everyone else, and nothing that a client can choose.

    Who doesn't know the secret can't tell from salts, or from anything made of them, who shares with whom.
    """
    assert secret
    group = tenant.sharing_group
    return _salt(secret, f"group\0{group}" if group else f"tenant\0{tenant.id}")


@lru_cache(maxsize=4096)
def _salt(secret: bytes, whom: str) -> bytes:
    return digest(secret, whom.encode(), sha256)
