"""`tandem tenant` and `tandem key`, on real files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from router.edge import keys
from router.tenants_edit import Refused, add, change, remove
from tandem.cli import app
from tandem.client import Client
from tests.tandem.scripted_server import Script, serving

WRITTEN_BY_HAND = """\
# Who pays for what.
guarantee_share_max = 0.5

[tenants.acme]   # since 2024
weight = 4       # agreed
# and its limits:
tokens_per_minute = 1000

[tenants.acme.pool]
trust = "regulated"

# The small ones.
[tenants.tiny]
weight = 0.5
"""


def tandem(*arguments: str, folder: Path, **environ: str) -> Result:
    env: dict[str, str | None] = {name: None for name in os.environ if name.startswith("TANDEM_")}
    files = {
        "TANDEM_ROUTER_TENANTS_FILE": str(folder / "tenants.toml"),
        "TANDEM_ROUTER_AUTH_MODE": "keys",
        "TANDEM_ROUTER_AUTH_KEYS_FILE": str(folder / "auth" / "keys.json"),
    }
    return CliRunner().invoke(app, arguments, env=env | files | environ)


def done(*arguments: str, folder: Path) -> str:
    result = tandem(*arguments, folder=folder)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str, folder: Path) -> str:
    result = tandem(*arguments, folder=folder)
    assert result.exit_code == 2, result.output
    return result.stderr


def test_from_nothing_to_a_tenant_with_a_key(tmp_path: Path) -> None:
    done("tenant", "add", "acme", "weight=4", "lanes=realtime,standard", "pool=trust=regulated", folder=tmp_path)
    shown = json.loads(done("tenant", "show", "acme", "--json", folder=tmp_path))
    assert (shown["weight"], shown["lanes"], shown["pool"]) == (4.0, ["realtime", "standard"], {"trust": "regulated"})
    made = tandem("key", "create", "acme", "--days", "30", folder=tmp_path)
    key = made.stdout.strip()
    parts = keys.parse(key)
    assert parts is not None
    assert parts.secret not in made.stderr
    assert "not shown again" in made.stderr
    (listed,) = json.loads(done("key", "list", "--json", folder=tmp_path))
    assert (listed["id"], listed["tenant"], listed["state"]) == (parts.id, "acme", "live")
    assert listed["expires"] - listed["created"] == pytest.approx(30 * 86_400)
    assert "hash" not in listed
    assert parts.secret not in (tmp_path / "auth" / "keys.json").read_text()


def test_a_key_for_nobody_says_so(tmp_path: Path) -> None:
    done("tenant", "add", "acme", folder=tmp_path)
    assert "there is no tenant 'acmee' yet" in tandem("key", "create", "acmee", folder=tmp_path).stderr
    for known in (("acme",), ("ops", "--scope", "admin")):
        assert "no tenant" not in tandem("key", "create", *known, folder=tmp_path).stderr


def test_a_key_can_be_for_operators_in_a_lower_lane_and_revoked(tmp_path: Path) -> None:
    command = ("key", "create", "ops", "--scope", "admin", "--scope", "inference", "--lane-max", "batch", "--json")
    made = json.loads(done(*command, folder=tmp_path))
    assert (made["scopes"], made["lane_max"]) == (["admin", "inference"], "batch")
    done("key", "revoke", made["id"], folder=tmp_path)
    table = done("key", "list", folder=tmp_path)
    assert "revoked" in table
    assert "admin inference" in table
    assert "there is no key" in refused("key", "revoke", "nobody", folder=tmp_path)


def test_what_is_wrong_with_a_command_is_said_in_a_line(tmp_path: Path) -> None:
    assert "must be one of inference, admin" in refused("key", "create", "a", "--scope", "x", folder=tmp_path)
    assert "must be one of realtime" in refused("key", "create", "a", "--lane-max", "x", folder=tmp_path)
    assert "would have expired" in refused("key", "create", "a", "--days", "-1", folder=tmp_path)
    done("tenant", "add", "a", folder=tmp_path)
    assert "exists" in refused("tenant", "add", "a", folder=tmp_path)
    assert "must be positive" in refused("tenant", "set", "a", "weight=0", folder=tmp_path)
    assert "did you mean weight?" in refused("tenant", "set", "a", "wieght=1", folder=tmp_path)
    assert "must be KEY=VALUE" in refused("tenant", "set", "a", "weight", folder=tmp_path)
    assert "there is no tenant" in refused("tenant", "set", "b", "weight=1", folder=tmp_path)
    assert "there is no tenant" in refused("tenant", "show", "b", folder=tmp_path)
    assert (tmp_path / "tenants.toml").read_text() == "[tenants.a]\n"


def test_a_file_that_is_not_named_anywhere_is_asked_for(tmp_path: Path) -> None:
    result = tandem("tenant", "list", folder=tmp_path, TANDEM_ROUTER_TENANTS_FILE="")
    assert result.exit_code == 2
    assert "router.tenants_file: names no file" in result.stderr


def test_the_list_has_a_line_for_each(tmp_path: Path) -> None:
    done("tenant", "add", "a", "weight=2", folder=tmp_path)
    done("tenant", "add", "a.b c", folder=tmp_path)
    assert [line.split()[0] for line in done("tenant", "list", folder=tmp_path).splitlines()] == ["tenant", "a", "a.b"]
    assert json.loads(done("tenant", "show", "a.b c", "--json", folder=tmp_path))["weight"] == 1.0


class TestAFileWrittenByHand:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "tenants.toml"
        path.write_text(WRITTEN_BY_HAND)
        path.chmod(0o640)
        return path

    def test_a_change_touches_its_lines_alone(self, path: Path) -> None:
        change(path, "acme", {"weight": 5, "tokens_per_minute": None, "price_plan": None, "queue_requests_max": 9})
        assert path.read_text() == WRITTEN_BY_HAND.replace("weight = 4       # agreed", "weight = 5").replace(
            "# and its limits:\ntokens_per_minute = 1000\n", "# and its limits:\n"
        ).replace("weight = 5\n", "weight = 5\nqueue_requests_max = 9\n")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_a_tenant_goes_with_all_of_its_tables_and_leaves_others_their_comments(self, path: Path) -> None:
        remove(path, "acme")
        text = path.read_text()
        assert "acme" not in text
        assert "regulated" not in text
        assert "# The small ones.\n[tenants.tiny]\n" in text
        remove(path, "tiny")
        assert "tenants" not in path.read_text()

    def test_a_new_one_comes_last(self, path: Path) -> None:
        add(path, "new", {"weight": 1})
        assert path.read_text() == WRITTEN_BY_HAND + "\n[tenants.new]\nweight = 1\n"

    @pytest.mark.parametrize("name", ["weight = [\n1]", 'sharing_group = """\nx"""', "budgets = [\n  {period='day'}]"])
    def test_what_only_a_person_can_edit_is_left_alone(self, path: Path, name: str) -> None:
        text = f"[tenants.a]\n{name}\nburst_s = 3\n"
        path.write_text(text)
        with pytest.raises(Refused, match="by hand"):
            change(path, "a", {name.partition(" ")[0]: 1})
        path.write_text("tenants = { a = { weight = 1 } }\n")
        with pytest.raises(Refused, match="by hand"):
            change(path, "a", {"weight": 1})


def test_a_key_goes_along_with_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "of the environment")
    seen: list[str] = []

    class Watch(grpc.ServerInterceptor):
        def intercept_service(self, continuation, details):
            seen.extend(str(value) for name, value in details.invocation_metadata if name == "authorization")
            return continuation(details)

    with serving(Script(), interceptors=(Watch(),)) as script:
        for key in (None, "given", ""):
            with Client(script.address, api_key=key) as client:
                client.models()
                client.status()
                client.generate("x").result()
    assert seen == ["Bearer of the environment"] * 3 + ["Bearer given"] * 3
