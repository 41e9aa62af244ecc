"""Messages of vLLM's engine API <-> values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from protos.compat import vllm_engine, vllm_engine_pb2
from router.core.errors import Invalid
from router.core.request import FinishReason, Structure, StructureKind
from router.core.snapshot import Snapshot
from router.core.worker import ModelFacts
from router.edge.admit import Asked
from router.edge.generate import End, Part
from router.edge.wire import parse

SERVICE = vllm_engine.SERVICE
REFUSED = vllm_engine.REFUSED


class Generate(NamedTuple):
    request_id: str
    prompt: str | tuple[int, ...]
    prompt_field: str
    asked: Asked
    answers: int
    stream: bool


# From clients.


def generate(data: bytes) -> Generate:
    """Raises Invalid."""
    request = parse(vllm_engine_pb2.GenerateRequest, data)
    if problem := vllm_engine.unsupported(request):
        raise Invalid(problem.field, problem.why)
    if request.kv_transfer_params_json not in ("", "{}"):
        raise Invalid("kv_transfer_params_json", "the cluster hands KV over by itself; this is for its workers' ports")
    said = vllm_engine.sampling(request.sampling_params)
    by_text = request.WhichOneof("input") == "text"
    return Generate(
        request_id=request.request_id,
        prompt=request.text if by_text else tuple(request.tokenized.input_ids),
        prompt_field="text" if by_text else "tokenized.input_ids",
        asked=Asked(
            max_tokens=said.max_tokens,
            min_tokens=said.min_tokens,
            temperature=said.temperature,
            top_p=said.top_p,
            top_k=said.top_k,
            min_p=said.min_p,
            presence_penalty=said.presence_penalty,
            frequency_penalty=said.frequency_penalty,
            repetition_penalty=said.repetition_penalty,
            seed=said.seed,
            stop=said.stop,
            stop_token_ids=said.stop_token_ids,
            ignore_eos=said.ignore_eos,
            logprobs=said.logprobs,
            logit_bias=said.logit_bias,
            structure=said.structure and Structure(StructureKind(said.structure[0]), said.structure[1]),
        ),
        answers=said.n,
        stream=request.stream,
    )


def aborted_ids(data: bytes) -> list[str]:
    return list(parse(vllm_engine_pb2.AbortRequest, data).request_ids)


# To clients.


def chunk(part: Part, prompt_tokens: int, index: int) -> bytes:
    return vllm_engine.chunk(part.token_ids, part.logprobs, prompt_tokens=prompt_tokens, cached_tokens=0, index=index)


def complete(parts: Sequence[Part], end: End, index: int) -> bytes:
    reason = FinishReason.STOP if end.stop_match else end.finished.reason
    usage = end.finished.usage
    return vllm_engine.complete(
        [token_id for part in parts for token_id in part.token_ids],
        [entry for part in parts for entry in part.logprobs],
        reason.value,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_prompt_tokens,
        index=index,
        matched_stop=end.stop_match or None,
    )


class Model:
    """What the cluster's one model is, for gateways."""

    def __init__(self, folder: Path) -> None:
        self._files = vllm_engine.ModelFiles(folder)
        self.tokenizer = self._files.tokenizer

    def info(self, facts: ModelFacts) -> bytes:
        return self._files.info(
            name=facts.name,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            eos_token_ids=facts.eos_token_ids,
        )


def health(serving: bool) -> bytes:
    return vllm_engine.health(serving, "serving" if serving else "no worker serves the model")


def server_info(snapshot: Snapshot, uptime_s: float) -> bytes:
    return vllm_engine.server_info(
        active_requests=snapshot.queued + snapshot.running,
        uptime_s=uptime_s,
        max_running=_decode_legs(snapshot),
        block_tokens=next((view.facts.capacity.block_tokens for view in snapshot.workers), 0),
    )


def loads(snapshot: Snapshot, version: str) -> bytes:
    room = _decode_legs(snapshot)
    kv_tokens = used = 0
    for view in snapshot.workers:
        block_tokens = view.facts.capacity.block_tokens
        kv_tokens += view.load.kv_blocks_total * block_tokens
        used += (view.load.kv_blocks_total - view.load.kv_blocks_free) * block_tokens
    return vllm_engine.loads(
        running=snapshot.running,
        waiting=snapshot.queued,
        max_running=room,
        kv_tokens=kv_tokens,
        kv_tokens_used=used,
        utilization=(snapshot.running + snapshot.queued) / room if room else 1.0,
        version=version,
    )


def _decode_legs(snapshot: Snapshot) -> int:
    return sum(view.facts.capacity.decode_legs for view in snapshot.workers if view.role.value != "prefill")


def aborted() -> bytes:
    return vllm_engine.aborted()
