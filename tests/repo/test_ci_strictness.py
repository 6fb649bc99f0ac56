"""A skip is not a pass: with CI=true the root conftest turns skips and expected failures into failures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

TESTS = {
    "mark": "@pytest.mark.skip(reason='because')\ndef test_it(): pass",
    "call": "def test_it(): pytest.skip('because')",
    "fixture": "@pytest.fixture\ndef part(): pytest.skip('because')\ndef test_it(part): pass",
    "module": "pytest.skip('because', allow_module_level=True)",
    "xfail": "@pytest.mark.xfail(reason='because')\ndef test_it(): assert False",
    "xpass": "@pytest.mark.xfail(reason='because', strict=False)\ndef test_it(): pass",
}


def run(folder: Path, body: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_sample.py").write_text(f"import pytest\n\n{body}\n\n\ndef test_passes():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = {**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("way", TESTS)
def test_what_did_not_run_fails_in_ci_and_only_there(tmp_path: Path, way: str) -> None:
    strict, lenient = run(tmp_path, TESTS[way], "true"), run(tmp_path, TESTS[way], "")
    assert strict.returncode not in (0, 5), strict.stdout
    assert "CI=true does not accept" in strict.stdout
    assert lenient.returncode in (0, 5), lenient.stdout  # 5: nothing was left to run


def test_a_pass_stays_a_pass_in_ci(tmp_path: Path) -> None:
    result = run(tmp_path, "", "true")
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
