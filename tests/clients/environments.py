"""Environments for programs of others, which must not share one with Tandem: made once, kept under build/clients."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "clients"

#: What was tried last.
VERSIONS = {
    "tritonclient[grpc]": "2.73.0",
    "kserve": "0.21.0",
    "smg": "1.13.0",
    "smg-grpc-proto": "0.4.28",
    "xds-protos": "1.85.0",
    "buf-bin": "1.75.0",
    "aiperf": "0.13.0",
    "locust": "2.47.0",
    "grpcio": "1.85.1",
    "protobuf": "7.36.2",
    "googleapis-common-protos": "1.76.0",
}


def environment(*names: str) -> Path:
    """The bin folder of one that has these."""
    wanted = [f"{name}=={VERSIONS[name]}" for name in names]
    digest = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:8]
    folder = FOLDER / f"{names[0].partition('[')[0]}-{digest}"
    with _locked(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *wanted], check=True, timeout=600)
            (folder / "complete").touch()
    return folder / "bin"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Test processes run side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
