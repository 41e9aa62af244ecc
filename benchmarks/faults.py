"""Everything that goes wrong with a hand-off, done on purpose to clusters of real processes under load, many times.

The cases are those of tests/faults: two prefill and two decode workers behind a router, requests whose answers are
known, and a fault, mostly while a read of KV stands in its middle. No token may be wrong, no client may wait past its
deadline, no process may die that was not killed, and two seconds later nothing may be held. Then requests are aborted
at random moments.

    make bench-faults                              # both engines: sim, and vLLM with the shipped model
    make bench-faults ARGS="--engine sim"
    make bench-faults ARGS="--engine vllm --runs 10 --cases abort"
    make bench-faults ARGS="--engine vllm --aborts 0 --cases killed,restarted"

A case that kills workers waits for their successors, of which vLLM takes seven seconds of a core to start: its three
take half an hour there. `in_mid_read` are the reads that stood in their middle, one of each decode worker at most.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from benchmarks.report import Check, Row, at_least, at_most, environment, report
from tests.faults.cases import CASES, Tally, faults_at, faulty_cluster, must_not_be, run_aborts, run_case

ABORTS = {"sim": 10_000, "vllm": 500}


def as_row(engine: str, case: str, tally: Tally) -> Row:
    return {
        "what": case,
        "engine": engine,
        "runs": tally.runs,
        "in_mid_read": tally.in_mid_read,
        "requests": tally.requests,
        "aborted": tally.aborted,
        "wrong_tokens": tally.wrong,
        "hangs": tally.hangs,
        "deaths": tally.deaths,
        "leaked": tally.leaked,
        "accepted_attacks": sum(count for word, count in tally.said.items() if must_not_be(word)),
        "typed_errors": sum(tally.errors.values()),
        "retried_legs": tally.retries,
        "kills": tally.kills,
        "seconds": round(tally.seconds),
        "told": ", ".join(f"{count} {word}" for word, count in sorted((tally.errors + tally.said).items())),
    }


async def measure(engine: str, wanted: list[str], runs: int, aborts: int) -> list[Row]:
    rows: list[Row] = []
    with faulty_cluster(Path(tempfile.mkdtemp(prefix="bench-faults-")), engine) as site:
        async with faults_at(site) as faults:
            for case in wanted:
                tally = await run_case(faults, case, runs)
                rows.append(as_row(engine, case, tally))
                print(engine, case, tally, flush=True)
            if aborts:
                tally = await run_aborts(faults, aborts)
                rows.append(as_row(engine, "aborts at random moments", tally))
    return rows


def checks(rows: list[Row], runs: int) -> list[Check]:
    found: list[Check] = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        mine = [row for row in rows if row["engine"] == engine]
        for what in ("wrong_tokens", "hangs", "deaths", "leaked", "accepted_attacks"):
            found.append(at_most(f"{what} on {engine}, all cases", sum(int(row[what] or 0) for row in mine), 0))
        cases = [row for row in mine if row["what"] in CASES]
        if cases:
            found.append(at_least(f"runs of each case on {engine}", min(int(row["runs"] or 0) for row in cases), runs))
        found += [
            at_least(f"aborts on {engine}", float(row["aborted"] or 0), ABORTS[str(engine)])
            for row in mine
            if row["what"] not in CASES
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sim", "vllm", "both"), default="both")
    parser.add_argument("--runs", type=int, default=50, help="of each case")
    parser.add_argument("--aborts", type=int, help="at random moments; by default 10,000 on sim and 500 on vLLM")
    parser.add_argument("--cases", default="", help="only those with one of these in their name; 'none': aborts alone")
    arguments = parser.parse_args()
    env = environment()
    rows: list[Row] = []
    for engine in ("sim", "vllm") if arguments.engine == "both" else (arguments.engine,):
        aborts = ABORTS[engine] if arguments.aborts is None else arguments.aborts
        wanted = [case for case in CASES if any(part in case for part in arguments.cases.split(","))]
        rows += asyncio.run(measure(engine, wanted, arguments.runs, aborts))
    name = "faults" if arguments.engine == "both" else f"faults-{arguments.engine}"
    report(name, rows, checks(rows, 50), env)


if __name__ == "__main__":
    main()
