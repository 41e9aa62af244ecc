"""Messages of protos/worker_link.proto <-> values. Nothing else in the worker's packages reads or builds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decode.ahead import Hint
from decode.service import DecodeOrder
from engine.base import (
    DecodeLeg,
    EngineInfo,
    EngineLoad,
    FailureKind,
    FinishReason,
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
from prefill.service import PrefillOrder
from protos import inference_pb2, worker_link_pb2
from worker import messages
from worker.config import Role

WorkerMessage = worker_link_pb2.WorkerMessage
RouterMessage = worker_link_pb2.RouterMessage

_ROLES = {
    Role.PREFILL: worker_link_pb2.ROLE_PREFILL,
    Role.DECODE: worker_link_pb2.ROLE_DECODE,
    Role.BOTH: worker_link_pb2.ROLE_BOTH,
}
_ROLE_OF = {number: role for role, number in _ROLES.items()}

_FINISH_REASONS = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}

_FAILURES = {
    FailureKind.REJECTED: worker_link_pb2.FAILURE_REJECTED,
    FailureKind.TRANSFER: worker_link_pb2.FAILURE_TRANSFER,
    FailureKind.INVALID: worker_link_pb2.FAILURE_INVALID,
    FailureKind.ENGINE: worker_link_pb2.FAILURE_ENGINE,
    FailureKind.EXPIRED: worker_link_pb2.FAILURE_EXPIRED,
}

# From the router ------------------------------------------------------------------------------------------------------


def read(message: RouterMessage) -> messages.Message:
    match name := message.WhichOneof("message"):
        case "challenge":
            said = message.challenge
            return messages.Challenge(router_id=said.router_id, nonce=said.nonce, proof=said.proof)
        case "welcome":
            return messages.Welcome(
                router_id=message.welcome.router_id,
                load_report_interval_s=message.welcome.load_report_interval_s,
            )
        case "prefill":
            return _prefill_order(message.prefill)
        case "decode":
            return _decode_order(message.decode)
        case "fetch_ahead":
            hint = message.fetch_ahead
            return Hint(leg_id=hint.leg_id, handle=hint.handle, timeout_s=hint.timeout_s)
        case "cancel":
            return messages.CancelLeg(message.cancel.leg_id)
        case "release":
            return messages.ReleaseLease(message.release.handle)
        case "drain":
            return messages.Drain()
        case "set_role" if message.set_role.role in _ROLE_OF:
            return messages.SetRole(_ROLE_OF[message.set_role.role])
        case "peers":
            return messages.Peers(tuple(_peer(peer) for peer in message.peers.peers))
        case _:
            return messages.Unknown(name or "an empty message")


def _prefill_order(order: worker_link_pb2.PrefillOrder) -> PrefillOrder | messages.InvalidOrder:
    if problem := _problem(order):
        return messages.InvalidOrder(leg_id=order.leg_id, detail=problem)
    leg = PrefillLeg(
        leg_id=order.leg_id,
        tenant=order.tenant,
        token_ids=tuple(order.token_ids),
        sampling=_sampling(order.sampling),
        cache_salt=order.cache_salt.hex(),
        hand_off=order.hand_off,
        reader=order.reader,
        resample=order.resample,
    )
    return PrefillOrder(leg=leg, timeout_s=order.timeout_s)


def _decode_order(order: worker_link_pb2.DecodeOrder) -> DecodeOrder | messages.InvalidOrder:
    problem = _problem(order)
    if not problem and not 0 < order.prompt_tokens <= len(order.token_ids):
        problem = f"prompt_tokens: {order.prompt_tokens} of {len(order.token_ids)} token ids"
    if problem:
        return messages.InvalidOrder(leg_id=order.leg_id, detail=problem)
    leg = DecodeLeg(
        leg_id=order.leg_id,
        tenant=order.tenant,
        token_ids=tuple(order.token_ids),
        prompt_tokens=order.prompt_tokens,
        sampling=_sampling(order.sampling),
        cache_salt=order.cache_salt.hex(),
    )
    return DecodeOrder(leg=leg, timeout_s=order.timeout_s, handle=order.handle)


def _problem(order: worker_link_pb2.PrefillOrder | worker_link_pb2.DecodeOrder) -> str:
    if not order.token_ids:
        return "token_ids: empty"
    if order.sampling.max_tokens < 1:
        return f"sampling.max_tokens: must be at least 1, is {order.sampling.max_tokens}"
    return ""


def _sampling(sampling: inference_pb2.Sampling) -> Sampling:
    """Unset fields take the defaults of `Sampling`, as the router's validation does. Stop strings stay at its edge."""
    given = {
        name: getattr(sampling, name)
        for name in (
            "min_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "seed",
            "ignore_eos",
            "logprobs",
        )
        if sampling.HasField(name)
    }
    return Sampling(
        max_tokens=sampling.max_tokens,
        stop_token_ids=tuple(sampling.stop_token_ids),
        structure=_structure(sampling.structure),
        logit_bias=tuple(sampling.logit_bias.items()),
        **given,
    )


def _structure(structure: inference_pb2.Structure) -> Structure | None:
    kind = structure.WhichOneof("kind")
    if kind is None:
        return None
    return Structure(StructureKind(kind), "" if kind == "json_object" else getattr(structure, kind))


def _peer(peer: worker_link_pb2.Peer) -> messages.Peer:
    return messages.Peer(worker_id=peer.worker_id, address=peer.kv.address, incarnation=peer.kv.incarnation)


# To the router --------------------------------------------------------------------------------------------------------


def introduction(worker_id: str, incarnation: str, nonce: bytes) -> WorkerMessage:
    said = worker_link_pb2.Introduction(worker_id=worker_id, incarnation=incarnation, nonce=nonce)
    return WorkerMessage(introduction=said)


def hello(
    *,
    worker_id: str,
    incarnation: str,
    role: Role,
    labels: Mapping[str, str],
    info: EngineInfo,
    prefill_legs: int,
    decode_legs: int,
    pid: int,
    proof: bytes = b"",
) -> WorkerMessage:
    return WorkerMessage(
        hello=worker_link_pb2.Hello(
            worker_id=worker_id,
            incarnation=incarnation,
            role=_ROLES[role],
            labels=labels,
            model=worker_link_pb2.ModelInfo(
                name=info.model.name,
                revision=info.model.revision,
                max_model_len=info.model.max_model_len,
                vocab_size=info.model.vocab_size,
                eos_token_ids=info.model.eos_token_ids,
                features=info.model.features,
            ),
            capacity=worker_link_pb2.Capacity(
                prefill_legs=prefill_legs,
                decode_legs=decode_legs,
                kv_blocks=info.kv_blocks,
                block_tokens=info.block_tokens,
            ),
            kv=worker_link_pb2.KvEndpoint(
                address=info.kv_address,
                incarnation=info.kv_incarnation,
                layout=info.kv_layout,
            ),
            engine=info.kind,
            engine_version=info.version,
            pid=pid,
            proof=proof,
        )
    )


def offered(leg_id: str, handle: bytes) -> WorkerMessage:
    return WorkerMessage(offered=worker_link_pb2.Offered(leg_id=leg_id, handle=handle))


def prefill_done(leg_id: str, result: PrefillResult) -> WorkerMessage:
    return WorkerMessage(
        prefill_done=worker_link_pb2.PrefillDone(
            leg_id=leg_id,
            token_id=result.token_id,
            logprobs=_logprobs(result.logprobs) if result.logprobs else None,
            finish_reason=_FINISH_REASONS[result.finish_reason],
            handle=result.handle or b"",
            cached_tokens=result.cached_tokens,
            queue_s=result.queue_s,
            prefill_s=result.prefill_s,
        )
    )


def fetched(leg_id: str, staged: Staged) -> WorkerMessage:
    return WorkerMessage(
        fetched=worker_link_pb2.Fetched(
            leg_id=leg_id, transport=staged.transport, bytes=staged.transfer_bytes, fetch_s=staged.fetch_s
        )
    )


def steps(outputs: Sequence[tuple[str, StepOutput]], *, firsts: int = 0) -> WorkerMessage:
    """`firsts`: so many of them, in front, are the first of their legs."""
    return WorkerMessage(
        step=worker_link_pb2.StepOutputs(
            firsts=firsts,
            outputs=[
                worker_link_pb2.StepOutput(
                    leg_id=leg_id,
                    token_ids=output.token_ids,
                    finish_reason=_FINISH_REASONS[output.finish_reason],
                    logprobs=[_logprobs(entry) for entry in output.logprobs],
                    cached_tokens=output.cached_tokens,
                )
                for leg_id, output in outputs
            ],
        )
    )


def leg_failed(leg_id: str, kind: FailureKind, detail: str) -> WorkerMessage:
    return WorkerMessage(leg_failed=worker_link_pb2.LegFailed(leg_id=leg_id, failure=_FAILURES[kind], detail=detail))


def load_report(load: EngineLoad, *, prefill_running: int, decode_running: int) -> WorkerMessage:
    return WorkerMessage(
        load=worker_link_pb2.LoadReport(
            prefill_running=prefill_running,
            decode_running=decode_running,
            kv_blocks_free=load.kv_blocks_free,
            kv_blocks_total=load.kv_blocks_total,
            leases_held=load.leases_held,
            leased_blocks=load.leased_blocks,
            staged_pages=load.staged_pages,
            transfer_bytes_total=load.transfer_bytes_total,
            transfer_failures_total=load.transfer_failures_total,
            leases_expired_total=load.leases_expired_total,
        )
    )


def role_changed(role: Role) -> WorkerMessage:
    return WorkerMessage(role_changed=worker_link_pb2.RoleChanged(role=_ROLES[role]))


def draining() -> WorkerMessage:
    return WorkerMessage(draining=worker_link_pb2.Draining())


def peer_lane(lane: PeerLane) -> WorkerMessage:
    return WorkerMessage(
        peer_lane=worker_link_pb2.PeerLane(
            peer=lane.peer,
            transport=lane.transport,
            gigabytes_per_s=lane.gigabytes_per_s,
            refusal=lane.refusal,
        )
    )


def _logprobs(entry: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        sampled=inference_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob),
        top=[inference_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
    )
