"""vLLM's engine API, by the stubs that gateways use and by a gateway: the cluster as one engine, and two workers whose
hand-off somebody else drives."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from tests.clients.conftest import engine_address, program
from tests.clients.environments import environment
from tests.cluster.harness import Cluster, clean_environment

SET_UP = """
import json, sys
import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb, vllm_engine_pb2_grpc as api

def engine(address):
    return api.VllmEngineStub(grpc.insecure_channel(address))

def generate(engine, ids, params=None, **sampling):
    sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
    request = pb.GenerateRequest(
        request_id="r",
        tokenized=pb.TokenizedInput(input_ids=ids),
        sampling_params=pb.SamplingParams(**sampling),
        kv_transfer_params_json=params,
    )
    return [response.complete for response in engine.Generate(request, timeout=30)][-1]
"""


def test_the_cluster_is_one_engine(serving: Cluster) -> None:
    said = program(
        SET_UP
        + """
cluster = engine(sys.argv[1])
assert cluster.HealthCheck(pb.HealthCheckRequest()).healthy
model = cluster.GetModelInfo(pb.GetModelInfoRequest())
server = cluster.GetServerInfo(pb.GetServerInfoRequest())
answer = generate(cluster, [5, 6, 7])
loads = cluster.GetLoads(pb.GetLoadsRequest()).loads
print(json.dumps([model.served_model_name, server.server_type, len(answer.output_ids), len(loads)]))
try:
    cluster.Embed(pb.EmbedRequest())
except grpc.RpcError as error:
    print(error.code().name)
""",
        serving.address,
        needs=("smg-grpc-proto",),
    )
    first, second = said.splitlines()
    assert json.loads(first) == ["tandem-nano", "vllm-grpc", 8, 1]
    assert second == "UNIMPLEMENTED"


def test_stubs_of_others_drive_two_workers(serving: Cluster) -> None:
    before = transferred(serving)
    said = program(
        SET_UP
        + """
prefill, decode = engine(sys.argv[1]), engine(sys.argv[2])
roles = [one.GetServerInfo(pb.GetServerInfoRequest()).kv_role for one in (prefill, decode)]
prompt = list(range(5, 205))
alone = generate(decode, prompt)
reader = decode.GetServerInfo(pb.GetServerInfoRequest()).kv_engine_id
asked = json.dumps({"do_remote_decode": True, "do_remote_prefill": False, "reader": reader})
handed = generate(prefill, prompt, asked, max_tokens=1).kv_transfer_params_json
answer = generate(decode, prompt, handed)
print(json.dumps([roles, list(answer.output_ids) == list(alone.output_ids), len(answer.output_ids)]))
""",
        engine_address(serving, "prefill-0"),
        engine_address(serving, "decode-0"),
        needs=("smg-grpc-proto",),
    )
    assert json.loads(said) == [["kv_producer", "kv_consumer"], True, 8]
    serving.wait_until(lambda: transferred(serving) > before)


def test_a_gateway_of_others_routes_over_two_workers(serving: Cluster, tmp_path: Path) -> None:
    before = transferred(serving)
    workers = [f"grpc://{engine_address(serving, name)}" for name in ("prefill-0", "decode-0")]
    with smg(tmp_path, "--pd-disaggregation", "--prefill", workers[0], "--decode", workers[1]) as gateway:
        prompt = {"model": "tandem-nano", "prompt": "def f(n):" * 30, "temperature": 0}
        whole = gateway.complete(prompt | {"max_tokens": 12})
        assert whole["usage"]["completion_tokens"] == 12
        stop = whole["choices"][0]["text"][8:14]
        cut = gateway.complete(prompt | {"max_tokens": 12, "stop": stop})
        assert cut["choices"][0]["finish_reason"] == "stop"
        assert whole["choices"][0]["text"].startswith(cut["choices"][0]["text"])
        assert len(gateway.complete(prompt | {"max_tokens": 4, "n": 2})["choices"]) == 2
    serving.wait_until(lambda: transferred(serving) > before)


def test_a_gateway_of_others_takes_the_cluster_for_an_engine(serving: Cluster, tmp_path: Path) -> None:
    with smg(tmp_path, "--worker-urls", f"grpc://{serving.address}") as gateway:
        answer = gateway.complete({"model": "tandem-nano", "prompt": "def f(n):", "max_tokens": 8})
        assert answer["usage"]["completion_tokens"] == 8


class Gateway:
    def __init__(self, base: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self._base = base
        self._process = process
        self._log = log

    def complete(self, body: dict[str, object]) -> dict[str, Any]:
        data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
        with urlopen(Request(f"{self._base}/v1/completions", data, headers), timeout=60) as response:
            said: dict[str, Any] = json.load(response)
        return said

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not self._has_model():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)

    def _has_model(self) -> bool:
        """It makes tokens of texts, too, so it is ready once it has the model's tokenizer."""
        try:
            with urlopen(f"{self._base}/v1/models", timeout=10) as response:
                listed = json.load(response)["data"]
        except (URLError, ConnectionError, TimeoutError):
            return False
        return bool(listed) and "Successfully loaded tokenizer" in self._log.read_text()


@contextmanager
def smg(folder: Path, *arguments: str) -> Iterator[Gateway]:
    port, metrics = free_port(), free_port()
    log = folder / "smg.log"
    command = [str(environment("smg") / "smg"), "launch", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(metrics), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=clean_environment(), cwd=folder)
    try:
        gateway = Gateway(f"http://127.0.0.1:{port}", process, log)
        gateway.wait_ready()
        yield gateway
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    """It takes no port 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def transferred(serving: Cluster) -> int:
    return sum(worker.load.transfer_bytes_total for worker in serving.status().workers)
