"""Triton's own client library, unchanged."""

from __future__ import annotations

import json
from textwrap import dedent
from typing import Any

from tests.clients.conftest import is_idle, program
from tests.cluster.harness import Cluster

TRITON = ("tritonclient[grpc]",)

SET_UP = """
import json, queue, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

def tensor(name, datatype, *values):
    kind = {"BYTES": object, "BOOL": bool, "INT32": np.int32, "FP32": np.float32}[datatype]
    made = triton.InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, dtype=kind))
    return made

client = triton.InferenceServerClient(sys.argv[1])
model = client.get_model_repository_index().models[0].name
PROMPT = tensor("text_input", "BYTES", b"def f(n):")
STREAM = tensor("stream", "BOOL", True)
said = {}
"""


def test_what_it_asks_before_and_beside_inference(serving: Cluster) -> None:
    said = run(
        serving,
        """
        said["live"] = client.is_server_live(), client.is_server_ready(), client.is_model_ready(model)
        said["server"] = client.get_server_metadata(as_json=True)["name"]
        said["inputs"] = [one.name for one in client.get_model_metadata(model).inputs]
        said["decoupled"] = client.get_model_config(model).config.model_transaction_policy.decoupled
        said["statistics"] = client.get_inference_statistics(model).model_stats[0].name
        said["nothing"] = [
            client.get_system_shared_memory_status(as_json=True),
            client.get_cuda_shared_memory_status(as_json=True),
            client.get_trace_settings(as_json=True),
            client.get_log_settings(as_json=True),
        ]
        try:
            client.load_model(model)
        except InferenceServerException as error:
            said["load"] = error.status()
        """,
    )
    assert said["live"] == [True, True, True]
    assert said["server"] == "tandem"
    assert said["decoupled"] is True
    assert {"text_input", "stream", "sampling_parameters", "max_tokens"} <= set(said["inputs"])
    assert said["statistics"] == "tandem-nano"
    assert said["nothing"] == [{}] * 4
    assert said["load"] == "StatusCode.UNIMPLEMENTED"


def test_unary_and_streamed_answers_are_the_same_in_both_conventions(serving: Cluster) -> None:
    said = run(
        serving,
        """
        vllm = [PROMPT, tensor("sampling_parameters", "BYTES", json.dumps({"max_tokens": "12", "temperature": "0"}))]
        ensemble = [PROMPT, tensor("max_tokens", "INT32", 12), tensor("temperature", "FP32", 0.0)]
        said["unary"] = [client.infer(model, inputs).as_numpy("text_output")[0].decode() for inputs in (vllm, ensemble)]
        answers = queue.Queue()
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for number in range(6):
            inputs = [*(vllm, ensemble)[number % 2], STREAM]
            client.async_stream_infer(
                model, inputs, request_id=str(number), enable_empty_final_response=True
            )
        texts, final = {}, 0
        while final < 6:
            result, error = answers.get(timeout=30)
            assert error is None, error
            response = result.get_response()
            if response.parameters["triton_final_response"].bool_param:
                final += 1
            else:
                texts[response.id] = texts.get(response.id, "") + result.as_numpy("text_output")[0].decode()
        client.stop_stream()
        said["streamed"] = [texts[str(number)] for number in range(6)]
        """,
    )
    (streamed,) = set(said["streamed"])
    assert streamed
    assert set(said["unary"]) == {"def f(n):" + streamed}


def test_errors_are_its_exceptions_and_leave_the_stream_open(serving: Cluster) -> None:
    said = run(
        serving,
        """
        try:
            client.infer("no-such", [PROMPT])
        except InferenceServerException as error:
            said["unary"] = error.status()
        answers = queue.Queue()
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, [PROMPT, tensor("temperature", "FP32", 9.0)], request_id="bad")
        result, error = answers.get(timeout=30)
        said["streamed"] = json.loads(error.message())
        client.async_stream_infer(model, [PROMPT, STREAM, tensor("max_tokens", "INT32", 1)], request_id="good")
        result, error = answers.get(timeout=30)
        said["good"] = error is None and result.get_response().id
        client.stop_stream()
        """,
    )
    assert said["unary"] == "StatusCode.NOT_FOUND"
    assert (said["streamed"]["code"], said["streamed"]["field"]) == ("INVALID_ARGUMENT", "temperature")
    assert said["good"] == "good"


def test_a_cancelled_stream_frees_everything(serving: Cluster) -> None:
    run(
        serving,
        """
        answers = queue.Queue()
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for number in range(3):
            client.async_stream_infer(
                model, [PROMPT, STREAM, tensor("max_tokens", "INT32", 3000)], request_id=str(number)
            )
        answers.get(timeout=30)
        client.stop_stream(cancel_requests=True)
        """,
    )
    assert is_idle(serving)


def test_its_deadline_is_kept(serving: Cluster) -> None:
    said = run(
        serving,
        """
        try:
            client.infer(model, [PROMPT, tensor("max_tokens", "INT32", 3000)], client_timeout=0.3)
        except InferenceServerException as error:
            said["status"] = error.status()
        """,
    )
    assert said["status"] == "StatusCode.DEADLINE_EXCEEDED"
    assert is_idle(serving)


def run(serving: Cluster, text: str) -> dict[str, Any]:
    found = program(SET_UP + dedent(text) + "\nprint(json.dumps(said))", serving.address, needs=TRITON)
    said: dict[str, Any] = json.loads(found)
    return said
