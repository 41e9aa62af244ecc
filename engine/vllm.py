"""vLLM behind the engine seam. It runs in a process of its own, `engine/vllm_process.py`, beside the worker's: a step's
Python and the event loop's would take the interpreter from each other, and what ends vLLM ends that process alone.

The two talk over a socket pair, one message per step with all legs' outputs (`engine/vllm_wire.py`). This side imports
nothing of vLLM. It owns the legs: what the engine process is told to begin, it is told to abort unless it has said that
it is done, and whoever ends first takes the other along: the engine process exits when its socket closes, and its exit
is seen here at once through its pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from engine import vllm_wire as wire
from engine.base import (
    DecodeLeg,
    EngineInfo,
    EngineLoad,
    EngineOptions,
    FailureKind,
    FinishReason,
    LegError,
    Offered,
    PeerLane,
    PrefillLeg,
    PrefillResult,
    Sampling,
    Staged,
    StepOutput,
    Take,
    TokenLogprobs,
)
from kv_transfer.vllm_params import PrefillOrder

ROOT = Path(__file__).resolve().parents[1]

#: The engine process gets this long to leave in good order.
_STOP_TIMEOUT_S = 5.0
#: For calls that do not wait for a peer, and on top of a fetch's own deadline.
_ANSWER_TIMEOUT_S = 5.0
_MEET_TIMEOUT_S = 10.0
#: Enough for oneDNN's larger matmuls, which must have run once before the first leg.
_WARM_UP_TOKENS = 128
#: Weights up to this size count in full for the model's revision, larger files by samples.
_HASH_WHOLE_BYTES = 64 * 1024 * 1024
_HASH_SAMPLES = 64
_HASH_SAMPLE_BYTES = 64 * 1024

#: By vLLM's name. Others ("abort", "error") are failures.
_FINISH_REASONS = {"": None, "stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class EngineDidNotStart(Exception):
    pass


class VllmEngine:
    """See engine.base.Engine."""

    #: Module and class of the connector that vLLM loads.
    connector = ("kv_transfer.vllm_connector", "TandemConnector")

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._numbers = itertools.count()
        self._process: _EngineProcess | None = None
        self._info: EngineInfo | None = None
        #: What has come for each leg under way, by its name there. Bounded by the leg's tokens.
        self._legs: dict[str, _Came] = {}
        #: Calls that wait for their answer.
        self._calls: dict[int, asyncio.Future[wire.Answer]] = {}
        #: Why no leg can be served; empty while they can.
        self._dead_reason = "the engine has not started"
        self._died = asyncio.Event()
        self._ready: asyncio.Future[EngineInfo] | None = None

    # ------------------------------------------------------------------------------------------------ start and stop

    async def start(self) -> EngineInfo:
        try:
            revision, eos_token_ids = await asyncio.to_thread(_read_model_dir, Path(self._options.model))
            ready = self._ready = asyncio.get_running_loop().create_future()
            self._process = await _EngineProcess.start(self._options, self._handle, self._exited)
            self._process.send(
                wire.Launch(
                    options=self._options,
                    incarnation=secrets.token_hex(8),
                    revision=revision,
                    eos_token_ids=eos_token_ids,
                    connector=self.connector,
                )
            )
            self._info = await ready
            self._dead_reason = ""
            await self._warm_up(self._info.model.max_model_len)
        except BaseException:
            await self.stop()
            raise
        return self._info

    async def _warm_up(self, max_model_len: int) -> None:
        tokens = min(_WARM_UP_TOKENS, max_model_len - 2)
        sampling = Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)
        leg = DecodeLeg(leg_id="warm-up", tenant="", token_ids=(0,) * tokens, prompt_tokens=tokens, sampling=sampling)
        async for _ in self.decode(leg):
            pass
        self._send(wire.ForgetPrefixes())

    def _die(self, reason: str) -> None:
        if self._died.is_set():
            return
        self._dead_reason = reason
        self._died.set()
        error = LegError(FailureKind.ENGINE, reason)
        for leg in self._legs.values():
            leg.put(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineDidNotStart(reason))
            self._ready.exception()  # nobody waits for it if the start was given up

    async def wait_dead(self) -> str:
        await self._died.wait()
        return self._dead_reason

    async def stop(self) -> None:
        self._die("the engine was stopped")
        process, self._process = self._process, None
        if process is not None:
            await process.stop(at_once=self._info is None)

    def _exited(self, how: str) -> None:
        self._die(f"vLLM's process {how}")

    def _running(self) -> EngineInfo:
        if self._dead_reason or self._info is None:
            raise LegError(FailureKind.ENGINE, self._dead_reason)
        return self._info

    # --------------------------------------------------------------------------------------------- the engine process

    def _send(self, message: wire.ToEngine) -> None:
        if self._process is not None and not self._dead_reason:
            self._process.send(message)

    def _handle(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Output(name) | wire.Offered(name):
                if leg := self._legs.get(name):  # or it was given up while this was on its way
                    leg.put(message)
            case wire.Ready(info):
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(info)
            case wire.Refused("", _, detail):
                self._die(detail)
            case wire.Refused(name, kind, detail):
                if leg := self._legs.get(name):
                    leg.put(LegError(kind, detail))
            case _:
                self._answered(message)

    def _answered(self, answer: wire.Answer) -> None:
        call = self._calls.get(answer.call)
        if call is not None and not call.done():
            call.set_result(answer)
        else:  # the cancel crossed it
            self._unwanted(answer)

    def _unwanted(self, answer: wire.Answer) -> None:
        if isinstance(answer, wire.Fetched):
            self._send(wire.Discard(answer.staged.staged_id))

    async def _call(self, call: int, message: wire.ToEngine, timeout_s: float) -> wire.Answer:
        """Raises LegError."""
        self._running()
        answer = self._calls[call] = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            async with asyncio.timeout(timeout_s):
                answered = await answer
        except BaseException as error:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._unwanted(answer.result())  # it came in the moment in which it was given up
            if isinstance(error, TimeoutError):
                raise LegError(FailureKind.ENGINE, f"the engine process did not answer for {timeout_s:g} s") from error
            raise
        finally:
            del self._calls[call]
        if isinstance(answered, wire.Failed):
            raise LegError(answered.kind, answered.detail)
        return answered

    # ----------------------------------------------------------------------------------------------------------- legs

    async def prefill(self, leg: PrefillLeg, offered: Offered | None = None) -> PrefillResult:
        # A first token that is also the last one leaves nothing to hand over.
        hand_off = leg.hand_off and (leg.resample or leg.sampling.max_tokens > 1)
        name = self._name(leg.leg_id)
        order = PrefillOrder(
            transfer_id=name,
            hand_off=hand_off,
            tenant=leg.tenant,
            reader=leg.reader,
            ttl_s=leg.lease_ttl_s,
            overlap=hand_off and offered is not None,
            even_if_stopped=leg.resample,
        )
        sampling = replace(leg.sampling, max_tokens=1, min_tokens=min(1, leg.sampling.min_tokens))
        if leg.resample:
            sampling = replace(sampling, structure=None)  # nobody reads this token: spare compiling a grammar
        add = wire.Add(name, leg.token_ids, leg.cache_salt, sampling, prefill=order)
        try:
            async with contextlib.aclosing(self._run(add)) as outputs:
                async for output in outputs:
                    if isinstance(output, wire.Output):
                        return self._prefill_result(leg, output)
                    if offered is not None:
                        offered(output.handle)
        except BaseException:
            if hand_off:
                self._send(wire.Abort(name))  # also when it is done: for the lease
            raise
        raise AssertionError("a leg without a last output")

    def _prefill_result(self, leg: PrefillLeg, output: wire.Output) -> PrefillResult:
        report, max_model_len = output.report, self._running().model.max_model_len
        assert report is not None, "the connector reports on every prefill that was not aborted"
        finish_reason = None
        if _FINISH_REASONS[output.finish_reason] is FinishReason.STOP:
            finish_reason = FinishReason.STOP
        elif leg.sampling.max_tokens == 1 or len(leg.token_ids) + 1 >= max_model_len:
            finish_reason = FinishReason.LENGTH
        if report.refusal and (leg.resample or finish_reason is None):
            raise LegError(FailureKind.REJECTED, f"the blocks can't be handed over: {report.refusal}")
        (token_id,) = output.token_ids
        return PrefillResult(
            token_id=token_id,
            logprobs=next(iter(_logprobs(output, leg.sampling)), None),
            finish_reason=finish_reason,
            handle=report.handle,
            cached_tokens=output.cached_tokens,
            queue_s=report.queue_s,
            prefill_s=report.prefill_s,
        )

    async def decode(self, leg: DecodeLeg, take: Take | None = None) -> AsyncGenerator[StepOutput, None]:
        add = wire.Add(self._name(leg.leg_id), leg.token_ids, leg.cache_salt, leg.sampling, staged=leg.staged)
        cached_tokens_known = leg.staged is not None  # vLLM counts what was staged as cached

        def said(output: wire.Output) -> StepOutput:
            nonlocal cached_tokens_known
            cached_tokens, cached_tokens_known = 0 if cached_tokens_known else output.cached_tokens, True
            return StepOutput(
                leg_id=leg.leg_id,
                token_ids=output.token_ids,
                finish_reason=_FINISH_REASONS[output.finish_reason],
                logprobs=_logprobs(output, leg.sampling),
                cached_tokens=cached_tokens,
            )

        takes = None if take is None else lambda output: take(said(output))
        async with contextlib.aclosing(self._run(add, takes)) as outputs:
            async for output in outputs:
                assert isinstance(output, wire.Output)
                yield said(output)

    async def _run(
        self, add: wire.Add, take: Callable[[wire.Output], None] | None = None
    ) -> AsyncGenerator[wire.Output | wire.Offered, None]:
        """What comes for one leg, until it is finished, but for what is taken. Raises LegError. However it is left, the
        leg has ended in the engine, or has been told to, when this is closed."""
        self._running()
        finished = False
        came = self._legs[add.name] = _Came(take)
        self._send(add)
        try:
            while not finished:
                message = await came.waiting.get()
                if isinstance(message, LegError):
                    raise message
                if isinstance(message, wire.Output) and message.finish_reason:
                    finished = True
                    if message.finish_reason not in _FINISH_REASONS:
                        raise LegError(FailureKind.ENGINE, f"vLLM ended the leg: {message.finish_reason}")
                yield message
        finally:
            del self._legs[add.name]
            if not finished:
                self._send(wire.Abort(add.name))

    def _name(self, leg_id: str) -> str:
        """The engine process's name for a leg, and its transfer's: unlike a leg's id, it surely never comes twice."""
        return f"{leg_id}#{next(self._numbers)}"

    # ------------------------------------------------------------------------------------------------------------- KV

    async def fetch(self, handle: bytes, timeout_s: float, *, ahead: bool = False) -> Staged:
        call = next(self._numbers)
        try:
            answer = await self._call(call, wire.Fetch(call, handle, timeout_s, ahead), timeout_s + _ANSWER_TIMEOUT_S)
        except BaseException:
            self._send(wire.Cancel(call))
            raise
        assert isinstance(answer, wire.Fetched)
        return answer.staged

    async def discard(self, staged: Staged) -> None:
        self._send(wire.Discard(staged.staged_id))

    async def release(self, handle: bytes) -> None:
        self._running()
        self._send(wire.Release(handle))

    async def connect(self, peer: str, address: str) -> PeerLane:
        call = next(self._numbers)
        answer = await self._call(call, wire.Connect(call, peer, address), _MEET_TIMEOUT_S)
        assert isinstance(answer, wire.Met)
        return answer.lane

    async def load(self) -> EngineLoad:
        call = next(self._numbers)
        answer = await self._call(call, wire.Load(call), _ANSWER_TIMEOUT_S)
        assert isinstance(answer, wire.Loaded)
        # Legs that are on their way there, and not counted yet, wait, too.
        return replace(answer.load, waiting=max(0, len(self._legs) - answer.load.running))


class _Came:
    """What has come for a leg and waits, as all does but outputs that are taken, and do not end it."""

    def __init__(self, take: Callable[[wire.Output], None] | None) -> None:
        self._take = take
        self.waiting = asyncio.Queue[wire.Output | wire.Offered | LegError]()

    def put(self, message: wire.Output | wire.Offered | LegError) -> None:
        if self._take is not None and isinstance(message, wire.Output) and not message.finish_reason:
            self._take(message)
        else:
            self.waiting.put_nowait(message)


def _logprobs(output: wire.Output, sampling: Sampling) -> tuple[TokenLogprobs, ...]:
    """Those asked for, the sampled token's own among them in its place."""
    if sampling.logprobs is None:
        return ()
    return tuple(_with_own(entry, sampling.logprobs) for entry in output.logprobs)


def _with_own(entry: TokenLogprobs, wanted: int) -> TokenLogprobs:
    top = entry.top[:wanted]
    if all(token != entry.token_id for token, _ in top):
        top += ((entry.token_id, entry.logprob),)
    return TokenLogprobs(entry.token_id, entry.logprob, top)


class _EngineProcess(asyncio.Protocol):
    """The engine process, and this process's end of the socket to it."""

    def __init__(self, child: subprocess.Popen[bytes], handle: Callable[[wire.FromEngine], None]) -> None:
        self._child = child
        self._handle = handle
        self._frames = wire.from_engine()
        self._transport: asyncio.Transport | None = None
        self._gone = asyncio.Event()

    @classmethod
    async def start(
        cls, options: EngineOptions, handle: Callable[[wire.FromEngine], None], exited: Callable[[str], None]
    ) -> _EngineProcess:
        """`exited` is told, once, how the process ended."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                child = _spawn(theirs, options)
        except BaseException:
            ours.close()
            raise
        process = cls(child, handle)
        loop, pidfd = asyncio.get_running_loop(), os.pidfd_open(child.pid)

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            process._gone.set()
            exited(_exit_words(child.wait()))

        loop.add_reader(pidfd, ended)
        await loop.create_connection(lambda: process, sock=ours)
        return process

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, message: wire.ToEngine) -> None:
        assert self._transport is not None
        self._transport.write(wire.frame((message,)))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not derived from it

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._handle(message)

    async def stop(self, at_once: bool) -> None:
        if at_once:
            self._child.kill()
        elif not self._gone.is_set():
            self.send(wire.Stop())
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._gone.wait()
        except TimeoutError:
            self._child.kill()
            await self._gone.wait()
        if self._transport is not None:
            self._transport.close()


def _spawn(end: socket.socket, options: EngineOptions) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "engine.vllm_process", str(end.fileno())]
    return subprocess.Popen(command, pass_fds=(end.fileno(),), stdin=subprocess.DEVNULL, env=_environment(options))


def _exit_words(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with {code}; the log says why"


def _environment(options: EngineOptions) -> dict[str, str]:
    """What vLLM and the libraries below it read. What somebody has set stays, but for what the engine's shape depends
    on."""
    told = dict(os.environ)
    told["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), told.get("PYTHONPATH", "")]))
    told["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model worker is in the process of the scheduler
    told["VLLM_NO_USAGE_STATS"] = "1"
    told["HF_HUB_OFFLINE"] = "1"
    told.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    told.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    told.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.device != "cuda":
        told.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override the KV cache's size
        told.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        told.setdefault("OMP_NUM_THREADS", str(options.cpu_threads or 1))
        # The first request for log probabilities would wait, and all others with it, for a small function to compile.
        told.setdefault("TORCHDYNAMO_DISABLE", "1")
    libraries = Path(sys.prefix, "lib", "tandem-native")
    if libraries.is_dir():
        told["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries), told.get("LD_LIBRARY_PATH", "")]))
    return told


def _read_model_dir(path: Path) -> tuple[str, tuple[int, ...]]:
    """Revision and end-of-sequence tokens of a Hugging Face model directory.

    The revision is a hash over the configuration and the weights. Of weights larger than 64 MiB it sees the length,
    both ends and evenly spaced samples: enough to tell any two trainings apart, not made against an adversary.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no model directory: it has no config.json")
    digest = hashlib.sha256()
    names = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    for name in names:
        size = name.stat().st_size
        digest.update(f"{name.name} {size}\n".encode())
        with name.open("rb") as file:
            for offset, length in _hashed_parts(size):
                file.seek(offset)
                digest.update(file.read(length))
    ends: dict[int, None] = {}
    for name in (path / "generation_config.json", path / "config.json"):
        if name.is_file():
            told = json.loads(name.read_bytes()).get("eos_token_id")
            ends.update(dict.fromkeys(told if isinstance(told, list) else [] if told is None else [told]))
    return digest.hexdigest()[:32], tuple(ends)


def _hashed_parts(size: int) -> Iterator[tuple[int, int]]:
    if size <= _HASH_WHOLE_BYTES:
        yield 0, size
        return
    for sample in range(_HASH_SAMPLES):
        yield sample * (size - _HASH_SAMPLE_BYTES) // (_HASH_SAMPLES - 1), _HASH_SAMPLE_BYTES
