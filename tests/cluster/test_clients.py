"""Every command of docs/clients.md, as it stands there, against a live cluster; those that need other people's programs
are in tests/clients."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import PACE, ROOT, Cluster, clean_environment, cluster

PAGE = (ROOT / "docs" / "clients.md").read_text()
COMMANDS = re.findall(r"^```(sh|python)\n(?!# pip install)(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("clients"), "sim", *PACE["sim"], "--http-port", "0") as running:
        running.wait_ready()
        yield running


def http_address(serving: Cluster) -> str:
    found = re.search(r"^OpenAI's API on http://(\S+)/v1$", serving.output, re.MULTILINE)
    assert found, serving.output
    return found[1]


@pytest.mark.parametrize(("language", "command"), COMMANDS, ids=lambda value: value[:30])
def test_the_pages_commands_work(serving: Cluster, language: str, command: str) -> None:
    if "openai" in command:
        pytest.importorskip("openai")
    command = command.replace("127.0.0.1:50051", serving.address).replace("127.0.0.1:8000", http_address(serving))
    run = ["bash", "-euc", command] if language == "sh" else [sys.executable, "-c", command]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = clean_environment() | {"PATH": path, "TANDEM_STATE_DIR": str(serving.state)}
    done = subprocess.run(run, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "stream" in command and language == "sh":
        assert done.stdout.endswith("data: [DONE]\n\n")


def test_the_page_has_a_command_for_each_row_of_its_table() -> None:
    anchors = re.findall(r"\(#([\w-]+)\)", PAGE)
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^## .*", PAGE, re.M)
    }
    assert anchors
    assert set(anchors) <= headings
