"""Scenarios hold on the production core, runs of one seed are the same, and a judge that sees a wrong says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.conformance import conform
from simulator.judge import KINDS, judge
from simulator.scenario import Scenario, all_scenarios

SCENARIOS = {scenario.name: scenario for scenario in all_scenarios()}


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.fast])
def test_it_holds(name: str) -> None:
    missed = [finding for finding in conform(SCENARIOS[name]).findings if not finding.ok]
    assert not missed


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_say_what_fair_means_and_check_it(name: str) -> None:
    scenario = SCENARIOS[name]
    assert "Fair:" in scenario.what
    assert scenario.checks
    assert scenario.book.tenants
    assert {check["kind"] for check in scenario.checks} <= KINDS.keys()
    assert scenario.referred().loads


def test_a_seed_is_a_run() -> None:
    scenario = replace(SCENARIOS["made_up_credentials"], duration_s=2.0)
    one, two = scenario.run(), scenario.run()
    assert one.work == two.work
    other = replace(scenario, seed=99).run()
    assert one.work != other.work


def without(scenario: Scenario, tenant: str, **changes: object) -> Scenario:
    tenants = tuple(replace(one, **changes) if one.id == tenant else one for one in scenario.tenants)  # type: ignore[arg-type]
    return replace(scenario, tenants=tenants)


def test_the_judge_sees_shares_that_are_wrong() -> None:
    scenario = without(replace(SCENARIOS["made_up_credentials"], duration_s=6.0), "known", weight=3)
    assert not any(finding.ok for finding in conform(scenario).findings)


def test_the_judge_sees_a_border_that_was_crossed() -> None:
    scenario = without(replace(SCENARIOS["trust_domain"], duration_s=3.0), "regulated", pool=frozenset())
    by_id = {finding.id: finding for finding in judge(scenario.run(), scenario.referred().run())}
    assert not by_id["trust_domain/requests-across-the-border"].ok


def test_the_judge_sees_a_guarantee_that_is_not_kept() -> None:
    scenario = SCENARIOS["guarantee"]
    early = tuple(replace(load, start_s=4.0 if load.tenant == "guaranteed" else 0.0) for load in scenario.loads)
    checks = tuple({**check, "since": 4} for check in scenario.checks)
    scenario = replace(scenario, duration_s=7.0, loads=early, checks=checks)
    assert all(finding.ok for finding in conform(scenario).findings)
    unkept = without(scenario, "guaranteed", guaranteed_tokens_per_s=0.0)
    unkept = replace(unkept, loads=tuple(replace(load, lane=None) for load in unkept.loads))
    assert not any(finding.ok for finding in conform(unkept).findings)
