"""Some of the field sweep; `make test-faults` has all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.admission import check, sweep_fields
from tests.controlplane.faults.lives import world

EVERY = 6
"""Of the fields, so manieth."""


async def test_fields_do_something_or_are_refused(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, counted: Callable[[str, int], None]
) -> None:
    install_crds(control_plane)
    async with world(control_plane, tmp_path) as made:
        found = await sweep_fields(made, namespace, EVERY)
    for findings in found.values():
        check(findings)
    counted("specs tried", sum(findings.cases for findings in found.values()))
