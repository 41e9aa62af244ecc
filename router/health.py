"""gRPC's health service: SERVING while a request for the model could be served."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from router.edge import control, kserve, native, vllm_engine
from router.grpc_server.server import GrpcServer
from router.grpc_server.stock import StockServer
from router.port import CorePort

LINK = "tandem.v1.WorkerLink"
#: Services that generate.
CLIENTS = (native.SERVICE, kserve.SERVICE, vllm_engine.SERVICE)


class Health:
    def __init__(self, core: CorePort, model: str) -> None:
        self._core = core
        self._model = model
        self._servicer = health_aio.HealthServicer()
        self._changed = asyncio.Event()

    def add_to(self, server: GrpcServer | StockServer) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def changed(self) -> None:
        """Workers came, went or changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled. Workers need the link, and operators the controls, before anything can be served."""
        await self._servicer.set(LINK, HealthCheckResponse.SERVING)
        await self._servicer.set(control.SERVICE, HealthCheckResponse.SERVING)
        while True:
            self._changed.clear()
            ready = any(view.ready for view in self._core.models() if view.name == self._model)
            serving = HealthCheckResponse.ServingStatus.Value("SERVING" if ready else "NOT_SERVING")
            for name in ("", *CLIENTS):
                await self._servicer.set(name, serving)
            await self._changed.wait()

    async def drain(self) -> None:
        """NOT_SERVING from now on."""
        await self._servicer.enter_graceful_shutdown()
