"""vllm.grpc.engine.VllmEngine at one worker, so that a gateway of somebody else's can drive the hand-off.

    gateway -> prefill worker   Generate, kv_transfer_params {"do_remote_decode": true, "reader": "decode-0"}
    prefill worker -> gateway   one token, kv_transfer_params with a handle and this worker's address
    gateway -> decode worker    Generate, those parameters as they are
    decode worker               fetches, confirms, decodes from the prompt's first token on

Legs are the same as routers order, with the same limits, and routers' legs run beside them. Whoever can call is
trusted with all requests of this port, so beyond this machine it takes a certificate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from decode.batch import StepBatch
from decode.service import DecodeOrder
from engine.base import (
    DecodeLeg,
    EngineInfo,
    FailureKind,
    LegError,
    PrefillLeg,
    PrefillResult,
    Staged,
    StepOutput,
    TokenLogprobs,
)
from prefill.service import PrefillOrder
from trust.tls import Tls, certificate_names
from worker import vllm_engine_wire as wire
from worker.config import Role, WorkerConfig
from worker.health import Health
from worker.service import WorkerService
from worker.stops import StopFinder, Tokenizer, load_tokenizer

SERVICE = wire.SERVICE

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]
Write = Callable[[bytes], Awaitable[None]]
T = TypeVar("T")
Method = Callable[[bytes, Context], Awaitable[T]]

#: Of a caller that names no deadline.
_TIMEOUT_S = 3600.0
#: For calls that run to end when the worker leaves.
_LAST_WORDS_S = 1.0
_CODES = {
    FailureKind.REJECTED: grpc.StatusCode.UNAVAILABLE,
    # The gateway's to run again from its prefill on, as with an engine that is lost.
    FailureKind.TRANSFER: grpc.StatusCode.UNAVAILABLE,
    FailureKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.ENGINE: grpc.StatusCode.UNAVAILABLE,
    FailureKind.EXPIRED: grpc.StatusCode.DEADLINE_EXCEEDED,
}
#: A gateway's connection stays up through pings on quiet streams.
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class _Leg:
    """A leg's end at its caller: what it says, kept until it is sent."""

    def __init__(self) -> None:
        self.prefilled: PrefillResult | None = None
        self.failure: LegError | None = None
        self._steps = StepBatch()
        self._said = asyncio.Event()

    def offered(self, leg_id: str, handle: bytes) -> None:
        """Early handles are for routers, which can make use of them."""

    def prefill_done(self, leg_id: str, result: PrefillResult) -> None:
        self.prefilled = result
        self._said.set()

    def fetched(self, leg_id: str, staged: Staged) -> None:
        """Metrics tell."""

    def step(self, leg_id: str, output: StepOutput, *, first: bool = False) -> None:
        self._steps.add(leg_id, output)
        self._said.set()

    def failed(self, leg_id: str, kind: FailureKind, detail: str) -> None:
        self.failure = LegError(kind, detail)
        self._said.set()

    async def said(self) -> list[StepOutput]:
        """Waits for what is new. Raises LegError."""
        await self._said.wait()
        self._said.clear()
        if outputs := [output for _, output in self._steps.take()]:
            if self.failure is not None or len(self._steps):
                self._said.set()
            return outputs
        if self.failure is not None:
            raise self.failure
        return []


class EnginePort:
    """Serves the API on a port of its own."""

    def __init__(self, config: WorkerConfig, info: EngineInfo, worker: WorkerService, health: Health) -> None:
        self._config = config
        self._info = info
        self._worker = worker
        self._files = wire.ModelFiles(Path(config.engine_options.model))
        self._text: Tokenizer | None = None
        names = config.engine_certificates
        self._certificates = frozenset(name if "://" in name else name.lower() for name in names)
        self._began = asyncio.get_running_loop().time()
        #: Open calls, by the id that the caller gave; for Abort.
        self._open: dict[str, dict[_Leg, str]] = {}
        self._server = grpc.aio.server(
            options=(*_OPTIONS, ("grpc.max_receive_message_length", config.link.message_bytes_max))
        )
        self._server.add_generic_rpc_handlers((self.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, self._server)
        reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), self._server, wire.POOL)

    async def start(self) -> int:
        """The port. Raises RuntimeError when it is taken."""
        address, tls = self._config.engine_listen, self._config.engine_options.tls
        if tls.serves:
            credentials = Tls(tls).server_credentials(require_client_cert=True)
            port = self._server.add_secure_port(address, credentials)
        else:
            port = self._server.add_insecure_port(address)
        await self._server.start()
        return port

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self._server.wait_for_termination()
        finally:
            await self._server.stop(_LAST_WORDS_S)

    def handlers(self) -> grpc.GenericRpcHandler:
        asked: dict[str, Callable[[bytes], Awaitable[bytes]]] = {
            "HealthCheck": self._health,
            "GetModelInfo": self._model_info,
            "GetServerInfo": self._server_info,
            "GetLoads": self._loads,
            "Abort": self._abort,
        }
        unary = {name: self._known(_answering(do)) for name, do in asked.items()}
        refused = {name: _refuse(name, why) for name, why in wire.REFUSED.items()}
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                **{name: grpc.unary_unary_rpc_method_handler(do) for name, do in (unary | refused).items()},
                "SubscribeKvEvents": grpc.unary_stream_rpc_method_handler(refused["SubscribeKvEvents"]),
                "Generate": grpc.unary_stream_rpc_method_handler(self._known(self._generate)),
                "GetTokenizer": grpc.unary_stream_rpc_method_handler(self._known(self._tokenizer)),
            },
        )

    def _known(self, do: Method[T]) -> Method[T]:
        """For those on the list alone, where there is one."""

        async def method(data: bytes, context: Context) -> T:
            if self._certificates and self._certificates.isdisjoint(certificate_names(context.auth_context())):
                log.warning("a caller of the engine API is refused: %s has none of the names", context.peer())
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no name in the certificate may call here")
            return await do(data, context)

        return method

    # Legs.

    async def _generate(self, data: bytes, context: Context) -> None:
        try:
            request = wire.generate(data, self._info, self._config.engine_options.cluster_secret)
            remaining = context.time_remaining()
            await self._serve(request, _TIMEOUT_S if remaining is None else remaining, context.write)
        except wire.Refused as refused:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(refused))
        except LegError as error:
            # An engine's own words may tell more of this machine than is anybody's business.
            detail = "the engine failed; its log tells how" if error.kind is FailureKind.ENGINE else error.detail
            await context.abort(_CODES[error.kind], detail)

    async def _serve(self, request: wire.Generate, timeout_s: float, write: Write) -> None:
        request_id = request.request_id or uuid4().hex
        # Both legs of a request are named after it, by which the decode worker knows its bytes; a gateway may name its
        # two calls differently.
        named = request.handle.leg_id.rsplit("/", 2)[0] if request.handle else request_id
        if request.hand_off or self._is_prefill_alone(request):
            await self._prefill(request, request_id, f"{named}/gateway/p", timeout_s, write)
        elif request.answers == 1:
            await self._decode(request, request_id, f"{named}/gateway/d", timeout_s, write)
        else:
            await self._decode_all(request, request_id, f"{named}/gateway/d", timeout_s, write)

    def _is_prefill_alone(self, request: wire.Generate) -> bool:
        """Gateways give a prompt to a prefill worker even where they do not hand it off, for one token."""
        return self._worker.role is Role.PREFILL and request.sampling.max_tokens == 1 and request.answers == 1

    @contextmanager
    def _leg(self, request_id: str, leg_id: str) -> Iterator[_Leg]:
        """Open for Abort, and cancelled unless all goes well."""
        leg = _Leg()
        self._open.setdefault(request_id, {})[leg] = leg_id
        try:
            yield leg
        except BaseException:
            self._worker.cancel(leg, leg_id)
            raise
        finally:
            del self._open[request_id][leg]
            if not self._open[request_id]:
                del self._open[request_id]

    async def _prefill(
        self, request: wire.Generate, request_id: str, leg_id: str, timeout_s: float, write: Write
    ) -> None:
        with self._leg(request_id, leg_id) as leg:
            self._worker.order(leg, _prefill_order(request, leg_id, timeout_s))
            while leg.prefilled is None:
                await leg.said()
            await self._tell_prefilled(request, leg.prefilled, write)

    async def _tell_prefilled(self, request: wire.Generate, done: PrefillResult, write: Write) -> None:
        logprobs = [done.logprobs] if done.logprobs else []
        if request.stream:
            await write(
                wire.chunk(
                    [done.token_id],
                    logprobs,
                    prompt_tokens=len(request.prompt),
                    cached_tokens=done.cached_tokens,
                    index=0,
                )
            )
        params = done.handle and wire.handed_off(self._config.worker_id, self._info.kv_address, done.handle)
        reason = done.finish_reason.value if done.finish_reason else "length"
        await write(
            wire.complete(
                [done.token_id],
                logprobs,
                reason,
                prompt_tokens=len(request.prompt),
                cached_tokens=done.cached_tokens,
                kv_transfer_params_json=params or None,
            )
        )

    async def _decode(
        self, request: wire.Generate, request_id: str, leg_id: str, timeout_s: float, write: Write, index: int = 0
    ) -> None:
        stops = await self._stops(request)
        with self._leg(request_id, leg_id) as leg:
            self._worker.order(leg, _decode_order(request, leg_id, timeout_s, index))
            token_ids: list[int] = []
            logprobs: list[TokenLogprobs] = []
            cached, finish, matched = 0, "", None
            while not finish:
                for output in await leg.said():
                    new, cached = output.token_ids, max(cached, output.cached_tokens)
                    finish = output.finish_reason.value if output.finish_reason else ""
                    token_ids += new
                    if stops is not None and (match := stops.match(token_ids, len(new))) is not None:
                        matched, kept = match
                        new, finish = new[: len(new) - (len(token_ids) - kept)], "stop"
                        del token_ids[kept:]
                    logprobs += output.logprobs[: len(new)]
                    if request.stream and new:
                        await write(
                            wire.chunk(
                                new,
                                output.logprobs[: len(new)],
                                prompt_tokens=len(request.prompt),
                                cached_tokens=cached,
                                index=index,
                            )
                        )
            if matched is not None:
                self._worker.cancel(leg, leg_id)
        await write(
            wire.complete(
                token_ids,
                logprobs,
                finish,
                prompt_tokens=len(request.prompt),
                cached_tokens=cached,
                index=index,
                matched_stop=matched,
            )
        )

    async def _decode_all(
        self, request: wire.Generate, request_id: str, leg_id: str, timeout_s: float, write: Write
    ) -> None:
        turn = asyncio.Lock()  # gRPC takes one message after the other

        async def in_turn(data: bytes) -> None:
            async with turn:
                await write(data)

        try:
            async with asyncio.TaskGroup() as tasks:
                for index in range(request.answers):
                    name = f"{leg_id}{index}"
                    tasks.create_task(self._decode(request, request_id, name, timeout_s, in_turn, index))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _stops(self, request: wire.Generate) -> StopFinder | None:
        if not request.stops:
            return None
        if self._text is None:
            self._text = await asyncio.to_thread(load_tokenizer, Path(self._config.engine_options.model))
        return StopFinder(self._text, request.stops, request.sampling.min_tokens)

    async def _abort(self, data: bytes) -> bytes:
        for request_id in wire.aborted_ids(data):
            for leg, leg_id in tuple(self._open.get(request_id, {}).items()):
                self._worker.cancel(leg, leg_id)
                leg.failed(leg_id, FailureKind.REJECTED, "aborted")
        return wire.aborted()

    # About this worker.

    async def _health(self, data: bytes) -> bytes:
        if self._worker.draining:
            return wire.health(False, "draining")
        return wire.health(True, "serving")

    async def _model_info(self, data: bytes) -> bytes:
        return wire.model_info(self._files, self._info)

    async def _server_info(self, data: bytes) -> bytes:
        uptime_s = asyncio.get_running_loop().time() - self._began
        snapshot = self._worker.snapshot()
        return wire.server_info(
            self._config.worker_id,
            self._worker.role,
            self._info,
            active=snapshot.prefill_legs + snapshot.decode_legs,
            uptime_s=uptime_s,
        )

    async def _loads(self, data: bytes) -> bytes:
        snapshot = self._worker.snapshot()
        return wire.loads(await self._worker.load(), self._info, open_legs=snapshot.prefill_legs + snapshot.decode_legs)

    async def _tokenizer(self, data: bytes, context: Context) -> None:
        for message in await asyncio.to_thread(lambda: list(wire.tokenizer(self._files))):
            await context.write(message)


def _prefill_order(request: wire.Generate, leg_id: str, timeout_s: float) -> PrefillOrder:
    return PrefillOrder(
        leg=PrefillLeg(
            leg_id=leg_id,
            tenant=wire.TENANT,
            token_ids=request.prompt,
            sampling=request.sampling,
            cache_salt=wire.TENANT,
            hand_off=request.hand_off,
            reader=request.reader,
            # The gateway gives the decode worker the prompt, not the token sampled here.
            resample=True,
        ),
        timeout_s=timeout_s,
    )


def _decode_order(request: wire.Generate, leg_id: str, timeout_s: float, index: int) -> DecodeOrder:
    sampling = request.sampling
    if sampling.seed is not None and index:
        sampling = replace(sampling, seed=sampling.seed + index)  # else all would say the same
    return DecodeOrder(
        leg=DecodeLeg(
            leg_id=leg_id,
            tenant=wire.TENANT,
            token_ids=request.prompt,
            prompt_tokens=len(request.prompt),
            sampling=sampling,
            cache_salt=wire.TENANT,
        ),
        timeout_s=timeout_s,
        handle=request.handle.handle if request.handle else b"",
    )


def _answering(do: Callable[[bytes], Awaitable[bytes]]) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def method(data: bytes, context: Context) -> bytes:
        try:
            return await do(data)
        except wire.Refused as refused:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(refused))
        except LegError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine gave no answer")

    return method


def _refuse(name: str, why: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def method(data: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not supported: {why}")

    return method
