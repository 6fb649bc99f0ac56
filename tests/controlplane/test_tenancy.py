"""Who may name what: the chart's policies on a real API server, for users and for the operator itself."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from tests.controlplane.chart import install_rights_and_policies
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.jobs import until
from tests.manifests.cases import Manifest, endpoint, job
from tests.manifests.leaves import Place, manifest_with, places

KINDS = ("FineTuneJob", "ModelEndpoint")
MOST_SECRETS = 16
DRY = "--dry-run=server"
SECRET_PLACES = [
    (kind, place) for kind in KINDS for place in places(kind, lambda name, _: name in ("secretRef", "imagePullSecrets"))
]


@pytest.fixture(scope="module", autouse=True)
def policies(control_plane: ControlPlane) -> Iterator[None]:
    """In force: an API server takes a moment to learn of a policy."""
    install_crds(control_plane)
    install_rights_and_policies(control_plane)
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "foreign", "namespace": "default"}}
    until(lambda: "owns" in send(control_plane, foreign, "operator").stderr, "the operator's writes are checked")
    stranger = manifest_with("FineTuneJob", ("spec", "model", "secretRef"), {"name": "any"})
    for role in ("view", "edit"):
        name = f"alice-{role}"
        control_plane.kubectl("create", "clusterrolebinding", name, f"--clusterrole=trimtab-{role}", "--user=alice")
    until(lambda: "may not get" in send(control_plane, stranger, "alice").stderr, "names of Secrets are checked")
    yield
    control_plane.kubectl("delete", "clusterrolebinding", "alice-view", "alice-edit")


@pytest.fixture
def alice(control_plane: ControlPlane, namespace: str) -> str:
    """A namespace where alice may write jobs and endpoints, and get the Secrets `mine-0` to `mine-16`."""
    names = [f"--resource-name=mine-{index}" for index in range(MOST_SECRETS + 1)]
    inside = f"--namespace={namespace}"
    control_plane.kubectl("create", "role", "mine", "--verb=get", "--resource=secrets", *names, inside)
    control_plane.kubectl("create", "rolebinding", "mine", "--role=mine", "--user=alice", inside)
    return namespace


def send(control_plane: ControlPlane, manifest: Manifest, user: str, verb: str = "create") -> Any:
    """kubectl's answer to a manifest that is not kept."""
    return control_plane.kubectl(
        verb, "--filename=-", DRY, "--validate=strict", user=user, stdin=json.dumps(manifest), check=False
    )


def moved(manifest: Manifest, namespace: str) -> Manifest:
    return manifest | {"metadata": manifest["metadata"] | {"namespace": namespace}}


def naming(place: Place, name: str) -> Any:
    return [{"name": name}] if place[-1] == "imagePullSecrets" else {"name": name}


def refused(answer: subprocess.CompletedProcess[str], *words: str) -> None:
    assert answer.returncode == 1, answer.stdout
    assert [word for word in words if word not in answer.stderr] == [], answer.stderr


@pytest.mark.parametrize(("kind", "place"), SECRET_PLACES, ids=lambda part: ".".join(part) if part[0] == "spec" else "")
def test_a_secret_that_the_user_may_not_get(control_plane: ControlPlane, alice: str, kind: str, place: Place) -> None:
    other = moved(manifest_with(kind, place, naming(place, "theirs")), alice)
    refused(send(control_plane, other, "alice"), "you may not get the Secret theirs", "ask for the right")
    own = moved(manifest_with(kind, place, naming(place, "mine-0")), alice)
    answer = send(control_plane, own, "alice")
    assert answer.returncode == 0, answer.stderr


def with_secrets(names: list[str], stages: int = 16, data: int = 32) -> Manifest:
    """A job of the largest size, whose data sets name these Secrets in turn; with a rollout."""
    sources = [{"uri": f"s3://bucket/{n}", "secretRef": {"name": names[n % len(names)]}} for n in range(data)]
    task = {"data": sources, "validation": {"data": sources}}
    made = job(stages=[{"name": f"s{n}", "pretrain": copy.deepcopy(task)} for n in range(stages)])
    made["spec"]["rollout"] = {"from": "s0", "endpointName": "case", "create": {"servedModelName": "case"}}
    return made


def test_the_checks_are_affordable_at_their_bound(control_plane: ControlPlane, alice: str) -> None:
    names = [f"mine-{index}" for index in range(MOST_SECRETS)]
    answer = send(control_plane, moved(with_secrets(names), alice), "alice")
    assert answer.returncode == 0, answer.stderr
    refused(send(control_plane, moved(with_secrets([*names[:-1], "theirs"]), alice), "alice"), "the Secret theirs")
    refused(
        send(control_plane, moved(with_secrets([*names, f"mine-{MOST_SECRETS}"]), alice), "alice"),
        f"name at most {MOST_SECRETS} different Secrets",
    )


def test_who_only_suspends_needs_no_right_to_the_secrets(control_plane: ControlPlane, alice: str) -> None:
    made = moved(manifest_with("FineTuneJob", ("spec", "model", "secretRef"), {"name": "theirs"}), alice)
    control_plane.kubectl("create", "--filename=-", stdin=json.dumps(made))
    made["spec"]["suspend"] = True
    answer = send(control_plane, made, "alice", "replace")
    assert answer.returncode == 0, answer.stderr


def test_an_endpoint_that_the_user_may_not_update(control_plane: ControlPlane, namespace: str) -> None:
    inside = f"--namespace={namespace}"
    control_plane.kubectl("create", "role", "jobs", "--verb=create", "--resource=finetunejobs.trimtab.dev", inside)
    control_plane.kubectl("create", "rolebinding", "jobs", "--role=jobs", "--user=bob", inside)
    made = moved(job(rollout={"from": "chat", "endpointName": "theirs"}), namespace)
    refused(send(control_plane, made, "bob"), "you may not update the ModelEndpoint theirs", "rollout.endpointName")
    control_plane.kubectl(
        *("create", "role", "theirs", "--verb=update", "--resource=modelendpoints.trimtab.dev", inside),
        "--resource-name=theirs",
    )
    control_plane.kubectl("create", "rolebinding", "theirs", "--role=theirs", "--user=bob", inside)
    until(lambda: send(control_plane, made, "bob").returncode == 0, "the right is enough")
    made["spec"]["rollout"]["create"] = {"servedModelName": "x"}
    refused(send(control_plane, made, "bob"), "you may not create a ModelEndpoint", "remove rollout.create")


def test_images_and_service_accounts_are_those_of_the_lists(control_plane: ControlPlane, namespace: str) -> None:
    refused(account(control_plane, namespace, "builder"), "service account builder is not allowed", "one of: default")
    lists = "admission.allowLists"
    install_rights_and_policies(
        control_plane,
        f"--set={lists}.images={{registry.example.com/ml/*,trainer:1}}",
        f"--set={lists}.serviceAccounts={{builder}}",
    )
    try:
        until(lambda: account(control_plane, namespace, "builder").returncode == 0, "the lists are in force")
        assert account(control_plane, namespace, "default").returncode == 0
        refused(account(control_plane, namespace, "other"), "service account other is not allowed", "default, builder")
        for kind in KINDS:
            for place in places(kind, lambda name, _: name == "image"):
                for good in ("registry.example.com/ml/x:1", "trainer:1"):
                    answer = send(control_plane, moved(manifest_with(kind, place, good), namespace), "admin")
                    assert answer.returncode == 0, answer.stderr
                for bad in ("registry.example.com/other/x", "trainer:10", "evil.example.com/registry.example.com/ml/x"):
                    answer = send(control_plane, moved(manifest_with(kind, place, bad), namespace), "admin")
                    refused(answer, f"image {bad} is not allowed", "registry.example.com/ml/*, trainer:1")
            for place in places(kind, lambda name, _: name == "serviceAccountName"):
                answer = send(control_plane, moved(manifest_with(kind, place, "other"), namespace), "admin")
                refused(answer, "service account other is not allowed")
    finally:
        install_rights_and_policies(control_plane)
        until(lambda: account(control_plane, namespace, "builder").returncode == 1, "the lists are short again")


def account(control_plane: ControlPlane, namespace: str, name: str) -> Any:
    return send(control_plane, moved(endpoint(serviceAccountName=name), namespace), "admin")


@pytest.mark.parametrize(
    ("role", "may", "may_not"),
    [
        ("view", "get", "create"),
        ("edit", "create", "deletecollection"),
        ("admin", "deletecollection", "escalate"),
    ],
)
def test_the_cluster_roles_hold_both_kinds(
    control_plane: ControlPlane, namespace: str, role: str, may: str, may_not: str
) -> None:
    inside = f"--namespace={namespace}"
    control_plane.kubectl("create", "rolebinding", "bob", f"--clusterrole={role}", "--user=bob", inside)

    def can(verb: str, resource: str, *options: str) -> bool:
        answer = control_plane.kubectl("auth", "can-i", verb, resource, inside, *options, user="bob", check=False)
        return answer.stdout.strip() == "yes"

    for resource in ("finetunejobs.trimtab.dev", "modelendpoints.trimtab.dev"):
        until(lambda resource=resource: can(may, resource), f"{role} may {may} {resource}")
        assert not can(may_not, resource)
        assert not can("patch", resource, "--subresource=status")


OWNER = {
    "apiVersion": "trimtab.dev/v1alpha1",
    "kind": "FineTuneJob",
    "name": "case",
    "uid": "00000000-0000-0000-0000-000000000000",
    "controller": True,
}
POD: dict[str, Any] = {
    "restartPolicy": "Never",
    "automountServiceAccountToken": False,
    "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "c",
            "image": "i",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
    ],
}


def owned(kind: str, api_version: str = "v1", **fields: Any) -> Manifest:
    metadata = {"name": "case", "namespace": "default", "ownerReferences": [OWNER]}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def pod_job(change: dict[str, Any], container: dict[str, Any] | None = None) -> Manifest:
    """A Job of the operator's, its pod changed."""
    pod = copy.deepcopy(POD) | change
    pod["containers"][0] |= container or {}
    pod["containers"][0]["securityContext"] |= (container or {}).get("securityContext", {})
    return owned("Job", "batch/v1", spec={"template": {"spec": pod}})


def test_the_operator_creates_restricted_pods(control_plane: ControlPlane) -> None:
    answer = send(control_plane, pod_job({}), "operator")
    assert answer.returncode == 0, answer.stderr


def secured(**fields: Any) -> dict[str, Any]:
    return {"securityContext": POD["containers"][0]["securityContext"] | fields}


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (pod_job({"automountServiceAccountToken": True}), "service-account token"),
        (pod_job({"hostNetwork": True}), "share no namespace with their node"),
        (pod_job({"hostPID": True}), "share no namespace with their node"),
        (pod_job({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}), "remove other volumes"),
        (
            pod_job({"volumes": [{"name": "v", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]}),
            "remove other volumes",
        ),
        (pod_job({"securityContext": {}}), "a user other than root"),
        (pod_job({"securityContext": POD["securityContext"] | {"runAsUser": 0}}), "a user other than root"),
        (pod_job({}, secured(privileged=True, allowPrivilegeEscalation=True)), "no privilege"),
        (pod_job({}, secured(allowPrivilegeEscalation=True)), "no privilege"),
        (pod_job({}, secured(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]})), "no privilege"),
        (pod_job({}, secured(capabilities={"drop": ["CHOWN"]})), "no privilege"),
        (pod_job({}, secured(runAsUser=0)), "no privilege"),
        (pod_job({}, secured(seccompProfile={"type": "Unconfined"})), "no privilege"),
        (pod_job({}, {"ports": [{"containerPort": 1, "hostPort": 1}]}), "no privilege"),
        (
            pod_job({"initContainers": [{"name": "i", "image": "i", "securityContext": {"privileged": True}}]}),
            "no privilege",
        ),
        (owned("Service", spec={"type": "NodePort", "ports": [{"port": 1}]}), "of type ClusterIP"),
        (owned("Service", spec={"externalIPs": ["192.0.2.1"], "ports": [{"port": 1}]}), "no external address"),
        (owned("ConfigMap") | {"metadata": {"name": "case", "namespace": "default"}}, "owns"),
    ],
)
def test_the_operator_itself_is_held_to_it(control_plane: ControlPlane, manifest: Manifest, words: str) -> None:
    refused(send(control_plane, manifest, "operator"), words)


def test_the_operator_deletes_and_changes_nothing_of_others(control_plane: ControlPlane, namespace: str) -> None:
    inside = f"--namespace={namespace}"
    control_plane.kubectl("create", "deployment", "theirs", "--image=i", inside)
    control_plane.kubectl("create", "configmap", "theirs", inside)
    for kind in ("deployment", "configmap"):
        answer = control_plane.kubectl("delete", kind, "theirs", inside, user="operator", check=False)
        refused(answer, "only what a FineTuneJob or a ModelEndpoint owns")
    control_plane.kubectl("create", "service", "clusterip", "theirs", "--tcp=80", inside)
    patch = '--patch={"metadata": {"labels": {"app.kubernetes.io/managed-by": "trimtab"}}}'
    answer = control_plane.kubectl("patch", "service", "theirs", patch, inside, user="operator", check=False)
    refused(answer, "only what a FineTuneJob or a ModelEndpoint owns")
    for verb, resource in (("get", "secrets"), ("list", "secrets"), ("create", "pods"), ("create", "pods/exec")):
        answer = control_plane.kubectl("auth", "can-i", verb, resource, inside, user="operator", check=False)
        assert answer.stdout.strip() == "no"


def test_the_operator_writes_in_its_namespaces_only(control_plane: ControlPlane, namespace: str) -> None:
    """The policy alone: here the operator still holds the ClusterRole of an earlier installation."""
    install_rights_and_policies(control_plane, f"--set=watchNamespaces={{{namespace}}}")
    try:
        answers = (owned("ConfigMap"), owned("Job", "batch/v1", spec={"template": {"spec": POD}}))
        for manifest in answers:
            until(
                lambda manifest=manifest: "watchNamespaces only" in send(control_plane, manifest, "operator").stderr,
                "refused outside",
            )
            answer = send(control_plane, moved(manifest, namespace), "operator")
            assert answer.returncode == 0, answer.stderr
    finally:
        name = "trimtab-operator-namespaces"
        control_plane.kubectl("delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", name)
        install_rights_and_policies(control_plane)
