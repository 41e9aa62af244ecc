"""`make conformance`: the scenarios of `simulator/scenarios/` on the production core, in virtual time.

What it prints and writes are figures and whether each is within its limit; it fails only if it could not run.
`python -m benchmarks.conformance NAME...` runs some.
"""

from __future__ import annotations

import sys

from benchmarks.report import Check, Row, environment, report
from simulator.conformance import conform
from simulator.scenario import all_scenarios


def main(names: list[str]) -> None:
    scenarios = [scenario for scenario in all_scenarios() if not names or scenario.name in names]
    if unknown := set(names) - {scenario.name for scenario in scenarios}:
        raise SystemExit(f"no scenario {', '.join(sorted(unknown))}")
    env, verdicts = environment(), []
    for scenario in scenarios:
        verdicts.append(conform(scenario))
        print(f"{scenario.name}: {scenario.what}", flush=True)
    checks = [Check(one.id, one.value, one.limit, one.ok) for verdict in verdicts for one in verdict.findings]
    rows: list[Row] = [
        {
            "what": verdict.scenario.name,
            "virtual_s": verdict.scenario.duration_s,
            "requests": verdict.requests,
            "took_s": round(verdict.took_s, 1),
            "held": all(finding.ok for finding in verdict.findings),
        }
        for verdict in verdicts
    ]
    report("conformance", rows, checks, env)


if __name__ == "__main__":
    main(sys.argv[1:])
