"""A container's words become a process of this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.local.container import Place, Unsupported, process

PLACE = Place(
    paths={
        "/var/run/trimtab/volumes/models": Path("/w/volumes/default/models"),
        "/var/run/trimtab/volumes/models-2": Path("/w/volumes/default/models-2"),
        "/etc/trimtab": Path("/w/pods/default/p/volumes/config"),
        "/tmp": Path("/scratch/tmp"),
    },
    address="127.1.2.3",
    address_of={"job-0.svc.ns": "127.1.2.4"}.__getitem__,
    scratch=Path("/scratch"),
)


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("/etc/trimtab/stage.json", "/w/pods/default/p/volumes/config/stage.json"),
        ("/etc/trimtab", "/w/pods/default/p/volumes/config"),
        ("/etc/trimtab-other/x", "/etc/trimtab-other/x"),
        ("/usr/etc/trimtab/x", "/usr/etc/trimtab/x"),
        ("file:///tmp/data.jsonl", "file:///tmp/data.jsonl"),
        ("--cache=/tmp/x:/tmp", "--cache=/scratch/tmp/x:/scratch/tmp"),
        (
            json.dumps({"models": "/var/run/trimtab/volumes/models", "b": "/var/run/trimtab/volumes/models-2"}),
            json.dumps({"models": "/w/volumes/default/models", "b": "/w/volumes/default/models-2"}),
        ),
        ("job-0.svc.ns.svc:29500", "127.1.2.4:29500"),
        ("job-0.svc.ns.svc.cluster.local:29500", "127.1.2.4:29500"),
    ],
)
def test_paths_and_hosts(text: str, here: str) -> None:
    assert PLACE.translate(text) == here


def pod(**container: Any) -> dict[str, Any]:
    metadata = {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a/b": "l"}, "annotations": {}}
    return {"metadata": metadata, "spec": {"containers": [{"name": "main", "command": ["python", "-V"], **container}]}}


def no_secret(name: str, key: str) -> str:
    raise Unsupported(f"{name} {key}")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    monkeypatch.setenv("https_proxy", "http://proxy")
    env = [
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a/b']"}}},
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        {"name": "CONFIG", "value": "/etc/trimtab"},
        {"name": "EXPANDED", "value": "$(LABEL) $(absent) $5"},
        {"name": "LITERAL", "value": "$$(LABEL) $$$$"},
    ]
    made = process(pod(env=env, args=["/etc/trimtab/x"]), PLACE, lambda name, key: f"{name}/{key}")
    assert made.command == (sys.executable, "-V", "/w/pods/default/p/volumes/config/x")
    environment = made.environment
    assert {
        name: environment[name] for name in ("IP", "LABEL", "TOKEN", "CONFIG", "EXPANDED", "LITERAL", "https_proxy")
    } == {
        "IP": "127.1.2.3",
        "LABEL": "l",
        "TOKEN": "s/k",
        "CONFIG": "/w/pods/default/p/volumes/config",
        "EXPANDED": "l $(absent) $5",
        "LITERAL": "$(LABEL) $$",
        "https_proxy": "http://proxy",
    }
    assert "AWS_SECRET_ACCESS_KEY" not in environment, "a pod gets no credential of the user by accident"


@pytest.mark.parametrize(
    "odd",
    [
        pod(command=[]),
        pod(env=[{"name": "X", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}]),
        pod(env=[{"name": "X", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "k"}}}]),
        {**pod(), "spec": {"containers": [{"command": ["a"]}, {"command": ["b"]}]}},
    ],
)
def test_what_local_mode_does_not_have_is_said(odd: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        process(odd, PLACE, no_secret)
