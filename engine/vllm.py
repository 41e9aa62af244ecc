"""vLLM behind the engine seam: `AsyncLLM` in the worker process, its EngineCore in a process of its own.

With VLLM_ENABLE_V1_MULTIPROCESSING=0 the model worker stays inside the EngineCore process, so there are two processes
where vLLM's default has three, and scheduler, KV memory and Tandem's connector are in one of them
(`kv_transfer/vllm_connector.py`). Legs go there as ordinary vLLM requests whose `kv_transfer_params` carry an order;
everything that waits for a network goes over a private Unix socket (KvLocal) instead, and never into the scheduler.

What vLLM leaves to its caller, and is done here:

- *Cancelling.* vLLM aborts a request when its generator is closed, but not one cancelled while it was being sent; and
  it ignores an abort for a prefill that has finished and is pinned. So every leg that ends without a result is
  aborted by its name, and a prefill leg's lease is ended by an `EndOrder`. Both go through vLLM's one ordered queue:
  whatever state the leg was in, the abort comes after it and the lease's end after the abort.
- *Stopping.* vLLM knows one end-of-sequence token, and none without a tokenizer; so all of them are given as stop
  tokens, with the same effect: the token is the last of the output, and `min_tokens` keeps it back.
- *Token ids outside the vocabulary* would be an index error inside a step, which ends EngineCore for everyone: in a
  prompt they are refused, as stop tokens, which can never be sampled, left out. `engine/vllm_cpu_worker.py` repairs
  another request of death.
- *Death.* EngineCore's exit is seen at once through its pidfd. vLLM fails the open requests; `wait_dead` tells the
  worker. In the other direction the connector ends EngineCore when this process goes.

The CPU's traps (measured; two engines on two cores ran at 0.4 tokens/s with the defaults): thread binding would put
all engines of a machine on the same cores, so it is off, with one thread unless OMP_NUM_THREADS says otherwise. AMX
needs a permission that vLLM does not ask for, see the connector, and the first large matmul initialises oneDNN: a
warm-up prefill comes before `start` returns. The KV cache has the size it is told, not a share of the machine.
Setting the seed of the engine also seeds this process' `random`: its state is put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import hashlib
import importlib
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.base import (
    LOGIT_BIAS,
    STRUCTURE,
    DecodeLeg,
    EngineInfo,
    EngineLoad,
    EngineOptions,
    FailureKind,
    FinishReason,
    LegError,
    ModelInfo,
    Offered,
    PeerLane,
    PrefillLeg,
    PrefillResult,
    Sampling,
    Staged,
    StepOutput,
    Structure,
    StructureKind,
    TokenLogprobs,
)
from kv_transfer.api import FetchError, Outcome
from kv_transfer.local import AsyncKvClient, EngineProcessLost
from kv_transfer.vllm_params import (
    ConnectorSettings,
    DecodeOrder,
    DropOrder,
    EndOrder,
    Order,
    PrefillOrder,
    RunDir,
    order_params,
    parse_report,
)

#: EngineCore gets this long to leave in good order.
_STOP_TIMEOUT_S = 5.0
#: Enough for oneDNN's larger matmuls, which must have run once before the first leg.
_WARM_UP_TOKENS = 128
#: Weights up to this size count in full for the model's revision, larger files by samples.
_HASH_WHOLE_BYTES = 64 * 1024 * 1024
_HASH_SAMPLES = 64
_HASH_SAMPLE_BYTES = 64 * 1024


class VllmEngine:
    """See engine.base.Engine."""

    #: Module and class of the connector that vLLM loads.
    connector = ("kv_transfer.vllm_connector", "TandemConnector")

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._incarnation = secrets.token_hex(8)
        self._numbers = itertools.count()
        #: vLLM's AsyncLLM, while it runs.
        self._llm: Any = None
        self._is_stopped = False
        self._kv: AsyncKvClient | None = None
        self._run_dir: RunDir | None = None
        self._model: ModelInfo | None = None
        #: Legs under way by vLLM's name for them, and whether they run; a decode leg does from its first output on.
        self._legs: dict[str, bool] = {}
        #: Staged ids that a decode leg has: vLLM's scheduler frees those.
        self._taken: set[str] = set()
        #: Why no leg can be served; empty while they can.
        self._dead_reason = "the engine has not started"
        self._died = asyncio.Event()

    # ------------------------------------------------------------------------------------------------ start and stop

    async def start(self) -> EngineInfo:
        self._run_dir = RunDir(tempfile.mkdtemp(prefix="tandem-engine-"))
        try:
            self._run_dir.write_secret(self._options.cluster_secret)
            revision, eos_token_ids = await asyncio.to_thread(_read_model_dir, Path(self._options.model))
            await _in_daemon_thread(lambda: self._launch(revision))
            config = self._llm.vllm_config
            self._model = ModelInfo(
                name=self._options.served_model_name,
                revision=revision,
                max_model_len=config.model_config.max_model_len,
                vocab_size=config.model_config.get_vocab_size(),
                eos_token_ids=eos_token_ids,
                features=(LOGIT_BIAS,) if config.model_config.skip_tokenizer_init else (LOGIT_BIAS, STRUCTURE),
            )
            self._watch_core()
            self._kv = AsyncKvClient(self._run_dir.socket)
            await self._warm_up()
        except BaseException:
            await self.stop()
            raise
        endpoint = self._run_dir.read_endpoint()
        return EngineInfo(
            kind="vllm",
            version=importlib.import_module("vllm.version").__version__,
            model=self._model,
            block_tokens=config.cache_config.block_size,
            kv_blocks=config.cache_config.num_gpu_blocks - 1,  # one is a placeholder of vLLM's
            max_running=config.scheduler_config.max_num_seqs,
            kv_address=endpoint.address,
            kv_incarnation=self._incarnation,
            kv_layout=endpoint.layout,
        )

    def _launch(self, revision: str) -> None:
        """Loads vLLM and starts EngineCore. Blocks for as long as that takes."""
        _set_environment(self._options.device)
        random_state = random.getstate()
        try:
            from vllm.v1.engine.async_llm import AsyncLLM

            # Held by no frame's local variable: vLLM keeps frames alive, and what is not collected in `stop` is
            # collected while the interpreter leaves, which AsyncLLM does not survive without a traceback.
            self._llm = AsyncLLM.from_engine_args(self._engine_args(revision))
        finally:
            random.setstate(random_state)
        if self._is_stopped:
            self._llm.shutdown()
            self._llm = None

    def _engine_args(self, revision: str) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig, StructuredOutputsConfig
        from vllm.platforms import current_platform

        options, run_dir = self._options, self._run_dir
        assert run_dir is not None
        if options.device not in ("auto", current_platform.device_type):
            raise ValueError(f"device {options.device!r}: this vLLM runs on {current_platform.device_type!r}")
        settings = ConnectorSettings(
            name=options.name,
            incarnation=self._incarnation,
            model=options.served_model_name,
            revision=revision,
            host=options.kv_host,
            transports=options.transports,
            staging_bytes=options.staging_bytes,
            kv_verify=options.kv_verify,
            run_dir=str(run_dir.path),
            tls=options.tls,
        )
        module, name = self.connector
        return AsyncEngineArgs(
            model=options.model,
            served_model_name=options.served_model_name,
            # vLLM's grammars are over the model's vocabulary, which it takes from the tokenizer.
            skip_tokenizer_init=not (Path(options.model) / "tokenizer.json").is_file(),
            generation_config="vllm",
            dtype=options.dtype,
            seed=options.seed,
            max_model_len=options.max_model_len,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            block_size=options.block_tokens,
            enable_prefix_caching=options.prefix_caching,
            max_num_seqs=options.max_running,
            max_num_batched_tokens=max(options.max_batched_tokens, options.max_running),
            # Compiling takes minutes on a CPU and gains little there.
            enforce_eager=current_platform.is_cpu(),
            worker_cls="engine.vllm_cpu_worker.SeedKeepingCpuWorker" if current_platform.is_cpu() else "auto",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            # vLLM keeps the backend that the first request with a form needed: better that none be its choice. Without
            # the second, a model may fill what is left of an answer with spaces.
            structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
            kv_transfer_config=KVTransferConfig(
                kv_connector=name,
                kv_connector_module_path=module,
                kv_role="kv_both",
                kv_connector_extra_config=settings.extra_config(),
            ),
        )

    def _watch_core(self) -> None:
        process = self._llm.engine_core.resources.engine_manager.processes[0]
        loop, pidfd = asyncio.get_running_loop(), os.pidfd_open(process.pid)
        self._dead_reason = ""

        def exited() -> None:
            loop.remove_reader(pidfd)
            self._die(f"vLLM's EngineCore (pid {process.pid}) {_exit_words(process, pidfd)}")
            os.close(pidfd)

        loop.add_reader(pidfd, exited)

    async def _warm_up(self) -> None:
        assert self._model is not None
        tokens = min(_WARM_UP_TOKENS, self._model.max_model_len - 2)
        sampling = Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)
        leg = DecodeLeg(leg_id="warm-up", tenant="", token_ids=(0,) * tokens, prompt_tokens=tokens, sampling=sampling)
        async for _ in self.decode(leg):
            pass
        await self._llm.reset_prefix_cache()

    def _die(self, reason: str) -> None:
        if not self._dead_reason:
            self._dead_reason = reason
            self._died.set()

    async def wait_dead(self) -> str:
        await self._died.wait()
        return self._dead_reason

    async def stop(self) -> None:
        self._is_stopped = True
        llm, self._llm = self._llm, None
        if llm is not None and not self._dead_reason:
            await llm.abort(list(self._legs))
            # EngineCore does not leave while blocks are pinned.
            await _send_order(llm, EndOrder(transfer_id=None))
        self._die("the engine was stopped")
        if self._kv is not None:
            await self._kv.close()
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # or it takes the stop for a death, and logs it
            await asyncio.to_thread(llm.shutdown, _STOP_TIMEOUT_S)
            sockets = llm.engine_core.resources.ctx
            del llm
            await asyncio.to_thread(gc.collect)
            # vLLM has closed its sockets by now, but not what they were made from. This waits for those it forgot.
            await asyncio.wait([_in_daemon_thread(sockets.term)], timeout=1.0)
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir.path, ignore_errors=True)

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
            even_if_stopped=leg.resample,
        )
        sampling = replace(leg.sampling, max_tokens=1, min_tokens=min(1, leg.sampling.min_tokens))
        if leg.resample:
            sampling = replace(sampling, structure=None)  # nobody reads this token: spare compiling a grammar
        llm = self._llm
        try:
            async with contextlib.aclosing(self._run(name, leg.token_ids, leg.cache_salt, sampling, order)) as outputs:
                (output,) = [output async for output in outputs]
            return self._prefill_result(leg, output, hand_off)
        except BaseException:
            if hand_off:
                await _send_order(llm, EndOrder(transfer_id=name))
            raise

    def _prefill_result(self, leg: PrefillLeg, output: Any, hand_off: bool) -> PrefillResult:
        assert self._model is not None
        completion, report = output.outputs[0], parse_report(output.kv_transfer_params)
        assert report is not None, "the connector reports on every prefill that was not aborted"
        finish_reason = None
        if completion.finish_reason == "stop":
            finish_reason = FinishReason.STOP
        elif leg.sampling.max_tokens == 1 or len(leg.token_ids) + 1 >= self._model.max_model_len:
            finish_reason = FinishReason.LENGTH
        if hand_off and report.handle is None and (leg.resample or finish_reason is None):
            raise LegError(FailureKind.REJECTED, f"the blocks can't be handed over: {report.refusal}")
        (token_id,) = completion.token_ids
        return PrefillResult(
            token_id=token_id,
            logprobs=next(iter(_logprobs(completion)), None),
            finish_reason=finish_reason,
            handle=report.handle,
            cached_tokens=output.num_cached_tokens or 0,
            queue_s=report.queue_s,
            prefill_s=report.prefill_s,
        )

    async def decode(self, leg: DecodeLeg) -> AsyncGenerator[StepOutput, None]:
        if leg.staged is None:
            async with contextlib.aclosing(self._decode(leg, None)) as steps:
                async for step in steps:
                    yield step
            return
        staged_id, llm, admitted = leg.staged.staged_id, self._llm, False
        order = DecodeOrder(staged_id=staged_id, tokens=leg.staged.tokens)
        self._taken.add(staged_id)
        try:
            async with contextlib.aclosing(self._decode(leg, order)) as steps:
                async for step in steps:
                    admitted = True
                    yield step
        finally:
            self._taken.discard(staged_id)
            if not admitted:
                await _send_order(llm, DropOrder(staged_id=staged_id))

    async def _decode(self, leg: DecodeLeg, order: DecodeOrder | None) -> AsyncGenerator[StepOutput, None]:
        cached_tokens_known = False
        name = self._name(leg.leg_id)
        async with contextlib.aclosing(self._run(name, leg.token_ids, leg.cache_salt, leg.sampling, order)) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                yield StepOutput(
                    leg_id=leg.leg_id,
                    token_ids=tuple(completion.token_ids),
                    finish_reason=_FINISH_REASONS[completion.finish_reason],
                    logprobs=_logprobs(completion),
                    # vLLM counts what was staged as cached.
                    cached_tokens=0 if order or cached_tokens_known else output.num_cached_tokens or 0,
                )
                cached_tokens_known = True

    async def _run(
        self, name: str, token_ids: tuple[int, ...], cache_salt: str, sampling: Sampling, order: Order | None
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for one request, the last of them finished. Raises LegError. However it is left, the request
        has ended in vLLM, or has been told to, when this is closed."""
        llm = self._llm
        if self._dead_reason:
            raise LegError(FailureKind.ENGINE, self._dead_reason)
        self._check_tokens(token_ids)
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        finished = False
        self._legs[name] = isinstance(order, PrefillOrder)
        try:
            prompt = tokens_input(list(token_ids), cache_salt=cache_salt or None)
            outputs = llm.generate(prompt, self._sampling_params(sampling, order), name)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    finished = output.finished
                    self._legs[name] = True
                    if (reason := output.outputs[0].finish_reason) not in _FINISH_REASONS:
                        raise LegError(FailureKind.ENGINE, self._dead_reason or f"vLLM ended the leg: {reason}")
                    yield output
        except EngineDeadError as error:
            raise LegError(FailureKind.ENGINE, self._dead_reason or "vLLM's EngineCore is dead") from error
        except EngineGenerateError as error:
            raise LegError(FailureKind.ENGINE, f"vLLM: {error.__cause__ or error}") from error
        except (VLLMClientError, ValueError) as error:
            raise LegError(FailureKind.INVALID, str(error)) from error
        finally:
            del self._legs[name]
            if not finished and not self._dead_reason:
                await llm.abort(name)

    def _name(self, leg_id: str) -> str:
        """vLLM's name for a leg, and its transfer's: unlike a leg's id, it surely never comes twice."""
        return f"{leg_id}#{next(self._numbers)}"

    def _check_tokens(self, token_ids: tuple[int, ...]) -> None:
        assert self._model is not None
        if not token_ids:
            raise LegError(FailureKind.INVALID, "the prompt is empty")
        if len(token_ids) >= self._model.max_model_len:
            limit = self._model.max_model_len
            raise LegError(FailureKind.INVALID, f"{len(token_ids)} tokens leave no room in a context of {limit}")
        if min(token_ids) < 0 or max(token_ids) >= self._model.vocab_size:
            raise LegError(FailureKind.INVALID, f"a token id is not in 0..{self._model.vocab_size - 1}")

    def _sampling_params(self, sampling: Sampling, order: Order | None) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        assert self._model is not None
        ends = () if sampling.ignore_eos else self._model.eos_token_ids
        stops = [token for token in (*sampling.stop_token_ids, *ends) if 0 <= token < self._model.vocab_size]
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop_token_ids=stops,
            ignore_eos=sampling.ignore_eos,
            logprobs=sampling.logprobs,
            logit_bias=dict(sampling.logit_bias) or None,
            structured_outputs=_structured(sampling.structure),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": order_params(order)} if order else None,
        )

    # ------------------------------------------------------------------------------------------------------------- KV

    async def fetch(self, handle: bytes, timeout_s: float, *, ahead: bool = False) -> Staged:
        with self._kv_failures():
            fetched = await self._client.fetch(handle, timeout_s, ahead=ahead)
        return Staged(
            staged_id=fetched.staged_id,
            tokens=fetched.tokens,
            transport=fetched.transport,
            transfer_bytes=fetched.nbytes,
            fetch_s=fetched.fetch_s,
        )

    async def discard(self, staged: Staged) -> None:
        if staged.staged_id not in self._taken:
            with self._kv_failures():
                await self._client.discard(staged.staged_id)

    async def release(self, handle: bytes) -> None:
        with self._kv_failures():
            await self._client.release(handle)

    async def connect(self, peer: str, address: str) -> PeerLane:
        with self._kv_failures():
            lane = await self._client.connect(peer, address)
        return PeerLane(peer=peer, transport=lane.transport, gigabytes_per_s=lane.gigabytes_per_s, refusal=lane.refusal)

    async def load(self) -> EngineLoad:
        with self._kv_failures():
            stats = await self._client.stats()
        running = sum(self._legs.values())
        return EngineLoad(
            running=running,
            waiting=len(self._legs) - running,
            kv_blocks_free=stats.kv_blocks_free,
            kv_blocks_total=stats.kv_blocks_total,
            leases_held=stats.leases_held,
            leased_blocks=stats.leased_blocks,
            staged_pages=stats.staged_pages,
            transfer_bytes_total=stats.transfer_bytes_total,
            transfer_failures_total=stats.transfer_failures_total,
            leases_expired_total=stats.leases_expired_total,
            transfers_corrupt_total=stats.transfers_corrupt_total,
        )

    @property
    def _client(self) -> AsyncKvClient:
        if self._kv is None or self._dead_reason:
            raise LegError(FailureKind.ENGINE, self._dead_reason)
        return self._kv

    @contextlib.contextmanager
    def _kv_failures(self) -> Iterator[None]:
        try:
            yield
        except (FetchError, EngineProcessLost) as error:
            if self._dead_reason or isinstance(error, EngineProcessLost):
                raise LegError(FailureKind.ENGINE, self._dead_reason or str(error)) from error
            raise LegError(_FETCH_FAILURES[error.outcome], error.detail) from error


#: By vLLM's name; None while a request goes on. Others ("abort", "error") are failures.
_FINISH_REASONS = {None: None, "stop": FinishReason.STOP, "length": FinishReason.LENGTH}

_FETCH_FAILURES = {
    Outcome.STALE: FailureKind.TRANSFER,
    Outcome.FAILED: FailureKind.TRANSFER,
    Outcome.REFUSED: FailureKind.INVALID,
    Outcome.FULL: FailureKind.REJECTED,
    Outcome.CORRUPT: FailureKind.TRANSFER,
}


async def _send_order(llm: Any, order: EndOrder | DropOrder) -> None:
    """Sends an order that belongs to no leg, behind everything sent before. Lost if EngineCore is dead, and not needed.

    vLLM's means for that is a request that is aborted on arrival.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    with contextlib.suppress(EngineDeadError):
        await llm.notify_kv_transfer_request_rejected(f"order-{secrets.token_hex(8)}", order_params(order))


def _structured(structure: Structure | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    match structure:
        case None:
            return None
        case Structure(StructureKind.JSON_OBJECT):
            return StructuredOutputsParams(json_object=True)
        case Structure(StructureKind.JSON_SCHEMA, text):
            return StructuredOutputsParams(json=text)
        case Structure(StructureKind.REGEX, text):
            return StructuredOutputsParams(regex=text)
        case Structure(StructureKind.GRAMMAR, text):
            return StructuredOutputsParams(grammar=text)


def _exit_words(process: Any, pidfd: int) -> str:
    """How a child of this process ended. It is left for vLLM, which waits for it too, to collect."""
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # vLLM was faster
        ended = None
    if ended is not None:
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    else:
        code = process.exitcode
    if code is None:
        return "is gone"
    if code >= 0:
        return f"exited with {code}; its log says why"
    return f"was killed by {signal.Signals(-code).name}"


def _logprobs(completion: Any) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            token_id,
            by_token[token_id].logprob,
            tuple((other, entry.logprob) for other, entry in sorted(by_token.items(), key=lambda item: item[1].rank)),
        )
        for token_id, by_token in zip(completion.token_ids, completion.logprobs or (), strict=False)
    )


def _in_daemon_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """The end of blocking work, in a thread that does not keep the process from leaving before it is done."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        failure: BaseException | None = None
        try:
            work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile: nobody waits
            loop.call_soon_threadsafe(settle, failure)

    threading.Thread(target=run, name="vllm-start", daemon=True).start()
    return done


def _set_environment(device: str) -> None:
    """What vLLM and the libraries below it read from the environment, here and, inherited, in EngineCore. What somebody
    has set stays, but for what the engine's shape depends on."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device != "cuda":
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override the KV cache's size
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # The first request for log probabilities would wait, and all others with it, for a small function to compile.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    libraries = Path(sys.prefix, "lib", "tandem-native")
    if libraries.is_dir():
        for library in sorted(libraries.glob("*.so*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        path = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        os.environ["LD_LIBRARY_PATH"] = ":".join(path)


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
