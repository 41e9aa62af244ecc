"""The router as a process: what it prints, how it exits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2, inference_pb2_grpc, worker_link_pb2_grpc
from router.config import RouterConfig, from_json, to_json
from tests.router.running import BOTH, MODEL, MODEL_DIR, Message, hello

WAIT_S = 60
IPV6 = Path("/proc/net/if_inet6")


def config(**changes: object) -> RouterConfig:
    values = {"model_dir": str(MODEL_DIR), "model_name": MODEL, "port": 0, "shutdown_grace_s": 60.0, **changes}
    return RouterConfig(**values)  # type: ignore[arg-type]


@contextmanager
def process(said: bytes) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "router", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as router:
        assert router.stdin is not None
        router.stdin.write(said)
        router.stdin.close()
        router.stdin = None  # or `communicate` would flush it
        try:
            yield router
        finally:
            router.kill()


def ports(router: subprocess.Popen[bytes]) -> dict[str, int]:
    assert router.stdout is not None
    return json.loads(router.stdout.readline())


def test_it_says_where_it_listens_serves_metrics_and_stops_on_sigterm() -> None:
    with process(to_json(config(metrics_port=0))) as router:
        where = ports(router)
        with urlopen(f"http://127.0.0.1:{where['metrics_port']}/metrics", timeout=WAIT_S) as page:
            assert b"tandem_requests_queued 0.0" in page.read()
        router.send_signal(signal.SIGTERM)
        assert router.wait(WAIT_S) == 0


@pytest.mark.skipif(not IPV6.exists() or "lo" not in IPV6.read_text(), reason="this machine speaks IPv4 only")
@pytest.mark.parametrize(("edges", "grpc_server"), [(1, "tandem"), (2, "grpcio")])
def test_it_listens_on_an_ipv6_address(edges: int, grpc_server: str) -> None:
    made = config(
        host="::1", http_port=0, metrics_port=0, edges=edges, worker_listen="[::1]:0", grpc_server=grpc_server
    )
    with process(to_json(made)) as router:
        where = ports(router)
        for port in (where["port"], where["worker_port"]):
            with grpc.insecure_channel(f"[::1]:{port}") as channel:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        for port, path in ((where["http_port"], "version"), (where["metrics_port"], "metrics")):
            with urlopen(f"http://[::1]:{port}/{path}", timeout=WAIT_S) as page:
                assert page.status == 200


def test_a_second_signal_does_not_wait_for_what_runs() -> None:
    with process(to_json(config())) as router, grpc.insecure_channel(f"127.0.0.1:{ports(router)['port']}") as channel:
        left = Event()
        link = worker_link_pb2_grpc.WorkerLinkStub(channel).Connect(saying(Message(hello=hello("b", BOTH)), left))
        assert next(link).HasField("welcome")
        running = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="x"))
        assert next(link).HasField("decode")
        states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        router.send_signal(signal.SIGTERM)
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert running.is_active()
        router.send_signal(signal.SIGTERM)
        assert router.wait(WAIT_S) == 1
        left.set()


def saying(message: Message, left: Event) -> Iterator[Message]:
    yield message
    left.wait(WAIT_S)


def test_a_taken_port_is_said_with_an_exit_code_of_its_own() -> None:
    with process(to_json(config())) as first:
        port = ports(first)["port"]
        with process(to_json(config(port=port))) as second:
            _, error = second.communicate(timeout=WAIT_S)
            assert second.returncode == 4
            assert str(port).encode() in error
            assert b"Traceback" not in error


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"port": 99999}, "port"),
        ({"model_dir": "/nowhere"}, "model_dir"),
        ({"edges": 0}, "edges"),
        ({"host": "[::1]"}, "host.*must be ::1"),
        ({"edges": 2}, "worker_listen"),
        ({"load_report_interval_s": 20.0}, "load_report_interval_s"),
        ({"requests": {"stop_strings_max": 0}}, "requests.stop_strings_max"),
        ({"limits": {"queue_requests_max": 0}}, "queue_requests_max"),
        ({"log_level": "loud"}, "log_level"),
    ],
)
def test_a_wrong_configuration_names_the_key(change: dict[str, object], key: str) -> None:
    said = json.loads(to_json(config())) | change
    with pytest.raises(ValueError, match=key):
        from_json(json.dumps(said))


def test_a_wrong_configuration_has_an_exit_code_of_its_own() -> None:
    with process(b'{"model_dir": 3}') as router:
        _, error = router.communicate(timeout=WAIT_S)
        assert router.returncode == 2
        assert b"model_dir" in error


def test_a_configuration_survives_the_wire() -> None:
    assert from_json(to_json(config(metrics_port=0))) == config(metrics_port=0)
