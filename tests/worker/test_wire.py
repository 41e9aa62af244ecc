"""Every field of an order reaches its leg, and every field of an answer its message."""

import pytest
from google.protobuf.json_format import MessageToDict

from decode.ahead import Hint
from decode.service import DecodeOrder
from engine.base import (
    DecodeLeg,
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
from tests.worker.scripted_engine import INFO
from worker import messages, wire
from worker.config import Role

SAMPLING = inference_pb2.Sampling(
    max_tokens=9,
    min_tokens=1,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    min_p=0.125,
    presence_penalty=1.5,
    frequency_penalty=-1.5,
    repetition_penalty=1.25,
    seed=-5,
    stop=["the edge's"],
    stop_token_ids=[4, 5],
    ignore_eos=True,
    logprobs=0,
)
SAMPLING_READ = Sampling(
    max_tokens=9,
    min_tokens=1,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    min_p=0.125,
    presence_penalty=1.5,
    frequency_penalty=-1.5,
    repetition_penalty=1.25,
    seed=-5,
    stop_token_ids=(4, 5),
    ignore_eos=True,
    logprobs=0,
)


def read(**message: object) -> messages.Message:
    return wire.read(worker_link_pb2.RouterMessage(**message))  # type: ignore[arg-type]


def test_prefill_order() -> None:
    order = worker_link_pb2.PrefillOrder(
        leg_id="a/1/p",
        tenant="t",
        token_ids=[1, 2],
        sampling=SAMPLING,
        cache_salt=b"\x01\xff",
        timeout_s=2.5,
        hand_off=True,
        reader="d0",
        resample=True,
    )
    assert read(prefill=order) == PrefillOrder(
        leg=PrefillLeg(
            leg_id="a/1/p",
            tenant="t",
            token_ids=(1, 2),
            sampling=SAMPLING_READ,
            cache_salt="01ff",
            hand_off=True,
            reader="d0",
            resample=True,
        ),
        timeout_s=2.5,
    )


def test_fetch_ahead() -> None:
    hint = worker_link_pb2.FetchAhead(leg_id="a/1/p", handle=b"h", timeout_s=2.5)
    assert read(fetch_ahead=hint) == Hint(leg_id="a/1/p", handle=b"h", timeout_s=2.5)


def test_offered() -> None:
    offered = wire.offered("a/1/p", b"h").offered
    assert (offered.leg_id, offered.handle) == ("a/1/p", b"h")


def test_decode_order() -> None:
    order = worker_link_pb2.DecodeOrder(
        leg_id="a/1/d",
        tenant="t",
        token_ids=[1, 2, 3],
        prompt_tokens=2,
        sampling=SAMPLING,
        cache_salt=b"\x01\xff",
        timeout_s=2.5,
        handle=b"h",
    )
    assert read(decode=order) == DecodeOrder(
        leg=DecodeLeg(
            leg_id="a/1/d",
            tenant="t",
            token_ids=(1, 2, 3),
            prompt_tokens=2,
            sampling=SAMPLING_READ,
            cache_salt="01ff",
        ),
        timeout_s=2.5,
        handle=b"h",
    )


@pytest.mark.parametrize(
    ("said", "structure"),
    [
        ({"json_object": True}, Structure(StructureKind.JSON_OBJECT)),
        ({"json_schema": "{}"}, Structure(StructureKind.JSON_SCHEMA, "{}")),
        ({"regex": "a"}, Structure(StructureKind.REGEX, "a")),
        ({"grammar": "root ::= [a]"}, Structure(StructureKind.GRAMMAR, "root ::= [a]")),
        ({}, None),
    ],
)
def test_the_form_of_an_answer_is_read(said: dict[str, object], structure: Structure | None) -> None:
    sampling = inference_pb2.Sampling(max_tokens=1, structure=said, logit_bias={5: 0.5})
    order = worker_link_pb2.PrefillOrder(leg_id="a", token_ids=[1], sampling=sampling, timeout_s=1)
    message = read(prefill=order)
    assert isinstance(message, PrefillOrder)
    assert (message.leg.sampling.structure, message.leg.sampling.logit_bias) == (structure, ((5, 0.5),))


def test_sampling_left_out_takes_the_defaults() -> None:
    order = worker_link_pb2.PrefillOrder(
        leg_id="a", token_ids=[1], sampling=inference_pb2.Sampling(max_tokens=1), timeout_s=1
    )
    message = read(prefill=order)
    assert isinstance(message, PrefillOrder)
    assert message.leg.sampling == Sampling(max_tokens=1)


@pytest.mark.parametrize(
    ("order", "detail"),
    [
        (worker_link_pb2.DecodeOrder(prompt_tokens=1, sampling=SAMPLING), "token_ids: empty"),
        (
            worker_link_pb2.DecodeOrder(token_ids=[1], prompt_tokens=1),
            "sampling.max_tokens: must be at least 1, is 0",
        ),
        (
            worker_link_pb2.DecodeOrder(token_ids=[1], prompt_tokens=2, sampling=SAMPLING),
            "prompt_tokens: 2 of 1 token ids",
        ),
        (
            worker_link_pb2.DecodeOrder(token_ids=[1], prompt_tokens=0, sampling=SAMPLING),
            "prompt_tokens: 0 of 1 token ids",
        ),
    ],
)
def test_an_order_that_no_worker_could_do_is_named(order: worker_link_pb2.DecodeOrder, detail: str) -> None:
    order.leg_id = "a/1/d"
    assert read(decode=order) == messages.InvalidOrder(leg_id="a/1/d", detail=detail)


def test_the_other_messages_of_a_router() -> None:
    assert read(welcome=worker_link_pb2.Welcome(router_id="r", load_report_interval_s=2)) == messages.Welcome(
        router_id="r", load_report_interval_s=2
    )
    assert read(cancel=worker_link_pb2.CancelLeg(leg_id="a")) == messages.CancelLeg("a")
    assert read(release=worker_link_pb2.ReleaseLease(handle=b"h")) == messages.ReleaseLease(b"h")
    assert read(drain=worker_link_pb2.Drain()) == messages.Drain()
    assert read(set_role=worker_link_pb2.SetRole(role="ROLE_PREFILL")) == messages.SetRole(Role.PREFILL)
    endpoint = worker_link_pb2.KvEndpoint(address="h:1", incarnation="i")
    peers = worker_link_pb2.Peers(peers=[worker_link_pb2.Peer(worker_id="p0", kv=endpoint)])
    assert read(peers=peers) == messages.Peers((messages.Peer(worker_id="p0", address="h:1", incarnation="i"),))


def test_what_a_newer_router_says_is_unknown_and_not_an_error() -> None:
    assert read() == messages.Unknown("an empty message")
    assert read(set_role=worker_link_pb2.SetRole(role=17)) == messages.Unknown("set_role")  # type: ignore[arg-type]


def test_hello() -> None:
    hello = wire.hello(
        worker_id="w0",
        incarnation="i",
        role=Role.DECODE,
        labels={"zone": "a"},
        info=INFO,
        prefill_legs=4,
        decode_legs=8,
        pid=17,
    )
    assert MessageToDict(hello, preserving_proto_field_name=True) == {
        "hello": {
            "worker_id": "w0",
            "incarnation": "i",
            "role": "ROLE_DECODE",
            "labels": {"zone": "a"},
            "model": {"name": "m", "revision": "r", "max_model_len": 4096, "vocab_size": 1000, "eos_token_ids": [2]},
            "capacity": {"prefill_legs": 4, "decode_legs": 8, "kv_blocks": 100, "block_tokens": 16},
            "kv": {"address": "127.0.0.1:1", "incarnation": "kv-1", "layout": {"block_tokens": "16"}},
            "engine": "scripted",
            "engine_version": "1",
            "pid": 17,
        }
    }


def test_answers() -> None:
    logprobs = TokenLogprobs(7, -0.5, top=((7, -0.5), (8, -1.5)))
    logprobs_said = {
        "sampled": {"token_id": 7, "logprob": -0.5},
        "top": [{"token_id": 7, "logprob": -0.5}, {"token_id": 8, "logprob": -1.5}],
    }
    result = PrefillResult(
        token_id=7,
        logprobs=logprobs,
        finish_reason=FinishReason.STOP,
        handle=b"h",
        cached_tokens=16,
        queue_s=0.5,
        prefill_s=0.25,
    )
    output = StepOutput(
        leg_id="engine's",
        token_ids=(7, 8),
        finish_reason=FinishReason.LENGTH,
        logprobs=(logprobs,),
        cached_tokens=16,
    )
    staged = Staged(staged_id="s", tokens=3, transport="nixl", transfer_bytes=48, fetch_s=0.5)
    lane = PeerLane(peer="p0", transport="nixl", gigabytes_per_s=1.5, refusal="no")
    load = EngineLoad(
        running=99,
        waiting=98,
        kv_blocks_free=1,
        kv_blocks_total=2,
        leases_held=3,
        leased_blocks=4,
        staged_pages=5,
        transfer_bytes_total=6,
        transfer_failures_total=7,
        leases_expired_total=8,
    )
    said = [
        wire.prefill_done("a", result),
        wire.steps([("a", output)]),
        wire.fetched("a", staged),
        wire.peer_lane(lane),
        wire.load_report(load, prefill_running=9, decode_running=10),
        wire.role_changed(Role.BOTH),
        wire.draining(),
    ]
    assert [MessageToDict(message, preserving_proto_field_name=True) for message in said] == [
        {
            "prefill_done": {
                "leg_id": "a",
                "token_id": 7,
                "logprobs": logprobs_said,
                "finish_reason": "FINISH_REASON_STOP",
                "handle": "aA==",
                "cached_tokens": 16,
                "queue_s": 0.5,
                "prefill_s": 0.25,
            }
        },
        {
            "step": {
                "outputs": [
                    {
                        "leg_id": "a",
                        "token_ids": [7, 8],
                        "finish_reason": "FINISH_REASON_LENGTH",
                        "logprobs": [logprobs_said],
                        "cached_tokens": 16,
                    }
                ]
            }
        },
        {"fetched": {"leg_id": "a", "transport": "nixl", "bytes": "48", "fetch_s": 0.5}},
        {"peer_lane": {"peer": "p0", "transport": "nixl", "gigabytes_per_s": 1.5, "refusal": "no"}},
        {
            "load": {
                "prefill_running": 9,
                "decode_running": 10,
                "kv_blocks_free": 1,
                "kv_blocks_total": 2,
                "leases_held": 3,
                "leased_blocks": 4,
                "staged_pages": 5,
                "transfer_bytes_total": "6",
                "transfer_failures_total": "7",
                "leases_expired_total": "8",
            }
        },
        {"role_changed": {"role": "ROLE_BOTH"}},
        {"draining": {}},
    ]


def test_an_answer_with_nothing_special_leaves_its_fields_unset() -> None:
    assert MessageToDict(wire.prefill_done("a", PrefillResult(token_id=7))) == {
        "prefillDone": {"legId": "a", "tokenId": 7}
    }


@pytest.mark.parametrize("kind", FailureKind)
def test_every_failure_has_the_wires_number(kind: FailureKind) -> None:
    failed = wire.leg_failed("a", kind, "why").leg_failed
    assert (failed.failure, failed.detail) == (kind.value, "why")
    assert worker_link_pb2.Failure.Name(failed.failure) == f"FAILURE_{kind.name}"
