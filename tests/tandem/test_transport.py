"""When a client speaks TLS, and with which files."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from tandem import Client, config, rundir
from tandem.client import _transport
from tandem.settings import ConfigError
from tests.certificates import Authority
from tests.cluster.harness import TANDEM, clean_environment
from trust.tls import PLAINTEXT, TlsFiles, TlsRefused
from worker.config import Role


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


class TestConfiguration:
    """`[tls]` is for all, `[router.tls]` for what clients see."""

    def said(self, tmp_path: Path, *sections: str) -> Path:
        path = tmp_path / "tandem.toml"
        path.write_text("\n".join(sections))
        return path

    def section(self, name: str, files: TlsFiles, *keys: str) -> str:
        return "\n".join([f"[{name}]", *(f'{key} = "{getattr(files, key)}"' for key in keys)])

    def test_one_section_is_enough(self, tmp_path: Path) -> None:
        files = Authority(tmp_path).issue("node")
        loaded = config.load(self.said(tmp_path, self.section("tls", files, "cert", "key", "ca")), {})
        assert loaded.router.tls == files
        assert loaded.router.worker_tls == replace(files, require_client_cert=True)
        worker = loaded.worker(worker_id="w", role=Role.BOTH, routers=("10.0.0.1:1",), secret=b"s" * 32)
        assert worker.engine_options.tls == files

    def test_clients_may_see_another(self, tmp_path: Path) -> None:
        inner, outer = Authority(tmp_path / "inner").issue("node"), Authority(tmp_path / "outer").issue("router")
        sections = self.section("tls", inner, "cert", "key", "ca"), self.section("router.tls", outer, "cert", "key")
        loaded = config.load(self.said(tmp_path, *sections), {}, {}, ["router.worker_listen=127.0.0.1:0"])
        assert (loaded.router.tls, loaded.tls) == (replace(outer, ca=""), inner)

    @pytest.mark.parametrize(
        ("section", "keys", "words"),
        [
            ("tls", ("ca",), "tls.cert: must be given with tls.ca"),
            ("router.tls", ("cert", "key"), "tls.ca: must say who vouches for router.tls.cert"),
            ("tls", ("cert",), "tls.key: must be given, too"),
        ],
    )
    def test_what_could_not_meet_is_refused(
        self, tmp_path: Path, section: str, keys: tuple[str, ...], words: str
    ) -> None:
        files = Authority(tmp_path).issue("node")
        with pytest.raises(ConfigError, match=words):
            config.load(self.said(tmp_path, self.section(section, files, *keys)), {})

    def test_plaintext_beyond_this_machine_is_refused_in_every_process(self) -> None:
        keys = ["router.host=0.0.0.0", "router.auth.allow_unauthenticated=true", "engine.kv_host=10.0.0.1"]
        with pytest.raises(ConfigError) as caught:
            config.load(None, {}, {}, keys)
        assert [line.partition(": is not set")[0] for line in caught.value.problems] == [
            "router.tls.cert",
            "worker.engine_options.tls.cert",
        ]
        assert config.load(None, {}, {}, [*keys, "tls.insecure=true"]).router.tls.insecure
