"""Plays scenarios and says what held. `make conformance` runs them all; the tests run the fast ones."""

from __future__ import annotations

import time
from dataclasses import dataclass

from simulator.judge import Finding, judge
from simulator.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Verdict:
    scenario: Scenario
    findings: list[Finding]
    requests: int
    took_s: float


def conform(scenario: Scenario) -> Verdict:
    began = time.monotonic()
    reference = scenario.referred().run() if scenario.reference else None
    run = scenario.run()
    return Verdict(scenario, judge(run, reference), len(run.served), time.monotonic() - began)
