"""The engine process: all of vLLM, stepped by its main thread. `engine/vllm.py` starts it, and is its only customer.

    python -P -m engine.vllm_process FD      the socket to the worker process; the first message says what to be

vLLM's own `AsyncLLM` with its EngineCore process does the same at a price: request and output objects through two more
layers and several threads, which take the interpreter from the thread that steps. Here there are that thread, one that
reads the socket, and those of the KvNode, which sleep unless KV moves.

What vLLM leaves to its caller, and is done here or by the connector (`kv_transfer/vllm_connector.py`):

- *Cancelling.* Messages are obeyed in their order, so an abort comes after whatever was told of the leg before. vLLM
  ignores an abort for a prefill that has finished and is pinned: the lease's end follows the abort.
- *Stopping.* vLLM knows one end-of-sequence token, and none without a tokenizer; so all of them are given as stop
  tokens, with the same effect: the token is the last of the output, and `min_tokens` keeps it back.
- *Token ids outside the vocabulary* would be an index error inside a step, which ends the engine for everyone: in a
  prompt they are refused, as stop tokens, which can never be sampled, left out. `engine/vllm_cpu_worker.py` repairs
  another request of death.

The CPU's traps (measured; two engines on two cores ran at 0.4 tokens/s with the defaults): thread binding would put
all engines of a machine on the same cores, so it is off, and each engine has threads of its own (`cpu_threads`). AMX
needs a permission that vLLM does not ask for, see the connector. The KV cache has the size it is told, not a share of
the machine.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from engine.base import (
    FETCH_FAILURES,
    LOGIT_BIAS,
    STRUCTURE,
    EngineInfo,
    EngineLoad,
    FailureKind,
    LegError,
    ModelInfo,
    PeerLane,
    Sampling,
    Staged,
    Structure,
    StructureKind,
    TokenLogprobs,
)
from engine.vllm_loop import StepLoop
from engine.vllm_wire import (
    Abort,
    Add,
    Connect,
    Discard,
    Failed,
    Fetch,
    Fetched,
    ForgetPrefixes,
    Frames,
    FromEngine,
    Launch,
    Load,
    Loaded,
    Met,
    Offered,
    Output,
    Ready,
    Refused,
    Release,
    Stop,
    ToEngine,
    frame,
    to_engine,
)
from engine.vllm_wire import (
    Cancel as CancelCall,
)
from kv_transfer.api import FetchError
from kv_transfer.threads import DaemonThreads
from kv_transfer.turn import Cancel
from kv_transfer.vllm_params import ConnectorSettings, DecodeOrder, Order, report_of

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 16


class Channel:
    """The engine process's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._frames: Frames[ToEngine] = to_engine()
        self._sending = threading.Lock()

    def send(self, *messages: FromEngine) -> None:
        """From any thread. A worker process that is gone is not told; `receive` says that it is."""
        data = frame(messages)
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError as error:
            log.info("the worker process is gone: %s", error)

    def receive(self) -> list[ToEngine]:
        """At least one message; none when the worker process is gone."""
        messages: list[ToEngine] = []
        while not messages:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                return []
            messages = list(self._frames.feed(data))
        return messages


def main(fd: int) -> None:
    # Ctrl-C, or a SIGTERM to the group, is the worker's to act on: it needs the engine while it drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.disable()  # of what is loaded nothing is garbage, and looking for it takes a third of the time
    channel = Channel(socket.socket(fileno=fd))
    first = channel.receive()
    if not first:
        return
    (launch,) = first
    assert isinstance(launch, Launch)
    steps = StepLoop()
    try:
        engine = VllmProcess(launch, channel, steps)
    except Exception as error:
        log.exception("vLLM did not start")
        channel.send(Refused("", FailureKind.ENGINE, f"{type(error).__name__}: {error}"))
        return
    gc.enable()
    channel.send(Ready(engine.info))
    threading.Thread(target=engine.listen, name="from-worker", daemon=True).start()
    try:
        steps.run(engine.core, engine.stepped)
    except Exception as error:
        log.exception("a step failed")
        channel.send(Refused("", FailureKind.ENGINE, f"a step failed: {error!r}"))
    engine.connector.node.close()


class VllmProcess:
    def __init__(self, launch: Launch, channel: Channel, steps: StepLoop) -> None:
        self._channel = channel
        self._steps = steps
        #: What can be cancelled, by call.
        self._fetches: dict[int, Cancel] = {}
        self.core = _core(launch, steps)
        #: The scheduler's half, see kv_transfer/vllm_connector.py.
        self.connector = self.core.scheduler.get_kv_connector()
        node = self.connector.node
        self._threads = DaemonThreads(node.limits.fetches + 4, f"kv-{node.name}")
        self.info = _info(self.core, self.connector, launch)
        self._input = _input_processor(self.core)

    # From the worker --------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Obeys the worker until it is gone; then this process has nothing to live for."""
        while messages := self._channel.receive():
            for message in messages:
                self._handle(message)
        os._exit(0)

    def _handle(self, message: ToEngine) -> None:
        node = self.connector.node
        match message:
            case Add():
                self._add(message)
            case Abort(name):
                self._steps.do(lambda: self._abort(name))
            case Fetch(call):
                cancel = self._fetches[call] = Cancel()
                self._threads.submit(self._fetch, message, cancel)
            case CancelCall(call):
                if cancelled := self._fetches.get(call):
                    cancelled.set()
            case Connect(call, peer, address):
                self._threads.submit(self._connect, call, peer, address)
            case Load(call):
                self._channel.send(Loaded(call, self._load()))
            case Discard(staged_id):
                node.discard(staged_id)
            case Release(handle):
                node.release(handle)
            case ForgetPrefixes():
                self._steps.do(self.core.reset_prefix_cache)
            case Stop():
                self._steps.stop()
            case Launch():
                raise RuntimeError("launched twice")

    def _add(self, leg: Add) -> None:
        """vLLM makes its request in this thread; only the scheduler's part waits for the end of a step."""
        node = self.connector.node
        try:
            request = self._request(leg)
        except LegError as error:
            if leg.staged:
                node.discard(leg.staged.staged_id)
            self._channel.send(Refused(leg.name, error.kind, error.detail))
            return
        order: Order | None = leg.prefill
        # What is not staged any more is computed here.
        if leg.staged and (pages := node.claim(leg.staged.staged_id)):
            order = DecodeOrder(staged_id=leg.staged.staged_id, tokens=leg.staged.tokens, pages=pages)

        def add() -> None:
            if order:
                self.connector.expect(request, order)
            try:
                self.core.add_request(request)
            except Exception as error:
                log.exception("vLLM did not take %s", leg.name)
                self.connector.forget(leg.name)
                self._channel.send(Refused(leg.name, FailureKind.ENGINE, f"vLLM did not take the leg: {error!r}"))

        self._steps.do(add)

    def _abort(self, name: str) -> None:
        self.core.abort_requests([name])
        self.connector.node.cancel(name)

    def _fetch(self, fetch: Fetch, cancel: Cancel) -> None:
        try:
            found = self.connector.node.fetch(fetch.handle, fetch.timeout_s, cancel, ahead=fetch.ahead)
        except FetchError as error:
            self._channel.send(Failed(fetch.call, FETCH_FAILURES[error.outcome], error.detail))
        else:
            staged = Staged(
                staged_id=found.staged_id,
                tokens=found.tokens,
                transport=found.transport,
                transfer_bytes=found.nbytes,
                fetch_s=found.fetch_s,
            )
            self._channel.send(Fetched(fetch.call, staged))
        finally:
            del self._fetches[fetch.call]

    def _connect(self, call: int, peer: str, address: str) -> None:
        lane = self.connector.node.connect(peer=peer, address=address)
        told = PeerLane(peer=peer, transport=lane.transport, gigabytes_per_s=lane.gigabytes_per_s, refusal=lane.refusal)
        self._channel.send(Met(call, told))

    def _load(self) -> EngineLoad:
        stats = self.connector.node.stats()
        running, waiting = self.core.scheduler.get_request_counts()
        free, total = self.connector.block_counts()
        return EngineLoad(
            running=running,
            waiting=waiting,
            kv_blocks_free=free,
            kv_blocks_total=total,
            leases_held=stats.leases_held,
            leased_blocks=stats.leased_blocks,
            staged_pages=stats.staged_pages,
            transfer_bytes_total=stats.transfer_bytes_total,
            transfer_failures_total=stats.transfer_failures_total,
            leases_expired_total=stats.leases_expired_total,
            transfers_corrupt_total=stats.transfers_corrupt_total,
        )

    # To the worker ----------------------------------------------------------------------------------------------------

    def stepped(self, outputs: list[Any]) -> None:
        messages: list[FromEngine] = [_output(output) for output in outputs]
        messages += [Offered(name, handle) for name, handle in self.connector.publish_computed(self.core.scheduler)]
        if messages:
            self._channel.send(*messages)

    # Requests ---------------------------------------------------------------------------------------------------------

    def _request(self, leg: Add) -> Any:
        """For EngineCore. Raises LegError(INVALID)."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        self._check_tokens(leg.token_ids)
        try:
            prompt = tokens_input(list(leg.token_ids), cache_salt=leg.cache_salt or None)
            params = _sampling_params(leg.sampling, self.info.model)
            told = self._input.process_inputs(leg.name, prompt, params, ("generate",), arrival_time=time.time())
            request, _ = self.core.preprocess_add_request(told)
        except (VLLMClientError, ValueError) as error:
            raise LegError(FailureKind.INVALID, str(error)) from error
        return request

    def _check_tokens(self, token_ids: tuple[int, ...]) -> None:
        model = self.info.model
        if not token_ids:
            raise LegError(FailureKind.INVALID, "the prompt is empty")
        if len(token_ids) >= model.max_model_len:
            limit = model.max_model_len
            raise LegError(FailureKind.INVALID, f"{len(token_ids)} tokens leave no room in a context of {limit}")
        if min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
            raise LegError(FailureKind.INVALID, f"a token id is not in 0..{model.vocab_size - 1}")


def _core(launch: Launch, steps: StepLoop) -> Any:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    config = _engine_args(launch, steps).create_engine_config()
    gc.freeze()  # vLLM collects several times while it loads
    return EngineCore(config, Executor.get_class(config), log_stats=False)


def _engine_args(launch: Launch, steps: StepLoop) -> Any:
    from vllm import EngineArgs
    from vllm.config import KVTransferConfig, StructuredOutputsConfig
    from vllm.platforms import current_platform

    options = launch.options
    if options.device not in ("auto", current_platform.device_type):
        raise ValueError(f"device {options.device!r}: this vLLM runs on {current_platform.device_type!r}")
    settings = ConnectorSettings(
        name=options.name,
        incarnation=launch.incarnation,
        model=options.served_model_name,
        revision=launch.revision,
        secret=options.cluster_secret,
        host=options.kv_host,
        transports=options.transports,
        staging_bytes=options.staging_bytes,
        kv_verify=options.kv_verify,
        tls=options.tls,
        on_lease_ended=steps.wake,
    )
    module, name = launch.connector
    return EngineArgs(
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
        long_prefill_token_threshold=options.long_prefill_token_threshold,
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


def _info(core: Any, connector: Any, launch: Launch) -> EngineInfo:
    config, node = core.vllm_config, connector.node
    return EngineInfo(
        kind="vllm",
        version=importlib.import_module("vllm.version").__version__,
        model=ModelInfo(
            name=launch.options.served_model_name,
            revision=launch.revision,
            max_model_len=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            eos_token_ids=launch.eos_token_ids,
            features=(LOGIT_BIAS,) if config.model_config.skip_tokenizer_init else (LOGIT_BIAS, STRUCTURE),
        ),
        block_tokens=config.cache_config.block_size,
        kv_blocks=config.cache_config.num_gpu_blocks - 1,  # one is a placeholder of vLLM's
        max_running=config.scheduler_config.max_num_seqs,
        kv_address=node.address,
        kv_incarnation=launch.incarnation,
        kv_layout=node.layout.as_dict(),
    )


def _input_processor(core: Any) -> Any:
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    return InputProcessor(core.vllm_config, renderer_from_config(core.vllm_config))


def _sampling_params(sampling: Sampling, model: ModelInfo) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    ends = () if sampling.ignore_eos else model.eos_token_ids
    stops = [token for token in (*sampling.stop_token_ids, *ends) if 0 <= token < model.vocab_size]
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
    )


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


def _output(output: Any) -> Output:
    return Output(
        name=output.request_id,
        token_ids=tuple(output.new_token_ids),
        finish_reason="" if output.finish_reason is None else str(output.finish_reason),
        logprobs=_logprobs(output),
        cached_tokens=output.prefill_stats.num_cached_tokens if output.prefill_stats else 0,
        report=report_of(output.kv_transfer_params),
    )


def _logprobs(output: Any) -> tuple[TokenLogprobs, ...]:
    """Of each token: its own, and the likeliest; how many of those is the batch's greediest request's wish."""
    found = output.new_logprobs
    if found is None:
        return ()
    rows = zip(output.new_token_ids, found.logprob_token_ids.tolist(), found.logprobs.tolist(), strict=True)
    return tuple(
        TokenLogprobs(token, values[0], tuple(zip(ids[1:], values[1:], strict=True))) for token, ids, values in rows
    )


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    main(int(sys.argv[1]))
    # Taking the interpreter and torch apart takes seconds, and serves nobody.
    logging.shutdown()
    os._exit(0)
