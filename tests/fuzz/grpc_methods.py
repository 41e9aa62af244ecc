"""Calls every gRPC method that a router's port reflects with messages that nobody would send.

    python -m tests.fuzz.grpc_methods ADDRESS [--cases 10000] [--seed 1] [--only SUBSTRING]

No call may end in INTERNAL or UNKNOWN, or not end. What is being generated when a call's deadline comes is cancelled.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from random import Random

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.fuzz.messages import Messages

#: Calls that are served, for what comes after all checks.
_RAW: dict[str, object] = {
    "name": "text_input",
    "datatype": "BYTES",
    "shape": ["1"],
    "contents": {"bytesContents": ["eCA9IDE="]},
}
_PARAMETERS = {"max_tokens": {"int64Param": "3"}}
_INFER: dict[str, object] = {"modelName": "tandem-nano", "id": "7", "inputs": [_RAW], "parameters": _PARAMETERS}
GOOD: dict[str, list[dict[str, object]]] = {
    "tandem.v1.Inference.Generate": [
        {"text": "x = 1", "sampling": {"maxTokens": 4, "stop": ["zz"], "logprobs": 2}, "returnTokenIds": True},
        {"tokenIds": {"ids": [5, 6, 7]}, "sampling": {"maxTokens": 3, "seed": "5", "temperature": 0.5}},
        {"text": "x", "sampling": {"maxTokens": 3}, "lane": "batch", "model": "tandem-nano"},
    ],
    "inference.GRPCInferenceService.ModelInfer": [_INFER],
    "inference.GRPCInferenceService.ModelStreamInfer": [_INFER],
    "vllm.grpc.engine.VllmEngine.Generate": [
        {"requestId": "", "tokenized": {"inputIds": [5, 6]}, "samplingParams": {"maxTokens": 3}, "stream": True},
        {"tokenized": {"inputIds": [5, 6]}, "samplingParams": {"maxTokens": 3, "logprobs": 1, "stop": ["q"]}},
    ],
    "grpc.health.v1.Health.Check": [{"service": "tandem.v1.Inference"}],
    "grpc.health.v1.Health.Watch": [{"service": ""}],
}
FORBIDDEN = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
#: Some calls would go on for ever: those that watch.
_DEADLINE_S = 0.5
_RESPONSES_MAX = 20
_STUCK_S = 30.0


@dataclass
class Outcome:
    codes: Counter[str] = field(default_factory=Counter)
    #: What was wrong, with the bytes that did it.
    failures: list[str] = field(default_factory=list)


def methods(address: str) -> list[MethodDescriptor]:
    """Everything the port reflects."""
    with grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        services = [pool.FindServiceByName(name) for name in database.get_services()]
        return [method for service in services for method in service.methods]


async def fuzz(address: str, method: MethodDescriptor, cases: int, seed: int, words: list[str]) -> Outcome:
    outcome, random = Outcome(), Random(f"{seed} {method.full_name}")
    messages = Messages(random, words)
    good = [ParseDict(said, GetMessageClass(method.input_type)()) for said in GOOD.get(method.full_name, ())]
    todo = iter(range(cases))
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
    async with grpc.aio.insecure_channel(address, options=options) as channel:

        async def work() -> None:
            for _ in todo:
                sent = [messages.make(method.input_type, good) for _ in range(random.randint(0, 3))] or [b""]
                await _one(channel, method, sent, outcome)

        await asyncio.gather(*(work() for _ in range(32)))
    return outcome


async def _one(channel: grpc.aio.Channel, method: MethodDescriptor, sent: list[bytes], outcome: Outcome) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    call = getattr(channel, kind)(path)(_each(sent) if method.client_streaming else sent[0], timeout=_DEADLINE_S)
    shown = [data[:400].hex() for data in (sent if method.client_streaming else sent[:1])]
    responses: list[bytes] = []
    try:
        async with asyncio.timeout(_STUCK_S):
            if method.server_streaming:
                async for response in call:
                    responses.append(response)
                    if len(responses) == _RESPONSES_MAX:
                        call.cancel()
            else:
                responses.append(await call)
        code, said = grpc.StatusCode.OK, ""
    except grpc.aio.AioRpcError as error:
        code, said = error.code(), error.details() or ""
        if said == "Internal error from Core":
            # The client's own word for what it still had to send when the server had ended the call.
            code = grpc.StatusCode.CANCELLED
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        code, said = grpc.StatusCode.CANCELLED, ""
    except TimeoutError:
        outcome.failures.append(f"{path}: did not end: {shown}")
        return
    outcome.codes[code.name] += 1
    leaks = any(word in said for word in ("Traceback", '.py"', "/site-packages/", "Error("))
    if code in FORBIDDEN or leaks:
        outcome.failures.append(f"{path}: {code.name} {said!r}: {shown}")
    output = GetMessageClass(method.output_type)
    for response in responses:
        try:
            output.FromString(response)
        except DecodeError:
            outcome.failures.append(f"{path}: answered with what is no {method.output_type.full_name}: {shown}")


async def _each(sent: Iterable[bytes]) -> AsyncIterator[bytes]:
    for data in sent:
        yield data


def report(name: str, outcome: Outcome) -> bool:
    codes = ", ".join(f"{count} {code}" for code, count in outcome.codes.most_common())
    print(f"{'FAILED' if outcome.failures else 'ok':6} {name}: {codes}", flush=True)
    for failure in outcome.failures[:5]:
        print(f"       {failure}", flush=True)
    return not outcome.failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], help="part of a method's name")
    parser.add_argument("--word", action="append", default=[], help="a text that means something to the server")
    asked = parser.parse_args(arguments)
    fine = True
    for method in methods(asked.address):
        if any(part in method.full_name for part in asked.only or [""]):
            outcome = asyncio.run(fuzz(asked.address, method, asked.cases, asked.seed, asked.word or ["x"]))
            fine = report(method.full_name, outcome) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
