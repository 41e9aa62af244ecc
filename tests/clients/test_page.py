"""The commands of docs/clients.md that need programs of others, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.clients.environments import environment
from tests.cluster.harness import ROOT, Cluster, clean_environment

PAGE = (ROOT / "docs" / "clients.md").read_text()
COMMANDS = re.findall(r"^```(sh|python)\n# pip install (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_there_are_some() -> None:
    assert {needs for _, needs, _ in COMMANDS} == {"tritonclient[grpc]", "kserve", "smg-grpc-proto", "buf-bin"}


@pytest.mark.parametrize(("language", "needs", "command"), COMMANDS, ids=lambda value: value[:20])
def test_the_pages_commands_work(serving: Cluster, language: str, needs: str, command: str) -> None:
    command = command.replace("127.0.0.1:50051", serving.address)
    bin_folder = environment(needs)
    run = ["bash", "-euc", command] if language == "sh" else [str(bin_folder / "python"), "-c", command]
    environ = clean_environment() | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(run, env=environ, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
