"""Engines by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.base import EngineOptions
from engine.build import KINDS, build_engine

ROOT = Path(__file__).parents[2]
OPTIONS = EngineOptions(name="w", model="m", served_model_name="m", cluster_secret=b"secret")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_without_loading_anything_heavy(kind: str) -> None:
    program = (
        "import sys; from engine.base import EngineOptions; from engine.build import build_engine;"
        "build_engine(sys.argv[1], EngineOptions(name='w', model='m', served_model_name='m', cluster_secret=b's'));"
        "print([name for name in ('torch', 'vllm', 'transformers', 'nixl_cu12') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, kind], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="there is no 'sglang', only sim, vllm"):
        build_engine("sglang", OPTIONS)
