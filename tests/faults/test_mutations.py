"""Deliberate bugs in the product must make its tests fail; which ones did is printed."""

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
    "state machine": ("tests/unit/faults/test_machine.py",),
    "exploration": ("tests/unit/faults/test_plans.py",),
    "views": ("tests/unit/faults/test_views.py",),
    "crash sweep": ("tests/controlplane/faults/test_crashes.py",),
    "field sweep": ("tests/controlplane/faults/test_fields.py",),
}
MACHINE = "400x40"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", MUTATIONS)
def test_a_deliberate_bug_is_found(bug: str, record_property: Callable[[str, object], None]) -> None:
    found = []
    for finder, paths in FINDERS.items():
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "tests.faults.mutations", "-q", *paths],
            cwd=ROOT,
            env={**os.environ, "TRIMTAB_MUTATION": bug, "TRIMTAB_MACHINE": MACHINE},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode in (0, 1), f"{finder} did not run\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
        if result.returncode == 1:
            found.append(finder)
    record_property("cases", f"{bug}: found by {', '.join(found) or 'nothing'}")
    assert {"state machine", "crash sweep", "field sweep"} & {*found}, f"{bug}: found by {found}"
