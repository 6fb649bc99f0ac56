"""A working folder and the `trimtab` command on it, as a person uses them; imports nothing of the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PATIENCE_SECONDS = 540
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def trimtab(*words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "trimtab", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, **more)


def job(name: str, claim: str, stages: list[dict[str, Any]], **spec: Any) -> dict[str, Any]:
    """A job on a tiny model of random weights; its artifacts lie below `claim`."""
    return {
        "apiVersion": "trimtab.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"config": MODEL, "tokenizer": {"train": {"vocabularySize": 384}}},
            "artifacts": {"uri": f"pvc://{claim}/models"},
            "defaults": {"precision": "fp32", "resources": {"limits": {"cpu": 1, "memory": "4Gi"}}},
            "stages": stages,
            **spec,
        },
    }


def endpoint(name: str, uri: str) -> dict[str, Any]:
    """An endpoint on a stage's result."""
    return {
        "apiVersion": "trimtab.dev/v1alpha1",
        "kind": "ModelEndpoint",
        "metadata": {"name": name},
        "spec": {"servedModelName": name, "model": {"uri": uri}},
    }


@dataclass(frozen=True)
class Folder:
    """A working folder."""

    root: Path

    def claim(self, name: str) -> Path:
        """Directory of a claim; made when it is not there."""
        path = self.root / "volumes" / "default" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, *manifests: dict[str, Any]) -> Path:
        """One YAML file with the manifests, beside the folder."""
        path = self.root.with_name(f"{manifests[0]['metadata']['name']}.yaml")
        path.write_text(yaml.safe_dump_all(manifests), encoding="utf-8")
        return path

    def run(self, file: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """`trimtab local run` to its end."""
        return trimtab("local", "run", file, "--workdir", self.root, *more)

    def start(self, file: Path) -> subprocess.Popen[str]:
        """`trimtab local run`, not waited for."""
        words = [sys.executable, "-m", "trimtab", "local", "run", str(file), "--workdir", str(self.root)]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    def get(self, kind: str) -> dict[str, dict[str, Any]]:
        """Objects of a kind by name, as `trimtab local get -o json` prints them."""
        found = trimtab("local", "get", kind, "-o", "json", "--workdir", self.root)
        assert found.returncode == 0, found.stderr
        return {obj["metadata"]["name"]: obj for obj in json.loads(found.stdout)["items"]}

    def stage(self, name: str, stage: str) -> dict[str, Any]:
        """A stage's part of a job's status."""
        stages: list[dict[str, Any]] = self.get("ftj")[name]["status"]["stages"]
        return next(each for each in stages if each["name"] == stage)

    def artifact(self, name: str, stage: str) -> Path:
        """Where the stage's result lies."""
        claim, _, path = self.stage(name, stage)["artifact"]["uri"].removeprefix("pvc://").partition("/")
        return self.claim(claim) / path

    def processes(self) -> list[str]:
        """Command lines of living processes that know the folder, by argument or environment."""
        found, wanted = [], os.fsencode(self.root)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                words, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if wanted in words or wanted in variables:
                found.append(os.fsdecode(words).replace("\0", " "))
        return found


def eventually(question: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for a yes."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def steps(metrics: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl that tell of a step; a line that is being written is left out."""
    if not metrics.exists():
        return []
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").split("\n")[:-1]]
    return [row for row in rows if "loss" in row]
