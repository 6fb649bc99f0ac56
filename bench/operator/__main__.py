"""`python -m bench.operator`: measures the operator with many jobs against a bare loop, and prints a table."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from bench.operator.run import BenchError, Run, measure, measure_children, measure_floor, record_one
from bench.operator.table import machine, table, write
from tests.kubernetes.build import binaries

HERE = Path(__file__).resolve().parent
POLICY = HERE / "audit-policy.yaml"


async def bench(jobs: list[int], rest_seconds: float, outage_seconds: float) -> list[Run]:
    """Each size: the floor, then the operator; the outage with the last size only."""
    found = binaries()
    recording = await record_one(found)
    runs = []
    for count in jobs:
        print(f"{count} jobs: the floor", flush=True)
        floor = await measure_floor(found, POLICY, recording, count)
        print(f"{count} jobs: the operator", flush=True)
        run = await measure(found, POLICY, count, rest_seconds, outage_seconds if count == jobs[-1] else 0)
        run.floor = floor
        runs.append(run)
        print(table([run]), flush=True)
    return runs


async def bench_children(jobs: list[int]) -> None:
    """Each size: the floor's first writes, then the operator's."""
    found = binaries()
    recording = (await record_one(found)).until_children()
    for count in jobs:
        floor = (await measure_floor(found, POLICY, recording, count)).children
        children = (await measure_children(found, POLICY, count)).children_seconds
        ratio = f"{children / floor:.2f} times the bare loop's {floor:.1f} s"
        print(f"{count} jobs: children after {children:.1f} s, {ratio}", flush=True)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="bench.operator", description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rest-seconds", type=float, default=60, help="how long the operator is watched at rest")
    parser.add_argument("--outage-seconds", type=float, default=60, help="of 503, with the last size; 0 leaves it out")
    parser.add_argument("--children", action="store_true", help="end when the children exist; no table")
    parser.add_argument("--write", type=Path, help="file whose marked part becomes the table")
    arguments = parser.parse_args()
    try:
        if arguments.children:
            asyncio.run(bench_children(arguments.jobs))
            return
        runs = asyncio.run(bench(arguments.jobs, arguments.rest_seconds, arguments.outage_seconds))
    except BenchError as error:
        sys.exit(f"bench-operator: {error}")
    text = f"{table(runs)}\n\n{machine()}"
    print(text)
    if arguments.write:
        write(arguments.write, text)


if __name__ == "__main__":
    main()
