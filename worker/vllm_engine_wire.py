"""Messages of vLLM's engine API <-> this worker's values.

Whoever calls is checked here: behind a router, a worker may trust what it is told, but a gateway is no router of ours.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError

from engine.base import (
    LOGIT_BIAS,
    STRUCTURE,
    EngineInfo,
    EngineLoad,
    Sampling,
    Structure,
    StructureKind,
)
from kv_transfer.handle import HandleRefused
from kv_transfer.wire import unseal
from protos.compat import pool, vllm_engine, vllm_engine_pb2
from worker.config import Role

SERVICE = vllm_engine.SERVICE
REFUSED = vllm_engine.REFUSED
POOL: DescriptorPool = pool.Default()

#: Whose work this is, in handles and prefix caches: no tenant's of a router.
TENANT = "gateway"

_LOGPROBS_MAX = 20
_ANSWERS_MAX = 64
_STOPS_MAX = 16
_STOP_CHARS_MAX = 256
_SEED_MAX = 2**63 - 1
_HANDLE = "tandem_handle"


class Refused(Exception):
    """Names the field; for whoever asked."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")


class Handed(NamedTuple):
    """The right to read a prompt's KV, given out on a port like this one."""

    handle: bytes
    #: Of the request whose prompt it is, as the prefill worker knows it.
    leg_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...]
    answers: int
    stream: bool
    #: Compute the prompt, keep its KV for another worker, and answer with what that one needs.
    hand_off: bool
    #: The one worker that may fetch it; empty lets any of the cluster, once.
    reader: str
    #: What a prefill worker answered; None: the prompt is computed here.
    handle: Handed | None


# From gateways.


def generate(data: bytes, info: EngineInfo, secret: bytes) -> Generate:
    """Raises Refused."""
    try:
        request = vllm_engine_pb2.GenerateRequest.FromString(data)
    except DecodeError:
        raise Refused("request", "is not a vllm.grpc.engine.GenerateRequest message") from None
    for problem in (vllm_engine.unsupported(request), _beyond_a_worker(request)):
        if problem:
            raise Refused(problem.field, problem.why)
    prompt = tuple(request.tokenized.input_ids)
    _check_tokens("tokenized.input_ids", prompt, info)
    if not 0 < len(prompt) < info.model.max_model_len:
        raise Refused("tokenized.input_ids", f"must be 1 to {info.model.max_model_len - 1} tokens, are {len(prompt)}")
    wants = _transfer(request.kv_transfer_params_json)
    said = vllm_engine.sampling(request.sampling_params)
    if said.n > 1 and (wants.get("do_remote_decode") is True or wants.get("do_remote_prefill") is True):
        raise Refused("sampling_params.n", "a prompt is handed off for one answer")
    return Generate(
        request_id=request.request_id,
        prompt=prompt,
        sampling=_sampling(said, len(prompt), info),
        stops=said.stop,
        answers=said.n,
        stream=request.stream,
        hand_off=wants.get("do_remote_decode") is True,
        reader=_reader(wants),
        handle=_handed(wants, len(prompt), secret) if wants.get("do_remote_prefill") is True else None,
    )


def _beyond_a_worker(request: vllm_engine_pb2.GenerateRequest) -> vllm_engine.Problem | None:
    if request.WhichOneof("input") != "tokenized":
        return vllm_engine.Problem("text", "a worker takes token ids; the router's port takes texts")
    if not 0 <= request.sampling_params.n <= _ANSWERS_MAX:
        return vllm_engine.Problem("sampling_params.n", f"must be from 1 to {_ANSWERS_MAX}")
    stops = request.sampling_params.stop
    if len(stops) > _STOPS_MAX or not all(0 < len(stop) <= _STOP_CHARS_MAX for stop in stops):
        return vllm_engine.Problem(
            "sampling_params.stop", f"must be at most {_STOPS_MAX} texts of 1 to {_STOP_CHARS_MAX} characters"
        )
    if request.HasField("kv_transfer_params"):
        return vllm_engine.Problem("kv_transfer_params", "is not supported; kv_transfer_params_json is")
    return None


def _sampling(said: vllm_engine.Sampling, prompt_tokens: int, info: EngineInfo) -> Sampling:
    model = info.model
    room = model.max_model_len - prompt_tokens
    max_tokens = room if said.max_tokens is None else said.max_tokens
    for name, value, low, high in (
        ("max_tokens", max_tokens, 1, room),
        ("min_tokens", said.min_tokens, 0, max_tokens),
        ("temperature", said.temperature, 0, 2),
        ("top_p", said.top_p, 1e-9, 1),
        ("top_k", said.top_k, 0, model.vocab_size),
        ("min_p", said.min_p, 0, 1),
        ("presence_penalty", said.presence_penalty, -2, 2),
        ("frequency_penalty", said.frequency_penalty, -2, 2),
        ("repetition_penalty", said.repetition_penalty, 1e-9, 10),
        ("seed", said.seed or 0, 0, _SEED_MAX),
        ("logprobs", said.logprobs or 0, 0, _LOGPROBS_MAX),
        *((f"logit_bias[{token_id}]", bias, -100, 100) for token_id, bias in said.logit_bias),
    ):
        if not low <= value <= high:
            raise Refused(f"sampling_params.{name}", f"must be from {low:g} to {high:g}, is {value:g}")
    _check_tokens("sampling_params.stop_token_ids", said.stop_token_ids, info)
    _check_tokens("sampling_params.logit_bias", [token_id for token_id, _ in said.logit_bias], info)
    for name, asked in ((STRUCTURE, said.structure), (LOGIT_BIAS, said.logit_bias)):
        if asked and name not in model.features:
            raise Refused(f"sampling_params.{name}", "is not supported by this engine")
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=said.min_tokens,
        temperature=said.temperature,
        top_p=said.top_p,
        top_k=said.top_k,
        min_p=said.min_p,
        presence_penalty=said.presence_penalty,
        frequency_penalty=said.frequency_penalty,
        repetition_penalty=said.repetition_penalty,
        seed=said.seed,
        stop_token_ids=said.stop_token_ids,
        ignore_eos=said.ignore_eos,
        logprobs=said.logprobs,
        logit_bias=said.logit_bias,
        structure=said.structure and Structure(StructureKind(said.structure[0]), said.structure[1]),
    )


def _check_tokens(field: str, token_ids: Sequence[int], info: EngineInfo) -> None:
    for at, token_id in enumerate(token_ids):
        if token_id >= info.model.vocab_size:
            raise Refused(
                f"{field}[{at}]", f"token {token_id} is outside the model's vocabulary of {info.model.vocab_size}"
            )


def _transfer(text: str) -> dict[str, object]:
    try:
        said = json.loads(text or "{}")
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Refused("kv_transfer_params_json", "must be a JSON object")
    return said


def _reader(said: dict[str, object]) -> str:
    reader = said.get("reader", "")
    if not isinstance(reader, str):
        raise Refused("kv_transfer_params_json.reader", "must be a worker's kv_engine_id")
    return reader


def _handed(said: dict[str, object], prompt_tokens: int, secret: bytes) -> Handed:
    field, text = f"kv_transfer_params_json.{_HANDLE}", said.get(_HANDLE)
    try:
        sealed = base64.b64decode(text if isinstance(text, str) else "", validate=True)
        handle = unseal(sealed, secret)
    except (binascii.Error, ValueError, HandleRefused):
        raise Refused(field, "must be what a prefill worker answered, passed on as it was") from None
    if handle.tenant != TENANT:
        raise Refused(field, "is of a request that a router has made")
    if handle.tokens != prompt_tokens:
        raise Refused(field, f"is of a prompt of {handle.tokens} tokens, this one has {prompt_tokens}")
    return Handed(sealed, handle.transfer_id)


def aborted_ids(data: bytes) -> list[str]:
    try:
        return list(vllm_engine_pb2.AbortRequest.FromString(data).request_ids)
    except DecodeError:
        raise Refused("request", "is not a vllm.grpc.engine.AbortRequest message") from None


# To gateways.

chunk = vllm_engine.chunk
complete = vllm_engine.complete
aborted = vllm_engine.aborted
health = vllm_engine.health
ModelFiles = vllm_engine.ModelFiles


def handed_off(worker_id: str, kv_address: str, handle: bytes) -> str:
    """For the decode worker, by way of the gateway: as vLLM's own connectors name the peer, and the right to read."""
    host, _, port = kv_address.rpartition(":")
    return json.dumps(
        {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": worker_id,
            "remote_host": host,
            "remote_port": int(port or 0),
            _HANDLE: base64.b64encode(handle).decode(),
        }
    )


def model_info(files: vllm_engine.ModelFiles, info: EngineInfo) -> bytes:
    return files.info(
        name=info.model.name,
        max_model_len=info.model.max_model_len,
        vocab_size=info.model.vocab_size,
        eos_token_ids=info.model.eos_token_ids,
    )


_KV_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer", Role.BOTH: "kv_both"}


def server_info(worker_id: str, role: Role, info: EngineInfo, *, active: int, uptime_s: float) -> bytes:
    return vllm_engine.server_info(
        active_requests=active,
        uptime_s=uptime_s,
        max_running=info.max_running,
        block_tokens=info.block_tokens,
        kv_dtype=info.kv_layout.get("dtype", ""),
        # How gateways are to drive the hand-off: the parameters go by way of them, from the one to the other.
        kv_connector="NixlConnector",
        kv_role=_KV_ROLES[role],
        kv_engine_id=worker_id,
        pairing=_pairing(info),
    )


def _pairing(info: EngineInfo) -> str:
    """Equal for two workers that can exchange KV."""
    same = json.dumps([info.model.revision, *sorted(info.kv_layout.items())])
    return sha256(same.encode()).hexdigest()[:16]


def loads(load: EngineLoad, info: EngineInfo, *, open_legs: int) -> bytes:
    used = (load.kv_blocks_total - load.kv_blocks_free) * info.block_tokens
    return vllm_engine.loads(
        running=load.running,
        waiting=max(load.waiting, open_legs - load.running),
        max_running=info.max_running,
        kv_tokens=load.kv_blocks_total * info.block_tokens,
        kv_tokens_used=used,
        utilization=open_legs / info.max_running,
        version=info.version,
    )


def tokenizer(files: vllm_engine.ModelFiles) -> Iterator[bytes]:
    return files.tokenizer()
