"""Decode legs at one worker: fetch what prefill computed, or take over what was fetched ahead, then decode. Bytes are
confirmed before the engine hears of the leg, so a transfer that fails ends here, and the router runs the prefill leg
again. Who may ask and when a leg expires is the caller's; see worker/legs.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol, cast

from decode.admission import DecodeLimits
from decode.ahead import FetchesAhead
from engine.base import DecodeLeg, Engine, FailureKind, LegError, Staged, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOrder:
    #: As the router names it; the engine knows the leg by an id of this process.
    leg: DecodeLeg
    timeout_s: float
    #: Empty: the prompt is computed here.
    handle: bytes = b""


class DecodeReply(Protocol):
    def fetched(self, staged: Staged) -> None: ...
    def step(self, output: StepOutput) -> None: ...


class DecodeService:
    def __init__(self, engine: Engine, limits: DecodeLimits, ahead: FetchesAhead) -> None:
        self._engine = engine
        self._limits = limits
        self._ahead = ahead
        self._fetches = asyncio.Semaphore(limits.fetches)

    async def serve(self, order: DecodeOrder, engine_leg_id: str, reply: DecodeReply) -> None:
        """Says what was fetched, if anything was to be, then the outputs, the last with a finish reason.

        Raises LegError. Cancelling stops the read or aborts the leg in the engine, whichever is going on.
        """
        staged = await self._fetch(order) if order.handle else None
        try:
            if staged:
                _check_request(staged, order.leg)
                reply.fetched(staged)
            outputs = self._engine.decode(replace(order.leg, leg_id=engine_leg_id, staged=staged), reply.step)
        except BaseException:
            if staged:
                await self._engine.discard(staged)
            raise
        # From its first step on the iterator owns the staged bytes: it is the engine that knows whether its scheduler
        # may still read them.
        async with aclosing(cast(AsyncGenerator[StepOutput, None], outputs)):
            async for output in outputs:
                reply.step(output)
                if output.finish_reason:
                    return
        raise LegError(FailureKind.ENGINE, "the engine ended the leg without a finish reason")

    async def _fetch(self, order: DecodeOrder) -> Staged:
        timeout_s = min(self._limits.fetch_timeout_s, order.timeout_s)
        clock = asyncio.get_running_loop().time
        ordered = clock()
        if (staged := await self._ahead.take(order.handle, timeout_s)) is not None:
            return replace(staged, fetch_s=clock() - ordered)
        async with self._fetches:
            try:
                return await self._engine.fetch(order.handle, timeout_s)
            except LegError as error:
                if error.kind is not FailureKind.REJECTED or not await self._ahead.give_way():
                    raise
            return await self._engine.fetch(order.handle, timeout_s)


def _check_request(staged: Staged, leg: DecodeLeg) -> None:
    """Raises LegError unless the bytes are this request's: a handle says for which worker it is, and not for which leg.

    Both are named after their request, "<tenant>/<request>/<number>/p" and ".../d"; what engines and transfers add
    comes after.
    """
    transfer, _, word = staged.staged_id.rpartition("#")
    if word and transfer and _request(transfer) != _request(leg.leg_id):
        raise LegError(FailureKind.TRANSFER, f"the handle is of transfer {transfer}, this is leg {leg.leg_id}")


def _request(leg_id: str) -> str:
    return leg_id.rsplit("/", 2)[0]
