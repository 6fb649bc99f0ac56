"""The Dockerfiles: pinned bases, a stage that two of them share, no root; `tests/cluster` builds and runs them."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {folder: (ROOT / folder / "Dockerfile").read_text() for folder in ("operator", "trainer-image", "serving")}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def stages(text: str) -> dict[str, str]:
    """Stage name -> its instructions without comments; the last stage is ''."""
    bare = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    found = {}
    for part in re.split(r"^(?=FROM )", bare, flags=re.MULTILINE)[1:]:
        head, body = part.split("\n", 1)
        name = head.partition(" AS ")[2]
        found[name] = f"{head}\n{body.strip()}"
    return found


def test_all_have_the_same_base_by_digest() -> None:
    bases = {re.search(r"^ARG BASE=(\S+)$", text, flags=re.MULTILINE)[1] for text in FILES.values()}  # type: ignore[index]
    assert len(bases) == 1
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", bases.pop())


@pytest.mark.parametrize("folder", FILES)
def test_every_stage_starts_from_the_base_or_from_another_stage(folder: str) -> None:
    found = stages(FILES[folder])
    sources = {text.split()[1] for text in found.values()}
    assert sources <= {"${BASE}", *found}


def test_trainer_and_serving_share_their_runtime_stage() -> None:
    """Only equal instructions in equal order give equal layers."""
    trainer, serving = stages(FILES["trainer-image"]), stages(FILES["serving"])
    assert trainer["runtime"] == serving["runtime"]
    assert "runtime.txt" in trainer["runtime"]
    assert trainer[""].startswith("FROM runtime\n")
    assert serving[""].startswith("FROM runtime\n")


@pytest.mark.parametrize("folder", FILES)
def test_the_last_stage_runs_as_our_user(folder: str) -> None:
    last = stages(FILES[folder])[""]
    assert re.search(r"^USER 65532:65532$", last, flags=re.MULTILINE)
    module = {"operator": "trimtab_operator", "trainer-image": "trimtab_trainer", "serving": "trimtab_serving"}[folder]
    assert f'ENTRYPOINT ["python", "-m", "{module}"]' in last
    assert (ROOT / folder / module / "__main__.py").exists()


@pytest.mark.parametrize("folder", FILES)
def test_packages_come_from_compiled_sets_that_are_there(folder: str) -> None:
    named = set(re.findall(r"\b([a-z-]+\.txt)\b", FILES[folder]))
    assert named
    assert [name for name in named if not (ROOT / "requirements" / name).exists()] == []


@pytest.mark.parametrize("folder", FILES)
def test_the_label_tells_the_version(folder: str) -> None:
    assert f"\nARG VERSION={VERSION}\n" in FILES[folder]


def test_nothing_but_the_sources_reaches_a_build() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements",
        "operator",
        "trainer-image",
        "serving",
        "cli",
    }
