"""All of what `tests/controlplane/faults` has parts of. Minutes: `make test-faults`, not `make test`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.admission import check, check_tables, sweep_fields
from tests.controlplane.faults.crashes import Crash, every_crash, sweep, undisturbed
from tests.controlplane.faults.lives import World, world
from tests.controlplane.faults.troubles import TROUBLES, late, outage, side_by_side, stale, troubled
from tests.controlplane.operator import grant

ROOT = Path(__file__).resolve().parents[2]
MACHINE, STATES = "1000x50", 4000
"""Examples and steps of the state machine; states of each spec that the exploration visits."""
VIEWERS = 4
"""Lives that share out the views that are shown after their end."""

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module", autouse=True)
def rights(control_plane: ControlPlane) -> None:
    install_crds(control_plane)
    grant(control_plane)


@pytest.fixture
async def made(control_plane: ControlPlane, tmp_path: Path) -> AsyncIterator[World]:
    async with world(control_plane, tmp_path) as running:
        yield running


async def test_a_crash_before_and_after_every_write(made: World, counted: Callable[[str, int], None]) -> None:
    measure = await undisturbed(made)
    results = await sweep(made, measure, every_crash(measure.writes))
    missed = [str(point) for point, where in results if not where]
    assert len(missed) <= 2, f"not reached: {missed}"
    counted(f"crashes in a life of {measure.writes} writes", len(results))


async def test_every_trouble_outage_and_stale_restart(made: World, counted: Callable[[str, int], None]) -> None:
    measure = await undisturbed(made)
    lives = [
        *(partial(troubled, made, measure, name) for name in TROUBLES),
        *(partial(outage, made, measure, number) for number in range(1, measure.writes, 4)),
        *(
            partial(stale, made, measure, Crash(number, True), behind)
            for number in range(2, measure.writes, 3)
            for behind in (1, 4, 100)
        ),
    ]
    counted("lives with faults", len(await side_by_side(lives)))


async def test_a_stale_view_of_an_ended_life_changes_nothing(made: World, counted: Callable[[str, int], None]) -> None:
    measure = await undisturbed(made)
    restarts = await side_by_side([partial(late, made, measure, first, VIEWERS) for first in range(VIEWERS)])
    counted(f"restarts on the {measure.writes} views of a life", sum(restarts))


async def test_every_field_does_something(made: World, namespace: str, counted: Callable[[str, int], None]) -> None:
    found = await sweep_fields(made, namespace, 1)
    for findings in found.values():
        check(findings)
    check_tables(found)
    counted("specs tried", sum(findings.cases for findings in found.values()))


def test_state_machine_and_exploration_find_nothing(counted: Callable[[str, int], None]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/unit/faults"],
        cwd=ROOT,
        env={**os.environ, "TRIMTAB_MACHINE": MACHINE, "TRIMTAB_STATES": str(STATES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    counted("walks of the state machine", int(MACHINE.partition("x")[0]))
    for states, what in re.findall(r"(\d+) (states of .*)", result.stdout):
        counted(what, int(states))
