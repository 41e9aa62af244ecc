"""gRPC's own server, behind the methods that a router asks of ours: to compare with, and to change to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import grpc

from trust.tls import Tls

#: A quiet stream and a client's keepalive pings would else earn GOAWAY "too many pings", which kills every call.
_PINGS = (
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class StockServer:
    def __init__(self, *, message_bytes_max: int, age_s_max: float, shared: bool = False) -> None:
        """`shared`: its ports, with other processes that say so."""
        options = [*_PINGS, ("grpc.so_reuseport", int(shared)), ("grpc.max_receive_message_length", message_bytes_max)]
        if age_s_max:
            options.append(("grpc.max_connection_age_ms", int(age_s_max * 1e3)))
        self._server = grpc.aio.server(options=options)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers(tuple(handlers))

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self._server.add_registered_method_handlers(service, handlers)

    def bind(self, host: str, port: int, tls: Tls | None, *, shared: bool = False) -> int:
        """Raises OSError."""
        address = f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, tls.server_credentials())
        except RuntimeError as error:
            raise OSError(str(error)) from None

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace_s: float | None) -> None:
        await self._server.stop(grace_s)
