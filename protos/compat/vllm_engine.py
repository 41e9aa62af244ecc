"""What router and worker do alike with the messages of vLLM's engine API."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from protos.compat import smg_common_pb2, vllm_engine_pb2

SERVICE = "vllm.grpc.engine.VllmEngine"

#: Methods that there is nothing for behind Tandem's API, and why.
REFUSED = {
    "Embed": "embeddings are not computed here",
    "FlushCache": "prefix caches are apart by tenant and shared by nobody's wish",
    "StartProfile": "profiling is an operator's, at the worker",
    "StopProfile": "profiling is an operator's, at the worker",
    "SubscribeKvEvents": "prefixes are followed by Tandem's own router",
}

_CHUNK_BYTES = 64 * 1024
_TOKENIZER_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
#: A tokenizer's files are small; what is larger is a list of weights or none of ours to give out.
_TOKENIZER_FILE_BYTES_MAX = 64 << 20


class TokenLogprobs(Protocol):
    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Sequence[tuple[int, float]]: ...


class Problem(NamedTuple):
    field: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a request's sampling parameters mean. This API's zeros mean what they say, but for those that mean unset."""

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None
    logit_bias: tuple[tuple[int, float], ...]
    #: json_schema, regex, grammar or json_object, and its text.
    structure: tuple[str, str] | None
    n: int


def sampling(said: vllm_engine_pb2.SamplingParams) -> Sampling:
    structure = said.WhichOneof("constraint")
    return Sampling(
        max_tokens=said.max_tokens if said.HasField("max_tokens") else None,
        min_tokens=said.min_tokens,
        temperature=said.temperature if said.HasField("temperature") else 1.0,
        top_p=said.top_p or 1.0,
        top_k=said.top_k,
        min_p=said.min_p,
        presence_penalty=said.presence_penalty,
        frequency_penalty=said.frequency_penalty,
        repetition_penalty=said.repetition_penalty or 1.0,
        seed=said.seed if said.HasField("seed") else None,
        stop=tuple(said.stop),
        stop_token_ids=tuple(said.stop_token_ids),
        ignore_eos=said.ignore_eos,
        logprobs=said.logprobs if said.HasField("logprobs") else None,
        logit_bias=tuple(said.logit_bias.items()),
        structure=(structure, "" if structure == "json_object" else getattr(said, structure)) if structure else None,
        n=said.n or 1,
    )


def unsupported(request: vllm_engine_pb2.GenerateRequest) -> Problem | None:
    """What in it would change the answer and is not done here."""
    said = request.sampling_params
    for name in ("structural_tag", "choice", "prompt_logprobs", "truncate_prompt_tokens"):
        if said.HasField(name):
            return Problem(f"sampling_params.{name}", "is not supported")
    if any(token_id < 0 for token_id in said.logit_bias):
        return Problem("sampling_params.logit_bias", "token ids must not be negative")
    if request.HasField("mm_inputs") or request.HasField("media_refs") or request.extra_mm_inputs:
        return Problem("mm_inputs", "images and other media are not supported")
    if request.data_parallel_rank > 0:
        return Problem("data_parallel_rank", "there is rank 0 alone")
    return None


# What is answered.


def chunk(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    *,
    prompt_tokens: int,
    cached_tokens: int,
    index: int = 0,
) -> bytes:
    return vllm_engine_pb2.GenerateResponse(
        chunk=vllm_engine_pb2.GenerateStreamChunk(
            token_ids=token_ids,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(token_ids),
            cached_tokens=cached_tokens,
            output_logprobs=_logprobs(logprobs),
            index=index,
        )
    ).SerializeToString()


def complete(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    finish_reason: str,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    index: int = 0,
    matched_stop: str | None = None,
    kv_transfer_params_json: str | None = None,
) -> bytes:
    return vllm_engine_pb2.GenerateResponse(
        complete=vllm_engine_pb2.GenerateComplete(
            output_ids=token_ids,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(token_ids),
            cached_tokens=cached_tokens,
            output_logprobs=_logprobs(logprobs),
            index=index,
            matched_stop_str=matched_stop,
            kv_transfer_params_json=kv_transfer_params_json,
        )
    ).SerializeToString()


def _logprobs(entries: Sequence[TokenLogprobs]) -> vllm_engine_pb2.OutputLogProbs | None:
    if not entries:
        return None
    return vllm_engine_pb2.OutputLogProbs(
        token_logprobs=[entry.logprob for entry in entries],
        token_ids=[entry.token_id for entry in entries],
        top_logprobs=[
            vllm_engine_pb2.TopLogProbs(
                token_ids=[token_id for token_id, _ in entry.top], values=[logprob for _, logprob in entry.top]
            )
            for entry in entries
        ],
    )


def health(healthy: bool, message: str) -> bytes:
    return vllm_engine_pb2.HealthCheckResponse(healthy=healthy, message=message).SerializeToString()


def aborted() -> bytes:
    return vllm_engine_pb2.AbortResponse().SerializeToString()


def server_info(
    *,
    active_requests: int,
    uptime_s: float,
    max_running: int,
    block_tokens: int = 0,
    kv_dtype: str = "",
    kv_connector: str = "",
    kv_role: str = "",
    kv_engine_id: str = "",
    pairing: str = "",
) -> bytes:
    return vllm_engine_pb2.GetServerInfoResponse(
        active_requests=active_requests,
        uptime_seconds=uptime_s,
        server_type="vllm-grpc",
        kv_connector=kv_connector,
        kv_role=kv_role,
        kv_engine_id=kv_engine_id,
        data_parallel_size=1,
        kv_cache_dtype=kv_dtype,
        block_size=block_tokens,
        pairing_protocol=pairing,
        max_num_seqs=max_running,
    ).SerializeToString()


def loads(
    *,
    running: int,
    waiting: int,
    max_running: int,
    kv_tokens: int,
    kv_tokens_used: int,
    utilization: float,
    version: str,
) -> bytes:
    return vllm_engine_pb2.GetLoadsResponse(
        timestamp=datetime.now(UTC).isoformat(),
        version=version,
        dp_rank_count=1,
        loads=[
            vllm_engine_pb2.SchedulerLoad(
                num_running_reqs=running,
                num_waiting_reqs=waiting,
                num_total_reqs=running + waiting,
                num_used_tokens=kv_tokens_used,
                max_total_num_tokens=kv_tokens,
                token_usage=kv_tokens_used / kv_tokens if kv_tokens else 0.0,
                utilization=utilization,
                max_running_requests=max_running,
            )
        ],
    ).SerializeToString()


class ModelFiles:
    """What a model's folder says to a gateway that makes token ids of texts itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = _read_json(folder / "config.json")
        self._recommended = _read_json(folder / "generation_config.json")

    def info(self, *, name: str, max_model_len: int, vocab_size: int, eos_token_ids: Sequence[int]) -> bytes:
        architectures = self._config.get("architectures")
        return vllm_engine_pb2.GetModelInfoResponse(
            # A name, and no path: gateways look for a folder of that name or ask for the tokenizer.
            model_path=name,
            served_model_name=name,
            is_generation=True,
            max_context_length=max_model_len,
            max_req_input_len=max_model_len,
            vocab_size=vocab_size,
            model_type=str(self._config.get("model_type", "")),
            architectures=[str(one) for one in architectures] if isinstance(architectures, list) else [],
            eos_token_ids=eos_token_ids,
            bos_token_id=_token_id(self._config.get("bos_token_id")),
            pad_token_id=_token_id(self._config.get("pad_token_id")),
            default_sampling_params_json=json.dumps(
                {
                    key: value
                    for key, value in self._recommended.items()
                    if key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
                }
            ),
        ).SerializeToString()

    def tokenizer(self) -> Iterator[bytes]:
        """Messages that hold the tokenizer's files, the same archive every time. Takes time: not on an event loop."""
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for path in sorted({path for pattern in _TOKENIZER_FILES for path in self._folder.glob(pattern)}):
                if path.is_file() and path.stat().st_size <= _TOKENIZER_FILE_BYTES_MAX:
                    zipped.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)
        data = archive.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        for begin in range(0, len(data), _CHUNK_BYTES):
            last = begin + _CHUNK_BYTES >= len(data)
            yield smg_common_pb2.GetTokenizerChunk(
                data=data[begin : begin + _CHUNK_BYTES], sha256=digest if last else ""
            ).SerializeToString()


def _read_json(path: Path) -> dict[str, object]:
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return said if isinstance(said, dict) else {}


def _token_id(said: object) -> int:
    return said if isinstance(said, int) else 0
