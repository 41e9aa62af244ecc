"""The product's imports run one way, and the rules that say so can fail."""

from pathlib import Path

import pytest

from tests.architecture.imports import MAY_IMPORT, violations

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_it_may(package: str) -> None:
    files = [path for path in (ROOT / package).rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc"))]
    assert files, f"{package} has no Python files: has it moved?"
    found = [line for path in files for line in violations(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("router/server.py", "import engine.base"),
        ("router/server.py", "from kv_transfer import lease"),
        ("loadtest/run.py", "def f():\n    import worker.main"),
        ("engine/sim.py", "from prefill import admission"),
        ("prefill/handoff.py", "from decode.room import Room"),
        ("kv_transfer/lease.py", "from ..engine import base"),
        ("router/edge/native.py", "from protos import inference_pb2"),
        ("router/server.py", "import protos.inference_pb2 as pb"),
        ("router/core/state.py", "from protos import inference_pb2_grpc"),
        ("router/core/state.py", "from ..wire import to_request"),
        ("router/core/state.py", "import router.config"),
        ("router/core/state.py", "import asyncio"),
        ("router/core/state.py", "from trust.tls import TlsFiles"),
        ("trust/tls.py", "from router.config import RouterConfig"),
        ("router/core/state.py", "from time import monotonic"),
        ("router/core/state.py", "from google.protobuf import message"),
        ("router/core/policy/fair.py", "import threading"),
        ("autoscaler/core/plan.py", "import grpc.aio"),
        ("router/core/state.py", "import random\nrandom.random()"),
        ("router/core/state.py", "from random import choice"),
        ("router/core/state.py", "from datetime import datetime\ndatetime.now()"),
        ("router/core/state.py", "print('hello')"),
        ("engine/sim.py", "import torch"),
        ("worker/main.py", "from vllm import LLM"),
        ("worker/main.py", "import importlib\nimportlib.import_module('vllm.v1')"),
        ("engine/base.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm"),
        ("decode/fetch.py", "from nixl_cu12 import _api"),
    ],
)
def test_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("worker/main.py", "from decode.room import Room\nfrom engine import base"),
        ("router/wire.py", "from protos import inference_pb2 as pb"),
        ("router/edge/native.py", "import grpc\nfrom protos import inference_pb2_grpc"),
        ("router/core/state.py", "from random import Random\nimport random\nrandom.Random(7).random()"),
        ("router/core/state.py", "from . import events\nfrom router.core.errors import Invalid"),
        ("engine/vllm_process.py", "import vllm"),
        ("kv_transfer/node.py", "from trust.tls import Tls"),
        ("kv_transfer/nixl.py", "from nixl_cu12 import _api"),
    ],
)
def test_permitted_import_is_not_reported(path: str, source: str) -> None:
    assert violations(path, source) == []
