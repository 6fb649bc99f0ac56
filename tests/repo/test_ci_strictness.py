"""A skip is not a pass: with CI=true the root conftest turns skips and expected failures into failures."""

import os
import re
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"

NOT_RUN = {
    "mark": "@pytest.mark.skip(reason='because')\ndef test_it(): pass",
    "call": "def test_it(): pytest.skip('because')",
    "fixture": "@pytest.fixture\ndef part(): pytest.skip('because')\ndef test_it(part): pass",
    "module": "pytest.skip('because', allow_module_level=True)",
    "xfail": "@pytest.mark.xfail(reason='because')\ndef test_it(): assert False",
    "xpass": "@pytest.mark.xfail(reason='because', strict=False)\ndef test_it(): pass",
}
RUN = {"passes": "def test_it(): pass"}


def run(folder: Path, ci: str) -> tuple[int, dict[str, str], str]:
    """Run each sample as a file of its own; return the exit code, the verdict by sample, and the output."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name, body in (NOT_RUN | RUN).items():
        (folder / f"test_{name}.py").write_text(f"import pytest\n\n{body}\n")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = {**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    verdicts = re.findall(r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) test_(\w+)\.py", result.stdout, flags=re.MULTILINE)
    return result.returncode, {name: verdict for verdict, name in verdicts}, result.stdout


def test_what_did_not_run_fails_in_ci(tmp_path: Path) -> None:
    code, verdicts, output = run(tmp_path, "true")
    assert code == 1, output
    assert {name for name, verdict in verdicts.items() if verdict in ("FAILED", "ERROR")} == set(NOT_RUN), output
    assert verdicts["passes"] == "PASSED"
    assert output.count("which CI=true does not accept") >= len(NOT_RUN)


def test_on_a_desk_it_may_be_skipped(tmp_path: Path) -> None:
    code, verdicts, output = run(tmp_path, "")
    assert code == 0, output
    assert not {"FAILED", "ERROR"} & set(verdicts.values()), output
    assert "4 skipped" in output
