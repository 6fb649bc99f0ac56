"""The control plane that the tests of this tier share: one for each test process."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.jobs import Space, make_namespace
from tests.controlplane.operator import Operator
from tests.kubernetes.build import binaries

LOG_TAIL_LINES = 40


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the end of the operator's log."""
    report = yield
    operator = getattr(item, "funcargs", {}).get("operator")
    if report.failed and isinstance(operator, Operator):
        tail = operator.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        report.sections.append((f"the end of {operator.log}", "\n".join(tail)))
    return report


@pytest.fixture(scope="session")
def kubernetes_binaries(request: pytest.FixtureRequest) -> Path:
    """Found or built; a build of several minutes says on the terminal how far it is."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", flush=True)

    return binaries(say)


@pytest.fixture(scope="session")
def control_plane(kubernetes_binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with KWOK, its Stages below `stages/`, and 3 Ready nodes of 8 GPUs each."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane"), kubernetes_binaries) as running:
        running.start_kwok()
        running.add_nodes(3)
        yield running


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace for one test; what is in it is deleted afterwards."""
    name = make_namespace(control_plane)
    yield name
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def space(control_plane: ControlPlane, namespace: str) -> Iterator[Space]:
    """The namespace of one test, where the quickstart's claim is bound."""
    space = Space(control_plane, namespace)
    space.provide_claim()
    yield space
    control_plane.kubectl("delete", "persistentvolume", f"{namespace}-quickstart", "--wait=false")


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane) -> Iterator[Operator]:
    """The operator, with the CRDs installed, for the tests of one module."""
    install_crds(control_plane)
    with Operator(control_plane) as running:
        yield running
