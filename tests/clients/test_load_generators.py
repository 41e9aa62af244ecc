"""Load generators that people use, unchanged, against a live cluster."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

from tests.clients.conftest import is_idle
from tests.clients.environments import environment
from tests.cluster.harness import ROOT, Cluster, clean_environment

MODEL = ROOT / "models" / "tandem-nano"


def run(command: list[str], folder: Path, **environ: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=clean_environment() | environ, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def http_address(serving: Cluster) -> str:
    found = re.search(r"^OpenAI's API on (http://\S+)/v1$", serving.output, re.MULTILINE)
    assert found, serving.output
    return found[1]


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
