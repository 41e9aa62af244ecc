"""vllm.grpc.engine.VllmEngine: the whole cluster as one engine, for gateways that route between engines.

Its messages to `generate`'s values and back; no policy here. The same service at a worker (worker/vllm_engine.py) has
the hand-off in it; here that is the cluster's own matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import grpc

from router.core.errors import Invalid
from router.core.snapshot import Snapshot
from router.edge import vllm_engine_wire as wire
from router.edge.errors import Unimplemented, answer
from router.edge.generate import Accepted, Answer, Generator, Part, Wanted
from router.edge.identity import Authenticator, Presented, presented
from router.edge.orca import LoadReports

SERVICE = wire.SERVICE

Context = grpc.aio.ServicerContext[bytes, bytes]
Write = Callable[[bytes], Awaitable[None]]


class VllmEngineEdge:
    def __init__(
        self,
        generator: Generator,
        authenticator: Authenticator,
        loads: LoadReports,
        snapshot: Callable[[], Awaitable[Snapshot]],
        model: wire.Model,
        *,
        version: str,
        answers_max: int,
        uptime_s: Callable[[], float],
    ) -> None:
        self._generator = generator
        self._authenticator = authenticator
        self._loads = loads
        self._snapshot = snapshot
        self._model = model
        self._version = version
        self._answers_max = answers_max
        self._uptime_s = uptime_s
        #: Answers that are open, by tenant and the id that the client gave; for Abort.
        self._open: dict[tuple[str, str], list[Answer]] = {}

    def handlers(self) -> grpc.GenericRpcHandler:
        """Takes and gives bytes, see `wire`."""
        unary = {
            "Abort": self._abort,
            "HealthCheck": self._health,
            "GetModelInfo": self._model_info,
            "GetServerInfo": self._server_info,
            "GetLoads": self._get_loads,
            **{name: self._refuse(name, why) for name, why in wire.REFUSED.items()},
        }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                **{name: _unary(do) for name, do in unary.items()},
                "SubscribeKvEvents": grpc.unary_stream_rpc_method_handler(self._no_events),
                "Generate": grpc.unary_stream_rpc_method_handler(self._generate),
                "GetTokenizer": grpc.unary_stream_rpc_method_handler(self._tokenizer),
            },
        )

    # Answers.

    async def _generate(self, data: bytes, context: Context) -> None:
        async def work() -> None:
            arrival = self._generator.now()
            request = wire.generate(data)
            if request.answers > self._answers_max:
                raise Invalid("n", f"must be from 1 to {self._answers_max}, is {request.answers}")
            wanted = Wanted(
                model="",
                prompt=request.prompt,
                prompt_field=request.prompt_field,
                asked=request.asked,
                request_id=request.request_id,
                timeout_s=context.time_remaining(),
                presented=_presented(context),
            )
            accepted = await self._generator.accept(wanted, arrival)
            with self._submitted(accepted, request.answers, request.request_id) as answers:
                prompt_tokens = len(accepted.request.prompt)
                if len(answers) == 1:
                    await _tell(answers[0], 0, prompt_tokens, request.stream, context.write)
                else:
                    await _tell_all(answers, prompt_tokens, request.stream, context.write)
            context.set_trailing_metadata(self._loads.trailer())

        await answer(context, work)

    @contextmanager
    def _submitted(self, accepted: Accepted, count: int, client_id: str) -> Iterator[list[Answer]]:
        answers: list[Answer] = []
        key = (accepted.request.tenant, client_id)
        try:
            for number in range(count):
                request_id = accepted.request.request_id
                one = accepted.sibling(number, f"{request_id}-{number}") if count > 1 else accepted
                answers.append(self._generator.submit(one))
            if client_id:
                self._open[key] = answers
            yield answers
        finally:
            for open_answer in answers:
                open_answer.close()
            if self._open.get(key) is answers:
                del self._open[key]

    async def _abort(self, data: bytes, context: Context) -> bytes:
        caller = await self._authenticator.caller(_presented(context))
        for request_id in wire.aborted_ids(data):
            for open_answer in self._open.get((caller.tenant.id, request_id), ()):
                open_answer.close()
        return wire.aborted()

    # About the cluster.

    async def _health(self, data: bytes, context: Context) -> bytes:
        return wire.health(any(view.ready for view in self._generator.models()))

    async def _model_info(self, data: bytes, context: Context) -> bytes:
        await self._authenticator.caller(_presented(context))
        return self._model.info(self._generator.facts(self._generator.model("")))

    async def _server_info(self, data: bytes, context: Context) -> bytes:
        await self._authenticator.caller(_presented(context))
        return wire.server_info(await self._snapshot(), self._uptime_s())

    async def _get_loads(self, data: bytes, context: Context) -> bytes:
        await self._authenticator.caller(_presented(context))
        return wire.loads(await self._snapshot(), self._version)

    async def _tokenizer(self, data: bytes, context: Context) -> None:
        async def work() -> None:
            await self._authenticator.caller(_presented(context))
            for message in await asyncio.to_thread(lambda: list(self._model.tokenizer())):
                await context.write(message)

        await answer(context, work)

    def _refuse(self, name: str, why: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def method(data: bytes, context: Context) -> bytes:
            raise Unimplemented(name, why)

        return method

    async def _no_events(self, data: bytes, context: Context) -> None:
        refuse = self._refuse("SubscribeKvEvents", wire.REFUSED["SubscribeKvEvents"])
        await answer(context, lambda: refuse(data, context))


async def _tell(an_answer: Answer, index: int, prompt_tokens: int, stream: bool, write: Write) -> None:
    parts: list[Part] = []
    async for part in an_answer.parts():
        if not isinstance(part, Part):
            await write(wire.complete(parts, part, index))
        elif part.token_ids:
            parts.append(part)
            if stream:
                await write(wire.chunk(part, prompt_tokens, index))


async def _tell_all(answers: list[Answer], prompt_tokens: int, stream: bool, write: Write) -> None:
    turn = asyncio.Lock()  # gRPC takes one message after the other

    async def in_turn(data: bytes) -> None:
        async with turn:
            await write(data)

    try:
        async with asyncio.TaskGroup() as tasks:
            for index, one in enumerate(answers):
                tasks.create_task(_tell(one, index, prompt_tokens, stream, in_turn))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _unary(do: Callable[[bytes, Context], Awaitable[bytes]]) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def method(data: bytes, context: Context) -> bytes:
        return await answer(context, lambda: do(data, context))

    return grpc.unary_unary_rpc_method_handler(method)


def _presented(context: Context) -> Presented:
    return presented(context.invocation_metadata(), context.auth_context(), peer=context.peer())
