"""Killed and started again, the operator leaves what it would have left; at rest it writes nothing."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.proxy import Proxy, background
from tests.controlplane.jobs import Object, Space, condition, make_namespace, until
from tests.controlplane.operator import Operator
from tests.controlplane.variants import slowly

POD_MILLISECONDS = 1000
"""How long a pod takes to run, and to end: what the operator writes then follows from no race."""
REST_SECONDS = 20
QUIET_SECONDS = 2
RESYNC_SECONDS = 5
"""So often everything is listed anew, which must lead to no write either."""


@dataclass(frozen=True)
class Point:
    """Where the operator is killed: it waits for the answer to the last of `requests`, which is not carried out."""

    name: str
    requests: tuple[str, ...]
    reached: Callable[[Space], bool]
    """What is then so."""


POINTS = (
    Point(
        "the prepare Job is there, the status does not know its uid",
        ("POST .*/jobs", "PATCH .*/finetunejobs/quickstart/status"),
        lambda space: len(space.names("jobs", job="quickstart")) == 1 and "jobUID" not in space.status()["prepare"],
    ),
    Point(
        "the status has attempt 1 of a stage, its Job is not there",
        ("POST .*/jobs", "POST .*/jobs"),
        lambda space: not space.names("jobs", stage="pretrain") and first_attempt(space) == (1, False),
    ),
    Point(
        "the endpoint's Deployment is there, its pods are not ready",
        ("PATCH .*/deployments/quickstart-[0-9a-f]{12}-.*", "PATCH .*/modelendpoints/quickstart/status"),
        lambda space: (
            len(space.names("deployments", endpoint="quickstart")) == 1
            and condition(space.status("mep/quickstart"), "Ready")[0] == "False"
        ),
    ),
)


def first_attempt(space: Space) -> tuple[int, bool]:
    """The recorded attempt of the first stage, and whether its Job's uid is recorded."""
    stage = space.status()["stages"][0]
    return stage["attempt"], "jobUID" in stage


VOLATILE = {"lastTransitionTime", "startTime", "completionTime", "activeSince", "activeSeconds", "message"}
PROGRESS = {"progress", "progressText", "remainingText", "replicas", "ready", "url"}
UNIQUE = re.compile(r"\b([0-9a-f]{64}|[0-9a-f]{12}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8})\b")
"""Digests, revisions, uids and the part of a name that follows from a uid."""


class World:
    """The operator behind a proxy, on nodes whose pods take their time."""

    def __init__(self, control_plane: ControlPlane, operator: Operator, between: Proxy) -> None:
        self.control_plane = control_plane
        self.operator = operator
        self._between = between
        self.spaces: list[Space] = []

    def run(self, point: Point | None = None) -> Space:
        """The quickstart from submission to rest; the operator is killed at the point and started again."""
        space = Space(self.control_plane, make_namespace(self.control_plane))
        self.spaces.append(space)
        space.provide_claim()
        self._between.hold(*(point.requests if point else ()))
        space.apply(space.job(), space.base_endpoint())
        if point:
            assert self._between.held.wait(120), "the operator does not come to this point"
            with self.control_plane.frozen_nodes():
                self.operator.kill()
                self._between.release()
                assert point.reached(space)
                self.operator.start()
                self.settle()
        for target in ("ftj/quickstart", "mep/quickstart", "mep/quickstart-base"):
            space.wait("Complete" if target.startswith("ftj") else "Ready", target)
        self.settle()
        return space

    def settle(self) -> None:
        """Waits until the operator has written nothing for a while."""
        count, since = -1, 0.0

        def quiet() -> bool:
            nonlocal count, since
            now = len(self.writes())
            if now != count:
                count, since = now, time.monotonic()
            return time.monotonic() - since > QUIET_SECONDS

        until(quiet, "the operator comes to rest")

    def writes(self) -> list[Object]:
        """All that the operator wrote in our namespaces."""
        namespaces = {space.namespace for space in self.spaces}
        return [
            event
            for event in self.control_plane.audit()
            if event["user"]["username"] == "operator"
            and event["objectRef"].get("namespace") in namespaces
            and event["verb"] not in ("get", "list", "watch")
        ]

    def created(self, space: Space) -> Counter[str]:
        """Kind and name of each child that the operator made, save Events, with how often."""
        return Counter(
            UNIQUE.sub("#", f"{event['objectRef']['resource']}/{event['objectRef']['name']}")
            for event in self.writes()
            if event["objectRef"]["namespace"] == space.namespace
            and event["responseStatus"]["code"] == 201
            and event["objectRef"]["resource"] != "events"
        )

    def transitions(self, space: Space) -> dict[str, list[Any]]:
        """The distinct statuses of each owner, one after the other, without progress."""
        found: dict[str, list[Any]] = {}
        for event in self.writes():
            ref = event["objectRef"]
            if ref["namespace"] == space.namespace and ref.get("subresource") == "status":
                assert event["responseStatus"]["code"] in (200, 409), event
                if event["responseStatus"]["code"] == 200:
                    status = normalised(event["requestObject"]["status"])
                    known = found.setdefault(f"{ref['resource']}/{ref['name']}", [])
                    if not known or known[-1] != status:
                        known.append(status)
        return found


def normalised(value: Any) -> Any:
    """A status without time, progress and what is unique to one run."""
    if isinstance(value, dict):
        return {key: normalised(each) for key, each in value.items() if key not in VOLATILE | PROGRESS}
    if isinstance(value, list):
        return [normalised(each) for each in value]
    return UNIQUE.sub("#", value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def world(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("restarts")
    install_crds(control_plane)
    control_plane.start_kwok(*slowly(directory, POD_MILLISECONDS))
    through = directory / "kubeconfig"
    with (
        background(control_plane.kubeconfig("operator"), through) as between,
        Operator(control_plane, kubeconfig=through, resync_seconds=RESYNC_SECONDS) as operator,
    ):
        made = World(control_plane, operator, between)
        yield made
    for space in made.spaces:
        control_plane.kubectl("delete", "namespace", space.namespace, "--wait=false")
    control_plane.start_kwok()


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Space:
    return world.run()


def test_nothing_is_written_at_rest_and_at_a_restart(world: World, undisturbed: Space) -> None:
    before = world.writes()
    assert before
    time.sleep(REST_SECONDS)
    world.operator.kill()
    world.operator.start()
    time.sleep(REST_SECONDS)
    assert [described(event) for event in world.writes()[len(before) :]] == []


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_killed_operator_leaves_the_same(world: World, undisturbed: Space, point: Point) -> None:
    space = world.run(point)
    created = world.created(undisturbed)
    assert set(created.values()) == {1}
    assert world.created(space) == created
    assert world.transitions(space) == world.transitions(undisturbed)


def described(event: Object) -> str:
    ref = event["objectRef"]
    return (
        f"{event['verb']} {ref['resource']}/{ref.get('name')} {ref.get('subresource', '')} {event.get('requestObject')}"
    )
