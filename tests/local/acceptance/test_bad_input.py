"""Bad input: one message with cause, place and remedy, nothing half-written, and no pod that would take a GPU.

What an API server refuses ends with exit code 64 before anything runs. What only the data tell is found by prepare: all
such jobs go through one `trimtab local run`, each on a claim of its own. Damaged checkpoints, a full disk and the
trainer's port are tested with the trainer, damaged artifacts beside interrupted runs.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.local.acceptance.folder import Folder, job, trimtab

SFT = {"name": "tune", "sft": {"data": [{"uri": "pvc://data/chat.jsonl"}]}}
VALID = job("case", "data", [{"name": "base", "pretrain": {"data": [{"uri": "pvc://data/text.jsonl"}]}}, SFT])


def edited(change: Callable[[dict[str, Any]], None]) -> str:
    manifest = json.loads(json.dumps(VALID))
    change(manifest)
    return yaml.safe_dump(manifest)


REFUSED = {
    "unknown field": (
        edited(lambda m: m["spec"]["stages"][1].update(trian={"epochs": 1})),
        ("spec.stages[1].trian", "unknown field", "did you mean train?"),
    ),
    "misspelt stage type": (
        edited(lambda m: m["spec"]["stages"][1].update(stf=m["spec"]["stages"][1].pop("sft"))),
        ("spec.stages[1].stf", "unknown field", "did you mean sft?"),
    ),
    "cycle": (
        edited(lambda m: m["spec"]["stages"][0].update({"from": "tune"})),
        ("spec", "from must name an earlier stage", "cycle"),
    ),
    "two types": (
        edited(lambda m: m["spec"]["stages"][1].update(pretrain=SFT["sft"])),
        ("spec.stages[1]", "set exactly one stage type"),
    ),
    "not YAML": ("kind: [FineTuneJob\nmetadata: {}\n", (":2:", "not YAML", "correct this line")),
    "long name": (
        edited(lambda m: m["metadata"].update(name="n" * 64)),
        ("metadata.name", "at most 63 characters", "choose a shorter name"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("words", [("validate",), ("local", "run")], ids=" ".join)
def test_an_invalid_manifest_is_refused_before_anything_runs(tmp_path: Path, case: str, words: tuple[str, ...]) -> None:
    text, said = REFUSED[case]
    (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
    run = trimtab(*words, "job.yaml", cwd=tmp_path)
    assert run.returncode == 64
    first, *others = run.stderr.splitlines()
    assert first.startswith("error: job.yaml:")
    assert all(part in first for part in said), first
    assert all("set exactly one stage type" in line for line in others), "at most what follows from the first"
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"], "nothing was made"


def chat(question: str = "What is new?", answer: str = "Nothing at all.") -> str:
    return json.dumps({"prompt": question, "completion": answer})


def lines(count: int, **special: str) -> bytes:
    """Good records, one a line, with others in the lines `lineN`."""
    return "".join(special.get(f"line{n}", chat(f"What is {n}?")) + "\n" for n in range(1, count + 1)).encode()


NOT_A_RECORD = json.dumps({"prompt": "What is this?"})
LONG = chat(answer="word after word " * 200)
FIVE_BAD = lines(1000, **{f"line{n}": NOT_A_RECORD for n in (3, 200, 500, 501, 999)})
CONFIG = {"model_type": "llama", "hidden_size": 32}


@dataclass(frozen=True)
class Bad:
    """Files of a claim, what the stage says about them, and what must be said."""

    files: dict[str, bytes]
    said: tuple[str, ...]
    reason: str = "BadData"
    sft: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    data: str = "chat.jsonl"


def template(text: str) -> dict[str, Any]:
    train = {"vocabularySize": 384, "chatTemplate": text}
    return {"model": {"config": CONFIG, "tokenizer": {"train": train}}}


BAD = {
    "missing": Bad({}, ("pvc://missing/chat.jsonl", "no such file", "check the uri"), "InputMissing"),
    "empty": Bad({"chat.jsonl": b""}, ("pvc://empty/chat.jsonl", "empty", "write at least one record")),
    "truncated": Bad(
        {"chat.jsonl.gz": gzip.compress(lines(500))[:-200]},
        ("pvc://truncated/chat.jsonl.gz", "gzip stream is cut off", "copy the file again"),
        data="chat.jsonl.gz",
    ),
    "latin": Bad(
        {"chat.jsonl": lines(20) + chat("Who is José?").encode().replace(b"\\u00e9", b"\xe9") + b"\n"},
        ("line 21 of pvc://latin/chat.jsonl", "not UTF-8", "0xe9", "save the file as UTF-8"),
    ),
    "line17": Bad(
        {"chat.jsonl": lines(1000, line17=NOT_A_RECORD)}, ("line 17 of pvc://line17/chat.jsonl", "'completion'", "add")
    ),
    "toolong": Bad(
        {"chat.jsonl": lines(50, line7=LONG)},
        ("line 7 of pvc://toolong/chat.jsonl", "maxLength = 64", "raise maxLength"),
        sft={"maxLength": 64},
    ),
    "manydropped": Bad(
        {"chat.jsonl": FIVE_BAD},
        (
            "maxDropped = 4",
            *(f"line {n} of pvc://manydropped/chat.jsonl" for n in (3, 200, 500, 501, 999)),
            "raise maxDropped",
        ),
        sft={"onInvalid": "drop", "maxDropped": 4},
    ),
    "nolabel": Bad(
        {"chat.jsonl": "".join(chat(f"What is {n} {'or ' * n}?") + "\n" for n in range(40, 50)).encode()},
        ("pvc://nolabel/chat.jsonl", "no record with a label", "maxLength"),
        sft={"maxLength": 8, "onTooLong": "truncate", "maxDropped": 10},
    ),
    "template": Bad(
        {"chat.jsonl": lines(10)},
        ("chat template", "TypeError", "correct the template"),
        "BadConfiguration",
        spec=template("{% for message in messages %}{{ message.content + 1 }}<|im_end|>{% endfor %}"),
    ),
    "syntax": Bad(
        {"chat.jsonl": lines(10)},
        ("chat template", "TemplateSyntaxError", "correct the template"),
        "BadConfiguration",
        spec=template("{% for message in messages %}"),
    ),
    "pickle": Bad(
        {"chat.jsonl": lines(10), "base/config.json": json.dumps(CONFIG).encode(), "base/pytorch_model.bin": b"x"},
        ("pvc://pickle/base", "pytorch_model.bin", "pickles are refused", "safetensors"),
        "UnsafeInput",
        spec={"model": {"uri": "pvc://pickle/base"}},
    ),
    "automap": Bad(
        {
            "chat.jsonl": lines(10),
            "base/config.json": json.dumps(CONFIG | {"auto_map": {"AutoModel": "evil.Model"}}).encode(),
            "base/model.safetensors": (2).to_bytes(8, "little") + b"{}",
        },
        ("pvc://automap/base", "config.json", "'auto_map'", "use a model without it"),
        "UnsafeInput",
        spec={"model": {"uri": "pvc://automap/base"}},
    ),
}


@dataclass(frozen=True)
class Outcome:
    """The one run of all bad jobs."""

    folder: Folder
    run: subprocess.CompletedProcess[str]
    jobs: dict[str, dict[str, Any]]
    pods: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = Folder(tmp_path_factory.mktemp("bad") / "work")
    manifests = []
    for name, bad in BAD.items():
        for path, content in bad.files.items():
            target = folder.claim(name) / path
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
        stage = {"name": "tune", "sft": {"data": [{"uri": f"pvc://{name}/{bad.data}"}], "maxLength": 128, **bad.sft}}
        manifests.append(job(name, name, [stage], **bad.spec))
    run = folder.run(folder.write(*manifests))
    return Outcome(folder, run, folder.get("ftj"), folder.get("pods"))


def test_the_run_fails_with_one_message_a_job(outcome: Outcome) -> None:
    assert outcome.run.returncode == 1
    errors = [line for line in outcome.run.stderr.splitlines() if line.startswith("error: ")]
    assert sorted(line.split()[2].rstrip(":") for line in errors) == sorted(BAD)
    assert "Traceback" not in outcome.run.stderr


def test_the_log_of_a_failed_job_is_found_by_its_name(outcome: Outcome) -> None:
    logs = trimtab("local", "logs", "line17", "--workdir", outcome.folder.root)
    assert (logs.returncode, logs.stderr) == (0, "")
    assert "line 17 of pvc://line17/chat.jsonl" in logs.stdout
    unknown = trimtab("local", "logs", "nobody", "--workdir", outcome.folder.root)
    assert unknown.returncode == 1
    assert f"trimtab local get pods --workdir {outcome.folder.root}" in unknown.stderr


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_told_before_anything_is_trained(outcome: Outcome, name: str) -> None:
    bad, status = BAD[name], outcome.jobs[name]["status"]
    failed = next(each for each in status["conditions"] if each["type"] == "Failed")
    assert (failed["status"], failed["reason"]) == ("True", bad.reason)
    assert all(part in failed["message"] for part in bad.said), failed["message"]
    assert "stage tune" in failed["message"] or bad.reason == "UnsafeInput", failed["message"]
    assert f"error: finetunejob {name}: {failed['reason']}: {failed['message']}" in outcome.run.stderr.splitlines()
    pods = [pod for pod in outcome.pods.values() if pod["metadata"]["labels"]["trimtab.dev/job"] == name]
    assert len(pods) == 1, "prepare, once, and no other pod"
    left = {str(path.relative_to(outcome.folder.claim(name))) for path in outcome.folder.claim(name).rglob("*")}
    given = {str(parent) for path in bad.files for parent in (Path(path), *Path(path).parents)}
    assert left - given <= {"models", "models/prepared"}, "nothing is half-written"


def test_what_may_be_cut_or_dropped_is_counted(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "work")
    files = {"long.jsonl": lines(50, line7=LONG), "bad.jsonl": FIVE_BAD}
    for name, content in files.items():
        (folder.claim("data") / name).write_bytes(content)
    stages = [
        ("truncate", "long", {"onTooLong": "truncate"}),
        ("drop", "long", {"onTooLong": "drop", "maxDropped": 1}),
        ("invalid", "bad", {"onInvalid": "drop", "maxDropped": 5}),
    ]
    manifest = job(
        "lenient",
        "data",
        [
            {
                "name": name,
                "sft": {"data": [{"uri": f"pvc://data/{file}.jsonl"}], "maxLength": 64, **fields},
                "train": {"maxSteps": 1, "globalBatchSize": 2},
            }
            for name, file, fields in stages
        ],
    )
    run = folder.run(folder.write(manifest))
    assert run.returncode == 0, run.stderr
    found = {name: folder.stage("lenient", name)["prepared"] for name, _, _ in stages}
    counts = {name: [each.get(what, 0) for what in ("records", "truncated", "dropped")] for name, each in found.items()}
    assert counts == {"truncate": [50, 1, 0], "drop": [49, 0, 1], "invalid": [995, 0, 5]}
