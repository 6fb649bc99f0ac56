"""The whole chain of training stages, much shortened: it ends Complete, and what was measured is all there.

The bounds of the example hold for its full length only; here a tiny model learns nothing worth a bound.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.local.acceptance.folder import MODEL, PATIENCE_SECONDS, Folder

EXAMPLE = Path(__file__).parents[3] / "examples" / "rlhf"
PROMPTS = 8
STEPS = 2
JOB: dict[str, Any] = yaml.safe_load((EXAMPLE / "job.yaml").read_text(encoding="utf-8"))
STAGES = [stage["name"] for stage in JOB["spec"]["stages"]]


def shortened(job: dict[str, Any]) -> dict[str, Any]:
    """The same stages, data and settings on a tiny model, for a few steps."""
    spec = job["spec"]
    spec["model"] = {"config": MODEL, "tokenizer": {"train": {"vocabularySize": 512}}}
    for stage in spec["stages"]:
        stage["train"] |= {"maxSteps": STEPS, "globalBatchSize": 4, "microBatchSize": 4, "learningRate": 1e-2}
        stage["resources"] = {"limits": {"cpu": 1}}
    return job


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, str]:
    """The example, run to its end, and what it printed."""
    folder = Folder(tmp_path_factory.mktemp("rlhf") / "work")
    job = folder.write(shortened(JOB))
    more = ["--job", str(job), "--questions", "40", "--prompts", str(PROMPTS)]
    command = [sys.executable, str(EXAMPLE / "run.py"), str(folder.root), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def report(run: tuple[Folder, str]) -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads((run[0].root / "report.json").read_bytes())
    return found


def test_the_job_is_complete(run: tuple[Folder, str]) -> None:
    status = run[0].get("ftj")["rlhf"]["status"]
    assert [each["status"] for each in status["conditions"] if each["type"] == "Complete"] == ["True"]
    assert {stage["name"]: stage["phase"] for stage in status["stages"]} == dict.fromkeys(STAGES, "Succeeded")


def test_every_policy_is_measured(report: dict[str, Any]) -> None:
    assert list(report["policies"]) == [name for name in ("sft", "ppo", "ppo-free", "dpo") if name in STAGES]
    for name, figures in report["policies"].items():
        assert math.isfinite(figures["gold"]["value"])
        assert figures["gold"]["error"] > 0
        assert 0 <= figures["ended"] <= 1
        assert 0 < figures["answer_loss"] < 2 * math.log(512)
        assert (figures["kl"]["value"] > 0) == (name != "sft"), "the others have moved"


def test_every_bound_has_its_figure_and_the_exit_code_tells(run: tuple[Folder, str], report: dict[str, Any]) -> None:
    _, printed = run
    figures = report["figures"]
    assert sum(figure["met"] is not None for figure in figures) == 6 * ("ppo" in STAGES) + ("reward" in STAGES) + 1
    for figure in figures:
        assert math.isfinite(figure["estimate"]["value"]), figure
        assert figure["name"].strip()[:30] in printed
    assert (run[0].root / "report.png").read_bytes().startswith(b"\x89PNG")
