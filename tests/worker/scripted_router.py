"""A router that does what a test says, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc

from protos import inference_pb2, worker_link_pb2, worker_link_pb2_grpc
from trust.join import Side, join_key, nonce, proof
from trust.tls import PLAINTEXT, Tls, TlsFiles

Worker = worker_link_pb2.WorkerMessage
Router = worker_link_pb2.RouterMessage
WAIT_S = 60


class Link:
    """One worker's stream, from its hello on."""

    def __init__(self, hello: worker_link_pb2.Hello) -> None:
        self.hello = hello
        self.orders: asyncio.Queue[Router | None] = asyncio.Queue()
        self.received: list[Worker] = []
        #: The worker has closed its half, or its connection is gone.
        self.over = asyncio.Event()
        #: Cleared: the router stops reading.
        self.reading = asyncio.Event()
        self.reading.set()
        self._changed = asyncio.Condition()
        self._taken = 0
        self._marks: set[str] = set()

    def send(self, **message: object) -> None:
        self.orders.put_nowait(Router(**message))  # type: ignore[arg-type]

    def close(self) -> None:
        self.orders.put_nowait(None)

    def prefill(self, leg_id: str, **order: object) -> None:
        self.send(prefill=worker_link_pb2.PrefillOrder(leg_id=leg_id, **(_order() | order)))  # type: ignore[arg-type]

    def decode(self, leg_id: str, **order: object) -> None:
        order = _order() | {"prompt_tokens": 3} | order
        self.send(decode=worker_link_pb2.DecodeOrder(leg_id=leg_id, **order))  # type: ignore[arg-type]

    def cancel(self, leg_id: str) -> None:
        self.send(cancel=worker_link_pb2.CancelLeg(leg_id=leg_id))

    async def add(self, message: Worker) -> None:
        async with self._changed:
            self.received.append(message)
            self._changed.notify_all()

    async def next(self) -> Worker:
        """The next message but load reports and marks."""
        async with asyncio.timeout(WAIT_S), self._changed:
            while True:
                await self._changed.wait_for(lambda: len(self.received) > self._taken)
                message = self.received[self._taken]
                self._taken += 1
                if not message.HasField("load") and message.leg_failed.leg_id not in self._marks:
                    return message

    async def next_load(self) -> worker_link_pb2.LoadReport:
        """The next load report that comes from now on."""
        seen = len(self.received)
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: any(message.HasField("load") for message in self.received[seen:]))
        return next(message.load for message in self.received[seen:] if message.HasField("load"))

    async def settled(self) -> None:
        """Until the worker has acted on all that was sent before, and had a moment to let it take effect."""
        mark = f"mark {len(self._marks)}"
        self._marks.add(mark)
        self.decode(mark, token_ids=[])  # is answered at once, and answers come in order
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: self.terminals(mark))
        await self.next_load()
        await self.next_load()

    async def outputs(self, leg_id: str) -> list[int]:
        """Reads on until this leg has finished; its tokens."""
        tokens: list[int] = []
        while True:
            message = await self.next()
            assert message.HasField("step"), message
            for output in message.step.outputs:
                if output.leg_id == leg_id:
                    tokens += output.token_ids
                    if output.finish_reason:
                        return tokens

    def terminals(self, leg_id: str) -> int:
        """How often this leg was ended, in all that was received."""
        return sum(_ends(message, leg_id) for message in self.received)


class ScriptedRouter(worker_link_pb2_grpc.WorkerLinkServicer):
    def __init__(self, server: grpc.aio.Server, load_report_interval_s: float) -> None:
        self._server = server
        self.address = ""
        self.interval_s = load_report_interval_s
        #: Answer a hello with the welcome.
        self.welcoming = True
        #: What it knows of the cluster's secret.
        self.key = join_key(b"secret")
        #: A worker has said hello.
        self.greeted = False
        #: End every stream with this status.
        self.refusing: grpc.StatusCode | None = None
        self._links: asyncio.Queue[Link] = asyncio.Queue()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def link(self) -> Link:
        """The next link a worker makes."""
        async with asyncio.timeout(WAIT_S):
            return await self._links.get()

    async def Connect(
        self, request_iterator: AsyncIterator[Worker], context: grpc.aio.ServicerContext[Worker, Router]
    ) -> AsyncIterator[Router]:
        first = (await anext(request_iterator)).introduction
        challenge = worker_link_pb2.Challenge(router_id="scripted", nonce=nonce())

        def made_by(side: Side, key: bytes) -> bytes:
            return proof(
                key,
                side,
                worker_id=first.worker_id,
                incarnation=first.incarnation,
                router_id="scripted",
                worker_nonce=first.nonce,
                router_nonce=challenge.nonce,
            )

        if self.key:
            challenge.proof = made_by(Side.ROUTER, self.key)
        yield Router(challenge=challenge)
        link = Link((await anext(request_iterator)).hello)
        self.greeted = True
        assert link.hello.proof == made_by(Side.WORKER, self.key or join_key(b"secret"))
        self._links.put_nowait(link)
        if self.refusing:
            link.over.set()
            await context.abort(self.refusing, "not now")
        if self.welcoming:
            yield Router(welcome=worker_link_pb2.Welcome(router_id="scripted", load_report_interval_s=self.interval_s))
        reader = asyncio.create_task(self._read(request_iterator, link))
        try:
            while (order := await link.orders.get()) is not None:
                yield order
        finally:
            reader.cancel()
            link.over.set()

    async def _read(self, requests: AsyncIterator[Worker], link: Link) -> None:
        async for message in requests:
            await link.add(message)
            await link.reading.wait()
        link.over.set()
        link.close()


@asynccontextmanager
async def scripted_router(
    port: int = 0, load_report_interval_s: float = 0.02, tls: TlsFiles = PLAINTEXT
) -> AsyncIterator[ScriptedRouter]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    router = ScriptedRouter(server, load_report_interval_s)
    worker_link_pb2_grpc.add_WorkerLinkServicer_to_server(router, server)
    address = f"127.0.0.1:{port}"
    if tls.serves:
        port = server.add_secure_port(address, Tls(tls).server_credentials())
    else:
        port = server.add_insecure_port(address)
    router.address = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield router
    finally:
        await router.stop()


def sampling(**fields: object) -> inference_pb2.Sampling:
    return inference_pb2.Sampling(**({"max_tokens": 8} | fields))  # type: ignore[arg-type]


def _order() -> dict[str, object]:
    return {"tenant": "t", "token_ids": [1, 2, 3], "sampling": sampling(), "timeout_s": 30.0}


def _ends(message: Worker, leg_id: str) -> int:
    match message.WhichOneof("message"):
        case "prefill_done":
            return int(message.prefill_done.leg_id == leg_id)
        case "leg_failed":
            return int(message.leg_failed.leg_id == leg_id)
        case "step":
            outputs: Sequence[worker_link_pb2.StepOutput] = message.step.outputs
            return sum(output.leg_id == leg_id and output.finish_reason != 0 for output in outputs)
    return 0
