"""One pair of engines for the whole session: starting them is what costs."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from engine.vllm import VllmEngine
from tests.vllm.corruptible import CORRUPT_FLAG, HOLD_FLAG
from tests.vllm.harness import MODEL, NEWLINE, Pair, becomes_idle, is_idle, options


class CorruptibleEngine(VllmEngine):
    connector = ("tests.vllm.corruptible", "CorruptibleConnector")


class FewLeasesEngine(VllmEngine):
    connector = ("tests.vllm.corruptible", "FewLeasesConnector")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tandem-nano, for which the end of a line is the end of the answer, too: an end that comes often."""
    path = tmp_path_factory.mktemp("model")
    for file in MODEL.iterdir():
        if file.name != "generation_config.json":
            (path / file.name).symlink_to(file)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, NEWLINE]}))
    return path


@pytest.fixture(scope="session")
def corrupt_flag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists, what the decode engine loads is corrupted."""
    flag = tmp_path_factory.mktemp("flags") / "corrupt"
    os.environ[CORRUPT_FLAG] = str(flag)
    return flag


@pytest.fixture(scope="session")
def hold_flag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists, prefill engines take two steps and no more."""
    flag = tmp_path_factory.mktemp("flags") / "hold"
    os.environ[HOLD_FLAG] = str(flag)
    return flag


@contextmanager
def _there(flag: Path) -> Iterator[None]:
    flag.touch()
    try:
        yield
    finally:
        flag.unlink()


@pytest.fixture
def corrupted(corrupt_flag: Path) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _there(corrupt_flag)


@pytest.fixture
def held(hold_flag: Path) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _there(hold_flag)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines(model: Path, corrupt_flag: Path, hold_flag: Path) -> AsyncIterator[Pair]:
    prefill = FewLeasesEngine(options("prefill", model=str(model)))
    decode = CorruptibleEngine(options("decode", model=str(model)))
    try:
        infos = await asyncio.gather(prefill.start(), decode.start())
        lane = await decode.connect("prefill", infos[0].kv_address)
        assert not lane.refusal
        yield Pair(prefill, decode, infos)
    finally:
        await asyncio.gather(prefill.stop(), decode.stop())


@pytest_asyncio.fixture(loop_scope="session")
async def pair(engines: Pair) -> AsyncIterator[Pair]:
    """The engines, of which the test must leave nothing occupied."""
    yield engines
    for engine in (engines.prefill, engines.decode):
        load = await becomes_idle(engine)
        assert is_idle(load), load
