"""The API server takes and refuses manifests as the table of cases says, and explains the fields."""

from __future__ import annotations

import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import CRDS, install_crds
from tests.manifests.cases import ACCEPTED_EDITS, REFUSED, REFUSED_EDITS, Manifest, Refused, RefusedEdit

EXAMPLES = sorted((CRDS.parent / "examples").glob("*/*.yaml"))
DRY = "--dry-run=server"


@pytest.fixture(scope="module", autouse=True)
def crds(control_plane: ControlPlane) -> None:
    install_crds(control_plane)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_a_bad_manifest_is_refused_with_place_and_words(control_plane: ControlPlane, case: Refused) -> None:
    strictness = "strict" if case.strict else "ignore"
    answer = send(control_plane, "create", case.manifest, DRY, f"--validate={strictness}")
    assert answer.returncode == 1, answer.stdout
    missing = [word for word in case.words if word not in answer.stderr]
    assert not missing, f"{missing} not in: {answer.stderr}"


@pytest.mark.parametrize("case", REFUSED_EDITS, ids=lambda case: case.id)
def test_a_bad_edit_is_refused_with_its_words(control_plane: ControlPlane, case: RefusedEdit) -> None:
    answer = edit(control_plane, case)
    assert answer.returncode == 1, answer.stdout
    missing = [word for word in case.words if word not in answer.stderr]
    assert not missing, f"{missing} not in: {answer.stderr}"


@pytest.mark.parametrize("case", ACCEPTED_EDITS, ids=lambda case: case.id)
def test_a_good_edit_is_accepted(control_plane: ControlPlane, case: RefusedEdit) -> None:
    answer = edit(control_plane, case)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_an_example_is_accepted(control_plane: ControlPlane, file: Path) -> None:
    for manifest in yaml.safe_load_all(file.read_text()):
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": manifest["metadata"]["namespace"]}}
        control_plane.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(namespace))
    answer = control_plane.kubectl("apply", "--server-side", DRY, "--validate=strict", f"--filename={file}")
    assert "serverside-applied" in answer.stdout


def test_the_fields_are_explained(control_plane: ControlPlane) -> None:
    stages = control_plane.kubectl("explain", "ftj.spec.stages").stdout
    assert "Steps of the pipeline; a stage refers to earlier ones only." in stages
    crd = control_plane.get("crd", "finetunejobs.trimtab.dev", "modelendpoints.trimtab.dev")
    bare = [
        f"{item['spec']['names']['kind']}{path}"
        for item in crd["items"]
        for version in item["spec"]["versions"]
        for path in without_description(version["schema"]["openAPIV3Schema"])
    ]
    assert not bare


def test_the_crds_are_applied_again_without_a_change(control_plane: ControlPlane) -> None:
    before = versions(control_plane)
    install_crds(control_plane)
    assert versions(control_plane) == before


def send(control_plane: ControlPlane, verb: str, manifest: Manifest, *options: str) -> subprocess.CompletedProcess[str]:
    return control_plane.kubectl(verb, "--filename=-", *options, stdin=json.dumps(manifest), check=False)


def edit(control_plane: ControlPlane, case: RefusedEdit) -> subprocess.CompletedProcess[str]:
    """What the API server says to the edit of an object that was made for it."""
    metadata = {"name": f"case-{uuid.uuid4().hex[:8]}", "namespace": "default"}
    before, after = ({**manifest, "metadata": metadata} for manifest in (case.before, case.after))
    made = send(control_plane, "create", before)
    assert made.returncode == 0, made.stderr
    try:
        return send(control_plane, "replace", after)
    finally:
        control_plane.kubectl("delete", before["kind"], metadata["name"])


def without_description(schema: dict[str, Any], path: str = "") -> list[str]:
    """The properties that `kubectl explain` would show without a word; Kubernetes' own are described by itself."""
    found = []
    for name, field in schema.get("properties", {}).items():
        place = f"{path}.{name}"
        if not field.get("description") and place not in (".apiVersion", ".kind", ".metadata"):
            found.append(place)
        found += without_description(field.get("items", field), place)
    return found


def versions(control_plane: ControlPlane) -> list[str]:
    return [item["metadata"]["resourceVersion"] for item in control_plane.get("crd")["items"]]
