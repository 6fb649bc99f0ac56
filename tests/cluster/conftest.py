"""One node for all tests of this tier, made of this machine, with the images built from the repository."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from tests.cluster import host, images
from tests.cluster.clock import Clock
from tests.cluster.cluster import TEAM, Cluster, give
from tests.cluster.node import Node, control_plane
from tests.kubernetes.build import binaries, chart_tools, node_tools

ARCHIVES_VARIABLE = "TRIMTAB_TEST_IMAGES"
"""A folder for the images' archives: taken from there, or built and kept there. For work on the tests themselves."""

CLOCKS: list[Clock] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what the cluster says about itself."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        for title, words in (
            ("pods", ("get", "pods", "--all-namespaces", "--output=wide")),
            ("jobs and endpoints", ("get", "ftj,mep,jobs", "--all-namespaces", "--output=wide")),
            ("events", ("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp")),
            ("operators", ("logs", "--namespace=trimtab-system", "-lapp.kubernetes.io/name=trimtab", "--tail=30")),
            ("training", ("logs", "--namespace=team", "-ltrimtab.dev/job", "--tail=40", "--prefix")),
        ):
            report.sections.append((title, cluster.kubectl(*words, check=False)))
        for log in sorted((cluster.node.root / "logs").glob("*.log")):
            report.sections.append((log.name, "\n".join(log.read_text(errors="replace").splitlines()[-25:])))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the time went."""
    for clock in CLOCKS:
        terminalreporter.section("where the time went")
        for line in clock.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Writes a line to the terminal while tests run."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", end="", flush=True)

    return write


@pytest.fixture(scope="session")
def cluster(say: Callable[[str], None]) -> Iterator[Cluster]:
    """The cluster; when the tests are over nothing of it is left on this machine."""
    clock = Clock(say)
    CLOCKS.append(clock)
    host.check()
    with clock.phase("programs: found or built"):
        programs, tools, helm = binaries(say), node_tools(say), chart_tools(say) / "helm"
    with host.machine() as root:
        archives = provide_images(root, clock)
        with control_plane(root, programs) as plane:
            node = Node(root, plane, programs, tools)
            try:
                with clock.phase("images: unpack for containerd"):
                    node.start_containerd()
                    for archive in sorted(archives.glob("*.tar")):
                        images.load(node, archive)
                    if archives.is_relative_to(root):
                        shutil.rmtree(archives)
                with clock.phase("node: start"):
                    node.start()
                yield Cluster(plane, node, helm, clock)
            finally:
                node.stop()


@pytest.fixture
def team(cluster: Cluster) -> Iterator[Path]:
    """A namespace under the restricted profile, with data on a volume that its pods share; the volume's folder."""
    cluster.make_namespace(TEAM)
    folder = cluster.provide_volume(TEAM, storage_class=TEAM)
    write_sums(folder / "data")
    give(folder)
    yield folder
    with cluster.clock.phase("clear"):
        cluster.clear()


def write_sums(folder: Path) -> None:
    """All sums of two digits, as conversations."""
    folder.mkdir()
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
            ]
        }
        for a in range(10)
        for b in range(10)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def provide_images(root: Path, clock: Clock) -> Path:
    """The folder of the images' archives, which are built unless they are there."""
    archives = Path(os.environ.get(ARCHIVES_VARIABLE, root / "archives"))
    archives.mkdir(parents=True, exist_ok=True)
    if any(archives.iterdir()):
        return archives
    builder = images.Builder(root / "build")
    with clock.phase("images: base"):
        builder.make_base()
    for image in images.IMAGES.values():
        with clock.phase(f"images: build {image.folder}"):
            builder.build(image)
    with clock.phase("images: write archives"):
        for name in (images.PAUSE_IMAGE, *(image.name for image in images.IMAGES.values())):
            builder.archive(name, archives)
        builder.clear()
    return archives
