"""The real process behind the proxy: killed at writes, with watches that break, and with its rights taken away."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.proxy import Proxy, background
from tests.controlplane.faults.rules import WRITE, DropAfter, DropBefore, Expire, Freeze, Rule, Truncate
from tests.controlplane.jobs import Space, make_namespace, until
from tests.controlplane.operator import Operator, grant

KILLS = 4
LIVES = 2
"""Jobs side by side."""


@dataclass
class World:
    """An operator, the proxy before it, and the namespaces of the test."""

    control_plane: ControlPlane
    operator: Operator
    between: Proxy
    spaces: list[Space]

    def submit(self) -> list[Space]:
        """So many quickstarts at once, each in its namespace."""
        made = [Space(self.control_plane, make_namespace(self.control_plane)) for _ in range(LIVES)]
        self.spaces += made
        for space in made:
            space.provide_claim()
            space.apply(space.job(), space.base_endpoint())
        return made

    def completed(self, spaces: list[Space]) -> None:
        """Waits until all are, and checks that no attempt was made twice."""
        for space in spaces:
            space.wait("Complete")
            for name in ("quickstart", "quickstart-base"):
                space.wait("Ready", f"mep/{name}")
            jobs = Counter(
                write.answer["metadata"]["name"]
                for write in self.between.written
                if write.method == "POST" and write.code == 201 and write.path.endswith(f"{space.namespace}/jobs")
            )
            assert len(jobs) == 3, jobs
            assert set(jobs.values()) == {1}, jobs
            assert {job["metadata"]["labels"]["trimtab.dev/attempt"] for job in space.items("jobs")} == {"1"}


@pytest.fixture
def world(control_plane: ControlPlane, tmp_path: Path) -> Iterator[World]:
    install_crds(control_plane)
    through = tmp_path / "kubeconfig"
    with (
        background(control_plane.kubeconfig("operator"), through) as between,
        Operator(control_plane, kubeconfig=through, resync_seconds=5, leader_election=False) as operator,
    ):
        made = World(control_plane, operator, between, [])
        yield made
    for space in made.spaces:
        control_plane.kubectl("delete", "namespace", space.namespace, "--wait=false")


@pytest.mark.parametrize("fault", [DropBefore(), DropAfter()], ids=["before", "after"])
def test_killed_at_writes_it_goes_on(
    world: World, fault: DropBefore | DropAfter, counted: Callable[[str, int], None]
) -> None:
    spaces = world.submit()
    for number in range(KILLS):
        rule = Rule(
            fault, WRITE, f"/({'|'.join(space.namespace for space in spaces)})/(?!events)", skip=2 + number, times=1
        )
        world.between.add(rule)
        until(lambda rule=rule: rule.hits, f"write {3 + number} after a start")
        world.operator.kill()
        world.operator.start()
    world.completed(spaces)
    counted("kills of the process", KILLS)


def test_broken_watches_lose_nothing(world: World, counted: Callable[[str, int], None]) -> None:
    rules = [
        Rule(Truncate(1), watches=True, path="/(jobs|pods)", times=4),
        Rule(Expire(1), watches=True, path="/(finetunejobs|deployments|services)", times=6),
        Rule(Freeze(), watches=True, path="/(jobs|pods|modelendpoints)", times=3),
    ]
    world.between.add(*rules)
    world.operator.kill()
    world.operator.start()
    world.completed(world.submit())
    assert all(rule.hits for rule in rules), rules
    assert world.operator.is_running()
    counted("watches broken", sum(rule.hits for rule in rules))


def test_without_rights_it_waits(world: World) -> None:
    spaces = world.submit()
    until(lambda: any(space.names("jobs") for space in spaces), "a Job is there")
    world.control_plane.kubectl("delete", "clusterrolebinding", "trimtab-operator")
    time.sleep(8)
    assert world.operator.is_running()
    grant(world.control_plane)
    world.completed(spaces)
