"""One wheel holds the four packages at its top level and nothing else, and its commands point into it."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"trimtab", "trimtab_operator", "trimtab_serving", "trimtab_trainer"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def metadata_folder(wheel: zipfile.ZipFile) -> str:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    return folder


def test_the_top_level_is_the_four_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == PACKAGES | {metadata_folder(wheel)}


def test_every_committed_module_is_in_it(wheel: zipfile.ZipFile) -> None:
    sources = subprocess.run(
        [
            "git",
            "ls-files",
            "operator/trimtab_operator",
            "trainer-image/trimtab_trainer",
            "serving/trimtab_serving",
            "cli/trimtab",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    present = [name.split("/", 1)[1] for name in sources if (ROOT / name).is_file()]
    assert set(present) <= set(wheel.namelist())


def test_the_image_extras_and_the_licence_are_declared(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(wheel.read(f"{metadata_folder(wheel)}/METADATA").decode())
    assert set(metadata.get_all("Provides-Extra", [])) >= {"operator", "trainer", "serving", "serving-cpu", "cli"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{metadata_folder(wheel)}/licenses/LICENSE" in wheel.namelist()
