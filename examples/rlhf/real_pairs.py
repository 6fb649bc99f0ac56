"""Run the same stages on real pairs, hh-rlhf's, and say which were dropped and how many held-out ones are put right.

Usage: `TRIMTAB_HH_DATA=FOLDER python examples/rlhf/real_pairs.py [WORKDIR]`; the folder holds `*.jsonl.gz` of hh-rlhf
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
JOB = HERE / "real-pairs.yaml"
HELD_OUT_SHARE = 10
"""One prompt in so many is held out."""
TURN = re.compile(r"\n\n(Human|Assistant): ?")
ROLES = {"Human": "user", "Assistant": "assistant"}


def messages(conversation: str) -> list[dict[str, str]]:
    """The turns of hh-rlhf's text form."""
    _, *parts = TURN.split(conversation)
    return [{"role": ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def is_held_out(row: dict[str, str]) -> bool:
    """Chosen by the first question, so that no conversation is on both sides."""
    question = messages(row["chosen"])[0]["content"]
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_SHARE == 0


def make(files: list[Path], folder: Path) -> None:
    """Split the pairs as they are, and take demonstrations, prompts with them, from the chosen side."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).decode().split("\n") if line]
    parts: dict[str, list[str]] = {"pairs": [], "pairs-heldout": [], "demonstrations": []}
    for line in lines:
        row = json.loads(line)
        if is_held_out(row):
            parts["pairs-heldout"].append(line)
        else:
            parts["pairs"].append(line)
            parts["demonstrations"].append(json.dumps({"messages": messages(row["chosen"])}))
    for name, kept in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def dropped(workdir: Path) -> list[str]:
    """Cause and place of each record that `prepare` left out; it may read a file twice, and says so each time."""
    logs = [log.read_text(encoding="utf-8") for log in workdir.glob("pods/default/real-pairs-prepare-*/log")]
    lines = [line for log in logs for line in log.splitlines() if "record dropped" in line]
    return sorted({line.partition("record dropped")[2].strip() for line in lines})


def main() -> int:
    """The exit code is that of `trimtab local run`; 2 where the data are missing."""
    source = os.environ.get("TRIMTAB_HH_DATA")
    files = sorted(Path(source).glob("*.jsonl.gz")) if source else []
    if not files:
        print(f"TRIMTAB_HH_DATA={source}: name a folder with hh-rlhf's *.jsonl.gz in it", file=sys.stderr)
        return 2
    workdir = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(".trimtab/real-pairs")
    volume = workdir / "volumes/default/real-pairs"
    make(files, volume / "data")
    command = [sys.executable, "-m", "trimtab", "local", "run", str(JOB), "--workdir", str(workdir)]
    code = subprocess.run(command, check=False).returncode
    for line in dropped(workdir):
        print(f"dropped: {line}")
    if code == 0:
        for stage in yaml.safe_load(JOB.read_text(encoding="utf-8"))["spec"]["stages"]:
            show(stage["name"], volume)
    return code


def show(stage: str, volume: Path) -> None:
    """The last look at the held-out pairs, of a stage that has them."""
    (file,) = volume.glob(f"models/real-pairs-*/{stage}/metrics.jsonl")
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    looks = [row for row in rows if "validationAccuracy" in row]
    if looks:
        print(f"{stage}: accuracy on held-out pairs {looks[-1]['validationAccuracy']:.3f} (step {looks[-1]['step']})")


if __name__ == "__main__":
    sys.exit(main())
