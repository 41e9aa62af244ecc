"""JSON Web Tokens of an identity provider: who signs them, for whom, and which claims name tenant, lane and scopes.

Only asymmetric algorithms on a list, so a public key can never be taken for a shared secret; a key is used only with
the algorithm it is made for. Keys come from a JWKS, a file or an https URL. A token signed by a key that is not known
has the set fetched again, but not more often than a floor allows, so made-up key ids cost nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import jwt

from router.config import JwtRules
from router.core.errors import Unauthenticated, Unavailable
from router.core.request import Lane
from router.edge.identity import Identity, Presented, Scope

_JWKS_BYTES_MAX = 1024 * 1024
_FETCH_TIMEOUT_S = 5.0
_NAME_CHARS_MAX = 256
_SCOPE_PREFIX = "tandem:"

_log = logging.getLogger(__name__)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead off https."""

    def redirect_request(self, *args: object) -> None:
        return None


def fetch(source: str) -> bytes:
    """A JWKS, from a file or a URL. Blocks, for a bounded time. Raises OSError."""
    if "://" not in source:
        with Path(source).open("rb") as file:
            return _bounded(file.read(_JWKS_BYTES_MAX + 1))
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(source, timeout=_FETCH_TIMEOUT_S) as response:
            return _bounded(response.read(_JWKS_BYTES_MAX + 1))
    except (HTTPException, ValueError) as error:
        raise OSError(f"{source}: {error}") from None


def _bounded(content: bytes) -> bytes:
    if len(content) > _JWKS_BYTES_MAX:
        raise OSError(f"a JWKS of more than {_JWKS_BYTES_MAX} bytes")
    return content


@dataclass(slots=True)
class KeySet:
    """The issuer's public keys, by id. What can't be fetched anew stays in force."""

    source: str
    interval_s_min: float
    age_s_max: float
    clock: Callable[[], float] = time.monotonic
    #: As in the JWKS; without the shared secrets and encryption keys that one may hold, too.
    _keys: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _tried_at: float | None = None
    _fetching: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def get(self, key_id: str) -> Mapping[str, Any] | None:
        """An empty id means the only key, if there is one only."""
        if not self._is_known(key_id) or self._is_older_than(self.age_s_max):
            async with self._fetching:
                # Another one may have fetched it while this one waited.
                is_due = self._is_older_than(self.interval_s_min)
                if is_due and (not self._is_known(key_id) or self._is_older_than(self.age_s_max)):
                    await self._fetch()
        if not self._keys:
            raise Unavailable(
                "KEYS_UNAVAILABLE", "the issuer's keys can't be fetched", retry_after_s=self.interval_s_min
            )
        return self._keys[key_id or next(iter(self._keys))] if self._is_known(key_id) else None

    def _is_known(self, key_id: str) -> bool:
        return key_id in self._keys if key_id else len(self._keys) == 1

    def _is_older_than(self, age_s: float) -> bool:
        return self._tried_at is None or self.clock() - self._tried_at >= age_s

    async def _fetch(self) -> None:
        self._tried_at = self.clock()
        try:
            found = _public_keys(await asyncio.to_thread(fetch, self.source))
        except (OSError, ValueError) as error:
            _log.warning("%s: %s; %d keys stay in force", self.source, error, len(self._keys))
            return
        if found.keys() != self._keys.keys():
            _log.info("%s: keys %s", self.source, ", ".join(sorted(found)))
        self._keys = found


def _public_keys(text: bytes) -> dict[str, Mapping[str, Any]]:
    """Raises ValueError."""
    document = json.loads(text)
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        raise ValueError("is no JWKS: it has no list of keys")
    found: dict[str, Mapping[str, Any]] = {
        str(key.get("kid", "")): key
        for key in keys
        if isinstance(key, dict) and key.get("kty") in ("RSA", "EC", "OKP") and key.get("use", "sig") == "sig"
    }
    if not found:
        raise ValueError("holds no public key that signs")
    return found


class JwtVerifier:
    """Who presents a token of the issuer. Belongs to one event loop."""

    def __init__(self, rules: JwtRules, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules = rules
        self._keys = KeySet(rules.jwks, rules.jwks_fetch_interval_s_min, rules.jwks_age_s_max, clock)

    async def identify(self, presented: Presented, now: float) -> Identity | None:
        if presented.token.count(".") != 2:
            return None
        claims = await self._claims(presented.token)
        return Identity(
            tenant=self._tenant(claims),
            lane_max=self._lane(claims),
            scopes=self._scopes(claims),
            key_id=_text(claims, "sub") or "",
        )

    async def _claims(self, token: str) -> Mapping[str, Any]:
        rules = self._rules
        try:
            header = jwt.get_unverified_header(token)
            algorithm = header.get("alg")
            if algorithm not in rules.algorithms:
                raise Unauthenticated("TOKEN_ALGORITHM", "the token's signature algorithm is not accepted here")
            data = await self._keys.get(str(header.get("kid", "")))
            if data is None or data.get("alg", algorithm) != algorithm:
                raise Unauthenticated("TOKEN_KEY_UNKNOWN", "the token is signed by a key that the issuer does not list")
            return jwt.decode(
                token,
                jwt.PyJWK(dict(data), algorithm),
                algorithms=[algorithm],
                issuer=rules.issuer,
                audience=rules.audience,
                leeway=rules.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("TOKEN_EXPIRED", "the token is expired") from None
        except jwt.ImmatureSignatureError:
            raise Unauthenticated("TOKEN_NOT_YET_VALID", "the token is not valid yet") from None
        except jwt.InvalidAudienceError:
            raise Unauthenticated("TOKEN_AUDIENCE", "the token is for another audience") from None
        except jwt.InvalidIssuerError:
            raise Unauthenticated("TOKEN_ISSUER", "the token is of another issuer") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated("TOKEN_CLAIM", f"the token has no claim {error.claim!r}") from None
        except jwt.PyJWTError:
            raise Unauthenticated("TOKEN_INVALID", "the token is malformed or its signature does not hold") from None

    def _tenant(self, claims: Mapping[str, Any]) -> str:
        tenant = _text(claims, self._rules.tenant_claim)
        if not tenant:
            raise Unauthenticated("TOKEN_CLAIM", f"the token names no tenant in its claim {self._rules.tenant_claim!r}")
        return tenant

    def _lane(self, claims: Mapping[str, Any]) -> Lane:
        name = self._rules.lane_claim
        if not name:
            return Lane.REALTIME
        try:
            return Lane(claims.get(name))
        except ValueError:
            raise Unauthenticated("TOKEN_CLAIM", f"the token names no lane in its claim {name!r}") from None

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[Scope]:
        name = self._rules.scope_claim
        if not name:
            return frozenset({Scope.INFERENCE})
        said = claims.get(name, ())
        words = said.split() if isinstance(said, str) else said if isinstance(said, list) else ()
        return frozenset(scope for scope in Scope if f"{_SCOPE_PREFIX}{scope.value}" in words)


def _text(claims: Mapping[str, Any], name: str) -> str | None:
    value = claims.get(name)
    return value if isinstance(value, str) and value.isprintable() and len(value) <= _NAME_CHARS_MAX else None
