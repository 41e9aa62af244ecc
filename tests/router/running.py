"""A real router in this process and workers that do what a test says, all over real gRPC."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, worker_link_pb2
from protos import worker_link_pb2_grpc as link_grpc
from router.config import RequestLimits, RouterConfig
from router.core.limits import CoreLimits
from router.edge.text import ModelText
from router.main import Bound, serve
from trust import join

MODEL_DIR = Path(__file__).parents[2] / "models" / "tandem-nano"
MODEL = "nano"
CONTEXT = 4096
VOCAB = 4096
WAIT_S = 60.0
JOIN_KEY = b"only those who know this are workers"
GENERATE = "/tandem.v1.Inference/Generate"

PREFILL, DECODE, BOTH = worker_link_pb2.ROLE_PREFILL, worker_link_pb2.ROLE_DECODE, worker_link_pb2.ROLE_BOTH
STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH

Order = worker_link_pb2.RouterMessage
Message = worker_link_pb2.WorkerMessage


def hello(worker_id: str, role: int, **changes: object) -> worker_link_pb2.Hello:
    said = worker_link_pb2.Hello(
        worker_id=worker_id,
        incarnation="i0",
        role=role,  # type: ignore[arg-type]
        model=worker_link_pb2.ModelInfo(
            name=MODEL, revision="r0", max_model_len=CONTEXT, vocab_size=VOCAB, eos_token_ids=[0]
        ),
        capacity=worker_link_pb2.Capacity(prefill_legs=8, decode_legs=8, kv_blocks=4096, block_tokens=16),
        kv=worker_link_pb2.KvEndpoint(address=f"{worker_id}:1", incarnation="i0", layout={"dtype": "f32"}),
        engine="scripted",
        engine_version="1",
        pid=1,
    )
    said.MergeFrom(worker_link_pb2.Hello(**changes))  # type: ignore[arg-type]
    return said


@dataclass
class Worker:
    """One worker's end of its link. Left alone it keeps every order it gets; `serve` makes it answer them.

    Every answer is `answer`, so requests ask for as many tokens as that has: how many are left to generate then says
    where a leg begins.
    """

    name: str
    call: grpc.aio.StreamStreamCall[Message, Order]
    answer: tuple[int, ...] = ()
    #: A decode leg says no more than this many tokens of the answer, then waits.
    pause_at: int = 1_000_000
    tokens_per_step: int = 1
    orders: list[Order] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    serving: bool = False

    async def send(self, **message: object) -> None:
        await self.call.write(Message(**message))  # type: ignore[arg-type]

    async def read(self) -> None:
        try:
            async for order in self.call:
                async with self.changed:
                    self.orders.append(order)
                    self.changed.notify_all()
                if self.serving:
                    await self.obey(order)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
        finally:
            self.over.set()

    async def wait_for(self, kind: str, count: int = 1) -> list[Order]:
        """The orders of this kind, once there are so many."""

        def found() -> list[Order]:
            return [order for order in self.orders if order.WhichOneof("message") == kind]

        async with asyncio.timeout(WAIT_S), self.changed:
            await self.changed.wait_for(lambda: len(found()) >= count)
        return found()

    async def obey(self, order: Order) -> None:
        if order.HasField("prefill"):
            await self.prefill(order.prefill)
        elif order.HasField("decode"):
            await self.decode(order.decode)

    async def prefill(self, order: worker_link_pb2.PrefillOrder) -> None:
        at = len(self.answer) - order.sampling.max_tokens
        last = at == len(self.answer) - 1
        done = worker_link_pb2.PrefillDone(
            leg_id=order.leg_id,
            token_id=self.answer[at],
            finish_reason=LENGTH if last else inference_pb2.FINISH_REASON_UNSPECIFIED,
            handle=b"handle of " + order.leg_id.encode() if order.hand_off else b"",
            cached_tokens=2,
        )
        await self.send(prefill_done=done)

    async def decode_all(self, order: worker_link_pb2.DecodeOrder, tokens: tuple[int, ...]) -> None:
        """Answers in one step."""
        output = worker_link_pb2.StepOutput(leg_id=order.leg_id, token_ids=tokens, finish_reason=LENGTH)
        await self.send(step=worker_link_pb2.StepOutputs(outputs=[output]))

    async def decode(self, order: worker_link_pb2.DecodeOrder) -> None:
        if order.handle:
            fetched = worker_link_pb2.Fetched(leg_id=order.leg_id, transport="memory", bytes=64, fetch_s=0.001)
            await self.send(fetched=fetched)
        at = len(self.answer) - order.sampling.max_tokens
        while at < min(len(self.answer), self.pause_at):
            tokens = self.answer[at : min(at + self.tokens_per_step, self.pause_at)]
            at += len(tokens)
            finish = LENGTH if at == len(self.answer) else inference_pb2.FINISH_REASON_UNSPECIFIED
            output = worker_link_pb2.StepOutput(leg_id=order.leg_id, token_ids=tokens, finish_reason=finish)
            await self.send(step=worker_link_pb2.StepOutputs(outputs=[output]))


async def proven(
    call: grpc.aio.StreamStreamCall[Message, Order], said: worker_link_pb2.Hello, key: bytes = JOIN_KEY
) -> worker_link_pb2.Hello:
    """The hello with what makes its sender a worker, once the router has been introduced."""
    introduction = worker_link_pb2.Introduction(
        worker_id=said.worker_id, incarnation=said.incarnation, nonce=join.nonce()
    )
    await call.write(Message(introduction=introduction))
    challenge = await anext(aiter(call))
    said.proof = join.proof(
        key,
        join.Side.WORKER,
        worker_id=said.worker_id,
        incarnation=said.incarnation,
        router_id=challenge.challenge.router_id,
        worker_nonce=introduction.nonce,
        router_nonce=challenge.challenge.nonce,
    )
    return said


class Router:
    """A router under test, and everything that is connected to it."""

    def __init__(self, bound: Bound, stop: asyncio.Event, served: asyncio.Task[None], *, edges: int = 1) -> None:
        self.bound = bound
        self.stop = stop
        self.served = served
        options = (("grpc.use_local_subchannel_pool", 1),)
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{bound.port}", options=options)
        #: Where workers come, if not to the same port.
        self._links = (
            grpc.aio.insecure_channel(f"127.0.0.1:{bound.worker_port}", options=options) if edges > 1 else None
        )
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.control = control_pb2_grpc.ControlStub(self.channel)
        self.text = ModelText(MODEL_DIR)
        self._reading: list[asyncio.Task[None]] = []

    async def worker(
        self, name: str, role: int = BOTH, *, answer: tuple[int, ...] | None = None, **changes: object
    ) -> Worker:
        """Linked and welcomed. With an answer, it serves."""
        call = link_grpc.WorkerLinkStub(self._links or self.channel).Connect()
        worker = Worker(name, call, answer or (), serving=answer is not None)
        await worker.send(hello=await proven(call, hello(name, role, **changes)))
        self._reading.append(asyncio.create_task(worker.read()))
        await worker.wait_for("welcome")
        return worker

    async def pair(self, answer: tuple[int, ...] | None = None) -> tuple[Worker, Worker]:
        prefill, decode = await self.worker("p", PREFILL, answer=answer), await self.worker("d", DECODE, answer=answer)
        await decode.wait_for("peers")
        return prefill, decode

    async def leave(self, worker: Worker) -> None:
        worker.call.cancel()
        await worker.over.wait()

    def generate(
        self, *, timeout: float | None = WAIT_S, **request: object
    ) -> grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]:
        return self.inference.Generate(inference_pb2.GenerateRequest(**request), timeout=timeout)  # type: ignore[arg-type]

    def generate_raw(self, data: bytes) -> grpc.aio.UnaryStreamCall[bytes, bytes]:
        method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(GENERATE)
        return method(data, timeout=WAIT_S)

    async def call_raw(self, method: str, data: bytes) -> bytes:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(method)
        return await call(data, timeout=WAIT_S)

    async def status(self) -> control_pb2.Status:
        return await self.control.GetStatus(control_pb2.GetStatusRequest(requests=True))

    async def until(self, holds: Callable[[control_pb2.Status], bool]) -> control_pb2.Status:
        async with asyncio.timeout(WAIT_S):
            while not holds(status := await self.status()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # what is watched lies behind an RPC
        return status

    async def is_idle(self) -> control_pb2.Status:
        """Waits until no request and no leg is open."""
        return await self.until(
            lambda status: (
                not (status.requests or any(worker.prefill_legs or worker.decode_legs for worker in status.workers))
            )
        )

    async def close(self) -> None:
        self.stop.set()
        try:
            async with asyncio.timeout(WAIT_S):
                await self.served
        finally:
            for task in self._reading:
                task.cancel()
            await asyncio.gather(*self._reading, return_exceptions=True)
            if self._links is not None:
                await self._links.close()
            await self.channel.close()


@asynccontextmanager
async def running(
    limits: CoreLimits | None = None, requests: RequestLimits | None = None, **changes: object
) -> AsyncIterator[Router]:
    values = {
        "model_dir": str(MODEL_DIR),
        "port": 0,
        "shutdown_grace_s": 0.0,
        "load_report_interval_s": 0.05,
        "join_key": JOIN_KEY,
        "grpc_server": os.environ.get("TANDEM_TEST_GRPC_SERVER", "tandem"),
        "edges": int(os.environ.get("TANDEM_TEST_EDGES", "1")),
        **changes,
    }
    if values["edges"] != 1:
        values.setdefault("worker_listen", "127.0.0.1:0")
    config = RouterConfig(
        model_name=MODEL,
        limits=limits or CoreLimits(),
        requests=requests or RequestLimits(),
        **values,  # type: ignore[arg-type]
    )
    stop = asyncio.Event()
    bound: asyncio.Future[Bound] = asyncio.get_running_loop().create_future()
    served = asyncio.create_task(serve(config, bound.set_result, asked_to_stop=stop))
    await asyncio.wait((served, bound), return_when=asyncio.FIRST_COMPLETED)
    if served.done():
        served.result()
    router = Router(bound.result(), stop, served, edges=config.edges)
    try:
        yield router
    finally:
        await router.close()
