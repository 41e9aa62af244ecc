"""inference.GRPCInferenceService: KServe's protocol, version 2, with what Triton adds to it.

Its messages to `generate`'s values and back; no policy here. On a stream, requests are served at the same time, and
what fails is told by a response of its own: the stream goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import NamedTuple

import grpc
import msgspec

from router.core.errors import Invalid, NotFound, TandemError
from router.core.request import FinishReason, TokenLogprobs
from router.core.stats import Stats
from router.edge import kserve_fields as fields
from router.edge import kserve_wire as wire
from router.edge.errors import Unimplemented, answer, internal, kserve_error
from router.edge.generate import Answer, End, Generator, Part, Wanted
from router.edge.identity import Authenticator, Presented, Scope, presented
from router.edge.kserve_fields import Infer
from router.edge.orca import LoadReports
from router.edge.tensors import Element
from router.grpc_server.call import Call
from router.port import ModelView

SERVICE = "inference.GRPCInferenceService"

Context = grpc.aio.ServicerContext[bytes, bytes] | Call


class KServeEdge:
    def __init__(
        self,
        generator: Generator,
        authenticator: Authenticator,
        loads: LoadReports,
        stats: Callable[[], Awaitable[Stats]],
        *,
        version: str,
        streamed_at_once: int,
    ) -> None:
        """`streamed_at_once`: requests of one stream that are served at the same time; more wait to be read."""
        self._generator = generator
        self._authenticator = authenticator
        self._loads = loads
        self._stats = stats
        self._version = version
        self.streamed_at_once = streamed_at_once

    def handlers(self) -> grpc.GenericRpcHandler:
        """Takes and gives bytes, see `wire`."""
        unary = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._known(self._model_ready),
            "ModelMetadata": self._known(self._model_metadata),
            "ModelConfig": self._known(self._model_config),
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._known(self._index),
            "SystemSharedMemoryStatus": self._known(lambda data, views: wire.no_regions()),
            "CudaSharedMemoryStatus": self._known(lambda data, views: wire.no_regions()),
            "TraceSetting": self._known(lambda data, views: wire.settings({})),
            "LogSettings": self._known(lambda data, views: wire.settings({})),
            "ModelInfer": self._infer,
            **{name: self._refuse(name, why) for name, why in _REFUSED.items()},
        }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                **{name: _unary(do) for name, do in unary.items()},
                "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
            },
        )

    # About the server and its models.

    async def _live(self, data: bytes, context: Context) -> bytes:
        return wire.live(True)

    async def _ready(self, data: bytes, context: Context) -> bytes:
        return wire.ready(any(view.ready for view in self._generator.models()))

    async def _server_metadata(self, data: bytes, context: Context) -> bytes:
        return wire.server_metadata(self._version)

    def _model_ready(self, data: bytes, views: list[ModelView]) -> bytes:
        name, version = wire.named("ModelReadyRequest", data)
        return wire.ready(any(view.ready for view in views if view.name == name and version in ("", wire.VERSION)))

    def _model_metadata(self, data: bytes, views: list[ModelView]) -> bytes:
        view = _one_of(views, *wire.named("ModelMetadataRequest", data))
        return wire.model_metadata(view.name, fields.INPUTS, fields.OUTPUTS)

    def _model_config(self, data: bytes, views: list[ModelView]) -> bytes:
        view = _one_of(views, *wire.named("ModelConfigRequest", data))
        return wire.model_config(view.name, fields.INPUTS, fields.OUTPUTS)

    def _index(self, data: bytes, views: list[ModelView]) -> bytes:
        ready = wire.only_ready(data)
        return wire.model_index([view for view in views if view.ready or not ready])

    async def _statistics(self, data: bytes, context: Context) -> bytes:
        # Of all tenants together, so an operator's.
        await self._authenticator.identify(_presented(context), Scope.ADMIN)
        name, version = wire.named("ModelStatisticsRequest", data)
        views = self._generator.models()
        return wire.model_statistics((_one_of(views, name, version) if name else views[0]).name, await self._stats())

    def _known(self, do: Callable[[bytes, list[ModelView]], bytes]) -> _Method:
        """For those who have a credential: with the models that they may use."""

        async def method(data: bytes, context: Context) -> bytes:
            return do(data, await self._generator.models_for(_presented(context)))

        return method

    def _refuse(self, name: str, why: str) -> _Method:
        async def method(data: bytes, context: Context) -> bytes:
            raise Unimplemented(name, why)

        return method

    # Answers.

    async def _infer(self, data: bytes, context: Context) -> bytes:
        request = wire.infer_request(data)
        infer = fields.read(request)
        if infer.stream:
            raise Invalid("stream", "a stream of responses needs ModelStreamInfer")
        begun = await self.begin(request, infer, context, _presented(context))
        try:
            whole = await _whole(begun, infer)
        finally:
            begun.answer.close()
        context.set_trailing_metadata(self._loads.trailer())
        return begun.reply.whole(whole)

    async def begin(self, request: wire.InferRequest, infer: Infer, context: Context, who: Presented) -> Begun:
        """Whoever begins closes the answer."""
        arrival = self._generator.now()
        if request.model_version not in ("", wire.VERSION):
            raise _no_version(request.model_name, request.model_version)
        timeouts = [s for s in (context.time_remaining(), infer.timeout_s) if s is not None]
        wanted = Wanted(
            model=request.model_name,
            prompt=infer.prompt,
            prompt_field=infer.prompt_field,
            asked=infer.asked,
            lane=infer.lane,
            timeout_s=min(timeouts, default=None),
            presented=who,
        )
        try:
            accepted = await self._generator.accept(wanted, arrival)
        except Invalid as error:
            raise infer.relabelled(error) from None
        reply = wire.Reply(request, accepted.request.model, infer.outputs, say_final=infer.say_final)
        return Begun(self._generator.submit(accepted), reply, len(accepted.request.prompt))

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        async def serve() -> None:
            # Once for all, so that who may not come in is told by a status.
            await self._authenticator.caller(_presented(context))
            await _Stream(self, context).serve(requests)
            context.set_trailing_metadata(self._loads.trailer())

        await answer(context, serve)


class _Stream:
    """One ModelStreamInfer: its requests, each with a task, and the one place they write to."""

    def __init__(self, edge: KServeEdge, context: Context) -> None:
        self._edge = edge
        self._context = context
        self._presented = _presented(context)
        self._room = asyncio.Semaphore(edge.streamed_at_once)
        #: gRPC takes one message after the other.
        self._turn = asyncio.Lock()
        #: Triton's clients may ask that the first failure ends the stream, with a status.
        self._ends_on_error = ("triton_grpc_error", "true") in (context.invocation_metadata() or ())

    async def serve(self, requests: AsyncIterator[bytes]) -> None:
        """Until all that was asked is answered. When the call is cancelled, so is whatever is open."""
        failures: list[TandemError] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._room.acquire()
                async for data in requests:
                    tasks.create_task(self._one(data)).add_done_callback(lambda _: self._room.release())
                    await self._room.acquire()
        except* TandemError as group:
            failures += (error for error in group.exceptions if isinstance(error, TandemError))
        if failures:
            raise failures[0]

    async def _one(self, data: bytes) -> None:
        request = None
        try:
            request = wire.infer_request(data)
            await self._answer(request)
        except TandemError as error:
            await self._failed(request, error)
        except Exception:
            await self._failed(request, internal())

    async def _answer(self, request: wire.InferRequest) -> None:
        infer = fields.read(request)
        begun = await self._edge.begin(request, infer, self._context, self._presented)
        try:
            if infer.stream:
                async for data in _streamed(begun, infer, self._write_now):
                    await self._write(data)
            else:
                await self._write(begun.reply.streamed(await _whole(begun, infer), final=True))
        finally:
            begun.answer.close()

    async def _failed(self, request: wire.InferRequest | None, error: TandemError) -> None:
        if self._ends_on_error:
            raise error
        await self._write(wire.failed(request, kserve_error(error)))

    async def _write(self, data: bytes) -> None:
        async with self._turn:
            await self._context.write(data)

    def _write_now(self, data: bytes) -> bool:
        context = self._context
        return not self._turn.locked() and isinstance(context, Call) and context.write_now(data)


class Begun(NamedTuple):
    answer: Answer
    reply: wire.Reply
    prompt_tokens: int


class _Piece(NamedTuple):
    """What one response tells."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    #: Empty before the end.
    finish_reason: str
    prompt_tokens: int
    #: Of all tokens so far.
    cumulative_logprob: float


async def _streamed(begun: Begun, infer: Infer, write_now: Callable[[bytes], bool]) -> AsyncIterator[bytes]:
    """All but what `write_now` could write."""
    reply = begun.reply
    names = [name for name, _ in infer.outputs]
    text_alone = names == ["text_output"]
    before = infer.prompt if infer.with_prompt and isinstance(infer.prompt, str) else ""
    cumulative = 0.0

    def say(part: Part) -> bool:
        if before or not text_alone:
            return False
        return not part.text or write_now(reply.text(part.text))

    async for part in begun.answer.parts(say):
        if isinstance(part, End):
            if "finish_reason" in names:
                end = _Piece(before, (), (), _reason(part), begun.prompt_tokens, cumulative)
                yield reply.streamed(_values(names, end), final=True)
            elif infer.say_final:
                yield reply.empty_final()
        elif text_alone:
            if part.text:
                yield reply.text(before + part.text)
                before = ""
        elif part.text or part.token_ids:
            cumulative += sum(entry.logprob for entry in part.logprobs)
            piece = _Piece(before + part.text, part.token_ids, part.logprobs, "", begun.prompt_tokens, cumulative)
            yield reply.streamed(_values(names, piece))
            before = ""


async def _whole(begun: Begun, infer: Infer) -> list[list[Element]]:
    parts: list[Part] = []
    reason = ""
    async for part in begun.answer.parts():
        if isinstance(part, Part):
            parts.append(part)
        else:
            reason = _reason(part)
    logprobs = tuple(entry for part in parts for entry in part.logprobs)
    piece = _Piece(
        text=(str(infer.prompt) if infer.with_prompt else "") + "".join(part.text for part in parts),
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        logprobs=logprobs,
        finish_reason=reason,
        prompt_tokens=begun.prompt_tokens,
        cumulative_logprob=sum(entry.logprob for entry in logprobs),
    )
    return _values([name for name, _ in infer.outputs], piece)


def _reason(end: End) -> str:
    return (FinishReason.STOP if end.stop_match else end.finished.reason).value


def _values(names: list[str], piece: _Piece) -> list[list[Element]]:
    return [_VALUES[name](piece) for name in names]


#: By output, its elements.
_VALUES: dict[str, Callable[[_Piece], list[Element]]] = {
    "text_output": lambda piece: [piece.text.encode()],
    "finish_reason": lambda piece: [piece.finish_reason.encode()],
    "num_input_tokens": lambda piece: [piece.prompt_tokens],
    "num_output_tokens": lambda piece: [len(piece.token_ids)],
    "logprobs": lambda piece: [_logprobs_json(piece.logprobs)],
    "cumulative_logprob": lambda piece: [piece.cumulative_logprob],
    "output_ids": lambda piece: list(piece.token_ids),
    "sequence_length": lambda piece: [len(piece.token_ids)],
    "output_log_probs": lambda piece: [entry.logprob for entry in piece.logprobs],
    "cum_log_probs": lambda piece: [piece.cumulative_logprob],
    "batch_index": lambda piece: [0],
    "sequence_index": lambda piece: [0],
}


def _logprobs_json(entries: tuple[TokenLogprobs, ...]) -> bytes:
    """As vLLM's backend has them: for each token an object, by token id, of the token and its alternatives."""
    return msgspec.json.encode([dict(_ranked(entry)) for entry in entries])


def _ranked(entry: TokenLogprobs) -> Iterator[tuple[str, dict[str, float | int | None]]]:
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, 1)}
    yield str(entry.token_id), {"logprob": entry.logprob, "rank": ranks.get(entry.token_id)}
    for token_id, logprob in entry.top:
        if token_id != entry.token_id:
            yield str(token_id), {"logprob": logprob, "rank": ranks[token_id]}


#: What Triton has and a cluster like this has not.
_SHARED_MEMORY = "tensors come with their requests"
_MODELS = "the cluster serves what its workers have loaded"
_REFUSED = {
    "RepositoryModelLoad": _MODELS,
    "RepositoryModelUnload": _MODELS,
    "SystemSharedMemoryRegister": _SHARED_MEMORY,
    "SystemSharedMemoryUnregister": _SHARED_MEMORY,
    "CudaSharedMemoryRegister": _SHARED_MEMORY,
    "CudaSharedMemoryUnregister": _SHARED_MEMORY,
}

_Method = Callable[[bytes, Context], Awaitable[bytes]]


def _unary(do: _Method) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def method(data: bytes, context: Context) -> bytes:
        return await answer(context, lambda: do(data, context))

    return grpc.unary_unary_rpc_method_handler(method)


def _one_of(views: list[ModelView], name: str, version: str) -> ModelView:
    view = next((view for view in views if view.name == name), None)
    if view is None:
        raise NotFound("model", name, f"model {name!r} is not served here")
    if version not in ("", wire.VERSION):
        raise _no_version(name, version)
    return view


def _no_version(name: str, version: str) -> NotFound:
    return NotFound("model", f"{name}/{version}", f"model {name!r} has version {wire.VERSION} alone")


def _presented(context: Context) -> Presented:
    return presented(context.invocation_metadata(), context.auth_context(), peer=context.peer())
