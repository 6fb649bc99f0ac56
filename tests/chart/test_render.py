"""The chart renders to valid objects for every set of values, alike in Helm 3 and 4, and refuses wrong values."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.chart.render import CHART, CI_VALUES, HELMS, KUBERNETES, Object, render, render_text, run_helm, tools

from trimtab_operator.api.crd import RESOURCES, crd
from trimtab_operator.core.settings import from_environment
from trimtab_operator.selftest import OPTIONS_VARIABLE, Options

PACKAGED = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
OLDEST = "1.30.0"
FOREIGN = "ServiceMonitor,PodMonitor,PrometheusRule"
"""Kinds of the Prometheus operator: their schemas come with no package."""
BY_STEM = {"ids": lambda path: path.stem}


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("values", CI_VALUES, **BY_STEM)
def test_lint_is_strict(helm: str, values: Path) -> None:
    answer = run_helm("lint", "--strict", CHART, f"--values={values}", f"--kube-version={KUBERNETES}", helm=helm)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("values", CI_VALUES, **BY_STEM)
def test_both_versions_of_helm_render_the_same(values: Path) -> None:
    four, three = (sorted(map(json.dumps, render(f"--values={values}", helm=helm))) for helm in HELMS)
    assert four == three


@pytest.mark.parametrize("values", CI_VALUES, **BY_STEM)
@pytest.mark.parametrize("version", [OLDEST, KUBERNETES])
def test_the_output_fits_the_schemas(values: Path, version: str, schemas: Path) -> None:
    answer = conform(render_text(f"--values={values}"), schemas, version)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    summary = json.loads(answer.stdout)["summary"]
    assert summary["valid"] > 0
    assert summary["skipped"] == (3 if values.stem.startswith("everything") else 0)


@pytest.mark.parametrize(
    "wrong", ["spec: {replicas: two}", "spec: {replicas: 2, replica: 3}", "metadata: {name: x, lables: {}}"]
)
def test_the_check_against_schemas_can_fail(wrong: str, schemas: Path) -> None:
    deployment = next(obj for obj in render() if obj["kind"] == "Deployment")
    part: dict[str, Any] = yaml.safe_load(wrong)
    broken = deployment | {key: deployment[key] | value for key, value in part.items()}
    assert conform(json.dumps(broken), schemas).returncode == 1


def test_the_presets_are_valid_manifests(schemas: Path) -> None:
    """`trimtab validate` checks the rules beside; tests/unit has it."""
    presets = next(obj for obj in render() if obj["metadata"]["name"] == "trimtab-presets")["data"]
    assert sorted(presets) == ["70b-zero3-16-gpus.yaml", "7b-full-8-gpus.yaml", "quickstart-cpu.yaml"]
    for text in presets.values():
        answer = conform(text, schemas)
        assert answer.returncode == 0, answer.stdout + answer.stderr


def test_no_two_objects_have_the_same_name_and_no_variable_stands_twice() -> None:
    """Server-side apply, Helm 4's default, refuses the second."""
    for values in CI_VALUES:
        objects = render(f"--values={values}")
        names = [(obj["kind"], obj["metadata"].get("namespace"), obj["metadata"]["name"]) for obj in objects]
        assert len(names) == len(set(names))
        variables = [entry["name"] for entry in environment(objects)]
        assert len(variables) == len(set(variables))


def test_the_operator_reads_the_settings_as_they_were_given() -> None:
    objects = render(f"--values={CHART / 'ci' / 'everything-values.yaml'}", "--set=watchNamespaces={a,b}")
    given = {entry["name"]: entry["value"] for entry in environment(objects) if "value" in entry}
    settings = from_environment(given)
    assert (settings.workers, settings.requests_per_second, settings.request_burst) == (32, 250.5, 2_000_000)
    assert (settings.cluster_domain, settings.watch_namespaces) == ("corp.local", ("a", "b"))
    assert settings.trainer_image == f"registry.example.com/ml/trimtab-trainer@sha256:{'0123456789abcdef' * 4}"
    assert settings.serving_image == "registry.example.com/trimtab-serving:0.1.0"


def test_the_self_test_reads_its_options() -> None:
    objects = render(f"--values={CHART / 'ci' / 'everything-values.yaml'}")
    (pod,) = (obj for obj in objects if obj["kind"] == "Pod")
    (entry,) = pod["spec"]["containers"][0]["env"]
    assert entry["name"] == OPTIONS_VARIABLE
    options = Options.model_validate_json(entry["value"].replace("$$", "$"))
    assert (options.namespace, options.image) == ("trimtab-system", "registry.example.com/trimtab-operator:0.1.1")
    assert (options.storage_class_name, options.storage, options.timeout_seconds) == ("fast", "2Gi", 600)
    assert options.image_pull_secrets == [{"name": "registry"}]


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("replica=3", "replica"),
        ("image.operator.tags=1", "tags"),
        ("settings.worker=3", "worker"),
        ("settings.metricsPort=1", "metricsPort"),
        ("admission.allowLists.image={a}", "image"),
        ("crds.keep=maybe", "keep"),
        ("replicas=0", "replicas"),
        ("replicas=two", "replicas"),
        ("settings.workers=0", "workers"),
        ("watchNamespaces=team-a", "watchNamespaces"),
        ("watchNamespaces={Team_A}", "watchNamespaces"),
        ("image.operator.digest=sha256:12", "digest"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
    ],
)
def test_a_wrong_value_is_refused_by_name(helm: str, option: str, words: str) -> None:
    command = ("template", "trimtab", CHART, f"--kube-version={KUBERNETES}", f"--set={option}")
    answer = run_helm(*command, helm=helm)
    assert answer.returncode != 0
    assert words in answer.stderr


def test_several_replicas_without_an_election_are_refused() -> None:
    answer = run_helm("template", "trimtab", CHART, "--set=settings.leaderElection=false")
    assert "set replicas to 1" in answer.stderr
    (off,) = [
        e for e in environment(render("--set=settings.leaderElection=false,replicas=1")) if "ELECTION" in e["name"]
    ]
    assert from_environment({off["name"]: off["value"]}).leader_election is False


def test_an_older_kubernetes_is_refused() -> None:
    answer = run_helm("template", "trimtab", CHART, "--kube-version=1.29.9")
    assert answer.returncode != 0
    assert "1.30" in answer.stderr


def environment(objects: list[Object]) -> list[Object]:
    """The operator's variables."""
    deployment = next(obj for obj in objects if obj["kind"] == "Deployment")
    return list(deployment["spec"]["template"]["spec"]["containers"][0]["env"])


def conform(text: str, schemas: Path, version: str = KUBERNETES) -> subprocess.CompletedProcess[str]:
    """kubeconform's verdict, unknown fields refused."""
    location = f"-schema-location={schemas}/{version}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    command = [tools() / "kubeconform", "-strict", "-summary", "-output=json", f"-skip={FOREIGN}", location]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON schemas of Kubernetes' own kinds, from the package kubernetes-validate, and of ours; all closed."""
    root = tmp_path_factory.mktemp("schemas")
    for version in (OLDEST, KUBERNETES):
        folder = root / version
        folder.mkdir()
        for file in (PACKAGED / f"v{version}-local-strict").iterdir():
            # As kubeconform reads them: references to the file beside, not to an address.
            schema = json.loads(file.read_text().replace('"/api/_definitions.json', '"_definitions.json'))
            schema.pop("$id", None)
            (folder / file.name).write_text(json.dumps(schema))
        for resource in RESOURCES:
            definition = crd(resource)["spec"]
            schema = definition["versions"][0]["schema"]["openAPIV3Schema"]
            kind = definition["names"]["kind"].lower()
            (folder / f"{kind}-trimtab-v1alpha1.json").write_text(json.dumps(closed(schema)))
    return root


def closed(schema: Any) -> Any:
    """A structural schema that refuses unknown fields."""
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) if key in ("items", "additionalProperties") else value for key, value in schema.items()}
    if "properties" in schema:
        out["properties"] = {name: closed(child) for name, child in schema["properties"].items()}
        out |= {} if schema.get("x-kubernetes-preserve-unknown-fields") else {"additionalProperties": False}
    return out


def test_the_notes_name_what_is_there() -> None:
    """The commands that a person copies after the installation."""
    answer = run_helm("install", "trimtab", CHART, "--namespace=trimtab-system", "--dry-run=client")
    assert answer.returncode == 0, answer.stderr
    notes = answer.stdout.partition("NOTES:")[2]
    names = {f"{obj['kind'].lower()}/{obj['metadata']['name']}": obj for obj in render()}
    (deployment,) = re.findall(r"rollout status (deployment/\S+)", notes)
    assert deployment in names
    (preset,) = re.findall(r"get configmap (\S+)", notes)
    (key,) = re.findall(r"\{\.data\.(.+)\}", notes)
    assert key.replace("\\.", ".") in names[f"configmap/{preset}"]["data"]
    assert "helm test trimtab --namespace trimtab-system --timeout 1200s" in notes
