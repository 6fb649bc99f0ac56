"""Some of the crash sweep; `make test-faults` has all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.crashes import Crash, every_crash, sweep, undisturbed
from tests.controlplane.faults.lives import world
from tests.controlplane.operator import grant

EVERY = 4
"""Of the sweep's cases, so manieth."""


@pytest.fixture(scope="module", autouse=True)
def rights(control_plane: ControlPlane) -> None:
    install_crds(control_plane)
    grant(control_plane)


async def test_a_crash_at_any_write_leaves_what_an_undisturbed_life_leaves(
    control_plane: ControlPlane, tmp_path: Path, counted: Callable[[str, int], None]
) -> None:
    async with world(control_plane, tmp_path) as made:
        measure = await undisturbed(made)
        points: list[Crash] = every_crash(measure.writes)[::EVERY]
        results = await sweep(made, measure, points)
    missed = [str(point) for point, where in results if not where]
    assert len(missed) <= 1, f"not reached: {missed}"
    counted(f"crashes in a life of {measure.writes} writes", len(results))
