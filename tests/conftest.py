"""What the markers mean, and whose a leak is. A test module imports vLLM or torch inside its tests, so that it can be
collected without."""

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
HAS_GPU = Path("/dev/nvidiactl").exists()


#: Of a test that may have to start engines first, on a machine that does much else. Others: pyproject.toml.
VLLM_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.timeout(VLLM_TIMEOUT_S))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and not HAS_VLLM:
        pytest.fail("vLLM is not installed: `python3 bootstrap.py setup`, or leave it out with `make test-fast`")
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("no CUDA device")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _collected_after_a_module() -> Iterator[None]:
    """What a module's fixtures leave behind. What lives on, such as libraries that it imported, need not be looked
    through again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _collected_after_a_test() -> Iterator[None]:
    """What a test forgot to close is found by the collector, and is an error: here it is this test's, and always;
    else it would be that of whichever runs when the collector does."""
    yield
    gc.collect()
