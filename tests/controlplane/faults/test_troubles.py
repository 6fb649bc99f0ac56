"""Some lives with faults, and some stale views; `make test-faults` has all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.crashes import Crash, undisturbed
from tests.controlplane.faults.lives import world
from tests.controlplane.faults.troubles import TROUBLES, late, outage, side_by_side, stale, troubled
from tests.controlplane.operator import grant

EVERY = 10
"""Of the views of a life, so manieth."""
QUICK = (
    "every second write is a conflict",
    "every third request is one too many",
    "every second connection breaks after a write",
    "the first watches freeze",
)


@pytest.fixture(scope="module", autouse=True)
def rights(control_plane: ControlPlane) -> None:
    install_crds(control_plane)
    grant(control_plane)


async def test_faults_and_stale_views_leave_no_trace(
    control_plane: ControlPlane, tmp_path: Path, counted: Callable[[str, int], None]
) -> None:
    assert TROUBLES.keys() >= set(QUICK)
    async with world(control_plane, tmp_path) as made:
        measure = await undisturbed(made)
        lives = [
            *(partial(troubled, made, measure, name) for name in QUICK),
            partial(outage, made, measure, measure.writes // 2),
            *(partial(stale, made, measure, Crash(measure.writes // 2, True), behind) for behind in (2, 8)),
        ]
        done = await side_by_side(lives)
        views = await late(made, measure, 0, EVERY)
    counted("lives with faults", len(done))
    counted("restarts on a stale view of an ended life", views)
