"""The Grafana dashboard, as data: a table of panels, laid out two a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_P = "trimtab_operator_"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One graph; `legend` names the labels that tell its lines apart."""

    title: str
    expression: str
    legend: str
    unit: str = "short"
    help: str = ""


PANELS = (
    Panel("Jobs by phase", f"sum by (phase) (max by (phase, stage_type) ({_P}jobs))", "{{phase}}"),
    Panel("Running stages by type", f'max by (stage_type) ({_P}jobs{{phase="Running"}})', "{{stage_type}}"),
    Panel(
        "Accelerator hours of the last day, by outcome",
        f"sum by (exported_namespace, outcome) (increase({_P}accelerator_seconds_total[1d])) / 3600",
        "{{exported_namespace}} {{outcome}}",
        help="Counted as an attempt ends; failed is what was spent for nothing.",
    ),
    Panel("Leader", f"{_P}leader", "{{pod}}", help="Exactly one line stands at 1."),
    Panel(
        "Reconciliations by outcome",
        f"sum by (kind, outcome) (rate({_P}reconcile_total[5m]))",
        "{{kind}} {{outcome}}",
        "ops",
    ),
    Panel(
        "Failing reconciliations by reason",
        f'sum by (kind, reason) (rate({_P}reconcile_total{{outcome=~"error|refused"}}[5m]))',
        "{{kind}} {{reason}}",
        "ops",
    ),
    Panel(
        "From a change to the end of its reconciliation, 99th percentile",
        f"histogram_quantile(0.99, sum by (kind, le) (rate({_P}wake_up_seconds_bucket[5m])))",
        "{{kind}}",
        "s",
    ),
    Panel("Age of the oldest waiting key", f"max by (pod) ({_P}queue_oldest_seconds)", "{{pod}}", "s"),
    Panel("Waiting keys", f"max by (pod) ({_P}queue_depth)", "{{pod}}"),
    Panel(
        "Requests to the API server",
        f"sum by (verb, code) (rate({_P}api_requests_total[5m]))",
        "{{verb}} {{code}}",
        "reqps",
    ),
    Panel("Time since a kind was heard of", f"max by (kind) ({_P}watch_age_seconds)", "{{kind}}", "s"),
    Panel("Changes that the watches missed", f"sum by (kind) (increase({_P}missed_changes_total[1h]))", "{{kind}}"),
    Panel("Objects in the store", f"max by (kind) ({_P}store_objects)", "{{kind}}"),
    Panel("Memory of the operator", 'process_resident_memory_bytes{job=~".*trimtab-operator.*"}', "{{pod}}", "bytes"),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "trimtab-operator",
        "title": "Trimtab operator",
        "tags": ["trimtab"],
        "schemaVersion": 39,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "1m",
        "templating": {
            "list": [{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(index, panel) for index, panel in enumerate(PANELS)],
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": {"x": 12 * (index % 2), "y": 8 * (index // 2), "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [{"refId": "A", "datasource": _SOURCE, "expr": panel.expression, "legendFormat": panel.legend}],
    }
