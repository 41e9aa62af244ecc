"""tandem.v1.Control: what operators see and order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from protos import control_pb2_grpc
from router.core.errors import TandemError
from router.edge import wire
from router.edge.errors import abort
from router.port import AdminPort

T = TypeVar("T")


class ControlEdge(control_pb2_grpc.ControlServicer):
    def __init__(self, admin: AdminPort, *, router_id: str, uptime_s: Callable[[], float]) -> None:
        self._admin = admin
        self._router_id = router_id
        self._uptime_s = uptime_s

    async def GetStatus(self, request, context):
        snapshot = self._admin.snapshot(requests=request.requests)
        return wire.status(self._router_id, self._uptime_s(), snapshot)

    async def DrainWorker(self, request, context):
        await _or_abort(context, lambda: self._admin.drain(request.worker_id))
        return wire.drained()

    async def SetWorkerRole(self, request, context):
        await _or_abort(context, lambda: self._admin.set_role(request.worker_id, wire.role(request.role)))
        return wire.role_set()


async def _or_abort(context: grpc.aio.ServicerContext, act: Callable[[], T]) -> T:
    try:
        return act()
    except TandemError as error:
        await abort(context, error)
