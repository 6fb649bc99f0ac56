"""Preference optimisation from the manifest to the model card: what the example's reader is promised."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tests.local.acceptance.folder import PATIENCE_SECONDS, Folder

EXAMPLE = Path(__file__).parents[3] / "examples" / "preferences"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, str]:
    """The example, run to its end, and what it printed."""
    folder = Folder(tmp_path_factory.mktemp("preferences") / "work")
    command = [sys.executable, str(EXAMPLE / "run.py"), str(folder.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_held_out_pairs_turn_the_right_way_round(run: tuple[Folder, str]) -> None:
    folder, printed = run
    table = [line.split() for line in printed.splitlines()[-3:]]
    first, *_, last = [[float(value) for value in line] for line in table]
    assert first == [0, pytest.approx(math.log(2), abs=1e-3), 0.5, 0]
    step, loss, right, margin = last
    assert step == 40
    assert loss < 0.6
    assert right > 0.9
    assert margin > 0.1
    (card,) = folder.claim("preferences").glob("models/preferences-*/dpo/model/README.md")
    text = card.read_text(encoding="utf-8")
    assert f"| validation_accuracy | {right:g} |" in text
    settings = json.loads(text.partition("```json")[2].partition("```")[0])
    assert settings["preference"] == {
        "loss": "sigmoid",
        "beta": 0.1,
        "labelSmoothing": 0.0,
        "referenceLogProbs": "auto",
    }


def test_the_result_starts_from_its_reference_and_ends_turns(run: tuple[Folder, str]) -> None:
    folder, _ = run
    sft, dpo = (folder.stage("preferences", name) for name in ("sft", "dpo"))
    (model,) = folder.claim("preferences").glob("models/preferences-*/dpo/model")
    lineage = json.loads((model / "manifest.json").read_bytes())["lineage"]["identity"]
    assert lineage["reference"] == lineage["model"] == sft["artifact"]["digest"]
    assert {metric["name"] for metric in dpo["progress"]["metrics"]} >= {"accuracy", "validation_accuracy"}
    ends = json.loads((model / "generation_config.json").read_bytes())["eos_token_id"]
    assert json.loads((model / "tokenizer.json").read_bytes())["added_tokens"][ends]["content"] == "<|end|>"
