"""Every fault a few times, on every engine; `make bench-faults` does each at least fifty times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.cases import CASES, KILLING, Site, Tally, faults_at, faulty_cluster, run_aborts, run_case

RUNS = {"sim": 1, "vllm": 2}
ABORTS = {"sim": 100, "vllm": 50}
#: Less than a lease lives by default, and enough for a machine that does much else.
FREE_WITHIN_S = 20.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("site", ["sim", pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True),
]


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with faulty_cluster(tmp_path_factory.mktemp("faults"), request.param) as site:
        yield site


@pytest.mark.parametrize("case", CASES)
async def test_no_token_is_wrong_no_client_hangs_nobody_dies_and_nothing_is_left(site: Site, case: str) -> None:
    killing_takes_long = case in KILLING and site.cluster.engine == "vllm"
    async with faults_at(site, free_within_s=FREE_WITHIN_S) as faults:
        tally = await run_case(faults, case, 1 if killing_takes_long else RUNS[site.cluster.engine])
    print(case, tally)
    assert not tally.problems()


async def test_aborts_at_any_moment_leave_nothing(site: Site) -> None:
    async with faults_at(site, free_within_s=FREE_WITHIN_S) as faults:
        tally = await run_aborts(faults, ABORTS[site.cluster.engine])
    print(tally)
    assert not tally.problems()


async def test_a_reader_that_believes_every_word_is_found_out(site: Site) -> None:
    """That the first case can fail: its reads really are of blocks that are another's by then."""
    if site.cluster.engine == "vllm":
        pytest.skip("it takes long until vLLM gives a free block to somebody else")
    tally = Tally()
    async with faults_at(site, free_within_s=FREE_WITHIN_S) as faults:
        with faults.told("blind"):
            for _ in range(50):  # one or two do
                tally = await run_case(faults, "lease expires in mid-read", 1)
                if tally.wrong:
                    return
    pytest.fail(f"stale bytes were decoded and nobody noticed: {tally}")
