"""Alerts and dashboard are PromQL about metrics and labels that the operator has; an alert says what to do."""

from __future__ import annotations

import json
import re
from typing import Any

import promql_parser
import pytest
from prometheus_client import CollectorRegistry
from tests.chart.render import CHART, render

from trimtab_operator.core.metrics import Metrics, RuntimeCollector
from trimtab_operator.core.store import Store

EVERYTHING = f"--values={CHART / 'ci' / 'everything-values.yaml'}"
ADDED_BY_PROMETHEUS = {"namespace", "pod", "job", "exported_namespace"}
"""The operator's own label `namespace` becomes `exported_namespace` beside the scraped pod's."""


def rules() -> list[dict[str, Any]]:
    (rule,) = (obj for obj in render(EVERYTHING) if obj["kind"] == "PrometheusRule")
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


def panels() -> list[dict[str, Any]]:
    (board,) = (obj for obj in render(EVERYTHING) if obj["metadata"].get("labels", {}).get("grafana_dashboard") == "1")
    found: list[dict[str, Any]] = json.loads(board["data"]["trimtab.json"])["panels"]
    return found


def expressions() -> dict[str, str]:
    return {alert["alert"]: alert["expr"] for alert in rules()} | {
        panel["title"]: target["expr"] for panel in panels() for target in panel["targets"]
    }


def test_expressions_are_about_metrics_and_labels_that_exist() -> None:
    exposed, labels = exposition()
    for name, expression in expressions().items():
        promql_parser.parse(expression)
        asked = set(re.findall(r"\btrimtab_\w+", expression))
        assert asked or "process_" in expression, name
        assert asked <= exposed, name
        matched = re.findall(r"[{,]\s*(\w+)\s*[=!]", expression)
        assert {*matched, *grouping(expression)} <= labels | ADDED_BY_PROMETHEUS, name


def test_a_wrong_expression_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"unexpected|expected|invalid|missing|unclosed"):
        promql_parser.parse("sum by (kind) rate(x[5m])")


def test_an_alert_says_what_is_wrong_and_what_to_do() -> None:
    for alert in rules():
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"]["summary"].endswith(".")
        assert len(alert["annotations"]["runbook"]) > 40
        named = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
        assert named <= grouping(alert["expr"]), alert["alert"]


def grouping(expression: str) -> set[str]:
    """The labels that an aggregation keeps."""
    return {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}


def test_the_panels_do_not_overlap() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]
    assert len(places) == len(set(places))


def exposition() -> tuple[set[str], set[str]]:
    """Names of the samples that the operator exposes, and of their labels."""
    metrics = Metrics()
    metrics.observe_reconcile("FineTuneJob", "error", "Forbidden", seconds=0.1, since_wake_up=0.1)
    metrics.observe_request("GET", 200)
    metrics.missed.labels("Job").inc()
    metrics.accelerator_seconds.labels("team", "failed").inc()
    metrics.show_leadership(lambda: True, lambda: 1)
    store = Store()
    store.upsert(
        {
            "apiVersion": "trimtab.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "job", "namespace": "team", "uid": "u", "resourceVersion": "1"},
            "spec": {"stages": [{"name": "a", "pretrain": {}}]},
        }
    )
    metrics.registry.register(RuntimeCollector(store, lambda: 1, lambda: 1.0, lambda: {"Job": 1.0}))
    return samples(metrics.registry)


def samples(registry: CollectorRegistry) -> tuple[set[str], set[str]]:
    found = [sample for family in registry.collect() for sample in family.samples]
    return {sample.name for sample in found}, {label for sample in found for label in sample.labels}
