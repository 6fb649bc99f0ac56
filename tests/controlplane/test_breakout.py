"""Attempts to reach out of a namespace or a pod: refused with a message, and nothing is created."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.jobs import Object, Space, make_namespace, until
from tests.controlplane.operator import Operator
from tests.manifests.cases import endpoint
from tests.manifests.leaves import BASES, Place, manifest_with, places

EVIL = "$(HOSTNAME)\n"
LITERAL: dict[str, set[Place]] = {
    "FineTuneJob": {
        ("spec", "model", "config", "model_type"),
        *(
            ("spec", "model", "tokenizer", "train", "specialTokens", *end)
            for end in (("documentSeparator",), ("endOfTurn",), ("padding",), ("additional", "[]"))
        ),
        ("spec", "model", "tokenizer", "train", "chatTemplate"),
        *(
            ("spec", "stages", "[]", "sft", *data, "[]", "templates", "[]", part)
            for data in (("data",), ("validation", "data"))
            for part in ("prompt", "completion")
        ),
        *(
            ("spec", "stages", "[]", "ppo", "verifier", *end)
            for end in (
                ("regularExpression", "pattern"),
                *((kind, part) for kind in ("exactMatch", "numericAnswer") for part in ("field", "answerPattern")),
            )
        ),
        *(
            (*shape, *end)
            for shape in (("spec", "defaults"), ("spec", "stages", "[]"))
            for end in (
                ("env", "[]", "value"),
                ("annotations", "{value}"),
            )
        ),
    },
    "ModelEndpoint": {("spec", "env", "[]", "value"), ("spec", "annotations", "{value}")},
}
"""Where any text is fine: parts of the stage's JSON, annotations, and variables, which reach the pod as written."""

TERMINAL = {
    "pvc://../text.jsonl": ("BadName", "'..' is not the name of a PersistentVolumeClaim"),
    "pvc://other%2Fclaim/text.jsonl": ("BadName", "is not the name of a PersistentVolumeClaim"),
    "pvc://other:claim/text.jsonl": ("BadName", "is not the name of a PersistentVolumeClaim"),
    "pvc://quickstart/../../etc/passwd": ("BadName", "'..' is not allowed in a path"),
    "pvc://quickstart/%2e%2e/%2E%2E/etc/passwd": ("BadName", "'..' is not allowed in a path"),
    "pvc://quickstart/data/..": ("BadName", "'..' is not allowed in a path"),
    "file:///etc/passwd": ("FileUriNotAllowed", "put the data on a claim"),
    "https://169.254.169.254/latest/meta-data/x": ("HostNotAllowed", "name the server that has the file"),
    "https://metadata.google.internal/x": ("HostNotAllowed", "name the server that has the file"),
    "https://localhost/x": ("HostNotAllowed", "name the server that has the file"),
    "https://127.0.0.1:8080/x": ("HostNotAllowed", "name the server that has the file"),
    "https://[::1]/x": ("HostNotAllowed", "name the server that has the file"),
    "https://[::ffff:169.254.169.254]/x": ("HostNotAllowed", "name the server that has the file"),
    "https://0.0.0.0/x": ("HostNotAllowed", "name the server that has the file"),
    "https://2130706433/x": ("HostNotAllowed", "name the server that has the file"),
    "https://0x7f000001/x": ("HostNotAllowed", "name the server that has the file"),
    "https://0251.0376.0251.0376/x": ("HostNotAllowed", "name the server that has the file"),
    "https://[broken/x": ("HostNotAllowed", "expected https://HOST/PATH"),
}
"""A data set's URI, and why its job fails at once."""

REFUSED_URIS = (
    "https://user:password@example.org/x",
    "https://user@example.org/x",
    "https://example.org\\@169.254.169.254/x",
    "https://example.org/x y",
    "https://example.org/x\nHost: evil",
    "http://example.org/x",
    "ftp://example.org/x",
    "oci://../x",
)


@pytest.fixture
def elsewhere(control_plane: ControlPlane) -> Iterator[Space]:
    """Another tenant's namespace."""
    name = make_namespace(control_plane)
    yield Space(control_plane, name)
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


def reading(space: Space, name: str, uri: str) -> Object:
    """The quickstart's job, under this name, reading its first data set from elsewhere."""
    made = space.job()
    made["metadata"]["name"] = name
    made["spec"]["stages"][0]["pretrain"]["data"] = [{"uri": uri}]
    return made


def children(space: Space) -> list[str]:
    """All that the operator has made in the namespace."""
    kinds = "jobs,pods,configmaps,services,deployments"
    found = space.get(kinds, "--selector=app.kubernetes.io/managed-by=trimtab")["items"]
    return [f"{item['kind']}/{item['metadata']['name']}" for item in found]


def test_a_uri_that_reaches_out_ends_its_job(operator: Operator, space: Space) -> None:
    names = {uri: f"case-{index}" for index, uri in enumerate(TERMINAL)}
    space.apply(*(reading(space, name, uri) for uri, name in names.items()))
    for uri, (reason, words) in TERMINAL.items():
        target = f"ftj/{names[uri]}"
        space.wait("Failed", target)
        failed = next(c for c in space.status(target)["conditions"] if c["type"] == "Failed")
        assert failed["reason"] == reason, uri
        assert words in failed["message"], uri
    assert children(space) == []


@pytest.mark.parametrize("uri", REFUSED_URIS)
def test_a_uri_with_credentials_or_another_scheme_is_refused(
    control_plane: ControlPlane, space: Space, uri: str
) -> None:
    answer = create(control_plane, reading(space, "case", uri))
    assert answer.returncode == 1
    assert "spec.stages[0].pretrain.data[0].uri" in answer.stderr


@pytest.mark.parametrize("uri", ["job://{other}/case/sft", "job://{other}%2Fcase/sft", "job://../case/sft"])
@pytest.mark.parametrize("kind", ["FineTuneJob", "ModelEndpoint"])
def test_a_job_of_another_namespace_has_no_name(
    control_plane: ControlPlane, space: Space, elsewhere: Space, kind: str, uri: str
) -> None:
    there = uri.format(other=elsewhere.namespace)
    made = space.job(model={"uri": there}) if kind == "FineTuneJob" else endpoint(model={"uri": there})
    answer = create(control_plane, made)
    assert answer.returncode == 1
    assert "spec.model.uri" in answer.stderr


def test_another_namespace_is_not_looked_into(operator: Operator, space: Space, elsewhere: Space) -> None:
    """A claim, a job and an endpoint of the right name stand there; here there is none."""
    elsewhere.apply(
        elsewhere.job(suspend=True),
        elsewhere.base_endpoint(),
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "theirs", "namespace": elsewhere.namespace},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        },
    )
    theirs = space.job(model={"uri": "job://quickstart/sft"}, rollout=None)
    theirs["metadata"]["name"] = "theirs"
    rollout = space.job(rollout={"from": "sft", "endpointName": "quickstart-base"})
    rollout["metadata"]["name"] = "rollout"
    space.apply(
        reading(space, "claim", "pvc://theirs/text.jsonl"),
        reading(space, "path", f"pvc://{elsewhere.namespace}/theirs/text.jsonl"),
        theirs,
        rollout,
    )
    expected = {
        "claim": ("ClaimMissing", "there is no PersistentVolumeClaim 'theirs'"),
        "path": ("ClaimMissing", f"there is no PersistentVolumeClaim '{elsewhere.namespace}'"),
        "theirs": ("WaitingForArtifact", "there is no FineTuneJob 'quickstart'"),
        "rollout": ("EndpointMissing", "there is no ModelEndpoint 'quickstart-base'"),
    }
    for name, (reason, words) in expected.items():
        status = space.until_status(lambda s, reason=reason: s.get("reason") == reason, name, f"ftj/{name}")
        assert words in json.dumps(status["conditions"])
    assert children(space) == []


def test_a_child_of_another_namespace_is_not_adopted(operator: Operator, space: Space, elsewhere: Space) -> None:
    """Who knows a job's uid forges a child of it elsewhere, with a high attempt number and a result of their own."""
    space.apply(space.job(suspend=True))
    space.wait("Suspended")
    uid = space.get("ftj/quickstart")["metadata"]["uid"]
    owner = {"apiVersion": "trimtab.dev/v1alpha1", "kind": "FineTuneJob", "name": "quickstart", "uid": uid}
    labels = {
        "app.kubernetes.io/managed-by": "trimtab",
        "app.kubernetes.io/component": "prepare",
        "trimtab.dev/job": "quickstart",
        "trimtab.dev/attempt": "7",
    }
    forged: Object = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "forged",
            "namespace": elsewhere.namespace,
            "labels": labels,
            "ownerReferences": [{**owner, "controller": True}],
            # The garbage collector knows a forgery too; this keeps it from being faster than the operator.
            "finalizers": ["example.com/hold"],
        },
    }
    elsewhere.apply(forged)
    space.kubectl("patch", "ftj", "quickstart", "--type=merge", '--patch={"spec": {"suspend": false}}')
    jobs = until(lambda: space.items("jobs", job="quickstart"), "prepare starts")
    elsewhere.kubectl("patch", "configmap", "forged", "--type=merge", '--patch={"metadata": {"finalizers": null}}')
    assert space.status()["prepare"]["attempt"] == 1
    assert {item["metadata"]["labels"]["trimtab.dev/attempt"] for item in jobs} == {"1"}


def test_every_string_is_refused_or_taken_literally(
    control_plane: ControlPlane, operator: Operator, space: Space
) -> None:
    tried = 0
    for kind in BASES:
        strings = places(kind, lambda _, schema: schema.get("type") == "string" and "enum" not in schema)
        for place in strings:
            tried += 1
            answer = create(control_plane, manifest_with(kind, place, EVIL), "--dry-run=server")
            if place in LITERAL[kind]:
                assert answer.returncode == 0, (place, answer.stderr)
                continue
            assert answer.returncode == 1, place
            named = next(part for part in reversed(place) if part[0] not in "[{")
            assert named in answer.stderr, (place, answer.stderr)
    print(f"{tried} strings tried")
    assert tried > 80


def test_what_is_taken_reaches_no_pod_but_as_it_was_written(operator: Operator, space: Space) -> None:
    """A kubelet expands `$(NAME)` in values, commands and arguments, and turns `$$` into `$`."""
    job = space.job()
    job["spec"]["model"]["tokenizer"]["train"]["chatTemplate"] = EVIL
    shape: dict[str, Any] = {
        "env": [{"name": "EVIL", "value": EVIL + "$$(HOME)"}],
        "annotations": {"example.com/e": EVIL},
    }
    job["spec"]["defaults"] |= shape
    served = endpoint(model={"uri": "pvc://quickstart/x", "digest": f"sha256:{'0' * 64}"}, **shape)
    served["metadata"]["namespace"] = space.namespace
    space.apply(job, served)
    workloads = until(
        lambda: (
            len(found := space.items("jobs", job="quickstart") + space.items("deployments", endpoint="case")) >= 2
            and found
        ),
        "prepare and the endpoint start",
    )
    for workload in workloads:
        template = workload["spec"]["template"]
        assert template["metadata"]["annotations"]["example.com/e"] == EVIL
        (container,) = template["spec"]["containers"]
        values = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        assert values["EVIL"].replace("$$", "$") == EVIL + "$$(HOME)"
        for text in (*values.values(), *container["command"], *container.get("args", [])):
            assert "$(" not in re.sub(r"\$\$", "", text)


def create(control_plane: ControlPlane, manifest: Object, *options: str) -> Any:
    """kubectl's answer, as the administrator."""
    body = json.dumps(manifest)
    return control_plane.kubectl("create", "--filename=-", "--validate=strict", *options, stdin=body, check=False)
