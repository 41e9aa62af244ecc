"""A small part of `make bench-isolation`: tenants that share prompts, workers that die, leases that end too soon."""

from __future__ import annotations

from pathlib import Path

from benchmarks import isolation


async def test_nobody_is_answered_from_anothers_blocks(tmp_path: Path) -> None:
    with isolation.up(tmp_path, speedup=20.0, lease_ttl_s=0.06) as there:
        came = await isolation.storm(there, requests=250, kills=1)
    assert came.outcomes["finished"] + came.outcomes["went away"] == 250, came
    assert (came.wrong, came.foreign) == (0, 0), came
    assert came.tellable == came.outcomes["finished"], "another tenant's blocks would have made other answers"
    assert came.kills == 1
    assert came.cached, "caches were in use"
    assert came.leases_expired, "leases ended unread"


async def test_caches_are_shared_by_a_tenant_and_its_group_and_by_nobody_else(tmp_path: Path) -> None:
    with isolation.up(tmp_path, speedup=20.0, lease_ttl_s=30.0) as there:
        cached = await isolation.caches(there)
    assert cached["same salt"] > 0
    assert cached["same sharing group"] > 0
    assert cached["another salt"] == 0


def test_the_distance_of_distributions_sees_a_difference() -> None:
    same, shifted = [float(number) for number in range(100)], [number + 50.0 for number in range(100)]
    assert isolation.ks_distance(same, same) == 0.0
    assert isolation.ks_distance(same, shifted) == 0.5 > isolation.ks_bound(100, 100)
