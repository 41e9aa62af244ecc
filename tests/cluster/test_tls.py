"""A cluster whose every connection is encrypted, by one section of its configuration."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tandem import Client
from tandem.errors import Unavailable
from tests.certificates import Authority
from tests.cluster.harness import TANDEM, clean_environment, cluster
from trust.tls import Tls, TlsFiles

#: Not shm, so that KV crosses sockets.
FLAGS = ("--http-port", "0", "--set", "engine.transports=tcp", "--set", "router.worker_listen=127.0.0.1:0")


def write(folder: Path, files: TlsFiles) -> None:
    lines = [f'{name} = "{getattr(files, name)}"' for name in ("cert", "key", "ca")]
    lines.append(f"require_client_cert = {str(files.require_client_cert).lower()}")
    (folder / "tandem.toml").write_text("\n".join(["[tls]", *lines, ""]))


def test_everything_speaks_tls_and_whoever_has_no_certificate_gets_nothing(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    files = authority.issue("node", require_client_cert=True)
    write(tmp_path, files)
    client = authority.issue("client")
    with cluster(tmp_path, "sim", *FLAGS) as up:
        up.wait_ready()
        (https,) = [line for line in up.output.splitlines() if "OpenAI's API on https://" in line]
        assert b"decode-0" in up.tandem("status").stdout, "whoever runs it needs to name no file"
        assert b"UNAUTHENTICATED" in up.tandem("status").stdout

        at = ("--ca", client.ca, "--cert", client.cert, "--key", client.key)
        elsewhere = {**clean_environment(), "TANDEM_STATE_DIR": str(tmp_path / "nobody's")}
        answer = subprocess.run(
            [*TANDEM, *at, "generate", "--address", up.address, "--json", "x"], env=elsewhere, capture_output=True
        )
        assert answer.returncode == 0, answer.stderr
        finished = json.loads(answer.stdout.splitlines()[-1])
        assert finished["route"]["transport"] == "tcp/tls"
        with Client(up.address, ca=client.ca, cert=client.cert, key=client.key) as library:
            assert library.models()
        url = https.partition(" on ")[2].strip() + "/models"
        with urllib.request.urlopen(url, context=Tls(client).client_context(), timeout=20) as page:
            assert page.status == 200

        for wrong in (TlsFiles(ca=client.ca), TlsFiles()):
            with Client(up.address, tls=wrong) as library, pytest.raises(Unavailable):
                library.models(timeout_s=5.0)

        authority.issue("node")  # what runs takes it, and so does what dies and comes back
        fresh = ssl.PEM_cert_to_DER_cert(Path(files.cert).read_text())
        for address in (up.address, https.partition("https://")[2].partition("/")[0]):
            up.wait_until(lambda address=address: shown(address, client) == fresh)  # type: ignore[misc]
        before = up.times_ready("decode-0")
        os.kill(up.pid("decode-0"), signal.SIGKILL)
        up.wait_until(lambda: up.times_ready("decode-0") > before)
        with Client(up.address, tls=client) as library:
            assert library.generate("x", max_tokens=4).result().finished.route.transport == "tcp/tls"


def shown(address: str, client: TlsFiles) -> bytes | None:
    """The certificate of what listens there."""
    host, _, port = address.rpartition(":")
    plain = socket.create_connection((host, int(port)), 20)
    with Tls(client).client_context().wrap_socket(plain, server_hostname=host) as connection:
        return connection.getpeercert(binary_form=True)


def test_a_wrong_pair_does_not_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    mixed = TlsFiles(cert=authority.issue("a").cert, key=authority.issue("b").key, ca=str(authority.ca))
    write(tmp_path, mixed)
    command = [*TANDEM, "up", "--engine", "sim", "--no-prompt", "--state-dir", str(tmp_path / "state")]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, timeout=60)
    assert done.returncode == 2
    assert b"tandem.toml:3: tls.key: " in done.stderr
    assert b"is not the key of the certificate" in done.stderr
