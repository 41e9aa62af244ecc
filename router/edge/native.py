"""tandem.v1.Inference: Tandem's own protocol. No policy here: validate, submit, turn events into messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from uuid import uuid4

import grpc

from router.config import RequestLimits
from router.core.effects import Failed, Finished, Tokens
from router.core.errors import Expired, NotFound, Unavailable
from router.core.request import GenerationRequest
from router.core.worker import ModelFacts
from router.edge import wire
from router.edge.admit import Rules
from router.edge.errors import answer
from router.edge.text import ModelText, TextStream
from router.port import CorePort, RequestStream

SERVICE = "tandem.v1.Inference"

#: Shorter prompts are tokenized in less time than a thread takes to answer.
_INLINE_CHARS_MAX = 2_000


class _Accepted(NamedTuple):
    request: GenerationRequest
    stops: tuple[str, ...]
    return_token_ids: bool


class NativeEdge:
    def __init__(self, core: CorePort, texts: dict[str, ModelText], limits: RequestLimits) -> None:
        self._core = core
        self._texts = texts
        self._rules = {name: Rules(limits, text) for name, text in texts.items()}
        self._limits = limits
        self._tokenizers = ThreadPoolExecutor(2, thread_name_prefix="tokenize")

    def handlers(self) -> grpc.GenericRpcHandler:
        """Takes and gives bytes: protobuf's refusals must be answered by us, see `wire.generate_request`."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(self._generate),
                "ListModels": grpc.unary_unary_rpc_method_handler(self._list_models),
            },
        )

    def close(self) -> None:
        self._tokenizers.shutdown(wait=False, cancel_futures=True)

    async def _list_models(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def models() -> bytes:
            wire.list_models_request(data)
            return wire.models(self._core.models()).SerializeToString()

        return await answer(context, models)

    async def _generate(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        """Writes by the context rather than yielding, so that `finally` runs the moment the client is gone."""

        async def generate() -> None:
            arrival = self._core.now()
            accepted = await self._accept(data, arrival, context.time_remaining())
            stream = self._core.submit(accepted.request)
            try:
                async for message in self._messages(stream, accepted):
                    await context.write(message)
            finally:
                stream.close()

        await answer(context, generate)

    async def _messages(self, stream: RequestStream, accepted: _Accepted) -> AsyncIterator[bytes]:
        request = accepted.request
        request_id = request.request_id
        text = TextStream(
            self._texts[request.model],
            accepted.stops,
            prompt=request.prompt,
            unmatched_tokens=request.sampling.min_tokens,
        )
        completion_tokens, stop_match = 0, ""
        async for event in stream:
            if isinstance(event, Tokens):
                if stop_match:
                    continue  # on their way when the stop string was found
                piece = text.feed(event.token_ids)
                count = piece.tokens if piece.stop else len(event.token_ids)
                completion_tokens += count
                token_ids = event.token_ids[:count] if accepted.return_token_ids else ()
                if piece.text or token_ids or event.logprobs:
                    yield wire.delta(request_id, piece.text, token_ids, event.logprobs[:count]).SerializeToString()
                if piece.stop:
                    stop_match = piece.stop
                    stream.stop_matched(completion_tokens)
            elif isinstance(event, Finished):
                if not stop_match:
                    rest = text.finish()
                    stop_match = rest.stop or ""
                    if rest.text:
                        yield wire.delta(request_id, rest.text, (), ()).SerializeToString()
                yield wire.finished(request_id, event, stop_match).SerializeToString()
            elif isinstance(event, Failed):
                raise event.error

    async def _accept(self, data: bytes, arrival: float, time_remaining: float | None) -> _Accepted:
        message = wire.generate_request(data)
        name = self._model(message.model)
        rules, facts = self._rules[name], self._facts(name)
        rules.request_id(message.request_id)
        lane = rules.lane(message.lane)
        asked = wire.asked(message.sampling)
        if message.WhichOneof("prompt") == "token_ids":
            prompt = tuple(message.token_ids.ids)
            rules.check_prompt("token_ids", prompt, facts)
        else:
            rules.check_text(message.text, facts)
            prompt = await self._encode(self._texts[name], message.text)
            rules.check_prompt("text", prompt, facts)
        sampling = rules.sampling(asked, len(prompt), facts)
        timeout_s = self._limits.timeout_s_max if time_remaining is None else time_remaining
        if timeout_s <= 0:
            raise Expired("the deadline had passed on arrival")
        request = GenerationRequest(
            request_id=message.request_id or uuid4().hex,
            model=name,
            prompt=prompt,
            sampling=sampling,
            arrival=arrival,
            deadline=arrival + min(timeout_s, self._limits.timeout_s_max),
            lane=lane,
        )
        return _Accepted(request, asked.stop, message.return_token_ids)

    async def _encode(self, text: ModelText, prompt: str) -> tuple[int, ...]:
        if len(prompt) <= _INLINE_CHARS_MAX:
            return text.encode(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, text.encode, prompt)

    def _model(self, name: str) -> str:
        served = ", ".join(sorted(self._texts))
        if not name and len(self._texts) == 1:
            return next(iter(self._texts))
        if name not in self._texts:
            raise NotFound("model", name, f"model {name!r} is not served here; served: {served}")
        return name

    def _facts(self, name: str) -> ModelFacts:
        facts = next((view.facts for view in self._core.models() if view.name == name), None)
        if facts is None:
            raise Unavailable("NO_WORKERS", f"no worker for model {name!r} has joined yet", retry_after_s=1.0)
        return facts
