"""How a worker and a router prove to each other that they are of one cluster, before either says anything else.

    worker  Introduction: its id, its incarnation, a nonce
    router  Challenge: its id, a nonce, its proof         the worker goes on only if that is right
    worker  Hello: everything else, and its proof         the router goes on only if that is right

A proof is an HMAC over both nonces and all three names, with a key derived from the cluster's secret. The side is in
it, so it can't be played back to its maker; the nonces are new for every stream, so it is worth nothing twice. Routers
hold the derived key alone: with it one can't sign the handles that workers read each other's memory by.

It keeps strangers out. It doesn't hide anything from who can listen, nor bind the stream to who proved itself on a
network whose packets can be changed: that is what TLS is for.
"""

from __future__ import annotations

import hmac
import secrets
from enum import Enum

NONCE_BYTES = 32


class Side(Enum):
    WORKER = b"tandem worker joins"
    ROUTER = b"tandem router welcomes"


def join_key(cluster_secret: bytes) -> bytes:
    """What a router is told of a cluster's secret."""
    return hmac.digest(cluster_secret, b"tandem worker link", "sha256")


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(
    key: bytes,
    side: Side,
    *,
    worker_id: str,
    incarnation: str,
    router_id: str,
    worker_nonce: bytes,
    router_nonce: bytes,
) -> bytes:
    said = (side.value, worker_id.encode(), incarnation.encode(), router_id.encode(), worker_nonce, router_nonce)
    # With their lengths, so that parts can't run into one another.
    return hmac.digest(key, b"".join(len(part).to_bytes(8, "little") + part for part in said), "sha256")


def is_proof(found: bytes, expected: bytes) -> bool:
    """In time that doesn't depend on where they differ."""
    return hmac.compare_digest(found, expected)
