"""Make the data, run the job on this machine, and measure what its stages have done.

Usage: `python examples/rlhf/run.py [WORKDIR] [--job FILE] [--questions N] [--prompts N]`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from make_data import make

HERE = Path(__file__).parent


def main() -> int:
    """The exit code is that of `trimtab local run`, or 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description="Run the rlhf example.")
    parser.add_argument("workdir", type=Path, nargs="?", default=Path(".trimtab/rlhf"))
    parser.add_argument("--job", type=Path, default=HERE / "job.yaml")
    parser.add_argument("--questions", type=int, help="make data of so many questions only")
    parser.add_argument("--prompts", type=int, default=200, help="held-out questions that are answered")
    given = parser.parse_args()
    started = time.monotonic()
    data = given.workdir / "volumes/default/rlhf/data"
    if not data.exists():
        make(data, most=given.questions)
    run = [sys.executable, "-m", "trimtab", "local", "run", str(given.job), "--workdir", str(given.workdir)]
    code = subprocess.run(run, check=False).returncode
    trained = time.monotonic()
    print(f"The job took {trained - started:.0f} s")
    if code:
        return code
    from measure import measure  # loads torch, which the job need not wait for

    good = measure(given.workdir, given.job, given.prompts)
    print(f"Measured in {time.monotonic() - trained:.0f} s: {given.workdir}/report.json, {given.workdir}/report.png")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
