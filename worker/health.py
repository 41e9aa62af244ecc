"""The worker's own gRPC server: health, for probes. `liveness` serves as long as the process does; `readiness` and the
server as a whole serve while the worker takes orders."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

LIVENESS = "liveness"
READINESS = "readiness"
ENGINE = "vllm.grpc.engine.VllmEngine"


class Health:
    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        #: Where it listens; 0 for nowhere.
        self.port = 0

    async def ready(self, ready: bool) -> None:
        """Of the worker as a whole, and of what others may drive it by."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", READINESS, ENGINE):
            await self.servicer.set(service, status)


@asynccontextmanager
async def serve_health(address: str) -> AsyncIterator[Health]:
    """Not ready at first. An empty address serves nowhere."""
    found = Health()
    await found.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
    await found.ready(False)
    if not address:
        yield found
        return
    # Without this option a second worker would share the port, and each would answer some of the other's probes.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(found.servicer, server)
    found.port = server.add_insecure_port(address)
    await server.start()
    try:
        yield found
    finally:
        await server.stop(None)
