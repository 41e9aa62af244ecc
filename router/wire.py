"""Messages of protos/worker_link.proto <-> the core's events and effects."""

from __future__ import annotations

import math
from collections.abc import Sequence

from protos import inference_pb2, worker_link_pb2
from router.core import effects as fx
from router.core import events as ev
from router.core.errors import Invalid
from router.core.request import FinishReason, Sampling, Structure, StructureKind, TokenLogprobs
from router.core.worker import Capacity, KvEndpoint, Load, ModelFacts, PeerLane, Role, WorkerFacts
from router.joining import Challenge, Introduction

WorkerMessage = worker_link_pb2.WorkerMessage
RouterMessage = worker_link_pb2.RouterMessage

_ROLES: dict[int, Role] = {
    worker_link_pb2.ROLE_PREFILL: Role.PREFILL,
    worker_link_pb2.ROLE_DECODE: Role.DECODE,
    worker_link_pb2.ROLE_BOTH: Role.BOTH,
}
_ROLE_NUMBERS = {
    Role.PREFILL: worker_link_pb2.ROLE_PREFILL,
    Role.DECODE: worker_link_pb2.ROLE_DECODE,
    Role.BOTH: worker_link_pb2.ROLE_BOTH,
}
_FINISH_REASONS: dict[int, FinishReason | None] = {
    inference_pb2.FINISH_REASON_UNSPECIFIED: None,
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_FAILURES: dict[int, ev.Failure] = {
    worker_link_pb2.FAILURE_REJECTED: ev.Failure.REJECTED,
    worker_link_pb2.FAILURE_TRANSFER: ev.Failure.TRANSFER,
    worker_link_pb2.FAILURE_INVALID: ev.Failure.INVALID,
    worker_link_pb2.FAILURE_ENGINE: ev.Failure.ENGINE,
    worker_link_pb2.FAILURE_EXPIRED: ev.Failure.EXPIRED,
}

# From workers.


def introduction(message: WorkerMessage) -> Introduction | None:
    """None for another message."""
    if not message.HasField("introduction"):
        return None
    said = message.introduction
    return Introduction(worker_id=said.worker_id, incarnation=said.incarnation, nonce=said.nonce)


def facts(hello: worker_link_pb2.Hello) -> WorkerFacts:
    """Raises Invalid for a hello that no worker of ours would say."""
    role = _ROLES.get(hello.role)
    for field, value in (("worker_id", hello.worker_id), ("incarnation", hello.incarnation), ("role", role)):
        if not value:
            raise Invalid(f"hello.{field}", "must be set")
    for field in ("max_model_len", "vocab_size"):
        if getattr(hello.model, field) < 1:
            raise Invalid(f"hello.model.{field}", "must be at least 1")
    for field in ("kv_blocks", "block_tokens"):
        if getattr(hello.capacity, field) < 1:
            raise Invalid(f"hello.capacity.{field}", "must be at least 1")
    assert role is not None
    return WorkerFacts(
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        role=role,
        model=ModelFacts(
            name=hello.model.name,
            revision=hello.model.revision,
            max_model_len=hello.model.max_model_len,
            vocab_size=hello.model.vocab_size,
            eos_token_ids=tuple(hello.model.eos_token_ids),
            features=tuple(sorted(hello.model.features)),
        ),
        capacity=Capacity(
            prefill_legs=hello.capacity.prefill_legs,
            decode_legs=hello.capacity.decode_legs,
            kv_blocks=hello.capacity.kv_blocks,
            block_tokens=hello.capacity.block_tokens,
        ),
        kv=KvEndpoint(address=hello.kv.address, incarnation=hello.kv.incarnation, layout=dict(hello.kv.layout)),
        labels=dict(hello.labels),
        engine=hello.engine,
        engine_version=hello.engine_version,
        pid=hello.pid,
    )


def events(worker_id: str, message: WorkerMessage) -> Sequence[ev.Event]:
    """Nothing for a second hello and what a newer worker says. Of a step, what begins answers comes first, alone."""
    if message.HasField("step"):
        outputs, firsts = tuple(map(_step_output, message.step.outputs)), message.step.firsts
        parts = (outputs[:firsts], outputs[firsts:]) if 0 < firsts < len(outputs) else (outputs,)
        return [ev.StepOutputs(worker_id, part) for part in parts]
    event = _event(worker_id, message)
    return () if event is None else (event,)


def _event(worker_id: str, message: WorkerMessage) -> ev.Event | None:
    match message.WhichOneof("message"):
        case "prefill_done":
            return _prefill_done(worker_id, message.prefill_done)
        case "fetched":
            fetched = message.fetched
            return ev.Fetched(
                worker_id=worker_id,
                leg_id=fetched.leg_id,
                transport=fetched.transport,
                nbytes=fetched.bytes,
                fetch_s=fetched.fetch_s,
            )
        case "leg_failed":
            failed = message.leg_failed
            failure = _FAILURES.get(failed.failure, ev.Failure.ENGINE)
            return ev.LegFailed(worker_id, failed.leg_id, failure, failed.detail)
        case "load":
            return ev.LoadReported(worker_id, _load(message.load))
        case "offered":
            return ev.Offered(worker_id, message.offered.leg_id, message.offered.handle)
        case "role_changed" if message.role_changed.role in _ROLES:
            return ev.RoleChanged(worker_id, _ROLES[message.role_changed.role])
        case "draining":
            return ev.DrainingAnnounced(worker_id)
        case "peer_lane":
            return ev.PeerLaneReported(worker_id, _lane(message.peer_lane))
    return None


def _prefill_done(worker_id: str, done: worker_link_pb2.PrefillDone) -> ev.PrefillDone:
    return ev.PrefillDone(
        worker_id=worker_id,
        leg_id=done.leg_id,
        token_id=done.token_id,
        logprobs=_logprobs(done.logprobs) if done.HasField("logprobs") else None,
        finish_reason=_FINISH_REASONS.get(done.finish_reason),
        handle=done.handle,
        cached_tokens=done.cached_tokens,
        queue_s=done.queue_s,
        prefill_s=done.prefill_s,
    )


def _step_output(output: worker_link_pb2.StepOutput) -> ev.StepOutput:
    return ev.StepOutput(
        output.leg_id,
        tuple(output.token_ids),
        _FINISH_REASONS.get(output.finish_reason),
        tuple(map(_logprobs, output.logprobs)) if output.logprobs else (),
        output.cached_tokens,
    )


def _logprobs(entry: inference_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple((other.token_id, other.logprob) for other in entry.top)
    return TokenLogprobs(entry.sampled.token_id, entry.sampled.logprob, top)


def _load(load: worker_link_pb2.LoadReport) -> Load:
    return Load(
        prefill_running=load.prefill_running,
        decode_running=load.decode_running,
        kv_blocks_free=load.kv_blocks_free,
        kv_blocks_total=load.kv_blocks_total,
        leases_held=load.leases_held,
        leased_blocks=load.leased_blocks,
        staged_pages=load.staged_pages,
        transfer_bytes_total=load.transfer_bytes_total,
        transfer_failures_total=load.transfer_failures_total,
        leases_expired_total=load.leases_expired_total,
    )


def _lane(lane: worker_link_pb2.PeerLane) -> PeerLane:
    speed = lane.gigabytes_per_s if math.isfinite(lane.gigabytes_per_s) else 0.0
    return PeerLane(peer=lane.peer, transport=lane.transport, gigabytes_per_s=speed, refusal=lane.refusal)


# To workers.


def challenge(value: Challenge) -> RouterMessage:
    said = worker_link_pb2.Challenge(router_id=value.router_id, nonce=value.nonce, proof=value.proof)
    return RouterMessage(challenge=said)


def welcome(router_id: str, load_report_interval_s: float) -> RouterMessage:
    said = worker_link_pb2.Welcome(router_id=router_id, load_report_interval_s=load_report_interval_s)
    return RouterMessage(welcome=said)


def order(effect: fx.Effect) -> RouterMessage:
    match effect:
        case fx.SendPrefill():
            return RouterMessage(prefill=_prefill_order(effect))
        case fx.SendDecode():
            return RouterMessage(decode=_decode_order(effect))
        case fx.FetchAhead():
            hint = worker_link_pb2.FetchAhead(leg_id=effect.leg_id, handle=effect.handle, timeout_s=effect.timeout_s)
            return RouterMessage(fetch_ahead=hint)
        case fx.CancelLeg():
            return RouterMessage(cancel=worker_link_pb2.CancelLeg(leg_id=effect.leg_id))
        case fx.ReleaseLease():
            return RouterMessage(release=worker_link_pb2.ReleaseLease(handle=effect.handle))
        case fx.SendPeers():
            return RouterMessage(peers=worker_link_pb2.Peers(peers=[_peer(peer) for peer in effect.peers]))
        case fx.SendDrain():
            return RouterMessage(drain=worker_link_pb2.Drain())
        case fx.SendSetRole():
            return RouterMessage(set_role=worker_link_pb2.SetRole(role=_ROLE_NUMBERS[effect.role]))
    raise AssertionError(f"{type(effect).__name__} is not for a worker")


def _prefill_order(effect: fx.SendPrefill) -> worker_link_pb2.PrefillOrder:
    return worker_link_pb2.PrefillOrder(
        leg_id=effect.leg_id,
        tenant=effect.tenant,
        token_ids=effect.token_ids,
        sampling=_sampling(effect.sampling),
        cache_salt=effect.cache_salt,
        timeout_s=effect.timeout_s,
        hand_off=effect.hand_off,
        reader=effect.reader,
        resample=effect.resample,
    )


def _decode_order(effect: fx.SendDecode) -> worker_link_pb2.DecodeOrder:
    return worker_link_pb2.DecodeOrder(
        leg_id=effect.leg_id,
        tenant=effect.tenant,
        token_ids=effect.token_ids,
        prompt_tokens=effect.prompt_tokens,
        sampling=_sampling(effect.sampling),
        cache_salt=effect.cache_salt,
        timeout_s=effect.timeout_s,
        handle=effect.handle,
    )


def _sampling(sampling: Sampling) -> inference_pb2.Sampling:
    return inference_pb2.Sampling(
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
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        structure=_structure(sampling.structure),
        logit_bias=dict(sampling.logit_bias),
    )


def _structure(structure: Structure | None) -> inference_pb2.Structure | None:
    match structure:
        case None:
            return None
        case (StructureKind.JSON_SCHEMA, text):
            return inference_pb2.Structure(json_schema=text)
        case (StructureKind.REGEX, text):
            return inference_pb2.Structure(regex=text)
        case (StructureKind.GRAMMAR, text):
            return inference_pb2.Structure(grammar=text)
    return inference_pb2.Structure(json_object=True)


def _peer(peer: WorkerFacts) -> worker_link_pb2.Peer:
    kv = worker_link_pb2.KvEndpoint(
        address=peer.kv.address, incarnation=peer.kv.incarnation, layout=dict(peer.kv.layout)
    )
    return worker_link_pb2.Peer(worker_id=peer.worker_id, kv=kv)
