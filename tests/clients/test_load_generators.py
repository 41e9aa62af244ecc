"""Load generators that people use, unchanged, against a live cluster."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import http_address, is_idle
from tests.clients.environments import environment
from tests.cluster.harness import ROOT, Cluster, clean_environment

MODEL = ROOT / "models" / "tandem-nano"


def run(command: list[str], folder: Path, **environ: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=clean_environment() | environ, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_aiperf_over_openais_protocol(serving: Cluster, tmp_path: Path) -> None:
    tool = environment("aiperf") / "aiperf"
    for endpoint in ("chat", "completions"):
        out = tmp_path / endpoint
        what = ["--model", "tandem-nano", "--tokenizer", str(MODEL), "--endpoint-type", endpoint, "--streaming"]
        load = ["--concurrency", "4", "--request-count", "20", "--isl", "200", "--osl", "32"]
        whole = ["--extra-inputs", "ignore_eos:true", "--use-server-token-count"]
        where = ["--url", http_address(serving), "--artifact-dir", str(out), "--ui", "none"]
        run([str(tool), "profile", *what, *load, *whole, *where], tmp_path)
        told = json.loads((out / "profile_export_aiperf.json").read_text())
        assert told["request_count"]["avg"] == 20
        assert told["error_summary"] == []
        assert told["output_sequence_length"]["avg"] == 32
        assert told["time_to_first_token"]["avg"] > 0
    assert is_idle(serving)


def test_locust_over_the_native_protocol(serving: Cluster, tmp_path: Path) -> None:
    tool = environment("locust", "grpcio", "protobuf", "googleapis-common-protos") / "locust"
    program = ["-f", str(ROOT / "examples" / "locustfile.py"), "--headless", "-u", "4", "-r", "4", "-t", "4s"]
    run([str(tool), *program, "--host", serving.address, "--csv", "told"], tmp_path, PYTHONPATH=str(ROOT))
    with (tmp_path / "told_stats.csv").open() as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    assert int(rows["answer"]["Request Count"]) > 4
    assert int(rows["answer"]["Failure Count"]) == 0
    assert float(rows["answer"]["Average Content Size"]) == 64
    assert int(rows["first token"]["Request Count"]) >= int(rows["answer"]["Request Count"])
    assert is_idle(serving)


def test_locust_over_kserves_protocol(serving: Cluster, tmp_path: Path) -> None:
    tool = environment("locust", "tritonclient[grpc]") / "locust"
    program = ["-f", str(ROOT / "examples" / "locustfile_kserve.py"), "--headless", "-u", "4", "-r", "4", "-t", "4s"]
    run([str(tool), *program, "--host", serving.address, "--csv", "told"], tmp_path)
    with (tmp_path / "told_stats.csv").open() as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    assert int(rows["answer"]["Request Count"]) > 4
    assert int(rows["answer"]["Failure Count"]) == 0
    assert int(rows["first token"]["Request Count"]) >= int(rows["answer"]["Request Count"])
    assert int(rows["between tokens"]["Request Count"]) > 4
    assert is_idle(serving)


@pytest.mark.skipif(
    tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 38),
    reason="perf_analyzer is built for glibc 2.38 and newer",
)
def test_perf_analyzer_over_kserves_protocol(serving: Cluster, tmp_path: Path) -> None:
    tool = environment("perf-analyzer") / "perf_analyzer"
    data = tmp_path / "input.json"
    data.write_text(json.dumps({"data": [{"text_input": ["def f(n):"], "stream": [True], "max_tokens": [16]}]}))
    what = ["-m", "tandem-nano", "-i", "grpc", "-u", serving.address, "--async", "--streaming"]
    load = ["--input-data", str(data), "--concurrency-range", "4", "--request-count", "40"]
    said = run([str(tool), *what, *load, "--profile-export-file", "told.json"], tmp_path)
    assert "Successful request count: 40" in said
    (experiment,) = json.loads((tmp_path / "told.json").read_text())["experiments"]
    assert len(experiment["requests"]) >= 40
    assert is_idle(serving)
