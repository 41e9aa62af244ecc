"""When a client speaks TLS, and with which files."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from tandem import Client, rundir
from tandem.client import _transport
from tests.certificates import Authority
from tests.cluster.harness import TANDEM, clean_environment
from trust.tls import PLAINTEXT, TlsFiles, TlsRefused


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:50051", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("localhost", True),
        ("unix:/run/router", True),
        ("dns:///localhost:1", True),
        ("10.0.0.1:50051", False),
        ("router.example:50051", False),
        ("dns:///router.example:50051", False),
        ("[2001:db8::1]:1", False),
    ],
)
def test_plaintext_leaves_this_machine_only_when_asked_for(address: str, here: bool) -> None:
    credentials, _ = _transport(address, None, PLAINTEXT)
    assert (credentials is None) == here
    assert _transport(address, False, PLAINTEXT)[0] is None
    assert _transport(address, True, PLAINTEXT)[0] is not None


def test_naming_an_authority_means_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    assert _transport("localhost:1", None, TlsFiles(ca=str(authority.ca)))[0] is not None
    _, options = _transport("localhost:1", TlsFiles(ca=str(authority.ca), server_name="router"), PLAINTEXT)
    assert ("grpc.ssl_target_name_override", "router") in options
    with pytest.raises(TlsRefused, match="cannot be read"):
        Client("localhost:1", ca=str(tmp_path / "none.pem"))


def test_a_run_says_what_clients_on_this_machine_speak(tmp_path: Path) -> None:
    tls = Authority(tmp_path).issue("node")
    with rundir.new_run(tmp_path / "state", "127.0.0.1:1", datetime(2026, 1, 1), tls):
        found = rundir.running(tmp_path / "state")
        assert found is not None
        assert (found.address, found.tls) == ("127.0.0.1:1", tls)
        assert json.loads((tmp_path / "state" / "up.lock").read_text())["pid"] == os.getpid()


def test_a_file_that_is_not_there_is_an_error_in_one_line() -> None:
    command = [*TANDEM, "--ca", "/nowhere.pem", "status", "--address", "localhost:1"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: ca: /nowhere.pem cannot be read: No such file or directory\n")
