"""tandem.v1.Control: what operators see and order."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from router.core.errors import Invalid, NotFound, PermissionDenied
from router.core.request import Lane
from router.edge import keys, wire
from router.edge.errors import answer
from router.edge.identity import Authenticator, Presented, Scope, presented
from router.port import AdminPort
from router.tenant_admin import TenantAdmin

SERVICE = "tandem.v1.Control"

E = TypeVar("E", bound=Enum)


class ControlEdge:
    def __init__(
        self,
        admin: AdminPort,
        authenticator: Authenticator,
        tenants: TenantAdmin,
        *,
        router_id: str,
        uptime_s: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._admin = admin
        self._tenants = tenants
        self._wall_clock = wall_clock
        self._authenticator = authenticator
        self._router_id = router_id
        self._uptime_s = uptime_s

    def handlers(self) -> grpc.GenericRpcHandler:
        """Takes and gives bytes, see `wire`."""
        methods = {
            "GetStatus": self._status,
            "DrainWorker": self._drain,
            "SetWorkerRole": self._set_role,
            "ListTenants": self._list_tenants,
            "AddTenant": self._add_tenant,
            "SetTenant": self._set_tenant,
            "RemoveTenant": self._remove_tenant,
            "ListKeys": self._list_keys,
            "CreateKey": self._create_key,
            "RevokeKey": self._revoke_key,
        }
        handlers = {name: self._unary(self._for_operators(do)) for name, do in methods.items()}
        return grpc.method_handlers_generic_handler(SERVICE, {**handlers, "Explain": self._unary(self._explain)})

    def _unary(self, do: Callable[[bytes, Presented], Awaitable[Message]]) -> grpc.RpcMethodHandler:
        async def method(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            async def work() -> bytes:
                found = await do(
                    data, presented(context.invocation_metadata(), context.auth_context(), peer=context.peer())
                )
                return found.SerializeToString()

            return await answer(context, work)

        return grpc.unary_unary_rpc_method_handler(method)

    def _for_operators(
        self, do: Callable[[bytes], Awaitable[Message]]
    ) -> Callable[[bytes, Presented], Awaitable[Message]]:
        async def checked(data: bytes, who: Presented) -> Message:
            await self._authenticator.identify(who, Scope.ADMIN)
            return await do(data)

        return checked

    # The cluster.

    async def _status(self, data: bytes) -> Message:
        snapshot = await self._admin.snapshot(requests=wire.status_request(data).requests)
        is_open = self._authenticator.is_open
        return wire.status(self._router_id, self._uptime_s(), snapshot, unauthenticated=is_open)

    async def _drain(self, data: bytes) -> Message:
        await self._admin.drain(wire.drain_request(data).worker_id)
        return wire.drained()

    async def _set_role(self, data: bytes) -> Message:
        request = wire.role_request(data)
        await self._admin.set_role(request.worker_id, wire.role(request.role))
        return wire.role_set()

    # Requests.

    async def _explain(self, data: bytes, who: Presented) -> Message:
        tenant = await self._may_ask_about(who)
        asked = wire.explain_request(data)
        found = await self._admin.explain(asked.request_id, tenant or asked.tenant or None)
        if not found or tenant not in (None, asked.tenant or tenant):
            # The same for what never was and for what is another's.
            message = f"no request {asked.request_id!r} is known; those that ended are forgotten after a while"
            raise NotFound("request", asked.request_id, message)
        (story, arrived_at), *others = found
        return wire.story(story, arrived_at, [other.tenant for other, _ in others])

    async def _may_ask_about(self, who: Presented) -> str | None:
        """None: everybody's requests."""
        try:
            await self._authenticator.identify(who, Scope.ADMIN)
        except PermissionDenied:
            return (await self._authenticator.caller(who)).tenant.id
        return None

    # Tenants and keys.

    async def _list_tenants(self, data: bytes) -> Message:
        wire.list_tenants_request(data)
        return wire.tenants(self._tenants.tenants())

    async def _add_tenant(self, data: bytes) -> Message:
        request = wire.add_tenant_request(data)
        return wire.tenant(await self._tenants.add(request.name, request.fields))

    async def _set_tenant(self, data: bytes) -> Message:
        request = wire.set_tenant_request(data)
        return wire.tenant(await self._tenants.change(request.name, request.fields))

    async def _remove_tenant(self, data: bytes) -> Message:
        await self._tenants.remove(wire.remove_tenant_request(data).name)
        return wire.tenant_removed()

    async def _list_keys(self, data: bytes) -> Message:
        return wire.keys(await self._tenants.keys(wire.list_keys_request(data).tenant), self._wall_clock())

    async def _create_key(self, data: bytes) -> Message:
        request, now = wire.create_key_request(data), self._wall_clock()
        stored, secret = await self._tenants.create_key(
            request.tenant,
            now,
            scopes=frozenset(_one_of(Scope, "scopes", word) for word in request.scopes or (Scope.INFERENCE.value,)),
            lane_max=_one_of(Lane, "lane_max", request.lane_max or Lane.REALTIME.value),
            expires=now + request.expires_in_s if request.HasField("expires_in_s") else None,
            env=request.env or keys.DEFAULT_ENV,
        )
        return wire.key_created(stored, secret, now)

    async def _revoke_key(self, data: bytes) -> Message:
        await self._tenants.revoke_key(wire.revoke_key_request(data).id, self._wall_clock())
        return wire.key_revoked()


def _one_of(kind: type[E], field: str, word: str) -> E:
    try:
        return kind(word)
    except ValueError:
        raise Invalid(field, f"must be one of {', '.join(str(it.value) for it in kind)}, is {word!r}") from None
