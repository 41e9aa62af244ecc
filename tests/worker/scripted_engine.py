"""An engine that does what a test says, when it says so. For the paths that a real one takes only when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from engine.base import (
    DecodeLeg,
    EngineInfo,
    EngineLoad,
    FailureKind,
    FinishReason,
    LegError,
    ModelInfo,
    Offered,
    PeerLane,
    PrefillLeg,
    PrefillResult,
    Staged,
    StepOutput,
    Take,
)

INFO = EngineInfo(
    kind="scripted",
    version="1",
    model=ModelInfo(name="m", revision="r", max_model_len=4096, vocab_size=1000, eos_token_ids=(2,)),
    block_tokens=16,
    kv_blocks=100,
    max_running=8,
    kv_address="127.0.0.1:1",
    kv_incarnation="kv-1",
    kv_layout={"block_tokens": "16"},
)


class ScriptedEngine:
    """Legs are named by the router's leg id, without what the worker adds to it. A step that is not `held` is done at
    once: a prefill samples 7, a fetch stages, a connect finds a lane. A decode waits for `push`."""

    def __init__(self) -> None:
        #: Steps that wait for `let_go`: "start", "prefill", "fetch", "fetch ahead", "connect", "load", "stop", and
        #: "abort" of any.
        self.held: set[str] = set()
        #: Offer a prefill's blocks when it begins.
        self.streams = False
        self.failing: dict[str, Exception] = {}
        #: What began, ended by itself, and was aborted: "<step> <leg>".
        self.begun: list[str] = []
        self.done: list[str] = []
        self.aborted: list[str] = []
        #: Engine leg ids, as the worker made them.
        self.leg_ids: list[str] = []
        self.legs: dict[str, PrefillLeg | DecodeLeg] = {}
        self.leases: set[bytes] = set()
        self.released: list[bytes] = []
        self.discarded: list[str] = []
        self.met: list[tuple[str, str]] = []
        self.stopped = False
        self._changed = asyncio.Condition()
        self._outputs: dict[str, asyncio.Queue[StepOutput | Exception]] = {}
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # What a test does

    async def until(self, line: str) -> None:
        """Until this was begun, done or aborted: "begun prefill a/1/p"."""
        state, what = line.split(" ", 1)
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: what in getattr(self, state))

    async def let_go(self, step: str) -> None:
        self.held.discard(step)
        await self._notify()

    def push(self, leg_id: str, *tokens: int, end: bool = False) -> None:
        reason = FinishReason.LENGTH if end else None
        self._outputs[leg_id].put_nowait(StepOutput(leg_id=leg_id, token_ids=tokens, finish_reason=reason))

    def push_error(self, leg_id: str, error: Exception) -> None:
        self._outputs[leg_id].put_nowait(error)

    def die(self, reason: str) -> None:
        self._dead.set_result(reason)

    # Engine

    async def start(self) -> EngineInfo:
        await self._step("start", "")
        return INFO

    async def stop(self) -> None:
        await self._step("stop", "")
        self.stopped = True

    async def prefill(self, leg: PrefillLeg, offered: Offered | None = None) -> PrefillResult:
        name = self._name(leg)
        handle = b"handle of " + leg.leg_id.encode() if leg.hand_off else None
        if handle and offered and self.streams:
            offered(handle)
        await self._step("prefill", name)
        if handle:
            self.leases.add(handle)
        return PrefillResult(token_id=7, handle=handle, queue_s=0.25, prefill_s=0.5)

    async def fetch(self, handle: bytes, timeout_s: float, *, ahead: bool = False) -> Staged:
        await self._step("fetch ahead" if ahead else "fetch", handle.decode())
        self.leases.discard(handle)
        return Staged(staged_id=handle.decode(), tokens=3, transport="scripted", transfer_bytes=48, fetch_s=timeout_s)

    async def discard(self, staged: Staged) -> None:
        self.discarded.append(staged.staged_id)

    def decode(self, leg: DecodeLeg, take: Take | None = None) -> AsyncIterator[StepOutput]:
        if error := self.failing.get("decode"):
            raise error
        return self._decode(leg)

    async def _decode(self, leg: DecodeLeg) -> AsyncIterator[StepOutput]:
        name = self._name(leg)
        outputs = self._outputs[name] = asyncio.Queue()
        finished = False
        try:
            await self._note(self.begun, f"decode {name}")
            while not finished:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._outputs[name]
            (self.done if finished else self.aborted).append(f"decode {name}")
            await self._notify()

    async def release(self, handle: bytes) -> None:
        self.released.append(handle)
        self.leases.discard(handle)
        await self._notify()

    async def connect(self, peer: str, address: str) -> PeerLane:
        self.met.append((peer, address))
        await self._step("connect", peer)
        return PeerLane(peer=peer, transport="scripted", gigabytes_per_s=1.5)

    async def load(self) -> EngineLoad:
        await self._step("load", "")
        return EngineLoad(kv_blocks_free=100, kv_blocks_total=100, leases_held=len(self.leases))

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._dead)

    def _name(self, leg: PrefillLeg | DecodeLeg) -> str:
        assert leg.leg_id not in self.leg_ids, "an engine never sees a leg id twice"
        self.leg_ids.append(leg.leg_id)
        name = leg.leg_id.rpartition("~")[0]
        self.legs[name] = leg
        return name

    async def _step(self, step: str, what: str) -> None:
        line = f"{step} {what}".rstrip()
        try:
            await self._note(self.begun, line)
            async with self._changed:
                await self._changed.wait_for(lambda: step not in self.held)
            if error := self.failing.get(step):
                raise error
        except asyncio.CancelledError:
            async with self._changed:
                await self._changed.wait_for(lambda: "abort" not in self.held)
            await self._note(self.aborted, line)
            raise
        await self._note(self.done, line)

    async def _note(self, lines: list[str], line: str) -> None:
        lines.append(line)
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def transfer_failed() -> LegError:
    return LegError(FailureKind.TRANSFER, "the lease did not hold")
