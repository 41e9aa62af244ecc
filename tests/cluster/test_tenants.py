"""A cluster that asks who is there, made with the commands people use."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tandem import Client
from tandem.errors import Unauthenticated
from tests.cluster.harness import TANDEM, clean_environment, cluster

CONFIG = """
[router]
tenants_file = "tenants.toml"
[router.auth]
mode = "keys"
keys_file = "auth/keys.json"
"""
#: A few KV blocks' worth.
PROMPT = tuple(range(5, 205))


def tandem(folder: Path, *arguments: str) -> str:
    command = [*TANDEM, *arguments]
    return subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, check=True).stdout.decode()


def cached_tokens(address: str, key: str) -> int:
    with Client(address, api_key=key) as client:
        return client.generate(PROMPT, max_tokens=2).result().finished.usage.cached_prompt_tokens


def test_from_nothing_to_answers_that_are_each_tenants_own(tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text(CONFIG)
    keys = {}
    for name, fields in (("a", ()), ("b", ()), ("c", ("sharing_group=g",)), ("d", ("sharing_group=g",))):
        tandem(tmp_path, "tenant", "add", name, *fields)
        keys[name] = tandem(tmp_path, "key", "create", name).strip()
    with cluster(tmp_path, "sim") as up:
        up.wait_ready()
        assert b"decode-0" in up.tandem("status").stdout, "whoever runs it needs no key to operate it"
        refused = up.tandem("generate", "x")
        assert (refused.returncode, b"UNAUTHENTICATED" in refused.stderr) == (7, True)

        assert cached_tokens(up.address, keys["a"]) == 0
        assert cached_tokens(up.address, keys["a"]) > 0
        assert cached_tokens(up.address, keys["b"]) == 0, "another tenant's cache was used"
        assert cached_tokens(up.address, keys["c"]) == 0
        assert cached_tokens(up.address, keys["d"]) > 0, "tenants of a group share"

        (listed,) = json.loads(tandem(tmp_path, "key", "list", "--tenant", "a", "--json"))
        tandem(tmp_path, "key", "revoke", listed["id"])

        def is_revoked() -> bool:
            with Client(up.address, api_key=keys["a"]) as client:
                try:
                    client.models()
                except Unauthenticated as error:
                    return error.reason == "KEY_REVOKED"
            return False

        up.wait_until(is_revoked)
        with Client(up.address, api_key=keys["b"]) as client:
            assert client.models()
    for path in (tmp_path / "state").rglob("*.log"):
        assert not any(key in path.read_text() for key in keys.values()), f"{path} holds a key"


@pytest.mark.parametrize("mode", ["none", "keys"])
def test_what_would_let_anybody_in_does_not_start(tmp_path: Path, mode: str) -> None:
    command = [*TANDEM, "up", "--engine", "sim", "--no-prompt", "--state-dir", str(tmp_path / "state")]
    command += ["--set", "router.host=0.0.0.0", "--set", f"router.auth.mode={mode}"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, timeout=60)
    assert done.returncode == 2
    words = b"allow_unauthenticated" if mode == "none" else b"keys_file: must be given"
    assert words in done.stderr
