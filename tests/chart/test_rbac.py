"""What the roles grant, all of it: the committed table, no wildcard, no Secret, no way to more rights."""

from __future__ import annotations

import pytest
from tests.chart.rbac import PAGE, is_role, page
from tests.chart.render import CI_VALUES, Object, render

DANGEROUS_VERBS = {"*", "escalate", "bind", "impersonate"}
DANGEROUS_RESOURCES = {"*", "pods/exec", "pods/attach", "pods/portforward", "pods/ephemeralcontainers", "nodes"}


def test_the_committed_table_is_what_the_chart_grants() -> None:
    made = page()
    print(made)
    assert PAGE.read_text(encoding="utf-8") == made, "run `make generate-rbac` and read what changed"


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
def test_no_role_holds_more_than_names_and_verbs(values: object) -> None:
    for role in filter(is_role, render(f"--values={values}")):
        for rule in role["rules"]:
            assert not DANGEROUS_VERBS & set(rule["verbs"]), role["metadata"]["name"]
            assert not DANGEROUS_RESOURCES & set(rule["resources"]), role["metadata"]["name"]
            assert "*" not in rule["apiGroups"]
            assert "nonResourceURLs" not in rule
            if "secrets" in rule["resources"]:
                assert role["metadata"]["name"] == "trimtab-selftest"
                assert (rule["verbs"], rule["resourceNames"]) == (["get"], ["registry"])
            if "leases" in rule["resources"] and rule["verbs"] != ["create"]:
                assert rule["resourceNames"] == ["trimtab-operator"]


def test_with_watch_namespaces_the_operator_holds_roles_only() -> None:
    objects = render("--set=watchNamespaces={team-a,team-b}")
    assert not [obj for obj in objects if obj["kind"] == "ClusterRoleBinding"]
    assert namespaces(objects, "trimtab-operator") == {"team-a", "team-b"}
    assert namespaces(objects, "trimtab-operator-leader-election") == {"trimtab-system"}


def namespaces(objects: list[Object], role: str) -> set[str]:
    """Where the operator's account is bound to a role."""
    return {
        obj["metadata"]["namespace"]
        for obj in objects
        if obj["kind"] == "RoleBinding" and obj["roleRef"] == {"apiGroup": GROUP, "kind": "Role", "name": role}
        if obj["subjects"] == [{"kind": "ServiceAccount", "name": "trimtab-operator", "namespace": "trimtab-system"}]
    }


GROUP = "rbac.authorization.k8s.io"
