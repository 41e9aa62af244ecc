"""The simulated engine: a continuous batcher over real KV memory, without a model's weights or a GPU.

For capacity tests, and for everything that must be tried many times: it schedules like vLLM, keeps and moves KV blocks
like vLLM, through the same kv_transfer code, and takes the time a real engine would (`step_time`, `speedup`) or none.
What it answers follows from its KV memory (sim_memory.py), so that what goes wrong there shows in the tokens.

One task runs the steps; between them the event loop is everyone's. Idle, it waits for the next leg or the end of a
lease.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.base import (
    FETCH_FAILURES,
    DecodeLeg,
    EngineInfo,
    EngineLoad,
    EngineOptions,
    FailureKind,
    LegError,
    Offered,
    PeerLane,
    PrefillLeg,
    PrefillResult,
    Staged,
    StepOutput,
    Take,
)
from engine.sim_blocks import BlockPool
from engine.sim_core import CoreLimits, PrefillDone, Readable, SimCore, StagedPages
from engine.sim_lane import PacedTransport
from engine.sim_memory import Chain, ChainMemory
from engine.sim_model import SimModel, read_model
from engine.step_time import StepWork, step_time
from kv_transfer.api import Fetched, FetchError, NodeLimits, OfferRefused
from kv_transfer.inproc import InprocHub
from kv_transfer.layout import KvLayout
from kv_transfer.node import KvNode
from kv_transfer.registry import make_transports
from kv_transfer.segments import ArenaMap
from kv_transfer.transport import ARENA, STAGING, Region, Transport
from kv_transfer.turn import Cancel
from trust.tls import Tls

log = logging.getLogger(__name__)

VERSION = "1"
_WAITING_MAX = 16 * 1024
#: Concurrent fetches, and threads for them and the node's other blocking calls.
_FETCHES_MAX = 32
_LEASES_MAX = 1024
#: How far behind its model a paced engine may fall and still catch up.
_LAG_MAX_S = 0.1


class SimEngine:
    """See engine.base.Engine. `hub` is for engines that share a process and the transport "inproc". With `bytes_per_s`
    reads of other engines' KV take as long as they would on a lane of that speed."""

    def __init__(
        self, options: EngineOptions, hub: InprocHub | None = None, *, bytes_per_s: float | None = None
    ) -> None:
        self._options = options
        self._hub = hub
        self._bytes_per_s = bytes_per_s
        self._step_time = step_time(options.step_time)
        self._state: _Started | None = None
        self._steps: asyncio.Task[None] | None = None
        #: Set when there may be something to compute.
        self._woken = asyncio.Event()
        self._prefills: dict[str, _Prefill] = {}
        self._streams: dict[str, _Stream] = {}
        #: Why no leg can be served; empty while they can.
        self._dead_reason = "the engine is not started"
        self._died = asyncio.Event()

    # Start and stop

    async def start(self) -> EngineInfo:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._woken.set)

        started = self._state = await asyncio.to_thread(_start, self._options, self._transports, wake)
        started.step_end = loop.time()
        self._dead_reason = ""
        self._steps = asyncio.create_task(self._run(started), name=f"sim-steps-{self._options.name}")
        return started.info

    def _transports(self, tls: Tls | None) -> Sequence[Transport]:
        made = make_transports(self._options.transports, host=self._options.kv_host, hub=self._hub, tls=tls)
        return made if self._bytes_per_s is None else [PacedTransport(each, self._bytes_per_s) for each in made]

    async def stop(self) -> None:
        self._die("the engine was stopped")
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.cancel()
            await asyncio.wait([steps])
        started, self._state = self._state, None
        if started is not None:
            await asyncio.to_thread(started.node.close)
            started.threads.shutdown(wait=False)

    async def wait_dead(self) -> str:
        await self._died.wait()
        return self._dead_reason

    def _die(self, reason: str) -> None:
        if self._died.is_set():
            return
        self._dead_reason = reason
        self._died.set()
        for prefill in self._prefills.values():
            if not prefill.result.done():
                prefill.result.set_exception(LegError(FailureKind.ENGINE, reason))
        for stream in self._streams.values():
            stream.fail(LegError(FailureKind.ENGINE, reason))
        self._prefills.clear()
        self._streams.clear()

    def _started(self) -> _Started:
        if self._dead_reason or self._state is None:
            raise LegError(FailureKind.ENGINE, self._dead_reason)
        return self._state

    # Steps

    async def _run(self, started: _Started) -> None:
        started.step_end = asyncio.get_running_loop().time()  # the first step has no lost time to make up for
        try:
            while True:
                await self._step(started)
        except Exception as error:
            log.exception("%s: a step failed", self._options.name)
            self._die(f"a step failed: {error!r}")

    async def _step(self, started: _Started) -> None:
        core, node, clock = started.core, started.node, asyncio.get_running_loop().time
        self._woken.clear()
        if core.leases:
            for transfer_id in node.take_ended():
                core.end_lease(transfer_id)
        plan = core.begin(clock())
        for staged_id in plan.consumed:
            node.consumed(staged_id)
        if not plan:
            await self._woken.wait()
            started.step_end = clock()
            return
        await self._pace(started, plan.work)
        result = core.finish(clock(), plan)
        for readable in result.readable:
            self._publish(started, readable)
        for done in result.prefills:
            self._deliver(started, done)
        for output in result.outputs:
            stream = self._streams[output.leg_id]
            if output.finish_reason:
                del self._streams[output.leg_id]
            stream.put(output)

    async def _pace(self, started: _Started, work: StepWork) -> None:
        """Waits until the step would be over; in any case long enough for everyone else on the loop to have a turn."""
        if self._options.speedup == 0:
            await asyncio.sleep(0)
            return
        now = asyncio.get_running_loop().time()
        started.step_end = end_of_step(started.step_end, now, self._step_time.step_s(work) / self._options.speedup)
        await asyncio.sleep(max(0.0, started.step_end - now))

    def _publish(self, started: _Started, readable: Readable) -> None:
        """Lets the reader begin with what is computed."""
        leg, prefill = readable.leg, self._prefills[readable.leg.leg_id]
        if not prefill.handle and prefill.offered is not None:
            offered, prefill.offered = prefill.offered, None
            with suppress(OfferRefused):  # then it is offered as a whole, when it is done
                prefill.handle = started.node.stream(
                    transfer_id=leg.leg_id,
                    tenant=leg.tenant,
                    reader=leg.reader,
                    tokens=len(leg.token_ids),
                    ttl_s=leg.lease_ttl_s,
                )
                offered(prefill.handle)
        if prefill.handle:
            started.node.publish(leg.leg_id, readable.blocks, readable.tokens)

    def _deliver(self, started: _Started, done: PrefillDone) -> None:
        leg = done.leg
        prefill = self._prefills.pop(leg.leg_id)
        if prefill.result.done():  # cancelled in this very turn of the loop
            started.node.withdraw(leg.leg_id)
            started.core.end_lease(leg.leg_id)
            return
        if done.lease is None:
            prefill.result.set_result(done.result)
            return
        try:
            handle = self._lease(started, leg, prefill, done.lease.blocks)
        except OfferRefused as refused:
            started.core.end_lease(leg.leg_id)
            prefill.result.set_exception(LegError(FailureKind.REJECTED, f"no lease: {refused}"))
        else:
            prefill.result.set_result(replace(done.result, handle=handle))

    def _lease(self, started: _Started, leg: PrefillLeg, prefill: _Prefill, blocks: tuple[int, ...]) -> bytes:
        """The handle to a finished prompt's blocks: the one that is being read already, or a new one."""
        tokens = len(leg.token_ids)
        if prefill.handle and started.node.publish(leg.leg_id, blocks, tokens):
            return prefill.handle
        return started.node.offer(
            transfer_id=leg.leg_id,
            tenant=leg.tenant,
            reader=leg.reader,
            block_ids=blocks,
            tokens=tokens,
            ttl_s=leg.lease_ttl_s,
        )

    # Legs

    async def prefill(self, leg: PrefillLeg, offered: Offered | None = None) -> PrefillResult:
        started = self._started()
        loop = asyncio.get_running_loop()
        started.core.add_prefill(loop.time(), leg)
        self._woken.set()
        prefill = self._prefills[leg.leg_id] = _Prefill(loop.create_future(), offered)
        try:
            return await prefill.result
        except asyncio.CancelledError:
            if self._prefills.get(leg.leg_id) is prefill:
                del self._prefills[leg.leg_id]
                started.core.abort(leg.leg_id)
            # Or the result was on its way, with a lease that nobody will hear of.
            started.node.cancel(leg.leg_id)
            self._woken.set()
            raise

    async def decode(self, leg: DecodeLeg, take: Take | None = None) -> AsyncIterator[StepOutput]:
        started = self._started()
        pages = self._claim(started, leg.staged) if leg.staged else None
        try:
            started.core.add_decode(asyncio.get_running_loop().time(), leg, pages)
            self._woken.set()
            stream = self._streams[leg.leg_id] = _Stream(take)
            try:
                while True:
                    output = await stream.take()
                    yield output
                    if output.finish_reason:
                        return
            finally:
                if self._streams.get(leg.leg_id) is stream:
                    del self._streams[leg.leg_id]
                    started.core.abort(leg.leg_id)
                    self._woken.set()
        finally:
            if leg.staged:
                started.node.consumed(leg.staged.staged_id)

    def _claim(self, started: _Started, staged: Staged) -> StagedPages:
        pages = started.node.claim(staged.staged_id)
        if not pages:
            raise LegError(FailureKind.TRANSFER, f"nothing is staged under {staged.staged_id}")
        return StagedPages(staged.staged_id, staged.tokens, pages)

    # The hand-off

    async def fetch(self, handle: bytes, timeout_s: float, *, ahead: bool = False) -> Staged:
        node, cancel = self._started().node, Cancel()
        work = self._started().threads.submit(lambda: node.fetch(handle, timeout_s, cancel, ahead=ahead))
        try:
            fetched = await asyncio.wrap_future(work)
        except FetchError as error:
            raise LegError(FETCH_FAILURES[error.outcome], error.detail) from error
        except asyncio.CancelledError:
            cancel.set()
            work.add_done_callback(lambda done: _discard_result(node, done))
            raise
        return Staged(
            staged_id=fetched.staged_id,
            tokens=fetched.tokens,
            transport=fetched.transport,
            transfer_bytes=fetched.nbytes,
            fetch_s=fetched.fetch_s,
        )

    async def discard(self, staged: Staged) -> None:
        if self._state is not None:
            self._state.node.discard(staged.staged_id)

    async def release(self, handle: bytes) -> None:
        if self._state is not None:
            self._state.node.release(handle)

    async def connect(self, peer: str, address: str) -> PeerLane:
        started = self._started()
        lane = await asyncio.wrap_future(
            started.threads.submit(lambda: started.node.connect(peer=peer, address=address))
        )
        return PeerLane(
            peer=lane.peer, transport=lane.transport, gigabytes_per_s=lane.gigabytes_per_s, refusal=lane.refusal
        )

    async def load(self) -> EngineLoad:
        if self._state is None:
            return EngineLoad()
        core, stats = self._state.core, self._state.node.stats()
        totals = core.totals
        return EngineLoad(
            running=core.running,
            waiting=core.waiting,
            kv_blocks_free=core.pool.free,
            kv_blocks_total=core.pool.total,
            leases_held=core.leases,
            leased_blocks=core.leased_blocks,
            staged_pages=stats.staged_pages,
            transfer_bytes_total=stats.transfer_bytes_total,
            transfer_failures_total=stats.transfer_failures_total,
            leases_expired_total=stats.leases_expired_total,
            transfers_corrupt_total=stats.transfers_corrupt_total,
            extra={
                "steps_total": totals.steps,
                "prompt_tokens_total": totals.prompt_tokens,
                "cached_tokens_total": totals.cached_tokens,
                "output_tokens_total": totals.output_tokens,
                "preemptions_total": totals.preemptions,
                "kv_mismatches_total": totals.mismatches,
            },
        )

    def check_integrity(self, *, read_memory: bool = False) -> None:
        """Raises AssertionError when an invariant does not hold. For tests."""
        if self._state is not None:
            self._state.core.check_integrity(read_memory=read_memory)
            self._state.node.check_integrity()


@dataclass(slots=True)
class _Prefill:
    result: asyncio.Future[PrefillResult]
    #: Until it was called, or could not be.
    offered: Offered | None
    #: To what is read while it is computed.
    handle: bytes | None = None


@dataclass(slots=True)
class _Started:
    """What exists between start and stop."""

    info: EngineInfo
    core: SimCore
    node: KvNode
    threads: ThreadPoolExecutor
    #: Kept for the node, which has registered its address.
    staging: NDArray[np.uint8]
    #: When the last step ended by the step-time model, on the loop's clock.
    step_end: float = 0.0


def end_of_step(last_end: float, now: float, step_s: float) -> float:
    """Steps follow each other without the time that simulating them takes; what is lost beyond that stays lost."""
    return max(last_end, now - _LAG_MAX_S) + step_s


class _Stream:
    """Outputs on their way to one decode leg's reader; those it was too slow for are joined, unless it takes them."""

    def __init__(self, take: Take | None) -> None:
        self._take = take
        self._outputs: list[StepOutput] = []
        self._error: LegError | None = None
        self._changed = asyncio.Event()

    def put(self, output: StepOutput) -> None:
        if self._take is not None and not output.finish_reason:
            self._take(output)
            return
        self._outputs.append(output)
        self._changed.set()

    def fail(self, error: LegError) -> None:
        self._error = error
        self._changed.set()

    async def take(self) -> StepOutput:
        await self._changed.wait()
        outputs, self._outputs = self._outputs, []
        if not outputs:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._changed.clear()
        return outputs[0] if len(outputs) == 1 else _joined(outputs)


def _joined(outputs: list[StepOutput]) -> StepOutput:
    return StepOutput(
        leg_id=outputs[0].leg_id,
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        finish_reason=outputs[-1].finish_reason,
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        cached_tokens=outputs[0].cached_tokens,
    )


def _discard_result(node: KvNode, done: Future[Fetched]) -> None:
    if not done.cancelled() and done.exception() is None:
        node.discard(done.result().staged_id)


def _start(
    options: EngineOptions, transports: Callable[[Tls | None], Sequence[Transport]], wake: Callable[[], None]
) -> _Started:
    """Blocks; raises ValueError that names the option at fault, or TransportUnavailable."""
    model = read_model(options)
    memory, blocks = _memory(options, model)
    layout = _layout(options, model, memory)
    max_model_len = min(model.info.max_model_len, blocks * options.block_tokens)
    if options.max_model_len is not None and max_model_len < options.max_model_len:
        raise ValueError(
            f"max_model_len: {options.max_model_len} tokens do not fit in kv_cache_bytes, {max_model_len} do"
        )
    staging_pages = options.staging_bytes // memory.block_bytes
    staging = memory.pages(max(1, staging_pages))
    incarnation = secrets.token_hex(8)
    tls = Tls(options.tls) if options.tls.serves else None
    node = KvNode(
        name=options.name,
        incarnation=incarnation,
        layout=layout,
        model=options.served_model_name,
        secret=options.cluster_secret,
        transports=transports(tls),
        host=options.kv_host,
        tls=tls,
        verify=options.kv_verify,
        limits=NodeLimits(
            rows=_LEASES_MAX, blocks_per_row=-(-max_model_len // options.block_tokens), fetches=_FETCHES_MAX
        ),
    )
    core = SimCore(
        CoreLimits(
            max_running=options.max_running,
            max_batched_tokens=max(options.max_batched_tokens, options.max_running),
            long_prefill_token_threshold=options.long_prefill_token_threshold,
            max_waiting=_WAITING_MAX,
            max_model_len=max_model_len,
        ),
        memory,
        BlockPool(blocks),
        Chain(model.info.revision, model.info.vocab_size),
        model.usable_tokens,
        staging=memory.stamps_of(staging),
        prefix_caching=options.prefix_caching,
        withdraw=node.withdraw,
    )
    try:
        node.open(
            arena=_region(ARENA, memory.arena),
            arena_map=ArenaMap(blocks=blocks, segment_stride=memory.block_bytes, block_stride=memory.block_bytes),
            staging=_region(STAGING, staging),
            staging_pages=staging_pages,
            on_ended=wake,
        )
    except BaseException:
        node.close()
        raise
    info = EngineInfo(
        kind="sim",
        version=VERSION,
        model=replace(model.info, max_model_len=max_model_len),
        block_tokens=options.block_tokens,
        kv_blocks=blocks,
        max_running=options.max_running,
        kv_address=node.address,
        kv_incarnation=incarnation,
        kv_layout=layout.as_dict(),
    )
    threads = ThreadPoolExecutor(_FETCHES_MAX + 4, thread_name_prefix=f"sim-kv-{options.name}")
    return _Started(info, core, node, threads, staging)


def _memory(options: EngineOptions, model: SimModel) -> tuple[ChainMemory, int]:
    blocks = options.kv_cache_bytes // (options.block_tokens * model.kv_bytes_per_token)
    if blocks < 1:
        raise ValueError(
            f"kv_cache_bytes: {options.kv_cache_bytes} bytes hold no block of {options.block_tokens} tokens "
            f"at {model.kv_bytes_per_token} bytes each"
        )
    memory = ChainMemory(blocks=blocks, block_tokens=options.block_tokens, bytes_per_token=model.kv_bytes_per_token)
    return memory, blocks


def _layout(options: EngineOptions, model: SimModel, memory: ChainMemory) -> KvLayout:
    return KvLayout(
        engine="sim",
        model=options.served_model_name,
        revision=model.info.revision,
        dtype=model.dtype,
        block_tokens=options.block_tokens,
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        tensor_parallel=1,
        order="chain",
        isa="",
        segment_bytes=memory.block_bytes,
        segments_per_block=1,
    )


def _region(name: str, memory: NDArray[np.uint8]) -> Region:
    return Region(name, memory.ctypes.data, memory.nbytes)
