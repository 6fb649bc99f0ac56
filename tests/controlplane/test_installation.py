"""Ways to install: Roles in some namespaces only, by Helm 3 and 4, again; and what `helm test` may do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.chart.render import CHART, run_helm
from tests.controlplane.chart import NAMESPACE, install_rights_and_policies, selftest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.jobs import Space, make_namespace, until
from tests.controlplane.operator import Operator

from trimtab_operator.selftest import OPTIONS_VARIABLE


def test_roles_in_its_namespaces_are_all_that_it_needs(control_plane: ControlPlane, space: Space) -> None:
    install_crds(control_plane)
    control_plane.kubectl("delete", "clusterrolebinding", "trimtab-operator", "--ignore-not-found")
    elsewhere = Space(control_plane, make_namespace(control_plane))
    elsewhere.apply(elsewhere.job())
    chart = (f"--set=watchNamespaces={{{space.namespace}}}",)
    try:
        with Operator(control_plane, chart=chart, watch_namespaces=space.namespace):
            space.apply(space.job())
            space.wait("Complete")
            assert elsewhere.status() == {}
            can = control_plane.kubectl("auth", "can-i", "list", "jobs", "-A", user="operator", check=False)
            assert can.stdout.strip() == "no"
    finally:
        name = "trimtab-operator-namespaces"
        control_plane.kubectl("delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", name)
        install_rights_and_policies(control_plane)
        control_plane.kubectl("delete", "namespace", elsewhere.namespace, "--wait=false")


def test_a_self_test_has_the_rights_that_it_needs_says_why_it_fails_and_leaves_nothing(
    control_plane: ControlPlane, operator: Operator, space: Space
) -> None:
    """The fake kubelet's prepare reports two stages and the self-test's job has one; a real node runs it to its end."""
    *objects, pod = selftest(f"--set=watchNamespaces={{{space.namespace}}}")
    assert [obj["kind"] for obj in objects] == ["ServiceAccount", "Role", "RoleBinding"]
    space.control_plane.kubectl(
        "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    )
    (variable,) = pod["spec"]["containers"][0]["env"]
    kubeconfig = control_plane.service_account_kubeconfig(NAMESPACE, pod["spec"]["serviceAccountName"])
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab_operator.selftest"],
        env={**os.environ, "KUBECONFIG": str(kubeconfig), OPTIONS_VARIABLE: variable["value"].replace("$$", "$")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    claim = until(lambda: [c for c in space.names("pvc") if c.startswith("trimtab-selftest")], "it makes a claim")[0]
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": claim},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "hostPath": {"path": "/nowhere"},
            "claimRef": {"namespace": space.namespace, "name": claim},
        },
    }
    space.apply(volume)
    output, errors = process.communicate(timeout=180)
    control_plane.kubectl("delete", "persistentvolume", claim, "--wait=false")
    assert process.returncode == 1
    assert "Failed, " in errors, output + errors
    for line in ("created PersistentVolumeClaim", "Pod trimtab-selftest", "created FineTuneJob", "deleted FineTuneJob"):
        assert line in output
    for kind in ("pvc", "ftj"):
        until(lambda kind=kind: claim not in space.names(kind), f"no {kind} is left")


def test_helm_3_installs_helm_4_upgrades_and_what_was_made_stays(control_plane: ControlPlane, space: Space) -> None:
    """And after a second installation jobs are taken again: the policies hold no parameter that an API server loses."""
    install_crds(control_plane)
    release = ("trimtab-second", CHART, f"--namespace={space.namespace}")
    options = (f"--kubeconfig={control_plane.kubeconfig()}", "--set=presets.configMap=false")
    helm("helm3", "install", *release, *options, "--take-ownership")
    space.apply(space.job(suspend=True))
    helm("helm", "upgrade", *release, *options, "--set=replicas=3")
    assert space.get("deployment/trimtab-second-operator")["spec"]["replicas"] == 3
    for _ in range(2):
        helm("helm", "uninstall", release[0], release[2], options[0])
        assert not space.get("deployments,serviceaccounts", "--selector=app.kubernetes.io/instance=trimtab-second")[
            "items"
        ]
        assert space.names("ftj") == ["quickstart"]
        helm("helm", "install", *release, *options)
    job = space.job(suspend=True) | {"metadata": {"name": "after", "namespace": space.namespace}}
    refused = job | {"spec": job["spec"] | {"defaults": {"serviceAccountName": "other"}}}
    until(lambda: "is not allowed" in control_plane_says(space, refused), "the policies are in force")
    assert "created" in control_plane_says(space, job)
    helm("helm", "uninstall", release[0], release[2], options[0])


def control_plane_says(space: Space, manifest: dict[str, object]) -> str:
    """Standard output and error of a creation."""
    answer = space.control_plane.kubectl("create", "--filename=-", stdin=json.dumps(manifest), check=False)
    return answer.stdout + answer.stderr


def helm(version: str, *arguments: str | Path) -> None:
    answer = run_helm(*arguments, helm=version)
    assert answer.returncode == 0, answer.stderr
