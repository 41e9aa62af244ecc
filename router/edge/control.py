"""tandem.v1.Control: what operators see and order."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from router.edge import wire
from router.edge.errors import answer
from router.edge.identity import Authenticator, Scope, presented
from router.port import AdminPort

SERVICE = "tandem.v1.Control"


class ControlEdge:
    def __init__(
        self, admin: AdminPort, authenticator: Authenticator, *, router_id: str, uptime_s: Callable[[], float]
    ) -> None:
        self._admin = admin
        self._authenticator = authenticator
        self._router_id = router_id
        self._uptime_s = uptime_s

    def handlers(self) -> grpc.GenericRpcHandler:
        """Takes and gives bytes, see `wire`."""
        methods = {"GetStatus": self._status, "DrainWorker": self._drain, "SetWorkerRole": self._set_role}
        return grpc.method_handlers_generic_handler(SERVICE, {name: self._unary(do) for name, do in methods.items()})

    def _unary(self, do: Callable[[bytes], bytes]) -> grpc.RpcMethodHandler:
        async def method(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            async def work() -> bytes:
                await self._authenticator.identify(
                    presented(context.invocation_metadata(), context.auth_context()), Scope.ADMIN
                )
                return do(data)

            return await answer(context, work)

        return grpc.unary_unary_rpc_method_handler(method)

    def _status(self, data: bytes) -> bytes:
        snapshot = self._admin.snapshot(requests=wire.status_request(data).requests)
        return wire.status(self._router_id, self._uptime_s(), snapshot).SerializeToString()

    def _drain(self, data: bytes) -> bytes:
        self._admin.drain(wire.drain_request(data).worker_id)
        return wire.drained().SerializeToString()

    def _set_role(self, data: bytes) -> bytes:
        request = wire.role_request(data)
        self._admin.set_role(request.worker_id, wire.role(request.role))
        return wire.role_set().SerializeToString()
