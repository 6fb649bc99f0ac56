"""The chart, rendered by the real Helm."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import yaml
from tests.kubernetes.build import chart_tools

Object = dict[str, Any]

CHART = Path(__file__).resolve().parents[2] / "helm" / "trimtab"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
HELMS = ("helm", "helm3")
"""Version 4, version 3."""
KUBERNETES = "1.36.0"
"""That manifests are rendered for and checked against."""


@functools.cache
def tools() -> Path:
    """The folder with helm, helm3 and kubeconform."""
    return chart_tools(lambda line: None)


def run_helm(*arguments: str | Path, helm: str = "helm") -> subprocess.CompletedProcess[str]:
    """Helm, whatever its exit status."""
    command = [tools() / helm, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@functools.cache
def render_text(*options: str | Path, namespace: str = "trimtab-system", helm: str = "helm") -> str:
    """The manifests of a release named trimtab, as Helm prints them.

    Raises:
        AssertionError: Helm refuses; with its words.
    """
    command = ("template", "trimtab", CHART, f"--namespace={namespace}", f"--kube-version={KUBERNETES}")
    answer = run_helm(*command, *options, helm=helm)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def objects_of(text: str) -> list[Object]:
    """The objects of manifests."""
    return [obj for obj in yaml.safe_load_all(text) if obj]


def render(*options: str | Path, namespace: str = "trimtab-system", helm: str = "helm") -> list[Object]:
    """The objects of a release named trimtab."""
    return objects_of(render_text(*options, namespace=namespace, helm=helm))
