"""The compiled requirement sets: pinned by hash, without an index address, true to pyproject.toml and to each other."""

import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
BASE = PROJECT["project"]["dependencies"]

SETS = {
    "bootstrap": GROUPS["bootstrap"],
    "build": GROUPS["build"],
    "runtime": BASE + GROUPS["runtime"],
    "dev": BASE + EXTRAS["operator"] + EXTRAS["trainer"] + EXTRAS["serving-cpu"] + EXTRAS["cli"] + GROUPS["dev"],
    "operator": BASE + EXTRAS["operator"],
    "trainer": BASE + EXTRAS["trainer"],
    "serving": BASE + EXTRAS["serving"],
    "serving-cpu": BASE + EXTRAS["serving-cpu"],
}

# vLLM's two builds pin different versions of it.
MAY_DIFFER = {"apache-tvm-ffi"}


def entries(name: str) -> list[str]:
    """Split a compiled set into its entries: one requirement with its options each, comments left out."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    bare = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    return bare.replace("\\\n", " ").splitlines()


def pins(name: str) -> dict[str, str]:
    return dict(re.fullmatch(r"([a-z0-9-]+)==(\S+)", entry.split()[0]).groups() for entry in entries(name))  # type: ignore[union-attr]


def test_every_compiled_set_is_known() -> None:
    assert {path.stem for path in (ROOT / "requirements").glob("*.txt")} == {*SETS, "overrides"}


@pytest.mark.parametrize("name", SETS)
def test_every_entry_is_pinned_by_version_and_hash(name: str) -> None:
    shape = re.compile(r"[a-z0-9-]+==\S+( ; .+?)?(\s+--hash=sha256:[0-9a-f]{64})+")
    assert entries(name)
    assert [entry for entry in entries(name) if not shape.fullmatch(entry.strip())] == []


@pytest.mark.parametrize("name", SETS)
def test_a_set_holds_what_pyproject_asks_for(name: str) -> None:
    pinned = pins(name)
    for requirement in map(Requirement, SETS[name]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} is not in requirements/{name}.txt: run `make requirements`"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} but {version}: `make requirements`"
        )


def test_the_images_get_the_versions_that_the_tests_run_with() -> None:
    versions: dict[str, set[str]] = defaultdict(set)
    for name in SETS:
        for package, version in pins(name).items():
            versions[package].add(version)
    assert {package for package, found in versions.items() if len(found) > 1} <= MAY_DIFFER


@pytest.mark.parametrize("name", ["trainer", "serving", "serving-cpu"])
def test_what_trainer_and_serving_share_stays_as_it_is_on_top(name: str) -> None:
    """A package of the shared layer in another version would lie in the image twice."""
    assert pins("runtime").items() <= pins(name).items()
