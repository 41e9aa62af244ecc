"""The transport over ucxx. It may not share a process with NIXL, so its conformance tests get one of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kv_transfer.processes import peer_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_ucx_passes_the_conformance_suite() -> None:
    suite = "tests/kv_transfer/test_transport_conformance.py"
    program = f"import sys, ucxx, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {suite!r}]))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=110)
    print(ran.stdout[-4000:], ran.stderr[-2000:])
    assert ran.returncode == 0
    assert " passed" in ran.stdout
    assert " failed" not in ran.stdout


def test_an_idle_process_sleeps() -> None:
    with peer_process("transport", "ucx") as owner:
        before = owner.cpu_s()
        time.sleep(1.0)
        assert owner.cpu_s() - before < 0.25, "what does not sleep takes a core"
