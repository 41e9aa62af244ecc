"""`tandem up` as a person meets it, on the simulated engine."""

import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tandem.config import SHIPPED_MODEL
from tests.cluster.harness import ON_SIM, TANDEM, Cluster, clean_environment, cluster, is_running


def test_interrupting_stops_everything_in_order(fresh: Cluster) -> None:
    pids = fresh.pids()
    assert len(pids) == 3
    assert fresh.stop() == 0
    assert not any(is_running(pid) for pid in pids)
    assert re.search(r"router +stopped\n(?s:.*)(prefill|decode)-0 +stopped\n(?s:.*)\nstopped\n$", fresh.output)
    assert "Traceback" not in fresh.output


def test_nothing_outlives_a_killed_supervisor(fresh: Cluster) -> None:
    pids = fresh.pids()
    fresh.process.kill()
    fresh.process.wait()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@ON_SIM
def test_a_second_cluster_in_the_same_place_is_told_of_the_first(shared: Cluster) -> None:
    done = shared.tandem("up", "--engine", "sim", "--port", "0")
    assert done.returncode == 2
    assert b"a cluster is up already at " + shared.address.encode() in done.stderr
    assert shared.tandem("generate", "x", "-n", "2").returncode == 0


@ON_SIM
def test_a_port_where_a_router_listens_is_said_to_be_so(shared: Cluster, tmp_path: Path) -> None:
    port = shared.address.rpartition(":")[2]
    done = shared.tandem("up", "--engine", "sim", "--port", port, "--state-dir", str(tmp_path))
    assert done.returncode == 2
    assert f"{shared.address} is in use, by a Tandem router;" in done.stderr.decode()


def test_a_port_in_use_is_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [*TANDEM, "up", "--engine", "sim", "--port", str(port), "--state-dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, env=clean_environment(), timeout=60)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} is in use" in done.stderr.decode()
    assert "--port" in done.stderr.decode()


def test_a_worker_that_cannot_start_is_given_up_and_said_why(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(SHIPPED_MODEL / "tokenizer.json", model)
    (model / "config.json").write_text("{}")
    with cluster(tmp_path, "sim", "--model", str(model), "--set", "supervisor.backoff_first_s=0.05") as broken:
        assert broken.process.wait(120) == 1
        assert "the cluster cannot serve" in broken.output
        assert re.search(r"(prefill|decode)-0 +died: exited with code", broken.output)


def test_a_drained_worker_leaves_and_the_rest_stays(tmp_path: Path) -> None:
    with cluster(tmp_path, "sim", "--decode", "2") as running:
        running.wait_ready()
        assert running.tandem("drain", "decode-1").returncode == 0
        running.wait_until(lambda: "decode-1   has left" in running.output)
        running.wait_until(lambda: {w.worker_id for w in running.status().workers} == {"prefill-0", "decode-0"})
        assert running.tandem("generate", "x", "-n", "2").returncode == 0


def test_a_warm_start_reaches_the_first_token_soon(tmp_path: Path) -> None:
    command = [*TANDEM, "up", "--engine", "sim", "--port", "0", "--state-dir", str(tmp_path)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"first token after" in line:
                print(f"tandem up --engine sim: first answer after {time.monotonic() - started:.2f} s")
                break
        else:
            pytest.fail("tandem up ended without an answer")
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(60) == 0
