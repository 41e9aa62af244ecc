"""tandem.v1.Inference: Tandem's own protocol. No policy here: its messages to `generate`'s values and back."""

from __future__ import annotations

import grpc

from router.edge import wire
from router.edge.errors import answer
from router.edge.generate import Generator, Part, Wanted
from router.edge.identity import Presented, presented
from router.edge.orca import LoadReports
from router.grpc_server.call import Call

SERVICE = "tandem.v1.Inference"

Context = grpc.aio.ServicerContext[bytes, bytes] | Call


class NativeEdge:
    def __init__(self, generator: Generator, loads: LoadReports) -> None:
        self._generator = generator
        self._loads = loads

    def handlers(self) -> grpc.GenericRpcHandler:
        """Takes and gives bytes: protobuf's refusals must be answered by us, see `wire.generate_request`."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(self._generate),
                "ListModels": grpc.unary_unary_rpc_method_handler(self._list_models),
            },
        )

    async def _list_models(self, data: bytes, context: Context) -> bytes:
        async def models() -> bytes:
            wire.list_models_request(data)
            return wire.models(await self._generator.models_for(_presented(context))).SerializeToString()

        return await answer(context, models)

    async def _generate(self, data: bytes, context: Context) -> None:
        """Writes by the context rather than yielding, so that `finally` runs the moment the client is gone."""

        async def generate() -> None:
            arrival = self._generator.now()
            message = wire.generate_request(data)
            by_id = message.WhichOneof("prompt") == "token_ids"
            wanted = Wanted(
                model=message.model,
                prompt=tuple(message.token_ids.ids) if by_id else message.text,
                prompt_field="token_ids" if by_id else "text",
                asked=wire.asked(message.sampling),
                request_id=message.request_id,
                lane=message.lane,
                timeout_s=context.time_remaining(),
                presented=_presented(context),
            )
            accepted = await self._generator.accept(wanted, arrival)
            request_id = accepted.request.request_id
            stream = self._generator.submit(accepted)
            deltas = wire.Deltas(request_id)

            def written(part: Part) -> bytes:
                token_ids = part.token_ids if message.return_token_ids else ()
                if part.text or token_ids or part.logprobs:
                    return deltas.write(part.text, token_ids, part.logprobs)
                return b""

            def say(part: Part) -> bool:
                delta = written(part)
                return not delta or (isinstance(context, Call) and context.write_now(delta))

            try:
                async for part in stream.parts(say):
                    if isinstance(part, Part):
                        if delta := written(part):
                            await context.write(delta)
                    else:
                        end = wire.finished(request_id, part.finished, part.stop_match)
                        await context.write(end.SerializeToString())
            finally:
                stream.close()
            context.set_trailing_metadata(self._loads.trailer())

        await answer(context, generate)


def _presented(context: Context) -> Presented:
    return presented(context.invocation_metadata(), context.auth_context(), peer=context.peer())
