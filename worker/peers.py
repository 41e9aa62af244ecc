"""Meets other workers before the first request needs them: transports are wired up and measured, and two workers whose
memory differs find out now."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Protocol

from engine.base import Engine, LegError, PeerLane
from worker.messages import Peer

log = logging.getLogger(__name__)


class LaneReply(Protocol):
    def peer_lane(self, lane: PeerLane) -> None: ...


class PeerBook:
    """Owns what is known of peers. Introductions run in `scope`, `at_once` at a time; none of them fails it."""

    def __init__(
        self, engine: Engine, worker_id: str, scope: asyncio.TaskGroup, at_once: int, peers_max: int = 4096
    ) -> None:
        self._engine = engine
        self._worker_id = worker_id
        self._scope = scope
        self._slots = asyncio.Semaphore(at_once)
        self._peers_max = peers_max
        #: By worker id, longest known first: how it was met last.
        self._met: OrderedDict[str, tuple[Peer, PeerLane]] = OrderedDict()
        #: Who waits for an introduction that is going on.
        self._waiting: dict[Peer, list[LaneReply]] = {}

    def introduce(self, reply: LaneReply, peer: Peer) -> None:
        """Reports the lane, at once if it is known. A refusal is tried again: the peer may have been starting."""
        if peer.worker_id == self._worker_id or not peer.address:
            return
        met, lane = self._met.get(peer.worker_id, (None, None))
        if lane and met == peer and not lane.refusal:
            reply.peer_lane(lane)
        elif peer in self._waiting:
            self._waiting[peer].append(reply)
        else:
            self._waiting[peer] = [reply]
            self._scope.create_task(self._meet(peer), name=f"meet {peer.worker_id}")

    async def _meet(self, peer: Peer) -> None:
        try:
            async with self._slots:
                lane = await self._engine.connect(peer.worker_id, peer.address)
        except LegError as error:
            lane = PeerLane(peer=peer.worker_id, refusal=error.detail)
        except Exception as error:
            log.exception("peer %s could not be met", peer.worker_id)
            lane = PeerLane(peer=peer.worker_id, refusal=f"{type(error).__name__}: {error}")
        log.info("peer %s: %s", peer.worker_id, lane.refusal or f"{lane.transport}, {lane.gigabytes_per_s:.2f} GB/s")
        self._remember(peer, lane)
        for reply in self._waiting.pop(peer):
            reply.peer_lane(lane)

    def _remember(self, peer: Peer, lane: PeerLane) -> None:
        self._met[peer.worker_id] = (peer, lane)
        self._met.move_to_end(peer.worker_id)
        if len(self._met) > self._peers_max:
            self._met.popitem(last=False)
