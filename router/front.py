"""What clients and operators meet: every protocol and health, on the ports for them. Whatever is decided is decided
behind the core's port, in this process or in another."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from router.access import Access
from router.config import RouterConfig
from router.edge import control, orca, reflection
from router.edge.chat import ChatTemplate
from router.edge.control import ControlEdge
from router.edge.generate import Generator
from router.edge.http_server import HttpServer
from router.edge.kserve import KServeEdge
from router.edge.native import NativeEdge
from router.edge.openai import OpenAIEdge
from router.edge.orca import LoadReports, OrcaEdge
from router.edge.text import ModelText
from router.edge.vllm_engine import VllmEngineEdge
from router.edge.vllm_engine_wire import Model
from router.grpc_server.connection import ConnectionLimits
from router.grpc_server.server import GrpcServer
from router.grpc_server.stock import StockServer
from router.health import CLIENTS, LINK, Health
from router.port import AdminPort, CorePort
from router.tenant_admin import nobody_else
from trust.tls import Tls

#: For the handlers of requests that were ended to tell their clients so.
LAST_WORDS_S = 1.0


class PortTaken(Exception):
    """Something else listens there."""


class Port(CorePort, AdminPort, Protocol):
    """All that there is behind a front."""


class Front:
    """Belongs to one event loop. `open`, then `run` until it is time to `drain`, `stop` and `close`."""

    def __init__(
        self,
        config: RouterConfig,
        access: Access,
        core: Port,
        loads: LoadReports,
        *,
        began: float,
        metrics_page: Callable[[], bytes],
        after_read: Callable[[], None] = lambda: None,
        everywhere: Callable[[], Awaitable[None]] = nobody_else,
        shared: bool = False,
    ) -> None:
        """`everywhere` returns when changed files are in force in other processes, too; `shared`: the ports, with
        those. `metrics_page` is called on a thread."""
        self._config = config
        self._access = access
        self._shared = shared
        model_dir = Path(config.model_dir)
        text = ModelText(model_dir)
        self._generator = generator = Generator(core, {config.model_name: text}, config.requests, access.authenticator)
        self.health = Health(core, config.model_name)
        #: For what else is to be served beside clients.
        self.server = grpc_server(config, after_read, shared=shared)

        def uptime_s() -> float:
            return time.monotonic() - began

        edges = (
            NativeEdge(generator, loads),
            ControlEdge(
                core, access.authenticator, access.admin(everywhere), router_id=config.router_id, uptime_s=uptime_s
            ),
            KServeEdge(
                generator,
                access.authenticator,
                loads,
                core.stats,
                version=version("tandem"),
                streamed_at_once=config.requests.answers_max,
            ),
            VllmEngineEdge(
                generator,
                access.authenticator,
                loads,
                core.snapshot,
                Model(model_dir),
                version=version("tandem"),
                answers_max=config.requests.answers_max,
                uptime_s=uptime_s,
            ),
            OrcaEdge(loads),
        )
        self.server.add_generic_rpc_handlers(tuple(edge.handlers() for edge in edges))
        self.health.add_to(self.server)
        reflection.add_to(self.server, (*CLIENTS, control.SERVICE, orca.SERVICE, LINK, "grpc.health.v1.Health"))
        self._http: HttpServer | None = None
        if config.http_port is not None:
            app = OpenAIEdge(
                generator,
                access.authenticator,
                {config.model_name: ChatTemplate(text, model_dir)},
                requests=config.requests,
                http=config.http,
                version=version("tandem"),
                metrics=metrics_page,
            )
            self._http = HttpServer(app, config.http, access.tls, age_s_max=config.connection_age_s_max)
        self.port = 0
        # As of several, see router.edges.fleet.
        self.fault: Exception | None = None
        self.serving_count, self.restarts = 1, 0

    @property
    def http_port(self) -> int | None:
        return None if self._http is None else self._http.port

    async def open(self) -> None:
        """Takes the ports. Raises PortTaken."""
        config = self._config
        self.port = bind(self.server, "port", config.host, config.port, self._access.tls, shared=self._shared)
        if self._http is not None and config.http_port is not None:
            await listen(self._http, "http_port", config.host, config.http_port, shared=self._shared)

    async def start(self) -> None:
        """Begins to serve."""
        await self.server.start()

    async def serving(self) -> None:
        """Returns when it serves."""

    async def run(self) -> None:
        """Until cancelled."""
        await self.health.run()

    def changed(self) -> None:
        self.health.changed()

    def refused(self) -> dict[str, int]:
        """Credentials, by reason. From any thread."""
        return self._access.authenticator.refusals.told()

    async def count(self) -> None:
        """Before `refused` is asked."""

    async def drain(self) -> None:
        await self.health.drain()

    async def stop(self) -> None:
        """Takes nothing new. Call when all requests have ended."""
        await self.server.stop(LAST_WORDS_S)

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close(LAST_WORDS_S)
        await self.server.stop(None)
        self._generator.close()


def grpc_server(
    config: RouterConfig, after_read: Callable[[], None], *, shared: bool = False
) -> GrpcServer | StockServer:
    message_bytes_max, age_s_max = config.requests.message_bytes_max, config.connection_age_s_max
    if config.grpc_server == "grpcio":
        return StockServer(message_bytes_max=message_bytes_max, age_s_max=age_s_max, shared=shared)
    return GrpcServer(
        message_bytes_max=message_bytes_max, limits=ConnectionLimits(age_s_max=age_s_max), after_read=after_read
    )


def bind(
    server: GrpcServer | StockServer, key: str, host: str, port: int, tls: Tls | None, *, shared: bool = False
) -> int:
    """Raises PortTaken."""
    try:
        return server.bind(host, port, tls, shared=shared)
    except OSError as error:
        raise PortTaken(f"{key}: {host}:{port} can't be listened on; is another router up there? ({error})") from None


async def listen(http: HttpServer, key: str, host: str, port: int, *, shared: bool = False) -> None:
    """Raises PortTaken."""
    try:
        await http.listen(host, port, shared=shared)
    except OSError as error:
        raise PortTaken(f"{key}: {host}:{port} can't be listened on: {error}") from None
