"""Who may be a worker: who proves to know the cluster's secret, or whose certificate says so. And that this router is
of the cluster, which it proves first. See trust/join.py for how."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from router.core.errors import Unauthenticated
from trust.join import NONCE_BYTES, Side, is_proof, nonce, proof


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    worker_id: str
    incarnation: str
    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    router_id: str
    nonce: bytes
    proof: bytes


class Gate:
    def __init__(self, router_id: str, key: bytes, certificates: Collection[str]) -> None:
        """Without key and certificates it lets everybody in."""
        self._router_id = router_id
        self._key = key
        self._certificates = frozenset(certificates)

    @property
    def is_open(self) -> bool:
        return not self._key and not self._certificates

    def challenge(self, introduction: Introduction) -> Challenge:
        """Raises Unauthenticated."""
        if len(introduction.nonce) != NONCE_BYTES:
            raise Unauthenticated("JOIN_NONCE", f"the introduction's nonce must have {NONCE_BYTES} bytes")
        fresh = nonce()
        mine = self._proof(Side.ROUTER, introduction, fresh) if self._key else b""
        return Challenge(router_id=self._router_id, nonce=fresh, proof=mine)

    def check(
        self,
        introduction: Introduction | None,
        challenge: Challenge | None,
        shown: bytes,
        certificate_names: Collection[str],
    ) -> None:
        """Lets whoever shows this join. Raises Unauthenticated."""
        if self.is_open or not self._certificates.isdisjoint(certificate_names):
            return
        if not self._key:
            raise Unauthenticated("JOIN_CERTIFICATE", "no name in the certificate is a worker's here")
        if introduction is None or challenge is None or not shown:
            raise Unauthenticated(
                "JOIN_PROOF_MISSING", "workers must prove that they know the cluster's secret; credentials don't count"
            )
        if not is_proof(shown, self._proof(Side.WORKER, introduction, challenge.nonce)):
            raise Unauthenticated("JOIN_PROOF_WRONG", "the proof was not made with this cluster's secret for this link")

    def _proof(self, side: Side, introduction: Introduction, fresh: bytes) -> bytes:
        return proof(
            self._key,
            side,
            worker_id=introduction.worker_id,
            incarnation=introduction.incarnation,
            router_id=self._router_id,
            worker_nonce=introduction.nonce,
            router_nonce=fresh,
        )
