"""What a worker does with a router's messages. Owns the role, whether it is leaving, the open legs and the links' ends
of them; the engine is reached through the prefill and decode services.

    SERVING --SIGTERM, Drain--> DRAINING --legs gone, leases ended, or grace passed--> (process ends)

A draining worker refuses new legs, finishes what it has, and keeps pinned blocks readable until their readers are done.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

from decode.ahead import FetchesAhead, Hint
from decode.service import DecodeOrder, DecodeService
from engine.base import Engine, EngineInfo, EngineLoad, FailureKind, LegError
from prefill.service import PrefillOrder, PrefillService
from worker import messages, wire
from worker.config import Role, WorkerConfig
from worker.legs import Leg, LegTable, Reply, Work
from worker.metrics import Snapshot, WorkerMetrics
from worker.outbox import Outbox
from worker.peers import PeerBook

log = logging.getLogger(__name__)

_LEASE_CHECK_S = 0.05


class ProtocolError(Exception):
    """The router broke the link's rules; its link is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who says hello. The incarnation is new at every start of the process."""

    worker_id: str
    incarnation: str
    info: EngineInfo


class WorkerService:
    """All methods are called from one event loop. Legs and introductions live in `scope`."""

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        engine: Engine,
        metrics: WorkerMetrics,
        scope: asyncio.TaskGroup,
        stop: asyncio.Event,
    ) -> None:
        """Sets `stop` when a router wants the worker to leave; the process acts on it, as on a signal."""
        self.role = config.role
        self.draining = False
        self._stop = stop
        self._config = config
        self._identity = identity
        self._engine = engine
        self._prefill = PrefillService(engine, config.prefill)
        self._ahead = FetchesAhead(engine, config.decode, scope, metrics.fetched_ahead)
        self._decode = DecodeService(engine, config.decode, self._ahead)
        self._legs = LegTable(scope, metrics)
        self._peers = PeerBook(engine, config.worker_id, scope, config.peers_met_at_once)
        #: The outboxes of live links; one for each router that said welcome.
        self._links: dict[Outbox, None] = {}
        self._load = EngineLoad()

    async def run(self) -> None:
        """Housekeeping, until cancelled."""
        await self._prefill.run()

    # Links ------------------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        return self._identity

    def hello(self, proof: bytes = b"") -> wire.WorkerMessage:
        return wire.hello(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            role=self.role,
            labels=self._config.labels,
            info=self._identity.info,
            prefill_legs=self._config.prefill.legs,
            decode_legs=self._config.decode.legs,
            pid=os.getpid(),
            proof=proof,
        )

    def joined(self, router: Outbox, role_said: Role) -> None:
        """`role_said`: in the hello, which may be some time ago."""
        self._links[router] = None
        if self.role is not role_said:
            router.role_changed(self.role)
        if self.draining:
            router.draining()

    def left(self, router: Outbox) -> None:
        """The link is gone: every leg it ordered is lost, and nobody will use the handles it was given."""
        del self._links[router]
        self._prefill.customer_gone(router)
        self._ahead.drop_all(router)
        if cancelled := self._legs.cancel_all(router):
            log.warning("%d legs cancelled with their router's link", cancelled)

    def handle(self, router: Outbox, message: messages.Message) -> None:
        """Raises ProtocolError."""
        match message:
            case PrefillOrder():
                self._prefill_leg(router, message)
            case DecodeOrder():
                self._decode_leg(router, message)
            case Hint():
                if not self._refusal(Role.DECODE):
                    self._ahead.begin(router, message)
            case messages.InvalidOrder():
                router.failed(message.leg_id, FailureKind.INVALID, message.detail)
            case messages.CancelLeg():
                self._cancel(router, message.leg_id)
            case messages.ReleaseLease():
                self._prefill.release(message.handle)
            case messages.Peers():
                for peer in message.peers:
                    self._peers.introduce(router, peer)
            case messages.SetRole():
                self._set_role(message.role)
            case messages.Drain():
                self._stop.set()
            case messages.Welcome():
                raise ProtocolError("a second welcome")
            case messages.Unknown():
                log.warning("ignored from the router: %s", message.name)

    # Legs -------------------------------------------------------------------------------------------------------------

    def order(self, customer: Reply, order: PrefillOrder | DecodeOrder) -> None:
        """One leg, of a customer that is no router; it hears how the leg ends. Raises ProtocolError."""
        if isinstance(order, PrefillOrder):
            self._prefill_leg(customer, order)
        else:
            self._decode_leg(customer, order)

    def cancel(self, customer: Reply, leg_id: str) -> None:
        """Of a leg that has ended: nobody will use the handle that it gave out."""
        self._cancel(customer, leg_id)

    def _prefill_leg(self, router: Reply, order: PrefillOrder) -> None:
        async def work(leg: Leg) -> None:
            leg.prefill_done(await self._prefill.serve(router, order, leg.engine_leg_id, leg.offered))

        if refusal := self._refusal(Role.PREFILL):
            router.failed(order.leg.leg_id, FailureKind.REJECTED, refusal)
        else:
            self._open(router, order.leg.leg_id, Role.PREFILL, order.timeout_s, work)

    def _decode_leg(self, router: Reply, order: DecodeOrder) -> None:
        async def work(leg: Leg) -> None:
            await self._decode.serve(order, leg.engine_leg_id, leg)

        if refusal := self._refusal(Role.DECODE):
            router.failed(order.leg.leg_id, FailureKind.REJECTED, refusal)
        else:
            self._open(router, order.leg.leg_id, Role.DECODE, order.timeout_s, work)

    def _open(self, router: Reply, leg_id: str, role: Role, timeout_s: float, work: Work) -> None:
        if self._legs.has(router, leg_id):
            raise ProtocolError(f"leg {leg_id} was ordered twice")
        self._legs.open(router, leg_id, role, timeout_s, work)

    def _refusal(self, role: Role) -> str:
        """Why a leg of this role is not taken now; empty when it is."""
        if self.draining:
            return "draining"
        if self.role not in (role, Role.BOTH):
            return f"the role here is {self.role.value}"
        limits = self._config.prefill if role is Role.PREFILL else self._config.decode
        if (ending := self._legs.count(role) - self._legs.count_open(role)) >= limits.legs:
            return f"{ending} legs that ended are still in the engine"
        return limits.refusal(self._legs.count_open(role))

    def _cancel(self, router: Reply, leg_id: str) -> None:
        self._ahead.drop(router, leg_id)
        if not self._legs.cancel(router, leg_id):
            # The cancel crossed with the answer, which the router will ignore.
            self._prefill.leg_gone(router, leg_id)

    # Role, drain, end -------------------------------------------------------------------------------------------------

    def _set_role(self, role: Role) -> None:
        """Legs of the old role finish; new ones are refused from now on."""
        log.info("role %s, was %s", role.value, self.role.value)
        self.role = role
        for router in self._links:
            router.role_changed(role)

    def announce_drain(self) -> None:
        self.draining = True
        for router in self._links:
            router.draining()

    async def drained(self) -> None:
        """Until no leg is open and no lease pinned."""
        await self._legs.empty()
        while await self._holds_leases():  # noqa: ASYNC110  the engine tells only when asked
            await asyncio.sleep(_LEASE_CHECK_S)

    async def _holds_leases(self) -> bool:
        try:
            return (await self.load()).leases_held > 0
        except LegError:
            return True  # a dying engine; the process hears of it from `wait_dead`

    def remains(self) -> str:
        legs = self._legs.count(Role.PREFILL) + self._legs.count(Role.DECODE)
        return f"{legs} legs open, {self._load.leases_held} leases held"

    def fail_all(self, detail: str) -> None:
        """Ends every leg, for another worker to do."""
        self._legs.fail_all(FailureKind.ENGINE, detail)

    # Load -------------------------------------------------------------------------------------------------------------

    async def load(self) -> EngineLoad:
        self._load = await self._engine.load()
        return self._load

    async def report(self, router: Outbox) -> None:
        try:
            load = await self.load()
        except LegError as error:
            # No report is what a router judges by, too.
            log.warning("no load report: %s", error)
            return
        router.load(
            load,
            prefill_running=self._legs.count(Role.PREFILL),
            decode_running=self._legs.count(Role.DECODE),
        )

    def snapshot(self) -> Snapshot:
        return Snapshot(
            prefill_legs=self._legs.count(Role.PREFILL),
            decode_legs=self._legs.count(Role.DECODE),
            links=len(self._links),
            engine=self._load,
        )
