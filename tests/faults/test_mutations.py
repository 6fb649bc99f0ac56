"""Deliberate bugs in the product must make its tests fail; which ones did is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
FINDERS = ("tests/unit/faults", "tests/controlplane/faults/test_crashes.py")
MACHINE = "400x40"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", MUTATIONS)
def test_a_deliberate_bug_is_found(bug: str, record_property: Callable[[str, object], None]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.faults.mutations", "-q", "-rf", *FINDERS],
        cwd=ROOT,
        env={**os.environ, "TRIMTAB_MUTATION": bug, "TRIMTAB_MACHINE": MACHINE},
        capture_output=True,
        text=True,
        check=False,
    )
    red = re.findall(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    assert result.returncode == 1, f"{bug}: found by nothing\n{result.stdout[-4000:]}"
    assert red
    record_property("cases", f"{bug}: found by {', '.join(red)}")
