"""The control plane of this tier works: what later tests rely on, shown once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.process import ClusterError
from tests.kubernetes.build import BuildError, binaries

from trimtab_trainer.config import REPORT, FailureReport, PrepareReport, TrainReport, dump_report


def job(name: str, labels: dict[str, str], annotations: dict[str, str] | None = None, completions: int = 1) -> str:
    """An Indexed Job as the operator makes them: no retries of its own, no replacement before the old pods are gone."""
    template = {
        "metadata": {"labels": {"trimtab.dev/job": name, **labels}, "annotations": annotations or {}},
        "spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "1"}}}],
        },
    }
    spec = {
        "completionMode": "Indexed",
        "completions": completions,
        "parallelism": completions,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "template": template,
    }
    return json.dumps({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec})


def pods_of(control_plane: ControlPlane, namespace: str, name: str) -> list[dict[str, Any]]:
    pods = control_plane.get("pods", f"--namespace={namespace}", f"--selector=trimtab.dev/job={name}")["items"]
    return sorted(pods, key=lambda pod: pod["metadata"]["name"])


def terminated(pod: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    return state


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.1)
    return answer


def test_nodes_are_ready_and_renew_their_leases(control_plane: ControlPlane) -> None:
    nodes = control_plane.get("nodes")["items"]
    ready = [c["status"] for node in nodes for c in node["status"]["conditions"] if c["type"] == "Ready"]
    assert ready == ["True"] * 3
    assert {node["status"]["allocatable"]["nvidia.com/gpu"] for node in nodes} == {"8"}

    def renewed() -> set[str]:
        leases = control_plane.get("leases", "--namespace=kube-node-lease")["items"]
        return {lease["metadata"]["name"] for lease in leases if "renewTime" in lease["spec"]}

    until(lambda: renewed() == {"node-0", "node-1", "node-2"})


def test_an_indexed_job_completes_with_reports(control_plane: ControlPlane, namespace: str) -> None:
    message = dump_report(TrainReport(digest="sha256:" + "a" * 64, step=3, total_steps=3))
    for name, component, annotations, completions in [
        ("said", "train", {"test.trimtab.dev/termination-message": message}, 2),
        ("default", "train", {}, 1),
        ("data", "prepare", {}, 1),
    ]:
        labels = {"app.kubernetes.io/component": component, "trimtab.dev/stage": "sft"}
        manifest = job(name, labels, annotations, completions)
        control_plane.kubectl("apply", "-f", "-", f"--namespace={namespace}", stdin=manifest)
    control_plane.kubectl(
        "wait", "--for=condition=Complete", "job", "--all", "--timeout=120s", f"--namespace={namespace}"
    )

    said = pods_of(control_plane, namespace, "said")
    assert [pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for pod in said] == ["0", "1"]
    assert [(pod["status"]["phase"], terminated(pod)["message"]) for pod in said] == [("Succeeded", message)] * 2
    assert all("finalizers" not in pod["metadata"] for pod in said)
    report = REPORT.validate_json(terminated(pods_of(control_plane, namespace, "default")[0])["message"])
    assert isinstance(report, TrainReport)
    assert isinstance(
        REPORT.validate_json(terminated(pods_of(control_plane, namespace, "data")[0])["message"]), PrepareReport
    )


def test_a_job_fails_with_its_pods_exit_code_and_reason(control_plane: ControlPlane, namespace: str) -> None:
    message = dump_report(FailureReport(reason="DataInvalid", message="train.jsonl:17: no field text"))
    annotations = {
        "test.trimtab.dev/exit-code": "65",
        "test.trimtab.dev/reason": "OOMKilled",
        "test.trimtab.dev/termination-message": message,
    }
    manifest = job("bad", {"app.kubernetes.io/component": "train"}, annotations)
    control_plane.kubectl("apply", "-f", "-", f"--namespace={namespace}", stdin=manifest)
    control_plane.kubectl("wait", "--for=condition=Failed", "job/bad", "--timeout=120s", f"--namespace={namespace}")
    (pod,) = pods_of(control_plane, namespace, "bad")
    assert pod["status"]["phase"] == "Failed"
    state = terminated(pod)
    assert (state["exitCode"], state["reason"], state["message"]) == (65, "OOMKilled", message)


def test_a_deployments_pod_becomes_ready_and_is_deleted(control_plane: ControlPlane, namespace: str) -> None:
    labels = {"app.kubernetes.io/component": "serve"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "main", "image": "none"}]}}
    spec = {"selector": {"matchLabels": labels}, "template": pod}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec}
    in_namespace = f"--namespace={namespace}"
    control_plane.kubectl("apply", "-f", "-", in_namespace, stdin=json.dumps(deployment))
    control_plane.kubectl("wait", "--for=condition=Available", "deployment/web", "--timeout=120s", in_namespace)
    (running,) = control_plane.get("pods", in_namespace)["items"]
    assert {c["type"]: c["status"] for c in running["status"]["conditions"]}["Ready"] == "True"
    assert running["status"]["podIP"].startswith("10.244.")
    control_plane.kubectl("delete", "deployment/web", in_namespace)
    until(lambda: not control_plane.get("pods", in_namespace)["items"])


def test_the_audit_log_has_writes_with_bodies_and_the_users_reads(control_plane: ControlPlane, namespace: str) -> None:
    in_namespace = f"--namespace={namespace}"
    control_plane.kubectl("create", "configmap", "note", "--from-literal=a=b", in_namespace)
    control_plane.kubectl("get", "configmap", "note", in_namespace)
    denied = control_plane.kubectl("get", "configmap", "note", in_namespace, user="alice", check=False)
    assert denied.returncode == 1
    assert "Forbidden" in denied.stderr

    def events() -> list[tuple[str, str, int, object]]:
        return [
            (
                event["user"]["username"],
                event["verb"],
                event["responseStatus"]["code"],
                event.get("requestObject", {}).get("data"),
            )
            for event in control_plane.audit()
            if event["objectRef"].get("namespace") == namespace and event["objectRef"].get("name") == "note"
        ]

    expected = [("admin", "create", 201, {"a": "b"}), ("alice", "get", 403, None)]
    assert until(lambda: len(events()) >= 2 and events()) == expected


def test_a_service_account_gets_a_kubeconfig(control_plane: ControlPlane, namespace: str) -> None:
    path = control_plane.service_account_kubeconfig(namespace, "default")
    answer = control_plane.kubectl(f"--kubeconfig={path}", "auth", "whoami", "--output=json")
    assert json.loads(answer.stdout)["status"]["userInfo"]["username"] == f"system:serviceaccount:{namespace}:default"


def test_state_survives_an_outage_of_the_apiserver(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl("create", "configmap", "kept", f"--namespace={namespace}")
    control_plane.stop_apiserver()
    refused = control_plane.kubectl("get", "nodes", check=False)
    control_plane.start_apiserver()
    assert "refused" in refused.stderr
    control_plane.kubectl("get", "configmap", "kept", f"--namespace={namespace}")
    labels = {"app.kubernetes.io/component": "train"}
    control_plane.kubectl("apply", "-f", "-", f"--namespace={namespace}", stdin=job("after", labels))
    control_plane.kubectl("wait", "--for=condition=Complete", "job/after", "--timeout=120s", f"--namespace={namespace}")


def test_a_component_that_does_not_start_shows_its_log(kubernetes_binaries: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "etcd").symlink_to("/bin/false")
    (broken / "kube-apiserver").symlink_to(kubernetes_binaries / "kube-apiserver")
    with pytest.raises(ClusterError, match=r"etcd: exited with 1; the end of .*/logs/etcd\.log"):
        ControlPlane(tmp_path / "root", broken).__enter__()


def test_components_end_with_a_killed_test_process(kubernetes_binaries: Path, tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from tests.controlplane.cluster import ControlPlane;"
        "plane = ControlPlane(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])); plane.start();"
        "plane.start_kwok(); print('up', flush=True); time.sleep(600)"
    )
    root = tmp_path / "root"
    command = [sys.executable, "-c", script, str(root), str(kubernetes_binaries)]
    repository = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            until(lambda: len(using(root)) == 6)  # the test process and five components, the last just forked
        finally:
            os.kill(process.pid, signal.SIGKILL)
    until(lambda: not using(root))


def using(root: Path) -> list[str]:
    """The command lines of running processes that name `root`."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it has just ended
    return [line for line in lines if str(root) in line]


def test_incomplete_assets_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(BuildError, match=r"lacks etcd, .*kwok: add them, or unset the variable"):
        binaries()


def test_a_failed_build_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, value in {
        "KUBEBUILDER_ASSETS": "",
        "TRIMTAB_CACHE": str(tmp_path / "cache"),
        "GOMODCACHE": str(tmp_path / "modules"),
        "GOPROXY": "off",
    }.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BuildError, match=r"(?s)module lookup disabled by GOPROXY=off.*Remedy: .*KUBEBUILDER_ASSETS"):
        binaries(lambda line: None)
    assert [path.name for path in (tmp_path / "cache" / "kubernetes").iterdir()] == ["lock"]


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("KUBERNETES", "v1.2.3")
    with pytest.raises(BuildError, match=r"'v1\.2\.3': choose one of v1\.36\.3, v1\.34\.4, v1\.37\.2"):
        binaries()
