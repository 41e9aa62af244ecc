"""Who is asking, and what they may. Edges present what came with a request; what comes back is the caller.

Nothing a client writes into a request raises what its credential allows: the tenant is the credential's, the lane may
only be lowered, and cache salts are derived from the tenant by the core.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from router.core.errors import PermissionDenied, Rejected, Unauthenticated
from router.core.request import Lane
from router.core.tenant import LANES, Tenant, TenantBook
from router.refusals import Refusals, source_of
from trust.tls import certificate_names

#: Longer ones are nobody's.
_TOKEN_CHARS_MAX = 8192
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


class Scope(Enum):
    """What a credential is for."""

    INFERENCE = "inference"
    #: Operators' calls: seeing and steering the cluster, across tenants.
    ADMIN = "admin"


EVERY_SCOPE = frozenset(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a credential vouches for."""

    tenant: str
    #: The highest lane it may use, whatever its tenant may.
    lane_max: Lane = Lane.REALTIME
    scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})
    #: Names the credential in logs; never the secret.
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class Presented:
    """What came with a call that can tell who makes it."""

    token: str = ""
    #: Of a peer certificate that the transport verified: its URIs (SPIFFE ids) and DNS names.
    certificate_names: tuple[str, ...] = ()
    #: The other end's address, as gRPC names it or plain; empty where that is not known.
    peer: str = ""
    #: Of the call's W3C trace context (`traceparent`): the trace that it is part of; empty without one that is valid.
    trace_id: str = ""

    @property
    def source(self) -> str:
        """See `router.refusals`."""
        return source_of(self.peer) if self.peer else ""


#: Nothing came.
NOBODY = Presented()


@dataclass(frozen=True, slots=True)
class Caller:
    """A client that may generate, as its tenant."""

    identity: Identity
    tenant: Tenant

    def lane(self, asked: Lane | None) -> Lane:
        """The lane asked for, or the next lower one it may use: asking never raises. Raises PermissionDenied when its
        tenant has no lane that the credential may use."""
        wanted = asked or self.tenant.default_lane or Lane.STANDARD
        lane = self.tenant.lane_for(max(wanted, self.identity.lane_max, key=LANES.index))
        if LANES.index(lane) < LANES.index(self.identity.lane_max):
            raise PermissionDenied(
                "LANE_DENIED", f"the credential may use no lane above {self.identity.lane_max.value}"
            )
        return lane


class Verifier(Protocol):
    """One kind of credential."""

    async def identify(self, presented: Presented, now: float) -> Identity | None:
        """`now`: seconds since 1970. None when nothing of this kind is presented; raises Unauthenticated when it is
        and does not hold."""
        ...


class Anyone:
    """For a laptop: all callers are one tenant and may do everything."""

    def __init__(self) -> None:
        self._identity = Identity(tenant="default", scopes=EVERY_SCOPE)

    async def identify(self, presented: Presented, now: float) -> Identity:
        return self._identity


class Operator:
    """Whoever started this router, by a key that was made for that run."""

    def __init__(self, key_hash: str) -> None:
        self._hash = key_hash
        self._identity = Identity(tenant="", scopes=frozenset({Scope.ADMIN}), key_id="operator")

    async def identify(self, presented: Presented, now: float) -> Identity | None:
        found = hashlib.sha256(presented.token.encode()).hexdigest()
        return self._identity if hmac.compare_digest(found, self._hash) else None


class Certificates:
    """Tenants by the names in their certificates. A key or a token that comes with the call goes before those."""

    def __init__(self, book: Callable[[], TenantBook]) -> None:
        self._book = book
        self._indexed: TenantBook | None = None
        self._tenant_of: dict[str, str] = {}

    async def identify(self, presented: Presented, now: float) -> Identity | None:
        if presented.token or not presented.certificate_names:
            return None
        book = self._book()
        if book is not self._indexed:
            self._tenant_of = {
                name if "://" in name else name.lower(): tenant.id
                for tenant in book.tenants.values()
                for name in tenant.certificates
            }
            self._indexed = book
        named = {name: self._tenant_of[name] for name in presented.certificate_names if name in self._tenant_of}
        if len(set(named.values())) > 1:
            raise Unauthenticated("CERTIFICATE_AMBIGUOUS", "the certificate has names of more than one tenant")
        for name, tenant in named.items():
            return Identity(tenant=tenant, key_id=name)
        if book.unknown is None:
            raise Unauthenticated("CERTIFICATE_UNKNOWN", "no name in the certificate is a tenant's")
        return Identity(tenant="")  # all of these are one, however many certificates they have


class Authenticator:
    """What the edges ask, whatever credentials there are. Belongs to one event loop."""

    def __init__(
        self, verifiers: Sequence[Verifier], book: TenantBook, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._verifiers = verifiers
        #: The book in force; replaced when it changes.
        self.book = book
        self._wall_clock = wall_clock
        #: Of credentials. Good ones are never slowed down, whatever else comes from their source.
        self.refusals = Refusals("credentials", burst=30, per_s=1)

    @property
    def is_open(self) -> bool:
        """Nobody is asked who they are."""
        return any(isinstance(verifier, Anyone) for verifier in self._verifiers)

    async def caller(self, presented: Presented) -> Caller:
        """Who wants to generate. Raises Unauthenticated, PermissionDenied."""
        identity = await self.identify(presented, Scope.INFERENCE)
        tenant = self.book.tenant(identity.tenant)
        if tenant is None:
            unknown = PermissionDenied("TENANT_UNKNOWN", "the credential's tenant does not exist")
            self.refusals.note(presented.source, unknown, identity.tenant)
            raise unknown
        return Caller(identity, tenant)

    async def identify(self, presented: Presented, needs: Scope) -> Identity:
        """Raises Unauthenticated, PermissionDenied, and Rejected for a source of too many refused ones."""
        try:
            identity = await self._identify(presented)
        except Unauthenticated as refused:
            wait_s = self.refusals.note(presented.source, refused)
            if wait_s and presented.peer:
                raise Rejected(
                    "REFUSED_TOO_OFTEN", f"{refused.message}; and too many such came from there", retry_after_s=wait_s
                ) from None
            raise
        if needs not in identity.scopes:
            missing = PermissionDenied("SCOPE_MISSING", f"the credential does not have the scope {needs.value!r}")
            self.refusals.note(presented.source, missing, identity.key_id)
            raise missing
        return identity

    async def _identify(self, presented: Presented) -> Identity:
        if len(presented.token) > _TOKEN_CHARS_MAX:
            raise Unauthenticated("CREDENTIALS_INVALID", f"the credential is longer than {_TOKEN_CHARS_MAX} characters")
        now = self._wall_clock()
        for verifier in self._verifiers:
            if (identity := await verifier.identify(presented, now)) is not None:
                return identity
        if not presented.token:
            raise Unauthenticated(
                "CREDENTIALS_MISSING", "no credential came with the call: send `authorization: Bearer ...` or x-api-key"
            )
        raise Unauthenticated("CREDENTIALS_INVALID", "the credential is of no kind that is accepted here")


def presented(
    headers: Iterable[tuple[str, str | bytes]] | None,
    auth_context: Mapping[str, Iterable[bytes]] | None = None,
    *,
    names: tuple[str, ...] = (),
    peer: str = "",
) -> Presented:
    """From a call's metadata or an HTTP request's headers, from gRPC's `auth_context()` or a certificate's `names`, and
    from the other end's address. Raises Unauthenticated."""
    headers = tuple(headers or ())
    tokens = {token for name, value in headers if (token := _token(name.lower(), value))}
    if len(tokens) > 1:
        raise Unauthenticated("CREDENTIALS_AMBIGUOUS", "more than one credential came with the call")
    names = names or certificate_names(auth_context or {})
    trace_id = next((_trace_id(value) for name, value in headers if name.lower() == "traceparent"), "")
    return Presented(next(iter(tokens), ""), names, peer, trace_id)


def _trace_id(value: str | bytes) -> str:
    """Of a `traceparent` (https://www.w3.org/TR/trace-context); one that is not valid counts as none."""
    found = _TRACEPARENT.fullmatch(_text(value).strip())
    return found[1] if found and int(found[1], 16) else ""


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


def _token(name: str, value: str | bytes) -> str:
    if name not in ("authorization", "x-api-key"):
        return ""
    text = _text(value).strip()
    if name == "x-api-key":
        return text
    scheme, _, token = text.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("CREDENTIALS_INVALID", "authorization: must be `Bearer ...`")
    return token.strip()
