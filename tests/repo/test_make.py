"""The commands of the repository: what the design promises exists, is explained, and fails with a remedy."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, flags=re.MULTILINE))
PROMISED = {"setup", "help", "demo", "test", "check", "generate", "verify", "clean", "images"}
SEPARATE = {"cluster", "faults", "oracles", "rollouts"}
"""Tiers that make a node of the machine, take a quarter of an hour, or install other projects: not for `make test`."""
TIERS = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}


def make(*arguments: str, cwd: Path = ROOT, path: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("make")
    assert program, "make is not installed: apt-get install make"
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment |= {"PATH": path} if path else {}
    return subprocess.run([program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_promised_targets_exist() -> None:
    assert PROMISED | {f"test-{tier}" for tier in TIERS} <= TARGETS


def test_make_alone_explains_every_target() -> None:
    result = make()
    assert result.returncode == 0, result.stderr
    explained = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert set(explained) == TARGETS
    assert all(explained.values())


def test_make_test_runs_every_tier_and_the_linters() -> None:
    dry = make("-n", "test").stdout
    assert {tier for tier in TIERS if f"tests/{tier}" not in dry} == SEPARATE
    assert [tool for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports") if tool not in dry] == []


def test_the_integration_runs_the_same_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_only_targets_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:^\s*(?:\$ )?|`)make ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    assert named
    assert named <= TARGETS


def test_setup_without_the_right_python_names_the_remedy(tmp_path: Path) -> None:
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    programs.mkdir()
    shutil.copytree(ROOT / "requirements", checkout / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    for name in ("bash", "cat", "sha256sum", "cut"):
        (programs / name).symlink_to(shutil.which(name) or pytest.fail(f"{name} is missing"))
    (programs / "python3").write_text("#!/bin/sh\nexit 1\n")
    (programs / "python3").chmod(0o755)

    result = make("setup", cwd=checkout, path=str(programs))

    assert result.returncode != 0
    assert "no Python 3.11 with its venv module on PATH" in result.stderr
    assert "apt-get install python3 python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()
