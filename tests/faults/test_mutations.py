"""Deliberate bugs in the product must make its sweeps fail; which one did first is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
FINDERS = {
    "state machine": "tests/unit/faults/test_machine.py",
    "sweep of stale views": "tests/unit/faults/test_views.py",
    "crash sweep": "tests/controlplane/faults/test_crashes.py",
    "field sweep": "tests/controlplane/faults/test_fields.py",
}
"""The quickest first."""
MACHINE = "800x40"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", MUTATIONS)
def test_a_deliberate_bug_is_found(bug: str, record_property: Callable[[str, object], None]) -> None:
    finder = next((finder for finder, path in FINDERS.items() if fails(path, bug)), None)
    record_property("cases", f"{bug}: found by the {finder}")
    assert finder, f"{bug}: found by nothing"


def fails(path: str, bug: str) -> bool:
    """Whether these tests fail with the bug in the product."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.faults.mutations", "-q", path],
        cwd=ROOT,
        env={**os.environ, "TRIMTAB_MUTATION": bug, "TRIMTAB_MACHINE": MACHINE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode in (0, 1), f"{path} did not run\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
    return result.returncode == 1
